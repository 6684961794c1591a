"""Random FP8 weights with a scale for each block, and what they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def blocks(size: int) -> int:
    return -(-size // BLOCK)


def random_fp8(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """-> float8 [rows, columns] of the whole range, 448 and subnormals too, and fp32 scales of each 128 x 128 block.

    The scales, which differ by up to 8, give the product with a standard normal vector a variance of about 1.
    """
    weight = torch.randn(rows, columns, generator=generator) * 2.0 ** torch.randint(
        -9, 8, (rows, columns), generator=generator
    )
    weight = weight.clamp(-448, 448).to(torch.float8_e4m3fn)
    spread = 2.0 ** torch.randint(-3, 1, (blocks(rows), blocks(columns)), generator=generator)
    return weight, (1 + torch.rand(spread.shape, generator=generator)) * spread / (64 * columns**0.5)


def multiplied_out(weight: Tensor, scale: Tensor) -> Tensor:
    """In float64, with a scale for each block."""
    return weight.double() * torch.kron(scale.double(), torch.ones(BLOCK, BLOCK))[: len(weight), : weight.shape[1]]
