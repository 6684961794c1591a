"""Causal attention of one sequence on a CPU: torch's own blockwise kernel, with the log-sum-exp it keeps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor, offset: int, scale: float) -> tuple[Tensor, Tensor]:
    """Query i sees keys 0 .. i + offset -> (out [g, m, Q, dv], lse [g, m, Q], natural log); Q, S >= 1.

    q [g, m, Q, d], k [g, 1, S, d], v [g, 1, S, dv]: m query heads share a key head. A query that sees nothing (offset
    below 0) gives 0 and -inf. Keys that every query sees are attended to without a mask, the rest causally, and the two
    parts join by log-sum-exp, so no [Q, S] mask is ever made.
    """
    groups, shared, num_queries, _ = q.shape
    blind, common = max(0, -offset), min(max(0, offset), k.shape[2])
    if blind >= num_queries:
        return q.new_zeros(groups, shared, num_queries, v.shape[3]), q.new_full(q.shape[:3], float("-inf"))
    seeing = q[:, :, blind:]
    pieces = [(0, common, False), (common, k.shape[2], True)]
    parts = [
        _flash(seeing, k[:, :, start:end], v[:, :, start:end], causal, scale)
        for start, end, causal in pieces
        if end > start
    ]
    out, lse = parts[0] if len(parts) == 1 else merge_partial_torch(*parts[0], *parts[1])
    return F.pad(out, (0, 0, blind, 0)), F.pad(lse, (blind, 0), value=float("-inf"))


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel wants one width for keys and values, and a head for every query head (a stride of 0 will do)."""
    width = max(q.shape[3], v.shape[3])
    q, k, padded_v = (F.pad(x, (0, width - x.shape[3])) if x.shape[3] < width else x for x in (q, k, v))
    heads = q.shape[:2]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k.expand(*heads, -1, -1), padded_v.expand(*heads, -1, -1), 0.0, causal, scale=scale
    )
    return out[..., : v.shape[3]], lse


def merge_partial_torch(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys: out [..., v], lse [...]."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((part - lse).exp().nan_to_num(0.0)[..., None] for part in (lse_a, lse_b))
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse
