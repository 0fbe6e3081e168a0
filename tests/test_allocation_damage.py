"""The damage of one layer, by each score, against its definition on a prepared copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.allocation.damage import Score, damages
from qat.formats import QUANTO
from tests.helpers import tiny_model, tokens
from tests.test_training_losses import peak

TYPES = tuple(QUANTO.types(kind, None, torch.bfloat16) for kind in ("int2", "int8"))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """Which `gradient` needs all the same."""
    with torch.no_grad():
        yield


def scores(
    model: nn.Module, batches: list[Any], score: Score, names: tuple[str, ...], **options: Any
) -> dict[str, Any]:
    given = {"algorithm": None, "forward": None} | options
    return dict(damages(model, dict.fromkeys(names, TYPES), batches, score, **given))


def prepared(model: nn.Module, name: str, kind: str) -> nn.Module:
    """A copy with this layer quantized alone, as the default start does it."""
    other = copy.deepcopy(model)
    algorithm = qat.LearnedAffine() if kind == "int2" else qat.StraightThrough()
    qat.prepare(other, qat.QuantSpec(weights=kind, include=name), algorithm=algorithm)  # type: ignore[arg-type]
    return other


def served(model: nn.Module, name: str, kind: str) -> Tensor:
    layer: Any = prepared(model, name, kind).get_submodule(name)
    value: Tensor = layer.weight_quantizer.quantize(layer.weight, torch.float32).value
    return value


def chain(inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(inplace=inplace), nn.Linear(48, 16)).eval()


class Classifier(nn.Module):
    """One linear layer, whose outputs are logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(32, 12)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.head(x), "hidden": x}


@pytest.mark.parametrize("name", ["0", "2"])
def test_output_is_the_relative_error_of_the_layers_own_output(name: str) -> None:
    model, batches = chain(), [torch.randn(5, 32), torch.randn(3, 32)]
    found = scores(model, batches, "output", ("0", "2"))
    layer: Any = model.get_submodule(name)
    x = torch.cat(batches)
    x = x if name == "0" else torch.relu(model[0](x))
    for kind in ("int2", "int8"):
        gap = (x.double() @ (served(model, name, kind) - layer.weight).double().T).square().sum()
        assert found[name][kind] == pytest.approx(float(gap / layer(x).double().square().sum()), rel=1e-3)


def test_output_reads_a_layer_before_the_model_changes_it_in_place() -> None:
    batches = [torch.randn(5, 32)]
    changed, whole = (scores(chain(inplace), batches, "output", ("0", "2")) for inplace in (True, False))
    assert changed == whole


def test_output_holds_one_layer_at_a_time() -> None:
    def most(depth: int) -> int:
        model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(depth)))
        return peak(lambda: scores(model, [rows], "output", tuple(map(str, range(depth)))))

    rows = torch.randn(4096, 32)
    assert most(12) - most(3) < rows.nbytes


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"])
def test_kl_is_the_divergence_of_a_model_with_that_layer_quantized(name: str) -> None:
    model: Any = tiny_model("llama")
    batches = [{"input_ids": tokens(seed=seed)} for seed in (0, 1)]
    found = scores(model, batches, "kl", (name,))
    for kind in ("int2", "int8"):
        other: Any = prepared(model, name, kind)
        expected, given = (
            torch.cat([m(**batch).logits.double().flatten(0, 1) for batch in batches]).log_softmax(-1)
            for m in (model, other)
        )
        wanted = float((expected.exp() * (expected - given)).sum(-1).mean())
        assert found[name][kind] == pytest.approx(wanted, rel=0.01, abs=2e-7)  # float32 sums of 64 classes


def test_kl_of_other_outputs_is_the_squared_distance_relative_to_the_squares() -> None:
    model, batches = chain(), [torch.randn(5, 32), torch.randn(3, 32)]
    found, x = scores(model, batches, "kl", ("0",)), torch.cat(batches)
    gap = (prepared(model, "0", "int2")(x) - model(x)).double().square().sum()
    assert found["0"]["int2"] == pytest.approx(float(gap / model(x).double().square().sum()), rel=1e-4)


def test_gradient_is_the_quadratic_form_of_the_divergence() -> None:
    model, x = Classifier(), torch.randn(20_000, 32, generator=torch.Generator().manual_seed(1))
    found = scores(model, [x], "gradient", ("head",))["head"]
    p = model.head(x).softmax(-1).double()
    for kind in ("int2", "int8"):
        gap = (x @ (served(model, "head", kind) - model.head.weight).T).double()
        wanted = ((p * gap.square()).sum(-1) - (p * gap).sum(-1).square()).mean() / 2
        # A mean of 20,000 squares with a kurtosis of a few: a standard error of about 1.5 %.
        assert found[kind] == pytest.approx(float(wanted), rel=0.06)


def test_gradient_of_other_outputs_is_the_squared_distance() -> None:
    model, x = nn.Sequential(nn.Linear(32, 12)).eval(), torch.randn(20_000, 32)
    found = scores(model, [x], "gradient", ("0",))["0"]["int2"]
    gap = (x @ (served(model, "0", "int2") - model[0].weight).T).double().square().sum()
    assert found == pytest.approx(float(gap / model(x).double().square().sum()), rel=0.06)


def test_gradient_passes_what_works_in_place_and_parameters_that_need_none() -> None:
    x = torch.randn(64, 32)
    wanted = scores(chain(), [x], "gradient", ("0", "2"))
    changed = chain(inplace=True).requires_grad_(False)
    assert scores(changed, [x], "gradient", ("0", "2")) == wanted
    assert all(parameter.grad is None for parameter in changed.parameters())


@pytest.mark.parametrize("score", ["kl", "gradient"])
def test_masked_positions_do_not_count(score: Score) -> None:
    x, mask = torch.randn(2, 4, 32), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    other = torch.where(mask.bool()[..., None], x, 100.0)
    found = [scores(Classifier(), [{"x": v, "attention_mask": mask}], score, ("head",)) for v in (x, other)]
    assert found[0] == found[1]
    assert found[0]["head"]["int2"] > 0


def test_an_algorithm_makes_the_quantizers() -> None:
    model, batches = chain(), [torch.randn(5, 32)]
    clipped = scores(model, batches, "output", ("0",))["0"]["int2"]
    assert scores(model, batches, "output", ("0",), algorithm=qat.StraightThrough())["0"]["int2"] > clipped


@pytest.mark.parametrize("score", ["kl", "gradient", "output"])
def test_faults_of_model_and_batches_are_named(score: Score) -> None:
    model, names = chain(), ("0", "2")
    with pytest.raises(qat.CalibrationError, match="cannot run batch 1"):
        scores(model, [torch.ones(1, 32), torch.ones(1, 31)], score, names)
    with pytest.raises(qat.CalibrationError, match="1 layers were never reached"):
        scores(model, [torch.ones(1, 32)], score, names, forward=lambda m, x: m[0](x))
    with pytest.raises(qat.CalibrationError, match="returns a NoneType without floating tensors"):
        scores(model, [torch.ones(1, 32)], score, names, forward=lambda m, x: None)
    with pytest.raises(qat.CalibrationError, match="is no number"):
        scores(model, [torch.full((1, 32), torch.nan)], score, names)
    rule = "2 layers were never" if score == "output" else "hold no prediction"
    with pytest.raises(qat.CalibrationError, match=rule):
        scores(model, [torch.ones(0, 32)], score, names)
    if score == "gradient":
        with pytest.raises(qat.CalibrationError, match="no gradient leads"):
            scores(model, [torch.ones(1, 32)], score, names, forward=lambda m, x: m(x).detach())
