"""A new format is one file: this one. Integer zero points, groups of 32, its own packing and keys, its own module.

Nothing outside this file is edited: the format is registered as the part of a target, and goes through every verb.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qat
from qat.files.evidence import FrozenRecord
from qat.formats import Format, FrozenLayer, InLibrary, LayerTypes, Slot
from qat.hosts import MODULE, TARGETS, Target
from qat.numerics import Affine, FrozenWeight, QType, round_to
from tests.exports import forge_files
from tests.helpers import tiny_model

GROUP = 32


@dataclass(frozen=True, kw_only=True)
class ZeroPoint(Affine):
    """``value = scale * (code - zero_point)``, rounded once; the zero point takes the place of the shift."""

    fused: ClassVar[bool] = False

    def group_size(self, in_features: int) -> int | None:
        return GROUP

    def serve(
        self, scale: Tensor, shift: Tensor | None, dtype: torch.dtype, in_features: int
    ) -> tuple[Tensor, Tensor | None]:
        assert shift is not None
        scale = round_to(scale, dtype).clamp(min=2.0**-20)
        zero = (shift / scale).clamp(0, self.code_max)
        return scale, zero + (zero.round() - zero).detach()

    def encode(self, weight: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        rows = self.grouped(weight.detach()).float()
        codes = ((rows / scale).round() + shift).clamp(self.code_min, self.code_max)
        return codes.to(self.storage).reshape(weight.shape)

    def decode(self, codes: Tensor, scale: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
        assert shift is not None
        steps = self.grouped(codes).float() - shift.float()
        return (scale.float() * steps).to(dtype).reshape(codes.shape)

    def scale_gradients(
        self, weight: Tensor, scale: Tensor, shift: Tensor | None, grad: Tensor, margin: float = 0.0
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        rows, codes = self.grouped(weight.detach()).float() / scale, self.grouped(self.encode(weight, scale, shift))
        steps, given = codes.float() - shift, self.grouped(grad).float()
        inside = ((rows + shift).round() == codes).float()
        of_scale = (given * (steps - rows * inside)).sum(1, keepdim=True)
        of_zero = (given * scale * (inside - 1)).sum(1, keepdim=True)
        return of_scale, of_zero, grad * inside.reshape(weight.shape)


INT4 = ZeroPoint(format="zero", name="int4", bits=4, code_min=0, code_max=15, steps=15, storage=torch.uint8)


class FrozenZeroPoint(nn.Module):
    """Runs what is stored; two codes a byte, along a row."""

    def __init__(self, types: LayerTypes, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.types, self.shape = types, shape
        self.weight = nn.Parameter(tensors["weight_nibbles"], requires_grad=False)
        self.register_buffer("weight_step", tensors["weight_step"])
        self.register_buffer("weight_zero", tensors["weight_zero"])
        self.bias = nn.Parameter(tensors["bias"], requires_grad=False) if "bias" in tensors else None

    def frozen_weight(self) -> FrozenWeight:
        packed = self.weight
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(self.shape)
        return FrozenWeight(codes, self.weight_step, self.weight_zero.to(self.weight_step.dtype), INT4)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.frozen_weight().dequantize(), self.bias)


class ZeroFormat(Format):
    name: ClassVar[str] = "zero"
    library: ClassVar[str] = "nobody"
    qtypes: ClassVar[Mapping[str, QType]] = {"int4": INT4}
    activation_qtypes: ClassVar[Mapping[str, QType]] = {}

    def layer_hazard(self, types: LayerTypes, shape: tuple[int, int]) -> str | None:
        return None if shape[1] % GROUP == 0 else f"in_features ({shape[1]}) is not a multiple of {GROUP}"

    def slots(self, types: LayerTypes, shape: tuple[int, int], bias: bool) -> dict[str, Slot]:
        groups = shape[0] * shape[1] // GROUP
        slots = {
            "weight_nibbles": Slot(torch.uint8, ((shape[0], shape[1] // 2),), is_code=True),
            "weight_step": Slot(types.dtype, ((groups, 1),)),
            "weight_zero": Slot(torch.uint8, ((groups, 1),)),
        }
        return slots | ({"bias": Slot(types.dtype, ((shape[0],),))} if bias else {})

    def pack(self, layer: FrozenLayer) -> dict[str, Tensor]:
        codes, weight = layer.weight.codes, layer.weight
        assert weight.shift is not None
        nibbles = codes[:, 0::2] | codes[:, 1::2] << 4
        tensors = {"weight_nibbles": nibbles, "weight_step": weight.scale, "weight_zero": weight.shift.to(torch.uint8)}
        return tensors | ({} if layer.bias is None else {"bias": layer.bias})

    def build(
        self,
        types: LayerTypes,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        *,
        like: nn.Module,
        plain_on_cpu: bool = False,
    ) -> nn.Module:
        return FrozenZeroPoint(types, shape, tensors)

    def is_frozen(self, module: nn.Module) -> bool:
        return isinstance(module, FrozenZeroPoint)

    def declared(self, module: nn.Module) -> LayerTypes:
        assert isinstance(module, FrozenZeroPoint)
        return module.types

    def shape(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, FrozenZeroPoint)
        return module.shape

    def read(self, module: nn.Module) -> FrozenLayer:
        assert isinstance(module, FrozenZeroPoint)
        one = torch.ones((), dtype=module.types.dtype)
        return FrozenLayer(module.frozen_weight(), module.bias, module.types, one, one)


@pytest.fixture(autouse=True)
def target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "zero", Target("zero", ZeroFormat(), MODULE))


def floats() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40, bias=False), nn.ReLU(), nn.Linear(40, 8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("algorithm", [qat.StraightThrough(), qat.LearnedAffine()], ids=["dynamic", "learned"])
def test_every_verb(tmp_path: Path, algorithm: Any, dtype: str) -> None:
    architecture, model = floats(), floats()
    spec = qat.QuantSpec(weights="int4", dtype=dtype)
    report = qat.inspect(model, spec, target="zero")
    rows = {row.name: (row.weights, row.group_size) for row in report.layers}
    # 48 columns are no whole number of groups of 32, and neither are 40.
    assert rows == {"0": ("int4", 32), "2": (None, None), "4": (None, None)}
    assert report.layers[0].bytes_after == 64 * 48 // 2 + 96 * (spec.torch_dtype.itemsize + 1)

    qat.prepare(model, spec, algorithm=algorithm, target="zero")
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-2, scale_lr=1e-2))
    x, before = torch.randn(16, 64), copy.deepcopy(model.state_dict())
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert "0.weight" in moved
    assert ("0.weight_quantizer.high_move" in moved) == isinstance(algorithm, qat.LearnedAffine)
    layer: Any = model[0]
    trained = layer.weight_quantizer.quantize(layer.weight, spec.torch_dtype).value

    qat.freeze(model)
    frozen: Any = model[0]
    codes, zeros = frozen.frozen_weight().codes, frozen.weight_zero
    by_hand = frozen.weight_step.float() * (codes.reshape(-1, GROUP).float() - zeros.float())
    assert torch.equal(by_hand.to(spec.torch_dtype).reshape(48, 64), trained)
    assert not torch.equal(zeros, zeros[:1].expand_as(zeros))

    inputs = x.to(spec.torch_dtype)
    qat.export(model, tmp_path / "out", example_inputs=inputs)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {key for key in stored if key.startswith("0.")} == {
        "0.weight_nibbles",
        "0.weight_step",
        "0.weight_zero",
        "0.bias",
    }
    assert qat.verify(tmp_path / "out", reference=model, model=architecture).ok
    loaded = qat.load(tmp_path / "out", model=architecture)
    assert torch.equal(loaded(inputs), model(inputs))
    assert torch.equal(loaded[0].frozen_weight().dequantize(), trained)  # type: ignore[index]


class InTransformers(ZeroFormat):
    libraries: ClassVar[Mapping[str, InLibrary]] = {"transformers": InLibrary("ZeroConfig", "bits")}

    def quantization_config(self, library: str, record: FrozenRecord, floats: list[str]) -> dict[str, Any]:
        return {"quant_method": "zero", "ignore": floats}


def test_what_a_model_library_reads_of_weights_comes_from_the_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGETS, "zero", Target("zero", InTransformers(), TARGETS["transformers"].host))
    model = tiny_model("llama")
    qat.prepare(model, qat.QuantSpec(weights="int4"), target="zero")
    qat.freeze(model, allow_unreached=True)
    qat.export(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "zero", "ignore": ["lm_head"]}
    assert "import qat" not in (tmp_path / "out" / "README.md").read_text()  # the format needs no plug-in


def test_a_changed_code_is_found(tmp_path: Path) -> None:
    architecture, model = floats(), floats()
    qat.prepare(model, qat.QuantSpec(weights="int4"), target="zero")
    qat.freeze(model, allow_unreached=True)
    qat.export(model, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    start = json.loads(data[8:header])["0.weight_nibbles"]["data_offsets"][0]
    data[header + start] ^= 1
    path.write_bytes(data)
    forge_files(tmp_path / "out")
    with pytest.raises(qat.VerifyError, match="codes, weight differ from what freezing left"):
        qat.verify(tmp_path / "out", model=architecture)


def test_what_the_format_has_not_is_refused() -> None:
    for spec in (qat.QuantSpec(weights="int2"), qat.QuantSpec(weights="int4", activations="int8")):
        with pytest.raises((qat.SpecError, qat.TargetError), match="format 'zero' has"):
            qat.prepare(floats(), spec, target="zero")
