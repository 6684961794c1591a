"""The routing kernel against routing as published, in Python's floats: tests/model/test_moe.py tests the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.kernels.route import route_torch, route_triton
from engine.spec import MoESpec
from tests.model.test_moe import ROUTINGS, E, published

from .conftest import DEVICE

SHAPES = {
    "deepseek-v3 as published": replace(
        ROUTINGS["deepseek-v3"], num_experts=256, experts_per_token=8, num_groups=8, groups_per_token=4
    ),
    "deepseek-v2 as published": replace(
        ROUTINGS["deepseek-v2"], num_experts=160, experts_per_token=6, num_groups=8, groups_per_token=3
    ),
    "kimi-k2 as published": replace(ROUTINGS["moonlight"], num_experts=384, experts_per_token=8),
    "groups that are kept whole": replace(ROUTINGS["deepseek-v3"], experts_per_token=6, groups_per_token=2),
    "a group that is an expert": replace(ROUTINGS["deepseek-v2"], num_groups=E, groups_per_token=5),
    "one expert of one": MoESpec(1, 1, 8),
}


@pytest.mark.parametrize("name", [*ROUTINGS, *SHAPES])
def test_against_the_published(name):
    spec = (ROUTINGS | SHAPES)[name]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, spec.num_experts, generator=generator) * 2
    bias = torch.randn(spec.num_experts, generator=generator) if spec.correction_bias else None
    experts, weights = route_triton(spec, logits.to(DEVICE), None if bias is None else bias.to(DEVICE))
    assert experts.dtype == torch.int64
    assert weights.dtype == torch.float32
    for t in range(len(logits)):
        expected = published(spec, logits[t].tolist(), None if bias is None else bias.tolist())
        found = dict(zip(experts[t].tolist(), weights[t].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", ["deepseek-v3", "mixtral"])
def test_ties_choose_distinct_experts(name):
    spec = ROUTINGS[name]
    logits, bias = torch.zeros(2, E, device=DEVICE), torch.full((E,), -5.0, device=DEVICE)
    experts, weights = route_triton(spec, logits, bias if spec.correction_bias else None)
    assert all(len(set(row)) == spec.experts_per_token for row in experts.tolist())
    torch.testing.assert_close(weights.cpu(), torch.full((2, 3), spec.scale / 3))


@pytest.mark.filterwarnings("ignore:overflow")  # numpy, in the interpreter
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_extreme_logits(name, size):
    """Sigmoids that are all 0 are no NaN; a softmax does not overflow."""
    spec = ROUTINGS[name]
    logits = torch.full((1, E), size)
    logits[0, 3] *= 0.5
    _, weights = route_triton(spec, logits.to(DEVICE), torch.zeros(E, device=DEVICE) if spec.correction_bias else None)
    _, expected = route_torch(spec, logits.double(), torch.zeros(E) if spec.correction_bias else None)
    torch.testing.assert_close(weights.cpu().double().sort().values, expected.sort().values)


@pytest.mark.filterwarnings("ignore")  # numpy, in the interpreter
@pytest.mark.parametrize("name", ROUTINGS)
def test_nan_chooses_experts_that_exist(name):
    """A token that is broken must not read beyond the experts' weights, nor break the token beside it."""
    spec = ROUTINGS[name]
    logits = torch.randn(3, E, generator=torch.Generator().manual_seed(0))
    logits[1] = float("nan")
    logits[2, 5] = float("nan")
    bias = torch.zeros(E) if spec.correction_bias else None
    experts, weights = route_triton(spec, logits.to(DEVICE), bias if bias is None else bias.to(DEVICE))
    assert 0 <= int(experts.min()) <= int(experts.max()) < E
    assert weights[0].isfinite().all()
    assert set(experts[0].tolist()) == set(route_torch(spec, logits[:1], bias)[0][0].tolist())


def test_no_tokens():
    experts, weights = route_triton(ROUTINGS["mixtral"], torch.empty(0, E, device=DEVICE), None)
    assert experts.shape == weights.shape == (0, 3)
