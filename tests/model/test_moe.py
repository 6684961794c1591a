"""Routing as each family publishes it, in float64 and one token at a time; dense MLPs other than gated SiLU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.moe import moe_triton
from engine.kernels.route import route
from engine.model.mlp import GatedMLP, PlainMLP
from engine.model.moe import MixtureOfExperts, stack
from engine.spec import GatedMLPSpec, MoESpec, PlainMLPSpec
from engine.tensor_map import TensorMap, under

E, K, GROUPS, KEPT = 12, 3, 4, 2


def published(spec: MoESpec, logits: list[float], bias: list[float] | None) -> dict[int, float]:
    """One token's experts and their weights, in Python's floats."""
    if spec.scoring == "softmax":
        exponentials = [math.exp(x) for x in logits]
        scores = [x / sum(exponentials) for x in exponentials]
    else:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    choice = list(scores) if bias is None else [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // spec.num_groups
    best = []
    for g in range(spec.num_groups):
        members = sorted(choice[g * size : (g + 1) * size], reverse=True)
        best.append(members[0] if spec.group_score == "max" else members[0] + members[1])
    kept = sorted(range(spec.num_groups), key=lambda g: -best[g])[: spec.groups_per_token]
    candidates = [e for e in range(len(logits)) if e // size in kept]
    chosen = sorted(candidates, key=lambda e: -choice[e])[: spec.experts_per_token]
    total = sum(scores[e] for e in chosen) if spec.normalize else 1.0
    return {e: scores[e] / total * spec.scale for e in chosen}


ROUTINGS = {
    "mixtral": MoESpec(E, K, 8),
    "qwen2": MoESpec(E, K, 8, normalize=False),
    "deepseek-v2": MoESpec(
        E, K, 8, num_groups=GROUPS, groups_per_token=KEPT, group_score="max", normalize=False, scale=16.0
    ),
    "deepseek-v3": MoESpec(
        E, K, 8, scoring="sigmoid", correction_bias=True, num_groups=GROUPS, groups_per_token=KEPT,
        group_score="top2_sum", scale=2.5,
    ),
    "moonlight": MoESpec(E, K, 8, scoring="sigmoid", correction_bias=True, group_score="top2_sum", scale=2.446),
    "one expert": MoESpec(E, 1, 8, scoring="sigmoid", normalize=False),
    "all experts": MoESpec(E, E, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTINGS)
def test_routing(name: str) -> None:
    spec = ROUTINGS[name]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, E, generator=generator, dtype=torch.float64) * 2
    bias = torch.randn(E, generator=generator, dtype=torch.float64) if spec.correction_bias else None
    experts, weights = route(spec, logits, bias)
    for t in range(len(logits)):
        expected = published(spec, logits[t].tolist(), None if bias is None else bias.tolist())
        found = dict(zip(experts[t].tolist(), weights[t].tolist(), strict=True))
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ROUTINGS)
def test_routing_never_looks_at_its_tensors(name: str) -> None:
    """On tensors without values: nothing waits for the device."""
    spec, logits = ROUTINGS[name], torch.empty(7, E, device="meta")
    experts, weights = route(spec, logits, logits[0] if spec.correction_bias else None)
    assert experts.shape == weights.shape == (7, spec.experts_per_token)


def test_selection_by_negative_scores_stays_in_its_groups() -> None:
    """A bias may push every score of the groups that are kept below 0, where masked ones would stand."""
    logits, bias = torch.zeros(1, E), torch.full((E,), -5.0)
    bias[:6] = -3.0
    experts, weights = route(ROUTINGS["deepseek-v3"], logits, bias)
    assert set(experts[0].tolist()) <= set(range(6))
    assert weights.tolist() == [pytest.approx([2.5 / 3] * 3)]


def test_scores_that_are_all_zero_are_no_nan() -> None:
    _, weights = route(ROUTINGS["moonlight"], torch.full((2, E), -1e4), torch.zeros(E))
    assert weights.tolist() == [[0.0] * K] * 2


def mixture_tensors(spec: MoESpec, hidden: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    tensors = {"gate.weight": weight(spec.num_experts, hidden)}
    sizes = {f"experts.{i}.": spec.intermediate_size for i in range(spec.num_experts)}
    for prefix, size in (sizes | {"shared_experts.": max(1, spec.shared_intermediate_size)}).items():
        tensors[f"{prefix}gate_proj.weight"], tensors[f"{prefix}up_proj.weight"] = (
            weight(size, hidden),
            weight(size, hidden),
        )
        tensors[f"{prefix}down_proj.weight"] = weight(hidden, size)
    tensors["shared_expert_gate.weight"] = weight(1, hidden)
    return tensors


def test_a_gated_shared_expert() -> None:
    spec = MoESpec(5, 2, 7, shared_intermediate_size=11, shared_gate=True, scale=1.5)
    tensors = mixture_tensors(spec, 16)
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(2))
    w = {name: tensor.double() for name, tensor in tensors.items()}

    def mlp(prefix: str, row: Tensor) -> Tensor:
        return w[f"{prefix}down_proj.weight"] @ (
            F.silu(w[f"{prefix}gate_proj.weight"] @ row) * (w[f"{prefix}up_proj.weight"] @ row)
        )

    expected = []
    for row in x.double():
        chosen = published(spec, (w["gate.weight"] @ row).tolist(), None)
        routed = sum(weight * mlp(f"experts.{e}.", row) for e, weight in chosen.items())
        expected.append(routed + (w["shared_expert_gate.weight"] @ row).sigmoid() * mlp("shared_experts.", row))
    torch.testing.assert_close(MixtureOfExperts(spec, tensors)(x).double(), torch.stack(expected), rtol=0, atol=1e-5)


def test_stacked_for_the_grouped_kernel() -> None:
    spec = MoESpec(5, 2, 7, scale=1.5)
    tensors = mixture_tensors(spec, 16)
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(2))
    found = moe_triton(x, *route(spec, x @ tensors["gate.weight"].T, None), *stack(spec, tensors))
    torch.testing.assert_close(found, MixtureOfExperts(spec, tensors)(x), rtol=0, atol=1e-5)


def test_each_expert_is_made_once() -> None:
    spec = MoESpec(5, 2, 7, shared_intermediate_size=11, shared_gate=True)
    tensors, made = mixture_tensors(spec, 16), []

    def make(name: str) -> Tensor:
        made.append(name)
        return tensors[name.removeprefix("mlp.")]

    MixtureOfExperts(spec, under(TensorMap([f"mlp.{name}" for name in tensors], make), "mlp."))
    assert sorted(made) == sorted(f"mlp.{name}" for name in tensors)


@pytest.mark.parametrize("bias", [False, True])
def test_dense_mlps(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    names = {"gate_proj": (24, 8), "up_proj": (24, 8), "down_proj": (8, 24)}
    tensors = {f"{name}.weight": torch.randn(*shape, generator=generator) for name, shape in names.items()}
    tensors |= {f"{name}.bias": torch.randn(shape[0], generator=generator) for name, shape in names.items()}
    x = torch.randn(5, 8, generator=generator)

    def linear(name: str, rows: Tensor) -> Tensor:
        return rows.double() @ tensors[f"{name}.weight"].double().T + (tensors[f"{name}.bias"].double() if bias else 0)

    plain = linear("down_proj", linear("up_proj", x).clamp(min=0) ** 2)
    found = PlainMLP(PlainMLPSpec(24, bias), tensors)(x)
    torch.testing.assert_close(found.double(), plain, rtol=1e-5, atol=1e-4)
    gate = linear("gate_proj", x)
    gelu = 0.5 * gate * (1 + (math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)).tanh())
    gated = linear("down_proj", gelu * linear("up_proj", x))
    found = GatedMLP(GatedMLPSpec(24, bias, "gelu_tanh"), tensors)(x)
    torch.testing.assert_close(found.double(), gated, rtol=1e-5, atol=1e-4)
