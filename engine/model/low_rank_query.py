"""The projection of a latent layer whose queries are low-rank too (DeepSeek-V2, arXiv 2405.04434, section 2.1.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.norm import rms_norm
from engine.model.linear import Linear
from engine.model.rotary import interleave_queries, interleave_row
from engine.spec import MLASpec


class LowRankQueryProjection:
    """x [T, hidden] -> [latent | rope keys | rope queries | nope queries] [T, r + G dr + H dr + H n], interleaved.

    `a` [r + G dr + q, hidden] gives the cache row and the query latent, `b` [H (dr + n), q] the queries.
    """

    def __init__(self, spec: MLASpec, tensors: dict[str, Tensor]) -> None:
        """`tensors`: q_a_proj, q_a_layernorm, q_b_proj, kv_a_proj_with_mqa."""
        rank = spec.q_lora_rank
        assert rank is not None
        assert spec.q_norm_eps is not None
        self.row_width, self.eps = spec.cache_width, spec.q_norm_eps

        def fused(kind: str, with_q: bool, with_kv: bool) -> Tensor:
            q_name, kv_name = f"q_a_proj.{kind}", f"kv_a_proj_with_mqa.{kind}"
            like = tensors[q_name if with_q else kv_name]
            q = tensors[q_name] if with_q else like.new_zeros(rank)
            row = interleave_row(tensors[kv_name], spec) if with_kv else like.new_zeros(spec.cache_width)
            return torch.cat((row, q))

        biased = spec.q_bias or spec.kv_a_bias
        self.a = Linear(fused("weight", True, True), fused("bias", spec.q_bias, spec.kv_a_bias) if biased else None)
        self.norm = tensors["q_a_layernorm.weight"]
        self.b = Linear(interleave_queries(tensors["q_b_proj.weight"], spec))

    def __call__(self, x: Tensor) -> Tensor:
        row, latent = self.a(x).tensor_split((self.row_width,), 1)
        return torch.cat((row, self.b(rms_norm(latent, self.norm, self.eps))), 1)
