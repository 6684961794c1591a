"""The rotations of a step: one table for each distinct RopeSpec of the model, made once and read by every layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.kernels.rope import rope_table
from engine.spec import RopeSpec


def interleave(channels: Tensor, spec: RopeSpec, heads: int) -> Tensor:
    """Re-order the rows of a projection [heads * d, ...] from the checkpoint's layout to interleaved pairs."""
    if spec.layout == "interleaved":
        return channels
    halves = channels.unflatten(0, (heads, 2, -1))  # [heads, 2, d/2, ...]
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


class Rotary:
    """Distinct rotations of a model. `tables(positions)[index]` is a layer's [T, n, d/2, 2], n being 1 or more."""

    def __init__(self, keys: Iterable[tuple[RopeSpec, int]], device: torch.device) -> None:
        """`keys`: for each layer its RopeSpec and how many rows of frequencies its table has."""
        distinct = dict.fromkeys(keys)
        self._index = {key: i for i, key in enumerate(distinct)}
        self._frequencies = [
            (torch.tensor(spec.inv_freq, dtype=torch.float64, device=device).view(rows, -1), spec.scale)
            for spec, rows in distinct
        ]

    def index(self, spec: RopeSpec, rows: int) -> int:
        return self._index[spec, rows]

    def tables(self, positions: Tensor) -> list[Tensor]:
        return [rope_table(positions, inv_freq, scale) for inv_freq, scale in self._frequencies]
