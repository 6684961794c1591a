"""A budget shared among layers: what is observed of a layer, what its losses cost, and who gets how much."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert.attention_statistics import collect_attention
from convert.methods.score_aware import ScoreAwareOptions, convert_layer
from convert.methods.shared_budget import LayerCost, even_budgets, layer_cost, observe, shared_budgets, split_sizes
from convert.plan import Allocation, MethodRequest, candidates
from convert.stream import Stream
from engine.checkpoint import open_checkpoint
from engine.model.transformer import AttentionHalf
from engine.spec import GQASpec
from tests.convert.plain_mla import rotate
from tests.convert.sources import make_source
from tests.convert.test_score_aware import CASES, gqa, inputs, layer_tensors, projected


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_sample_is_what_attention_puts_out(case: dict[str, Any]) -> None:
    """Head by head, in float64; and the statistics are the same as without a sample."""
    spec = gqa(**case)
    tensors, x = layer_tensors(spec), inputs()
    observed = observe(spec, tensors, [x])
    (seen, put_out), *rest = observed.sample
    assert not rest
    assert torch.equal(seen, x)
    inv_freq = torch.tensor(spec.rope.inv_freq, dtype=torch.float64)
    for window, found in zip(x, put_out, strict=True):
        q, k, v = projected(spec, tensors, window)
        heads = []
        for h in range(spec.num_heads):
            j = h * spec.num_kv_heads // spec.num_heads
            turned = [rotate(y, inv_freq, spec.rope.layout, spec.rope.scale) for y in (q[h], k[j])]
            scores = turned[0] @ turned[1].T * spec.softmax_scale
            if spec.score_softcap is not None:
                scores = spec.score_softcap * torch.tanh(scores / spec.score_softcap)
            ages = torch.arange(len(scores))[:, None] - torch.arange(len(scores))
            hidden = (ages < 0) | (ages >= (spec.sliding_window or len(scores)))
            scores = scores.masked_fill(hidden, float("-inf"))
            heads.append(scores.softmax(-1) @ v[j])
        expected = torch.cat(heads, 1) @ tensors["o_proj.weight"].T + tensors.get("o_proj.bias", 0.0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    alone = collect_attention(spec, tensors, [x])
    assert torch.equal(alone.kv_moment, observed.statistics.kv_moment)


def test_a_sample_ends_where_it_should() -> None:
    spec = gqa()
    sample: list[tuple[Tensor, Tensor]] = []
    parts = list(inputs(6).split(2))  # 12 tokens a window
    collect_attention(spec, layer_tensors(spec), parts, sample, 40)
    assert [len(x) for x, _ in sample] == [2, 1]
    assert all(x.shape == y.shape for x, y in sample)


def test_a_layer_is_judged_by_its_best_split() -> None:
    spec = gqa()
    tensors, x = layer_tensors(spec), inputs()
    observed = observe(spec, tensors, [x])
    splits = [(10, 2), (8, 4), (4, 8), (8, 4)]
    alone = [layer_cost(spec, tensors, observed, [split]) for split in splits]
    best = layer_cost(spec, tensors, observed, splits)
    least = min(alone, key=lambda cost: cost.squared_error)
    assert best.squared_error == least.squared_error
    assert best.rope_shares == tuple(share for share in (8 / 12, 4 / 12, 2 / 12) if share <= least.rope_shares[0])
    assert len({cost.squared_error for cost in alone}) == 3
    whole = layer_cost(spec, tensors, observed, [(16, 16)])
    assert whole.squared_error < 1e-9 < best.squared_error
    assert whole.rope_shares == (0.5,)
    mla, _ = convert_layer(spec, tensors, observed.statistics, ScoreAwareOptions(16, 16))
    assert mla.cache_width == spec.cache_width


def test_budgets_follow_the_fourth_root_of_the_cost() -> None:
    specs = [gqa(heads=8, kv_heads=8, dim=64)] * 3
    budgets = shared_budgets(specs, 0.25, [LayerCost((0.5,), e) for e in (0.16, 0.01, 0.01)], [1.0, 1.0, 1.0])
    assert budgets[0] == pytest.approx(2 * budgets[1], rel=0.02)
    assert budgets[1] == budgets[2]
    assert sum(budgets) == pytest.approx(768, abs=3)
    assert shared_budgets(specs, 0.25, [LayerCost((0.5,), 0.01)] * 3, [16.0, 1.0, 1.0]) == budgets
    assert even_budgets(specs, 0.25) == [256] * 3


def test_splits_have_as_much_less_rope_as_there_is() -> None:
    specs, costs = [gqa(heads=8, kv_heads=8, dim=64)] * 2, [LayerCost((0.5, 0.25), 0.1), LayerCost((0.125,), 0.1)]
    sizes = [split_sizes(specs, [256, 128], costs, less_rope) for less_rope in (0, 1, 2)]
    assert sizes == [((128, 128), (112, 16)), ((192, 64), (112, 16)), ((192, 64), (112, 16))]


def test_what_rounding_leaves_goes_to_the_next_layer() -> None:
    specs, costs = [gqa(heads=8, kv_heads=8, dim=64)] * 3, [LayerCost((0.25,), 0.1)] * 3
    sizes = split_sizes(specs, [252.5, 247.5, 268.0], costs)
    assert sizes == ((192, 60), (176, 60), (208, 64))  # by itself the last would be 192 + 64
    assert split_sizes(specs, [1100.0, 1024.0, 1024.0], costs)[0] == (768, 256)  # no more than a layer has


@pytest.mark.parametrize("errors", [(0.0, 0.0), (0.0, 1.0), (1e9, 1e-9), (1.0, 1.0)])
@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.9])
@pytest.mark.parametrize("less_rope", [0, 2])
def test_sizes_always_fit(errors: tuple[float, float], ratio: float, less_rope: int) -> None:
    specs: list[GQASpec] = [gqa(heads=4, kv_heads=2, dim=16), gqa(heads=4, kv_heads=4, dim=32)]
    costs = [LayerCost((9 / 16, 1 / 4), e) for e in errors]
    for budgets in (even_budgets(specs, ratio), shared_budgets(specs, ratio, costs, [1.0, 1.0])):
        sizes = split_sizes(specs, budgets, costs, less_rope)
        for spec, (rank, rope) in zip(specs, sizes, strict=True):
            width = spec.num_kv_heads * spec.head_dim
            assert 1 <= rank <= 2 * width - rope
            assert 2 <= rope <= width
            assert rope % 2 == 0
        assert sum(map(sum, sizes)) <= ratio * (64 + 256)


def test_the_weight_of_a_layer(tmp_path: Path) -> None:
    source = open_checkpoint(make_source(tmp_path))
    half = AttentionHalf(source.spec.layers[0], source.spec, source.layer(0))
    stream = Stream([[1, 7, 9, 30], [1, 2, 3, 4], [5, 6]], source.outer()["embed_tokens.weight"], source.spec)
    x = torch.cat([chunk.x for chunk in stream.chunks])
    y = torch.cat(list(stream.attended(half)))
    assert stream.weight(half) == pytest.approx(float(y.square().sum() / (x + y).square().sum()), rel=1e-5)


def test_where_budgets_are_shared(tmp_path: Path) -> None:
    spec = open_checkpoint(make_source(tmp_path)).spec

    def allocations(request: MethodRequest) -> int:
        return sum(isinstance(way, Allocation) for way in candidates(spec, request))

    assert allocations(MethodRequest(cache_ratio=0.5)) == 6
    assert allocations(MethodRequest(cache_ratio=1.0)) == 1
    assert allocations(MethodRequest(kv_lora_rank=8, qk_rope_head_dim=4)) == 0
    alone = replace(spec, layers=spec.layers[:1])
    assert len(candidates(alone, MethodRequest(cache_ratio=0.5))) == 3
