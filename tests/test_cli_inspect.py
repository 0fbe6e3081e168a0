"""`qat inspect` of models and pipelines of diffusers, from their configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat.cli import main
from qat.errors import LoadError
from qat.hosts.configurations import build_on_meta
from tests.exports import small_flux


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    small_flux().save_config(tmp_path / "transformer")
    return tmp_path / "transformer"


def inspected(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, str | None]:
    with pytest.raises(SystemExit) as caught:
        main(["inspect", *argv, "--json"])
    assert not caught.value.code
    return {row["name"]: row["weights"] for row in json.loads(capsys.readouterr().out)["layers"]}


def test_a_model_directory(capsys: pytest.CaptureFixture[str], model_dir: Path) -> None:
    rows = inspected(capsys, str(model_dir), "--target", "diffusers", "--weights", "int4", "--exclude", "*.linear")
    assert len(rows) == 28
    assert {name for name, weights in rows.items() if weights is None} == {
        name for name in rows if name.endswith(".linear")
    }


def test_sensitive_layers_are_shown(capsys: pytest.CaptureFixture[str], model_dir: Path) -> None:
    rows = inspected(capsys, str(model_dir), "--activations", "int8")
    assert (rows["x_embedder"], rows["transformer_blocks.0.attn.to_q"]) == (None, "int8")


def test_a_pipeline_directory_is_its_transformer(model_dir: Path) -> None:
    (model_dir.parent / "model_index.json").write_text("{}")
    model = build_on_meta(model_dir.parent)
    assert type(model).__name__ == "FluxTransformer2DModel"
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model_index.json": "{}"}, r"transformer' has no config.json"),
        ({"config.json": '{"_class_name": "NoSuchModel"}'}, r"diffusers cannot build .*NoSuchModel"),
        ({"config.json": '{"_class_name": "FluxTransformer2DModel", "num_layers": "two"}'}, "diffusers cannot build"),
    ],
    ids=["no transformer", "no such class", "wrong value"],
)
def test_what_cannot_be_built(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(LoadError, match=message):
        build_on_meta(tmp_path)
