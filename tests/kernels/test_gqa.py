"""GQA decode and prefill over blocks, both implementations, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.gqa_decode import gqa_decode_torch, gqa_decode_triton
from engine.kernels.gqa_prefill import gqa_prefill_torch, gqa_prefill_triton

from .conftest import DEVICE
from .reference import assert_near, attention, block_cache


def case(heads, kv_heads, dim, q_lens, kv_lens, block_size, dtype, seed=0, window=None, softcap=None):
    """Queries are the last q_lens of kv_lens tokens. -> q [T, H, D], the cache's tensors, the expected [T, H, D]."""
    torch.manual_seed(seed)
    q = torch.randn(sum(q_lens), heads, dim).to(dtype)
    sequences = [torch.randn(n, 2 * kv_heads * dim).to(dtype) for n in kv_lens]
    expected = torch.zeros(q.shape, dtype=torch.float64)
    start = 0
    for rows, q_len in zip(sequences, q_lens, strict=True):
        keys, values = rows.view(len(rows), 2, kv_heads, dim).unbind(1)
        ages = torch.arange(len(rows)) - (len(rows) - q_len)
        ages = torch.arange(q_len)[:, None] - ages
        visible = (ages >= 0) & (ages < (window or len(rows) + 1))
        for h in range(heads):
            g = h * kv_heads // heads
            query = q[start : start + q_len, h]
            result = attention(query, keys[:, g], values[:, g], visible, dim**-0.5, softcap)
            expected[start : start + q_len, h] = result[0]
        start += q_len
    return q.to(DEVICE), block_cache(sequences, block_size, dtype, DEVICE, seed), expected


@pytest.mark.parametrize("implementation", [gqa_decode_torch, gqa_decode_triton])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 64), (6, 2, 80), (14, 2, 48), (3, 3, 128), (20, 1, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode(implementation, heads, kv_heads, dim, dtype):
    lengths = [1, 70, 33]
    q, (cache, tables, kv_lens), expected = case(heads, kv_heads, dim, [1] * 3, lengths, 16, dtype)
    assert_near(implementation(q, cache, tables, kv_lens, kv_heads, dim**-0.5, 70), expected, dtype)


@pytest.mark.parametrize("splits", [1, 4])
def test_decode_splits_and_an_empty_sequence(splits):
    q, (cache, tables, kv_lens), expected = case(4, 2, 16, [1] * 3, [700, 5, 300], 64, torch.float32)
    kv_lens[1] = 0
    expected[1] = 0
    args = q, cache, tables, kv_lens, 2, 16**-0.5, 700
    assert_near(gqa_decode_triton(*args, splits=splits), expected, torch.float32)
    assert_near(gqa_decode_torch(*args), expected, torch.float32)


PREFILLS = [([5], [5]), ([3, 0, 140, 1], [90, 0, 140, 66]), ([40, 130], [200, 131])]


@pytest.mark.parametrize("implementation", [gqa_prefill_torch, gqa_prefill_triton])
@pytest.mark.parametrize(("q_lens", "kv_lens"), PREFILLS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (3, 1, 80)])
def test_prefill(implementation, q_lens, kv_lens, heads, kv_heads, dim):
    q, (cache, tables, lengths), expected = case(heads, kv_heads, dim, q_lens, kv_lens, 16, torch.float32)
    cu_q = F.pad(torch.tensor(q_lens).cumsum(0), (1, 0)).int().to(DEVICE)
    assert_near(implementation(q, cache, tables, cu_q, lengths, kv_heads, dim**-0.5), expected, torch.float32)


