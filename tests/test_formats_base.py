"""Stored tensors that do not fit what is declared of a layer are named, from the headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.errors import ExportError
from qat.files.evidence import FrozenRecord
from qat.files.shards import TensorEntry
from qat.formats import FORMATS, QUANTO, Format, FrozenLayer, LayerTypes, Slot
from qat.spec import QuantSpec
from tests.helpers import DTYPES, WEIGHT_TYPES

OUT, IN, NAME = 384, 256, "model.layers.0.mlp.up_proj"


def headers(
    weights: str = "int8",
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = True,
    shape: tuple[int, int] = (OUT, IN),
) -> dict[str, TensorEntry]:
    """What the headers say of a layer that was written as declared."""
    slots = QUANTO.slots(QUANTO.types(weights, None, dtype), shape, bias)
    return {key: TensorEntry(f"{NAME}.{key}", slot.dtype, slot.shape) for key, slot in slots.items()}


def faults(
    found: Mapping[str, TensorEntry],
    weights: str = "int8",
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: bool = True,
    group: int | None = -1,
    shape: tuple[int, int] = (OUT, IN),
) -> list[str]:
    types = QUANTO.types(weights, None, dtype)
    size = types.weights.group_size(shape[1]) if group == -1 else group
    return QUANTO.faults(NAME, types, shape, bias, size, found)


@pytest.mark.parametrize("shape", [(OUT, IN), (1, 64), (3, 320), (5, 200)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_what_was_written_has_no_fault(weights: str, dtype: torch.dtype, bias: bool, shape: tuple[int, int]) -> None:
    found = headers(weights, dtype, bias, shape)
    assert faults(found, weights, dtype, bias=bias, shape=shape) == []


OTHER_TYPES = [(stored, read) for stored, read in product(WEIGHT_TYPES, WEIGHT_TYPES) if stored != read]


@pytest.mark.parametrize(("stored", "read"), OTHER_TYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_files_of_another_type_are_named(stored: str, read: str, dtype: torch.dtype) -> None:
    found = faults(headers(stored, dtype), read, dtype)
    assert found
    assert all(fault.startswith(f"{NAME}.weight.") for fault in found)


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_files_of_another_serving_dtype_are_named(weights: str) -> None:
    found = faults(headers(weights, torch.float32), weights, torch.bfloat16)
    assert f"{NAME}.bias is F32 [384], but {weights} weights served in bfloat16 need BF16 [384]" in found
    assert len(found) == (5 if weights in ("int4", "int2") else 4)


def test_another_group_size_is_named() -> None:
    (fault,) = faults(headers("int4"), "int4", group=64)
    assert fault == (f"{NAME} is declared with group_size=64, but loaders of int4 use 128")


def test_a_float_weight_is_named() -> None:
    found = {"weight": TensorEntry(f"{NAME}.weight", torch.bfloat16, (OUT, IN))}
    (fault,) = faults(found)
    assert fault == f"{NAME} is declared int8, but the files hold a float weight for it ({NAME}.weight)"


@pytest.mark.parametrize(
    "key", ["bias", "weight._data._data", "weight._scale", "weight._shift", "input_scale", "output_scale"]
)
def test_a_missing_key_is_named(key: str) -> None:
    found = headers("int4")
    del found[key]
    assert faults(found, "int4") == [f"{NAME}.{key} is missing (needed for int4)"]


@pytest.mark.parametrize("key", ["bias", "weight._shift", "weight._zeros", "extra"])
def test_a_key_too_many_is_named(key: str) -> None:
    found = headers("int8", bias=False) | {key: TensorEntry(f"{NAME}.{key}", torch.float32, (OUT,))}
    assert faults(found, bias=False) == [f"{NAME}.{key} does not belong to a layer declared int8"]


@pytest.mark.parametrize("shape", [(), (1, 1)], ids=str)
def test_one_rows_scale_has_either_shape(shape: tuple[int, ...]) -> None:
    found = headers("int8", shape=(1, IN)) | {"weight._scale": TensorEntry("s", torch.bfloat16, shape)}
    assert faults(found, shape=(1, IN)) == []
    found["weight._scale"] = TensorEntry("s", torch.bfloat16, (1,))
    (fault,) = faults(found, shape=(1, IN))
    assert fault.endswith("is BF16 [1], but int8 weights served in bfloat16 need BF16 [] or [1, 1]")


class Plain(Format):
    """The least that a format says of itself."""

    name = "plain"
    qtypes = QUANTO.qtypes
    activation_qtypes = QUANTO.activation_qtypes
    library = "none"

    def slots(self, types: LayerTypes, shape: tuple[int, int], bias: bool) -> dict[str, Slot]:
        return {"weight.codes": Slot(types.weights.storage, (shape,), is_code=True)}

    def pack(self, layer: FrozenLayer) -> dict[str, Tensor]:
        return {"weight.codes": layer.weight.codes}

    def build(
        self,
        types: LayerTypes,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        *,
        like: nn.Module,
        plain_on_cpu: bool = False,
    ) -> nn.Module:
        return nn.Identity()

    def is_frozen(self, module: nn.Module) -> bool:
        return False

    def declared(self, module: nn.Module) -> LayerTypes:
        raise NotImplementedError

    def read(self, module: nn.Module) -> FrozenLayer:
        raise NotImplementedError


def test_a_format_that_says_little_has_no_hazard_no_map_and_no_loader(tmp_path: Path) -> None:
    plain, model = Plain(), nn.Identity()
    types = plain.types("int8", None, torch.float32)
    record: Any = FrozenRecord(QuantSpec(), "quanto", "straight_through", {}, ())
    assert plain.layer_hazard(types, (4, 4)) is plain.input_hazard(types, torch.ones(1, 4)) is None
    assert plain.notices([(types, (4, 4), True)]) == plain.card_loading() == []
    plain.write_map(record, tmp_path)
    assert not list(tmp_path.iterdir())
    assert plain.is_settled(model, plain_on_cpu=True)
    plain.settle(model, plain_on_cpu=True)
    assert plain.fill(model, tmp_path, []) is plain.load_language_model(tmp_path) is None
    assert plain.nbytes(types, (4, 8)) == 32
    layer: Any = None
    with pytest.raises(ExportError, match="no stock load quantizes into format 'plain': export packed weights"):
        plain.stock_codes(layer)


def test_formats_are_found_by_their_name() -> None:
    assert FORMATS["quanto"] is QUANTO
    assert all(name == format.name for name, format in FORMATS.items())
