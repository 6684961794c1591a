"""The projection of a latent layer whose queries are low-rank too (DeepSeek-V2, arXiv 2405.04434, section 2.1.3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.kernels.norm import rms_norm
from engine.model.linear import projection
from engine.model.rotary import interleave_queries, interleave_row
from engine.spec import MLASpec


class LowRankQueryProjection:
    """x [T, hidden] -> [latent | rope keys | rope queries | nope queries] [T, r + G dr + H dr + H n], interleaved.

    `a` [r + G dr + q, hidden] gives the cache row and the query latent, `b` [H (dr + n), q] the queries.
    """

    def __init__(self, spec: MLASpec, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: q_a_proj, q_a_layernorm, q_b_proj, kv_a_proj_with_mqa."""
        assert spec.q_norm_eps is not None
        self.row_width, self.eps = spec.cache_width, spec.q_norm_eps
        biased = [name for name, has in (("kv_a_proj_with_mqa", spec.kv_a_bias), ("q_a_proj", spec.q_bias)) if has]
        self.a = projection(
            tensors, "kv_a_proj_with_mqa", "q_a_proj", biased=biased,
            join=lambda parts: torch.cat((interleave_row(parts[0], spec), parts[1])),
        )  # fmt: skip
        self.norm = tensors["q_a_layernorm.weight"]
        self.b = projection(tensors, "q_b_proj", join=lambda parts: interleave_queries(parts[0], spec))

    def __call__(self, x: Tensor) -> Tensor:
        row, latent = self.a(x).tensor_split((self.row_width,), 1)
        return torch.cat((row, self.b(rms_norm(latent, self.norm, self.eps))), 1)
