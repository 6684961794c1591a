"""Absorbed MLA decode: one query token per sequence against its cached latents, which serve as keys and as values."""

from __future__ import annotations

import torch
from torch import Tensor


def mla_decode_torch(
    q: Tensor, cache: Tensor, block_tables: Tensor, kv_lens: Tensor, rank: int, scale: float, max_kv_len: int
) -> Tensor:
    """The definition, one padded gather for the batch. An empty sequence (kv_len 0) gives zeros."""
    num_blocks = -(-max_kv_len // cache.shape[1])
    rows = cache[block_tables[:, :num_blocks].long()].flatten(1, 2)  # [B, S, width]
    invalid = torch.arange(rows.shape[1], device=q.device) >= kv_lens[:, None]  # [B, S]
    rows = rows.to(q.dtype).masked_fill(invalid[:, :, None], 0)  # what lies past the end may be anything, NaN too
    scores = (q @ rows.mT) * scale
    weights = scores.masked_fill(invalid[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    return weights @ rows[..., :rank]


def mla_decode(
    q: Tensor, cache: Tensor, block_tables: Tensor, kv_lens: Tensor, rank: int, scale: float, max_kv_len: int
) -> Tensor:
    """q [B, H, r + dr] -> [B, H, r]: softmax(scale * q . row) weighted sum of the rows' first `rank` channels.

    cache [num_blocks, block_size, r + dr]; block_tables int32 [B, max_blocks] (entries past a sequence's last block are
    never read as tokens, but must be valid block numbers); kv_lens int32 [B]; max_kv_len >= max(kv_lens), on the host.
    """
    return mla_decode_torch(q, cache, block_tables, kv_lens, rank, scale, max_kv_len)
