from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from qat.errors import ExportError, LoadError
from qat.exporting import export
from qat.files.manifest import read_manifest
from qat.files.shards import Shard, TensorEntry, parse_size, plan_shards, read_headers, shard_names, write_shard
from tests.exports import (
    DTYPES,
    TYPES,
    code_offsets,
    frozen_layers,
)


class TestLayout:
    floats = st.sampled_from([torch.float32, torch.bfloat16])
    sizes = st.sampled_from([1, 3, 5, 8, 12, 16, 37, 48, 64, 90])

    @settings(max_examples=150)
    @given(st.data())
    def test_every_code_starts_on_a_boundary_and_every_element_is_aligned(self, data: st.DataObject) -> None:
        entries = []
        for i in range(data.draw(st.integers(1, 6))):
            dtype, rows, columns = data.draw(self.floats), data.draw(self.sizes), data.draw(self.sizes)
            packed = data.draw(st.booleans())
            code = "weight._data._data" if packed else "weight._data"
            entries.append(
                TensorEntry(f"{i}.{code}", torch.uint8 if packed else torch.int8, (rows, columns), is_code=True)
            )
            entries.append(TensorEntry(f"{i}.weight._scale", dtype, (rows, 1)))
            entries += [TensorEntry(f"{i}.{name}", dtype, ()) for name in ("input_scale", "output_scale")]
            if data.draw(st.booleans()):
                entries.append(TensorEntry(f"{i}.bias", data.draw(self.floats), (rows,)))
            if data.draw(st.booleans()):
                entries.append(TensorEntry(f"{i}.count", torch.int64, ()))
        limit = data.draw(st.sampled_from([500, 5_000, 10**9]))
        shards = plan_shards(entries, limit)
        assert sorted(e.name for shard in shards for e in shard.entries) == sorted(e.name for e in entries)
        for shard in shards:
            assert len(shard.header()) % 64 == 0
            for entry, start in zip(shard.entries, shard.offsets().values(), strict=True):
                assert start % (64 if entry.is_code else entry.dtype.itemsize) == 0, entry
            large = [e for e in shard.entries if e.is_code or e.nbytes % 64 == 0]
            assert shard.nbytes <= limit or len(large) == 1

    def test_one_odd_code_tensor_stands_before_the_small_tensors_of_its_file(self) -> None:
        entries = [TensorEntry("0.weight._data", torch.int8, (64, 5), is_code=True)]
        entries += [TensorEntry("1.weight._data", torch.int8, (12, 5), is_code=True)]  # 60 bytes
        entries += [TensorEntry(f"{i}.input_scale", torch.float32, ()) for i in range(2)]
        (shard,) = plan_shards(entries, 10**9)
        assert [entry.is_code for entry in shard.entries] == [True, True, False, False]

    def test_odd_code_sizes_cost_a_shard_each(self) -> None:
        entries = [TensorEntry(f"{i}.weight._data", torch.int8, (37, 37), is_code=True) for i in range(3)]
        entries += [TensorEntry(f"{i}.weight._scale", torch.float32, (37, 1)) for i in range(3)]
        shards = plan_shards(entries, 10**9)
        assert sum(sum(entry.is_code for entry in shard.entries) for shard in shards) == 3
        assert max(sum(entry.is_code for entry in shard.entries) for shard in shards) == 1

    def test_a_model_of_even_sizes_keeps_its_order_in_one_file(self) -> None:
        entries = [TensorEntry(f"{i}.weight._data", torch.int8, (64, 64), is_code=True) for i in range(4)]
        (shard,) = plan_shards(entries, 10**9)
        assert shard.entries == tuple(entries)

    @pytest.mark.parametrize("size", ["5 parsecs", "0GB", "-3", "", "GB"])
    def test_a_size_that_is_none_is_refused(self, size: str) -> None:
        with pytest.raises(ExportError, match="max_shard_size"):
            parse_size(size)

    def test_names_are_those_of_transformers(self) -> None:
        assert shard_names(1) == ["model.safetensors"]
        assert shard_names(12)[1] == "model-00002-of-00012.safetensors"

    def test_a_dtype_without_a_place_in_the_format_is_named(self) -> None:
        with pytest.raises(ExportError, match="complex64"):
            plan_shards([TensorEntry("a", torch.complex64, (2,))], 100)


