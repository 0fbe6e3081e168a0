"""Distances from a teacher: values and gradients against float64 autograd of the plain formulas, and their memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qat.errors import TrainingError
from qat.training import losses
from qat.training.losses import attention_distance, divergence, hidden_state_distance, squared_distance

CASES = [(0.0, 1.0), (1.0, 1.0), (0.3, 1.0), (0.0, 2.5), (0.7, 0.5)]  # share of the reverse divergence, temperature


def plain(student: Tensor, teacher: Tensor, counted: Tensor, reverse: float, temperature: float) -> Tensor:
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    rows = (1 - reverse) * (p * (p / q).log()).sum(-1) + reverse * (q * (q / p).log()).sum(-1)
    return rows[counted].mean() * temperature**2


def merged(logits: Tensor, indices: Tensor) -> Tensor:
    """Logits of the classes in ``indices`` and of all others as one, by explicit masks."""
    outside = torch.ones_like(logits, dtype=torch.bool).scatter(-1, indices, False)
    rest = (logits.exp() * outside).sum(-1, keepdim=True).log()
    return torch.cat([logits.gather(-1, indices), rest], -1)


@pytest.fixture(params=[1, 7 * 13, 10**6], ids=["a row a chunk", "seven rows a chunk", "one chunk"])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", request.param)


def example() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, 5, 13) * 2, torch.randn(4, 5, 13) * 2, torch.rand(4, 5) < 0.7


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize(("reverse", "temperature"), CASES)
def test_value_and_gradient_are_the_plain_formula(reverse: float, temperature: float) -> None:
    student, teacher, counted = example()
    exact = student.double().requires_grad_()
    expected = plain(exact, teacher.double(), counted, reverse, temperature)
    (wanted,) = torch.autograd.grad(3 * expected, exact)
    student.requires_grad_()
    found = divergence(student, teacher, counted, reverse=reverse, temperature=temperature)
    (gradient,) = torch.autograd.grad(3 * found, student)
    # float32 over at most 13 classes and 20 rows
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("reverse", [0.0, 1.0, 0.4])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_merged_classes_are_the_plain_formula(k: int, reverse: float) -> None:
    student, teacher, counted = example()
    indices = teacher.topk(k, -1).indices
    exact = student.double().requires_grad_()
    expected = plain(merged(exact, indices), merged(teacher.double(), indices), counted, reverse, 1.0)
    (wanted,) = torch.autograd.grad(expected, exact)
    student.requires_grad_()
    found = divergence(student, merged(teacher, indices), counted, reverse=reverse, indices=indices)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reverse", [0.0, 1.0, 0.4])
def test_merging_classes_gives_a_lower_bound_that_grows(reverse: float) -> None:
    student, teacher, _ = example()
    bounds = []
    for k in range(1, 13):
        indices = teacher.topk(k, -1).indices
        bounds.append(float(divergence(student, merged(teacher, indices), reverse=reverse, indices=indices)))
    full = float(divergence(student, teacher, reverse=reverse))
    assert all(low <= high + 1e-6 for low, high in zip(bounds, [*bounds[1:], full], strict=True))
    assert bounds[0] < full * 0.9
    assert bounds[-1] == pytest.approx(full, rel=1e-5)  # twelve classes and the one that is left: nothing is merged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher, counted = example()
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    found = divergence(student, teacher, counted)
    assert found.dtype is torch.float32
    expected = plain(student.detach().double(), teacher.double(), counted, 0.0, 1.0)
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-5, atol=1e-6)
    found.backward()
    assert student.grad is not None
    assert student.grad.dtype is dtype


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize(("reverse", "temperature"), [*CASES, (0.5, 1.0)])
def test_classes_of_probability_0_add_nothing(reverse: float, temperature: float) -> None:
    """As in torch's kl_div. The reverse is infinite, unless the student gives the class 0 too."""
    student, teacher, counted = example()
    gone = teacher < 0
    gone[..., 0] = False
    teacher[gone] = -torch.inf
    exact = student.double().requires_grad_()
    if reverse:
        student[gone] = -torch.inf
        exact = student.double().requires_grad_()
    log_q, log_p = (exact / temperature).log_softmax(-1), (teacher.double() / temperature).log_softmax(-1)
    log_q, log_p = log_q.masked_fill(gone, 0.0), log_p.masked_fill(gone, 0.0)  # without an infinity in the gradient
    p, q = (logs.exp().masked_fill(gone, 0.0) for logs in (log_p, log_q))
    if not reverse:
        library = torch.nn.functional.kl_div(exact.div(temperature).log_softmax(-1), p, reduction="none")
        torch.testing.assert_close(library, torch.xlogy(p, p) - p * log_q)
    rows = (((1 - reverse) * p - reverse * q) * (log_p - log_q)).sum(-1)
    expected = rows[counted].mean() * temperature**2
    (wanted,) = torch.autograd.grad(expected, exact)
    student.requires_grad_()
    found = divergence(student, teacher, counted, reverse=reverse, temperature=temperature)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted.nan_to_num(0.0), rtol=1e-4, atol=1e-6)


