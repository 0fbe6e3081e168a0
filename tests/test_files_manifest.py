"""The manifest: what an export says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qat.errors import ExportError, LoadError
from qat.exporting import export
from qat.files.manifest import MANIFEST_NAME, read_manifest
from tests.exports import (
    IDS,
    frozen_llama,
)


class TestManifest:
    def test_it_tells_everything(self, tmp_path: Path) -> None:
        model = frozen_llama(weights="int4", dtype="bfloat16")
        config = {"seed": 3, "model": {"source": "tiny"}}
        report = export(model, tmp_path / "out", example_inputs={"input_ids": IDS}, config=config)
        manifest = read_manifest(tmp_path / "out")
        assert (manifest.format, manifest.target, manifest.dtype) == (1, "quanto", "bfloat16")
        assert manifest.model_class == "transformers.models.llama.modeling_llama.LlamaForCausalLM"
        assert manifest.frozen.spec.weights == "int4"
        assert manifest.frozen.algorithm == "straight_through"
        assert len(manifest.frozen.layers) == 7
        assert manifest.environment.torch == torch.__version__
        assert manifest.environment.threads == torch.get_num_threads()
        assert manifest.config == config
        assert (tmp_path / "out" / "qat_config.yaml").read_text() == "seed: 3\nmodel:\n  source: tiny\n"
        assert manifest.files.keys() == report.files.keys() - {MANIFEST_NAME, "README.md"}

    def test_the_report_counts_and_hashes_every_file(self, tmp_path: Path) -> None:
        import hashlib

        report = export(frozen_llama(weights="int8"), tmp_path / "out")
        on_disk = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert {name: record.sha256 for name, record in report.files.items()} == {
            name: hashlib.sha256(data).hexdigest() for name, data in on_disk.items()
        }
        assert report.total_bytes == sum(map(len, on_disk.values()))
        assert "model.safetensors" in str(report)

    def test_no_path_of_this_machine_is_written(self, tmp_path: Path) -> None:
        export(frozen_llama(weights="int8"), tmp_path / "out", example_inputs=(IDS,))
        for path in (tmp_path / "out").iterdir():
            assert str(tmp_path).encode() not in path.read_bytes(), path.name

    def test_processors_come_along(self, tmp_path: Path) -> None:
        saved: list[str] = []

        class Processor:
            def save_pretrained(self, directory: str) -> None:
                saved.append(directory)
                (Path(directory) / f"processor-{len(saved)}.json").write_text("{}")

        report = export(frozen_llama(weights="int8"), tmp_path / "out", processor=[Processor(), Processor()])
        assert {"processor-1.json", "processor-2.json"} < set(report.files)

    def test_something_that_cannot_be_saved_is_no_processor(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="save_pretrained"):
            export(frozen_llama(weights="int8"), tmp_path / "out", processor=object())


@pytest.mark.parametrize(
    ("left", "remedy"),
    [
        ('{"ended": false}', "its run has not ended: start it again"),
        ('{"ended": true}', "name what qat.export wrote"),
        ("[]", "name what qat.export wrote"),
        (None, "name what qat.export wrote"),
    ],
    ids=["cut short", "ended", "strange", "nothing"],
)
def test_a_missing_export_may_be_of_a_run_that_goes_on(left: str | None, remedy: str, tmp_path: Path) -> None:
    (tmp_path / "out-checkpoints").mkdir()
    if left is not None:
        (tmp_path / "out-checkpoints" / "run.json").write_text(left)
    with pytest.raises(LoadError, match=remedy):
        read_manifest(tmp_path / "out")
