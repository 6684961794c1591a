"""Which tokens of which sequences are computed in a step.

Invariant: a sequence has `num_computed` tokens in the cache and `num_tokens` to reach; each step spends one budget of
tokens, running sequences first, then waiting ones. That one rule is all there is: a prefill larger than the budget is
computed in chunks, a step may mix chunks with decodes, a prefix hit is a sequence that starts with num_computed > 0,
and a preempted one starts over with num_computed == 0 and its output among the tokens to reach.

Order is first come, first served: `running`, then `waiting`, are always in order of arrival. A sequence is admitted
once there are blocks for all the tokens it has, so only growth by output can run out of blocks; then the latest arrival
gives up its own, at worst the growing sequence itself, and queues first. The oldest sequence is thus never preempted,
every step computes something while there is work, and everyone finishes. (What a preempted sequence gave up is not
enough to admit it again at once: it needs no fewer blocks than it had, and one of them is taken. Unless others have
computed its prefix meanwhile; then it may as well come back.)
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from engine.block_pool import ROOT, BlockPool
from engine.sequence import Sequence, State


@dataclass(slots=True)
class Scheduled:
    """Tokens [num_computed, num_computed + count) of a sequence."""

    seq: Sequence
    count: int


class Scheduler:
    """Owns the sequences in flight and, through the pool, their blocks."""

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_batched_tokens: int, max_len: int) -> None:
        """`max_len`: tokens of the longest sequence that will ever be added, output included."""
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.num_preemptions = 0
        # A running sequence's blocks once more, as rows that a batch is gathered from.
        self.block_tables = np.zeros((max_num_seqs, -(-max_len // pool.block_size)), np.int32)
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def schedule(self) -> list[Scheduled]:
        """This step's work, every sequence at most once; their blocks are allocated. Empty only without work."""
        budget = self.max_batched_tokens
        step: list[Scheduled] = []
        for seq in self.running.copy():
            if budget == 0 or seq.state is not State.RUNNING:  # a preempted one: so are all after it
                break
            if not self._grow(seq):
                break
            count = min(len(seq.token_ids) - seq.num_computed, budget)
            step.append(Scheduled(seq, count))
            budget -= count
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs and self._admit(self.waiting[0]):
            seq = self.waiting.popleft()
            count = min(len(seq.token_ids) - seq.num_computed, budget)
            step.append(Scheduled(seq, count))
            budget -= count
        return step

    def computed(self, item: Scheduled) -> None:
        """The rows of a scheduled item are in the cache; blocks that are full now serve later prefixes too."""
        seq, pool = item.seq, self.pool
        seq.num_computed += item.count
        full = seq.num_computed // pool.block_size
        for i in range(seq.num_committed, full):
            tokens = seq.token_ids[i * pool.block_size : (i + 1) * pool.block_size]
            block = pool.commit(seq.blocks[i], seq.blocks[i - 1] if i else ROOT, tokens)
            seq.blocks[i] = self.block_tables[seq.row, i] = block
        seq.num_committed = full

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out, whatever its state, and its blocks back."""
        if seq.state is State.RUNNING:
            self.running.remove(seq)
            self._vacate(seq)
        elif seq.state is State.WAITING:
            self.waiting.remove(seq)
        seq.state = State.FINISHED

    def check(self) -> None:
        """Verify that no block and no row has leaked; raises AssertionError."""
        self.pool.check([seq.blocks for seq in self.running])
        assert len(self._free_rows) + len(self.running) == self.max_num_seqs, "a block table row leaked"
        for seq in self.running:
            assert self.block_tables[seq.row, : len(seq.blocks)].tolist() == seq.blocks, "a block table is stale"
        for seq in self.waiting:
            assert (seq.blocks, seq.num_computed) == ([], 0), "a waiting sequence holds blocks"

    def _admit(self, seq: Sequence) -> bool:
        """Give the head of the queue its blocks, known prefixes first; False where there are too few."""
        pool, num_tokens = self.pool, len(seq.token_ids)
        found = pool.lookup(seq.token_ids, num_tokens - 1)  # a token must remain to be computed, for its logits
        missing = -(-num_tokens // pool.block_size) - len(found)
        if missing > pool.free_after_acquiring(found):
            return False
        for block in found:
            pool.acquire(block)
        seq.blocks = found + [pool.allocate() for _ in range(missing)]
        seq.row = self._free_rows.pop()
        self.block_tables[seq.row, : len(seq.blocks)] = seq.blocks
        seq.num_computed = len(found) * pool.block_size
        seq.num_committed = len(found)
        if seq.num_cached is None:
            seq.num_cached = seq.num_computed
        seq.state = State.RUNNING
        self.running.append(seq)
        return True

    def _grow(self, seq: Sequence) -> bool:
        """See that a running sequence has blocks for all its tokens; False where it had to be preempted itself."""
        while len(seq.blocks) * self.pool.block_size < len(seq.token_ids):
            if self.pool.num_free == 0:
                victim = self.running.pop()
                self._vacate(victim)
                victim.state = State.WAITING
                self.waiting.appendleft(victim)
                self.num_preemptions += 1
                if victim is seq:
                    return False
                continue
            block = self.pool.allocate()
            self.block_tables[seq.row, len(seq.blocks)] = block
            seq.blocks.append(block)
        return True

    def _vacate(self, seq: Sequence) -> None:
        self.pool.release(seq.blocks)
        self._free_rows.append(seq.row)
        seq.blocks, seq.row = [], -1
        seq.num_computed = seq.num_committed = 0
