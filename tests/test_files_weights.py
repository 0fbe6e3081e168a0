"""Weight files and their index."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from qat.exporting import export
from tests.exports import (
    frozen_llama,
    stored_tensors,
)


class TestWeightFiles:
    def test_shards_have_an_index_as_transformers_writes_it(self, tmp_path: Path) -> None:
        export(frozen_llama(weights="int8"), tmp_path / "out", max_shard_size="8KB")
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        tensors = stored_tensors(tmp_path / "out")
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
        files = sorted(set(index["weight_map"].values()))
        assert len(files) > 2
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "out" / file, framework="pt") as opened:
                assert name in opened.keys()  # noqa: SIM118
