"""Blocks of the cache: who holds them, and which hold a prefix that the next request may reuse.

Invariant: every block is in exactly one of three states, and free + used == total at any moment.
  used      referenced by one sequence or more (`_refs[block]` of them)
  reusable  free, but it still holds a cached prefix; evicted least recently used first
  empty     free, holding nothing
Cached blocks form trees. A full block is known by its parent (the cached block before it, ROOT for the first) and its
own tokens, so equal keys mean equal prefixes: the dictionary hashes the chain and compares the tokens, and no collision
can hand out the wrong ones. Whoever holds a block holds its parent, and lets go of the parent last; so a parent is
always evicted after its children, and its number stays good as its name.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from engine.errors import CapacityError

ROOT = -1
_Key = tuple[int, tuple[int, ...]]  # parent block, this block's tokens


class BlockPool:
    """Every operation costs O(1) per block it touches."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise CapacityError(f"a cache of {num_blocks} blocks of {block_size} tokens holds nothing")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._refs = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._reusable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._cached: dict[_Key, int] = {}
        self._keys: dict[int, _Key] = {}  # the same, by block

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._reusable)

    @property
    def num_reusable(self) -> int:
        """Of the free blocks, those that hold a cached prefix."""
        return len(self._reusable)

    def allocate(self) -> int:
        """A block with one reference, its old content forgotten. Call only while num_free > 0."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._reusable.popitem(last=False)
            del self._cached[self._keys.pop(block)]
        self._refs[block] = 1
        return block

    def acquire(self, block: int) -> None:
        """One more reference to a used or reusable block."""
        if self._refs[block] == 0:
            del self._reusable[block]
        self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks, given first to last: the last is let go of first."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] > 0:
                continue
            if block in self._keys:
                self._reusable[block] = None
            else:
                self._empty.append(block)

    def lookup(self, token_ids: Sequence[int], limit: int) -> list[int]:
        """The cached blocks of the longest known prefix within the first `limit` tokens; none is acquired."""
        found: list[int] = []
        parent = ROOT
        for end in range(self.block_size, limit + 1, self.block_size):
            block = self._cached.get((parent, tuple(token_ids[end - self.block_size : end])))
            if block is None:
                break
            found.append(block)
            parent = block
        return found

    def free_after_acquiring(self, blocks: Sequence[int]) -> int:
        """Blocks that would be left to allocate, were these acquired."""
        return self.num_free - sum(self._refs[block] == 0 for block in blocks)

    def commit(self, block: int, parent: int, tokens: Sequence[int]) -> int:
        """Offer a full, computed block, the caller's, as a prefix for others -> the block to hold from now on.

        That is another one where this prefix is cached already: the caller's reference moves there and its own block is
        free. `parent` is the committed block before it, or ROOT.
        """
        if not self.prefix_cache:
            return block
        key = (parent, tuple(tokens))
        canonical = self._cached.setdefault(key, block)
        if canonical != block:
            self.acquire(canonical)
            self.release((block,))
        else:
            self._keys[block] = key
        return canonical

    def check(self, tables: Iterable[Sequence[int]] = ()) -> None:
        """Verify the invariant, `tables` being the blocks of every sequence; raises AssertionError. O(num_blocks)."""
        assert Counter(block for table in tables for block in table) == Counter(
            {block: refs for block, refs in enumerate(self._refs) if refs}
        ), "references do not match the sequences' blocks"
        used = [block for block, refs in enumerate(self._refs) if refs]
        assert sorted([*self._empty, *self._reusable, *used]) == list(range(self.num_blocks)), "a block leaked"
        assert self._cached == {key: block for block, key in self._keys.items()}, "the prefix index is inconsistent"
        assert not self._keys.keys() & set(self._empty), "an empty block is cached"
        assert self._reusable.keys() <= self._keys.keys(), "a reusable block holds no prefix"
        age = {block: i for i, block in enumerate(self._reusable)}  # oldest first; used ones are the youngest
        for block, (parent, tokens) in self._keys.items():
            assert len(tokens) == self.block_size, "a partial block is cached"
            if parent != ROOT:
                assert parent in self._keys, "a cached block outlived its parent"
                youngest = self.num_blocks
                assert age.get(block, youngest) <= age.get(parent, youngest), (
                    "a parent would be evicted before its child"
                )
