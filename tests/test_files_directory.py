"""A directory that appears whole or not at all."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qat.files.shards as layout
from qat.errors import ExportError, LoadError
from qat.exporting import ExportReport, export
from qat.files.manifest import MANIFEST_NAME
from qat.loading import load
from tests.exports import (
    frozen_layers,
    frozen_llama,
)


class TestAllOrNothing:
    @staticmethod
    def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        """Let the disk be full after so many tensors, in the middle of a file."""
        calls = []
        honest: Callable[[torch.Tensor], memoryview] = layout.raw_bytes

        def raw_bytes(tensor: torch.Tensor) -> memoryview:
            calls.append(tensor)
            if len(calls) > after:
                raise OSError(errno.ENOSPC, "No space left on device")
            return honest(tensor)

        monkeypatch.setattr(layout, "raw_bytes", raw_bytes)

    def test_a_full_disk_leaves_nothing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.full_disk(monkeypatch, after=10)
        with pytest.raises(ExportError, match=r"No space left on device: .* wanted; free space") as caught:
            export(frozen_llama(weights="int8"), tmp_path / "out")
        assert isinstance(caught.value.__cause__, OSError)
        assert re.search(
            rf"'{tmp_path}' took [\d,]+ bytes and has [\d,]+ left, and at least [\d,]+ are", str(caught.value)
        )
        assert not list(tmp_path.iterdir())

    def test_a_full_disk_leaves_the_old_export_untouched(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        export(frozen_llama(weights="int8"), tmp_path / "out")
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        self.full_disk(monkeypatch, after=3)
        with pytest.raises(ExportError):
            export(frozen_llama(weights="int4"), tmp_path / "out", overwrite=True)
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_rename_that_fails_puts_the_old_export_back(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        export(frozen_llama(weights="int8"), tmp_path / "out")
        before = (tmp_path / "out" / MANIFEST_NAME).read_bytes()
        honest = Path.rename

        def rename(self: Path, target: Path) -> Path:
            if self.name == "new" and not any(target.parent.glob("out")):
                raise OSError(errno.EIO, "Input/output error")
            return honest(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        monkeypatch.setattr("qat.files.whole._exchange", lambda *_: False)
        with pytest.raises(ExportError, match="Input/output error"):
            export(frozen_llama(weights="int4"), tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / MANIFEST_NAME).read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_processor_that_fails_leaves_nothing(self, tmp_path: Path) -> None:
        class Broken:
            def save_pretrained(self, directory: str) -> None:
                raise KeyError("vocab")

        with pytest.raises(ExportError, match="KeyError"):
            export(frozen_llama(weights="int8"), tmp_path / "out", processor=Broken())
        assert not list(tmp_path.iterdir())

    def test_overwrite_replaces_the_whole_directory(self, tmp_path: Path) -> None:
        export(frozen_layers((16, 32)), tmp_path / "out", config={"seed": 1})
        (tmp_path / "out" / "my grid.png").write_text("a picture")
        with (tmp_path / "out" / "README.md").open("a") as card:
            card.write("![images](my%20grid.png)")
        report: ExportReport = export(frozen_llama(weights="int8"), tmp_path / "out", overwrite=True)
        assert {path.name for path in (tmp_path / "out").iterdir()} == set(report.files)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("name", ["notes.txt", "folder/notes.txt", "model.safetensors.old"])
    def test_files_of_the_user_are_never_removed(self, name: str, tmp_path: Path) -> None:
        export(frozen_layers((16, 32)), tmp_path / "out")
        path = tmp_path / "out" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        before = sorted((tmp_path / "out").rglob("*"))
        with pytest.raises(
            ExportError, match=rf"files that its export did not write \({name}\).*: move them elsewhere"
        ):
            export(frozen_layers((16, 32)), tmp_path / "out", overwrite=True)
        assert sorted((tmp_path / "out").rglob("*")) == before

    def test_an_export_without_a_readable_manifest_is_not_replaced(self, tmp_path: Path) -> None:
        (tmp_path / MANIFEST_NAME).write_text("{}")
        with pytest.raises(ExportError, match="no manifest says of what: choose another"):
            export(frozen_layers((16, 32)), tmp_path, overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]

    @pytest.mark.parametrize("directory", [None, 3, ["out"]])
    def test_what_is_no_path_is_refused_by_name(self, directory: Any) -> None:
        model = frozen_layers((16, 32))
        for call, error in ((lambda: export(model, directory), ExportError), (lambda: load(directory), LoadError)):
            with pytest.raises(error, match=r"directory: must be a path, a text or a Path, got .*: name the directory"):
                call()

    def test_an_export_is_replaced_only_when_asked(self, tmp_path: Path) -> None:
        export(frozen_layers((16, 32)), tmp_path / "out")
        with pytest.raises(ExportError, match=r"holds an export: choose another one, or pass overwrite=True"):
            export(frozen_layers((16, 32)), tmp_path / "out")

    @pytest.mark.parametrize("overwrite", [False, True])  # so that no hint tells to overwrite what cannot be
    def test_what_is_no_export_is_never_replaced(self, overwrite: bool, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(ExportError, match=r"no manifest says of what.*has no qat_manifest.json"):
            export(frozen_layers((16, 32)), tmp_path, overwrite=overwrite)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
