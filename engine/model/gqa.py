"""Grouped-query attention over the block cache.

One projection gives [q | k | v]; q and k rotate together, and [k | v] is the cache row as it lies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.cache import cache_write
from engine.kernels.gqa_decode import gqa_decode
from engine.kernels.gqa_prefill import gqa_prefill
from engine.kernels.rope import rope_
from engine.model.batch import Batch
from engine.model.linear import Linear
from engine.model.rotary import interleave
from engine.spec import GQASpec


class GQAttention:
    """`qkv` is [(H + 2 g) D, hidden], `o` [hidden, H D]."""

    def __init__(self, spec: GQASpec, tensors: dict[str, Tensor]) -> None:
        """`tensors`: q_proj, k_proj, v_proj, o_proj as `<name>.weight` and, where the spec has them, `<name>.bias`."""
        self.spec = spec
        heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}

        def fused(kind: str) -> Tensor:
            parts = [interleave(tensors[f"{name}.{kind}"], spec.rope, n) for name, n in heads.items()]
            return torch.cat([*parts, tensors[f"v_proj.{kind}"]])

        self.qkv = Linear(fused("weight"), fused("bias") if spec.qkv_bias else None)
        self.o = Linear(tensors["o_proj.weight"], tensors["o_proj.bias"] if spec.o_bias else None)

    def __call__(self, x: Tensor, batch: Batch, cache: Tensor, table: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]; writes the tokens' rows into cache [num_blocks, block_size, 2 g D]."""
        s, d = self.spec, batch.num_decodes
        qkv = self.qkv(x)
        q_width = s.num_heads * s.head_dim
        rope_(qkv[:, : q_width + s.num_kv_heads * s.head_dim].unflatten(1, (-1, s.head_dim)), table)
        cache_write(cache, qkv[:, q_width:], batch.slots)
        q = qkv[:, :q_width].unflatten(1, (s.num_heads, s.head_dim))
        outs = []
        if d:
            outs.append(
                gqa_decode(
                    q[:d], cache, batch.block_tables[:d], batch.kv_lens[:d], s.num_kv_heads, s.softmax_scale,
                    batch.max_decode_kv,
                )
            )  # fmt: skip
        if batch.num_prefills:
            outs.append(
                gqa_prefill(
                    q[d:], cache, batch.block_tables[d:], batch.cu_q, batch.kv_lens[d:], s.num_kv_heads, s.softmax_scale
                )
            )
        o = outs[0] if len(outs) == 1 else torch.cat(outs)
        return self.o(o.flatten(1))
