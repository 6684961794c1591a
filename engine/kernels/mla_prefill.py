"""Expanded MLA prefill: ragged queries against keys and values already projected up from the latents.

A long context is handled in pieces, each giving a partial output and its log-sum-exp; `merge_partial` joins them
exactly (arXiv 2205.14135).
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.flash_cpu import causal_attention, merge_partial_torch


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
        attended, log_sum = causal_attention(queries, keys, values, offset, scale)  # [H, 1, Q, v], [H, 1, Q]
        out[q0:q1] = attended[:, 0].transpose(0, 1)
        lse[q0:q1] = log_sum[:, 0].T
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
) -> tuple[Tensor, Tensor]:
    """Causal attention of ragged queries over ragged keys -> (out [T, H, v], lse [T, H], natural log, fp32).

    q [T, H, n + dr]; kv [S, H, n + v]; k_rope [S, G, dr], head h reads group h * G // H; cu_q, cu_k int32 [B + 1];
    query i of sequence b stands at position q_starts[b] + i, key j at k_starts[b] + j, and a query sees the keys at or
    before it. A query that sees none gives out 0 and lse -inf.
    """
    return mla_prefill_torch(q, kv, k_rope, cu_q, cu_k, q_starts, k_starts, nope_dim, scale)


def merge_partial(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from its parts: out [T, H, v], lse [T, H]."""
    return merge_partial_torch(out_a, lse_a, out_b, lse_b)
