"""The projection of a latent layer whose queries and keys are normalised head by head (HeadNormSpec).

A norm is not linear, so the maps that make latents and rope keys cannot be multiplied into the projections before it:
    [q | k | v] = W x;  q, k normalised;  [latent | rope keys] = M [k | v];  rope query of head h = B_h q_h
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.kernels.norm import head_norm_
from engine.model.linear import projection
from engine.model.rotary import interleave, interleave_row
from engine.spec import MLASpec


class HeadNormedProjection:
    """x [T, hidden] -> [latent | rope keys | rope queries | nope queries] [T, r + G dr + H dr + H n], interleaved.

    `qkv` [(H + 2 g) D, hidden], `norm` [H + g, D], `row` [r + G dr, 2 g D], `q_rope` [H, D, dr].
    """

    def __init__(self, spec: MLASpec, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: q_proj, k_proj, v_proj, q_norm, k_norm, q_rope_proj, kv_a_proj_with_mqa."""
        norm = spec.head_norm
        assert norm is not None
        self.spec, self.eps = spec, norm.eps
        self.q_width, self.kv_width = spec.num_heads * norm.head_dim, 2 * norm.num_kv_heads * norm.head_dim

        names = ("q_proj", "k_proj", "v_proj")
        self.qkv = projection(tensors, *names, biased=names if spec.q_bias else ())
        counts = {"q": spec.num_heads, "k": norm.num_kv_heads}
        self.norm = torch.cat([tensors[f"{name}_norm.weight"].expand(n, -1) for name, n in counts.items()])
        row = "kv_a_proj_with_mqa"
        self.row = projection(
            tensors, row, biased=(row,) if spec.kv_a_bias else (), join=lambda parts: interleave_row(parts[0], spec)
        )
        q_rope = tensors["q_rope_proj.weight"]
        if spec.qk_rope_head_dim:
            q_rope = interleave(q_rope, spec.rope, spec.num_heads)
        self.q_rope = q_rope.view(spec.num_heads, spec.qk_rope_head_dim, norm.head_dim).mT

    def __call__(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        q, kv = qkv.split((self.q_width, self.kv_width), 1)
        normed = qkv[:, : self.norm.numel()]  # q and k
        head_norm_(normed.unflatten(1, tuple(self.norm.shape)), self.norm, self.eps)
        heads = q.unflatten(1, (self.spec.num_heads, -1)).transpose(0, 1)  # [H, T, D]
        parts = [self.row(kv), torch.bmm(heads, self.q_rope).transpose(0, 1).flatten(1)]
        if self.spec.qk_nope_head_dim:
            parts.append(q)
        return torch.cat(parts, 1)
