"""activation(gate) * up, the middle of a gated MLP (arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels._triton import jit, tl

COLUMNS = 1024  # of one program


def gated_mul_torch(gate_up: Tensor, activation: str = "silu") -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    return F.relu(gate).square() * up


@jit
def _gated_mul_kernel(
    gate_up_ptr: tl.tensor,  # [T, 2 width]
    out_ptr: tl.tensor,  # [T, width]
    width: int,
    stride: int,
    ACTIVATION: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < width
    gate = tl.load(gate_up_ptr + token * stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + token * stride + width + columns, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "relu_squared":
        active = tl.maximum(gate, 0.0)
        active *= active
    else:  # gate * sigmoid(x); (1 + tanh u) / 2 is sigmoid(2 u)
        x = gate
        if ACTIVATION == "gelu_tanh":
            x = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 sqrt(2 / pi)
        active = gate / (1.0 + tl.exp(-x))
    tl.store(out_ptr + token * width + columns, (active * up).to(out_ptr.dtype.element_ty), mask=mask)


def gated_mul_triton(gate_up: Tensor, activation: str = "silu") -> Tensor:
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() > 0:
        _gated_mul_kernel[(num_tokens, -(-width // COLUMNS))](
            gate_up, out, width, gate_up.stride(0), ACTIVATION=activation, COLUMNS=COLUMNS, num_warps=4
        )
    return out


def gated_mul(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """[T, 2 I], the gates' columns first -> [T, I]. `activation`: silu, gelu_tanh or relu_squared."""
    return gated_mul_triton(gate_up, activation) if gate_up.is_cuda else gated_mul_torch(gate_up, activation)
