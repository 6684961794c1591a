"""silu(gate) * up, the middle of a gated MLP (arXiv 2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul_torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 I], the gates' columns first -> [T, I]."""
    return silu_mul_torch(gate_up)