def test_a_reverse_divergence_from_a_class_of_probability_0_is_infinite() -> None:
    teacher = torch.tensor([[0.0, -torch.inf]])
    assert float(divergence(torch.zeros(1, 2), teacher)) == pytest.approx(math.log(2))
    assert float(divergence(torch.zeros(1, 2), teacher, reverse=0.5)) == math.inf


def test_a_merged_class_without_probability_adds_nothing() -> None:
    student, indices = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf]], requires_grad=True), torch.tensor([[0, 1]])
    found = divergence(student, torch.tensor([[0.5, 1.0, -torch.inf]]), indices=indices)
    (gradient,) = torch.autograd.grad(found, student)
    two = student.detach()[:, :2].requires_grad_()
    expected = divergence(two, torch.tensor([[0.5, 1.0]]))
    (wanted,) = torch.autograd.grad(expected, two)
    assert float(found.detach()) == float(expected.detach())
    assert torch.equal(gradient, torch.cat([wanted, torch.zeros(1, 2)], -1))


def test_rows_that_do_not_count_change_nothing_whatever_they_hold() -> None:
    student, teacher, counted = example()
    expected = divergence(student, teacher, counted)
    student[~counted], teacher[~counted] = torch.nan, torch.inf
    student.requires_grad_()
    found = divergence(student, teacher, counted)
    found.backward()
    assert torch.equal(found, expected)
    assert student.grad is not None
    assert not student.grad[~counted].any()
    assert student.grad[counted].isfinite().all()


def test_nothing_that_counts_is_a_loss_of_zero() -> None:
    none = torch.zeros(4, 5, dtype=torch.bool)
    for function in (divergence, squared_distance):
        student = torch.full((4, 5, 13), torch.nan, requires_grad=True)
        loss = function(student, torch.zeros(4, 5, 13), none)
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert student.grad is not None
        assert not student.grad.any()
    states = [torch.full((4, 5, 13), torch.nan, requires_grad=True)]
    loss = hidden_state_distance(states, [torch.zeros(4, 5, 13)], none)
    loss.backward()
    assert float(loss.detach()) == 0.0
    maps = [torch.full((4, 2, 5, 5), torch.nan, requires_grad=True)]
    attention = attention_distance(maps, [torch.full((4, 2, 5, 5), 0.2)], none)
    attention.backward()
    assert float(attention.detach()) == 0.0
    assert not any(tensor.grad is None or tensor.grad.any() for tensor in (*states, *maps))


