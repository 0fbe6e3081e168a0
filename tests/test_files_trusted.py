"""Which files of a directory may be opened. Random damage of whole exports: `test_scripts_mutate_exports`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qat.errors import LoadError
from qat.files.trusted import file_fault, read_json, regular_file, strays


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/etc/passwd", "../out", "a/../../b", "a//b", "./a", "a/", "a\\b", "a\0b", "a\nb"],
)
def test_a_name_that_is_not_plain_is_refused(tmp_path: Path, name: str) -> None:
    assert "is no plain name" in str(file_fault(tmp_path, name))


@pytest.mark.parametrize("name", ["a.json", "a b.json", "sub/a.json", ".hidden", "größe.txt", "..a"])
def test_a_regular_file_may_be_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    assert file_fault(tmp_path, name) is None
    assert regular_file(tmp_path, name, 1).read_text() == "x"
    (tmp_path / "linked").symlink_to(tmp_path)
    assert file_fault(tmp_path / "linked", name) is None  # the caller's own link


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (link_to("/dev/zero"), "is a link"),
        (link_to("/etc/passwd"), "is a link"),
        (link_to("other"), "is a link"),
        (link_to("file"), "is not a regular file"),
        (link_to("nowhere"), "is a link"),
        (os.mkfifo, "is not a regular file"),
        (Path.mkdir, "is not a regular file"),
        (lambda path: None, "file is missing"),
    ],
    ids=["device", "outside", "inside", "loop", "dangling", "fifo", "folder", "missing"],
)
def test_what_is_no_regular_file_is_refused(tmp_path: Path, make: Callable[[Path], None], fault: str) -> None:
    (tmp_path / "other").write_text("x")
    make(tmp_path / "file")
    assert fault in str(file_fault(tmp_path, "file"))
    with pytest.raises(LoadError, match=fault):
        regular_file(tmp_path, "file")


def test_a_folder_that_is_a_link_and_a_name_that_is_too_long_are_refused(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "file").write_text("x")
    (tmp_path / "sub").symlink_to(tmp_path / "inside")
    assert "lies below one" in str(file_fault(tmp_path, "sub/file"))
    assert "is missing" in str(file_fault(tmp_path, "x" * 300))


def test_links_of_the_hubs_cache_are_followed_and_no_others_there(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert file_fault(snapshot, "config.json") is None
    assert read_json(snapshot, "config.json") == {}
    (tmp_path / "secret").write_text("{}")
    (blobs / "evil").symlink_to(tmp_path / "secret")
    for name, target in (("one.json", "../../blobs/evil"), ("two.json", "../../../secret"), ("3.json", "/dev/zero")):
        (snapshot / name).symlink_to(target)
        assert "is a link" in str(file_fault(snapshot, name))


def test_a_sparse_file_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    os.truncate(tmp_path / "config.json", 1 << 38)
    with pytest.raises(LoadError, match="has 274877906944 bytes, and at most 100000000 are read"):
        read_json(tmp_path, "config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", "\xff", "[" * 100_000, '{"a":' * 50_000, "1" * 5000])
def test_json_that_is_no_mapping_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(LoadError, match=r"config\.json in .* (is no JSON|must hold a mapping)"):
        read_json(tmp_path, "config.json")


def test_strays_are_what_loaders_look_for(tmp_path: Path) -> None:
    sought = ["adapter_config.json", "adapter_model.bin", "config.json", "config.4.0.0.json", "model.gguf"]
    sought += ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "generation_config.json"]
    sought += ["diffusion_pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5"]
    others = ["README.md", "LICENSE", "picture.png", "tokenizer.json", "training_args.bin", ".gitattributes", "a.py"]
    for name in sought + others:
        (tmp_path / name).touch()
    assert [text.partition(" ")[0] for text in strays(tmp_path, ())] == sorted(sought)
    assert strays(tmp_path, sought) == []
    assert len(strays(tmp_path, sought, "picture.png")) == 1
