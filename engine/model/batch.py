"""One step's worth of tokens, as the forward pass sees it.

Invariant: the sequences that compute one token (decodes) come first, one token each, then those that compute a chunk
(prefills); tokens lie end to end in that order. Counts that steer control flow are plain ints on the host, so that no
layer ever waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
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
        block_tables: np.ndarray | list[list[int]],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Sequence b computes tokens [computed[b], computed[b] + counts[b]); leading ones with counts of 1 are decodes.

        block_tables int32 [B, max_blocks], whose entries past a sequence's last block are any valid ones. An array is
        the Batch's from now on.
        """
        tables = np.asarray(block_tables, np.int32)
        num_seqs = len(counts)
        num_decodes = next((i for i, count in enumerate(counts) if count != 1), num_seqs)
        kv_lens = [start + count for start, count in zip(computed, counts, strict=True)]
        cu_q = [0, *accumulate(counts[num_decodes:])]
        sequence, positions = np.arange(num_seqs), np.array(computed, np.int64)
        if num_decodes < num_seqs:
            sequence = np.repeat(sequence, counts)
            before = np.array([num_decodes + end for end in cu_q[:-1]])  # tokens that precede each prefill
            shift = positions - np.concatenate((np.arange(num_decodes), before))
            positions = np.arange(num_decodes + cu_q[-1]) + shift[sequence]
        blocks = positions // block_size
        slots = (tables[sequence, blocks] - blocks) * block_size + positions

        def to_device(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(device, non_blocking=True)

        return cls(
            positions=to_device(positions),
            slots=to_device(slots),
            block_tables=to_device(tables),
            kv_lens=to_device(np.array(kv_lens, np.int32)),
            num_decodes=num_decodes,
            max_decode_kv=max(kv_lens[:num_decodes], default=0),
            cu_q=to_device(np.array(cu_q, np.int32)),
            q_lens=tuple(counts[num_decodes:]),
            prefill_kv_lens=tuple(kv_lens[num_decodes:]),
        )

    @classmethod
    def dense(cls, num_seqs: int, length: int, block_size: int = 64, device: torch.device | str = "cpu") -> Batch:
        """`num_seqs` fresh sequences of `length` tokens each, for passes that keep no cache between steps.

        Needs a cache of num_seqs * ceil(length / block_size) blocks.
        """
        tables = np.arange(num_seqs * -(-length // block_size), dtype=np.int32).reshape(num_seqs, -1)
        return cls.build([0] * num_seqs, [length] * num_seqs, tables, block_size, device)
