"""Configuration, read once at the edge into typed objects: defaults < YAML file < command line.

The models are pydantic's, frozen and without extra fields. `load_config` reads the optional first argument
``config.yaml`` over their defaults and gives the result to tyro as the defaults of the command line. Help is tyro's; a
value that breaks a model's rule is a `ConfigError`, from the file and the command line alike.

A union of models is told apart by a field ``kind``: in YAML by its value, on the command line by a subcommand
(``algorithm:straight-through --algorithm.mask-saturated``). Without one, the file's choice stays.
Mappings are ``KEY=VALUE`` words on the command line: ``--spec.overrides '*.down_proj=int8' 'lm_head=float'``.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import tyro
from pydantic import BaseModel, ValidationError
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from qat.cli import mapping_rule
from qat.command_line import parsed
from qat.errors import QatError, shown
from qat.report import require_text
from qat.strict_yaml import MOST_BYTES, parse_yaml

__all__ = ["ConfigError", "load_config", "read_yaml"]

Model = TypeVar("Model", bound=BaseModel)

_FAULTS_SHOWN = 8
_REGISTRY = ConstructorRegistry()  # what tyro must know to parse our models: into mappings, for the models to validate
_REGISTRY.primitive_rule(mapping_rule)


class ConfigError(QatError, ValueError):
    """A configuration file is wrong, or a setting does not fit this machine."""


def load_config(model: type[Model], argv: Sequence[str], description: str, *, prog: str | None = None) -> Model:
    """Read a configuration: the model's defaults, overridden by a YAML file, overridden by the command line.

    The file may give a part of a section: the other fields keep the values that ``model`` has there. A section whose
    ``kind`` the file changes keeps nothing.

    Args:
        model: the configuration's class; every field has a default.
        argv: the arguments after the program's name; the first may name a ``.yaml`` or ``.yml`` file.
        description: shown by ``--help``.
        prog: the program's name as a user types it.

    Raises:
        ConfigError: the file is wrong, or a value breaks a rule; the message has a line for each key at fault.
        QatError: an option does not exist, or its value is none of its type.
        SystemExit: after ``--help``, with code 0.

    >>> from qat.spec import QuantSpec
    >>> load_config(QuantSpec, ["--weights", "int4", "--overrides", "*.down_proj=int8"], "An example.").overrides
    {'*.down_proj': 'int8'}
    """
    arguments, default = list(argv), model()
    require_text(arguments)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        path = Path(arguments.pop(0))
        default = _validated(model, _merged(default, read_yaml(path)), str(path))
    markers = (tyro.conf.CascadeSubcommandArgs,)  # a section's options may come before and after a subcommand
    usage = f"{prog} [config.yaml]" if prog else None

    def parse(words: Sequence[str]) -> Any:
        return tyro.cli(
            model, args=words, default=default, description=description, prog=usage, config=markers, registry=_REGISTRY
        )

    values = parsed(parse, arguments, prog or "python -m recipes.RECIPE")
    return _validated(model, values, "command line")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file.

    Raises:
        ConfigError: the file is missing, no regular one, no YAML as `qat.strict_yaml` reads it, or holds no mapping.
    """
    try:
        if not stat.S_ISREG((found := path.stat()).st_mode):
            raise OSError(None, "no regular file but a folder, a pipe or a device")
        if found.st_size > MOST_BYTES:
            raise OSError(None, f"it has {found.st_size} bytes, and at most {MOST_BYTES} are read: say it in fewer")
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        name = shown(str(path)) if len(str(path)) > 100 else path
        raise ConfigError(f"{name}: the configuration file cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top, got a {type(values).__name__}")
    return values or {}


def _merged(default: BaseModel, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says over a model's values, section by section; other mappings are replaced as a whole."""
    merged = dict(default) | dict(values)
    for name, section in default:
        given = values.get(name)
        if isinstance(section, BaseModel) and isinstance(given, Mapping):
            kind = getattr(section, "kind", None)
            merged[name] = _merged(section, given) if given.get("kind", kind) == kind else given
    return merged


def _validated(model: type[Model], values: Mapping[str, Any], source: str) -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "\n  ".join(_faults(error, model, values))) from None


def _faults(error: ValidationError, model: type[BaseModel], values: Mapping[str, Any]) -> list[str]:
    """Each key at fault, with its rule, its value and, where the key is unknown, a remedy."""
    rules: dict[tuple[str, ...], list[str]] = {}
    got: dict[tuple[str, ...], str] = {}
    listed: set[tuple[str, ...]] = set()
    for fault in error.errors(include_url=False, include_context=False, include_input=False):
        keys: tuple[str, ...] = ()
        value: Any = values
        for part in fault["loc"]:  # pydantic also names the members of unions there, which are no keys of the file
            if isinstance(value, Mapping) and part in value:
                keys, value = (*keys, str(part)[:100]), value[part]
        if len(rules) == _FAULTS_SHOWN and keys not in rules:
            return [*_told(rules, got), f"and {error.error_count()} faults in all"]
        rule = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            known = _fields(model, keys[:-1])
            close = get_close_matches(keys[-1], known, n=1)
            rule = f"unknown key; did you mean {close[0]!r}?" if close else "unknown key"
            if not close and keys[:-1] not in listed:
                rule += f"; known keys: {', '.join(known)}"
                listed.add(keys[:-1])
        elif fault["type"] == "missing":
            rule = f"key {fault['loc'][-1]!r} is required"
        elif not isinstance(value, Mapping | BaseModel):
            got[keys] = f", got {shown(value)}"
        rules.setdefault(keys, []).append(rule)
    return _told(rules, got)


def _told(rules: Mapping[tuple[str, ...], Sequence[str]], got: Mapping[tuple[str, ...], str]) -> list[str]:
    return [
        ": ".join(filter(None, [".".join(k), f"{'; or '.join(rule)}{got.get(k, '')}"])) for k, rule in rules.items()
    ]


def _fields(annotation: Any, section: Sequence[str]) -> list[str]:
    """The keys that a section may have; of a union, those of each member."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields
        if not section:
            return list(fields)
        return _fields(fields[section[0]].annotation, section[1:]) if section[0] in fields else []
    inner = section[1:] if get_origin(annotation) is dict else section
    return list(dict.fromkeys(name for part in get_args(annotation) for name in _fields(part, inner)))


@_REGISTRY.struct_rule
def _model_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Parse a model as tyro does, but into a mapping; the field ``kind``, which has one value, is no option."""
    if _model_rule in info.markers or not (isinstance(info.type, type) and issubclass(info.type, BaseModel)):
        return None
    own = ConstructorRegistry.get_struct_spec(replace(info, markers=(*info.markers, _model_rule)))
    if not isinstance(own, StructConstructorSpec):
        return None
    kind = {field.name: field.default for field in own.fields if field.name == "kind"}

    def collect(**values: Any) -> dict[str, Any]:
        return {**kind, **values}

    collect.__doc__ = info.type.__doc__  # what --help shows
    return replace(own, instantiate=collect, fields=tuple(field for field in own.fields if field.name not in kind))
