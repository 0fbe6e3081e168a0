"""Distillation: a student is trained towards what a float teacher says of the same batch.

`Distillation` says which distances count and how much. `Distiller` runs student and teacher and measures them, for
`QuantizedTask` and for loops of one's own. Hidden states are read by forward hooks on the blocks of both, which are
there during the two forwards only: what gradient checkpointing computes again in backward is not counted twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from qat.blocks import find_blocks
from qat.errors import TrainingError
from qat.spec import NamedArguments
from qat.tensors import model_device
from qat.training.losses import attention_distance, divergence, hidden_state_distance, squared_distance
from qat.training.teacher import CachedLogits, logits_of, one_block_at_a_time

__all__ = ["Distillation", "Distiller", "Predictions"]

Predictions = Callable[[Any], tuple[Tensor, Tensor | None]]
"""Of a model's outputs what is compared, ``(..., classes)``, and which rows count, ``(...)`` bool; None: all."""


class Distillation(NamedArguments):
    """Which distances from the teacher are trained, and their share of the loss; the default is KL alone.

    loss = (1 - weight) * own loss + weight * (distance of predictions + hidden_states * ... + attention_maps * ...)

    Raises:
        SpecError: a number is out of its range.

    >>> Distillation(loss="mixed_kl", hidden_states=1.0).reverse
    0.5
    """

    loss: Literal["kl", "reverse_kl", "mixed_kl", "squared"] = "kl"
    """Of logits KL(teacher || student), KL(student || teacher) or both; squared: of a diffusion model's prediction."""
    weight: float = Field(default=1.0, ge=0, le=1)
    """Share of the distillation; the rest is the task's own loss."""
    temperature: float = Field(default=1.0, gt=0)
    """Both logits are divided by it."""
    gamma: float = Field(default=0.5, ge=0, le=1)
    """Share of KL(student || teacher) in mixed_kl; BitDistiller: the teacher's mean probability of the right token."""
    hidden_states: float = Field(default=0.0, ge=0)
    """Weight of the relative squared distance of the blocks' outputs."""
    attention_maps: float = Field(default=0.0, ge=0)
    """Weight of the KL of attention probabilities, for encoders that return them (attn_implementation="eager")."""
    offload: bool = False
    """Keep the teacher's blocks in CPU memory, one at a time on the device: less memory, slower steps."""

    @model_validator(mode="after")
    def _temperature_is_of_logits(self) -> Self:
        if self.loss == "squared" and self.temperature != 1.0:
            raise ValueError(f"temperature: must be 1 with loss='squared', which has no logits, got {self.temperature}")
        return self

    @property
    def reverse(self) -> float:
        """Share of KL(student || teacher)."""
        return {"reverse_kl": 1.0, "mixed_kl": self.gamma}.get(self.loss, 0.0)


