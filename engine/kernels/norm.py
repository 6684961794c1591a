"""RMSNorm (arXiv 1910.07467): alone, fused with the residual addition before it, and head by head in place."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from engine.kernels._triton import jit, next_power_of_2, tl

HEADS = 16  # at most, normalised by one program of head_norm_


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, x [..., d] -> x / sqrt(mean(x^2) + eps) * weight, taken in fp32 (fp64 for fp64 input).

    Written with a norm and a hypotenuse, sqrt(norm(x)^2 / d + eps): a third of the operations that a CPU has to start.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    rms = torch.linalg.vector_norm(wide, 2, -1, True).mul_(1 / math.sqrt(x.shape[-1]))
    normed = torch.div(wide, torch.hypot(rms, _constant(math.sqrt(eps), wide.dtype)))
    return normed.mul_(weight).to(x.dtype) if weight.dtype == wide.dtype else normed.to(x.dtype) * weight


@lru_cache(maxsize=16)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)


@jit
def _rms_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    total_ptr: tl.tensor,
    eps: float,
    x_stride: int,
    residual_stride: int,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH_PADDED)
    mask = columns < WIDTH
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
    dtype = x.dtype
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + row * WIDTH + columns, x, mask=mask)
    wide = x.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    normed = wide * inverse_rms
    if weight_ptr.dtype.element_ty != tl.float32:
        normed = normed.to(dtype).to(tl.float32)
    normed *= weight
    tl.store(normed_ptr + row * WIDTH + columns, normed.to(dtype), mask=mask)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    num_rows, width = x.shape
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = normed if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() > 0:
        padded = next_power_of_2(width)
        other = x if residual is None else residual
        _rms_norm_kernel[(num_rows,)](
            x, other, weight, normed, total, eps, x.stride(0), other.stride(0), WIDTH=width, WIDTH_PADDED=padded,
            ADD=residual is not None, num_warps=min(16, max(1, padded // 512)),
        )  # fmt: skip
    return normed, total


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _launch(x, None, weight, eps)[0]


def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _launch(x, residual, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension: x [T, d] (any row stride), weight [d], in x's dtype or fp32 -> [T, d].

    A weight in x's dtype multiplies what has been rounded to it (Llama's order), one in fp32 what has not (Gemma's).
    """
    return rms_norm_triton(x, weight, eps) if x.is_cuda else rms_norm_torch(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [T, d] -> (rms_norm(x + residual), x + residual)."""
    if x.is_cuda:
        return add_rms_norm_triton(x, residual, weight, eps)
    total = x + residual
    return rms_norm_torch(total, weight, eps), total


@jit
def _head_norm_kernel(
    x_ptr: tl.tensor,  # [T, n, DIM]
    weight_ptr: tl.tensor,  # [n, DIM]
    eps: float,
    num_heads: int,
    x_stride_t: int,
    x_stride_h: int,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, DIM_PADDED)
    mask = (heads < num_heads)[:, None] & (columns < DIM)[None, :]
    tile = x_ptr + token * x_stride_t + heads[:, None] * x_stride_h + columns[None, :]
    x = tl.load(tile, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(wide * wide, 1) / DIM + eps)
    weight = tl.load(weight_ptr + heads[:, None] * DIM + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    normed = (wide * inverse_rms[:, None]).to(x.dtype).to(tl.float32) * weight
    tl.store(tile, normed.to(x.dtype), mask=mask)


def head_norm_triton_(x: Tensor, weight: Tensor, eps: float) -> None:
    num_tokens, num_heads, dim = x.shape
    if x.numel() > 0:
        heads = min(HEADS, next_power_of_2(num_heads))
        _head_norm_kernel[(num_tokens, -(-num_heads // heads))](
            x, weight, eps, num_heads, x.stride(0), x.stride(1),
            DIM=dim, DIM_PADDED=next_power_of_2(dim), HEADS=heads, num_warps=1 if heads * dim <= 512 else 4,
        )  # fmt: skip


def head_norm_(x: Tensor, weight: Tensor, eps: float) -> None:
    """RMSNorm of each head in place: x [T, n, d] (any T, n strides), weight [n, d], contiguous."""
    if x.is_cuda:
        head_norm_triton_(x, weight, eps)
    else:
        x.copy_(rms_norm_torch(x, weight, eps))
