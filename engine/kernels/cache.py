"""Writing rows into the block cache, and gathering a sequence's rows out of it.

One layer's cache is [num_blocks, block_size, width]; a token's slot is block * block_size + offset. What a row means is
the attention's business: [latent | rope keys] for MLA, [keys | values] for GQA.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cache_write_torch(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    cache.view(-1, cache.shape[-1]).index_copy_(0, slots, rows.to(cache.dtype))


def cache_write(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    """rows [T, width] (any row stride) -> cache[slots]; slots int64 [T], distinct."""
    cache_write_torch(cache, rows, slots)


def cache_gather_torch(cache: Tensor, block_tables: Tensor, starts: Tensor, cu_rows: Tensor, total: int) -> Tensor:
    block_size = cache.shape[1]
    counts = (cu_rows[1:] - cu_rows[:-1]).long()
    sequence = torch.repeat_interleave(torch.arange(len(counts), device=cache.device), counts, output_size=total)
    within = torch.arange(total, device=cache.device) - cu_rows[:-1].long()[sequence] + starts.long()[sequence]
    blocks = block_tables[sequence, within // block_size].long()
    return cache.view(-1, cache.shape[-1])[blocks * block_size + within % block_size]


def cache_gather(cache: Tensor, block_tables: Tensor, starts: Tensor, cu_rows: Tensor, total: int) -> Tensor:
    """Positions [starts[b], starts[b] + cu_rows[b+1] - cu_rows[b]) of every sequence b, end to end -> [total, width].

    block_tables int32 [B, max_blocks]; starts int32 [B]; cu_rows int32 [B + 1]; total == cu_rows[-1].
    """
    return cache_gather_torch(cache, block_tables, starts, cu_rows, total)


def padded_rows(cache: Tensor, block_tables: Tensor, kv_lens: Tensor, max_kv_len: int) -> tuple[Tensor, Tensor | None]:
    """Every sequence's rows, padded to the longest -> ([B, max_kv_len, width], bool [B, max_kv_len] of the padding).

    The padding repeats the sequence's own last row, so nothing stale is read; it is None where there is none. Plain
    torch, for the definitions of decode attention. max_kv_len == max(kv_lens).
    """
    num_seqs, block_size, width = len(kv_lens), cache.shape[1], cache.shape[2]
    if num_seqs == 1:
        blocks = block_tables[0, : -(-max_kv_len // block_size)]
        return cache.flatten(1).index_select(0, blocks).view(1, -1, width)[:, :max_kv_len], None
    positions = torch.arange(max_kv_len, device=cache.device)
    own = torch.minimum(positions, (kv_lens[:, None] - 1).clamp_(min=0))
    index = block_tables.gather(1, own // block_size) * block_size + own % block_size
    rows = cache.view(-1, width).index_select(0, index.flatten()).view(num_seqs, max_kv_len, width)
    return rows, positions >= kv_lens[:, None]
