"""What hinders the build of quanto's kernels is an error that names it, and no wait without end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optimum.quanto.library.extensions import get_extension
from torch import nn

import qat
from qat.errors import StateError
from qat.formats import quanto_extensions


@pytest.fixture
def extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The extension for CPUs, as if it were to be built in an empty folder."""
    quanto_extensions.guard_extensions()
    found = get_extension("quanto_cpp")
    monkeypatch.setattr(found, "_lib", None)
    monkeypatch.setattr(found, "build_directory", str(tmp_path / "build"))
    return found


def building(monkeypatch: pytest.MonkeyPatch, build: Callable[..., Any]) -> None:
    monkeypatch.setattr("optimum.quanto.library.extensions.extension.load", build)


def freeze(weights: str) -> None:
    model = nn.Sequential(nn.Linear(256, 16))
    qat.prepare(model, qat.QuantSpec(weights=weights, dtype="float32"))
    qat.freeze(model)


def locked(extension: Any, age: float) -> Path:
    lock = Path(extension.build_directory, "lock")
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - age,) * 2)
    return lock


@pytest.mark.parametrize("weights", ["int4", "int2"])
@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), RuntimeError("Ninja is required"), RuntimeError("c++:\nno")]
)
def test_what_cannot_be_built_is_named(
    weights: str, error: Exception, extension: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(**_: Any) -> None:
        raise error

    building(monkeypatch, build)
    with pytest.raises(StateError, match=r"'quanto_cpp'.* could not be built in '.*build': .*; make that folder"):
        freeze(weights)


def test_an_old_lock_that_nobody_holds_is_an_error(extension: Any) -> None:
    lock = locked(extension, 1000)
    with pytest.raises(StateError, match=rf"left a lock, 17 minutes old, .*: if nothing builds there, delete '{lock}'"):
        freeze("int4")


def test_a_lock_that_a_process_holds_is_waited_for(
    extension: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock, built = locked(extension, 1000), []
    building(monkeypatch, lambda **_: built.append(lock.exists()) or SimpleNamespace())
    with lock.open():
        monkeypatch.setattr(quanto_extensions.time, "sleep", lambda _: lock.unlink())
        assert extension.lib is not None
    assert built == [False]
    assert not caplog.records


def test_a_young_lock_that_nobody_holds_is_told_and_waited_for(
    extension: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock, waits = locked(extension, 0), [lambda: None, lambda: os.utime(lock, (0, 0))]
    monkeypatch.setattr(quanto_extensions.time, "sleep", lambda _: waits.pop(0)())
    with pytest.raises(StateError, match="left a lock"):
        _ = extension.lib
    (record,) = caplog.records
    assert f"waiting until it is 10 minutes old; if nothing builds there, delete '{lock}'" in record.getMessage()
