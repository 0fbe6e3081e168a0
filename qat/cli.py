"""The ``qat`` command: the verbs that need no training code.

``qat inspect MODEL_DIR`` says what a spec would do to a model, from its configuration alone. ``qat verify DIRECTORY``
checks an export against its evidence. Both print a table, or JSON with ``--json``. Exit codes: 0; 1 when a
verification failed; 2 for a user's mistake; 141 when whoever read the output has left. Torch is imported when a verb
has work to do, so ``--help`` and a wrong option answer at once.
"""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from qat.errors import LoadError, VerifyError
from qat.remote_code import refuse_remote_code
from qat.report import quiet_libraries, run_command
from qat.spec import QuantSpec

if TYPE_CHECKING:
    from torch import nn

    from qat.inspection import InspectReport
    from qat.verification import VerifyReport

__all__ = ["build_on_meta", "main", "mapping_rule"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with ``argv``, by default the process's own arguments, and exit."""
    run_command(lambda: _run((sys.argv[1:] if argv is None else argv) or ["--help"]))


def _run(arguments: Sequence[str]) -> None:
    registry = ConstructorRegistry()
    registry.primitive_rule(mapping_rule)
    tyro.extras.subcommand_cli_from_dict(
        {"inspect": _inspect, "verify": _verify},
        prog="qat",
        description="Quantization-aware training: inspect and verify.",
        args=arguments,
        config=(tyro.conf.PositionalMetavarFromFieldName,),
        registry=registry,
    )


def _inspect(
    model_dir: Path,
    /,
    spec: Annotated[QuantSpec, tyro.conf.OmitArgPrefixes],
    target: Literal["quanto", "transformers", "diffusers"] = "quanto",
    json: bool = False,
) -> None:
    """Show what a spec would quantize in a model, without reading its weights.

    Args:
        model_dir: A model's or a pipeline's directory; only its config.json is read.
        spec: What to quantize.
        target: Who will load the export.
        json: Print JSON instead of a table.
    """
    from qat.inspection import inspect

    quiet_libraries()
    _show(inspect(build_on_meta(model_dir), spec, target=target), json)


def _verify(directory: Path, /, json: bool = False) -> None:
    """Check an exported directory, in a fresh process, with its target's own loader.

    Args:
        directory: What `qat.export` wrote.
        json: Print JSON instead of a table.
    """
    from qat.verification import verify

    quiet_libraries()
    try:
        _show(verify(directory), json)
    except VerifyError as error:
        if (failed := getattr(error, "report", None)) is None:
            raise
        _show(failed, json)
        checks = ", ".join(check.name for check in failed.checks if not check.passed)
        raise VerifyError(f"{str(directory)!r} is not what was frozen; failed: {checks}") from None


def _show(report: InspectReport | VerifyReport, as_json: bool) -> None:
    print(jsonlib.dumps(report.to_json(), indent=1) if as_json else report)


def mapping_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[dict[str, Any]] | None:
    """Let tyro parse a mapping from ``KEY=VALUE`` words, each value as YAML."""
    if info.type_origin is not dict:
        return None

    def parse(words: list[str]) -> dict[str, Any]:
        try:
            return {word[: word.index("=")]: yaml.safe_load(word[word.index("=") + 1 :]) for word in words}
        except (ValueError, yaml.YAMLError):
            raise ValueError(f"expected KEY=VALUE words with values in YAML, got {' '.join(words)!r}") from None

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[KEY=VALUE ...]",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{key}={item}" for key, item in value.items()],
    )


def build_on_meta(directory: Path) -> nn.Module:
    """Build the model of a directory without memory for its weights: names, shapes and ties.

    Of transformers the first architecture in ``config.json`` is built, else the base model; of a pipeline of diffusers
    its transformer.

    Raises:
        LoadError: there is no such configuration, its library cannot build it, or only code in the directory can.
    """
    if not directory.is_dir():
        raise LoadError(f"MODEL_DIR: {str(directory)!r} is not a directory; give one that holds a model's config.json")
    if (directory / "model_index.json").is_file():
        directory /= "transformer"
    path = directory / "config.json"
    try:
        fields = jsonlib.loads(path.read_text(encoding="utf-8"))
        name, architectures = fields.get("_class_name"), fields.get("architectures") or []
    except FileNotFoundError:
        raise LoadError(f"MODEL_DIR: {str(directory)!r} has no config.json; give a model's directory") from None
    except (OSError, ValueError, AttributeError) as error:
        raise LoadError(f"MODEL_DIR: {str(path)!r} is not a model's configuration: {error}") from error
    refuse_remote_code(directory, "MODEL_DIR")
    library = "transformers" if name is None else "diffusers"
    try:
        return _of_transformers(directory, architectures) if name is None else _of_diffusers(directory, name)
    except Exception as error:  # a configuration can be wrong in as many ways as there are models
        message = " ".join(str(error).split()) or type(error).__name__
        raise LoadError(f"MODEL_DIR: {library} cannot build the model of {str(path)!r}: {message}") from error


def _of_transformers(directory: Path, architectures: list[str]) -> nn.Module:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    model_class: Any = getattr(transformers, architectures[0], None) if architectures else None
    base: Any = transformers.AutoModel
    with torch.device("meta"):
        return base.from_config(config, trust_remote_code=False) if model_class is None else model_class(config)  # type: ignore[no-any-return]


def _of_diffusers(directory: Path, name: str) -> nn.Module:
    import diffusers
    import torch

    from qat.hosts.diffusers import DIFFUSERS

    model_class = getattr(diffusers, name)
    return DIFFUSERS.build(model_class, model_class.load_config(directory), torch.float32, empty=True)


if __name__ == "__main__":
    main()
