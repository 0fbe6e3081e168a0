"""Fake quantization on CUDA: one Triton kernel that reads the weight once and writes it once.

The same operations as `qat.numerics`, in the same order and rounding: a true division (Triton's ``/`` is an
approximation), half-to-even rounding, and no fused multiply-add, which would skip the rounding of the product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.numerics import grouped
from qat.qtypes import QTYPES

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:  # a torch without CUDA brings no Triton
    triton = None

__all__ = ["available", "fake_quantize"]

_BLOCK = 2048


def available() -> bool:
    """Whether Triton can be used here."""
    return triton is not None


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _fake_quantize_kernel(  # type: ignore[no-untyped-def]
        weight, scale, shift, out, count, size: tl.constexpr, affine: tl.constexpr, floating: tl.constexpr,
        code_min: tl.constexpr, code_max: tl.constexpr, serving: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        """Elementwise over the flattened weight; element i belongs to row ``i // size``."""
        index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = index < count
        row = index // size
        value = tl.load(weight + index, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(scale + row, mask=inside, other=1.0)
        if affine:
            z = tl.load(shift + row, mask=inside, other=0.0)
            code = tl.div_rn(value + z, s)
        else:
            z = s
            code = tl.div_rn(value, s)
        if floating:
            code = tl.minimum(tl.maximum(code, code_min), code_max)
            code = code.to(tl.float8e4nv).to(tl.float32)
        else:
            code = tl.where(s == 0.0, 0.0, libdevice.rint(code))
            code = tl.minimum(tl.maximum(code, code_min), code_max) + 0.0  # no -0.0: integer codes have none
        rebuilt = (code * s).to(serving)
        if affine:
            rebuilt = (rebuilt.to(tl.float32) - z).to(serving)
        tl.store(out + index, rebuilt.to(out.dtype.element_ty), mask=inside)


_TRITON_DTYPES: dict[torch.dtype, Any] = (
    {} if triton is None else {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
)


def fake_quantize(
    weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> Tensor:
    """See `qat.numerics.fake_quantize`: the same arguments, the same bits; tensors on CUDA."""
    kind = QTYPES[qtype]
    weight = weight.detach().contiguous()
    out = torch.empty_like(weight, dtype=out_dtype)
    count = weight.numel()
    grid = (triton.cdiv(count, _BLOCK),)
    with torch.cuda.device(weight.device):
        _fake_quantize_kernel[grid](
            weight,
            scale,
            scale if shift is None else shift,
            out,
            count,
            size=grouped(weight, qtype).shape[1],
            affine=kind.affine,
            floating=kind.floating,
            code_min=float(kind.code_min),
            code_max=float(kind.code_max),
            serving=_TRITON_DTYPES[dtype],
            block=_BLOCK,
            enable_fp_fusion=False,
        )
    return out
