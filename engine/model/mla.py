"""Multi-head latent attention over the block cache (DeepSeek-V2, arXiv 2405.04434).

The cache holds [latent | rope keys] and nothing else. Decodes are absorbed: queries move into the latent space, where a
cache row is key and value at once. Prefills are expanded: latents are projected up to per-head keys and values, piece
by piece so that the expansion never outgrows `EXPAND_TOKENS`, and the pieces join by log-sum-exp.

One projection gives [latent | rope keys | rope queries | nope queries]: its head is the cache row as it lies, and rope
keys and queries rotate together. Where the source normalised queries and keys, HeadNormedProjection gives the same, and
where queries are low-rank, LowRankQueryProjection does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.cache import cache_gather, cache_write
from engine.kernels.mla_decode import mla_decode
from engine.kernels.mla_prefill import merge_partial, mla_prefill
from engine.kernels.norm import rms_norm
from engine.kernels.rope import rope_
from engine.model.batch import Batch
from engine.model.head_norm import HeadNormedProjection
from engine.model.linear import projection
from engine.model.low_rank_query import LowRankQueryProjection
from engine.model.rotary import interleave_queries, interleave_row
from engine.spec import MLASpec

EXPAND_TOKENS = 65536  # context tokens expanded at a time, over all prefills of a step


class MLAttention:
    """`kv_b` [H, n + v, r] holds each head's key rows, then its value rows."""

    def __init__(self, spec: MLASpec, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`, named as DeepSeek's: q_proj (or q_a_proj, q_a_layernorm, q_b_proj), kv_a_proj_with_mqa,
        kv_a_layernorm where the latent is normalised, kv_b_proj, o_proj; biases where the spec has them."""
        self.spec = spec
        self.qkv = self._projection(tensors)
        self.latent_norm = tensors["kv_a_layernorm.weight"] if spec.latent_norm_eps is not None else None
        self.kv_b = tensors["kv_b_proj.weight"].unflatten(0, (spec.num_heads, -1))
        self.k_up = self.kv_b[:, : spec.qk_nope_head_dim]  # [H, n, r]
        self.v_down = self.kv_b[:, spec.qk_nope_head_dim :].mT  # [H, r, v]
        self.o = projection(tensors, "o_proj", biased=("o_proj",) if spec.o_bias else ())

    def _projection(self, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        spec = self.spec
        if spec.head_norm is not None:
            return HeadNormedProjection(spec, tensors)
        if spec.q_lora_rank is not None:
            return LowRankQueryProjection(spec, tensors)
        biased = [name for name, has in (("kv_a_proj_with_mqa", spec.kv_a_bias), ("q_proj", spec.q_bias)) if has]
        return projection(
            tensors, "kv_a_proj_with_mqa", "q_proj", biased=biased,
            join=lambda parts: torch.cat((interleave_row(parts[0], spec), interleave_queries(parts[1], spec))),
        )  # fmt: skip

    def __call__(self, x: Tensor, batch: Batch, cache: Tensor, table: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]; writes the tokens' rows into cache [num_blocks, block_size, r + G dr]."""
        s, d = self.spec, batch.num_decodes
        qkv = self.qkv(x)  # [T, r + G dr + H dr + H n]
        rope_end = s.cache_width + s.num_heads * s.qk_rope_head_dim
        if self.latent_norm is not None and s.latent_norm_eps is not None:
            qkv[:, : s.kv_lora_rank] = rms_norm(qkv[:, : s.kv_lora_rank], self.latent_norm, s.latent_norm_eps)
        if s.qk_rope_head_dim:
            rope_(qkv[:, s.kv_lora_rank : rope_end].unflatten(1, (-1, s.qk_rope_head_dim)), table)
        cache_write(cache, qkv[:, : s.cache_width], batch.slots)
        q_rope = qkv[:, s.cache_width : rope_end].view(len(x), s.num_heads, s.qk_rope_head_dim)
        q_nope = qkv[:, rope_end:].view(len(x), s.num_heads, s.qk_nope_head_dim)
        if not batch.num_prefills:
            return self.o(self._decode(q_nope, q_rope, batch, cache).flatten(1))
        o = self._prefill(torch.cat((q_nope[d:], q_rope[d:]), -1), batch, cache)
        if d:
            o = torch.cat((self._decode(q_nope[:d], q_rope[:d], batch, cache), o))
        return self.o(o.flatten(1))

    def _decode(self, q_nope: Tensor, q_rope: Tensor, batch: Batch, cache: Tensor) -> Tensor:
        """q_nope [B, H, n], q_rope [B, H, dr] -> [B, H, v], in the latent space."""
        s, d = self.spec, batch.num_decodes
        q_latent = torch.bmm(q_nope.transpose(0, 1), self.k_up).transpose(0, 1)  # [B, H, r]
        q = torch.cat((q_latent, self._place_in_group(q_rope)), -1)
        o = mla_decode(
            q, cache, batch.block_tables[:d], batch.kv_lens[:d], s.kv_lora_rank, s.softmax_scale, batch.max_decode_kv,
            s.sliding_window, s.score_softcap,
        )  # fmt: skip
        return torch.bmm(o.transpose(0, 1), self.v_down).transpose(0, 1)

    def _place_in_group(self, q_rope: Tensor) -> Tensor:
        """[B, H, dr] -> [B, H, G dr], zero but for the columns of the head's own rope group."""
        s = self.spec
        if s.rope_groups == 1:
            return q_rope
        wide = q_rope.new_zeros(
            q_rope.shape[0], s.rope_groups, s.num_heads // s.rope_groups, s.rope_groups, q_rope.shape[2]
        )
        diagonal = wide.diagonal(dim1=1, dim2=3)  # [B, H/G, dr, G]
        diagonal.copy_(q_rope.unflatten(1, (s.rope_groups, -1)).permute(0, 2, 3, 1))
        return wide.view(*q_rope.shape[:2], -1)

    def _prefill(self, q: Tensor, batch: Batch, cache: Tensor) -> Tensor:
        """q [T, H, n + dr] -> [T, H, v], over all that every prefill sees, at most EXPAND_TOKENS of it at a time."""
        s, tables = self.spec, batch.block_tables[batch.num_decodes :]
        starts = [kv - n for kv, n in zip(batch.prefill_kv_lens, batch.q_lens, strict=True)]
        firsts = [0 if s.sliding_window is None else max(0, start + 1 - s.sliding_window) for start in starts]
        seen = [kv - first for kv, first in zip(batch.prefill_kv_lens, firsts, strict=True)]
        device = q.device
        q_starts, first_keys = torch.tensor([starts, firsts], dtype=torch.int32, device=device)
        share = max(1, EXPAND_TOKENS // len(seen))
        result: tuple[Tensor, Tensor] | None = None
        for start in range(0, max(seen), share):
            counts = [min(max(n - start, 0), share) for n in seen]
            cu_k = torch.tensor([0, *counts], device=device).cumsum(0, dtype=torch.int32)
            k_starts = first_keys + start
            rows = cache_gather(cache, tables, k_starts, cu_k, sum(counts)).to(q.dtype)
            kv = F.linear(rows[:, : s.kv_lora_rank], self.kv_b.flatten(0, 1)).unflatten(1, (s.num_heads, -1))
            k_rope = rows[:, s.kv_lora_rank :].unflatten(1, (s.rope_groups, s.qk_rope_head_dim))
            part = mla_prefill(
                q, kv, k_rope, batch.cu_q, cu_k, q_starts, k_starts, s.qk_nope_head_dim, s.softmax_scale,
                s.sliding_window, s.score_softcap,
            )  # fmt: skip
            result = part if result is None else merge_partial(*result, *part)
        assert result is not None  # a prefill has at least one token
        return result[0]
