"""`QConv2d`: trained, frozen to quanto's own convolution, and filled by quanto's own loader with equal outputs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn

import qat
from qat.errors import LoadError, StateError, TargetError
from qat.layers import QConv2d
from tests.helpers import DTYPES, WEIGHT_TYPES, same_bits, tiny_model


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, groups=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(32, 16, (4, 2), padding_mode="circular", padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 1, 1),
        nn.Flatten(),
        nn.Linear(60, 8),
    )


def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    ).eval()


X = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))


def first(outputs: Any) -> Tensor:
    found: Tensor = outputs if isinstance(outputs, Tensor) else next(iter(outputs.values()))
    return found


def through(folder: Path, build: Callable[[], Any], inputs: dict[str, Any], **spec: Any) -> tuple[Any, Any]:
    """A model that was trained for two steps, exported, and filled by quanto's own loader."""
    model, algorithm = build(), qat.LearnedAffine()
    report = qat.prepare(model, qat.QuantSpec(include="*", **spec), algorithm=algorithm, example_inputs=inputs)
    convolutions = [row for row in report.inspection.layers if row.class_name == "Conv2d"]
    assert convolutions
    assert all(row.weights == spec["weights"] and row.activations is None for row in convolutions)
    if "activations" in spec:
        qat.calibrate(model, [inputs])
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3))
    for _ in range(2):
        first(model(**inputs)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = first(model(**inputs)).dequantize()
    qat.freeze(model)
    dtype = getattr(torch, spec["dtype"])
    served = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    qat.export(model, folder, example_inputs=served)
    checks = qat.verify(folder, reference=model, model=build()).checks
    assert [c.detail for c in checks if c.name == "load"] == ["optimum.quanto.requantize on a model built on CPU"]
    named = json.loads((folder / "quanto_qmap.json").read_text())
    assert {row.name for row in convolutions} <= named.keys()
    loaded = qat.load(folder, model=build())
    with torch.no_grad():
        found = first(loaded(**served)).dequantize()
        assert same_bits(found, first(model(**served)).dequantize())
    return trained, found.float()


@pytest.mark.loads("quanto", "requantize", layers=("Conv2d",), weights=WEIGHT_TYPES)
@pytest.mark.loads("quanto", "qat.load, model", layers=("Conv2d",), weights=WEIGHT_TYPES, equal="outputs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_it_reloads_equal(tmp_path: Path, weights: str, dtype: str) -> None:
    trained, found = through(tmp_path / "out", net, {"input": X}, weights=weights, dtype=dtype)
    assert (found - trained).abs().max() <= 0.05 * trained.abs().max()


@pytest.mark.parametrize(("weights", "dtype"), [("int8", "bfloat16"), ("int4", "float32")])
def test_a_unet_and_a_patch_embedding_reload_equal(tmp_path: Path, weights: str, dtype: str) -> None:
    sample = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 5])}
    images = {"pixel_values": torch.randn(2, 3, 16, 16)}
    through(tmp_path / "unet", unet, sample, weights=weights, dtype=dtype)
    through(tmp_path / "vit", lambda: tiny_model("vit"), images, weights=weights, dtype=dtype)