class TestAlignmentInFiles:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("weights", TYPES)
    @pytest.mark.parametrize("max_shard_size", [2_000, "5GB"], ids=["small-shards", "one-shard"])
    def test_odd_shapes(self, tmp_path: Path, weights: str, dtype: str, max_shard_size: int | str) -> None:
        sizes = ((37, 19), (5, 37), (1, 5), (33, 1), (30, 33), (48, 30), (7, 48), (160, 7), (3, 160), (192, 3))
        model = frozen_layers(*sizes, weights=weights, dtype=dtype)
        export(model, tmp_path / "out", max_shard_size=max_shard_size)
        offsets = code_offsets(tmp_path / "out")
        quantized = len(read_manifest(tmp_path / "out").frozen.layers)
        assert len(offsets) == quantized >= 8
        assert not {name: offset for name, offset in offsets.items() if offset % 64}

    def test_what_a_stock_reader_maps_is_aligned_in_memory(self, tmp_path: Path) -> None:
        export(frozen_layers((37, 20), (20, 37), weights="int8", dtype="bfloat16"), tmp_path / "out")
        for path in (tmp_path / "out").glob("model*.safetensors"):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    assert not name.endswith("_data") or file.get_tensor(name).data_ptr() % 64 == 0


class TestWriting:
    def shard(self) -> tuple[Shard, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        tensors = {
            "large": torch.randint(-128, 128, (512, 1024), dtype=torch.int8),
            "strided": torch.randn(64, 32, dtype=torch.bfloat16).T,
            "scalar": torch.ones(()),
            "empty": torch.ones(0, 4),
        }
        entries = [TensorEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        (shard,) = plan_shards(entries, 1 << 30)
        return shard, tensors

    def test_hashes_are_those_of_the_bytes(self, tmp_path: Path) -> None:
        shard, tensors = self.shard()
        record, written = write_shard(tmp_path / "file", shard, tensors.__getitem__)
        data = (tmp_path / "file").read_bytes()
        assert (record.bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert written.keys() == tensors.keys()
        for name, tensor in tensors.items():
            own = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes()
            assert written[name].sha256 == hashlib.sha256(own).hexdigest(), name
        assert all(torch.equal(tensors[name], found) for name, found in load_file(tmp_path / "file").items())

    def test_a_tensor_that_changed_meanwhile_ends_it(self, tmp_path: Path) -> None:
        shard, tensors = self.shard()
        with pytest.raises(ExportError, match="'strided' changed while it was exported"):
            write_shard(
                tmp_path / "file", shard, lambda name: tensors[name][:1] if name == "strided" else tensors[name]
            )

    def test_a_fault_of_the_hash_is_raised(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Broken:
            def update(self, data: object) -> None:
                raise MemoryError("no hash")

        shard, tensors = self.shard()
        monkeypatch.setattr("qat.files.shards.hashlib.sha256", lambda data=b"": Broken())
        with pytest.raises(MemoryError, match="no hash"):
            write_shard(tmp_path / "file", shard, tensors.__getitem__)


class TestHeaders:
    """What a file says of itself is not believed."""

    @pytest.mark.parametrize("length", [0, 7, 33, 100_000_001, 1 << 40, (1 << 64) - 1])
    def test_a_length_that_the_file_has_not(self, tmp_path: Path, length: int) -> None:
        (tmp_path / "file").write_bytes(struct.pack("<Q", length) + b"{}" + b" " * 30)
        with pytest.raises(LoadError, match=r"file in .* is not a whole safetensors file"):
            read_headers([tmp_path / "file"])

    def test_a_header_beyond_the_bound_is_not_read(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(struct.pack("<Q", 100_000_001))
        os.truncate(tmp_path / "file", 200_000_000)
        with pytest.raises(LoadError, match="its header would have 100000001 bytes"):
            read_headers([tmp_path / "file"])

    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "file")
        with pytest.raises(LoadError, match="file is no file"):
            read_headers([tmp_path / "file"])
