from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

import qat
from qat.cli import main
from qat.errors import LoadError, VerifyError
from qat.hosts.configurations import build_on_meta
from tests.exports import frozen_llama


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A directory with a configuration and nothing else: weights are not read."""
    LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in argv])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_inspect_prints_a_table(capsys: pytest.CaptureFixture[str], model_dir: Path) -> None:
    code, out, err = run(capsys, "inspect", model_dir, "--weights", "int4", "--exclude", "*.q_proj")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert "int4" in rows["model.layers.*.mlp.up_proj"]
    assert "excluded by '*.q_proj'" in rows["model.layers.*.self_attn.q_proj"]
    assert "parameters quantized for target 'transformers'" in out
    code, full, err = run(capsys, "inspect", model_dir, "--weights", "int4", "--full")
    assert (code, err) == (0, "")
    assert {line.split()[0] for line in full.splitlines()} >= {f"model.layers.{n}.mlp.up_proj" for n in (0, 1)}


def test_inspect_prints_json(capsys: pytest.CaptureFixture[str], model_dir: Path) -> None:
    argv = ["--weights", "int2", "--overrides", "*.down_proj=int8", "--target", "transformers", "--json"]
    code, out, _ = run(capsys, "inspect", model_dir, *argv)
    report = json.loads(out)
    assert code == 0
    assert report["target"] == "transformers"
    assert report["spec"]["weights"] == "int2"
    types = {layer["name"].rpartition(".")[2]: layer["weights"] for layer in report["layers"]}
    assert types == dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), "int2") | {
        "down_proj": "int8",
        "lm_head": None,
    }


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["inspect", "nowhere"], "model: 'nowhere' is no directory here"),
        (
            ["inspect", "{model}", "--exclude", "*.nothing"],
            "exclude: pattern '*.nothing' matches no layer that can be quantized",
        ),
        (["inspect", "x", "--overrides", "*=int5"], "QuantSpec: overrides.*: Input should be 'int8', 'float8', "),
        (["verify", "nowhere"], "'nowhere'"),
    ],
    ids=["no directory", "pattern", "override", "no export"],
)
def test_a_users_mistake_is_one_line_and_code_2(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str], model_dir: Path
) -> None:
    code, out, err = run(capsys, *(word.format(model=model_dir) for word in argv))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert expected in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["inspect", "x", "--weights", "int44"], "got 'int44' (did you mean 'int4'?)"),
        (["inspect", "x", "--overrides", "a"], "--overrides: expected KEY=VALUE"),
        (["inspect"], "error: MODEL (a model's or a pipeline's directory"),
        (["inspect", "x", "--wieghts", "int4"], "did you mean --weights?): qat inspect --help"),
        (["inspect", "x", "--help=1"], "--help=1"),
        (["quantize", "x"], "command: must be one of inspect, calibrate, train, export, verify"),
    ],
    ids=["type", "mapping", "no argument", "option", "help", "verb"],
)
def test_wrong_usage_is_one_line_with_code_2(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert expected in err
    assert (err[:7], err.count("\n")) == ("error: ", 1)


def test_verify_says_nothing_but_its_report(tmp_path: Path) -> None:
    qat.export(frozen_llama("transformers"), tmp_path / "out", target="transformers")
    command = [sys.executable, "-m", "qat.cli", "verify", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(check["passed"] for check in json.loads(done.stdout)["checks"])


def test_a_failed_verification_is_code_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path, **__: object) -> None:
        raise VerifyError("layer 'a': 1 code differs")

    monkeypatch.setitem(sys.modules, "qat.verification", SimpleNamespace(verify=fail))
    monkeypatch.setattr("qat.untrusted.read_trusted", lambda _: None)
    assert run(capsys, "verify", "somewhere") == (1, "", "error: layer 'a': 1 code differs\n")


@pytest.mark.parametrize("place", [0, 2, 4])
def test_debug_may_stand_anywhere(place: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", "nowhere", "--json"]
    words.insert(place, "--debug")
    code, _, err = run(capsys, *words)
    assert (code, err.startswith("Traceback")) == (2, True)
    assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "has no config.json"),
        ("{", "is not a model's configuration"),
        ("[]", "is not a model's configuration"),
        ('{"model_type": "no_such_model"}', "transformers cannot build the model"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "transformers cannot build the model"),
    ],
    ids=["missing", "corrupt", "a list", "unknown model", "wrong value"],
)
def test_a_bad_model_directory_is_an_error(text: str | None, expected: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(LoadError, match=expected):
        build_on_meta(tmp_path)


def test_the_model_is_built_without_memory(model_dir: Path) -> None:
    model = build_on_meta(model_dir)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["inspect", "--help"], 0),
        (["verify", "--help"], 0),
        ([], 0),
        (["verify", "--x"], 2),
        (["x"], 2),
    ],
    ids=["help", "inspect help", "verify help", "nothing", "unknown option", "unknown verb"],
)
def test_help_and_wrong_usage_import_no_torch(argv: list[str], code: int) -> None:
    program = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); from qat.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("module", ["qat", "qat.cli"])
def test_the_module_can_be_run(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "inspect" in done.stdout
    assert done.stderr == ""


def test_convert_writes_and_verifies_and_refuses_what_would_change(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    qat.export(frozen_llama(weights="int8", target="transformers"), tmp_path / "a")
    code, out, _ = run(capsys, "convert", tmp_path / "a", tmp_path / "b", "--target", "compressed-tensors")
    assert code == 0
    assert "verified" in out
    code, out, err = run(capsys, "convert", tmp_path / "a", tmp_path / "c", "--target", "gguf-diffusers")
    assert (code, out) == (2, "")
    assert "error: model: target 'gguf-diffusers'" in err
    assert not (tmp_path / "c").exists()


VERBS = ("inspect", "calibrate", "train", "export", "verify", "convert", "push", "report", "compare")


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_each_verb_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = run(capsys, verb, "--help")
    assert code == 0
    assert f"Example: qat {verb} " in shown


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"qat {qat.__version__}\n", "")
