"""silu(gate) * up, the middle of a gated MLP (arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels._triton import jit, tl

COLUMNS = 1024  # of one program


def silu_mul_torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@jit
def _silu_mul_kernel(
    gate_up_ptr: tl.tensor,  # [T, 2 width]
    out_ptr: tl.tensor,  # [T, width]
    width: int,
    stride: int,
    COLUMNS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < width
    gate = tl.load(gate_up_ptr + token * stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + token * stride + width + columns, mask=mask, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + token * width + columns, gated.to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() > 0:
        _silu_mul_kernel[(num_tokens, -(-width // COLUMNS))](
            gate_up, out, width, gate_up.stride(0), COLUMNS=COLUMNS, num_warps=4
        )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 I], the gates' columns first -> [T, I]."""
    return silu_mul_triton(gate_up) if gate_up.is_cuda else silu_mul_torch(gate_up)