class Sizes(TorchDispatchMode):
    """Records dtype and elements of each tensor that an operator makes (its inputs' storage is none)."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.made.append((leaf.dtype, leaf.numel()))
        return result


@pytest.mark.parametrize("reverse", [0.0, 0.5])
@pytest.mark.parametrize("k", [None, 8])
def test_memory_is_the_logits_the_gradient_and_a_chunk(
    reverse: float, k: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, classes, chunk = 64, 100, 400
    monkeypatch.setattr(losses, "CHUNK", chunk)
    student = torch.randn(rows, classes, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(rows, classes, dtype=torch.bfloat16)
    indices = None if k is None else teacher.float().topk(k, -1).indices
    given = teacher if indices is None else merged(teacher.float(), indices)
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda t: t)
    with hooks, Sizes() as forward:
        loss = divergence(student, given, reverse=reverse, indices=indices)
    storages = {tensor.untyped_storage().data_ptr() for tensor in (student, given)}
    large = [tensor for tensor in kept if tensor.numel() > rows * 10]
    assert large
    assert {tensor.untyped_storage().data_ptr() for tensor in large} <= storages
    with Sizes() as backward:
        loss.backward()
    assert max(size for _, size in forward.made) <= chunk
    whole = [(dtype, size) for dtype, size in backward.made if size > chunk]
    assert whole == [(torch.bfloat16, rows * classes)]


def peak(run: Callable[[], Any]) -> int:
    """The most bytes that what ``run`` allocates takes at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    del kept
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize(("reverse", "backward"), [(0.0, 3), (0.5, 4)])
@pytest.mark.parametrize("k", [None, 8])
def test_few_chunks_exist_at_once(
    k: int | None, reverse: float, backward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = 2**16
    monkeypatch.setattr(losses, "CHUNK", chunk)
    student, teacher = torch.randn(2, 512, 512).bfloat16().requires_grad_(), torch.randn(2, 512, 512).bfloat16()
    indices = None if k is None else teacher.float().topk(k, -1).indices
    given = teacher if indices is None else merged(teacher.float(), indices)
    found: list[Tensor] = []
    forward = peak(lambda: found.append(divergence(student, given, reverse=reverse, indices=indices)))
    assert forward <= 3.4 * 4 * chunk  # a mask of bytes too
    gradient = student.numel() * 2
    assert peak(lambda: found[0].backward()) <= gradient + (backward + 0.4) * 4 * chunk


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher, counted = example()
    teacher.requires_grad_()
    student.requires_grad_()
    divergence(student, teacher, counted).backward()
    squared_distance(student, teacher).backward()
    hidden_state_distance([student], [teacher]).backward()
    attention_distance([student.softmax(-1)[None]], [teacher.softmax(-1)[None]]).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_the_squared_distance_is_the_mean_of_squares() -> None:
    student, teacher, counted = example()
    squares = (student.double() - teacher.double()) ** 2
    assert float(squared_distance(student, teacher)) == pytest.approx(float(squares.mean()), rel=1e-6)
    assert float(squared_distance(student, teacher, counted)) == pytest.approx(float(squares[counted].mean()), rel=1e-5)


def test_hidden_states_are_relative_to_the_teachers_and_leave_padding_out() -> None:
    student = [torch.randn(2, 5, 3) * scale for scale in (1.0, 100.0)]
    teacher = [state + torch.randn(2, 5, 3) * 0.1 for state in student]
    counted = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
    pairs = [(s.double()[counted], t.double()[counted]) for s, t in zip(student, teacher, strict=True)]
    expected = sum(float(((s - t) ** 2).sum() / (t**2).sum()) for s, t in pairs) / 2
    assert float(hidden_state_distance(student, teacher, counted)) == pytest.approx(expected, rel=1e-5)
    expected = sum(float(((s - t) ** 2).sum() / (t**2).sum()) for s, t in zip(student, teacher, strict=True)) / 2
    assert float(hidden_state_distance(student, teacher)) == pytest.approx(expected, rel=1e-5)
    other = torch.ones(7, 7, dtype=torch.bool)  # a mask of something else than these outputs
    assert torch.equal(hidden_state_distance(student, teacher, other), hidden_state_distance(student, teacher))


def test_attention_maps_are_compared_as_distributions() -> None:
    student = [torch.randn(2, 3, 4, 4).softmax(-1) for _ in range(2)]
    teacher = [torch.randn(2, 3, 4, 4).softmax(-1) for _ in range(2)]
    teacher[0][0, 0, 0] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    counted = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        terms = torch.where(t > 0, t.double() * (t.double() / s.double()).log(), 0.0).sum(-1)
        expected += float(terms.transpose(1, 2)[counted].mean()) / 2
    assert float(attention_distance(student, teacher, counted)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (divergence, (torch.zeros(2, 5), torch.zeros(2, 6)), r"shape \(2, 5\), got \(2, 6\): give a teacher with"),
        (divergence, (torch.zeros(2, 5), torch.zeros(2, 5), torch.ones(3) > 0), r"counted: .*\(2,\), got .*\(3,\)"),
        (divergence, (torch.zeros(2, 5), torch.zeros(2, 5), torch.ones(2)), r"counted: .*\(2,\), got torch.float32"),
        (squared_distance, (torch.zeros(2, 2, 5), torch.zeros(2, 2, 5), torch.ones(2) > 0), r"\(2, 2\), got .*\(2,\)"),
        (squared_distance, (torch.zeros(2, 5), torch.zeros(1, 5)), r"shape \(2, 5\), got \(1, 5\)"),
        (hidden_state_distance, ([torch.zeros(2, 5)] * 2, [torch.zeros(2, 5)]), "got 1 outputs of .* for 2 of"),
        (hidden_state_distance, ([torch.zeros(2, 5)], [torch.zeros(2, 6)]), r"\[\(2, 6\)\] for 1 of .*\[\(2, 5\)\]"),
        (
            attention_distance,
            ([torch.zeros(1, 2, 3, 3)], [torch.zeros(1, 4, 3, 3)]),
            "attention_maps: .*or other heads",
        ),
    ],
    ids=["classes", "mask", "numbers", "rows", "output", "blocks", "features", "heads"],
)
def test_what_does_not_fit_is_refused(function: Any, arguments: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        function(*arguments)