class Between(nn.Module):
    """A convolution that reads what a linear layer quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.last = nn.Linear(16, 48), nn.Conv2d(3, 8, 3), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.conv(self.first(x).view(-1, 3, 4, 4)).flatten(1))


@pytest.mark.parametrize(("kind", "dtype"), [("int8", "float32"), ("float8", "bfloat16")])
def test_it_reads_quantized_activations_as_numbers(tmp_path: Path, kind: str, dtype: str) -> None:
    def build() -> Between:
        torch.manual_seed(0)
        return Between()

    inputs = {"x": torch.randn(64, 16, generator=torch.Generator().manual_seed(0))}
    options = {"weights": kind, "activations": kind, "dtype": dtype}
    trained, found = through(tmp_path / "out", build, inputs, **options)
    step = 1 / 64 if kind == "int8" else 1 / 8  # of a code of the output
    assert (found - trained).abs().max() <= step * trained.abs().max()


def test_gradients_are_those_of_a_float_convolution_with_the_same_values() -> None:
    model, x = net()[:3], X.clone().requires_grad_()
    qat.prepare(model, qat.QuantSpec(weights="int8", dtype="float32", include="*"), algorithm=qat.StraightThrough())
    floats = net()[:3]
    for key in (0, 2):
        layer: Any = model[key]
        value = layer.weight_quantizer.quantize(layer.effective_weight(layer), torch.float32).value
        floats[key].weight.data = value.view_as(layer.weight).clone()
    found, wanted = model(x), floats(X)
    assert torch.equal(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    for key in (0, 2):
        assert torch.equal(model[key].weight.grad, floats[key].weight.grad)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X).dtype is torch.bfloat16


def test_it_is_float_by_default_and_says_so() -> None:
    report = qat.inspect(net(), qat.QuantSpec(weights="int8", dtype="float32"))
    assert [row.name for row in report.layers] == ["8"]
    assert report.left_float["0"] == "convolution, float by default (include it by name to quantize it)"
    assert "*.weight (Conv2d, " in "\n".join(report.notes)


def test_library_loaders_replace_none() -> None:
    reason = "the loader of target '{}' replaces no Conv2d: use target 'quanto'"
    with pytest.raises(TargetError, match=reason.format("transformers")):
        qat.inspect(tiny_model("vit"), qat.QuantSpec(include="*projection"), target="transformers")
    with pytest.raises(TargetError, match=reason.format("diffusers")):
        qat.inspect(unet(), qat.QuantSpec(include="conv_in"), target="diffusers")


def test_a_linear_layer_of_the_same_last_name_is_no_reason_to_leave_one_float() -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "sample_size": 8, "in_channels": 4}
    model = DiTTransformer2DModel(**sizes, norm_num_groups=4)
    assert type(model.pos_embed.proj) is nn.Conv2d
    report = qat.inspect(model, qat.QuantSpec(), target="diffusers")
    rows = {row.name: row.weights for row in report.layers}
    assert rows["transformer_blocks.0.ff.net.0.proj"] == "int8"


def test_what_cannot_be_a_row_is_refused() -> None:
    conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    assert "its weight is in channels_last order" in str(QConv2d.adoption_fault(conv))
    assert QConv2d.adoption_fault(nn.Conv2d(4, 4, 3)) is None
    lazy = type("Lazy", (nn.Conv2d,), {})(4, 4, 3)
    assert "Lazy is not exactly nn.Conv2d" in str(QConv2d.adoption_fault(lazy))


def test_other_targets_and_verbs_name_it(tmp_path: Path) -> None:
    model = unet()
    qat.prepare(model, qat.QuantSpec(weights="int8", include=("conv_in", "*to_q")))
    with pytest.raises(TargetError, match=r"conv_in \(its loader replaces no Conv2d\)"):
        qat.freeze(copy.deepcopy(model), target="diffusers")
    with pytest.raises(StateError, match=r"are no plain QLinear: exclude them in the spec \(conv_in\)"):
        qat.fix_codes(model)
    qat.freeze(model)
    with pytest.raises(TargetError, match=r"target 'diffusers': its loader cannot hold 1 of .* \(conv_in\)"):
        qat.export(model, tmp_path / "out", target="diffusers")


def test_a_model_with_another_kernel_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, (2, 6)), nn.Linear(8, 8))
    qat.prepare(model, qat.QuantSpec(include="*", dtype="float32"))
    qat.freeze(model)
    qat.export(model, tmp_path / "out")
    other = nn.Sequential(nn.Conv2d(2, 4, (3, 4)), nn.Linear(8, 8))
    with pytest.raises(LoadError, match=r"layer 0 has a kernel of \(3, 4\) in the model, of \(2, 6\) in the files"):
        qat.load(tmp_path / "out", model=other)
