"""GQA prefill: ragged query chunks against the block cache, which already holds the chunk's own keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.flash_cpu import causal_attention


def gqa_prefill_torch(
    q: Tensor, cache: Tensor, block_tables: Tensor, cu_q: Tensor, kv_lens: Tensor, num_kv_heads: int, scale: float
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
        blocks = block_tables[b, : -(-kv_len // block_size)].long()
        rows = cache[blocks].flatten(0, 1)[:kv_len].to(q.dtype)
        keys, values = rows.unflatten(-1, (2, num_kv_heads, head_dim)).permute(1, 2, 0, 3)[:, :, None]  # [g, 1, S, D]
        queries = q[q0:q1].unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)  # [g, H/g, Q, D]
        attended, _ = causal_attention(queries, keys, values, kv_len - (q1 - q0), scale)
        out[q0:q1] = attended.permute(2, 0, 1, 3).flatten(1, 2)
    return out


def gqa_prefill(
    q: Tensor, cache: Tensor, block_tables: Tensor, cu_q: Tensor, kv_lens: Tensor, num_kv_heads: int, scale: float
) -> Tensor:
    """Causal attention of ragged queries: q [T, H, D] -> [T, H, D].

    cu_q int32 [B + 1]; the queries of sequence b are the last cu_q[b+1] - cu_q[b] of its kv_lens[b] tokens. cache
    [num_blocks, block_size, 2 g D], a row being [keys | values]; block_tables int32 [B, max_blocks].
    """
    return gqa_prefill_torch(q, cache, block_tables, cu_q, kv_lens, num_kv_heads, scale)
