"""Opaque operators: functions on tensors that a compiler calls and never looks into.

`torch.library.custom_op` does the same, with wrappers for gradients, aliasing and tracing around every call. On the
host of an H200 they took 40 of the 90 microseconds of a fake quantization, and a training step of a large model makes
hundreds of them. So these operators are registered without: they have no gradient of their own (`qat.layers` and
`qat.quantizers` define it around them), and never return their inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import torch

__all__ = ["implement", "operator"]

_LIBRARY = torch.library.Library("qat", "FRAGMENT")  # type: ignore[no-untyped-call]
_F = TypeVar("_F", bound=Callable[..., Any])


def operator(shapes: Callable[..., Any]) -> Callable[[_F], _F]:
    """Register a function for all devices as the operator ``torch.ops.qat.<its name without leading underscore>``.

    The function's signature becomes the operator's. It returns new tensors, none of them an input or a view of one.
    ``shapes`` takes the same arguments and returns empty tensors like the results, for a compiler.

    >>> @operator(torch.empty_like)
    ... def _doubled_for_a_docstring(x: torch.Tensor) -> torch.Tensor:
    ...     return x * 2
    >>> torch.ops.qat.doubled_for_a_docstring(torch.ones(2))
    tensor([2., 2.])
    >>> torch.ops.qat.doubled_for_a_docstring(torch.ones(2, device="meta")).shape
    torch.Size([2])
    """

    def register(function: _F) -> _F:
        name = function.__name__.lstrip("_")
        schema = name + torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"qat::{name}", shapes, lib=_LIBRARY)
        return function

    return register


def implement(specification: Callable[..., Any], dispatch_key: str, module: str) -> None:
    """Let ``module`` compute an operator on one type of device; it is imported at the first call there.

    The module has a function of the operator's name, and a function ``supports`` of the same arguments. What it does
    not support, ``specification`` computes: the function that `operator` registered.
    """
    name = specification.__name__.lstrip("_")

    def call(*args: Any) -> Any:
        kernels = import_module(module)
        return (getattr(kernels, name) if kernels.supports(*args) else specification)(*args)

    _LIBRARY.impl(name, call, dispatch_key)  # type: ignore[no-untyped-call]
