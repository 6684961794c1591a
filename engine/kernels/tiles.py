"""Tile sizes of the attention kernels, in one place: a pure function of the shapes for each.

They are those that compile for sm_80 and sm_90 without a spilled register and within 160 KB of shared memory
(`bench/kernels_aot.py` checks it); no run on a GPU has chosen among them yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.kernels._triton import next_power_of_2

SHARED_BYTES = 160 * 1024  # of the 163 KB a program may have on sm_80; sm_90 has 227 KB


@dataclass(frozen=True)
class Tile:
    rows: int  # query rows (heads, or tokens of one head) of a program
    tokens: int  # cached tokens per step of its loop
    warps: int
    stages: int  # of the loop's software pipeline


def pad(width: int) -> int:
    """Columns of the single block that holds `width` columns: a power of two, at least 16; none for none."""
    return max(16, next_power_of_2(width)) if width else 0


def power_of_2_chunks(width: int, most: int) -> tuple[int, ...]:
    """At most `most` (2 or more) powers of two, each at least 16, that cover `width` columns, widest first; then zeros.

    A width that is no power of two is split (448 = 256 + 128 + 64) instead of padded to 512, unless that saves nothing;
    512 and more are halved, which takes fewer registers.
    """
    chunks: list[int] = []
    rest = width
    while rest > 0 and len(chunks) < most - 1:
        chunks.append(max(16, 1 << (rest.bit_length() - 1)))
        rest -= chunks[-1]
    if rest > 0:
        chunks.append(max(16, next_power_of_2(rest)))
    whole = pad(width)
    if sum(chunks) >= whole:
        chunks = [whole // 2, whole // 2] if whole >= 512 else [whole]
    return *chunks, *[0] * (most - len(chunks))


def _first_that_fits(tiles: list[Tile], fixed: int, per_token: int) -> Tile:
    """The first tile whose shared memory, `fixed` bytes per row and stages * `per_token` bytes per token, suffices.

    A loop of s stages keeps s - 1 tiles in flight on sm_80 and as many as s on sm_90: counted as s.
    """
    for tile in tiles:
        if tile.rows * fixed + tile.stages * tile.tokens * per_token <= SHARED_BYTES:
            return tile
    return tiles[-1]


def mla_decode_tile(rank: int, rope: int, heads: int, element_size: int) -> Tile:
    """Up to 16 or 32 heads mma.sync in tiles of that many; more in tiles of 64, which wgmma takes (sm_90)."""
    chunks = power_of_2_chunks(rank, 3)
    width = sum(chunks) + sum(power_of_2_chunks(rope, 2))
    if heads <= 16:
        rows, warps, tokens = 16, 4, 32
    elif heads <= 32 or chunks[2]:  # three accumulators of 64 rows spill
        rows, warps, tokens = 32, 4 if rank <= 192 else 8, 64 if rank <= 192 else 32
    else:
        rows, warps, tokens = 64, 8, 32
    tiles = [Tile(rows, tokens, warps, 3), Tile(rows, 32, warps, 2), Tile(rows, 16, warps, 2), Tile(16, 16, 8, 2)]
    return _first_that_fits(tiles, width * element_size, width * element_size)


def gqa_decode_tile(head_dim: int, group: int, element_size: int) -> Tile:
    """`group` query heads share a KV head."""
    width = pad(head_dim) * element_size
    rows = 16 if group <= 16 else 32
    return _first_that_fits([Tile(rows, 64, 4, 3), Tile(rows, 32, 4, 2), Tile(16, 16, 4, 2)], width, 2 * width)


def prefill_tile(key_dim: int, value_dim: int, element_size: int) -> Tile:
    """For keys of `key_dim` and values of `value_dim` channels, padding included."""
    wide = [Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(16, 16, 4, 2)]  # for values wider than 128, and for fp32
    tiles = [Tile(128, 64 if value_dim <= 64 else 32, 8, 3), *wide] if value_dim <= 128 else wide
    return _first_that_fits(tiles, key_dim * element_size, (key_dim + value_dim) * element_size)
