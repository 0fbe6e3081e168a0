"""Activations in 8 bits on CUDA: quantized in one pass, multiplied as codes, and their masks in the backward pass.

int8 products are exact, so the kernel's result is that of ``torch._int_mm``; scale and bias are applied before
anything is written, in the roundings of serving. Tiles are fetched by the tensor memory accelerator, which needs
compute capability 9.0. float8 goes to cuBLAS, which scales its float32 sums, where serving scales the weight in its own
dtype first. Sums are accumulated in full (``use_fast_accum=False``).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from qat.kernels.triton import device_of, triton
from qat.numerics import qtype_of

if triton is not None:
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = [
    "dequantize_activation",
    "linear_codes",
    "mask_in_place",
    "masked_gradient",
    "masked_product",
    "quantize_activation",
    "supports",
]

_BLOCK = 2048  # elements of a program: sixteen for each thread of four warps
_TILE = (128, 256, 128)  # rows, columns and depth of a tile of the int8 product


@functools.cache
def _capable(index: int) -> bool:
    return triton is not None and torch.cuda.get_device_capability(index) >= (9, 0)


def supports(x: Tensor, *_: Any) -> bool:
    """Whether these kernels run on the device of ``x``; an empty tensor has nothing to launch."""
    return bool(x.numel()) and _capable(x.device.index)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _quantize_kernel(  # type: ignore[no-untyped-def]
        x, scale, codes, inside, found, count, serving: tl.constexpr, code_min: tl.constexpr, code_max: tl.constexpr,
        floating: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        """Codes, eight flags to a byte, and NaN in ``found`` where x holds one."""
        first = tl.program_id(0).to(tl.int64) * block
        offset = first + tl.arange(0, block)
        value = tl.load(x + offset, mask=offset < count, other=0.0).to(serving).to(tl.float32)
        # div_rn is float32's division; rounding its result again to a narrower dtype gives that dtype's division.
        position = tl.div_rn(value, tl.load(scale)).to(serving).to(tl.float32)
        code = tl.maximum(position, code_min, propagate_nan=tl.PropagateNan.ALL)
        code = tl.minimum(code, code_max, propagate_nan=tl.PropagateNan.ALL)
        within = (position == code).to(tl.int32)
        if floating:
            tl.store(codes + offset, code.to(tl.float8e4nv), mask=offset < count)
        else:  # the worth of this number's last bit is 1: adding it rounds half to even
            tl.store(codes + offset, ((code + 12582912.0) - 12582912.0).to(tl.int8), mask=offset < count)
        tl.store(found, float("nan"), mask=tl.max((position != position).to(tl.int32), 0) > 0)
        bits = tl.sum(tl.reshape(within, (block // 8, 8)) << tl.arange(0, 8)[None, :], 1)
        byte = first // 8 + tl.arange(0, block // 8)
        tl.store(inside + byte, bits.to(tl.uint8), mask=byte * 8 < count)

    @triton.jit  # type: ignore[untyped-decorator]
    def _dequantize_kernel(codes, scale, out, count, serving: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
        offset = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        code = tl.load(codes + offset, mask=offset < count, other=0.0).to(tl.float32)
        value = (code * tl.load(scale)).to(serving)
        tl.store(out + offset, value.to(out.dtype.element_ty), mask=offset < count)

    @triton.jit  # type: ignore[untyped-decorator]
    def _mask_kernel(grad, inside, out, count, in_place: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
        first = tl.program_id(0).to(tl.int64) * block
        byte = first // 8 + tl.arange(0, block // 8)
        bits = tl.load(inside + byte, mask=byte * 8 < count, other=255).to(tl.int32)
        # Few activations saturate. Where none of a block does, its gradient is neither read nor written.
        if not in_place or tl.min(bits, 0) < 255:
            offset = first + tl.arange(0, block)
            flags = tl.reshape((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1, (block,))
            value = tl.load(grad + offset, mask=offset < count, other=0.0)
            tl.store(out + offset, tl.where(flags > 0, value, 0.0), mask=offset < count)

    @triton.jit  # type: ignore[untyped-decorator]
    def _int8_linear_kernel(  # type: ignore[no-untyped-def]
        x, weight, scale, bias, out, rows, out_features, in_features: tl.constexpr, has_bias: tl.constexpr,
        tile_rows: tl.constexpr, tile_columns: tl.constexpr, tile_depth: tl.constexpr, programs: tl.constexpr,
    ):  # fmt: skip
        """Tiles of ``x weight^T`` by turns, eight tiles down before one across, so that the cache serves both."""
        down, across = tl.cdiv(rows, tile_rows), tl.cdiv(out_features, tile_columns)
        for tile in tl.range(tl.program_id(0), down * across, programs, flatten=True):
            first = tile // (8 * across) * 8
            height = min(down - first, 8)
            row = (first + tile % (8 * across) % height) * tile_rows
            column = tile % (8 * across) // height * tile_columns
            sums = tl.zeros((tile_rows, tile_columns), tl.int32)
            for depth in range(0, in_features, tile_depth):
                sums = tl.dot(x.load([row, depth]), weight.load([column, depth]).T, sums, out_dtype=tl.int32)
            columns = column + tl.arange(0, tile_columns)
            factor = tl.load(scale + columns, mask=columns < out_features, other=0.0)
            value = (sums.to(tl.float32) * factor[None, :]).to(out.dtype)
            if has_bias:
                added = tl.load(bias + columns, mask=columns < out_features, other=0.0).to(tl.float32)
                value = (value.to(tl.float32) + added[None, :]).to(out.dtype)
            out.store([row, column], value)


def quantize_activation(x: Tensor, scale: Tensor, qtype: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """See `qat.kernels.quantize_activation`: the bits of the specification."""
    wanted, x, found = qtype_of(qtype), x.contiguous(), scale.clone()
    codes = torch.empty_like(x, dtype=wanted.storage)
    inside = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)
    limits = (float(wanted.code_min), float(wanted.code_max), wanted.floating)
    with device_of(x):
        _quantize_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            x, scale, codes, inside, found, x.numel(), _serving(dtype), *limits, _BLOCK, enable_fp_fusion=False
        )
    return codes, inside, found


def dequantize_activation(codes: Tensor, scale: Tensor, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """See `qat.kernels.dequantize_activation`."""
    codes = codes.contiguous()
    out = torch.empty_like(codes, dtype=out_dtype)
    with device_of(codes):
        grid = (triton.cdiv(codes.numel(), _BLOCK),)
        _dequantize_kernel[grid](codes, scale, out, codes.numel(), _serving(dtype), _BLOCK)
    return out


def masked_gradient(grad: Tensor, inside: Tensor) -> Tensor:
    """See `qat.kernels.masked_gradient`."""
    grad = grad.contiguous()
    return _mask(grad, inside, torch.empty_like(grad))


def masked_product(grad: Tensor, weight: Tensor, inside: Tensor) -> Tensor:
    """See `qat.kernels.masked_product`."""
    return mask_in_place(grad @ weight, inside)


def mask_in_place(grad: Tensor, inside: Tensor) -> Tensor:
    """``grad`` itself, with zero where ``inside`` does not say otherwise."""
    return _mask(grad, inside, grad)


def _mask(grad: Tensor, inside: Tensor, out: Tensor) -> Tensor:
    with device_of(grad):
        _mask_kernel[(triton.cdiv(grad.numel(), _BLOCK),)](grad, inside, out, grad.numel(), out is grad, _BLOCK)
    return out


def linear_codes(
    x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, qtype: str, dtype: torch.dtype
) -> Tensor:
    """See `qat.kernels.linear_codes`. Shapes that no fast kernel takes get the arithmetic of the specification."""
    wanted, rows = qtype_of(qtype), x.reshape(-1, x.shape[-1])
    shape, (out_features, in_features) = (*x.shape[:-1], codes.shape[0]), codes.shape
    fits = in_features % 16 == 0 and out_features % 16 == 0 and dtype is not torch.float32
    scales = (x_scale.to(dtype) * scale.to(dtype)).float()  # (out, 1), rounded as a loader rounds them
    if fits and wanted.floating and dtype is torch.bfloat16:  # of which cuBLAS takes a scale a row
        ones = torch.ones((rows.shape[0], 1), device=x.device)
        return torch._scaled_mm(rows, codes.t(), ones, scales.t(), bias=bias, out_dtype=dtype).view(shape)
    if not (fits and wanted.in_integers(rows, codes)):
        return wanted.linear(x, x_scale, codes, scale, bias, dtype)
    out = torch.empty((rows.shape[0], out_features), dtype=dtype, device=x.device)
    tall, wide, deep = _TILE
    tiles = [(rows, [tall, deep]), (codes, [wide, deep]), (out, [tall, wide])]
    ours, theirs, result = (TensorDescriptor.from_tensor(tensor, tile) for tensor, tile in tiles)
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    options = (in_features, bias is not None, *_TILE, programs)
    with device_of(x):
        _int8_linear_kernel[(programs,)](
            ours, theirs, scales, scales if bias is None else bias, result, rows.shape[0], out_features, *options,
            num_warps=8, num_stages=3, enable_fp_fusion=False,
        )  # fmt: skip
    return out.view(shape)


def _serving(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))
