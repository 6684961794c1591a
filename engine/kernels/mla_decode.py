"""Absorbed MLA decode: one query token per sequence against its cached latents, which serve as keys and as values."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.cache import padded_rows


def mla_decode_torch(
    q: Tensor, cache: Tensor, block_tables: Tensor, kv_lens: Tensor, rank: int, scale: float, max_kv_len: int
) -> Tensor:
    """The definition, one padded gather for the batch. An empty sequence (kv_len 0) gives zeros."""
    rows, padding = padded_rows(cache, block_tables, kv_lens, max_kv_len)
    rows = rows.to(q.dtype)
    scores = torch.baddbmm(q.new_empty(()), q, rows.mT, beta=0, alpha=scale)  # [B, H, S]
    if padding is None:
        return scores.softmax(-1) @ rows[..., :rank]
    out = scores.masked_fill_(padding[:, None], float("-inf")).softmax(-1) @ rows[..., :rank]
    return out.masked_fill_((kv_lens == 0)[:, None, None], 0)


def mla_decode(
    q: Tensor, cache: Tensor, block_tables: Tensor, kv_lens: Tensor, rank: int, scale: float, max_kv_len: int
) -> Tensor:
    """q [B, H, r + dr] -> [B, H, r]: softmax(scale * q . row) weighted sum of the rows' first `rank` channels.

    cache [num_blocks, block_size, r + dr]; block_tables int32 [B, max_blocks] (entries past a sequence's last block are
    never read as tokens, but must be valid block numbers); kv_lens int32 [B]; max_kv_len == max(kv_lens), on the host.
    """
    return mla_decode_torch(q, cache, block_tables, kv_lens, rank, scale, max_kv_len)
