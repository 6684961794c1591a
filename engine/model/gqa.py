"""Grouped-query attention over the block cache.

One projection gives [q | k | v]; q and k are normalised (where they are) and rotate together, and [k | v] is the cache
row as it lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.kernels.cache import cache_write
from engine.kernels.gqa_decode import gqa_decode
from engine.kernels.gqa_prefill import gqa_prefill
from engine.kernels.norm import head_norm_
from engine.kernels.rope import rope_
from engine.model.batch import Batch
from engine.model.linear import projection
from engine.model.rotary import interleave
from engine.spec import GQASpec


class GQAttention:
    """`qkv` is [(H + 2 g) D, hidden], `o` [hidden, H D]."""

    def __init__(self, spec: GQASpec, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: q_proj, k_proj, v_proj, o_proj as `<name>.weight` and, where the spec has them, `<name>.bias`;
        q_norm.weight and k_norm.weight where queries and keys are normalised."""
        self.spec = spec
        heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}

        def join(parts: Sequence[Tensor]) -> Tensor:
            rotated = [interleave(part, spec.rope, n) for part, n in zip(parts, heads.values(), strict=False)]
            return torch.cat([*rotated, parts[2]])

        names = ("q_proj", "k_proj", "v_proj")
        self.qkv = projection(tensors, *names, biased=names if spec.qkv_bias else (), join=join)
        self.head_norm: Tensor | None = None  # [H + g, D]
        if spec.qk_norm_eps is not None:
            norms = ((tensors[f"{name[0]}_norm.weight"], n) for name, n in heads.items())
            self.head_norm = torch.cat([interleave(weight, spec.rope, 1).expand(n, -1) for weight, n in norms])
        self.o = projection(tensors, "o_proj", biased=("o_proj",) if spec.o_bias else ())

    def __call__(self, x: Tensor, batch: Batch, cache: Tensor, table: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]; writes the tokens' rows into cache [num_blocks, block_size, 2 g D]."""
        s, d = self.spec, batch.num_decodes
        qkv = self.qkv(x)
        q_width = s.num_heads * s.head_dim
        heads = qkv[:, : q_width + s.num_kv_heads * s.head_dim].unflatten(1, (-1, s.head_dim))
        if self.head_norm is not None and s.qk_norm_eps is not None:
            head_norm_(heads, self.head_norm, s.qk_norm_eps)
        rope_(heads, table)
        cache_write(cache, qkv[:, q_width:], batch.slots)
        q = qkv[:, :q_width].unflatten(1, (s.num_heads, s.head_dim))
        outs = []
        if d:
            outs.append(
                gqa_decode(
                    q[:d], cache, batch.block_tables[:d], batch.kv_lens[:d], s.num_kv_heads, s.softmax_scale,
                    batch.max_decode_kv, s.sliding_window, s.score_softcap,
                )
            )  # fmt: skip
        if batch.num_prefills:
            outs.append(
                gqa_prefill(
                    q[d:], cache, batch.block_tables[d:], batch.cu_q, batch.kv_lens[d:], s.num_kv_heads,
                    s.softmax_scale, s.sliding_window, s.score_softcap,
                )
            )  # fmt: skip
        o = outs[0] if len(outs) == 1 else torch.cat(outs)
        return self.o(o.flatten(1))
