from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from qat.errors import QatError
from qat.spec import LayerSpec, QuantSpec, WeightType
from recipes.common.config import (
    ConfigError,
    load_config,
    read_yaml,
)
from recipes.common.settings import OptimizationSettings
from tests.helpers import one_of


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Absmax(Strict):
    kind: Literal["absmax"] = "absmax"


class Learned(Strict):
    """Scales are learned."""

    kind: Literal["learned"] = "learned"
    scale_lr: float = Field(default=0.1, gt=0)
    """Learning rate of the scales."""


class Config(Strict):
    """A configuration with every kind of field that recipes have."""

    spec: QuantSpec = QuantSpec()
    """What is quantized."""
    algorithm: Annotated[Absmax | Learned, Field(discriminator="kind")] = Absmax()
    """How scales are found."""
    steps: int = Field(default=10, ge=1)
    """Optimizer steps."""
    rate: float = Field(default=1e-3, gt=0)
    """Learning rate."""
    compile: bool = False
    """Compile the model."""
    output: Path = Path("outputs")
    """Where to."""
    devices: int | str = "auto"
    """How many devices."""
    cache: Path | None = None
    """Where to keep what was made."""


def load(*argv: str | Path) -> Config:
    return load_config(Config, [str(word) for word in argv], "A test.", prog="python -m test")


def refused(*argv: str | Path, model: Any = Config) -> str:
    """What a wrong command line is told."""
    with pytest.raises(QatError) as caught:
        load_config(model, [str(word) for word in argv], "A test.")
    return str(caught.value)


def faults(*argv: str | Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    return [line.strip() for line in str(caught.value).splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def test_defaults() -> None:
    assert load() == Config()


def test_a_file_beats_the_defaults_and_the_command_line_beats_the_file(file: Any) -> None:
    path = file("steps: 20\nrate: 1e-2\nspec: {weights: int4, exclude: [a, b]}\n")
    config = load(path, "--rate", "0.5", "--spec.activations", "int8", "--compile")
    spec = QuantSpec(weights="int4", activations="int8", exclude=("a", "b"))
    assert config == Config(spec=spec, steps=20, rate=0.5, compile=True)


class Recipe(Strict):
    """A configuration whose sections have other defaults than their classes."""

    spec: QuantSpec = QuantSpec(weights="int4", overrides={"a": "int8"}, exclude=("b",))
    """What is quantized."""
    algorithm: Annotated[Absmax | Learned, Field(discriminator="kind")] = Learned(scale_lr=0.7)
    """How scales are found."""
    optimization: OptimizationSettings = OptimizationSettings(batch_size=32, weight_decay=0.1)
    """How long and how fast."""


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        (
            "optimization: {steps: 200}",
            {"optimization": OptimizationSettings(steps=200, batch_size=32, weight_decay=0.1)},
        ),
        (
            "spec: {activations: int8, overrides: {c: float}}",
            {"spec": QuantSpec(weights="int4", activations="int8", overrides={"c": "float"}, exclude=("b",))},
        ),
        ("algorithm: {kind: absmax}", {"algorithm": Absmax()}),
        ("algorithm: {kind: learned}", {"algorithm": Learned(scale_lr=0.7)}),
    ],
    ids=["one field", "a mapping is replaced", "another kind", "the same kind"],
)
def test_a_part_of_a_section_keeps_the_rest(text: str, changed: dict[str, Any], file: Any) -> None:
    assert load_config(Recipe, [str(file(text))], "A test.") == Recipe(**changed)


def test_another_kind_has_nothing_of_the_one_before(file: Any) -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.scale_lr: unknown key"):
        load_config(Recipe, [str(file("algorithm: {kind: absmax, scale_lr: 1}"))], "A test.")


@pytest.mark.parametrize("text", ["", "{}", "# nothing\n"], ids=["empty", "empty mapping", "comment"])
def test_an_empty_file_changes_nothing(text: str, file: Any) -> None:
    assert load(file(text)) == Config()


def test_flags_can_be_turned_off(file: Any) -> None:
    assert load(file("compile: true"), "--no-compile").compile is False


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["*.down_proj=int8"], {"*.down_proj": "int8"}),
        (["a=float", "b=int2"], {"a": "float", "b": "int2"}),
        (["*={weights: int8, activations: int8}"], {"*": LayerSpec(weights="int8", activations="int8")}),
        ([], {}),
    ],
    ids=["pattern", "two", "layer spec", "none"],
)
def test_mappings_on_the_command_line(words: list[str], expected: dict[str, Any], file: Any) -> None:
    path = file("spec: {overrides: {'*.x': {weights: int4}}}")
    assert load(path).spec.overrides == {"*.x": LayerSpec(weights="int4")}
    assert load(path, "--spec.overrides", *words).spec.overrides == expected


@pytest.mark.parametrize("word", ["a", "a={weights:"])
def test_a_malformed_mapping_is_an_error(word: str) -> None:
    told = refused("--spec.overrides", word)
    assert f"--spec.overrides: expected KEY=VALUE words with values in YAML, got {word!r}" in told


