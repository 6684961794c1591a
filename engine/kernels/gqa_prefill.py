"""GQA prefill: ragged query chunks against the block cache, which already holds the chunk's own keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels._triton import jit_for_any, tl
from engine.kernels.attention_parts import (
    base_2_scores,
    block_numbers,
    cache_rows,
    find_tile,
    load_columns,
    padded_count,
    score_factors,
    softmax_end,
    softmax_start,
    softmax_step,
    store_columns,
)
from engine.kernels.flash_cpu import causal_attention
from engine.kernels.tiles import pad, prefill_tile


def gqa_prefill_torch(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    cu_q: Tensor,
    kv_lens: Tensor,
    num_kv_heads: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition, one sequence at a time."""
    head_dim = q.shape[2]
    block_size = cache.shape[1]
    out = torch.zeros_like(q)
    starts = cu_q.tolist()
    for b, kv_len in enumerate(kv_lens.tolist()):
        q0, q1 = starts[b], starts[b + 1]
        if q1 == q0:
            continue
        offset = kv_len - (q1 - q0)
        before = 0 if window is None else max(0, offset + 1 - window) // block_size  # blocks that no query sees
        blocks = block_tables[b, before : -(-kv_len // block_size)].long()
        rows = cache[blocks].flatten(0, 1)[: kv_len - before * block_size].to(q.dtype)
        keys, values = rows.unflatten(-1, (2, num_kv_heads, head_dim)).permute(1, 2, 0, 3)[:, :, None]  # [g, 1, S, D]
        queries = q[q0:q1].unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)  # [g, H/g, Q, D]
        attended, _ = causal_attention(queries, keys, values, offset - before * block_size, scale, window, softcap)
        out[q0:q1] = attended.permute(2, 0, 1, 3).flatten(1, 2)
    return out


@jit_for_any("tables_ptr", "cu_q_ptr", "lens_ptr", "num_seqs", "tables_stride")
def _gqa_prefill_kernel(
    q_ptr: tl.tensor,  # [T, H, DIM]
    cache_ptr: tl.tensor,  # [num_blocks, BLOCK_SIZE, 2 g DIM]
    tables_ptr: tl.tensor,  # int32 [B, max_blocks]
    cu_q_ptr: tl.tensor,  # int32 [B + 1]
    lens_ptr: tl.tensor,  # int32 [B]
    out_ptr: tl.tensor,  # [T, H, DIM]
    factor: float,  # of base_2_scores
    num_seqs: int,
    num_heads: int,
    num_kv_heads: int,
    q_stride_t: int,
    q_stride_h: int,
    tables_stride: int,
    WIDTH: tl.constexpr,  # 2 g DIM
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    SEQS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    head = tl.program_id(1)
    kv_head = head * num_kv_heads // num_heads
    b, first_row = find_tile(cu_q_ptr, tl.program_id(0), num_seqs, ROWS, SEQS)
    if b >= num_seqs:
        return
    q_begin, q_end = tl.load(cu_q_ptr + b), tl.load(cu_q_ptr + b + 1)
    kv_len = tl.load(lens_ptr + b)
    in_seq = first_row + tl.arange(0, ROWS)
    row_mask = in_seq < q_end - q_begin
    q_positions = kv_len - (q_end - q_begin) + in_seq
    tokens = (q_begin + in_seq).to(tl.int64)
    q = load_columns(q_ptr + tokens * q_stride_t + head * q_stride_h, row_mask, 0, DIM_PADDED, DIM)
    acc = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    peak, total = softmax_start(ROWS)
    table_ptr = tables_ptr + b.to(tl.int64) * tables_stride
    keys_ptr = cache_ptr + kv_head * DIM
    seen = tl.minimum(kv_len - (q_end - q_begin) + first_row + ROWS, kv_len)  # by any row of this tile
    first = 0
    if WINDOW > 0:
        first_seen = kv_len - (q_end - q_begin) + first_row + 1 - WINDOW  # by the first row
        first = tl.maximum(first_seen, 0) // TOKENS
    blocks = block_numbers(table_ptr, first * TOKENS, kv_len, TOKENS, BLOCK_SIZE)

    for tile in tl.range(first, tl.cdiv(seen, TOKENS), num_stages=STAGES):
        start = tile * TOKENS
        positions = start + tl.arange(0, TOKENS)
        valid = positions < kv_len
        if WINDOW > 0:
            valid = valid & (positions >= first_seen)
        visible = valid[None, :] & (positions[None, :] <= q_positions[:, None])
        if WINDOW > 0:
            visible = visible & (positions[None, :] > q_positions[:, None] - WINDOW)
        rows = cache_rows(keys_ptr, blocks, start, WIDTH, TOKENS, BLOCK_SIZE)
        blocks = block_numbers(table_ptr, start + TOKENS, kv_len, TOKENS, BLOCK_SIZE)
        keys = load_columns(rows, valid, 0, DIM_PADDED, DIM)
        values = load_columns(rows + num_kv_heads * DIM, valid, 0, DIM_PADDED, DIM)
        scores = tl.dot(q, keys.T, input_precision="ieee")
        scores = tl.where(visible, base_2_scores(scores, factor, CAP), float("-inf"))
        weights, rescale, peak, total = softmax_step(scores, peak, total)
        acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee")

    inverse, _ = softmax_end(peak, total)
    out_rows = out_ptr + (tokens * num_heads + head) * DIM
    store_columns(out_rows, row_mask, acc * inverse[:, None], 0, DIM_PADDED, DIM)


def gqa_prefill_triton(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    cu_q: Tensor,
    kv_lens: Tensor,
    num_kv_heads: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    num_tokens, num_heads, dim = q.shape
    num_seqs = kv_lens.shape[0]
    tile = prefill_tile(pad(dim), pad(dim), q.element_size())
    out = torch.empty(num_tokens, num_heads, dim, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    factor, cap = score_factors(scale, softcap)
    _gqa_prefill_kernel[(-(-num_tokens // tile.rows) + num_seqs, num_heads)](
        q, cache, block_tables, cu_q, kv_lens, out, factor, num_seqs, num_heads, num_kv_heads,
        q.stride(0), q.stride(1), block_tables.stride(0),
        WIDTH=cache.shape[2], DIM=dim, DIM_PADDED=pad(dim), SEQS=padded_count(num_seqs), BLOCK_SIZE=cache.shape[1],
        ROWS=tile.rows, TOKENS=tile.tokens, WINDOW=window or 0, CAP=cap, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out


def gqa_prefill(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    cu_q: Tensor,
    kv_lens: Tensor,
    num_kv_heads: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of ragged queries: q [T, H, D] -> [T, H, D].

    cu_q int32 [B + 1]; the queries of sequence b are the last cu_q[b+1] - cu_q[b] of its kv_lens[b] tokens. cache
    [num_blocks, block_size, 2 g D], a row being [keys | values]; block_tables int32 [B, max_blocks].
    `window`: how many tokens a query sees, itself among them; no others are read. `softcap` c: c tanh(score / c).
    """
    implementation = gqa_prefill_triton if q.is_cuda else gqa_prefill_torch
    return implementation(q, cache, block_tables, cu_q, kv_lens, num_kv_heads, scale, window, softcap)
