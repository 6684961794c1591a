"""MLA decode, both implementations, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.mla_decode import mla_decode_torch, mla_decode_triton

from .conftest import DEVICE
from .reference import assert_near, attention, block_cache


def case(rank, rope, heads, lengths, block_size, dtype, seed=0, window=None, softcap=None):
    """-> the arguments of mla_decode, and what it must return."""
    torch.manual_seed(seed)
    q = torch.randn(len(lengths), heads, rank + rope).to(dtype)
    sequences = [torch.randn(n, rank + rope).to(dtype) for n in lengths]
    scale = (rank + rope) ** -0.5
    expected = []
    for query, rows in zip(q, sequences, strict=True):
        visible = (torch.arange(len(rows)) >= len(rows) - (window or len(rows))).expand(heads, -1)
        expected.append(attention(query, rows, rows[:, :rank], visible, scale, softcap)[0])
    cache, tables, kv_lens = block_cache(sequences, block_size, dtype, DEVICE, seed)
    args = q.to(DEVICE), cache, tables, kv_lens, rank, scale, max(lengths), window, softcap
    return args, torch.stack(expected)


SHAPES = [(64, 16, 4), (192, 32, 5), (96, 24, 20), (448, 64, 3), (48, 0, 17), (512, 64, 33), (20, 6, 2), (256, 256, 28)]


@pytest.mark.parametrize("implementation", [mla_decode_torch, mla_decode_triton])
@pytest.mark.parametrize(("rank", "rope", "heads"), SHAPES)
def test_ranks_and_rope_widths(implementation, rank, rope, heads):
    args, expected = case(rank, rope, heads, [0, 1, 37, 70], 16, torch.float32)
    assert_near(implementation(*args), expected, torch.float32)


@pytest.mark.parametrize("implementation", [mla_decode_torch, mla_decode_triton])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "rope", "heads"), [(128, 32, 8), (448, 64, 33)])
def test_half_precision(implementation, dtype, rank, rope, heads):
    args, expected = case(rank, rope, heads, [70, 0, 129], 64, dtype)
    assert_near(implementation(*args), expected, dtype)


@pytest.mark.parametrize("splits", [1, 3, 8])
def test_splits_of_ragged_sequences(splits):
    args, expected = case(64, 16, 6, [0, 5, 257, 700], 64, torch.float32)
    assert_near(mla_decode_triton(*args, splits=splits), expected, torch.float32)


# block_size is 16, a tile 32 or 64 tokens
@pytest.mark.parametrize(("window", "softcap"), [(1, 2.0), (15, None), (16, 2.0), (17, None), (128, 2.0), (1000, None)])
def test_windows(window, softcap):
    args, expected = case(64, 16, 6, [0, 5, 300, 64], 16, torch.float32, window=window, softcap=softcap)
    _, cache, tables, kv_lens, *_ = args
    for table, kv_len in zip(tables.tolist(), kv_lens.tolist(), strict=True):
        for i in range(max(0, kv_len - window) // 16):
            cache[table[i]] = float("nan")  # never read
    assert_near(mla_decode_torch(*args), expected, torch.float32)
    for splits in (1, 2) if window >= 17 else (1,):
        assert_near(mla_decode_triton(*args, splits=splits), expected, torch.float32)


def test_strided_queries():
    args, expected = case(64, 16, 4, [3, 40], 16, torch.float32)
    wide = torch.full((2, 4, 100), float("nan"), device=DEVICE)
    wide[:, :, 10:90] = args[0]
    assert_near(mla_decode_triton(wide[:, :, 10:90], *args[1:]), expected, torch.float32)


def test_only_empty_sequences():
    args, expected = case(64, 16, 4, [0, 0], 16, torch.float32)
    for splits in (1, 2):
        assert_near(mla_decode_triton(*args, splits=splits), expected, torch.float32)


def test_no_sequences():
    args, _ = case(64, 16, 4, [1], 16, torch.float32)
    q, cache, tables, kv_lens, *rest = args
    assert mla_decode_triton(q[:0], cache, tables[:0], kv_lens[:0], *rest).shape == (0, 4, 64)


@pytest.mark.parametrize("implementation", [mla_decode_torch, mla_decode_triton])
def test_scores_that_overflow_exp(implementation):
    args, _ = case(64, 0, 4, [50], 16, torch.float32)
    q, cache, *rest = args
    rows = cache.flatten(0, 1)[~cache.flatten(0, 1)[:, 0].isnan()]
    out = implementation(q * 1e4, cache, *rest)
    assert (out[0, 0].cpu() - rows.cpu()).abs().amax(1).min() < 1e-5  # all weight on one row


@given(
    rank=st.integers(1, 160),
    rope=st.integers(0, 40),
    heads=st.integers(1, 70),
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=3),
    block_size=st.sampled_from([1, 7, 16, 64]),
    splits=st.sampled_from([1, 2]),
    window=st.none() | st.integers(1, 90),
    softcap=st.none() | st.floats(0.5, 60),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_shape(rank, rope, heads, lengths, block_size, splits, window, softcap):
    args, expected = case(rank, rope, heads, lengths, block_size, torch.float32, window=window, softcap=softcap)
    assert_near(mla_decode_triton(*args, splits=splits), expected, torch.float32)
    assert_near(mla_decode_torch(*args), expected, torch.float32)
