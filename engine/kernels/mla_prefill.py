"""Expanded MLA prefill: ragged queries against keys and values already projected up from the latents.

A long context is handled in pieces, each giving a partial output and its log-sum-exp; `merge_partial` joins them
exactly (arXiv 2205.14135).
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    for b, (q0, q1, k0, k1) in enumerate(bounds):
        if q1 == q0 or k1 == k0:
            continue
        keys = torch.cat((kv[k0:k1, :, :nope_dim], k_rope[k0:k1].repeat_interleave(num_heads // groups, 1)), -1)
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys).to(lse.dtype) * scale
        q_pos = q_starts[b] + torch.arange(q1 - q0, device=q.device)
        k_pos = k_starts[b] + torch.arange(k1 - k0, device=q.device)
        scores.masked_fill_(k_pos > q_pos[:, None], float("-inf"))
        part = scores.logsumexp(-1, keepdim=True)  # [H, Q, 1]
        weights = (scores - part).exp().nan_to_num(0.0).to(q.dtype)
        out[q0:q1] = torch.einsum("hqk,khd->qhd", weights, kv[k0:k1, :, nope_dim:])
        lse[q0:q1] = part[..., 0].T
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


def merge_partial_torch(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((part - lse).exp().nan_to_num(0.0)[..., None] for part in (lse_a, lse_b))
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


def merge_partial(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from its parts: out [T, H, v], lse [T, H]."""
    return merge_partial_torch(out_a, lse_a, out_b, lse_b)
