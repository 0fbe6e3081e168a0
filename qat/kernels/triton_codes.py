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

    from qat.kernels.triton import code_at

__all__ = [
    "dequantize",
    "fake_quantize_activation",
    "linear_codes",
    "linear_codes_quantized",
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
    def _encoded(  # type: ignore[no-untyped-def]
        value, s, serving: tl.constexpr, floating: tl.constexpr, code_min: tl.constexpr, code_max: tl.constexpr
    ):  # fmt: skip
        """Codes as float32, positions before they were clamped, and 1 where a position lies within the range."""
        # div_rn is float32's division; rounding its result again to a narrower dtype gives that dtype's division.
        position = tl.div_rn(value, s).to(serving).to(tl.float32)
        code, clamped = code_at(position, floating, code_min, code_max)
        return code, position, (position == clamped).to(tl.int32)

    @triton.jit  # type: ignore[untyped-decorator]
    def _quantize_kernel(  # type: ignore[no-untyped-def]
        x, scale, out, inside, found, count, serving: tl.constexpr, code_min: tl.constexpr, code_max: tl.constexpr,
        floating: tl.constexpr, decoded: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        """Eight flags to a byte, and either values, or codes, with NaN in ``found`` where x holds one."""
        first = tl.program_id(0).to(tl.int64) * block
        offset = first + tl.arange(0, block)
        value = tl.load(x + offset, mask=offset < count, other=0.0).to(serving).to(tl.float32)
        s = tl.load(scale)
        code, position, within = _encoded(value, s, serving, floating, code_min, code_max)
        if decoded:
            code = (code * s).to(serving)
        else:
            tl.store(found, float("nan"), mask=tl.max((position != position).to(tl.int32), 0) > 0)
        tl.store(out + offset, code.to(out.dtype.element_ty), mask=offset < count)
        bits = tl.sum(tl.reshape(within, (block // 8, 8)) << tl.arange(0, 8)[None, :], 1)
        byte = first // 8 + tl.arange(0, block // 8)
        tl.store(inside + byte, bits.to(tl.uint8), mask=byte * 8 < count)

    @triton.jit  # type: ignore[untyped-decorator]
    def _dequantize_kernel(codes, scale, out, size, parts, serving: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
        row, part = tl.program_id(0) // parts, tl.program_id(0) % parts
        column = part * block + tl.arange(0, block)
        offset = row.to(tl.int64) * size + column
        code = tl.load(codes + offset, mask=column < size, other=0.0).to(tl.float32)
        value = (code * tl.load(scale + row)).to(serving)
        tl.store(out + offset, value.to(out.dtype.element_ty), mask=column < size)

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
        x, weight, scale, bias, out, y_scale, inside, rows, out_features, in_features: tl.constexpr,
        has_bias: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr, tile_depth: tl.constexpr,
        programs: tl.constexpr, quantized: tl.constexpr, floating: tl.constexpr, code_min: tl.constexpr,
        code_max: tl.constexpr,
    ):  # fmt: skip
        """Tiles of ``x weight^T`` by turns, eight tiles down before one across, so that the cache serves both.

        A tile's output is quantized before it leaves the registers.
        """
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
            if quantized:
                s = tl.load(y_scale)
                code, _, within = _encoded(value.to(tl.float32), s, out.dtype, floating, code_min, code_max)
                value = (code * s).to(out.dtype)
                flags = tl.reshape(within, (tile_rows, tile_columns // 8, 8)) << tl.arange(0, 8)[None, None, :]
                line, byte = row + tl.arange(0, tile_rows), column // 8 + tl.arange(0, tile_columns // 8)
                exists = (line < rows)[:, None] & (byte * 8 < out_features)[None, :]
                place = line.to(tl.int64)[:, None] * (out_features // 8) + byte[None, :]
                tl.store(inside + place, tl.sum(flags, 2).to(tl.uint8), mask=exists)
            out.store([row, column], value)


def quantize_activation(x: Tensor, scale: Tensor, qtype: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """See `qat.kernels.quantize_activation`: the bits of the specification."""
    found = scale.clone()
    codes = torch.empty_like(x, dtype=qtype_of(qtype).storage, memory_format=torch.contiguous_format)
    return codes, _quantize(x, scale, codes, found, qtype, dtype), found


def fake_quantize_activation(x: Tensor, scale: Tensor, qtype: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `qat.kernels.fake_quantize_activation`: the bits of the specification."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, _quantize(x, scale, out, None, qtype, dtype)


def _quantize(x: Tensor, scale: Tensor, out: Tensor, found: Tensor | None, qtype: str, dtype: torch.dtype) -> Tensor:
    x, count = x.contiguous(), x.numel()
    inside = torch.empty((count + 7) // 8, dtype=torch.uint8, device=x.device)
    options = (_serving(dtype), *_limits(qtype), found is None, _BLOCK)
    with device_of(x):
        _quantize_kernel[(triton.cdiv(count, _BLOCK),)](
            x, scale, out, inside, scale if found is None else found, count, *options, enable_fp_fusion=False
        )
    return inside


def _limits(qtype: str) -> tuple[float, float, bool]:
    found = qtype_of(qtype)
    return float(found.code_min), float(found.code_max), found.floating


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """See `qat.kernels.dequantize`."""
    codes = codes.contiguous()
    out = torch.empty_like(codes, dtype=out_dtype)
    rows = scale.numel()
    size = codes.numel() // rows
    parts = triton.cdiv(size, _BLOCK)
    with device_of(codes):
        _dequantize_kernel[(rows * parts,)](codes, scale.contiguous(), out, size, parts, _serving(dtype), _BLOCK)
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
    shape = (*x.shape[:-1], codes.shape[0])
    if _in_tiles(rows, codes, qtype, dtype):
        return _int8_linear(rows, codes, _scales(x_scale, scale, dtype), bias, dtype).view(shape)
    if wanted.floating and _fits(codes) and dtype is torch.bfloat16:  # of which cuBLAS takes a scale a row
        ones = torch.ones((rows.shape[0], 1), device=x.device)
        scales = _scales(x_scale, scale, dtype)
        return torch._scaled_mm(rows, codes.t(), ones, scales.t(), bias=bias, out_dtype=dtype).view(shape)
    return wanted.linear(x, x_scale, codes, scale, bias, dtype)


def linear_codes_quantized(
    x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None,
    y_scale: Tensor, qtype: str, y_qtype: str, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `qat.kernels.linear_codes_quantized`: one pass for int8, and two for all else."""
    rows = x.reshape(-1, x.shape[-1])
    if not _in_tiles(rows, codes, qtype, dtype):
        y = linear_codes(x, x_scale, codes, scale, bias, qtype, dtype)
        return fake_quantize_activation(y, y_scale, y_qtype, dtype)
    inside = torch.empty(rows.shape[0] * codes.shape[0] // 8, dtype=torch.uint8, device=x.device)
    quantized = (y_scale, inside, _limits(y_qtype))
    y = _int8_linear(rows, codes, _scales(x_scale, scale, dtype), bias, dtype, quantized)
    return y.view(*x.shape[:-1], codes.shape[0]), inside


def _fits(codes: Tensor) -> bool:
    return all(size % 16 == 0 for size in codes.shape)


def _in_tiles(rows: Tensor, codes: Tensor, qtype: str, dtype: torch.dtype) -> bool:
    """Whether `_int8_linear` computes a product as loaders do."""
    wanted = qtype_of(qtype)
    return not wanted.floating and _fits(codes) and dtype is not torch.float32 and wanted.in_integers(rows, codes)


def _scales(x_scale: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (x_scale.to(dtype) * scale.to(dtype)).float()  # (out, 1), rounded as a loader rounds them


def _int8_linear(
    rows: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype,
    quantized: tuple[Tensor, Tensor, tuple[float, float, bool]] | None = None,
) -> Tensor:  # fmt: skip
    """The product, scaled, with its bias; ``quantized`` has the scale of outputs, their flags, and limits of codes."""
    (out_features, in_features), (tall, wide, deep) = codes.shape, _TILE
    out = torch.empty((rows.shape[0], out_features), dtype=dtype, device=rows.device)
    tiles = [(rows, [tall, deep]), (codes, [wide, deep]), (out, [tall, wide])]
    ours, theirs, result = (TensorDescriptor.from_tensor(tensor, tile) for tensor, tile in tiles)
    programs = torch.cuda.get_device_properties(rows.device).multi_processor_count
    y_scale, inside, (code_min, code_max, floating) = quantized or (scales, scales, (0.0, 0.0, False))
    options = (in_features, bias is not None, *_TILE, programs, quantized is not None, floating, code_min, code_max)
    with device_of(rows):
        _int8_linear_kernel[(programs,)](
            ours, theirs, scales, scales if bias is None else bias, result, y_scale, inside, rows.shape[0],
            out_features, *options, num_warps=8, num_stages=3, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _serving(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))
