"""GQA decode: one query token per sequence against its cached keys and values. The baseline that MLA is measured by."""

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
from engine.kernels.tiles import gqa_decode_tile, pad


def gqa_decode_torch(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    num_kv_heads: int,
    scale: float,
    max_kv_len: int,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition, one padded gather for the batch. An empty sequence (kv_len 0) gives zeros."""
    head_dim = q.shape[2]
    rows, padding = padded_rows(cache, block_tables, kv_lens, max_kv_len, window)
    # One KV head at a time: a batch over sequences and heads together would have to copy the keys first.
    heads = rows.to(q.dtype).split(head_dim, -1)  # g of keys, then g of values, [B, S, D] each
    queries = q.unflatten(1, (num_kv_heads, -1))  # [B, g, H/g, D]
    outs = []
    for i in range(num_kv_heads):
        scores = scaled_(torch.bmm(queries[:, i], heads[i].mT), scale, softcap)  # [B, H/g, S]
        if padding is not None:
            scores.masked_fill_(padding[:, None], float("-inf"))
        outs.append(torch.bmm(torch.softmax(scores, -1), heads[num_kv_heads + i]))
    out = torch.cat(outs, 1)
    return out if padding is None else out.masked_fill_((kv_lens == 0)[:, None, None], 0)


@jit_for_any("tables_ptr", "lens_ptr", "tables_stride", "splits")
def _gqa_decode_kernel(
    q_ptr: tl.tensor,  # [B, H, DIM]
    cache_ptr: tl.tensor,  # [num_blocks, BLOCK_SIZE, 2 g DIM]
    tables_ptr: tl.tensor,  # int32 [B, max_blocks]
    lens_ptr: tl.tensor,  # int32 [B]
    out_ptr: tl.tensor,  # [B, H, splits, DIM]
    lse_ptr: tl.tensor,  # fp32 [B, H, splits], unused with one split
    factor: float,  # of base_2_scores
    num_heads: int,
    num_kv_heads: int,
    q_stride_b: int,
    q_stride_h: int,
    tables_stride: int,
    splits: int,
    WIDTH: tl.constexpr,  # 2 g DIM
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SPLIT: tl.constexpr,  # whether into more than one
    STAGES: tl.constexpr,
) -> None:
    TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS  # programs per KV head
    split, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(0) // TILES
    in_group = tl.program_id(0) % TILES * HEADS + tl.arange(0, HEADS)
    head_mask = in_group < GROUP
    heads = kv_head * GROUP + in_group
    q = load_columns(q_ptr + b * q_stride_b + heads * q_stride_h, head_mask, 0, DIM_PADDED, DIM)
    acc = tl.zeros([HEADS, DIM_PADDED], tl.float32)
    peak, total = softmax_start(HEADS)
    kv_len = tl.load(lens_ptr + b)
    first, last = split_range(kv_len, split, splits, TOKENS, WINDOW)
    table_ptr = tables_ptr + b * tables_stride
    keys_ptr = cache_ptr + kv_head * DIM
    blocks = block_numbers(table_ptr, first * TOKENS, kv_len, TOKENS, BLOCK_SIZE)

    for tile in tl.range(first, last, num_stages=STAGES):
        start = tile * TOKENS
        positions = start + tl.arange(0, TOKENS)
        valid = positions < kv_len
        if WINDOW > 0:
            valid = valid & (positions >= kv_len - WINDOW)
        rows = cache_rows(keys_ptr, blocks, start, WIDTH, TOKENS, BLOCK_SIZE)
        blocks = block_numbers(table_ptr, start + TOKENS, kv_len, TOKENS, BLOCK_SIZE)
        keys = load_columns(rows, valid, 0, DIM_PADDED, DIM)
        values = load_columns(rows + num_kv_heads * DIM, valid, 0, DIM_PADDED, DIM)
        scores = tl.dot(q, keys.T, input_precision="ieee")
        scores = tl.where(valid[None, :], base_2_scores(scores, factor, CAP), float("-inf"))
        weights, rescale, peak, total = softmax_step(scores, peak, total)
        acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee")

    inverse, lse = softmax_end(peak, total)
    results = (b * num_heads + heads) * splits + split
    written = head_mask
    if SPLIT:
        tl.store(lse_ptr + results, lse, mask=head_mask)
        written = head_mask & (total > 0)
    store_columns(out_ptr + results * DIM, written, acc * inverse[:, None], 0, DIM_PADDED, DIM)


def gqa_decode_triton(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    num_kv_heads: int,
    scale: float,
    max_kv_len: int,
    window: int | None = None,
    softcap: float | None = None,
    splits: int | None = None,
) -> Tensor:
    """As `gqa_decode`; `splits` is chosen from the shapes where it is None."""
    batch, num_heads, dim = q.shape
    group = num_heads // num_kv_heads
    tile = gqa_decode_tile(dim, group, q.element_size())
    programs = num_kv_heads * -(-group // tile.rows)
    splits = splits or num_splits(batch * programs, max_kv_len, window, q.device)
    out = torch.empty(batch, num_heads, dim, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    partial, lse = partial_results(out, splits)
    factor, cap = score_factors(scale, softcap)
    _gqa_decode_kernel[(programs, splits, batch)](
        q, cache, block_tables, kv_lens, partial, lse, factor, num_heads, num_kv_heads,
        q.stride(0), q.stride(1), block_tables.stride(0), splits,
        WIDTH=cache.shape[2], DIM=dim, DIM_PADDED=pad(dim), GROUP=group, BLOCK_SIZE=cache.shape[1],
        HEADS=tile.rows, TOKENS=tile.tokens, WINDOW=window or 0, CAP=cap, SPLIT=splits > 1, STAGES=tile.stages,
        num_warps=tile.warps,
    )  # fmt: skip
    return combine(partial, lse, out)


def gqa_decode(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    num_kv_heads: int,
    scale: float,
    max_kv_len: int,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """q [B, H, D] -> [B, H, D]; cache [num_blocks, block_size, 2 g D] of rows [keys | values]; head h reads h*g//H.

    block_tables int32 [B, max_blocks]; kv_lens int32 [B]; max_kv_len == max(kv_lens), on the host.
    `window`: how many tokens a query sees, itself among them; no others are read. `softcap` c: c tanh(score / c).
    """
    implementation = gqa_decode_triton if q.is_cuda else gqa_decode_torch
    return implementation(q, cache, block_tables, kv_lens, num_kv_heads, scale, max_kv_len, window, softcap)
