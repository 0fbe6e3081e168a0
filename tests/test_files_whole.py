"""Files and directories that appear whole or not at all; `scripts.interrupt_writing` kills many more processes."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from qat.errors import ExportError
from qat.files import whole
from qat.files.whole import clear_leftovers, explained, whole_directory, whole_file


def in_process(work: Callable[[], None]) -> int:
    """Fork a process that does some work, and return its id."""
    if child := os.fork():
        return child
    try:
        work()
    finally:
        os._exit(1)


def write(destination: Path, text: str, then: Callable[[], object] = lambda: None) -> None:
    with whole_directory(destination) as made:
        (made / "a").write_text(text)
        (made / "b").mkdir()
        (made / "b" / "c").write_text(text)
        then()


def texts(destination: Path) -> set[str]:
    return {path.read_text() for path in destination.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(whole, "_exchange", lambda *_: False)
    return bool(request.param)


def test_a_directory_replaces_another_and_leaves_nothing(exchanges: bool, tmp_path: Path) -> None:
    for text in ("old", "new"):
        write(tmp_path / "x" / "out", text)
        assert texts(tmp_path / "x" / "out") == {text}
    assert names(tmp_path / "x") == ["out"]


@pytest.mark.parametrize("failing", ["write", "rename", "sync"])
def test_what_fails_leaves_the_old_one(
    failing: str, exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", "old")

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    if failing == "rename":
        monkeypatch.setattr(Path, "rename", refuse)
    elif failing == "sync":
        monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ExportError, match=r"out' could not be written.*: Input/output error; check the disk, then run"):
        write(tmp_path / "out", "new", refuse if failing == "write" else lambda: None)
    assert texts(tmp_path / "out") == {"old"}
    assert names(tmp_path) == ["out"]


def test_a_process_that_dies_between_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "_exchange", lambda *_: False)
    write(tmp_path / "out", "old")
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        found = rename(path, target)
        if target.name == "old":
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    def work() -> None:
        Path.rename = killed  # type: ignore[method-assign]
        write(tmp_path / "out", "new")

    os.waitpid(in_process(work), 0)
    (left,) = names(tmp_path)  # the gap
    assert left.startswith(".out.")
    clear_leftovers(tmp_path / "out")
    assert texts(tmp_path / "out") == {"old"}
    assert names(tmp_path) == ["out"]


def test_leftovers_of_dead_processes_go_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    other = [".out.1234567.tmp", ".out.123456789.tmp", ".out.12345678.tmp2", ".out2.12345678.tmp", "out.12345678.tmp"]
    for name in [*other, ".out.12345678.tmp", ".out.90abcdef.tmp"]:
        (tmp_path / name / "new").mkdir(parents=True)
    (tmp_path / ".out.00000000.tmp").write_text("a file")
    (tmp_path / ".out.00000001.tmp").symlink_to(tmp_path / other[0])
    write(tmp_path / "out", "new")
    assert names(tmp_path) == sorted([*other, "out", ".out.00000000.tmp", ".out.00000001.tmp"])


def test_what_a_live_process_writes_stays(tmp_path: Path) -> None:
    child = in_process(lambda: write(tmp_path / "out", "first", lambda: os.kill(os.getpid(), signal.SIGSTOP)))
    os.waitpid(child, os.WUNTRACED)
    write(tmp_path / "out", "second")
    assert len(names(tmp_path)) == 2
    assert texts(tmp_path / "out") == {"second"}
    os.kill(child, signal.SIGCONT)
    os.waitpid(child, 0)
    assert texts(tmp_path / "out") == {"first"}
    assert names(tmp_path) == ["out"]


def test_a_file_system_without_locks_keeps_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / ".out.12345678.tmp").mkdir()
    monkeypatch.setattr(fcntl, "flock", refuse)
    write(tmp_path / "out", "new")
    assert names(tmp_path) == [".out.12345678.tmp", "out"]


def test_a_directory_that_must_not_be_replaced_any_more_is_not(tmp_path: Path) -> None:
    def check() -> None:
        raise ExportError("no")

    with pytest.raises(ExportError, match="no"), whole_directory(tmp_path / "out", check=check):
        pass
    assert not names(tmp_path)


def test_a_file_replaces_another_or_leaves_it(tmp_path: Path) -> None:
    path, limits = tmp_path / "scores.json", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text("old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with (
            pytest.raises(ExportError, match=r"File too large: .* took 100 bytes, and more is wanted; raise the limit"),
            whole_file(path) as made,
        ):
            made.write_text("x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old"
    with whole_file(path) as made:
        assert made.name == path.name
        made.write_text("new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["scores.json"]


def test_errors_of_other_kinds_pass(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a"):
        raise ZeroDivisionError
    full = pytest.raises(ExportError, match=r"No space left on device: .*, and at least 1,000 are wanted; free space")
    with full, explained(tmp_path / "a", wanted=1000):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    told = ExportError("told")
    told.__context__ = OSError(errno.EIO, "Input/output error")
    with pytest.raises(ExportError, match=r"^told$"), explained(tmp_path / "a"):
        raise told
    assert not names(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    missing = pytest.raises(ExportError, match=r"No such file or directory; check the path and its rights.*missing")
    with missing, whole_file(tmp_path / "missing" / "a"):
        pass
