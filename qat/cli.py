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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo, StructTypeInfo

from qat.errors import VerifyError
from qat.report import quiet_libraries, run_command
from qat.spec import QuantSpec

if TYPE_CHECKING:
    from qat.inspection import InspectReport
    from qat.verification import VerifyReport

__all__ = ["main", "mapping_rule"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with ``argv``, by default the process's own arguments, and exit."""
    registry = ConstructorRegistry()
    registry.primitive_rule(mapping_rule)
    registry.struct_rule(_spec_rule)
    run_command(
        lambda: tyro.extras.subcommand_cli_from_dict(
            {"inspect": _inspect, "verify": _verify},
            prog="qat",
            description="Quantization-aware training: inspect and verify.",
            args=(sys.argv[1:] if argv is None else argv) or ["--help"],
            config=(tyro.conf.PositionalMetavarFromFieldName,),
            registry=registry,
        )
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
    made = QuantSpec(**dict(spec))  # which is a mapping, by `_spec_rule`
    from qat.hosts import directories
    from qat.inspection import inspect

    quiet_libraries()
    _show(inspect(directories.build_on_meta(model_dir), made, target=target), json)


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


def _spec_rule(info: StructTypeInfo) -> Any:
    """Let tyro parse a spec into a mapping: before an error of the spec's own it would print a name of its own."""
    if info.type is not QuantSpec or _spec_rule in info.markers:
        return None
    own: Any = ConstructorRegistry.get_struct_spec(replace(info, markers=(*info.markers, _spec_rule)))
    return replace(own, instantiate=dict)


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


if __name__ == "__main__":
    main()
