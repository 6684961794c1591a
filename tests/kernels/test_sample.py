"""Sampling: the torch definition against formulas, the Triton kernel against the definition, token for token."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels import sample as module
from engine.kernels.sample import (
    Penalties,
    SamplingTensors,
    apply_penalties_,
    logprobs,
    philox_uniform,
    sample_torch,
    sample_triton,
)

from .conftest import DEVICE


def params(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0):
    """Each argument one value for all rows, or a list of one per row."""
    each = (x if isinstance(x, list) else [x] * rows for x in (temperature, top_k, top_p, min_p, seed, position))
    return SamplingTensors.build(*each, device=DEVICE)


@triton.jit
def rand_kernel(seed_ptr, position_ptr, out_ptr):
    i = tl.program_id(0)
    tl.store(out_ptr + i, tl.rand(tl.load(seed_ptr + i), tl.load(position_ptr + i)))


def test_uniform_is_tritons():
    torch.manual_seed(0)
    seed = torch.randint(-(2**63), 2**63 - 1, (200,))
    position = torch.cat((torch.arange(100), torch.randint(0, 2**40, (100,))))
    out = torch.empty(200, device=DEVICE)
    rand_kernel[(200,)](seed.to(DEVICE), position.to(DEVICE), out)
    assert torch.equal(philox_uniform(seed, position), out.cpu())


def test_uniform_is_uniform():
    uniform = philox_uniform(torch.zeros(100_000, dtype=torch.int64), torch.arange(100_000))
    assert uniform.min() >= 0
    assert uniform.max() < 1
    counts = uniform.mul(20).long().bincount(minlength=20).double()
    assert ((counts - 5000) ** 2 / 5000).sum() < 50  # chi-squared, 19 degrees of freedom: beyond once in 10^4 seeds


def kept_probabilities(logits, temperature, top_k, top_p, min_p):
    """The distribution a token is drawn from, by sorting, in float64; no ties."""
    scaled = logits.double() / temperature
    if 0 < top_k < len(scaled):
        scaled[scaled < scaled.sort(descending=True).values[top_k - 1]] = -math.inf
    order = scaled.softmax(0).argsort(descending=True)
    before = scaled.softmax(0)[order].cumsum(0) - scaled.softmax(0)[order]
    scaled[order[before >= top_p]] = -math.inf
    probability = scaled.softmax(0)
    probability[probability < min_p * probability.max()] = 0
    return probability / probability.sum()


@pytest.mark.parametrize(
    "options",
    [
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 1.0, 0.0),
        (2.0, 7, 1.0, 0.0),
        (1.0, 0, 0.7, 0.0),
        (1.0, 0, 1.0, 0.3),
        (1.5, 20, 0.8, 0.1),
    ],
)
def test_draws_follow_the_distribution(options):
    torch.manual_seed(1)
    logits, rows = torch.randn(70), 20_000
    probability = kept_probabilities(logits, *options)
    tokens = sample_torch(logits.expand(rows, -1), params(rows, *options, seed=5, position=list(range(rows))))
    counts = tokens.bincount(minlength=70).double()
    kept = probability > 0
    assert counts[~kept].sum() == 0
    expected = probability[kept] * rows
    freedom = int(kept.sum()) - 1
    assert ((counts[kept] - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom) + 5


@st.composite
def batches(draw):
    """Rows of logits with ties, masked tokens and every kind of option."""
    rows, vocab = draw(st.integers(1, 4)), draw(st.sampled_from([1, 5, 63, 64, 200]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(rows, vocab, generator=generator) * draw(st.sampled_from([0.0, 0.1, 3.0, 30.0]))
    if draw(st.booleans()):
        logits = logits.round()  # ties
    masked = torch.rand(rows, vocab, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    masked[torch.arange(rows), torch.randint(vocab, (rows,), generator=generator)] = False
    logits = logits.masked_fill(masked, -math.inf).to(draw(st.sampled_from([torch.float32, torch.bfloat16])))

    def each(*values):
        return draw(st.lists(st.sampled_from(values), min_size=rows, max_size=rows))

    integers = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=rows, max_size=rows)
    return logits, SamplingTensors.build(
        each(0.0, 1e-9, 0.5, 1.0, 100.0), each(0, 1, 2, 10, 100, 2**31 - 1), each(1e-30, 0.1, 0.9, 0.999, 1.0),
        each(0.0, 0.1, 1.0), draw(integers), each(0, 1, 5000), device=DEVICE,
    )  # fmt: skip


@given(batches())
@settings(max_examples=8, deadline=None, derandomize=True)
def test_kernel_and_definition_agree(batch):
    logits, options = batch
    tokens = sample_torch(logits.to(DEVICE), options)
    assert torch.equal(sample_triton(logits.to(DEVICE), options), tokens)
    assert logits.gather(1, tokens.cpu()[:, None]).isfinite().all()


@pytest.mark.parametrize("implementation", [sample_torch, sample_triton])
def test_filters_end_where_they_should(implementation):
    """Tokens in falling order of probability and a uniform number near 1: the last token kept is the one drawn."""
    seed = next(i for i in range(10**6) if philox_uniform(torch.tensor([i]), torch.tensor([0])) > 0.9999)
    logits = torch.linspace(2, 0, 64)
    cumulative = logits.double().softmax(0).cumsum(0)
    top_k, top_p, min_p = [7, 0, 0, 0, 20], [1.0, 0.5, 0.83, 1.0, 0.4], [0.0, 0.0, 0.0, 0.5, 0.0]
    last = [7, *(int((cumulative < p).sum()) + 1 for p in (0.5, 0.83)), int((logits >= 2 - math.log(2)).sum())]
    last.append(int((cumulative < 0.4 * cumulative[19]).sum()) + 1)
    options = params(5, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    assert implementation(logits.expand(5, -1).to(DEVICE), options).tolist() == [n - 1 for n in last]


def test_kernel_and_definition_agree_over_several_tiles(monkeypatch):
    monkeypatch.setattr(module, "COLUMNS", 64)
    torch.manual_seed(0)
    rows, vocab = 6, 200
    logits = (torch.randn(rows, vocab + 20) * 3).to(DEVICE)[:, 10:-10]
    options = params(
        rows, [0.0, 1.0, 0.7, 1.3, 1.0, 2.0], [0, 0, 50, 0, 3, 199], [1.0, 1.0, 1.0, 0.8, 0.5, 0.99],
        [0, 0, 0, 0, 0, 0.01], list(range(rows)), list(range(rows)),
    )  # fmt: skip
    assert torch.equal(sample_triton(logits, options), sample_torch(logits, options))


@pytest.mark.parametrize("implementation", [sample_torch, sample_triton])
@pytest.mark.parametrize("vocab", [7, 9000])
def test_greedy_takes_the_first_of_equals(implementation, vocab):
    logits = torch.zeros(2, vocab, device=DEVICE)
    logits[1, 3:] = 1.0
    assert implementation(logits, params(2, temperature=0.0)).tolist() == [0, 3]


def test_greedy_of_many_rows_takes_the_first_of_equals():
    logits = torch.randint(0, 5, (64, 4001)).float()
    expected = [row.index(4.0) for row in logits.tolist()]
    assert sample_torch(logits, params(64, temperature=0.0)).tolist() == expected


def test_a_draw_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    logits = torch.randn(32, 500)
    options = dict(temperature=0.8, top_k=40, top_p=0.95, min_p=0.01)
    together = sample_torch(logits, params(32, **options, seed=list(range(32)), position=7))
    alone = [sample_torch(logits[i : i + 1], params(1, **options, seed=i, position=7)).item() for i in range(32)]
    assert together.tolist() == alone


@pytest.mark.parametrize("implementation", [sample_torch, sample_triton])
def test_one_token_left_is_taken(implementation):
    logits = torch.full((3, 100), -math.inf, device=DEVICE)
    logits[:, 42] = -5.0
    options = params(3, [1.0, 100.0, 1e-3], [0, 5, 0], [1.0, 1e-6, 0.9], [0.0, 1.0, 0.5], seed=[1, 2, 3])
    assert implementation(logits, options).tolist() == [42, 42, 42]


def test_logprobs():
    torch.manual_seed(0)
    logits = torch.randn(4, 50).bfloat16()
    chosen, values, ids = logprobs(logits, torch.tensor([3, 0, 49, 7]), 5)
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(chosen.double(), expected[torch.arange(4), [3, 0, 49, 7]], atol=1e-5, rtol=0)
    torch.testing.assert_close(values.double(), expected.sort(-1, descending=True).values[:, :5], atol=1e-5, rtol=0)
    torch.testing.assert_close(expected.gather(1, ids), values.double(), atol=1e-5, rtol=0)
    assert logprobs(logits, torch.zeros(4, dtype=torch.int64), 0)[1].shape == (4, 0)


def test_penalties_change_listed_rows_and_tokens_alone():
    torch.manual_seed(0)
    logits = torch.randn(4, 30)
    expected = logits.clone()
    rows, counts = [1, 3], [{4: 0, 5: 2, 6: 1}, {9: 3}]
    options = {"repetition": [1.3, 1.0], "presence": [0.5, -0.2], "frequency": [0.1, 0.7]}
    for i, (row, tokens) in enumerate(zip(rows, counts, strict=True)):
        for token, count in tokens.items():
            value = expected[row, token].item()
            value = value / options["repetition"][i] if value > 0 else value * options["repetition"][i]
            expected[row, token] = value - options["presence"][i] * (count > 0) - options["frequency"][i] * count
    apply_penalties_(logits, Penalties.build(rows, counts, **options))
    torch.testing.assert_close(logits, expected)
