"""Dense feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from engine.kernels.gated_mul import gated_mul
from engine.model.linear import projection
from engine.spec import Activation, GatedMLPSpec, PlainMLPSpec


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu_squared": relu_squared,
}


class GatedMLP:
    """down(activation(gate(x)) * up(x)); `gate_up` [2 I, hidden] is both input projections, `down` [hidden, I]."""

    def __init__(self, spec: GatedMLPSpec, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: gate_proj, up_proj, down_proj as `<name>.weight` and, where the spec has them, `<name>.bias`."""
        self.activation = spec.activation
        both = ("gate_proj", "up_proj")
        self.gate_up = projection(tensors, *both, biased=both if spec.bias else ())
        self.down = projection(tensors, "down_proj", biased=("down_proj",) if spec.bias else ())

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        return self.down(gated_mul(self.gate_up(x), self.activation))


class PlainMLP:
    """down(activation(up(x)))."""

    def __init__(self, spec: PlainMLPSpec, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: up_proj, down_proj as `<name>.weight` and, where the spec has them, `<name>.bias`."""
        self.activation = ACTIVATIONS[spec.activation]
        self.up = projection(tensors, "up_proj", biased=("up_proj",) if spec.bias else ())
        self.down = projection(tensors, "down_proj", biased=("down_proj",) if spec.bias else ())

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        return self.down(self.activation(self.up(x)))