class Distiller:
    """Runs a student and its teacher on a batch, and measures the distance.

    Args:
        student: float or prepared; also one that ``torch.compile`` has wrapped, unless hidden states are compared.
        teacher: a float model, which is switched to evaluation mode, without gradients; or `CachedLogits`.
        distillation: default `Distillation`, KL alone.

    Raises:
        TrainingError: the teacher is the student or shares parameters with it, has another number of blocks, or is a
            cache and cannot give what is compared.
        SpecError: hidden states are compared and one of both has no blocks.

    >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    >>> outputs, distance = Distiller(student, teacher)({"input": torch.ones(2, 4)})
    >>> distance.backward()
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | CachedLogits, distillation: Distillation | None = None
    ) -> None:
        self.student, self.teacher = student, teacher
        self.distillation = how = distillation or Distillation()
        self._blocks: list[tuple[nn.Module, ...]] = [(), ()]
        self._maps_are_whole = False
        if isinstance(teacher, CachedLogits):
            if how.loss == "squared" or how.temperature != 1.0 or how.hidden_states or how.attention_maps:
                raise TrainingError(
                    "teacher: cached logits serve the KL losses at temperature 1 alone, without hidden_states and "
                    f"attention_maps, got {how!r}: give the teacher's model"
                )
            return
        if not isinstance(teacher, nn.Module):
            raise TrainingError(f"teacher: must be a model or qat.CachedLogits, got {type(teacher).__name__}")
        if {id(parameter) for parameter in student.parameters()} & {
            id(parameter) for parameter in teacher.parameters()
        }:
            raise TrainingError("teacher: shares parameters with the student: give a copy, copy.deepcopy(model)")
        teacher.eval().requires_grad_(False)
        if how.hidden_states:
            if hasattr(student, "_orig_mod") or getattr(student, "_compiled_call_impl", None) is not None:
                raise TrainingError("hidden_states: cannot be read from a compiled model: do not compile the student")
            self._blocks = [tuple(find_blocks(model).values()) for model in (student, teacher)]
            ours, theirs = map(len, self._blocks)
            if ours != theirs:
                raise TrainingError(
                    f"hidden_states: the teacher must have the student's {ours} blocks, got {theirs}: give a teacher "
                    "of the same depth, or hidden_states=0"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Distiller:
        """A copy with the same teacher: an average of weights copies the module that holds this."""
        if isinstance(self.teacher, nn.Module):
            memo |= {id(module): module for module in self.teacher.modules()}
        new = object.__new__(type(self))
        memo[id(self)] = new
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def __call__(self, inputs: Mapping[str, Any], predictions: Predictions | None = None) -> tuple[Any, Tensor]:
        """The student's outputs, and its distance from the teacher: a scalar, float32.

        Args:
            inputs: keyword arguments of both models. Tokens that ``attention_mask`` marks as padding never count.
            predictions: what is compared and which rows count; default: the logits, all rows.

        Raises:
            TrainingError: the outputs do not fit each other, or do not hold what is compared; the cache lacks a row.
        """
        if not isinstance(inputs, Mapping):
            raise TrainingError(
                f"inputs: must be keyword arguments of both models, got one {type(inputs).__name__}: pass a mapping, "
                "such as {'input_ids': tokens}"
            )
        how, predictions = self.distillation, predictions or (lambda outputs: (logits_of(outputs), None))
        inputs = {**inputs, "output_attentions": True} if how.attention_maps else dict(inputs)
        with _states_of(self._blocks[0]) as ours:
            outputs = self.student(**inputs)
        theirs: list[Tensor] = []
        if isinstance(self.teacher, CachedLogits):
            taught: Any = self.teacher(inputs)
        else:
            with torch.no_grad(), self._on_device(self.teacher), _states_of(self._blocks[1]) as theirs:
                taught = self.teacher(**inputs)
        mask = inputs.get("attention_mask")
        tokens = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        distance = self._distance(outputs, taught, tokens, predictions)
        if how.hidden_states:
            distance = distance + how.hidden_states * hidden_state_distance(ours, theirs, tokens)
        if how.attention_maps:
            maps = self._maps(outputs, "student"), self._maps(taught, "teacher")
            distance = distance + how.attention_maps * attention_distance(*maps, tokens)
        return outputs, distance

    def _on_device(self, teacher: nn.Module) -> Any:
        device = model_device(self.student)
        if self.distillation.offload:
            return one_block_at_a_time(teacher, device)
        return nullcontext(teacher.to(device))

    def _distance(self, outputs: Any, taught: Any, tokens: Tensor | None, predictions: Predictions) -> Tensor:
        how, (found, counted) = self.distillation, predictions(outputs)
        if tokens is not None and tokens.shape == found.shape[:-1]:
            counted = tokens if counted is None else counted & tokens
        if how.loss == "squared":
            return squared_distance(found, predictions(taught)[0], counted)
        options: dict[str, Any] = {"reverse": how.reverse, "temperature": how.temperature}
        if isinstance(self.teacher, nn.Module):
            return divergence(found, predictions(taught)[0], counted, **options)
        if found.shape[-1] != self.teacher.classes:
            raise TrainingError(
                f"teacher: its cached logits are of {self.teacher.classes} classes, but the student has "
                f"{found.shape[-1]}: cache the logits of a teacher with the student's vocabulary"
            )
        return divergence(found, taught.values, counted, indices=taught.indices, **options)

    def _maps(self, outputs: Any, name: str) -> tuple[Tensor, ...]:
        maps = getattr(outputs, "attentions", None)
        if not maps or not all(isinstance(found, Tensor) for found in maps):
            raise TrainingError(
                f"attention_maps: the {name} gave no attention probabilities: load it with "
                "attn_implementation='eager', or set attention_maps=0"
            )
        if name == "student" and not self._maps_are_whole:
            # Once, since it waits for the device. Dropout would leave zeros, which no divergence can bear.
            if any(bool(((found.detach().float().sum(-1) - 1).abs() > 0.05).any()) for found in maps):
                raise TrainingError(
                    "attention_maps: the student's probabilities do not sum to 1: switch off the dropout of its "
                    "attention (attention_probs_dropout_prob=0)"
                )
            self._maps_are_whole = True
        return tuple(maps)


@contextmanager
def _states_of(blocks: tuple[nn.Module, ...]) -> Iterator[list[Tensor]]:
    """The outputs of blocks, in the order of their calls within it."""
    states: list[Tensor] = []
    trains = torch.is_grad_enabled()

    def keep(block: nn.Module, _: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(state, Tensor):
            raise TrainingError(
                f"hidden_states: a block must return a tensor, alone or first, but {type(block).__name__} returned "
                f"{type(state).__name__}: set hidden_states=0"
            )
        if trains and not torch.is_grad_enabled():
            raise TrainingError(
                "hidden_states: reentrant gradient checkpointing hides the blocks' outputs from autograd: use the "
                "other form, use_reentrant=False"
            )
        states.append(state)

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_hook(keep).remove)
        yield states
