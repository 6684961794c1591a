"""Absorbed MLA decode: one query token per sequence against its cached latents, which serve as keys and as values."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels._triton import jit_for_any, tl
from engine.kernels.attention_parts import (
    base_2_scores,
    block_numbers,
    cache_rows,
    load_columns,
    score_factors,
    softmax_end,
    softmax_start,
    softmax_step,
    store_columns,
)
from engine.kernels.cache import padded_rows
from engine.kernels.flash_cpu import scaled_
from engine.kernels.split_kv import combine, num_splits, partial_results, split_range
from engine.kernels.tiles import mla_decode_tile, power_of_2_chunks


def mla_decode_torch(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    rank: int,
    scale: float,
    max_kv_len: int,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition, one padded gather for the batch. An empty sequence (kv_len 0) gives zeros."""
    rows, padding = padded_rows(cache, block_tables, kv_lens, max_kv_len, window)
    rows = rows if rows.dtype == q.dtype else rows.to(q.dtype)
    scores = scaled_(torch.bmm(q, rows.mT), scale, softcap)  # [B, H, S]
    if padding is None:
        return torch.bmm(torch.softmax(scores, -1), rows[:, :, :rank])
    out = torch.bmm(torch.softmax(scores.masked_fill_(padding[:, None], float("-inf")), -1), rows[:, :, :rank])
    return out.masked_fill_((kv_lens == 0)[:, None, None], 0)


@jit_for_any("tables_ptr", "lens_ptr", "tables_stride", "splits")
def _mla_decode_kernel(
    q_ptr: tl.tensor,  # [B, H, RANK + ROPE]
    cache_ptr: tl.tensor,  # [num_blocks, BLOCK_SIZE, RANK + ROPE]
    tables_ptr: tl.tensor,  # int32 [B, max_blocks]
    lens_ptr: tl.tensor,  # int32 [B]
    out_ptr: tl.tensor,  # [B, H, splits, RANK]
    lse_ptr: tl.tensor,  # fp32 [B, H, splits], unused with one split
    factor: float,  # of base_2_scores
    num_heads: int,
    q_stride_b: int,
    q_stride_h: int,
    tables_stride: int,
    splits: int,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    R0: tl.constexpr,  # the latent's columns in power-of-two chunks, each a tensor of its own
    R1: tl.constexpr,
    R2: tl.constexpr,
    D0: tl.constexpr,  # the rope keys' columns likewise
    D1: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SPLIT: tl.constexpr,  # whether into more than one
    STAGES: tl.constexpr,
) -> None:
    WIDTH: tl.constexpr = RANK + ROPE
    split, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    head_mask = heads < num_heads
    q_rows = q_ptr + b * q_stride_b + heads * q_stride_h
    q0 = load_columns(q_rows, head_mask, 0, R0, RANK)
    acc0 = tl.zeros([HEADS, R0], tl.float32)
    if R1 > 0:
        q1 = load_columns(q_rows, head_mask, R0, R1, RANK)
        acc1 = tl.zeros([HEADS, R1], tl.float32)
    if R2 > 0:
        q2 = load_columns(q_rows, head_mask, R0 + R1, R2, RANK)
        acc2 = tl.zeros([HEADS, R2], tl.float32)
    if D0 > 0:
        q_rope0 = load_columns(q_rows, head_mask, RANK, D0, WIDTH)
    if D1 > 0:
        q_rope1 = load_columns(q_rows, head_mask, RANK + D0, D1, WIDTH)
    peak, total = softmax_start(HEADS)
    kv_len = tl.load(lens_ptr + b)
    first, last = split_range(kv_len, split, splits, TOKENS, WINDOW)

    table_ptr = tables_ptr + b * tables_stride
    blocks = block_numbers(table_ptr, first * TOKENS, kv_len, TOKENS, BLOCK_SIZE)
    for tile in tl.range(first, last, num_stages=STAGES):
        start = tile * TOKENS
        positions = start + tl.arange(0, TOKENS)
        valid = positions < kv_len
        if WINDOW > 0:
            valid = valid & (positions >= kv_len - WINDOW)
        rows = cache_rows(cache_ptr, blocks, start, WIDTH, TOKENS, BLOCK_SIZE)
        blocks = block_numbers(table_ptr, start + TOKENS, kv_len, TOKENS, BLOCK_SIZE)
        c0 = load_columns(rows, valid, 0, R0, RANK)  # key (transposed) and value in one read
        scores = tl.dot(q0, c0.T, input_precision="ieee")
        if R1 > 0:
            c1 = load_columns(rows, valid, R0, R1, RANK)
            scores = tl.dot(q1, c1.T, scores, input_precision="ieee")
        if R2 > 0:
            c2 = load_columns(rows, valid, R0 + R1, R2, RANK)
            scores = tl.dot(q2, c2.T, scores, input_precision="ieee")
        if D0 > 0:
            scores = tl.dot(q_rope0, load_columns(rows, valid, RANK, D0, WIDTH).T, scores, input_precision="ieee")
        if D1 > 0:
            scores = tl.dot(q_rope1, load_columns(rows, valid, RANK + D0, D1, WIDTH).T, scores, input_precision="ieee")
        scores = tl.where(valid[None, :], base_2_scores(scores, factor, CAP), float("-inf"))
        weights, rescale, peak, total = softmax_step(scores, peak, total)
        weights = weights.to(c0.dtype)
        acc0 = tl.dot(weights, c0, acc0 * rescale[:, None], input_precision="ieee")
        if R1 > 0:
            acc1 = tl.dot(weights, c1, acc1 * rescale[:, None], input_precision="ieee")
        if R2 > 0:
            acc2 = tl.dot(weights, c2, acc2 * rescale[:, None], input_precision="ieee")

    inverse, lse = softmax_end(peak, total)
    results = (b * num_heads + heads) * splits + split
    written = head_mask
    if SPLIT:
        tl.store(lse_ptr + results, lse, mask=head_mask)
        written = head_mask & (total > 0)
    out_rows = out_ptr + results * RANK
    store_columns(out_rows, written, acc0 * inverse[:, None], 0, R0, RANK)
    if R1 > 0:
        store_columns(out_rows, written, acc1 * inverse[:, None], R0, R1, RANK)
    if R2 > 0:
        store_columns(out_rows, written, acc2 * inverse[:, None], R0 + R1, R2, RANK)


