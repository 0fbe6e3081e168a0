"""Configuration, read once at the edge into typed objects: default < YAML file < command line.

The models are pydantic's, frozen and without extra fields; `load_config` reads the optional first argument
``config.yaml`` over their defaults, hands the result to tyro as the defaults of the command line, and validates what
tyro parsed as a whole. So help texts, types and choices come from tyro, while every rule is stated once, in the
model, and every fault is reported with all the others in one `ConfigError`: where, which key, which rule, which value.

A union told apart by a ``kind`` field is chosen in YAML by its kind, and on the command line by a subcommand
(``algorithm:straight-through --algorithm.mask-saturated``); without one, the kind stays what the file made it.
Mappings are given on the command line as ``KEY=VALUE`` words: ``--spec.overrides '*.down_proj=int8' 'lm_head=float'``.
"""

from __future__ import annotations

import ast
import functools
import inspect
import io
import itertools
import json
import textwrap
from collections.abc import Hashable, Mapping, Sequence
from contextlib import redirect_stderr
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from qat.errors import QatError

__all__ = [
    "ConfigError",
    "OptimizationSettings",
    "TrainerSettings",
    "load_config",
    "parse_arguments",
    "read_yaml",
    "validate",
]

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(QatError, ValueError):
    """A configuration file or a command line is wrong; the message lists every fault."""


class OptimizationSettings(BaseModel):
    """How long and how fast a recipe trains; the float model that it compares with trains for the same steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=100, ge=1)
    """Optimizer steps of each training."""
    batch_size: int = Field(default=8, ge=1)
    """Examples a batch, on each device."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of quantization-aware training."""
    float_learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of the float fine-tuning that is compared with."""
    scale_learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of learned scales; none: a tenth of the weights'."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of the weights; scales never have any."""
    warmup_steps: int = Field(default=10, ge=0)
    """Steps in which the learning rate rises from 0 to its peak."""
    gradient_clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; none: no limit."""
    distillation_weight: float = Field(default=0.0, ge=0, le=1)
    """Share of the loss that is the divergence from a float teacher."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the distillation."""


class TrainerSettings(BaseModel):
    """On what and how a recipe trains; all but the last three are Lightning's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accelerator: str = "auto"
    """Lightning's accelerator: auto, cpu, gpu."""
    devices: int | str = 1
    """How many devices, or which."""
    strategy: str = "auto"
    """Lightning's strategy: auto, ddp and others."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] = "32-true"
    """Lightning's precision; master weights should be float32, so the mixed ones rather than the true ones."""
    accumulate_grad_batches: int = Field(default=1, ge=1)
    """Batches whose gradients are averaged for one optimizer step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile the model for training."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between the checkpoints of quantization-aware training, kept beside the output."""


def load_config(model: type[Model], argv: Sequence[str], description: str, *, prog: str | None = None) -> Model:
    """Read a configuration: the model's defaults, overridden by a YAML file, overridden by the command line.

    Args:
        model: the configuration's class; every field has a default.
        argv: the arguments after the program's name; the first may name a ``.yaml`` or ``.yml`` file.
        description: shown by ``--help``.
        prog: the program's name as a user types it.

    Raises:
        ConfigError: with all faults of the file, or of the command line, in one message.
        SystemExit: after ``--help``, with code 0.
    """
    arguments, default = list(argv), model()
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        path = Path(arguments.pop(0))
        default = validate(model, read_yaml(path), str(path))
    values = parse_arguments(model, arguments, description, prog=prog, default=default)
    return validate(model, values, "command line")


def parse_arguments(
    form: Any, argv: Sequence[str], description: str, *, prog: str | None = None, default: Any = None
) -> dict[str, Any]:
    """Parse a command line for a model, or a union of models, into a nested dict that is not yet validated.

    Args:
        form: a pydantic model, or a union of them annotated with ``tyro.conf.subcommand``.
        argv: the arguments after the program's name.
        description: shown by ``--help``.
        prog: the program's name as a user types it.
        default: an instance whose values are the defaults.

    Raises:
        ConfigError: an unknown option, a value of the wrong type.
        SystemExit: after ``--help``, with code 0.
    """
    errors = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with redirect_stderr(errors):
            values: dict[str, Any] = tyro.cli(
                form,
                args=list(argv),
                prog=prog,
                description=description,
                config=(tyro.conf.CascadeSubcommandArgs,),
                registry=_registry(),
                **options,
            )
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise ConfigError(_one_line(errors.getvalue())) from None
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file; a key given twice is an error, not a race.

    Raises:
        ConfigError: the file is missing, is no YAML, repeats a key or does not hold a mapping.
    """
    try:
        with path.open(encoding="utf-8") as file:
            values = yaml.load(file, Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(f"{path}: the configuration file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top, got a {type(values).__name__}")
    return values


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, which would keep the last of two equal keys, made to raise."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping after a look at its keys."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def validate(model: type[Model], values: Mapping[str, Any], source: str) -> Model:
    """Validate a nested mapping.

    Args:
        model: the configuration's class.
        values: what was read.
        source: where it was read, for the message.

    Raises:
        ConfigError: with all faults: key path, rule and value of each.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        rules: dict[str, list[str]] = {}
        received: dict[str, str] = {}
        for fault in error.errors(include_url=False):
            path, rule = _fault(dict(fault), model)
            rules.setdefault(path, []).append(rule)
            if fault["type"] != "extra_forbidden" and not isinstance(fault["input"], Mapping | BaseModel):
                received[path] = f", got {fault['input']!r}"
        for path in [path for path in rules if any(other.startswith(f"{path}.") for other in rules)]:
            del rules[path]  # a fault further in says more: the other members of the union were never meant
        joined = {path: "; or ".join(dict.fromkeys(found)) for path, found in rules.items()}
        faults = [f"{path}: {rule}{received.get(path, '')}" for path, rule in joined.items()]
        if len(faults) == 1:
            raise ConfigError(f"{source}: {faults[0]}") from None
        raise ConfigError("\n  ".join([f"{source}: {len(faults)} faults", *faults])) from None


