"""Distances of a student from its teacher: of distributions over classes, of hidden states, of attention maps.

A language model's logits are the largest tensors of a step. A softmax in float32 takes twice their bfloat16 size, and
autograd on the plain formula keeps several. So `divergence` goes through a few rows at a time and keeps nothing but
the logits; backward computes the rows again and fills the gradient. It holds the student's logits, the teacher's and
the gradient once each, and three float32 temporaries of ``CHUNK`` elements, four with the reverse divergence. It pays
with a second softmax.

Nothing here waits for a device. Rows that do not count add nothing to value or gradient, whatever they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qat.errors import TrainingError

__all__ = ["CHUNK", "attention_distance", "divergence", "hidden_state_distance", "squared_distance"]

CHUNK = 2**22
"""Elements of logits that `divergence` handles at once: 16 MiB for each float32 temporary."""


def divergence(
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None = None,
    *,
    reverse: float = 0.0,
    temperature: float = 1.0,
    indices: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) of predicted distributions, or the reverse, or a mixture; mean over the rows that count.

    The mixture ``(1 - g) KL(teacher || student) + g KL(student || teacher)`` is CAKLD (BitDistiller, arXiv 2402.10631),
    there with the teacher's mean probability of the right token as g. Both logits are divided by the temperature T and
    the result is multiplied by T², which keeps the gradient's size (Hinton 2015, arXiv 1503.02531, section 2).

    Args:
        student: ``(..., classes)`` logits, any float dtype; contiguous ones are never copied.
        teacher: logits of the same shape, without gradient; with ``indices`` ``(..., k + 1)``, of k classes and of all
            the others as one, whose logit is the logsumexp of theirs.
        counted: ``(...)``, bool; None: all rows. Where none counts the result is 0.
        reverse: g, the share of the reverse divergence.
        temperature: above 1 softens both distributions.
        indices: ``(..., k)``, int64: the classes of ``teacher``. The result is then a lower bound of the divergence
            over all classes (merging classes never raises it), and equal to it for k = classes - 1.

    Returns:
        A scalar, float32, in nats. Classes that p weighs with 0 add nothing to KL(p || q), such as those whose logit is
        -inf.

    Raises:
        TrainingError: the shapes do not fit, or ``counted`` is not bool.

    >>> divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 3.0]]))
    tensor(0.)
    """
    shape = student.shape if indices is None else (*indices.shape[:-1], indices.shape[-1] + 1)
    if teacher.shape != shape or student.shape[:-1] != teacher.shape[:-1]:
        raise TrainingError(
            f"teacher: its logits must have the student's shape {tuple(student.shape)}, got {tuple(teacher.shape)}: "
            "give a teacher with the student's vocabulary or classes"
        )
    mask = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device) if counted is None else counted
    _require_rows(mask, student)
    picked = None if indices is None else indices.flatten(0, -2)
    rows = student.flatten(0, -2), teacher.detach().flatten(0, -2), mask.flatten(), picked
    result: Tensor = _Divergence.apply(*rows, reverse, temperature)  # type: ignore[no-untyped-call]
    return result


def _require_rows(counted: Tensor, student: Tensor) -> None:
    if counted.shape != student.shape[:-1] or counted.dtype is not torch.bool:
        raise TrainingError(
            f"counted: must be bool in the shape of the rows, {tuple(student.shape[:-1])}, got {counted.dtype} "
            f"{tuple(counted.shape)}: say of each row whether it counts, as labels != -100 does"
        )


class _Divergence(torch.autograd.Function):
    """`divergence` of rows; only the arguments are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        counted: Tensor,
        indices: Tensor | None,
        reverse: float,
        temperature: float,
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, counted, indices)
        ctx.options = reverse, temperature
        values = torch.empty(len(student), dtype=torch.float32, device=student.device)
        for rows in _chunks(student):
            part = None if indices is None else indices[rows]
            values[rows] = _values(student[rows], teacher[rows], part, reverse, temperature)
        return values.where(counted, 0.0).sum() / counted.sum().clamp(min=1) * temperature**2

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, counted, indices = ctx.saved_tensors
        reverse, temperature = ctx.options
        factor = incoming * temperature / counted.sum().clamp(min=1)
        gradient = torch.empty_like(student)
        for rows in _chunks(student):
            part = None if indices is None else indices[rows]
            terms = student[rows], teacher[rows], part, reverse, temperature
            gradient[rows] = _slopes(*terms).mul_(factor).masked_fill_(~counted[rows, None], 0.0)
        return gradient, None, None, None, None, None


def _chunks(student: Tensor) -> list[slice]:
    size = max(1, CHUNK // student.shape[-1])
    return [slice(start, start + size) for start in range(0, len(student), size)]


def _values(student: Tensor, teacher: Tensor, indices: Tensor | None, reverse: float, temperature: float) -> Tensor:
    """The divergence of each of a few rows, float32; in place where it can be, as all that follow."""
    ratio, q, p, _ = _distributions(student, teacher, indices, temperature)
    weights = p if reverse == 0.0 else p.mul_(1.0 - reverse).sub_(q, alpha=reverse)
    return ratio.masked_fill_(weights == 0, 0.0).mul_(weights).sum(-1)  # 0 times inf is 0 here


def _slopes(student: Tensor, teacher: Tensor, indices: Tensor | None, reverse: float, temperature: float) -> Tensor:
    """The gradient of the divergence of each of a few rows by its logits, times the temperature."""
    ratio, q, p, others = _distributions(student, teacher, indices, temperature)
    terms = torch.sub(q, p, out=p)
    if reverse != 0.0:
        ratio.masked_fill_(q == 0, 0.0)
        mean = (q * ratio).sum(-1, keepdim=True)
        terms.mul_(1.0 - reverse).add_(ratio.neg_().add_(mean).mul_(q), alpha=reverse)
    if indices is None:
        return terms
    # What the merged class gets, its classes share by their probability within it.
    return others.mul_(terms[:, -1:]).scatter_(-1, indices, terms[:, :-1])


def _distributions(
    student: Tensor, teacher: Tensor, indices: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a few rows in float32: log(p / q), q of the student, p of the teacher, and q within the merged class."""
    scores = student.float() / temperature
    others = scores
    if indices is not None:
        picked = scores.gather(-1, indices)
        others = scores.scatter_(-1, indices, -torch.inf)
        rest = others.logsumexp(-1, keepdim=True)
        others.sub_(rest.clamp(min=torch.finfo(rest.dtype).min)).exp_()  # 0 where nothing is left for it
        scores = torch.cat([picked, rest], -1)
    log_q = scores.log_softmax(-1)
    if indices is None:
        del scores, others
        others = log_q
    log_p = (teacher.float() / temperature).log_softmax(-1)
    p = log_p.exp()
    return log_p.sub_(log_q), log_q.exp_(), p, others


