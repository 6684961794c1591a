"""GQA decode: one query token per sequence against its cached keys and values. The baseline that MLA is measured by."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.cache import padded_rows


def gqa_decode_torch(
    q: Tensor, cache: Tensor, block_tables: Tensor, kv_lens: Tensor, num_kv_heads: int, scale: float, max_kv_len: int
) -> Tensor:
    """The definition, one padded gather for the batch. An empty sequence (kv_len 0) gives zeros."""
    head_dim = q.shape[2]
    rows, padding = padded_rows(cache, block_tables, kv_lens, max_kv_len)
    # One KV head at a time: a batch over sequences and heads together would have to copy the keys first.
    heads = rows.to(q.dtype).split(head_dim, -1)  # g of keys, then g of values, [B, S, D] each
    queries = q.unflatten(1, (num_kv_heads, -1))  # [B, g, H/g, D]
    outs = []
    for i in range(num_kv_heads):
        scores = torch.baddbmm(q.new_empty(()), queries[:, i], heads[i].mT, beta=0, alpha=scale)  # [B, H/g, S]
        if padding is not None:
            scores.masked_fill_(padding[:, None], float("-inf"))
        outs.append(scores.softmax(-1) @ heads[num_kv_heads + i])
    out = torch.cat(outs, 1)
    return out if padding is None else out.masked_fill_((kv_lens == 0)[:, None, None], 0)


def gqa_decode(
    q: Tensor, cache: Tensor, block_tables: Tensor, kv_lens: Tensor, num_kv_heads: int, scale: float, max_kv_len: int
) -> Tensor:
    """q [B, H, D] -> [B, H, D]; cache [num_blocks, block_size, 2 g D] of rows [keys | values]; head h reads h*g//H.

    block_tables int32 [B, max_blocks]; kv_lens int32 [B]; max_kv_len == max(kv_lens), on the host.
    """
    return gqa_decode_torch(q, cache, block_tables, kv_lens, num_kv_heads, scale, max_kv_len)
