"""The sizes of a score-aware conversion's layers: each its own split of a budget, even or shared out among the layers.

A shared budget gives more to a layer whose losses would cost more. What a layer's loss adds to the KL is about
proportional to |error of its output|^2 / |residual stream|^2, and falls with its budget b about as b^-3
(docs/conversion.md). The sum over layers is least where b is as the fourth root of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convert.attention_statistics import AttentionStatistics, collect_attention
from convert.differentiable import mla_attention
from convert.methods.score_aware import ScoreAwareOptions, convert_layer
from convert.quality import relative_error
from convert.sizes import budget_of, rounded
from engine.spec import GQASpec

FALL = 3  # the exponent
LEAST_BUDGET = 3  # of any layer: a rotated pair and one latent number
SAMPLE_TOKENS = 4096  # that errors are measured on


@dataclass(frozen=True)
class Observed:
    """A source layer: what a conversion is made from, and a sample of the text as it sees and answers it."""

    statistics: AttentionStatistics
    sample: list[tuple[Tensor, Tensor]]  # normed inputs and outputs, [windows, length, hidden] each


@dataclass(frozen=True)
class LayerCost:
    """At an even share of the budget: the best split, and the squared relative error of the output with it."""

    rope_shares: tuple[float, ...]  # dr / (r + dr): the best split's, then those with less RoPE, ever less
    squared_error: float


def observe(spec: GQASpec, tensors: Mapping[str, Tensor], inputs: Iterable[Tensor]) -> Observed:
    """A LayerSurvey's `collect`."""
    sample: list[tuple[Tensor, Tensor]] = []
    statistics = collect_attention(spec, tensors, inputs, sample, SAMPLE_TOKENS)
    return Observed(statistics, sample)


def layer_cost(
    spec: GQASpec, tensors: Mapping[str, Tensor], observed: Observed, splits: Sequence[tuple[int, int]]
) -> LayerCost:
    """A LayerSurvey's `find`: the layer is converted by each split (r, dr)."""
    errors: dict[float, float] = {}  # by share
    for rank, rope in dict.fromkeys(splits):
        mla, made = convert_layer(spec, tensors, observed.statistics, ScoreAwareOptions(rank, rope))
        mla = replace(mla, sliding_window=spec.sliding_window, score_softcap=spec.score_softcap)
        weights = {name: t.to(observed.sample[0][0].dtype) for name, t in made.items()}
        outputs = ((y, mla_attention(mla, weights, x)) for x, y in observed.sample)
        errors[rope / (rank + rope)] = relative_error(outputs) ** 2
    best = min(errors, key=errors.__getitem__)
    return LayerCost(tuple(sorted((share for share in errors if share <= best), reverse=True)), errors[best])


def even_budgets(specs: Sequence[GQASpec], ratio: float) -> list[int]:
    """The same share of every layer's cache."""
    return [budget_of(spec, ratio) for spec in specs]


def shared_budgets(
    specs: Sequence[GQASpec], ratio: float, costs: Sequence[LayerCost], weights: Sequence[float]
) -> list[float]:
    """As much in all, not rounded. weights: |output|^2 / |residual stream|^2 of each layer's attention."""
    even = torch.tensor(even_budgets(specs, ratio), dtype=torch.float64)
    cost = torch.tensor([c.squared_error * w for c, w in zip(costs, weights, strict=True)], dtype=torch.float64)
    parts = even * cost.clamp_min(1e-12 * float(cost.max()) or 1.0) ** (1 / (FALL + 1))
    budgets = LEAST_BUDGET + parts / parts.sum() * (even.sum() - LEAST_BUDGET * len(even))
    return [min(budget, spec.cache_width) for spec, budget in zip(specs, budgets.tolist(), strict=True)]


def split_sizes(
    specs: Sequence[GQASpec], budgets: Sequence[float], costs: Sequence[LayerCost], less_rope: int = 0
) -> tuple[tuple[int, int], ...]:
    """-> (r, dr) of every layer: its own best split, or one with so many steps less RoPE, as far as there is one.

    What rounding leaves of a layer's budget goes to the next one."""
    sizes, left = [], 1e-6  # sums of shares may come out a hair below a whole number
    for spec, budget, cost in zip(specs, budgets, costs, strict=True):
        share = cost.rope_shares[min(less_rope, len(cost.rope_shares) - 1)]
        rope = min(max(2, 2 * rounded(round(share * budget) // 2)), spec.num_kv_heads * spec.head_dim)
        left += budget - rope
        rank = rounded(min(int(left), spec.cache_width - rope))
        left -= rank
        sizes.append((rank, rope))
    return tuple(sizes)
