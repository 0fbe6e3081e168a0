"""The ``qat`` command.

``qat inspect MODEL`` says what a spec would do to a model, from its configuration alone. ``qat calibrate MODEL``
makes a quantized export of a float model, without training. ``qat verify DIRECTORY`` checks an export against its
evidence. ``qat convert DIRECTORY OUTPUT`` writes it for another target, where every value stays. ``qat push DIRECTORY
REPO`` uploads it. `qat.cli_runs` has the verbs about runs: train, export, report, compare. They print a table; inspect,
verify and compare print JSON with ``--json``. `qat.report.run_command` has the exit codes. Torch is imported when a
verb has work to do, so ``--help`` and a wrong option answer at once.
"""

from __future__ import annotations

import json as jsonlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo, StructTypeInfo

from qat import cli_runs
from qat.command_line import parsed, require_first
from qat.errors import CalibrationError, SpecError, UnjudgedError, VerifyError, meant, shown, told
from qat.report import quiet_libraries, require_text, run_command
from qat.spec import QuantSpec
from qat.strict_yaml import parse_yaml

if TYPE_CHECKING:
    from qat.inspection import InspectReport
    from qat.verification import VerifyReport

__all__ = ["main", "mapping_rule"]

_W8A8 = QuantSpec(activations="int8")
_HELP = ("-h", "--help", "--tyro-")
_TARGET: Literal["transformers"] = "transformers"
_DEFAULT: dict[str, Any] = {}
_Target = Literal["quanto", "transformers", "diffusers", "compressed-tensors", "gguf", "gguf-diffusers"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with ``argv``, by default the process's own arguments, and exit."""
    run_command(_main, argv)


def _main(words: list[str]) -> None:
    require_text(words)
    words = words or ["--help"]
    if words == ["--version"]:
        print(f"qat {version('qat')}")
        return
    verbs: dict[str, Callable[..., None]] = {
        "inspect": _inspect,
        "calibrate": _calibrate,
        "train": cli_runs.train,
        "export": cli_runs.export,
        "verify": _verify,
        "convert": _convert,
        "push": _push,
        "report": cli_runs.report,
        "compare": cli_runs.compare,
    }
    if words[0] == "train" and len(words) > 1 and words[1] not in _HELP:
        cli_runs.run_recipe(words[1:])  # with a command line of its own
        return
    if not words[0].startswith(_HELP):
        require_first("command", words, list(verbs), "qat")
    registry = ConstructorRegistry()
    registry.primitive_rule(mapping_rule)
    registry.struct_rule(_spec_rule)

    def parse(words: Sequence[str]) -> partial[None]:
        chosen: partial[None] = tyro.extras.subcommand_cli_from_dict(
            {name: _later(verb) for name, verb in verbs.items()},
            prog="qat",
            description="Quantization-aware training, from a float model to a verified export. --debug, anywhere on "
            "the command line, shows the traceback of an error.",
            args=words,
            config=(tyro.conf.PositionalMetavarFromFieldName,),
            registry=registry,
        )
        return chosen

    parsed(parse, words, "qat", words[0] if words[0] in verbs else "")()


def _later(verb: Callable[..., None]) -> Callable[..., partial[None]]:
    """What tyro calls in place of a verb: what the verb says while it works is none of tyro's."""

    @wraps(verb)
    def call(*values: Any, **named: Any) -> partial[None]:
        return partial(verb, *values, **named)

    return call


def _inspect(
    model: str,
    /,
    spec: Annotated[QuantSpec, tyro.conf.OmitArgPrefixes],
    target: _Target | None = None,
    full: bool = False,
    json: bool = False,
) -> None:
    """Show what a spec would quantize in a model, without reading its weights.

    Example: qat inspect Qwen/Qwen3-8B --weights int4

    Args:
        model: A model's or a pipeline's directory, or a hub's name; only its config.json is read.
        spec: What to quantize.
        target: Who will load the export; none: transformers; of a pipeline diffusers, or quanto
            with quantized activations.
        full: Print a line for each layer, also for layers that differ only by the numbers in their names.
        json: Print JSON instead of a table.
    """
    made = QuantSpec(**dict(spec))  # which is a mapping, by `_spec_rule`
    from qat.hosts import host_of
    from qat.hosts.configurations import build_on_meta, source_directory
    from qat.inspection import inspect

    source_directory(model)
    quiet_libraries()  # which imports them, in seconds: mistakes are told before
    built = build_on_meta(model)
    if target is None and host_of(built).name == "diffusers":
        target = "quanto" if made.activation_type else "diffusers"  # whose loader has no activations
    report = inspect(built, made, target=target or _TARGET)
    if full and not json:
        print(report.table())
    else:
        _show(report, json)


def _calibrate(
    model: str,
    /,
    data: tuple[Path, ...],
    output: Path,
    spec: Annotated[QuantSpec, tyro.conf.OmitArgPrefixes] = _W8A8,
    target: Literal["quanto", "transformers", "compressed-tensors"] = _TARGET,
    algorithm: dict[str, Any] = _DEFAULT,
    observer: dict[str, Any] = _DEFAULT,
    batches: int = 16,
    batch_size: int = 8,
    length: int = 256,
    text_field: str = "text",
    fold: bool = False,
    table: bool = False,
    device: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Make a verified export with quantized activations from a float model of transformers, without training.

    Example: qat calibrate Qwen/Qwen3-0.6B --data my-texts/ --output my-w8a8

    Args:
        model: A directory, or a hub's name, of a model for texts or images, with its tokenizer or image processor.
        data: Files or folders: texts (.txt, .csv, .jsonl, .json, .parquet or any text) or images, as the model takes.
        output: The directory to write.
        spec: What to quantize.
        target: Who will load the export.
        algorithm: How scales of weights are found, as kind=learned_affine start=best; none: automatic.
        observer: The rule for scales of activations, as kind=percentile percentile=99.9; none: best.
        batches: Batches to calibrate on; fewer where there is less data. A quarter more is held out to compare.
        batch_size: Texts or images of a batch.
        length: Tokens of a text; never more than the model takes.
        text_field: The column that holds the texts, in tables.
        fold: Move outlying channels' scale into weights first, wherever that lowers the error of outputs.
        table: Print a line for each layer too.
        device: Where to calibrate; none: a GPU if there is one.
        overwrite: Replace an older export.
        trust_remote_code: Run code that comes with the model.
    """
    made = QuantSpec(**dict(spec))
    if missing := [str(path) for path in data if not os.path.exists(path)]:  # of os, to whom no name is too long
        raise CalibrationError(f"data: {shown(missing[0])} does not exist: name files or folders that do")
    if min(numbers := (batches, batch_size, length)) < 1 or max(numbers) >= 2**31:
        raise CalibrationError(
            f"batches, batch_size and length: must each be at least 1 and below 2**31, got {numbers}"
        )
    import torch

    from qat.agreement import agreement, answers, held_out
    from qat.calibration import calibrate
    from qat.data import image_batches, text_batches
    from qat.exporting import export
    from qat.files.directory import check_destination
    from qat.folding import fold_outliers
    from qat.freezing import freeze
    from qat.hosts import get_target, host_of
    from qat.hosts.pretrained import check_folder, load_float
    from qat.observers import ObserverChoice
    from qat.preparation import prepare
    from qat.quantizers import AnyAlgorithm
    from qat.verification import verify

    choices = {
        "algorithm": _chosen("algorithm", algorithm, AnyAlgorithm),
        "observer": _chosen("observer", observer, ObserverChoice),
    }
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=where).item()
    except Exception as error:  # of each device its own
        raise CalibrationError(f"device: {where!r} cannot compute here: {told(error)}: name another") from error
    get_target(target).check_types(made)
    check_destination(output, overwrite, "output")
    check_folder(model, "MODEL")
    quiet_libraries()
    loaded: Any
    loaded, processor = load_float(model, trust_remote_code=trust_remote_code)
    if loaded.main_input_name == "pixel_values":
        mode = "L" if getattr(loaded.config, "num_channels", 3) == 1 else "RGB"
        inputs = image_batches(data, processor, count=batches + max(1, batches // 4), size=batch_size, mode=mode)
    else:
        positions = getattr(loaded.config, "max_position_embeddings", None) or length
        length = min(length, positions, processor.model_max_length)
        packed = host_of(loaded).is_language_model(type(loaded))
        inputs = text_batches(
            data,
            processor,
            count=batches + max(1, batches // 4),
            size=batch_size,
            length=length,
            packed=packed,
            field=text_field,
        )
    inputs, others = held_out(inputs, batches)
    loaded.to(where)
    wanted = [found._replace(values=found.values.cpu()) for found in answers(loaded, others)]
    if fold:
        print(fold_outliers(loaded, inputs, spec=made, target=target))
    prepare(loaded, made, target=target, **choices)
    report = calibrate(loaded, inputs, progress=True)
    freeze(loaded, progress=True)
    cost = agreement(loaded, others, wanted)
    example = {key: value[:1] for key, value in inputs[0].items()}
    export(loaded, output, processor=processor, example_inputs=example, overwrite=overwrite, progress=True)
    if table:
        print(report.table())
    print(report)
    print(verify(output, loaded))
    print(cost if others else "not compared with the float model: there is one batch of data, and none to hold out")
    print(f"load it with qat.load({str(output)!r}), or as {str(output / 'README.md')!r} shows")


def _chosen(option: str, values: dict[str, Any], choices: Any) -> Any:
    """The member of a union that ``kind`` names, made of the other values; None without any."""
    kinds = {choice.model_fields["kind"].default: choice for choice in get_args(get_args(choices)[0])}
    kind = values.get("kind")
    if values and (not isinstance(kind, str) or kind not in kinds):
        raise SpecError(
            f"{option}: kind must be one of {', '.join(kinds)}, got {kind!r}: write --{option} kind=NAME"
            f"{meant(kind, kinds)}"
        )
    return kinds[kind](**values) if values else None


def _verify(directory: Path, /, json: bool = False) -> None:
    """Check an exported directory, in a fresh process, with its target's own loader.

    Example: qat verify outputs/causal_lm/int4

    Args:
        directory: What `qat.export` wrote.
        json: Print JSON instead of a table.
    """
    from qat.untrusted import read_trusted
    from qat.verification import verify

    read_trusted(directory)
    quiet_libraries()
    try:
        _show(verify(directory), json)
    except VerifyError as error:
        if (failed := getattr(error, "report", None)) is None:
            raise
        _show(failed, json)
        checks = ", ".join(check.name for check in failed.checks if not check.passed)
        raise VerifyError(f"{str(directory)!r} is not what was frozen; failed: {checks}") from None


def _convert(directory: Path, output: Path, /, target: _Target, overwrite: bool = False) -> None:
    """Write an exported directory for another target, where every value stays the same, and verify it.

    Example: qat convert my-int8 my-gguf --target gguf

    Args:
        directory: What `qat.export` wrote.
        output: The directory to write.
        target: Who will load it.
        overwrite: Replace an older export.
    """
    from qat.conversion import convert
    from qat.untrusted import read_trusted
    from qat.verification import verify

    read_trusted(directory)
    quiet_libraries()
    print(convert(directory, output, target=target, overwrite=overwrite, progress=True))
    print(verify(output))


def _push(
    directory: Path,
    repo: str,
    /,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload an export of qat",
    verify: bool = True,
) -> None:
    """Verify an exported directory, and upload it to the hub with the token of HF_TOKEN or of hf auth login.

    Example: qat push outputs/causal_lm/int4 OWNER/NAME

    Args:
        directory: What `qat.export` wrote.
        repo: The repository, as owner/name, or name in your own account; it is made where there is none.
        private: Whether a new repository is private; none: as the account has it.
        revision: The branch; none: the main one.
        message: What the commit says.
        verify: Whether to load it and compare; without, only hashes are compared, and the uploaded card says that.
    """
    from qat.hub import push_to_hub
    from qat.untrusted import read_trusted

    read_trusted(directory)
    quiet_libraries()
    options: dict[str, Any] = {"private": private, "revision": revision, "commit_message": message, "verify": verify}
    try:
        print(push_to_hub(directory, repo, **options))
    except UnjudgedError as error:
        raise UnjudgedError(f"{error}; or qat push --no-verify, which compares hashes alone") from None


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
            return {word[: word.index("=", 1)]: parse_yaml(word[word.index("=", 1) + 1 :]) for word in words}
        except ValueError:
            raise ValueError(f"expected KEY=VALUE words with values in YAML, got {shown(' '.join(words))}") from None

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[KEY=VALUE ...]",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{key}={item}" for key, item in value.items()],
    )


if __name__ == "__main__":
    main()
