"""Opaque operators: functions on tensors that a compiler calls and never looks into.

`torch.library.custom_op` does the same, with wrappers for gradients, aliasing and tracing around every call. On the
host of an H200 they took 40 of the 90 microseconds of a fake quantization, and a training step of a large model makes
hundreds of them. So these operators are registered without: they have no gradient of their own (`qat.layers` and
`qat.numerics` define it around them), and never return their inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["fake_operator", "operator"]

_LIBRARY = torch.library.Library("qat", "FRAGMENT")  # type: ignore[no-untyped-call]
_F = TypeVar("_F", bound=Callable[..., object])


def operator(function: _F) -> _F:
    """Register ``function`` for all devices as the operator ``torch.ops.qat.<its name without leading underscore>``.

    Its signature becomes the operator's. It returns new tensors, none of them an input or a view of
    one; `fake_operator` tells a compiler of what shapes.

    >>> @operator
    ... def _doubled_for_a_docstring(x: torch.Tensor) -> torch.Tensor:
    ...     return x * 2
    >>> torch.ops.qat.doubled_for_a_docstring(torch.ones(2))
    tensor([2., 2.])
    """
    name = function.__name__.lstrip("_")
    schema = name + torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    return function


def fake_operator(name: str) -> Callable[[_F], _F]:
    """What tells a compiler the shapes and dtypes that operator ``name`` returns; a decorator.

    >>> @operator
    ... def _tripled_for_a_docstring(x: torch.Tensor) -> torch.Tensor:
    ...     return x * 3
    >>> @fake_operator("tripled_for_a_docstring")
    ... def _(x: torch.Tensor) -> torch.Tensor:
    ...     return torch.empty_like(x)
    >>> torch.ops.qat.tripled_for_a_docstring(torch.ones(2, device="meta")).shape
    torch.Size([2])
    """
    return torch.library.register_fake(f"qat::{name}", lib=_LIBRARY)  # type: ignore[no-any-return]
