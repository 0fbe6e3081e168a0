"""The ``qat`` command: the verbs that need no training code.

``qat inspect MODEL_DIR`` says what a spec would do to a model, from its configuration alone; ``qat verify DIR`` checks
an exported directory against its evidence. Tables at the terminal, ``--json`` for programs. Exit codes: 0; 1 when a
verification failed; 2 for a user's mistake, told in one line; 141 when whoever read the output has left. Torch is
imported when a verb has work to do, so ``--help`` and a wrong option answer at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict

from qat.config import parse_arguments, validate
from qat.errors import LoadError, VerifyError
from qat.report import inspect_table, print_table, quiet_libraries, run_command, verify_table
from qat.spec import QuantSpec

if TYPE_CHECKING:
    from torch import nn

    from qat.verification import VerifyReport

__all__ = ["build_on_meta", "main"]


class Inspect(BaseModel):
    """Show what a spec would quantize in a model, without reading its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verb: Literal["inspect"] = "inspect"
    """Names the command."""
    model_dir: Annotated[Path, tyro.conf.Positional]
    """A model's or a pipeline's directory; only its config.json is read."""
    spec: Annotated[QuantSpec, tyro.conf.OmitArgPrefixes] = QuantSpec()
    """What to quantize."""
    target: Literal["quanto", "transformers", "diffusers"] = "quanto"
    """Who will load the export."""
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON instead of a table."""


class Verify(BaseModel):
    """Check an exported directory, in a fresh process, with its target's own loader."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verb: Literal["verify"] = "verify"
    """Names the command."""
    directory: Annotated[Path, tyro.conf.Positional]
    """What `qat.export` wrote."""
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON instead of a table."""


_FORM = Annotated[Inspect, tyro.conf.subcommand("inspect")] | Annotated[Verify, tyro.conf.subcommand("verify")]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with ``argv``, by default the process's own arguments, and exit."""
    run_command(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> None:
    values = parse_arguments(_FORM, argv or ["--help"], "Quantization-aware training: inspect and verify.", prog="qat")
    form, verb = _VERBS[values["verb"]]
    verb(validate(form, values, "command line"))


def _inspect(arguments: Inspect) -> None:
    from qat.inspection import inspect

    quiet_libraries()
    report = inspect(build_on_meta(arguments.model_dir), arguments.spec, target=arguments.target)
    if arguments.json_:
        print(json.dumps(report.to_json(), indent=1))
    else:
        print_table(inspect_table(report))


def _verify(arguments: Verify) -> None:
    from qat.verification import verify

    quiet_libraries()
    try:
        report = verify(arguments.directory)
    except VerifyError as error:
        if (failed := getattr(error, "report", None)) is None:
            raise
        _show(failed, arguments.json_)
        checks = ", ".join(check.name for check in failed.checks if not check.passed)
        raise VerifyError(f"{str(arguments.directory)!r} is not what was frozen; failed: {checks}") from None
    _show(report, arguments.json_)


def _show(report: VerifyReport, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        print_table(verify_table(report))


_VERBS: dict[str, tuple[type[BaseModel], Callable[[Any], None]]] = {
    "inspect": (Inspect, _inspect),
    "verify": (Verify, _verify),
}


def build_on_meta(directory: Path) -> nn.Module:
    """Build the model of a directory without memory for its weights: names, shapes and ties.

    Args:
        directory: holds a ``config.json`` of transformers, whose first architecture is built, else the base model; or
            one of diffusers; or a pipeline of diffusers, whose transformer is built.

    Raises:
        LoadError: there is no such configuration, or its library cannot build it.
    """
    if not directory.is_dir():
        raise LoadError(f"MODEL_DIR: {str(directory)!r} is not a directory; give one that holds a model's config.json")
    if (directory / "model_index.json").is_file():
        directory /= "transformer"
    path = directory / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        kind, architectures = fields.get("_class_name"), fields.get("architectures") or []
    except FileNotFoundError:
        raise LoadError(f"MODEL_DIR: {str(directory)!r} has no config.json; give a model's directory") from None
    except (OSError, ValueError, AttributeError) as error:
        raise LoadError(f"MODEL_DIR: {str(path)!r} is not a model's configuration: {error}") from error
    library = "transformers" if kind is None else "diffusers"
    try:
        return _of_transformers(directory, architectures) if kind is None else _of_diffusers(directory, kind)
    except Exception as error:  # a configuration can be wrong in as many ways as there are models
        message = " ".join(str(error).split()) or type(error).__name__
        raise LoadError(f"MODEL_DIR: {library} cannot build the model of {str(path)!r}: {message}") from error


def _of_transformers(directory: Path, architectures: list[str]) -> nn.Module:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    kind = getattr(transformers, architectures[0], None) if architectures else None
    with torch.device("meta"):
        build: Any = transformers.AutoModel.from_config if kind is None else kind
        model: nn.Module = build(config)
    return model


def _of_diffusers(directory: Path, name: str) -> nn.Module:
    import diffusers
    import torch

    from qat.hosts.diffusers import DIFFUSERS

    kind = getattr(diffusers, name)
    return DIFFUSERS.build(kind, kind.load_config(directory), torch.float32, empty=True)


if __name__ == "__main__":
    main()
