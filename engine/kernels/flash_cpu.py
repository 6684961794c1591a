"""Causal attention of one sequence on a CPU: torch's own blockwise kernel, with the log-sum-exp it keeps.

That kernel knows no window and no cap. Attention with one of them is computed here, a block of queries at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SCORES = 1 << 19  # scores that exist at a time where there is a window or a cap


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Query i sees keys 0 .. i + offset -> (out [g, m, Q, dv], lse [g, m, Q], natural log); Q, S >= 1.

    q [g, m, Q, d], k [g, 1, S, d], v [g, 1, S, dv]: m query heads share a key head. A query that sees nothing (offset
    below 0) gives 0 and -inf. Keys that every query sees are attended to without a mask, the rest causally, and the two
    parts join by log-sum-exp, so no [Q, S] mask is ever made. With a `window`, of those keys only the last so many (the
    query's own position counted) are seen; with a `softcap` c, scores become c tanh(score / c).
    """
    groups, shared, num_queries, _ = q.shape
    if softcap is not None or (window is not None and offset + num_queries > window):
        return _by_blocks(q, k, v, offset, scale, window, softcap)
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


def scaled_(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Dot products of queries and keys, in place -> scores."""
    return products.mul_(scale) if softcap is None else products.mul_(scale / softcap).tanh_().mul_(softcap)


def _by_blocks(
    q: Tensor, k: Tensor, v: Tensor, offset: int, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """As `causal_attention`: every score written down, for few queries at a time, against the keys they see."""
    groups, shared, num_queries, _ = q.shape
    num_keys = k.shape[2]
    out = q.new_zeros(groups, shared, num_queries, v.shape[3])
    lse = q.new_full(q.shape[:3], float("-inf"))
    step = max(16, BLOCK_SCORES // (groups * shared * (num_keys if window is None else min(window, num_keys))))
    for start in range(max(0, -offset), num_queries, step):
        rows = slice(start, min(start + step, num_queries))
        first = 0 if window is None else max(0, start + offset + 1 - window)
        last = min(rows.stop + offset, num_keys)
        if first >= last:
            continue
        scores = scaled_(q[:, :, rows] @ k[:, :, first:last].mT, scale, softcap)
        ages = torch.arange(rows.start + offset, rows.stop + offset)[:, None] - torch.arange(first, last)
        hidden = ages < 0 if window is None else (ages < 0) | (ages >= window)
        scores.masked_fill_(hidden, float("-inf"))
        lse[:, :, rows] = scores.logsumexp(-1)
        weights = scores.sub_(lse[:, :, rows, None].clamp_min(-1e30)).exp_()  # 0, not NaN, in rows that see nothing
        out[:, :, rows] = weights @ v[:, :, first:last]
    return out, lse


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
