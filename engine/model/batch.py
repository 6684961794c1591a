"""One step's worth of tokens, as the forward pass sees it.

Invariant: the sequences that compute one token (decodes) come first, one token each, then those that compute a chunk
(prefills); tokens lie end to end in that order. Counts that steer control flow are plain ints on the host, so that no
layer ever waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        computed: np.ndarray,
        counts: np.ndarray,
        block_tables: np.ndarray,
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Sequence b computes tokens [computed[b], computed[b] + counts[b]); those with counts of 1 may lead as decodes.

        computed, counts int64 [B]; block_tables int32 [B, max_blocks], whose entries past a sequence's last block are
        any valid ones. The arrays are the Batch's from now on: on a CPU its tensors share their memory.
        """
        num_seqs, kv_lens = len(counts), computed + counts
        chunked = np.flatnonzero(counts != 1)
        num_decodes = int(chunked[0]) if len(chunked) else num_seqs
        sequence, positions = np.arange(num_seqs), computed
        if num_decodes < num_seqs:
            ends = np.cumsum(counts)
            sequence = np.repeat(sequence, counts)
            positions = np.arange(ends[-1]) + (kv_lens - ends)[sequence]
        blocks, offsets = np.divmod(positions, block_size)
        cu_q = np.zeros(num_seqs - num_decodes + 1, np.int32)
        np.cumsum(counts[num_decodes:], out=cu_q[1:])

        def to_device(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(device, non_blocking=True)

        return cls(
            positions=to_device(positions),
            slots=to_device(block_tables[sequence, blocks] * np.int64(block_size) + offsets),
            block_tables=to_device(block_tables),
            kv_lens=to_device(kv_lens.astype(np.int32)),
            num_decodes=num_decodes,
            max_decode_kv=int(kv_lens[:num_decodes].max()) if num_decodes else 0,
            cu_q=to_device(cu_q),
            q_lens=tuple(counts[num_decodes:].tolist()),
            prefill_kv_lens=tuple(kv_lens[num_decodes:].tolist()),
        )

    @classmethod
    def dense(cls, num_seqs: int, length: int, block_size: int = 64, device: torch.device | str = "cpu") -> Batch:
        """`num_seqs` fresh sequences of `length` tokens each, for passes that keep no cache between steps.

        Needs a cache of num_seqs * ceil(length / block_size) blocks.
        """
        tables = np.arange(num_seqs * -(-length // block_size), dtype=np.int32).reshape(num_seqs, -1)
        return cls.build(np.zeros(num_seqs, np.int64), np.full(num_seqs, length), tables, block_size, device)
