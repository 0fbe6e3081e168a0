"""No code from a model's directory, or from the current folder, runs."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import qat
from qat.errors import LoadError
from qat.files.manifest import MANIFEST_NAME
from qat.hosts.remote_code import refuse_remote_code
from tests.exports import forge_hashes, frozen_llama, unsealed

ROOT = Path(__file__).parent.parent
LOADERS = {"from_pretrained", "from_config", "_from_config"}
# The file, the function and the call, for those that build a known class of the library and run no code of a directory.
WITHOUT_THE_ARGUMENT = {
    (
        "qat/hosts/transformers.py",
        "build_from",
        "GenerationConfig.from_pretrained",
    ): "numbers and names, no class",
    (
        "qat/hosts/diffusers.py",
        "build",
        "cls.from_config",
    ): "a class of diffusers, and a configuration that is read; diffusers warns of more",
    ("qat/hosts/transformers.py", "build", "cls._from_config"): "a class of transformers takes its configuration alone",
    (
        "qat/hosts/diffusers.py",
        "load",
        "cls.from_pretrained",
    ): "a class of diffusers, which warns of arguments it does not know",
    (
        "recipes/data/noising.py",
        "__init__",
        "type(scheduler).from_config",
    ): "a scheduler's class, and its own configuration",
    (
        "scripts/kill_and_resume.py",
        "make_model",
        "getattr(diffusers, kind).from_config",
    ): "a class of diffusers, as above",
    ("scripts/stock_diffusers.py", "load", "own.from_pretrained"): "a class of diffusers, as above",
}


def loading_calls(
    node: ast.AST, function: str = "", named: Mapping[str, str] | None = None
) -> Iterator[tuple[str, str, bool]]:
    """Function, callee and whether the argument is given, also where a loader is called by a name that it was given."""
    named = named or {}
    if isinstance(node, ast.FunctionDef):
        function, named = node.name, {**named, **named_loaders(node)}
    if isinstance(node, ast.Call):
        text = ast.unparse(node.func)
        callee = named.get(text, text)
        if callee.rpartition(".")[2] in LOADERS:
            yield function, callee, "trust_remote_code" in [keyword.arg for keyword in node.keywords]
    for child in ast.iter_child_nodes(node):
        yield from loading_calls(child, function, named)


def named_loaders(function: ast.FunctionDef) -> dict[str, str]:
    """What ``load = Class.from_pretrained`` names, also where it is one of two."""
    found = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for part in (node.value, getattr(node.value, "body", None)):
                if isinstance(part, ast.Attribute) and part.attr in LOADERS:
                    found |= dict.fromkeys(map(ast.unparse, targets), ast.unparse(part))
    return found


def test_the_reader_finds_calls_by_another_name() -> None:
    source = (
        "def f(x):\n    load: Any = A.from_pretrained\n    try:\n        load(x)\n        B.from_config(x, **y)\n"
        "    finally:\n        make = k.from_config if x else 1\n        make(x, trust_remote_code=False)\n"
    )
    found = [("f", "A.from_pretrained", False), ("f", "B.from_config", False), ("f", "k.from_config", True)]
    assert list(loading_calls(ast.parse(source))) == found


def test_every_call_says_that_no_remote_code_is_trusted() -> None:
    missing = [
        f"{path.relative_to(ROOT)}, {function}: {callee}"
        for folder in ("qat", "recipes", "scripts")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for function, callee, given in loading_calls(ast.parse(path.read_text()))
        if not given and (path.relative_to(ROOT).as_posix(), function, callee) not in WITHOUT_THE_ARGUMENT
    ]
    assert not missing


STRANGE = {
    "model_type": "strange",
    "auto_map": {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"},
}
# A type that transformers knows, but not as a language model.
HALF_KNOWN = {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "strange.Model"}}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What code of a stranger writes, if it runs."""
    return tmp_path / "it_ran"


def write_strange_code(path: Path, marker: Path) -> None:
    path.write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'strange'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )


