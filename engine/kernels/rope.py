"""Rotary position embedding (arXiv 2104.09864), in place, pairs interleaved.

Checkpoints in the half-split layout are re-ordered once when they are loaded (a permutation of q and k channels alike,
which no score notices), so the kernel knows one layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels._triton import jit, next_power_of_2, tl

HEADS = 16  # at most, rotated by one program


def rope_table(positions: Tensor, inv_freq: Tensor, scale: float = 1.0) -> Tensor:
    """positions int64 [T], inv_freq float64 [n, d/2] -> float32 [T, n, d/2, 2] of (cos, sin).

    Angles are taken in fp64: at position 100,000 an fp32 product is off by 0.004 rad.
    """
    angle = positions.to(torch.float64)[:, None, None] * inv_freq
    return torch.stack((angle.cos(), angle.sin()), -1).mul_(scale).float()


def rope_torch_(x: Tensor, table: Tensor) -> None:
    """The definition: (a, b) -> (a cos - b sin, a sin + b cos) for every pair, in the table's precision."""
    pairs = x.unflatten(-1, (-1, 2)).to(torch.promote_types(x.dtype, table.dtype))
    a, b = pairs.unbind(-1)
    cos, sin = table.to(pairs.dtype).unbind(-1)
    x.copy_(torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2))


@jit
def _rope_kernel(
    x_ptr: tl.tensor,  # [T, n, PAIRS, 2]
    table_ptr: tl.tensor,  # fp32 [T, n or 1, PAIRS, 2]
    num_heads: int,
    x_stride_t: int,
    x_stride_h: int,
    table_stride_t: int,
    table_stride_h: int,
    PAIRS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, 2 * PAIRS_PADDED)
    mask = (heads < num_heads)[:, None] & (columns < 2 * PAIRS)[None, :]
    x_tile = x_ptr + token * x_stride_t + heads[:, None] * x_stride_h + columns[None, :]
    table_tile = table_ptr + token * table_stride_t + heads[:, None] * table_stride_h + columns[None, :]
    x = tl.load(x_tile, mask=mask, other=0.0)
    turns = tl.load(table_tile, mask=mask, other=0.0)
    a, b = tl.split(tl.reshape(x.to(tl.float32), [HEADS, PAIRS_PADDED, 2]))
    cos, sin = tl.split(tl.reshape(turns, [HEADS, PAIRS_PADDED, 2]))
    rotated = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [HEADS, 2 * PAIRS_PADDED])
    tl.store(x_tile, rotated.to(x.dtype), mask=mask)


def rope_triton_(x: Tensor, table: Tensor) -> None:
    num_tokens, num_heads, dim = x.shape
    if x.numel() > 0:
        heads = min(HEADS, next_power_of_2(num_heads))
        table_stride_h = table.stride(1) if table.shape[1] > 1 else 0
        _rope_kernel[(num_tokens, -(-num_heads // heads))](
            x, table, num_heads, x.stride(0), x.stride(1), table.stride(0), table_stride_h,
            PAIRS=dim // 2, PAIRS_PADDED=next_power_of_2(dim // 2), HEADS=heads,
            num_warps=1 if heads * dim <= 512 else 4,
        )  # fmt: skip


def rope_(x: Tensor, table: Tensor) -> None:
    """Rotate x [T, n, d] in place by table [T, n or 1, d/2, 2]; x may be a slice of a wider row (any T, n strides)."""
    if x.is_cuda:
        rope_triton_(x, table)
    elif x.dtype == torch.float32 and x.storage_offset() % 2 == 0 and all(s % 2 == 0 for s in x.stride()[:-1]):
        torch.view_as_complex(x.view(*x.shape[:2], -1, 2)).mul_(torch.view_as_complex(table))
    else:
        rope_torch_(x, table)
