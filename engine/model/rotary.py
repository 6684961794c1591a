"""The rotations of a step: one table for each distinct RopeSpec of the model, made once and read by every layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.kernels.rope import rope_table
from engine.spec import MLASpec, RopeSpec


def interleave(channels: Tensor, spec: RopeSpec, heads: int) -> Tensor:
    """Re-order the rows of a projection [heads * d, ...] from the checkpoint's layout to interleaved pairs."""
    if spec.layout == "interleaved":
        return channels
    halves = channels.unflatten(0, (heads, 2, -1))  # [heads, 2, d/2, ...]
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


def interleave_row(kv_a: Tensor, spec: MLASpec) -> Tensor:
    """Rows [latent | rope keys] of the checkpoint's kv_a_proj_with_mqa, the latter to interleaved pairs."""
    if not spec.rope_width:
        return kv_a
    latent, rope_keys = kv_a.split((spec.kv_lora_rank, spec.rope_width))
    return torch.cat((latent, interleave(rope_keys, spec.rope, spec.rope_groups)))


def interleave_queries(q: Tensor, spec: MLASpec) -> Tensor:
    """The checkpoint's rows, per head [nope | rope] -> [every head's rope in interleaved pairs | every head's nope]."""
    heads = q.unflatten(0, (spec.num_heads, spec.qk_nope_head_dim + spec.qk_rope_head_dim))
    nope, rope = heads.split((spec.qk_nope_head_dim, spec.qk_rope_head_dim), 1)
    if spec.qk_rope_head_dim:
        rope = interleave(rope.flatten(0, 1), spec.rope, spec.num_heads)
    return torch.cat((rope.reshape(-1, *q.shape[1:]), nope.flatten(0, 1)))


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
