"""Numerical guards: what goes wrong in numbers while a model trains is found, named by layer, and dealt with by policy.

Two kinds of faults. A loss or gradient that is inf or NaN would spoil the weights in this very step. So each optimizer
step is asked, once its gradients are there: one norm of them all, one number that ranks share, one wait for the device.
Scales that collapse, codes that die and values that saturate spoil slowly. So all layers are looked at every some
steps, by `weight_statistics` and `activation_statistics`, pure functions of one quantized tensor. They may be logged.

Thresholds are far from what healthy runs show (docs/results/guards.md), and none of them depends on a type.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qat.distributed import gathered, reshard, sharded
from qat.errors import TrainingError, listed
from qat.layers import QuantizedLayer, quantized_layers
from qat.probing import several_processes
from qat.quantizers.activation import ActivationQuantizer
from qat.spec import NamedArguments
from qat.tensors import map_tensors
from qat.training.schedule import QuantizationSchedule
from qat.training.statistics import ActivationStatistics, WeightStatistics, activation_statistics, weight_statistics

__all__ = ["Guard", "NumericalGuards"]

logger = logging.getLogger("qat")

_COLLAPSED = 0.01  # share of a layer's groups
_FALLEN = -10.0  # binary logarithm of a scale, relative to its start
_DEAD = 0.25  # share of a layer's groups
_SATURATED = 0.25  # share of a layer's weights, or of one activation's values
_UNUSED = 0.01  # share of an activation's range that the largest value needs


class NumericalGuards(NamedArguments):
    """What happens when numbers go wrong in training; for a callback's ``guards``.

    >>> NumericalGuards(nonfinite="skip").most_skipped
    10
    """

    nonfinite: Literal["stop", "skip", "warn"] = "stop"
    """A loss or gradient is inf or NaN: stop before the optimizer step, leave this step out, or only warn. Steps are
    never left out while observers record (``observe_from``), which would keep what such a step brought.
    float16 gradients that the scaler of 16-mixed precision skips by itself are none of these."""
    most_skipped: int = Field(default=10, ge=1, lt=2**31)
    """With ``skip``: this many steps in a row that had to be left out stop the run."""
    degenerate: Literal["stop", "warn", "ignore"] = "warn"
    """Scales of a layer collapse, its codes die or its values saturate: stop, warn once a layer, or do nothing."""
    every: int = Field(default=100, ge=0, lt=2**31)
    """Optimizer steps between two looks at scales, codes and activations of all layers; 0: never."""
    log: bool = False
    """Hand what each look finds of each layer to the Trainer's loggers."""

    def require_fits(self, schedule: QuantizationSchedule) -> None:
        """Raise `TrainingError` where observers of a schedule would record steps that are to leave no trace."""
        if self.nonfinite == "skip" and schedule.observe_from is not None:
            raise TrainingError(
                "guards.nonfinite: 'skip' cannot undo what observers record in a skipped step, and the schedule has "
                f"observe_from={schedule.observe_from}: use 'stop' or 'warn', or calibrate instead (observe_from=None)"
            )


