"""Tile tables and split counts: properties that any shape must have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.split_kv import MAX_SPLITS, MIN_SPLIT_TOKENS, num_splits
from engine.kernels.tiles import gqa_decode_tile, mla_decode_tile, power_of_2_chunks, prefill_tile


@given(st.integers(0, 2048), st.integers(2, 4))
def test_chunks_cover_the_width_with_powers_of_two(width, most):
    chunks = [c for c in power_of_2_chunks(width, most) if c]
    assert len(power_of_2_chunks(width, most)) == most
    assert all(c >= 16 and c & (c - 1) == 0 for c in chunks)
    assert sum(chunks) >= width
    assert sum(chunks[:-1]) < max(width, 1)  # every chunk has a column of its own, so that none is all padding


@pytest.mark.parametrize(
    ("width", "chunks"), [(448, (256, 128, 64)), (192, (128, 64, 0)), (96, (64, 32, 0)), (0, (0,) * 3)]
)
def test_odd_ranks_are_split_and_not_padded(width, chunks):
    assert power_of_2_chunks(width, 3) == chunks


@given(st.integers(1, 1024), st.integers(0, 1024), st.integers(1, 128), st.sampled_from([2, 4]))
@settings(max_examples=200)
def test_tiles_are_powers_of_two(rank, rope, heads, element_size):
    tiles = mla_decode_tile(rank, rope, heads, element_size), gqa_decode_tile(rank, heads, element_size)
    for tile in (*tiles, prefill_tile(rank, rope, element_size)):
        assert all(n >= 16 and n & (n - 1) == 0 for n in (tile.rows, tile.tokens))


@given(st.integers(0, 10_000), st.integers(0, 200_000), st.none() | st.integers(1, 10_000))
def test_splits(programs, max_kv_len, window):
    splits = num_splits(programs, max_kv_len, window, torch.device("cpu"))
    assert 1 <= splits <= MAX_SPLITS
    assert splits == 1 or min(max_kv_len, window or max_kv_len) >= splits * MIN_SPLIT_TOKENS