@pytest.mark.parametrize("implementation", [gqa_prefill_torch, gqa_prefill_triton])
def test_prefill_of_a_slice_in_half_precision(implementation):
    q, (cache, tables, lengths), expected = case(4, 2, 64, [7, 70], [70, 71], 64, torch.bfloat16)
    wide = torch.full((77, 512), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    wide[:, 64:320] = q.flatten(1)
    view = wide[:, 64:320].unflatten(1, (4, 64))
    cu_q = torch.tensor([0, 7, 77], dtype=torch.int32, device=DEVICE)
    assert_near(implementation(view, cache, tables, cu_q, lengths, 2, 0.125), expected, torch.bfloat16)


# One token; less than a block of 16, a block, a block and one more; two tiles; longer than any context.
WINDOWS = [(1, None), (15, 2.0), (16, None), (17, 2.0), (128, None), (1000, 2.0)]


def without_what_no_window_holds(cache, tables, lens, q_lens, window):
    """NaN in every block that lies wholly before the window of a sequence's first query."""
    cache, size = cache.clone(), cache.shape[1]
    for table, kv_len, q_len in zip(tables.tolist(), lens.tolist(), q_lens, strict=True):
        for i in range(max(0, kv_len - q_len + 1 - window) // size):
            cache[table[i]] = float("nan")
    return cache


@pytest.mark.parametrize(("window", "softcap"), WINDOWS)
def test_decode_in_a_window(window, softcap):
    lengths = [1, 300, 33]
    q, (cache, tables, lens), expected = case(
        4, 2, 32, [1] * 3, lengths, 16, torch.float32, window=window, softcap=softcap
    )
    cache = without_what_no_window_holds(cache, tables, lens, [1] * 3, window)
    args = q, cache, tables, lens, 2, 32**-0.5, 300, window, softcap
    assert_near(gqa_decode_torch(*args), expected, torch.float32)
    for splits in (1, 2) if window >= 17 else (1,):
        assert_near(gqa_decode_triton(*args, splits=splits), expected, torch.float32)
    alone = gqa_decode_torch(q[1:2], cache, tables[1:2], lens[1:2], 2, 32**-0.5, 300, window, softcap)
    assert_near(alone, expected[1:2], torch.float32)


@pytest.mark.parametrize(("window", "softcap"), WINDOWS)
def test_prefill_in_a_window(window, softcap, monkeypatch):
    monkeypatch.setattr("engine.kernels.flash_cpu.BLOCK_SCORES", 1)  # as few queries at a time as there may be
    q_lens, kv_lens = [5, 0, 140, 1, 40], [5, 7, 140, 66, 200]
    q, (cache, tables, lens), expected = case(
        2, 1, 32, q_lens, kv_lens, 16, torch.float32, window=window, softcap=softcap
    )
    cache = without_what_no_window_holds(cache, tables, lens, q_lens, window)
    cu_q = F.pad(torch.tensor(q_lens).cumsum(0), (1, 0)).int().to(DEVICE)
    for implementation in (gqa_prefill_torch, gqa_prefill_triton):
        out = implementation(q, cache, tables, cu_q, lens, 1, 32**-0.5, window, softcap)
        assert_near(out, expected, torch.float32)


@given(
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    dim=st.integers(1, 70),
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=1, max_size=3),
    block_size=st.sampled_from([1, 5, 16]),
    window=st.none() | st.integers(1, 60),
    softcap=st.none() | st.floats(0.5, 60),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_prefill(kv_heads, group, dim, lengths, block_size, window, softcap):
    q_lens, kv_lens = [q for q, _ in lengths], [q + context for q, context in lengths]
    heads = kv_heads * group
    q, (cache, tables, lens), expected = case(
        heads, kv_heads, dim, q_lens, kv_lens, block_size, torch.float32, window=window, softcap=softcap
    )
    cu_q = F.pad(torch.tensor(q_lens).cumsum(0), (1, 0)).int().to(DEVICE)
    for implementation in (gqa_prefill_torch, gqa_prefill_triton):
        out = implementation(q, cache, tables, cu_q, lens, kv_heads, dim**-0.5, window, softcap)
        assert_near(out, expected, torch.float32)


@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 35),
    dim=st.integers(1, 70),
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    block_size=st.sampled_from([1, 5, 16]),
    splits=st.sampled_from([1, 2]),
    window=st.none() | st.integers(1, 90),
    softcap=st.none() | st.floats(0.5, 60),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_decode(kv_heads, group, dim, lengths, block_size, splits, window, softcap):
    heads, ones = kv_heads * group, [1] * len(lengths)
    q, (cache, tables, lens), expected = case(
        heads, kv_heads, dim, ones, lengths, block_size, torch.float32, window=window, softcap=softcap
    )
    args = q, cache, tables, lens, kv_heads, dim**-0.5, max(lengths), window, softcap
    assert_near(gqa_decode_triton(*args, splits=splits), expected, torch.float32)
    assert_near(gqa_decode_torch(*args), expected, torch.float32)
