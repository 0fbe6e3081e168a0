from __future__ import annotations

import os
from pathlib import Path

import pytest

from qat.errors import ExportError
from qat.files.places import check_place, like_folder


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("", "'' is the current folder, or holds it: give the name of a new one"),
        (".", "'.' is the current folder, or holds it"),
        ("..", "'..' is the current folder, or holds it"),
        ("/", "'/' is the current folder, or holds it"),
        ("file", "'file' is a file or a link: choose another name"),
        ("link", "'link' is a file or a link"),
        ("pipe", "'pipe' is a file or a link"),
        ("file/a/b", "'file/a/b' .*"),
        ("~nosuchuser/a", "'~nosuchuser/a' begins with ~, and there is no user of that name here"),
        ("x" * 240, ".* of 240 characters cannot be written: File name too long"),
        ("x/" * 3000, ".* cannot be written: File name too long"),
        ("/proc/nothing", "'/proc/nothing' cannot be written: .*: choose another place"),
        ("a\0b", r"'a\\x00b' is no path: "),
    ],
    ids=lambda value: value[:16],
)
def test_a_place_where_nothing_can_be_made_is_told(
    place: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("file").touch()
    Path("link").symlink_to(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(ExportError, match=rf"^output: {told}"):
        check_place(place, "output")
    assert sorted(os.listdir()) == ["file", "link", "pipe"]


@pytest.mark.parametrize("place", ["new", "new/deeper/still", "there", "x" * 200])
def test_a_place_that_is_free_is_given_back_and_left_as_it_was(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    assert check_place(place, "output") == tmp_path / place
    assert os.listdir() == ["there"]


def test_a_folder_that_is_meant_has_its_whole_path(tmp_path: Path) -> None:
    (tmp_path / "ann's-model").mkdir()
    assert like_folder(tmp_path / "ann's-modle") == f' (did you mean "{tmp_path}/ann\'s-model"?)'
    assert like_folder("/tpm") == " (did you mean '/tmp'?)"
    assert like_folder(tmp_path / "nothing" / "like") == ""
