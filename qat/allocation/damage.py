"""How much the model loses where one layer is quantized, and all others stay float.

Three scores, from cheap to dear:

``output``
    The squared error of the layer's own output, relative to its squares. One run a batch. It does not know what the
    model makes of the output.
``gradient``
    The second-order estimate of ``kl``. Close to the float model the divergence is half a quadratic form, whose matrix
    is the Fisher information of the model's own predictions (Martens 2020, https://arxiv.org/abs/1412.1193). Labels
    drawn from them give gradients g of the output of each layer, and the estimate is half the sum of squares of g
    times the output's error, positions taken as independent. One run and one gradient a batch.
``kl``
    The divergence itself. One run a batch for each layer and type.

The damage of layers is added up later, as if they did not act on each other. A layer is quantized by its own prepared
class for the moment, with the quantizer that the algorithm makes: the arithmetic is that of training and serving.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from qat.errors import CalibrationError
from qat.formats import LayerTypes
from qat.layers import layer_class
from qat.probing import kept_modes, run_batch, watched
from qat.quantizers import Algorithm, Automatic, WeightQuantizer
from qat.serving import snapshot
from qat.tensors import map_tensors

__all__ = ["Score", "damages"]

Score = Literal["output", "gradient", "kl"]
_ROWS = 1024  # of logits that are turned into probabilities at a time


class _Answer(NamedTuple):
    """What a model answers to a batch."""

    tensors: list[Tensor]
    """Logits ``(predictions, classes)``, or all floating tensors of the outputs."""
    is_logits: bool

    @classmethod
    def of(cls, outputs: Any, batch: Any) -> _Answer:
        """Of logits those that the batch's ``attention_mask`` leaves, if it has one of their shape."""
        fields = vars(outputs) if dataclasses.is_dataclass(outputs) and not isinstance(outputs, Mapping) else outputs
        logits = fields.get("logits") if isinstance(fields, Mapping) else None
        if isinstance(logits, Tensor) and logits.ndim > 1:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
                return cls([logits[mask.to(logits.device).bool()]], True)
            return cls([logits.flatten(0, -2)], True)
        found: list[Tensor] = []
        map_tensors(lambda tensor: found.append(tensor) or tensor, fields)  # type: ignore[func-returns-value]
        found = [tensor for tensor in found if tensor.is_floating_point()]
        if not found:
            raise CalibrationError(
                f"model: returns a {type(outputs).__name__} without floating tensors, so that no damage can be seen: "
                "let the model, or forward, return its outputs"
            )
        return cls(found, False)

    def size(self) -> float:
        """What a sum of damages is divided by: the number of predictions, or the squares of the tensors."""
        if self.is_logits:
            return len(self.tensors[0])
        return sum(map(_squares, self.tensors))

    def damage(self, given: _Answer) -> float:
        """The summed divergence of other predictions from these, in nats, or the squared distance."""
        total = 0.0
        for wanted, other in zip(self.tensors, given.tensors, strict=True):
            if self.is_logits:
                for p, q in zip(torch.split(wanted, _ROWS), torch.split(other, _ROWS), strict=True):
                    logs = (q.float().log_softmax(-1), p.float().log_softmax(-1))
                    total += float(nn.functional.kl_div(*logs, reduction="sum", log_target=True))
            else:
                total += _squares(other.double() - wanted.double())
        return total

    def drawn(self, generator: torch.Generator) -> list[Tensor]:
        """Random vectors for the outputs, whose covariance is the matrix of the quadratic form."""
        if not self.is_logits:
            return [torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype) for x in self.tensors]
        p = self.tensors[0].detach().float().softmax(-1)
        drawn = -p
        drawn.scatter_add_(1, torch.multinomial(p, 1, generator=generator), torch.ones_like(p[:, :1]))
        return [drawn.to(self.tensors[0].dtype)]


def damages(
    model: nn.Module,
    candidates: Mapping[str, Sequence[LayerTypes]],
    batches: Sequence[Any],
    score: Score,
    algorithm: Algorithm | None,
    forward: Callable[[nn.Module, Any], Any] | None,
) -> Iterator[tuple[str, dict[str, float]]]:
    """The damage of each layer at each of its types, by the type's name; the model is as before at each.

    Raises:
        CalibrationError: the model cannot run a batch, a layer is never reached, or a damage is no number.
    """
    scorer = _Scorer(model, candidates, batches, algorithm, forward)
    with kept_modes(model):
        model.eval()
        for name, found in scorer.by_divergence() if score == "kl" else scorer.in_one_run(score):
            if not all(0 <= value < float("inf") or abs(value) < 1e-6 for value in found.values()):
                raise CalibrationError(
                    f"batches: layer {name!r} has the damage {found}, which is no number: check the batches and the "
                    "model for inf and NaN"
                )
            yield name, {kind: max(0.0, value) for kind, value in found.items()}


