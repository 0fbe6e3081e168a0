"""Configuration, read once at the edge into typed objects: defaults < YAML file < command line.

The models are pydantic's, frozen and without extra fields. `load_config` reads the optional first argument
``config.yaml`` over their defaults and gives the result to tyro as the defaults of the command line. Help and wrong
options are tyro's; a value that breaks a model's rule is a `ConfigError`, from the file and the command line alike.

A union of models is told apart by a field ``kind``: in YAML by its value, on the command line by a subcommand
(``algorithm:straight-through --algorithm.mask-saturated``). Without one, the file's choice stays.
Mappings are ``KEY=VALUE`` words on the command line: ``--spec.overrides '*.down_proj=int8' 'lm_head=float'``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import tyro
import yaml
from pydantic import BaseModel, ValidationError
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from qat.cli import mapping_rule
from qat.errors import QatError

__all__ = ["ConfigError", "load_config", "read_yaml"]

Model = TypeVar("Model", bound=BaseModel)

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
        SystemExit: after ``--help`` with code 0, after a wrong command line with code 2.

    >>> from qat.spec import QuantSpec
    >>> load_config(QuantSpec, ["--weights", "int4", "--overrides", "*.down_proj=int8"], "An example.").overrides
    {'*.down_proj': 'int8'}
    """
    arguments, default = list(argv), model()
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        path = Path(arguments.pop(0))
        default = _validated(model, _merged(default, read_yaml(path)), str(path))
    markers = (tyro.conf.CascadeSubcommandArgs,)  # a section's options may come before and after a subcommand
    values: Any = tyro.cli(
        model, args=arguments, default=default, description=description, prog=prog, config=markers, registry=_REGISTRY
    )
    return _validated(model, values, "command line")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file.

    Raises:
        ConfigError: the file is missing, is no YAML, gives a key twice or does not hold a mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(f"{path}: the configuration file cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top, got a {type(values).__name__}")
    return values or {}


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, which keeps the last of two equal keys, made to raise."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping after a look at its keys."""
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


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
    for fault in error.errors(include_url=False):
        keys: tuple[str, ...] = ()
        value: Any = values
        for part in fault["loc"]:  # pydantic also names the members of unions there, which are no keys of the file
            if isinstance(value, Mapping) and part in value:
                keys, value = (*keys, str(part)), value[part]
        rule = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            known = _fields(model, keys[:-1])
            close = get_close_matches(keys[-1], known, n=1)
            rule = "unknown key; " + (f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}")
        elif fault["type"] == "missing":
            rule = f"key {fault['loc'][-1]!r} is required"
        elif not isinstance(value, Mapping | BaseModel):
            got[keys] = f", got {value!r}"
        rules.setdefault(keys, []).append(rule)
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