def mla_decode_triton(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    rank: int,
    scale: float,
    max_kv_len: int,
    window: int | None = None,
    softcap: float | None = None,
    splits: int | None = None,
) -> Tensor:
    """As `mla_decode`; `splits` is chosen from the shapes where it is None."""
    batch, num_heads, width = q.shape
    tile = mla_decode_tile(rank, width - rank, num_heads, q.element_size())
    head_blocks = -(-num_heads // tile.rows)
    splits = splits or num_splits(batch * head_blocks, max_kv_len, window, q.device)
    out = torch.empty(batch, num_heads, rank, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    partial, lse = partial_results(out, splits)
    factor, cap = score_factors(scale, softcap)
    r0, r1, r2 = power_of_2_chunks(rank, 3)
    d0, d1 = power_of_2_chunks(width - rank, 2)
    _mla_decode_kernel[(head_blocks, splits, batch)](
        q, cache, block_tables, kv_lens, partial, lse, factor, num_heads,
        q.stride(0), q.stride(1), block_tables.stride(0), splits,
        RANK=rank, ROPE=width - rank, R0=r0, R1=r1, R2=r2, D0=d0, D1=d1, BLOCK_SIZE=cache.shape[1],
        HEADS=tile.rows, TOKENS=tile.tokens, WINDOW=window or 0, CAP=cap, SPLIT=splits > 1, STAGES=tile.stages,
        num_warps=tile.warps,
    )  # fmt: skip
    return combine(partial, lse, out)


def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    rank: int,
    scale: float,
    max_kv_len: int,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """q [B, H, r + dr] -> [B, H, r]: softmax(scale * q . row) weighted sum of the rows' first `rank` channels.

    cache [num_blocks, block_size, r + dr]; block_tables int32 [B, max_blocks] (entries past a sequence's last block are
    never read as tokens, but must be valid block numbers); kv_lens int32 [B]; max_kv_len == max(kv_lens), on the host.
    `window`: how many tokens a query sees, itself among them; no others are read. `softcap` c: c tanh(score / c).
    """
    implementation = mla_decode_triton if q.is_cuda else mla_decode_torch
    return implementation(q, cache, block_tables, kv_lens, rank, scale, max_kv_len, window, softcap)
