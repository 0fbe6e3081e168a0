"""`qat calibrate`: a float model and some files in, a verified export out, on the bundled models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import qat
from qat.agreement import Agreement, agreement
from qat.cli import main
from qat.files.evidence import is_frozen
from qat.files.manifest import read_manifest
from qat.preparation import prepare

RECIPES = Path(__file__).parents[1] / "recipes"
CODE = "import os\n\n\ndef add(a, b):\n    return a + b\n\n\nfor name in os.listdir():\n    print(name, add(1, 2))\n"


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["calibrate", *(str(word) for word in argv)])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "code.py").write_text(CODE * 8)
    for number in range(6):
        picture = torch.rand(28, 28, 3, generator=torch.Generator().manual_seed(number)).mul(255).byte()
        Image.fromarray(picture.numpy()).save(tmp_path / "data" / f"{number}.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("model", "options", "layers"),
    [
        ("reference", ["--length", "24", "--batch-size", "1", "--table"], 42),
        ("reference_encoder", ["--target", "quanto", "--activations", "float8", "--exclude", "classifier"], 19),
        ("reference_vit", ["--dtype", "float32", "--batch-size", "2", "--fold"], 25),
    ],
    ids=["language model", "encoder", "vision transformer"],
)
def test_a_model_and_some_files_give_a_verified_export(
    model: str, options: list[str], layers: int, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    given = ["--data", data, "--output", output, "--batches", "2", "--device", "cpu"]
    code, out, err = run(capsys, RECIPES / model, *given, *options)
    assert code == 0, err
    assert "error" not in err
    lines = out.splitlines()
    assert lines[0].startswith("folded ") is ("--fold" in options)
    lines = lines["--fold" in options :]
    assert lines[0].startswith("layer ") is ("--table" in options)
    assert f"calibrated {layers} layers on {1 if model == 'reference_encoder' else 2} batches" in out
    assert f"{output} (target 'transformers'): verified" in out or "(target 'quanto'): verified" in out
    assert "outputs            ok      1 output tensors equal, bit for bit" in out
    assert lines[-2].startswith(
        "not compared"
        if model == "reference_encoder"
        else "against the float model on 1 held-out batches: KL 0.0"  # nats
    )
    assert lines[-1] == f"load it with qat.load('{output}'), or as '{output / 'README.md'}' shows"
    manifest = read_manifest(output)
    assert manifest.frozen.spec.activations == ("float8" if "float8" in options else "int8")
    assert manifest.dtype == ("float32" if "float32" in options else "bfloat16")
    assert {"tokenizer.json", "preprocessor_config.json"} & {path.name for path in output.iterdir()}
    assert type(qat.load(output)).__module__.startswith("transformers")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("reference_vit", ["--data", "nowhere"], "error: data: 'nowhere' does not exist"),
        ("reference_vit", ["--data", "{tmp}"], "error: data: there is no image in"),
        ("reference_encoder", ["--data", "{tmp}"], "error: data: there is no text in"),
        ("reference_encoder", ["--data", "{tmp}", "--batches", "0"], "must each be at least 1 and below 2**31, got (0"),
        ("reference_encoder", ["--data", "{data}", "--exclude", "*.x"], "error: exclude: pattern '*.x' matches no"),
        ("reference_flux", ["--data", "{data}"], "is a pipeline of diffusers"),
        (
            "reference_vit",
            ["--data", "{data}", "--algorithm", "start=best"],
            "error: algorithm: kind must be one of automatic, straight_through, learned_affine, "
            "stretched_elastic, dual_lsq, learned_clipping, got None: write --algorithm kind=NAME",
        ),
        (
            "reference_vit",
            ["--data", "{data}", "--observer", "kind=percentile", "percentile=101"],
            "error: Percentile: percentile: Input should be less than or equal to 100, got 101",
        ),
    ],
    ids=["missing", "no image", "no text", "batches", "pattern", "pipeline", "algorithm", "observer"],
)
def test_a_users_mistake_is_one_line_and_code_2(
    model: str, options: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    words = [word.format(tmp=tmp_path / "empty", data=data) for word in options]
    code, out, err = run(capsys, RECIPES / model, "--output", tmp_path / "out", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_cost_is_that_of_the_frozen_model(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def watched(model: torch.nn.Module, *arguments: Any) -> Agreement:
        assert is_frozen(model)
        assert next(model.parameters()).dtype is torch.bfloat16  # as it is served
        return agreement(model, *arguments)

    monkeypatch.setattr("qat.agreement.agreement", watched)
    given = ["--data", data, "--output", tmp_path / "out", "--batches", "1", "--batch-size", "2", "--device", "cpu"]
    code, out, err = run(capsys, RECIPES / "reference_vit", *given)
    assert code == 0, err
    assert "against the float model on 1 held-out batches: KL 0.0" in out


def test_an_algorithm_and_a_rule_are_chosen(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules: list[object] = []

    def watched(model: torch.nn.Module, spec: qat.QuantSpec, **arguments: Any) -> Any:
        rules.append(arguments["observer"])
        return prepare(model, spec, **arguments)

    monkeypatch.setattr("qat.preparation.prepare", watched)
    given = ["--data", data, "--output", tmp_path / "out", "--batches", "1", "--batch-size", "2", "--device", "cpu"]
    chosen = ["--algorithm", "kind=learned_affine", "start=gptq", "--observer", "kind=percentile", "percentile=99"]
    code, out, err = run(capsys, RECIPES / "reference_vit", *given, *chosen, "--weights", "int4")
    assert code == 0, err
    assert "starts of weights: 25 gptq; calibrated 25 layers on 1 batches" in out
    assert rules == [qat.Percentile(percentile=99)]
    assert "learned_affine" in read_manifest(tmp_path / "out").frozen.algorithm


def test_an_output_that_exists_is_refused_before_any_work(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "no/such/model", "--data", data, "--output", data)
    assert code == 2
    assert "is not empty" in err