class _Scorer:
    def __init__(
        self,
        model: nn.Module,
        candidates: Mapping[str, Sequence[LayerTypes]],
        batches: Sequence[Any],
        algorithm: Algorithm | None,
        forward: Callable[[nn.Module, Any], Any] | None,
    ) -> None:
        self.model, self.batches, self.forward, self.algorithm = model, batches, forward, algorithm
        self.candidates = candidates
        self.layers = {name: model.get_submodule(name) for name in candidates}

    def answer(self, number: int) -> _Answer:
        batch = self.batches[number]
        return _Answer.of(run_batch(self.model, batch, number, self.forward), batch)

    @torch.no_grad()
    def quantizers(self, name: str) -> dict[str, WeightQuantizer]:
        """A quantizer of the layer for each type, by the type's name."""
        module, made = self.layers[name], {}
        cls = layer_class(module)
        assert cls is not None
        weight = cls.effective_weight(module)
        for types in self.candidates[name]:
            quantizer = (self.algorithm or Automatic()).make(weight, types.weights, types.dtype)
            made[types.weights.name] = quantizer.to(weight.device)
        return made

    def require_reached(self, reached: Container[str]) -> None:
        missed = [name for name in self.layers if name not in reached]
        if missed:
            raise CalibrationError(
                f"batches: {len(missed)} layers were never reached in {len(self.batches)} batches (first: "
                f"{missed[:3]}): pass batches that use them, or exclude those layers in the spec"
            )

    @torch.no_grad()
    def by_divergence(self) -> Iterator[tuple[str, dict[str, float]]]:
        reached: set[str] = set()
        with watched(self.layers, lambda name, *_: reached.add(name)):
            wanted = [self.answer(number) for number in range(len(self.batches))]
        self.require_reached(reached)
        size = _told(sum(answer.size() for answer in wanted))
        for name, module in self.layers.items():
            found = {}
            for kind, quantizer in self.quantizers(name).items():
                with _quantized(module, quantizer):
                    total = sum(answer.damage(self.answer(number)) for number, answer in enumerate(wanted))
                found[kind] = total / size
            yield name, found

    def in_one_run(self, score: Score) -> Iterator[tuple[str, dict[str, float]]]:
        found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        made = {name: self.quantizers(name) for name in self.layers}
        gradient, size, outputs = score == "gradient", 0.0, list[tuple[str, Tensor, dict[str, Tensor]]]()

        def note(name: str, module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
            gaps = {}
            for kind, quantizer in made[name].items():
                with torch.no_grad(), _quantized(module, quantizer):
                    gap = module.forward(*args, **kwargs) - y
                if gradient:
                    gaps[kind] = gap
                elif y.numel():  # an empty batch does not reach the layer
                    found[name][kind] += _squares(gap)
            if not gradient:
                if y.numel():
                    found[name][""] += _squares(y)
                return None
            start = y if y.requires_grad else y.detach().requires_grad_()
            outputs.append((name, start, gaps))
            return start.clone()  # a model may change its copy in place

        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(gradient))
            for name, module in self.layers.items():
                hook = functools.partial(note, name)
                stack.callback(module.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
            for number in range(len(self.batches)):
                answer = self.answer(number)
                if gradient:
                    size += answer.size() * (2 if answer.is_logits else 1)
                    slopes = self.slopes(answer, [start for _, start, _ in outputs], number)
                    for (name, _, gaps), slope in zip(outputs, slopes, strict=True):
                        for kind, gap in gaps.items():
                            found[name][kind] += _squares(0 * gap if slope is None else (gap * slope).float().sum(-1))
                    outputs.clear()
        self.require_reached(found)
        size = _told(size) if gradient else size
        for name in self.layers:
            total = found[name].pop("", 0.0)
            yield name, {kind: value / (size if gradient else total or 1) for kind, value in found[name].items()}

    def slopes(self, answer: _Answer, starts: list[Tensor], number: int) -> Sequence[Tensor | None]:
        """Gradients of the outputs of layers, for vectors drawn for the model's outputs."""
        generator = torch.Generator(answer.tensors[0].device).manual_seed(number)
        drawn = answer.drawn(generator)
        used = [index for index, tensor in enumerate(answer.tensors) if tensor.requires_grad]
        if not used:
            raise CalibrationError(
                "score='gradient': no gradient leads from the model's outputs to its layers: let the model, and "
                "forward, run without torch.no_grad, or use score='kl'"
            )
        tensors = [answer.tensors[index] for index in used]
        return torch.autograd.grad(tensors, starts, [drawn[index] for index in used], allow_unused=True)


def _told(size: float) -> float:
    """What sums of damages are divided by; 0 would make each of them 0."""
    if size == 0:
        raise CalibrationError(
            "batches: the model's outputs hold no prediction, or are zero everywhere, so that no damage can be "
            "seen: pass batches with rows that count, or use score='output'"
        )
    return size


def _squares(x: Tensor) -> float:
    return float(x.detach().double().square().sum())


@contextmanager
def _quantized(module: nn.Module, quantizer: WeightQuantizer) -> Iterator[None]:
    """Let a float layer be a quantized one within the block."""
    cls, restore = layer_class(module), snapshot(module)
    assert cls is not None
    try:
        cls.adopt(module, quantizer)
        yield
    finally:
        restore()