def _fault(fault: dict[str, Any], model: type[BaseModel]) -> tuple[str, str]:
    """The key path and the rule of one fault, with a remedy for a misspelt key.

    Pydantic's location also names the members of unions that it tried; only what the user could have written is kept.
    """
    keys: list[str] = []
    here: list[Any] = [model]
    for position, part in enumerate(fault["loc"]):
        unknown_key = position == len(fault["loc"]) - 1 and fault["type"] == "extra_forbidden"
        owners = [kind for kind in here if _is_model(kind) and part in kind.model_fields]
        items = [argument for kind in here if get_origin(kind) in (dict, list, tuple) for argument in get_args(kind)]
        tagged = [kind for kind in here if part in _constants(kind).values() or _label(kind) == str(part).split("[")[0]]
        if owners:
            here = _members([kind.model_fields[part].annotation for kind in owners])
        elif tagged and not unknown_key and len(here) > 1:
            here = tagged
            continue
        elif items:
            here = _members(items)
        elif not unknown_key:
            continue
        keys.append(str(part))
    path = ".".join(keys) or "the configuration"
    if fault["type"] == "extra_forbidden":
        known = [name for kind in here if _is_model(kind) for name in kind.model_fields]
        close = get_close_matches(keys[-1], known, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return path, f"unknown key; {remedy}"
    rule = str(fault["msg"]).removeprefix("Value error, ")
    return path, f"i{rule[1:]}" if rule.startswith("Input") else rule


def _label(kind: Any) -> str:
    """What pydantic calls a member of a union, without its parameters."""
    return str(getattr(get_origin(kind) or kind, "__name__", kind)).lower() if not _is_model(kind) else kind.__name__


def _is_model(kind: Any) -> TypeGuard[type[BaseModel]]:
    return inspect.isclass(kind) and issubclass(kind, BaseModel)


def _members(annotations: Sequence[Any]) -> list[Any]:
    """The annotations, with unions replaced by what they join."""
    found: list[Any] = []
    for annotation in annotations:
        union = get_origin(annotation) in (Union, UnionType, Annotated)
        found += _members(get_args(annotation)) if union else [annotation]
    return found


def _one_line(box: str) -> str:
    """Tyro's framed message as plain text, without the frame, the title and what only repeats the help."""
    sections: list[str] = [""]
    for row in box.splitlines()[1:-1]:
        text = row.strip("│ ")
        if text and not text.strip("─"):
            sections.append("")
        else:
            sections[-1] = f"{sections[-1]} {text}".strip()
    wanted = [text for text in sections if text and not text.startswith(("Argument helptext", "Available subcommands"))]
    return ". ".join(text.rstrip(".") for text in wanted)


def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()
    registry.struct_rule(_model_rule)
    registry.primitive_rule(_mapping_rule)
    return registry


def _model_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Parse a pydantic model into a plain dict: validation comes once, for the whole, and finds all faults."""
    model = info.type
    if not _is_model(model):
        return None
    constants, documented, fields = _constants(model), _field_docstrings(model), []
    for name, field in model.model_fields.items():
        if name in constants:
            continue
        if isinstance(info.default, model):
            default = getattr(info.default, name)
        else:
            default = tyro.MISSING_NONPROP if field.is_required() else field.get_default(call_default_factory=True)
        kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        fields.append(StructFieldSpec(name=name, type=kind, default=default, helptext=documented.get(name)))

    def collect(**values: Any) -> dict[str, Any]:
        return {**constants, **values}

    collect.__doc__ = model.__doc__  # what --help shows above the group
    return StructConstructorSpec(instantiate=collect, fields=tuple(fields))


def _mapping_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[dict[str, Any]] | None:
    """Parse a mapping from ``KEY=VALUE`` words, each value read as YAML."""
    if info.type_origin is not dict:
        return None

    def parse(words: list[str]) -> dict[str, Any]:
        values = {}
        for word in words:
            key, equals, value = word.partition("=")
            if not equals:
                raise ValueError(f"expected KEY=VALUE, got {word!r}")
            try:
                values[key] = yaml.safe_load(value)
            except yaml.YAMLError:
                raise ValueError(f"expected KEY=VALUE with a value in YAML, got {word!r}") from None
        return values

    def show(value: dict[str, Any]) -> list[str]:
        models = {key: json.dumps(item.model_dump()) for key, item in value.items() if isinstance(item, BaseModel)}
        return [f"{key}={item}" for key, item in {**value, **models}.items()]

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[KEY=VALUE ...]",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=show,
    )


def _constants(model: Any) -> dict[str, Any]:
    """The fields that can hold one value only, such as ``kind``: never an option, always passed on."""
    found: dict[str, Any] = {}
    if not _is_model(model):
        return found
    for name, field in model.model_fields.items():
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
            found[name] = get_args(field.annotation)[0]
    return found


@functools.cache
def _field_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The string under each field of a model, which Python itself does not keep."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if not (issubclass(base, BaseModel) and base is not BaseModel):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, SyntaxError):
            continue  # made in an interactive session: there is no source
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for field, following in itertools.pairwise(statements):
            match field, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = inspect.cleandoc(text)
    return found
