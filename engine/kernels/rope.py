"""Rotary position embedding (arXiv 2104.09864), in place, pairs interleaved.

Checkpoints in the half-split layout are re-ordered once when they are loaded (a permutation of q and k channels alike,
which no score notices), so the kernel knows one layout.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def rope_(x: Tensor, table: Tensor) -> None:
    """Rotate x [T, n, d] in place by table [T, n or 1, d/2, 2]; x may be a slice of a wider row (any T, n strides)."""
    if x.dtype == torch.float32 and x.storage_offset() % 2 == 0 and all(s % 2 == 0 for s in x.stride()[:-1]):
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(torch.view_as_complex(table))
    else:
        rope_torch_(x, table)
