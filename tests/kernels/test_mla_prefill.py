"""MLA prefill and the joining of partial results, both implementations, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.mla_prefill import merge_partial, merge_partial_triton, mla_prefill_torch, mla_prefill_triton

from .conftest import DEVICE
from .reference import assert_near, attention


def bounds(lengths):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(DEVICE)


def case(heads, groups, nope, rope, value, spans, dtype, seed=0, window=None, softcap=None):
    """spans: for each sequence (q_start, q_len, k_start, k_len). -> arguments of mla_prefill, expected out and lse."""
    torch.manual_seed(seed)
    q_starts, q_lens, k_starts, k_lens = zip(*spans, strict=True)
    q = torch.randn(sum(q_lens), heads, nope + rope).to(dtype)
    kv = torch.randn(sum(k_lens), heads, nope + value).to(dtype)
    k_rope = torch.randn(sum(k_lens), groups, rope).to(dtype)
    scale = (nope + rope) ** -0.5
    out = torch.zeros(sum(q_lens), heads, value, dtype=torch.float64)
    lse = torch.zeros(sum(q_lens), heads, dtype=torch.float64)
    q0 = k0 = 0
    for q_start, q_len, k_start, k_len in spans:
        ages = (q_start + torch.arange(q_len))[:, None] - k_start - torch.arange(k_len)
        visible = (ages >= 0) & (ages < (window or 10**9))
        for h in range(heads):
            keys = torch.cat((kv[k0 : k0 + k_len, h, :nope], k_rope[k0 : k0 + k_len, h * groups // heads]), -1)
            result = attention(q[q0 : q0 + q_len, h], keys, kv[k0 : k0 + k_len, h, nope:], visible, scale, softcap)
            out[q0 : q0 + q_len, h], lse[q0 : q0 + q_len, h] = result
        q0, k0 = q0 + q_len, k0 + k_len
    starts = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (q_starts, k_starts))
    tensors = (x.to(DEVICE) for x in (q, kv, k_rope))
    return (*tensors, bounds(q_lens), bounds(k_lens), *starts, nope, scale, window, softcap), out, lse


def check(implementation, args, out, lse, dtype):
    actual_out, actual_lse = implementation(*args)
    assert actual_out.dtype == dtype
    assert actual_lse.dtype == torch.float32
    assert_near(actual_out, out, dtype)
    assert_near(actual_lse, lse, torch.float32 if dtype == torch.float32 else torch.float16)


# One chunk; a chunk after context; context ahead of the queries only; nothing visible; empty queries, empty keys.
SPANS = [
    (0, 5, 0, 5),
    (60, 70, 0, 130),
    (100, 3, 0, 64),
    (0, 4, 64, 10),
    (9, 0, 0, 9),
    (30, 4, 64, 0),
    (10, 140, 8, 142),
]


@pytest.mark.parametrize("implementation", [mla_prefill_torch, mla_prefill_triton])
@pytest.mark.parametrize(
    ("heads", "groups", "nope", "rope", "value"),
    [(2, 1, 32, 16, 32), (3, 1, 48, 24, 80), (2, 2, 0, 32, 32), (4, 2, 16, 0, 20), (2, 1, 64, 64, 128)],
)
def test_ragged_chunks(implementation, heads, groups, nope, rope, value):
    args, out, lse = case(heads, groups, nope, rope, value, SPANS, torch.float32)
    check(implementation, args, out, lse, torch.float32)


@pytest.mark.parametrize(("window", "softcap"), [(1, None), (31, 2.0), (64, None), (65, 2.0), (1000, None)])
def test_windows(window, softcap, monkeypatch):
    monkeypatch.setattr("engine.kernels.flash_cpu.BLOCK_SCORES", 1)  # as few queries at a time as there may be
    args, out, lse = case(2, 1, 32, 16, 32, SPANS, torch.float32, window=window, softcap=softcap)
    for implementation in (mla_prefill_torch, mla_prefill_triton):
        check(implementation, args, out, lse, torch.float32)


@pytest.mark.parametrize("implementation", [mla_prefill_torch, mla_prefill_triton])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_strides(implementation, dtype):
    args, out, lse = case(2, 1, 32, 16, 32, [(0, 5, 0, 5), (60, 70, 0, 130)], dtype)
    q, kv, k_rope, *rest = args
    wide = [torch.full((*x.shape[:-1], x.shape[-1] + 48), float("nan"), dtype=dtype, device=DEVICE) for x in args[:3]]
    for target, source in zip(wide, (q, kv, k_rope), strict=True):
        target[..., 16:-32] = source
    check(implementation, (*(x[..., 16:-32] for x in wide), *rest), out, lse, dtype)


@given(
    groups=st.integers(1, 2),
    shared=st.integers(1, 2),
    nope=st.integers(0, 40),
    rope=st.integers(1, 20),
    value=st.integers(1, 70),
    spans=st.lists(
        st.tuples(st.integers(0, 80), st.integers(0, 40), st.integers(0, 80), st.integers(0, 70)),
        min_size=1,
        max_size=3,
    ),
    window=st.none() | st.integers(1, 90),
    softcap=st.none() | st.floats(0.5, 60),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_shape(groups, shared, nope, rope, value, spans, window, softcap):
    heads = groups * shared
    args, out, lse = case(heads, groups, nope, rope, value, spans, torch.float32, window=window, softcap=softcap)
    for implementation in (mla_prefill_torch, mla_prefill_triton):
        check(implementation, args, out, lse, torch.float32)


@pytest.mark.parametrize("implementation", [merge_partial, merge_partial_triton])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_parts_are_the_whole(implementation, dtype):
    torch.manual_seed(0)
    tokens, heads, value, cut = 9, 3, 40, 13
    q, keys, values = torch.randn(tokens, 20), torch.randn(30, 20), torch.randn(30, value)
    visible = torch.rand(tokens, 30) < 0.3
    visible[0], visible[1, :cut], visible[2, cut:] = False, False, False  # sees nothing; the second part; the first
    whole = attention(q, keys, values, visible, 1.0)
    parts = [attention(q, keys[s], values[s], visible[:, s], 1.0) for s in (slice(0, cut), slice(cut, 30))]

    def per_head(out, lse):
        return out[:, None].expand(-1, heads, -1).to(dtype).to(DEVICE), lse[:, None].expand(-1, heads).float().to(
            DEVICE
        )

    merged_out, merged_lse = implementation(*per_head(*parts[0]), *per_head(*parts[1]))
    assert_near(merged_out, whole[0][:, None].expand(-1, heads, -1), dtype)
    assert_near(merged_lse, whole[1][:, None].expand(-1, heads), torch.float32)
