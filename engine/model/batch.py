"""One step's worth of tokens, as the forward pass sees it.

Invariant: the sequences that compute one token (decodes) come first, one token each, then those that compute a chunk
(prefills); tokens lie end to end in that order. Counts that steer control flow are plain ints on the host, so that no
layer ever waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B sequences, the first `num_decodes` of them with one token; P = B - num_decodes prefills; T tokens."""

    positions: Tensor  # int64 [T]
    slots: Tensor  # int64 [T], where each token's cache row goes: block * block_size + offset
    block_tables: Tensor  # int32 [B, max_blocks], padded with any valid block
    kv_lens: Tensor  # int32 [B], tokens in the cache once this step's rows are written
    num_decodes: int
    max_decode_kv: int  # longest kv_len of the decodes, 0 without any
    cu_q: Tensor  # int32 [P + 1], bounds of the prefills' tokens, counted from the first prefill token
    q_lens: tuple[int, ...]  # [P], on the host
    prefill_kv_lens: tuple[int, ...]  # [P], on the host

    @property
    def num_prefills(self) -> int:
        return len(self.q_lens)

    @classmethod
    def build(
        cls,
        computed: list[int],
        counts: list[int],
        block_tables: list[list[int]],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Sequence b computes tokens [computed[b], computed[b] + counts[b]); those with counts of 1 may lead as decodes."""
        num_decodes = next((i for i, count in enumerate(counts) if count != 1), len(counts))
        positions, slots = [], []
        for start, count, table in zip(computed, counts, block_tables, strict=True):
            for position in range(start, start + count):
                positions.append(position)
                slots.append(table[position // block_size] * block_size + position % block_size)
        widest = max(map(len, block_tables))
        kv_lens = [start + count for start, count in zip(computed, counts, strict=True)]
        cu_q = [0]
        for count in counts[num_decodes:]:
            cu_q.append(cu_q[-1] + count)

        def ints(values: list[int] | list[list[int]], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        return cls(
            positions=ints(positions, torch.int64),
            slots=ints(slots, torch.int64),
            block_tables=ints([table + [0] * (widest - len(table)) for table in block_tables], torch.int32),
            kv_lens=ints(kv_lens, torch.int32),
            num_decodes=num_decodes,
            max_decode_kv=max(kv_lens[:num_decodes], default=0),
            cu_q=ints(cu_q, torch.int32),
            q_lens=tuple(counts[num_decodes:]),
            prefill_kv_lens=tuple(kv_lens[num_decodes:]),
        )

    @classmethod
    def dense(cls, num_seqs: int, length: int, block_size: int = 64, device: torch.device | str = "cpu") -> Batch:
        """`num_seqs` fresh sequences of `length` tokens each, for passes that keep no cache between steps.

        Needs a cache of num_seqs * ceil(length / block_size) blocks.
        """
        per = -(-length // block_size)
        tables = [list(range(b * per, (b + 1) * per)) for b in range(num_seqs)]
        return cls.build([0] * num_seqs, [length] * num_seqs, tables, block_size, device)
