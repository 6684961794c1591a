"""A budget shared among layers: what is observed of a layer, what its losses cost, and who gets how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert.attention_statistics import collect_attention
from convert.methods.score_aware import ScoreAwareOptions, convert_layer
from convert.methods.shared_budget import LayerCost, layer_cost, observe, shared_sizes
from convert.plan import Allocation, MethodRequest, candidates
from convert.stream import Stream
from engine.checkpoint import open_checkpoint
from engine.model.transformer import Layer
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
    sizes = shared_sizes(specs, 0.25, [LayerCost((0.5,), e) for e in (0.16, 0.01, 0.01)], [1.0, 1.0, 1.0])
    budgets = [rank + rope for rank, rope in sizes]
    assert budgets[0] == pytest.approx(2 * budgets[1], rel=0.1)
    assert budgets[1] == budgets[2]
    assert 0.85 * 768 < sum(budgets) <= 768
    assert all(rope == pytest.approx(rank, rel=0.15) for rank, rope in sizes)
    costs = [LayerCost((0.5, 0.25), e) for e in (0.16, 0.01, 0.01)]
    assert all(
        rope == pytest.approx(rank / 3, rel=0.15) for rank, rope in shared_sizes(specs, 0.25, costs, [1.0] * 3, 2)
    )
    weighed = shared_sizes(specs, 0.25, [LayerCost((0.5,), 0.01)] * 3, [16.0, 1.0, 1.0])
    assert weighed == sizes


@pytest.mark.parametrize("errors", [(0.0, 0.0), (0.0, 1.0), (1e9, 1e-9), (1.0, 1.0)])
@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.9])
@pytest.mark.parametrize("less_rope", [0, 2])
def test_sizes_always_fit(errors: tuple[float, float], ratio: float, less_rope: int) -> None:
    specs: list[GQASpec] = [gqa(heads=4, kv_heads=2, dim=16), gqa(heads=4, kv_heads=4, dim=32)]
    sizes = shared_sizes(specs, ratio, [LayerCost((9 / 16, 1 / 4), e) for e in errors], [1.0, 1.0], less_rope)
    for spec, (rank, rope) in zip(specs, sizes, strict=True):
        width = spec.num_kv_heads * spec.head_dim
        assert 1 <= rank <= 2 * width - rope
        assert 2 <= rope <= width
        assert rope % 2 == 0
    assert sum(map(sum, sizes)) <= ratio * (64 + 256)


def test_the_weight_of_a_layer(tmp_path: Path) -> None:
    source = open_checkpoint(make_source(tmp_path))
    layer = Layer(source.spec.layers[0], source.spec, source.layer(0))
    stream = Stream([[1, 7, 9, 30], [1, 2, 3, 4], [5, 6]], source.outer()["embed_tokens.weight"], source.spec)
    x = torch.cat([chunk.x for chunk in stream.chunks])
    y = torch.cat(list(stream.attended(layer)))
    assert stream.weight(layer) == pytest.approx(float(y.square().sum() / (x + y).square().sum()), rel=1e-5)


def test_where_budgets_are_shared(tmp_path: Path) -> None:
    spec = open_checkpoint(make_source(tmp_path)).spec
    kinds = [isinstance(way, Allocation) for way in candidates(spec, MethodRequest(cache_ratio=0.5))]
    assert kinds.count(True) == 3
    for request in (MethodRequest(cache_ratio=1.0), MethodRequest(kv_lora_rank=8, qk_rope_head_dim=4)):
        assert not any(isinstance(way, Allocation) for way in candidates(spec, request))