@pytest.mark.parametrize(
    ("yaml", "argv", "expected"),
    [
        ("algorithm: {kind: learned, scale_lr: 0.5}", [], Learned(scale_lr=0.5)),
        ("algorithm: {kind: learned, scale_lr: 0.5}", ["--algorithm.scale-lr", "2"], Learned(scale_lr=2)),
        ("algorithm: {kind: learned, scale_lr: 0.5}", ["algorithm:absmax"], Absmax()),
        ("steps: 3", ["algorithm:learned", "--algorithm.scale-lr", "3"], Learned(scale_lr=3)),
    ],
    ids=["from the file", "one field changed", "another kind", "kind and field"],
)
def test_unions_are_told_apart_by_kind(yaml: str, argv: list[str], expected: BaseModel, file: Any) -> None:
    assert load(file(yaml), *argv).algorithm == expected


def test_each_fault_of_a_file_has_a_line(file: Any) -> None:
    path = file(
        """
        spec: {weights: int3, wieghts: int8, overrides: {"*.a": {activations: int8}, "*.b": {weights: int8, weight: 1}}}
        algorithm: {kind: learned, scale_lr: -1, scale_rl: 0.9}
        steps: many
        devices: [1]
        """
    )
    assert faults(path) == [
        f"{path}: spec.weights: Input should be {one_of(*get_args(WeightType))}, got 'int3'",
        "spec.overrides.*.a: key 'weights' is required",
        "spec.overrides.*.b.weight: unknown key; did you mean 'weights'?",
        "spec.wieghts: unknown key; did you mean 'weights'?",
        "algorithm.scale_lr: Input should be greater than 0, got -1",
        "algorithm.scale_rl: unknown key; did you mean 'scale_lr'?",
        "steps: Input should be a valid integer, unable to parse string as an integer, got 'many'",
        "devices: Input should be a valid integer; or Input should be a valid string, got [1]",
    ]


def test_an_unknown_key_that_is_like_no_other_names_those_known(file: Any) -> None:
    assert faults(file("spec: {x: 1}"))[0].endswith(
        "spec.x: unknown key; known keys: weights, activations, dtype, include, exclude, overrides, quantize_outputs"
    )


def test_each_broken_rule_of_a_command_line_has_a_line() -> None:
    first, *rest = faults("--steps", "0", "algorithm:learned", "--algorithm.scale-lr", "-1", "--spec.overrides", "a=b")
    assert first == (
        f"command line: spec.overrides.a: Input should be {one_of(*get_args(WeightType), 'float')}, got 'b'"
    )
    assert rest == [
        "algorithm.scale_lr: Input should be greater than 0, got -1.0",
        "steps: Input should be greater than or equal to 1, got 0",
    ]


def test_one_fault_is_one_line(file: Any) -> None:
    path = file("steps: 0")
    assert faults(path) == [f"{path}: steps: Input should be greater than or equal to 1, got 0"]


def test_an_unknown_kind_names_those_known(file: Any) -> None:
    (fault,) = faults(file("algorithm: {kind: magic}"))
    assert "algorithm: " in fault
    assert "'absmax', 'learned'" in fault


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--step", "3"], "'--step': there is no such option (did you mean --steps?)"),
        (["--steps", "x"], "--steps"),
        (["--spec.weights", "int3"], "--spec.weights: must be one of int8, "),
        (["other.json"], "'other.json': one word too many, leave it out"),
    ],
    ids=["unknown option", "wrong type", "wrong choice", "not a configuration file"],
)
def test_wrong_usage_is_one_error(argv: list[str], expected: str) -> None:
    assert expected in refused(*argv)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: 1\nsteps: 2\n", "key 'steps' is given twice"),
        ("spec: {weights: int4, weights: int8}", "key 'weights' is given twice"),
        ("- steps", "expected a mapping of keys to values at the top, got a list"),
        ("steps: [1", "not valid YAML"),
        ("rate: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
    ids=["repeated key", "repeated inner key", "a list", "syntax", "python object"],
)
def test_a_file_that_is_no_strict_yaml_is_an_error(text: str, expected: str, file: Any) -> None:
    (fault,) = faults(file(text))
    assert expected in fault
    assert "config.yaml" in fault


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    assert faults(tmp_path / "none.yml") == [
        f"{tmp_path / 'none.yml'}: the configuration file cannot be read: No such file or directory"
    ]


def test_a_file_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(tmp_path / "a.yaml")


def test_a_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    spec = QuantSpec(weights="int2", overrides={"*.x": LayerSpec(weights="int8", activations="int8"), "y": "float"})
    config = Config(spec=spec, algorithm=Learned(scale_lr=3e-5), cache=tmp_path, devices=2)
    path = tmp_path / "written.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))  # as export writes it
    assert load(path) == config


def test_help_shows_docstrings_and_the_values_of_the_file(file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(file("algorithm: {kind: learned, scale_lr: 0.625}"), "--help")
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Learning rate of the scales. (default: 0.625)" in shown
    assert "--algorithm.kind" not in shown


def test_a_configuration_error_is_a_value_error_of_ours() -> None:
    assert issubclass(ConfigError, QatError)
    assert issubclass(ConfigError, ValueError)


def test_reading_a_configuration_needs_no_torch() -> None:
    code = (
        "import sys; from recipes.common.config import load_config; from qat.spec import QuantSpec; "
        "load_config(QuantSpec, ['--weights', 'int4'], 'x'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
