"""Opaque operators: functions on tensors that a compiler calls and never looks into.

`torch.library.custom_op` does the same, with wrappers for gradients, aliasing and tracing around every call. On the
host of an H200 they took 40 of the 90 microseconds of a fake quantization, and a training step of a large model makes
hundreds of them. So these operators are registered without: they have no gradient of their own (`qat.layers` and
`qat.quantizers` define it around them), and never return their inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor

__all__ = ["OptionalResult", "operator"]

_LIBRARY = torch.library.Library("qat", "FRAGMENT")  # type: ignore[no-untyped-call]
_F = TypeVar("_F", bound=Callable[..., Any])

# An operator's result that may be None. Schemas have no word for it: torch passes None as a tensor without data.
if TYPE_CHECKING:
    OptionalResult: TypeAlias = Tensor | None
else:
    OptionalResult = Tensor


def operator(shapes: Callable[..., Any], **modules: str) -> Callable[[_F], _F]:
    """Turn a function into the operator ``torch.ops.qat.<its name without leading underscore>``, with its signature.

    The function runs where nothing faster is registered. It returns new tensors, none of them an input or a view of
    one.

    Args:
        shapes: takes the same arguments and returns empty tensors like the results, for a compiler. Tracing the
            function itself would say the same, but takes about five times as long.
        modules: for a dispatch key such as ``CUDA``, the module with a faster form, imported at the first call there.
            It has a function of the operator's name, and a function ``supports`` of the same arguments, which says
            whether to call it. Neither is given the operator's keyword arguments: those only order operators.

    >>> @operator(torch.empty_like)
    ... def doubled_for_a_docstring(x: torch.Tensor) -> torch.Tensor:
    ...     return x * 2
    >>> doubled_for_a_docstring(torch.ones(2))
    tensor([2., 2.])
    >>> torch.ops.qat.doubled_for_a_docstring(torch.ones(2, device="meta")).shape
    torch.Size([2])
    """

    def register(function: _F) -> _F:
        name = function.__name__.lstrip("_")
        schema = name + torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        for dispatch_key, module in modules.items():
            _LIBRARY.impl(name, partial(_faster, module, name, function), dispatch_key)  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"qat::{name}", shapes, lib=_LIBRARY)
        called: _F = getattr(torch.ops.qat, name).default
        called.__doc__ = function.__doc__
        return called

    return register


def _faster(module: str, name: str, function: Callable[..., Any], /, *args: Any, **_: Any) -> Any:
    kernels = import_module(module)
    return (getattr(kernels, name) if kernels.supports(*args) else function)(*args)
