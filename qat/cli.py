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

from qat.config import REGISTRY
from qat.errors import LoadError, VerifyError
from qat.remote_code import refuse_remote_code
from qat.report import inspect_table, print_table, quiet_libraries, run_command, verify_table
from qat.spec import QuantSpec

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

__all__ = ["build_on_meta", "main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with ``argv``, by default the process's own arguments, and exit."""
    run_command(lambda: _run((sys.argv[1:] if argv is None else argv) or ["--help"]))


def _run(arguments: Sequence[str]) -> None:
    tyro.extras.subcommand_cli_from_dict(
        {"inspect": _inspect, "verify": _verify},
        prog="qat",
        description="Quantization-aware training: inspect and verify.",
        args=arguments,
        config=(tyro.conf.PositionalMetavarFromFieldName,),
        registry=REGISTRY,
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
    checked = QuantSpec(**dict(spec))  # tyro makes a mapping of a model
    report = inspect(build_on_meta(model_dir), checked, target=target)
    _show(report.to_json(), inspect_table(report), json)


def _verify(directory: Path, /, json: bool = False) -> None:
    """Check an exported directory, in a fresh process, with its target's own loader.

    Args:
        directory: What `qat.export` wrote.
        json: Print JSON instead of a table.
    """
    from qat.verification import verify

    quiet_libraries()
    try:
        report = verify(directory)
    except VerifyError as error:
        if (failed := getattr(error, "report", None)) is None:
            raise
        _show(failed.to_json(), verify_table(failed), json)
        checks = ", ".join(check.name for check in failed.checks if not check.passed)
        raise VerifyError(f"{str(directory)!r} is not what was frozen; failed: {checks}") from None
    _show(report.to_json(), verify_table(report), json)


def _show(report: dict[str, Any], table: Table, as_json: bool) -> None:
    if as_json:
        print(jsonlib.dumps(report, indent=1))
    else:
        print_table(table)


def build_on_meta(directory: Path) -> nn.Module:
    """Build the model of a directory without memory for its weights: names, shapes and ties.

    Args:
        directory: holds a ``config.json`` of transformers, whose first architecture is built, else the base model; or
            one of diffusers; or a pipeline of diffusers, whose transformer is built.

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
    with torch.device("meta"):
        if model_class is None:
            from_config: Any = transformers.AutoModel.from_config
            return from_config(config, trust_remote_code=False)  # type: ignore[no-any-return]
        return model_class(config)  # type: ignore[no-any-return]


def _of_diffusers(directory: Path, name: str) -> nn.Module:
    import diffusers
    import torch

    from qat.hosts.diffusers import DIFFUSERS

    model_class = getattr(diffusers, name)
    return DIFFUSERS.build(model_class, model_class.load_config(directory), torch.float32, empty=True)


if __name__ == "__main__":
    main()