def strange_directory(folder: Path, marker: Path, config: dict[str, Any], **changes: Any) -> Path:
    """A directory whose model only its own code can build; with changes of a manifest, an export."""
    if changes:
        qat.export(frozen_llama(changes["target"]), folder, target=changes["target"])
        path = folder / MANIFEST_NAME
        path.write_text(json.dumps(unsealed(folder) | changes))
    folder.mkdir(exist_ok=True)
    write_strange_code(folder / "strange.py", marker)
    (folder / "config.json").write_text(json.dumps(config))
    if changes:
        forge_hashes(folder, tensors=False)
    return folder


def run_with_yes(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python, which reads "yes" whenever something asks."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, input="yes\n" * 20, capture_output=True, text=True, check=False, env=environment)


AUTO_CLASS = {"target": "transformers", "model_class": "transformers.AutoModelForCausalLM"}


@pytest.mark.parametrize(
    ("config", "changes", "program", "code"),
    [
        (STRANGE, {}, "from qat.cli import main; main(['inspect', {0!r}])", 2),
        (STRANGE, AUTO_CLASS, "import qat; qat.load({0!r})", 1),
        (STRANGE, AUTO_CLASS, "from qat.cli import main; main(['verify', {0!r}])", 1),
        (HALF_KNOWN, {"target": "quanto"}, "from qat.cli import main; main(['verify', {0!r}])", 1),
    ],
    ids=["inspect", "load", "verify", "verify quanto"],
)
def test_a_directory_with_code_is_an_error_at_once(
    config: dict[str, Any], changes: dict[str, str], program: str, code: int, tmp_path: Path, marker: Path
) -> None:
    folder = strange_directory(tmp_path / "model", marker, config, **changes)
    done = run_with_yes(tmp_path, "-c", program.format(str(folder)))
    said = " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert done.returncode == code, said
    assert "the model's directory" in said
    assert "brings code of its own (auto_map in config.json: strange." in said
    assert "[y/N]" not in said
    assert not marker.exists()


def test_inspect_tells_it_in_one_line(tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = strange_directory(tmp_path / "model", marker, STRANGE)
    from qat.cli import main

    with pytest.raises(SystemExit):
        main(["inspect", str(folder)])
    told = capsys.readouterr().err
    assert told.startswith(f"error: model: the model's directory {str(folder)!r} brings code of its own")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        "{}",
        '{"model_type": "llama", "auto_map": {"AutoConfig": "strange.Config"}}',
        '{"_class_name": "FluxTransformer2DModel", "auto_map": {"AutoModel": "strange.Model"}}',
    ],
    ids=["corrupt", "a list", "nothing", "known to transformers", "known to diffusers"],
)
def test_what_needs_no_code_passes(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    refuse_remote_code(tmp_path)
    refuse_remote_code(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": {"_class_name": "Strange", "auto_map": {"AutoModel": "strange.Model"}}},
        {"config.json": {"configuration_files": ["config.4.0.0.json"]}, "config.4.0.0.json": STRANGE},
    ],
    ids=["diffusers", "a file for a version"],
)
def test_what_needs_code_is_refused(files: dict[str, Any], tmp_path: Path) -> None:
    for name, fields in files.items():
        (tmp_path / name).write_text(json.dumps(fields))
    with pytest.raises(LoadError, match="model: the model's directory"):
        refuse_remote_code(tmp_path, "model")


def test_a_fresh_process_imports_nothing_from_the_current_folder(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = qat.export(frozen_llama("transformers"), tmp_path / "out", target="transformers") and tmp_path / "out"
    (tmp_path / "current").mkdir()
    for name in ("tyro", "torch", "rich", "json"):
        write_strange_code(tmp_path / "current" / f"{name}.py", marker)
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setenv("PYTHONPATH", os.pathsep + os.environ.get("PYTHONPATH", ""))  # an empty entry: this folder
    assert qat.verify(folder, fresh_process=True).ok
    assert not marker.exists()
