"""Outputs for evidence: those of the bare model, whatever a trainer left on it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qat
from qat.verification.outputs import compute_outputs, output_faults
from tests.exports import IDS, small_llama


def with_autocast(forward: Any) -> Any:
    """What HF Trainer(bf16=True) and Accelerator(mixed_precision="bf16") put around ``model.forward``."""

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    return wrapped


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))


@pytest.mark.parametrize("place", ["model", "submodule", "both"])
def test_a_forward_on_the_object_is_passed_over_and_stays(place: str) -> None:
    model, x = small_model(), torch.randn(4, 64)
    bare = model(x)
    patched = {"model": [model], "submodule": [model[2]], "both": [model, model[2]]}[place]
    for module in patched:
        module.forward = with_autocast(module.forward)  # type: ignore[method-assign]
    assert not torch.equal(model(x), bare)
    assert torch.equal(compute_outputs(model, x)["output"], bare)
    assert all("forward" in vars(module) for module in patched)
    assert not torch.equal(model(x), bare)


def test_a_forward_that_does_something_else_is_no_wrapper(tmp_path: Path) -> None:
    architecture, model, x = small_model(), small_model(), torch.randn(4, 64, dtype=torch.bfloat16)
    qat.prepare(model, qat.QuantSpec(weights="int8"))
    model.forward = lambda x: model[2](model[0](x))  # type: ignore[method-assign]  # without the activation
    assert not torch.equal(compute_outputs(model, x.float())["output"], nn.Sequential.forward(model, x.float()))
    model(x.float())
    qat.freeze(model)
    qat.export(model, tmp_path / "out", example_inputs=x)
    with pytest.raises(qat.VerifyError, match=r"outputs .*FAILED"):
        qat.verify(tmp_path / "out", model=architecture)


def test_autocast_around_the_call_is_passed_over() -> None:
    model, x = small_model(), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype is torch.bfloat16
        found = compute_outputs(model, x)["output"]
    assert torch.equal(found, model(x))


def test_a_forward_that_raises_is_put_back() -> None:
    model = small_model()
    model.forward = with_autocast(model.forward)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        compute_outputs(model, torch.randn(4, 3))
    assert "forward" in vars(model)


@pytest.mark.parametrize(("weights", "dtype"), [("int8", "float32"), ("int8", "bfloat16"), ("int4", "float32")])
def test_an_export_of_a_model_with_a_wrapper_verifies(tmp_path: Path, weights: Any, dtype: Any) -> None:
    model: Any = small_llama(tie_word_embeddings=False)
    qat.prepare(model, qat.QuantSpec(weights=weights, dtype=dtype), target="transformers")
    model.forward = with_autocast(model.forward)
    model(input_ids=IDS, labels=IDS).loss.backward()
    qat.freeze(model)
    qat.export(model, tmp_path / "out", example_inputs={"input_ids": IDS})
    report = qat.verify(tmp_path / "out", reference=model)
    assert "equal, bit for bit" in str(report)


def test_outputs_differ_by_name_and_size() -> None:
    one, other = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([1.0, 2.5])}
    assert output_faults(one, one) == ([], 0.0)
    faults, worst = output_faults(other, one)
    assert faults == ["a: 1 of 2 numbers differ, by up to 0.5 (0.25 of the largest)"]
    assert worst == 0.25
    assert output_faults(other, one, tolerance=0.3) == ([], 0.25)
    assert output_faults({}, one)[0] == ["outputs are [], not ['a']"]


class Across(nn.Module):
    """A product with an input that is no view of a matrix, as between layers of text in Krea 2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x.permute(0, 1, 3, 2))
        return result


def test_outputs_do_not_depend_on_what_requires_a_gradient() -> None:
    """torch cuts such a product in another way, and rounds otherwise, if the weight requires one."""
    model, x = Across(), torch.randn(2, 6, 2, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trained, served = model(x), model.requires_grad_(False)(x)
    assert not torch.equal(trained, served)  # when it fails, torch rounds alike: drop `_without_requiring`
    (found,) = compute_outputs(model, x).values()
    model.requires_grad_(True)
    (again,) = compute_outputs(model, x).values()
    assert torch.equal(found, again)
    assert model.linear.weight.requires_grad
