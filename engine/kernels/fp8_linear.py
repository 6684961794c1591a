"""y = x W^T + b where W is FP8, with a scale for each row and each 128 columns of it (DeepSeek-V3, arXiv 2412.19437).

Only the weight is FP8: x stays as it is. A tile of the weight is widened to x's dtype, which holds every e4m3 number
exactly, and the product over 128 columns is multiplied by their scale in fp32: no weight is rounded, so the result is
nearer to the stored model than one whose weights were multiplied out to bf16. Rounding x to FP8 as well would double
the arithmetic's rate in a large prefill, but costs quality, and a decode, which waits for weights, gains nothing by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels._triton import jit_for_any, tl

BLOCK = 128  # columns that share a scale
CORES = 128  # an H100 has 132


def multiply_out(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight float8 [out, in], scale fp32 [out, ceil(in / 128)] -> [out, in] in `dtype`, rounded once."""
    return (weight.float() * scale.repeat_interleave(BLOCK, 1)[:, : weight.shape[1]]).to(dtype)


def fp8_linear_torch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition: the weight multiplied out to x's dtype."""
    return F.linear(x, multiply_out(weight, scale, x.dtype), bias)


@dataclass(frozen=True)
class _Tile:
    rows: int  # of x
    columns: int  # of the output
    depth: int  # of the sum, per step of the loop: divides BLOCK, so that a step has one scale for each column
    warps: int
    stages: int


def _tile(rows: int, width: int, element_size: int) -> _Tile:
    """Few rows want deep reads of the weight and a program for every core; many rows want reuse of what is read."""
    if element_size > 2:
        return _Tile(16, 32, 32, 4, 2)
    if rows > 64:
        return _Tile(128, 128, 64, 8, 3)
    columns = next((columns for columns in (64, 32) if width >= CORES * columns), 16)
    return _Tile(16, columns, 128, 4, 6) if rows <= 16 else _Tile(64, columns, 128, 4, 3)


@jit_for_any("num_rows")
def _fp8_linear_kernel(
    x_ptr: tl.tensor,  # [T, DEPTH]
    weight_ptr: tl.tensor,  # float8 [WIDTH, DEPTH]
    scale_ptr: tl.tensor,  # fp32 [WIDTH, ceil(DEPTH / BLOCK)]
    bias_ptr: tl.tensor,  # [WIDTH]; not read unless BIASED
    out_ptr: tl.tensor,  # [T, WIDTH]
    num_rows: int,
    x_stride: int,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, column_mask = rows < num_rows, columns < WIDTH
    x_rows = x_ptr + rows.to(tl.int64) * x_stride
    weight_rows = weight_ptr + columns.to(tl.int64) * DEPTH
    scales = scale_ptr + columns * ((DEPTH + BLOCK - 1) // BLOCK)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, DEPTH, STEP, num_stages=STAGES):
        channels = start + tl.arange(0, STEP)
        inside = (channels < DEPTH)[None, :]
        x = tl.load(x_rows[:, None] + channels[None, :], mask=row_mask[:, None] & inside, other=0.0)
        weight = tl.load(weight_rows[:, None] + channels[None, :], mask=column_mask[:, None] & inside, other=0.0)
        scale = tl.load(scales + start // BLOCK, mask=column_mask, other=0.0)
        acc += tl.dot(x, weight.to(x.dtype).T, input_precision="ieee") * scale[None, :]
    if BIASED:
        acc += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def fp8_linear_triton(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    num_rows, width = x.shape[0], weight.shape[0]
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    tile = _tile(num_rows, width, x.element_size())
    if out.numel() > 0:
        _fp8_linear_kernel[(-(-num_rows // tile.rows), -(-width // tile.columns))](
            x, weight, scale, weight if bias is None else bias, out, num_rows, x.stride(0),
            DEPTH=weight.shape[1], WIDTH=width, BLOCK=BLOCK, BIASED=bias is not None,
            ROWS=tile.rows, COLUMNS=tile.columns, STEP=tile.depth, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return out


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in], channels contiguous -> [T, out]. weight float8_e4m3fn [out, in], scale fp32 [out, ceil(in / 128)],
    both contiguous; bias [out]."""
    return fp8_linear_triton(x, weight, scale, bias) if x.is_cuda else fp8_linear_torch(x, weight, scale, bias)
