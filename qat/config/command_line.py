"""A command line becomes a nested dict by tyro; validation comes after it, for file and command line together."""

from __future__ import annotations

import ast
import functools
import inspect
import io
import itertools
import json
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
import yaml
from pydantic import BaseModel
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from qat.config.validation import ConfigError, constant_fields, is_model, read_yaml, validate

__all__ = ["load_config", "parse_arguments"]

Model = TypeVar("Model", bound=BaseModel)


def load_config(model: type[Model], argv: Sequence[str], description: str, *, prog: str | None = None) -> Model:
    """Read a configuration: the model's defaults, overridden by a YAML file, overridden by the command line.

    The file may give a part of a section: the other fields keep the values that ``model`` has there, which may differ
    from the section's own defaults. A union whose kind the file changes is the file's alone.

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
        default = validate(model, _merged(default, read_yaml(path)), str(path))
    values = parse_arguments(model, arguments, description, prog=prog, default=default)
    return validate(model, values, "command line")


def _merged(default: BaseModel, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says over a model's values, section by section; lists and free mappings are replaced as a whole."""
    merged = {name: getattr(default, name) for name in type(default).model_fields} | dict(values)
    for name, value in values.items():
        section = getattr(default, name, None)
        if not (isinstance(section, BaseModel) and isinstance(value, Mapping)):
            continue
        constants = constant_fields(type(section))
        if all(value.get(key, constant) == constant for key, constant in constants.items()):
            merged[name] = _merged(section, value)
    return merged


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


def _one_line(box: str) -> str:
    """Tyro's framed message as plain text, without the frame, the title and what only repeats the help."""
    sections: list[list[str]] = [[]]
    for row in box.splitlines()[1:-1]:
        text = row.strip("│ ")
        if text and not text.strip("─"):
            sections.append([])
        elif text:
            sections[-1].append(text)
    return ". ".join(filter(None, map(_shortened, sections)))


def _shortened(section: list[str]) -> str:
    text = " ".join(section).rstrip(".")
    if text.startswith(("Argument helptext", "Available subcommands")):
        return ""
    if text.startswith("For full helptext"):  # of a program that another script may have started: not what was typed
        return "--help shows all options"
    options = [row.split()[0] for row in section if row.startswith("--")]
    return f"Perhaps you meant: {', '.join(options)}" if text.startswith("Perhaps you meant") and options else text


def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()
    registry.struct_rule(_model_rule)
    registry.primitive_rule(_mapping_rule)
    return registry


def _model_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Parse a pydantic model into a plain dict: validation comes once, for the whole, and finds all faults."""
    model = info.type
    if not is_model(model):
        return None
    constants, documented, fields = constant_fields(model), _field_docstrings(model), []
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