def squared_distance(student: Tensor, teacher: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean squared distance of a prediction from the teacher's, such as a diffusion model's velocity or noise.

    Args:
        student: ``(..., features)``, any float dtype.
        teacher: the same shape; no gradient flows into it.
        counted: ``(...)``, bool; None: all.

    Returns:
        A scalar, float32; 0 where nothing counts.

    Raises:
        TrainingError: the shapes do not fit, or ``counted`` is not bool.

    >>> squared_distance(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
    tensor(2.)
    """
    if student.shape != teacher.shape:
        raise TrainingError(
            f"teacher: its output must have the student's shape {tuple(student.shape)}, got {tuple(teacher.shape)}: "
            "give a teacher of the same task"
        )
    difference = student.float() - teacher.detach().float()
    if counted is None:
        return difference.square().mean()
    _require_rows(counted, student)
    return _mean(difference.where(counted[..., None], 0.0).square().mean(-1), counted)


def hidden_state_distance(
    student: Sequence[Tensor], teacher: Sequence[Tensor], counted: Tensor | None = None
) -> Tensor:
    """|h_s - h_t|² / |h_t|² of each block's output, in float32, mean over the blocks.

    Autograd keeps the difference of each block, in float32.

    Args:
        student: the output of each block, ``(batch, length, features)`` or another shape, any float dtype.
        teacher: the same shapes; no gradient flows into them.
        counted: ``(batch, length)``, bool: leaves padding out of blocks whose outputs begin with this shape.

    Raises:
        TrainingError: another number of blocks, or another shape.

    >>> hidden_state_distance([torch.tensor([[3.0, 0.0]])], [torch.tensor([[2.0, 0.0]])])
    tensor(0.2500)
    """
    if [state.shape for state in student] != [state.shape for state in teacher]:
        shapes = [sorted({tuple(state.shape) for state in states}) for states in (student, teacher)]
        raise TrainingError(
            f"hidden_states: the teacher's blocks must give what the student's give, got {len(teacher)} outputs of "
            f"shapes {shapes[1]} for {len(student)} of {shapes[0]}: give a teacher with the same blocks, or "
            "hidden_states=0"
        )
    terms = []
    for ours, theirs in zip(student, teacher, strict=True):
        target = theirs.detach().float()
        difference = ours.float() - target
        if counted is not None and counted.shape == ours.shape[: counted.ndim]:
            places = counted.reshape(*counted.shape, *[1] * (ours.ndim - counted.ndim))
            difference, target = difference.where(places, 0.0), target.where(places, 0.0)
        tiny = torch.finfo(torch.float32).tiny
        terms.append(difference.square().sum() / target.square().sum().clamp(min=tiny))
    return torch.stack(terms).mean()


def attention_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], counted: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of attention probabilities, mean over maps, heads and queries that count, in float32.

    The attention-map loss of arXiv 2211.11014. A probability below 1e-8 counts as 1e-8, so that
    the loss stays finite where the student sees nothing.

    Args:
        student: for each layer ``(batch, heads, queries, keys)``, probabilities.
        teacher: the same shapes; no gradient flows into them.
        counted: ``(batch, queries)``, bool; None: all.

    Raises:
        TrainingError: another number of maps, or another shape.

    >>> attention_distance([torch.tensor([[[[0.5, 0.5]]]])], [torch.tensor([[[[1.0, 0.0]]]])])
    tensor(0.6931)
    """
    if [m.shape for m in student] != [m.shape for m in teacher]:
        raise TrainingError(
            f"attention_maps: the teacher must give the student's maps, got {len(teacher)} for {len(student)}, or "
            "other heads: give a teacher with the same layers and heads, or attention_maps=0"
        )
    terms = []
    for ours, theirs in zip(student, teacher, strict=True):
        p, q = theirs.detach().float(), ours.float().clamp(min=1e-8)
        if counted is not None:
            p, q = (maps.where(counted[:, None, :, None], 1.0) for maps in (p, q))
        rows = (torch.xlogy(p, p) - p * q.log()).sum(-1).mean(1)
        terms.append(rows.mean() if counted is None else _mean(rows, counted))
    return torch.stack(terms).mean()


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """The mean over what counts, of values that are 0 where nothing does."""
    return values.sum() / counted.sum().clamp(min=1)
