"""Tiny random models of every transformer class that diffusers exports, and example inputs for each.

The table is in diffusion_architectures.yaml. No import of `qat` here: the process that loads an export with stock code
alone makes its inputs from the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

__all__ = ["ARCHITECTURES", "LEFT_OUT", "DiffusionArchitecture", "exported_transformers"]

LEFT_OUT: dict[str, str] = {}
"""Transformer classes that diffusers exports but that are not tried, with the reason."""


@dataclass(frozen=True)
class DiffusionArchitecture:
    """A class of diffusers with the sizes that make it tiny."""

    model: str
    sizes: dict[str, Any]
    inputs: dict[str, Any]
    """What its forward is given; tensors as `_Recipe`."""

    @property
    def storable(self) -> bool:
        """Whether an export can keep the inputs as its example: no caches, no complex numbers."""
        kinds = {value.kind for value in self.inputs.values() if isinstance(value, _Recipe)}
        return not kinds & {"wan_cache", "phases"}

    def build(self, zeros: bool = False) -> nn.Module:
        """The model, with the same random weights every time, in training mode, but without dropout.

        Many classes start with zeros where noise leaves, and then answer zero to everything; with ``zeros`` these stay.
        """
        import diffusers

        torch.manual_seed(0)
        model: nn.Module = getattr(diffusers, self.model)(**self.sizes)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                undefined = name.endswith(("pad_token", "experts.gate_up_proj", "experts.down_proj"))
                if undefined or not (zeros or parameter.any()):
                    parameter.normal_(std=0.02)
        return model.train()

    def example(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Inputs, the same every time; floating ones in ``dtype``."""
        generator = torch.Generator().manual_seed(1)
        return {name: _made(value, dtype, generator) for name, value in self.inputs.items()}


@dataclass(frozen=True)
class _Recipe:
    """A tensor to be made once its dtype is known."""

    kind: str
    arguments: Any


_Maker = Callable[[Any, torch.dtype, torch.Generator], Any]


def _noise(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def _full(arguments: list[Any], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """``[value, *shape]``."""
    return torch.full(arguments[1:], arguments[0], dtype=dtype)


def _whole(arguments: list[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """``[bound, *shape]``: whole numbers below the bound."""
    return torch.randint(0, arguments[0], arguments[1:], generator=generator)


def _range(count: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.arange(count)


def _add(arguments: list[Any], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """``[number, tensor]``."""
    made: torch.Tensor = arguments[0] + _made(arguments[1], dtype, generator)
    return made


def _ends(arguments: list[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """``[count, *shape]``: true in the last places of the last dimension."""
    mask = torch.zeros(arguments[1:], dtype=torch.bool)
    mask[..., arguments[-1] - arguments[0] :] = True
    return mask


def _mask(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """True but for the last place: a caption shorter than the room for it."""
    return ~_ends([1, *shape], dtype, generator)


def _grid(sizes: list[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Coordinates of a grid's places, ``(places, len(sizes))``."""
    axes = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    return torch.stack(axes, dim=-1).reshape(-1, len(sizes)).to(dtype)


def _phases(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Complex numbers of length 1."""
    angles = torch.randn(shape, generator=generator)
    return torch.polar(torch.ones_like(angles), angles)


def _wan_cache(layers: int, dtype: torch.dtype, generator: torch.Generator) -> Any:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return WanAnimate2KVCache(layers)


_MAKERS: dict[str, _Maker] = {
    "noise": _noise,
    "full": _full,
    "whole": _whole,
    "range": _range,
    "add": _add,
    "ends": _ends,
    "mask": _mask,
    "grid": _grid,
    "phases": _phases,
    "wan_cache": _wan_cache,
}


def _made(value: Any, dtype: torch.dtype, generator: torch.Generator) -> Any:
    if isinstance(value, _Recipe):
        return _MAKERS[value.kind](value.arguments, dtype, generator)
    if isinstance(value, dict):
        return {key: _made(item, dtype, generator) for key, item in value.items()}
    if isinstance(value, list):
        return [_made(item, dtype, generator) for item in value]
    return value


class _Loader(yaml.SafeLoader):
    """YAML with a tag for each kind of tensor."""


def _recipe(loader: _Loader, kind: str, node: yaml.Node) -> _Recipe:
    if isinstance(node, yaml.SequenceNode):
        return _Recipe(kind, loader.construct_sequence(node, deep=True))
    return _Recipe(kind, int(node.value))


_Loader.add_multi_constructor("!", _recipe)


def _read() -> dict[str, DiffusionArchitecture]:
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    table = yaml.load(text, Loader=_Loader)["classes"]
    return {name: DiffusionArchitecture(name, row["sizes"], row["inputs"]) for name, row in table.items()}


ARCHITECTURES = _read()


def exported_transformers() -> Iterator[str]:
    """Every model class of ``diffusers.models.transformers`` that the installed diffusers exports."""
    import diffusers

    for name in sorted(dir(diffusers)):
        kind = getattr(diffusers, name)
        model = isinstance(kind, type) and issubclass(kind, nn.Module)
        if model and kind.__module__.startswith("diffusers.models.transformers."):
            yield name
