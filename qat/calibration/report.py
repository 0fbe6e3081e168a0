"""What calibration found of activations and starts of weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from qat.starting import StartReport

__all__ = ["ActivationReport", "CalibrationReport"]


@dataclass(frozen=True)
class ActivationReport:
    """What calibration found of one input or output."""

    scale: float
    error: float
    """Squared error of the layer's output by quantizing this one alone, relative to the output's squares, measured."""
    saturated: float
    """Share of its elements that lie beyond the largest code."""
    utilization: float
    """Share of the codes' range that the largest magnitude reaches."""
    calls: int
    """How often it was computed."""


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration found; prints as a summary, `table` as a line for each layer."""

    batches: int
    layers: dict[str, tuple[ActivationReport, ...]]
    """Layer name to its input and, if that is quantized, its output."""
    arriving: tuple[str, ...]
    """Layers whose input comes quantized from its producer: it has that scale, and no further error."""
    kept_float: dict[str, str] = field(default_factory=dict)
    """Layers whose inputs and outputs stay float, and why."""
    starts: dict[str, StartReport] = field(default_factory=dict)
    """Layer name to what its weight begins with, where data decided that."""

    def __str__(self) -> str:
        if not self.layers and not self.starts:
            return "nothing to calibrate: no layer has quantized activations, and no weight waits for its start"
        starts = Counter(found.start for found in self.starts.values())
        of_weights = "starts of weights: " + ", ".join(f"{n} {name}" for name, n in sorted(starts.items()))
        return "; ".join([of_weights] * bool(starts) + [self._of_activations()] * bool(self.layers))

    def _of_activations(self) -> str:
        kept = f"; {len(self.kept_float)} layers keep float activations" if self.kept_float else ""
        arriving = f"{len(self.arriving)} inputs arrive quantized"
        return f"calibrated {len(self.layers)} layers on {self.batches} batches; {arriving}{kept}"

    @property
    def scales(self) -> dict[str, tuple[float, float | None]]:
        """Layer name to its input and output scale."""
        return {name: (x.scale, y[0].scale if y else None) for name, (x, *y) in self.layers.items()}

    def table(self) -> str:
        """A line for each layer: scale, error, saturation and utilization of its input and its output.

        Before them, where data decided it, what each weight begins with: the relative squared error of the output by
        min-max weights and by the start that was chosen.
        """
        width = max(map(len, (*self.layers, *self.starts)), default=0)
        lines = [f"{'weight':{width}}  {'start':6}  {'min-max':>8}  {'error':>8}"] * bool(self.starts)
        lines += [f"{n:{width}}  {s.start:6}  {s.before:8.1e}  {s.after:8.1e}" for n, s in self.starts.items()]
        if not self.layers:
            return "\n".join(lines)
        lines += [f"{'layer':{width}}  {'':6}  {'scale':>9}  {'error':>8}  {'beyond':>8}  {'used':>5}    calls"]
        for name, sides in self.layers.items():
            for side, found in zip(("input", "output"), sides, strict=False):
                note = "  float" if name in self.kept_float else ""
                note = "  arrives quantized" if side == "input" and name in self.arriving else note
                lines.append(
                    f"{name:{width}}  {side:6}  {found.scale:9.3g}  {found.error:8.1e}  {found.saturated:8.1e}  "
                    f"{found.utilization:5.0%}  {found.calls:7}{note}"
                )
        return "\n".join(lines)