class Guard:
    """Watches one model in training, for whatever runs the loop; all ranks call it alike.

    Args:
        settings: what is done.
        model: prepared.
        step: returns the optimizer steps done.
        activations: whether their values may be looked at, which compiled layers do not show.
    """

    def __init__(
        self, settings: NumericalGuards, model: nn.Module, step: Callable[[], int], *, activations: bool = True
    ) -> None:
        self.settings, self.model, self._step, self._activations = settings, model, step, activations
        self._batch: Any = None
        self._losses: list[Tensor] = []  # since the last optimizer step
        self._skipped = self._in_a_row = self._last = 0
        self._starts: dict[str, float] = {}  # logarithms of scales, by layer and type
        self._told: set[str] = set()  # kinds of faults and layers that were warned of
        self._seen: dict[ActivationQuantizer, Tensor] | None = None  # None: nobody watches

    def state_dict(self) -> dict[str, Any]:
        """Counts, where scales started, and what was warned of, as plain data."""
        counts = {"skipped": self._skipped, "in_a_row": self._in_a_row}
        return {**counts, "starts": dict(self._starts), "told": sorted(self._told)}

    def note_loss(self, loss: Tensor) -> None:
        """Remember the loss of a batch until its optimizer step."""
        self._losses.append(loss.detach())

    @torch.no_grad()
    def before_optimizer(
        self, parameters: Iterable[nn.Parameter], module: nn.Module | None = None, *, scaled: bool = False
    ) -> None:
        """Ask whether losses and gradients are finite, and do what the settings say where they are not.

        Args:
            parameters: those of the optimizer.
            module: names them; default the model.
            scaled: a gradient scaler skips gradients that are not finite.

        Raises:
            TrainingError: they are not, and the run is to stop.
        """
        losses, self._losses, held = self._losses, [], list(parameters)
        gradients = [] if scaled else [_local(p.grad) for p in held if p.grad is not None]
        finite = [torch.isfinite(loss).all() for loss in losses]
        if gradients:
            finite.append(torch.isfinite(nn.utils.get_total_norm(gradients)))
        if not finite and not several_processes():
            return
        device = (losses or gradients or [next(self.model.parameters())])[0].device
        good = torch.stack([flag.to(device) for flag in finite]).all() if finite else torch.ones((), device=device)
        if bool(_shared(good.to(torch.int32), "MIN")):  # the one wait of a step
            self._in_a_row = 0
            return
        fault = self._nonfinite(losses, [] if scaled else held, device, module or self.model)
        if fault is None:  # the norm alone was beyond its dtype
            return
        policy = self.settings.nonfinite
        if policy == "skip":
            self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1
            if self._in_a_row >= self.settings.most_skipped:
                raise TrainingError(f"{fault}, as in {self._in_a_row - 1} skipped steps before it: {_REMEDY}")
            if not (scaled or gradients):
                raise TrainingError(
                    f"{fault}; the step cannot be skipped, for its gradients are out of reach: {_REMEDY}"
                )
            for parameter in () if scaled else held:  # without gradients an optimizer changes nothing
                parameter.grad = None
            logger.warning("%s; the step is skipped, %d in all", fault, self._skipped)
        elif policy == "warn":
            logger.warning("%s", fault)
        else:
            raise TrainingError(f"{fault}; the weights and the last checkpoint are untouched: {_REMEDY}")

    def _nonfinite(
        self, losses: list[Tensor], held: list[nn.Parameter], device: torch.device, module: nn.Module
    ) -> str | None:
        """What is not finite, named alike on all ranks; None where all is."""
        names = {id(p): name for name, p in module.named_parameters()}
        state = [(name, t) for name, t in _state(module) if t.is_floating_point() and not t.is_meta]
        gradients = [(names.get(id(p), "a parameter outside the model"), p.grad) for p in held]
        spoilt_losses = [loss for loss in losses if not bool(torch.isfinite(loss).all())]
        flags = [bool(spoilt_losses), _spoilt_batch(self._batch)]
        flags += [t is not None and not bool(torch.isfinite(_local(t)).all()) for _, t in (*state, *gradients)]
        loss, batch, *bad = _shared(torch.tensor(flags, dtype=torch.int32, device=device), "MAX").tolist()
        weights = [name for (name, _), flag in zip(state, bad, strict=False) if flag]
        reached = [name for (name, _), flag in zip(gradients, bad[len(state) :], strict=True) if flag]
        if not (loss or reached):
            return None
        told = [f"gradient: is not finite at step {self._step()}"]
        if loss:
            value = f"{float(spoilt_losses[0].float().mean())}" if spoilt_losses else "inf or NaN"
            told = [f"loss: became {value} at step {self._step()}{' on some rank' if several_processes() else ''}"]
        if weights:
            told.append(f"inf or NaN is in {listed(weights, 4)}")
        elif reached:
            every = f"all {len(held)} parameters" if len(reached) == len(held) > 4 else listed(reached, 4)
            told.append(f"inf or NaN is in the gradients of {every}")
        return "; ".join([*told, "inf or NaN is in the batch"] if batch else told)

    def begin(self, state: Mapping[str, Any] | None = None) -> dict[str, float]:
        """Before the first step: look at all weights, and note where scales start, or take that from a checkpoint.

        Returns what is to be logged.
        """
        self._last, logged = self._step(), {}
        if state is None:
            logged = self._look({})
            known = [(name, own) for name, _, own in self._activations_of() if own.initialized]
            scales = [own.serving_scale().log2() for _, own in known]
            logs = torch.stack(scales).tolist() if scales else []
            self._starts |= {name: start for (name, _), start in zip(known, logs, strict=True)}
        else:
            self._skipped, self._in_a_row = int(state["skipped"]), int(state["in_a_row"])
            self._starts, self._told = dict(state["starts"]), set(state["told"])
        return logged

    def end(self) -> dict[str, float]:
        """After the last step, unless it was looked at: look at all weights; returns what is to be logged."""
        every = self.settings.every
        return self._look({}) if self.settings.log and every and self._last % every else {}

    def before_step(self, batch: Any = None) -> None:
        """Watch the activations of a step after which layers are looked at; ``batch`` is asked where inf comes from."""
        self._batch = batch
        every = self.settings.every
        if self._seen is None and self._activations and every and (self._step() + 1) % every == 0:
            self._seen = {}
            for _, layer in quantized_layers(self.model):
                layer.mode = layer.mode._replace(watch=self._watch)

    def after_step(self) -> dict[str, float]:
        """Look at all layers where it is time; returns what is to be logged.

        Raises:
            TrainingError: something is degenerate, and the run is to stop.
        """
        self._batch = None  # whose memory is free until the next
        before, self._last, every = self._last, self._step(), self.settings.every
        if not every or before // every == self._last // every:
            return {}
        seen = self.close()
        return self._look(seen)

    def close(self) -> dict[ActivationQuantizer, Tensor]:
        """Watch no activations any more; returns what was seen of them."""
        seen, self._seen = self._seen or {}, None
        for _, layer in quantized_layers(self.model):
            if layer.mode.watch is not None:
                layer.mode = layer.mode._replace(watch=None)
        return seen

    @torch.no_grad()
    def _watch(self, quantizer: ActivationQuantizer, x: Tensor) -> None:
        """The first values that each activation has in a step; a recomputation in backward shows nothing new."""
        if self._seen is None or quantizer in self._seen or not x.numel() or not quantizer.initialized:
            return
        found = activation_statistics(x.detach(), quantizer.serving_scale(), quantizer.qtype, quantizer.dtype)
        self._seen[quantizer] = torch.stack(found)

    def _look(self, seen: dict[ActivationQuantizer, Tensor]) -> dict[str, float]:
        if not self.settings.every:
            return {}
        found = dict(self._found(seen))
        self._judge(found)
        if not self.settings.log:
            return {}
        drift = {f"{name}/drift": one["log2_scale"] - self._starts[name] for name, one in found.items()}
        values = {f"{name}/{key}": value for name, one in found.items() for key, value in one.items()}
        return {f"quantization/{name.replace(' ', '/')}": value for name, value in (values | drift).items()}

    @torch.no_grad()
    def _found(self, seen: dict[ActivationQuantizer, Tensor]) -> Iterator[tuple[str, dict[str, float]]]:
        """What is known of each weight and each activation, by layer, part and type; reads the device once for each."""
        if sharded(self.model):
            reshard(self.model)
        named, vectors, once = [], [], set()
        layers = [(name, layer) for name, layer in quantized_layers(self.model) if layer.mode.weights]
        for _, group in groupby(layers, lambda pair: id(pair[1].holder(pair[1]))):
            beside = list(group)
            with gathered(beside[0][1]):  # experts have their parameter in common
                for name, layer in beside:
                    if id(quantizer := layer.weight_quantizer) not in once:
                        once.add(id(quantizer))
                        named.append(f"{name} {quantizer.qtype.name}")
                        vectors.append(torch.stack(_of_layer(layer)))
        if vectors:
            values = torch.stack([vector.to(vectors[0].device) for vector in vectors]).tolist()
            for name, row in zip(named, values, strict=True):
                yield name, dict(zip(WeightStatistics._fields, row, strict=True))
        parts = [(name, own) for name, layer, own in self._activations_of() if layer.mode.weights]
        if parts and self._activations and (seen or several_processes()):
            missing = torch.full((len(ActivationStatistics._fields),), -math.inf, device=parts[0][1].scale.device)
            table = torch.stack([seen.get(quantizer, missing).to(missing.device) for _, quantizer in parts])
            for (name, _), row in zip(parts, _shared(table, "MAX").tolist(), strict=True):
                if row[-1] > -math.inf:
                    yield name, dict(zip(ActivationStatistics._fields, row, strict=True))

    def _activations_of(self) -> Iterator[tuple[str, QuantizedLayer, ActivationQuantizer]]:
        for name, layer in quantized_layers(self.model):
            for own in layer.activation_quantizers():
                side = "input" if own is layer.input_quantizer else "output"
                yield f"{name} {side} {own.qtype.name}", layer, own

    def _spoilt_parameters(self) -> list[str]:
        """Those that hold inf or NaN, but for quantized weights; a bias of minus infinity reaches no loss."""
        masters = {id(m) for _, layer in quantized_layers(self.model) for m in layer.masters(layer).values()}
        held = [(n, p) for n, p in self.model.named_parameters() if p.is_floating_point() and id(p) not in masters]
        local = [(name, _local(parameter.detach())) for name, parameter in held if not parameter.is_meta]
        if not local:
            return []
        flags = torch.stack([(~torch.isfinite(tensor)).any().to(local[0][1].device) for _, tensor in local])
        flags = _shared(flags.to(torch.int32), "MAX")
        return [name for (name, _), flag in zip(local, flags.tolist(), strict=True) if flag]

    def _judge(self, found: Mapping[str, Mapping[str, float]]) -> None:
        faults: dict[str, list[str]] = {}

        def note(kind: str, name: str, how: str) -> None:
            asked = kind in (_SPOILT, _HIDDEN) or self.settings.degenerate != "ignore"
            if asked and f"{kind} {name}" not in self._told:
                self._told.add(f"{kind} {name}")
                faults.setdefault(kind, []).append(f"{name.rpartition(' ')[0]} ({how})" if how else name)

        for name in self._spoilt_parameters():
            note(_SPOILT, name, "")
        for name, one in found.items():
            start = self._starts.setdefault(name, one["log2_scale"])
            if one["nonfinite"] > 0:
                kind, what = (_SPOILT, "groups") if "dead" in one else (_HIDDEN, "values")
                note(kind, name, f"{one['nonfinite']:.1%} of its {what}")
            if one.get("collapsed", 0.0) > _COLLAPSED:
                note("scales collapsed", name, f"{one['collapsed']:.0%} of its groups")
            elif (fallen := one["log2_scale"] - start) < _FALLEN:
                note("scales collapsed", name, f"to 2^{fallen:.0f} of their start")
            if one.get("dead", 0.0) > _DEAD:
                note("codes died, one or two are left", name, f"in {one['dead']:.0%} of its groups")
            elif "dead" not in one and one["code_use"] < _UNUSED:
                note("codes died, the range is far too wide", name, f"{one['code_use']:.2%} of it is used")
            if not one["saturated"] <= _SATURATED:
                note("values saturate", name, f"{one['saturated']:.0%} of them")
        told = f"by step {self._step()}, {'; '.join(f'{kind} in {listed(names, 4)}' for kind, names in faults.items())}"
        policy = self.settings.nonfinite
        stops = (policy != "warn" and _SPOILT in faults) or (policy == "stop" and _HIDDEN in faults)
        stops = stops or self.settings.degenerate == "stop"
        if faults and stops:
            raise TrainingError(f"layers: {told}: {_REMEDY}")
        if faults:
            logger.warning("%s", told)


