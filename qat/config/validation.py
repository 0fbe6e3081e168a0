"""A mapping becomes a typed configuration, or one error that lists all of its faults."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from qat.errors import QatError

__all__ = ["ConfigError", "constant_fields", "is_model", "read_yaml", "validate"]

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(QatError, ValueError):
    """A configuration file or a command line is wrong; the message lists every fault."""


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
        owners = [kind for kind in here if is_model(kind) and part in kind.model_fields]
        items = [argument for kind in here if get_origin(kind) in (dict, list, tuple) for argument in get_args(kind)]
        tagged = [
            kind for kind in here if part in constant_fields(kind).values() or _label(kind) == str(part).split("[")[0]
        ]
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
        known = [name for kind in here if is_model(kind) for name in kind.model_fields]
        close = get_close_matches(keys[-1], known, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return path, f"unknown key; {remedy}"
    rule = str(fault["msg"]).removeprefix("Value error, ")
    return path, f"i{rule[1:]}" if rule.startswith("Input") else rule


def _label(kind: Any) -> str:
    """What pydantic calls a member of a union, without its parameters."""
    return str(getattr(get_origin(kind) or kind, "__name__", kind)).lower() if not is_model(kind) else kind.__name__


def is_model(kind: Any) -> TypeGuard[type[BaseModel]]:
    """Whether a type is a pydantic model."""
    return inspect.isclass(kind) and issubclass(kind, BaseModel)


def _members(annotations: Sequence[Any]) -> list[Any]:
    """The annotations, with unions replaced by what they join."""
    found: list[Any] = []
    for annotation in annotations:
        union = get_origin(annotation) in (Union, UnionType, Annotated)
        found += _members(get_args(annotation)) if union else [annotation]
    return found


def constant_fields(model: Any) -> dict[str, Any]:
    """The fields that can hold one value only, such as ``kind``: never an option, always passed on."""
    found: dict[str, Any] = {}
    if not is_model(model):
        return found
    for name, field in model.model_fields.items():
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
            found[name] = get_args(field.annotation)[0]
    return found
