"""Expanded MLA prefill: ragged queries against keys and values already projected up from the latents.

A long context is handled in pieces, each giving a partial output and its log-sum-exp; `merge_partial` joins them
exactly (arXiv 2205.14135).
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels._triton import jit, jit_for_any, next_power_of_2, tl
from engine.kernels.attention_parts import (
    base_2_scores,
    find_tile,
    load_columns,
    padded_count,
    score_factors,
    softmax_end,
    softmax_start,
    softmax_step,
    store_columns,
)
from engine.kernels.flash_cpu import causal_attention, merge_partial_torch
from engine.kernels.tiles import pad, prefill_tile


def mla_prefill_torch(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    nope_dim: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one sequence at a time."""
    num_heads, groups = q.shape[1], k_rope.shape[1]
    out = q.new_zeros(q.shape[0], num_heads, kv.shape[2] - nope_dim)
    lse = q.new_full((q.shape[0], num_heads), float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
    bounds = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
    offsets = (q_starts - k_starts).tolist()
    for (q0, q1, k0, k1), offset in zip(bounds, offsets, strict=True):
        if q1 == q0 or k1 == k0:
            continue
        keys = torch.cat((kv[k0:k1, :, :nope_dim], k_rope[k0:k1].repeat_interleave(num_heads // groups, 1)), -1)
        queries, keys, values = (x.transpose(0, 1)[:, None] for x in (q[q0:q1], keys, kv[k0:k1, :, nope_dim:]))
        attended, log_sum = causal_attention(queries, keys, values, offset, scale, window, softcap)  # [H, 1, Q, *]
        out[q0:q1] = attended[:, 0].transpose(0, 1)
        lse[q0:q1] = log_sum[:, 0].T
    return out, lse


@jit_for_any("cu_q_ptr", "cu_k_ptr", "q_starts_ptr", "k_starts_ptr", "num_seqs")
def _mla_prefill_kernel(
    q_ptr: tl.tensor,  # [T, H, NOPE + ROPE]
    kv_ptr: tl.tensor,  # [S, H, NOPE + VALUE]
    k_rope_ptr: tl.tensor,  # [S, G, ROPE]
    cu_q_ptr: tl.tensor,  # int32 [B + 1]
    cu_k_ptr: tl.tensor,  # int32 [B + 1]
    q_starts_ptr: tl.tensor,  # int32 [B]
    k_starts_ptr: tl.tensor,  # int32 [B]
    out_ptr: tl.tensor,  # [T, H, VALUE]
    lse_ptr: tl.tensor,  # fp32 [T, H]
    factor: float,  # of base_2_scores
    num_seqs: int,
    num_heads: int,
    num_groups: int,
    q_stride_t: int,
    q_stride_h: int,
    kv_stride_s: int,
    kv_stride_h: int,
    k_rope_stride_s: int,
    k_rope_stride_g: int,
    NOPE: tl.constexpr,
    NOPE_PADDED: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_PADDED: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    SEQS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    head = tl.program_id(1)
    b, first_row = find_tile(cu_q_ptr, tl.program_id(0), num_seqs, ROWS, SEQS)
    if b >= num_seqs:
        return
    q_begin, q_end = tl.load(cu_q_ptr + b), tl.load(cu_q_ptr + b + 1)
    k_begin, k_end = tl.load(cu_k_ptr + b), tl.load(cu_k_ptr + b + 1)
    ahead = tl.load(q_starts_ptr + b) - tl.load(k_starts_ptr + b)  # query i sees the keys up to number ahead + i
    in_seq = first_row + tl.arange(0, ROWS)
    row_mask = in_seq < q_end - q_begin
    tokens = (q_begin + in_seq).to(tl.int64)
    q_rows = q_ptr + tokens * q_stride_t + head * q_stride_h
    if NOPE > 0:
        q_nope = load_columns(q_rows, row_mask, 0, NOPE_PADDED, NOPE)
    if ROPE > 0:
        q_rope = load_columns(q_rows + NOPE, row_mask, 0, ROPE_PADDED, ROPE)
    acc = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    peak, total = softmax_start(ROWS)
    kv_head_ptr = kv_ptr + head * kv_stride_h
    k_group_ptr = k_rope_ptr + head * num_groups // num_heads * k_rope_stride_g
    seen = tl.minimum(tl.maximum(ahead + first_row + ROWS, 0), k_end - k_begin)  # by any row of this tile
    first = 0
    if WINDOW > 0:
        first = tl.maximum(ahead + first_row + 1 - WINDOW, 0) // TOKENS

    for tile in tl.range(first, tl.cdiv(seen, TOKENS), num_stages=STAGES):
        keys = tile * TOKENS + tl.arange(0, TOKENS)
        valid = keys < k_end - k_begin
        visible = valid[None, :] & (keys[None, :] <= ahead + in_seq[:, None])
        if WINDOW > 0:
            visible = visible & (keys[None, :] > ahead + in_seq[:, None] - WINDOW)
        slots = (k_begin + keys).to(tl.int64)
        kv_rows = kv_head_ptr + slots * kv_stride_s
        scores = tl.zeros([ROWS, TOKENS], tl.float32)
        if NOPE > 0:
            k_nope = load_columns(kv_rows, valid, 0, NOPE_PADDED, NOPE)
            scores = tl.dot(q_nope, k_nope.T, scores, input_precision="ieee")
        if ROPE > 0:
            k_rope = load_columns(k_group_ptr + slots * k_rope_stride_s, valid, 0, ROPE_PADDED, ROPE)
            scores = tl.dot(q_rope, k_rope.T, scores, input_precision="ieee")
        values = load_columns(kv_rows + NOPE, valid, 0, VALUE_PADDED, VALUE)
        scores = tl.where(visible, base_2_scores(scores, factor, CAP), float("-inf"))
        weights, rescale, peak, total = softmax_step(scores, peak, total)
        acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee")

    inverse, lse = softmax_end(peak, total)
    results = tokens * num_heads + head
    tl.store(lse_ptr + results, lse * 0.6931471805599453, mask=row_mask)  # ln 2
    store_columns(out_ptr + results * VALUE, row_mask, acc * inverse[:, None], 0, VALUE_PADDED, VALUE)


def mla_prefill_triton(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    nope_dim: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, key_dim = q.shape
    num_seqs = q_starts.shape[0]
    rope_dim, value_dim = key_dim - nope_dim, kv.shape[2] - nope_dim
    tile = prefill_tile(pad(nope_dim) + pad(rope_dim), pad(value_dim), q.element_size())
    out = torch.empty(num_tokens, num_heads, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    factor, cap = score_factors(scale, softcap)
    _mla_prefill_kernel[(-(-num_tokens // tile.rows) + num_seqs, num_heads)](
        q, kv, k_rope, cu_q, cu_k, q_starts, k_starts, out, lse, factor, num_seqs, num_heads, k_rope.shape[1],
        q.stride(0), q.stride(1), kv.stride(0), kv.stride(1), k_rope.stride(0), k_rope.stride(1),
        NOPE=nope_dim, NOPE_PADDED=pad(nope_dim), ROPE=rope_dim, ROPE_PADDED=pad(rope_dim),
        VALUE=value_dim, VALUE_PADDED=pad(value_dim), SEQS=padded_count(num_seqs),
        ROWS=tile.rows, TOKENS=tile.tokens, WINDOW=window or 0, CAP=cap, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out, lse


def mla_prefill(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    nope_dim: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of ragged queries over ragged keys -> (out [T, H, v], lse [T, H], natural log, fp32).

    q [T, H, n + dr]; kv [S, H, n + v]; k_rope [S, G, dr], head h reads group h * G // H; cu_q, cu_k int32 [B + 1];
    query i of sequence b stands at position q_starts[b] + i, key j at k_starts[b] + j, and a query sees the keys at or
    before it, with a `window` only those of the last so many positions, its own among them. A query that sees none
    gives out 0 and lse -inf. `softcap` c: scores become c tanh(score / c).
    """
    implementation = mla_prefill_triton if q.is_cuda else mla_prefill_torch
    return implementation(q, kv, k_rope, cu_q, cu_k, q_starts, k_starts, nope_dim, scale, window, softcap)


@jit
def _merge_kernel(
    out_a_ptr: tl.tensor,
    lse_a_ptr: tl.tensor,
    out_b_ptr: tl.tensor,
    lse_b_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    VALUE: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    lse_a, lse_b = tl.load(lse_a_ptr + row), tl.load(lse_b_ptr + row)
    peak = tl.maximum(tl.maximum(lse_a, lse_b), -1e30)
    weight_a, weight_b = tl.exp(lse_a - peak), tl.exp(lse_b - peak)
    total = weight_a + weight_b
    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    tl.store(lse_ptr + row, tl.where(seen, peak + tl.log(safe), float("-inf")))
    columns = tl.arange(0, VALUE_PADDED)
    mask = columns < VALUE
    a = tl.load(out_a_ptr + row * VALUE + columns, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(out_b_ptr + row * VALUE + columns, mask=mask, other=0.0).to(tl.float32)
    merged = (a * weight_a + b * weight_b) / safe
    tl.store(out_ptr + row * VALUE + columns, merged.to(out_ptr.dtype.element_ty), mask=mask)


def merge_partial_triton(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=lse_a.dtype, device=lse_a.device)
    if out.numel() > 0:
        parts = (part.contiguous() for part in (out_a, lse_a, out_b, lse_b))
        value_dim = out.shape[2]
        _merge_kernel[(lse.numel(),)](
            *parts, out, lse, VALUE=value_dim, VALUE_PADDED=next_power_of_2(value_dim), num_warps=1
        )
    return out, lse


def merge_partial(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from its parts: out [T, H, v], lse [T, H]."""
    implementation = merge_partial_triton if out_a.is_cuda else merge_partial_torch
    return implementation(out_a, lse_a, out_b, lse_b)