_SPOILT, _HIDDEN = "inf or NaN is", "inf or NaN, which codes hide, is"
_REMEDY = "lower the learning rate, or clip gradients, or look for the batch that brings it"


def _of_layer(layer: QuantizedLayer) -> WeightStatistics:
    quantizer, weight = layer.weight_quantizer, layer.effective_weight(layer).detach()
    codes, scale, _ = quantizer.quantize_to_codes(weight)
    value = quantizer.quantize(weight, weight.dtype).value
    return weight_statistics(weight, value, codes, scale, quantizer.qtype)


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and what quantizers hold; buffers of a model, such as masks, may well be infinite."""
    yield from module.named_parameters()
    yield from ((name, t) for name, t in module.named_buffers() if "_quantizer." in name and ".observer." not in name)


def _spoilt_batch(batch: Any) -> bool:
    """Whether a batch holds NaN or inf; minus inf may be a mask."""
    found: list[bool] = []

    def ask(tensor: Tensor) -> Tensor:
        found.append(tensor.is_floating_point() and not bool((tensor < math.inf).all()))
        return tensor

    map_tensors(ask, batch)
    return any(found)


def _local(tensor: Any) -> Tensor:
    """The plain tensor of numbers that this rank holds."""
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor._values() if tensor.is_sparse else tensor  # type: ignore[no-any-return]


def _shared(numbers: Tensor, by: Literal["MIN", "MAX"]) -> Tensor:
    """The least or the largest of all ranks."""
    if several_processes():
        torch.distributed.all_reduce(numbers, op=getattr(torch.distributed.ReduceOp, by))
    return numbers
