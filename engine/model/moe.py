"""Mixture of experts: each token goes to a few, and gets the weighted sum of what they make of it.

Routing is computed in fp32, whatever the model's dtype: near ties decide which experts run.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from engine.kernels.fp8_linear import BLOCK
from engine.kernels.moe import moe_torch, moe_triton, rows_per_scale
from engine.kernels.route import route
from engine.model.linear import projection
from engine.model.mlp import GatedMLP
from engine.spec import GatedMLPSpec, MoESpec
from engine.tensor_map import under


class MixtureOfExperts:
    """On a GPU `gate_up` [E, 2 I, hidden] and `down` [E, hidden, I]; elsewhere a Linear for each expert."""

    def __init__(self, spec: MoESpec, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: gate.weight, and gate.e_score_correction_bias where the spec has it; experts.<i>.gate_proj.weight,
        up_proj and down_proj; the same under shared_experts., and shared_expert_gate.weight. Each expert's are read
        once and one after another: where `tensors` makes them as they are read, no second copy of them ever exists.
        """
        self.spec = spec
        self.router = tensors["gate.weight"].float()
        self.bias = tensors["gate.e_score_correction_bias"].float() if spec.correction_bias else None
        self.shared, self.shared_gate = None, None
        if spec.shared_intermediate_size:
            self.shared = GatedMLP(GatedMLPSpec(spec.shared_intermediate_size), under(tensors, "shared_experts."))
        if spec.shared_gate:
            self.shared_gate = projection(tensors, "shared_expert_gate")
        if self.router.is_cuda:
            self._stacked = stack(spec, tensors)
        else:
            experts = [GatedMLP(GatedMLPSpec(spec.intermediate_size), under(tensors, f"experts.{i}."))
                       for i in range(spec.num_experts)]  # fmt: skip
            self._apart = [expert.gate_up for expert in experts], [expert.down for expert in experts]

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        experts, weights = route(self.spec, F.linear(x.float(), self.router), self.bias)
        out = (
            moe_triton(x, experts, weights, *self._stacked)
            if x.is_cuda
            else moe_torch(x, experts, weights, *self._apart)
        )
        if self.shared is None:
            return out
        shared = self.shared(x)
        return out + (shared if self.shared_gate is None else self.shared_gate(x).sigmoid() * shared)


def stack(spec: MoESpec, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """-> gate_up [E, 2 I, hidden], down [E, hidden, I]; where they are FP8, their scales as well: as moe_triton's."""
    weights = _stacked(spec, tensors, "weight", 1, 1)
    if "experts.0.down_proj.scale" not in tensors:
        return weights
    return *weights, *_stacked(spec, tensors, "scale", rows_per_scale(spec.intermediate_size), BLOCK)


def _stacked(
    spec: MoESpec, tensors: Mapping[str, Tensor], kind: str, gate_step: int, down_step: int
) -> tuple[Tensor, Tensor]:
    """Each expert's `<name>.<kind>`, gates and ups one above the other, of every step-th row."""
    first, width = tensors[f"experts.0.down_proj.{kind}"][::down_step], spec.intermediate_size // gate_step
    down = first.new_empty(spec.num_experts, *first.shape)
    gate_up = first.new_empty(spec.num_experts, 2 * width, first.shape[0])
    for i in range(spec.num_experts):
        gate_up[i, :width] = tensors[f"experts.{i}.gate_proj.{kind}"][::gate_step]
        gate_up[i, width:] = tensors[f"experts.{i}.up_proj.{kind}"][::gate_step]
        down[i] = tensors[f"experts.{i}.down_proj.{kind}"][::down_step]
    return gate_up, down
