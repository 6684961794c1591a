"""From a cache ratio to a layer's sizes: latent rank r and rotated channels dr, within the budget of ratio * 2 g D.

Invariant: what is cached for a token and layer never exceeds the budget.
"""

from __future__ import annotations

import math

from convert.errors import ConversionError
from engine.spec import GQASpec

# Of the budget, where one rotated key serves all heads.
ROPE_SHARES = (1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 7 / 16, 1 / 2, 9 / 16)
ROPE_SHARES_BY_HEAD = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)  # where each KV head has its own


def split_budget(spec: GQASpec, cache_ratio: float) -> tuple[int, int]:
    """-> (r, dr) with r + dr at most cache_ratio * 2 g D, the source's cache width.

    dr is the largest of D, D/2, D/4, ... that is even and at most two thirds of the budget: RoPE on more channels
    kept more of every model measured (docs/conversion.md) than a larger rank did. The rank is rounded down to
    a power of two's multiple, 16 at most, that costs it no more than an eighth.
    """
    budget = budget_of(spec, cache_ratio)
    rope = spec.head_dim
    while rope % 4 == 0 and 3 * rope > 2 * budget:
        rope //= 2
    rank = budget - rope
    if rank < 1:
        raise _no_room(spec, cache_ratio, rope + 1)
    return rounded(rank), rope


def head_splits(spec: GQASpec, cache_ratio: float) -> list[tuple[int, int]]:
    """`split_budget`, and half of its dr with what that leaves to the latent: two (r, dr), maybe the same."""
    first = split_budget(spec, cache_ratio)
    rope = first[1] // 2 if first[1] % 4 == 0 else first[1]
    return [first, (rounded(budget_of(spec, cache_ratio) - rope), rope)]


def rope_splits(spec: GQASpec, cache_ratio: float) -> list[tuple[int, int]]:
    """-> (r, dr) with r + dr at most cache_ratio * 2 g D and dr about each of ROPE_SHARES of that.

    dr is a multiple of 16, less where it is small, and the rank is rounded as in `split_budget`.
    """
    budget = budget_of(spec, cache_ratio)
    if budget < 3:
        raise _no_room(spec, cache_ratio, 3)
    splits = []
    for share in ROPE_SHARES:
        rope = min(max(2, 2 * rounded(int(share * budget) // 2)), spec.num_kv_heads * spec.head_dim)
        splits.append((rounded(budget - rope), rope))
    return splits


def rope_splits_by_head(spec: GQASpec, cache_ratio: float) -> list[tuple[int, int]]:
    """-> (r, dr) with r + g dr at most cache_ratio * 2 g D: `rope_splits` where each KV head has a rotated key."""
    budget, groups = budget_of(spec, cache_ratio), spec.num_kv_heads
    if budget < 2 * groups + 2:
        raise _no_room(spec, cache_ratio, 2 * groups + 2)
    splits = []
    for share in ROPE_SHARES_BY_HEAD:
        room = min(spec.head_dim, (budget - 2) // groups) // 2  # pairs of a head
        rope = 2 * min(max(1, rounded(int(share * budget / groups) // 2)), room)
        splits.append((rounded(budget - groups * rope), rope))
    return splits


def budget_of(spec: GQASpec, cache_ratio: float) -> int:
    if not 0 < cache_ratio <= 1:
        raise ConversionError(f"--cache-ratio {cache_ratio:g} is out of range: it must be above 0 and at most 1")
    return int(cache_ratio * spec.cache_width + 1e-6)


def rounded(number: int) -> int:
    """Down to a multiple of 16, or of less where that would cost more than an eighth."""
    step = 16
    while step > 1 and number < 8 * step:
        step //= 2
    return number - number % step


def _no_room(spec: GQASpec, cache_ratio: float, least: int) -> ConversionError:
    ratio = math.ceil(1000 * least / spec.cache_width) / 1000
    return ConversionError(
        f"--cache-ratio {cache_ratio:g} leaves no room: this model caches {spec.cache_width} numbers per token and "
        f"layer, and the smallest ratio that works is {ratio:g}"
    )
