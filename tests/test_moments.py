"""Second moments of inputs: the sums, what is shared, and rounds within a budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qat.errors import CalibrationError
from qat.moments import Moments, rounds


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, copied: bool = False) -> Tensor:
        return self.o(input=self.q(x) * self.k(x.clone() if copied else x))


def test_sums_over_batches_and_positions() -> None:
    torch.manual_seed(0)
    model, seen = Attention(), list[Tensor]()
    layers = dict(model.named_children())
    model.o.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input"]), with_kwargs=True)
    x = [torch.randn(2, 5, 8), torch.randn(1, 3, 8)]
    with Moments(layers, [["q", "k"], ["o"]]) as moments, torch.autocast("cpu", torch.bfloat16):
        for batch in x:
            model(batch)
    assert not moments.apart
    for group, inputs in ((["q", "k"], x), (["o"], seen)):
        rows = torch.cat([part.reshape(-1, 8) for part in inputs]).double()
        found = moments.take(group)
        assert found is not None
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), rows.t() @ rows / 13, rtol=1e-5, atol=1e-6)
    model(x[0])  # no hook is left
    assert moments.take(["o"]) is None


def test_layers_that_read_another_tensor_once_are_told() -> None:
    model = Attention()
    with Moments(dict(model.named_children()), [["q", "k"]]) as moments:
        model(torch.ones(2, 8))
        model(torch.ones(2, 8), copied=True)
    assert moments.apart == ["k"]


def test_a_batch_with_nan_is_refused() -> None:
    layer = nn.Linear(2, 2)
    with Moments({"a": layer}, [["a"]]) as moments:
        layer(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(CalibrationError, match="inf or NaN, or numbers whose squares overflow, in the input of layer"):
        moments.take(["a"])


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1, [[["a", "b"]], [["c"]], [["d"]]]),
        (800, [[["a", "b"], ["c"]], [["d"]]]),
        (4000, [[["a", "b"], ["c"], ["d"]]]),
    ],
)
def test_rounds_stay_within_the_budget_but_for_one_layer(budget: int, expected: list[list[list[str]]]) -> None:
    assert list(rounds({"a": 10, "c": 10, "b": 10, "d": 20}, [["a", "b"]], budget)) == expected
