"""The block pool against a model of what it must know, and the cases that went wrong in other engines."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.block_pool import ROOT, BlockPool
from engine.errors import CapacityError


class CollidingToken(int):
    """A token whose hash equals every other's, so that all blocks fall into one bucket of the prefix index."""

    def __hash__(self) -> int:
        return 0


def fill(pool: BlockPool, text: list[int]) -> list[int]:
    """What a sequence does: reuse what is known, compute the rest -> its blocks."""
    blocks = pool.lookup(text, len(text))
    for block in blocks:
        pool.acquire(block)
    while len(blocks) * pool.block_size < len(text):
        blocks.append(pool.allocate())
    for i in range(len(text) // pool.block_size):
        tokens = text[i * pool.block_size : (i + 1) * pool.block_size]
        blocks[i] = pool.commit(blocks[i], blocks[i - 1] if i else ROOT, tokens)
    return blocks


def test_reuse_is_of_full_blocks_within_the_limit():
    pool = BlockPool(8, 4)
    blocks = fill(pool, list(range(10)))
    assert pool.lookup(list(range(10)), 10) == blocks[:2]
    assert pool.lookup(list(range(8)), 7) == blocks[:1]  # all 8 are known, but one must be left to compute
    assert pool.lookup(list(range(8)), 8) == blocks[:2]
    assert pool.lookup([0, 1, 2, 99, 4, 5, 6, 7], 8) == []
    pool.check([blocks])


def test_a_block_is_known_by_its_whole_prefix():
    pool = BlockPool(8, 2)
    fill(pool, [1, 2, 3, 4])
    other = fill(pool, [5, 6])
    assert pool.lookup([5, 6, 3, 4], 4) == other


def test_hash_collisions_never_return_other_tokens():
    pool = BlockPool(16, 2)
    texts = [[CollidingToken(t) for t in text] for text in ([1, 2, 3, 4], [2, 1, 3, 4], [3, 4, 1, 2], [1, 2, 4, 3])]
    assert len({hash(tuple(text[:2])) for text in texts}) == 1
    tables = [fill(pool, text) for text in texts]
    assert tables[3][0] == tables[0][0]  # the one block that really is shared
    assert len({block for table in tables for block in table}) == 7
    for text, table in zip(texts, tables, strict=True):
        assert pool.lookup(text, 4) == table
    assert pool.lookup([CollidingToken(9), CollidingToken(9)], 2) == []
    pool.check(tables)


def test_equal_blocks_computed_side_by_side_become_one():
    pool = BlockPool(4, 2)
    first, second = pool.allocate(), pool.allocate()
    assert pool.commit(first, ROOT, [1, 2]) == first
    assert pool.commit(second, ROOT, [1, 2]) == first
    assert pool.num_free == 3
    pool.check([[first], [first]])


def test_eviction_is_least_recently_used_children_before_parents():
    pool = BlockPool(4, 1)
    old, new = fill(pool, [1, 2]), fill(pool, [3, 4])
    pool.release(old)
    pool.release(new)
    pool.release(fill(pool, [1]))  # used again: only its child [1, 2] is old now
    assert pool.num_free == pool.num_reusable == 4
    assert pool.allocate() == old[1]
    assert pool.allocate() == new[1]
    assert pool.allocate() == new[0]
    assert pool.lookup([1, 2], 2) == old[:1]


def test_without_prefix_cache_nothing_is_kept():
    pool = BlockPool(4, 2, prefix_cache=False)
    pool.release(fill(pool, [1, 2, 3, 4]))
    assert pool.num_reusable == 0
    assert pool.lookup([1, 2, 3, 4], 4) == []


def test_the_check_finds_a_leak():
    pool = BlockPool(4, 2)
    pool.allocate()
    with pytest.raises(AssertionError, match="references"):
        pool.check()


def test_an_empty_pool_is_refused():
    with pytest.raises(CapacityError):
        BlockPool(0, 16)


class PoolMachine(RuleBasedStateMachine):
    """Sequences over an alphabet of two come, are computed block by block, and go, in any order. The cache rows are
    modelled by `content`: what a block holds must be what its holder believes to have computed or found."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 3), prefix_cache=st.booleans())
    def start(self, num_blocks: int, block_size: int, prefix_cache: bool) -> None:
        self.pool = BlockPool(num_blocks, block_size, prefix_cache)
        self.texts: list[list[int]] = []
        self.tables: list[list[int]] = []
        self.committed: list[int] = []
        self.content: dict[int, tuple[int, ...]] = {}  # block -> the whole text up to its end

    @rule(text=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def arrive(self, text: list[int]) -> None:
        size = self.pool.block_size
        found = self.pool.lookup(text, len(text) - 1)
        for i, block in enumerate(found):
            assert self.content[block] == tuple(text[: (i + 1) * size])
        assert len(found) * size < len(text)
        missing = -(-len(text) // size) - len(found)
        if missing > self.pool.free_after_acquiring(found):
            return
        for block in found:
            self.pool.acquire(block)
        new = [self.pool.allocate() for _ in range(missing)]
        for i, block in enumerate(new, len(found)):
            self.content[block] = tuple(text[: (i + 1) * size])
        self.texts.append(text)
        self.tables.append(found + new)
        self.committed.append(len(found))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def compute_a_block(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.tables) - 1))
        n, size, table = self.committed[i], self.pool.block_size, self.tables[i]
        if (n + 1) * size <= len(self.texts[i]):
            tokens = self.texts[i][n * size : (n + 1) * size]
            table[n] = self.pool.commit(table[n], table[n - 1] if n else ROOT, tokens)
            self.committed[i] += 1

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.release(self.tables.pop(i))
        del self.texts[i], self.committed[i]

    @invariant()
    def whole(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check(self.tables)
        used = len({block for table in self.tables for block in table})
        assert self.pool.num_free + used == self.pool.num_blocks
        for text, table in zip(self.texts, self.tables, strict=True):
            for i, block in enumerate(table):
                assert self.content[block] == tuple(text[: (i + 1) * self.pool.block_size])


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase
