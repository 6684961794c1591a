"""GQA decode: one query token per sequence against its cached keys and values. The baseline that MLA is measured by."""

from __future__ import annotations

import torch
from torch import Tensor


def gqa_decode_torch(
    q: Tensor, cache: Tensor, block_tables: Tensor, kv_lens: Tensor, num_kv_heads: int, scale: float, max_kv_len: int
) -> Tensor:
    """The definition, one padded gather for the batch. An empty sequence (kv_len 0) gives zeros."""
    num_seqs, num_heads, head_dim = q.shape
    num_blocks = -(-max_kv_len // cache.shape[1])
    rows = cache[block_tables[:, :num_blocks].long()].flatten(1, 2)  # [B, S, 2 g D]
    invalid = torch.arange(rows.shape[1], device=q.device) >= kv_lens[:, None]  # [B, S]
    rows = rows.to(q.dtype).masked_fill(invalid[:, :, None], 0)
    keys, values = rows.unflatten(-1, (2, num_kv_heads, head_dim)).permute(2, 0, 3, 1, 4)  # [B, g, S, D] each
    scores = q.view(num_seqs, num_kv_heads, -1, head_dim) @ keys.mT * scale  # [B, g, H/g, S]
    weights = scores.masked_fill(invalid[:, None, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    return (weights @ values).view(num_seqs, num_heads, head_dim)


def gqa_decode(
    q: Tensor, cache: Tensor, block_tables: Tensor, kv_lens: Tensor, num_kv_heads: int, scale: float, max_kv_len: int
) -> Tensor:
    """q [B, H, D] -> [B, H, D]; cache [num_blocks, block_size, 2 g D], a row being [keys | values]; head h reads h*g//H.

    block_tables int32 [B, max_blocks]; kv_lens int32 [B]; max_kv_len >= max(kv_lens), on the host.
    """
    return gqa_decode_torch(q, cache, block_tables, kv_lens, num_kv_heads, scale, max_kv_len)
