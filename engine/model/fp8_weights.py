"""Which weights stay FP8 in memory: decided here, from the device and the checkpoint, and nowhere else.

A weight stored in FP8 stays so on a GPU that widens FP8 itself, if its scales are of 128 x 128 blocks, as published.
Everywhere else it is multiplied out as it is read. So is, on every device, the kv_b_proj of latent attention: it is
small, and decodes use it head by head.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from engine.kernels.fp8_linear import BLOCK

CAPABILITY = (8, 9)  # of the first GPUs with FP8: Ada (8.9) and Hopper (9.0)
NO_FP8 = ("self_attn.kv_b_proj.weight", "mlp.gate.weight", "mlp.shared_expert_gate.weight")  # what never stays FP8


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device; None of any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def staying_fp8(
    stored: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
    block: tuple[int, ...] | None,
    capability: tuple[int, int] | None,
) -> frozenset[str]:
    """Names of a layer's weights that stay FP8, on a GPU of this capability (None: no GPU).

    `stored`: those in FP8 on disk; `shapes`: of all the layer's tensors; `block`: rows and columns that share a scale.
    Attention and MLP each stay whole or are multiplied out whole: their projections are joined.
    """
    if capability is None or capability < CAPABILITY or block != (BLOCK, BLOCK):
        return frozenset()
    staying: set[str] = set()
    for part in ("self_attn.", "mlp."):
        projections = {n for n, s in shapes.items() if n.startswith(part) and len(s) == 2 and n not in NO_FP8}
        if projections <= set(stored):
            staying |= projections
    return frozenset(staying)
