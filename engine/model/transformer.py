"""The decoder: embedding, layers, final norm, head. Inference only, weights as plain tensors.

A layer computes  x += attention(norm(x));  x += mlp(norm(x)).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.norm import add_rms_norm, rms_norm
from engine.model.batch import Batch
from engine.model.gqa import GQAttention
from engine.model.linear import Linear
from engine.model.mla import MLAttention
from engine.model.mlp import GatedMLP
from engine.model.rotary import Rotary
from engine.spec import AttentionSpec, GQASpec, LayerSpec, ModelSpec, RopeSpec


def rope_rows(spec: AttentionSpec) -> int:
    """Rows of a layer's rotation table: 1 where all heads turn alike, else one per rotated head, keys first."""
    if isinstance(spec, GQASpec) or spec.rope_groups == 1:
        return 1
    return spec.rope_groups + spec.num_heads


def rope_key(spec: AttentionSpec) -> tuple[RopeSpec, int]:
    """What a layer's rotation table is made from. Groups that all turn alike share one row of frequencies."""
    rows = rope_rows(spec)
    if isinstance(spec, GQASpec) or rows == 1:
        return spec.rope, 1
    half, groups = spec.qk_rope_head_dim // 2, spec.rope_groups
    by_group = [spec.rope.inv_freq[i * half : (i + 1) * half] for i in range(groups)]
    if len(set(by_group)) == 1:
        return RopeSpec(by_group[0], spec.rope.layout, spec.rope.scale), 1
    heads = [i * groups // spec.num_heads for i in range(spec.num_heads)]
    flat = tuple(f for i in [*range(groups), *heads] for f in by_group[i])
    return RopeSpec(flat, spec.rope.layout, spec.rope.scale), rows


class Layer:
    """One decoder layer. `tensors` are named as in the checkpoint, without the `model.layers.<i>.` before them."""

    def __init__(self, spec: LayerSpec, norm_eps: float, tensors: Mapping[str, Tensor]) -> None:
        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.spec = spec
        self.eps = norm_eps
        self.attention_norm = tensors["input_layernorm.weight"]
        self.mlp_norm = tensors["post_attention_layernorm.weight"]
        attention = under("self_attn.")
        self.attention = (
            GQAttention(spec.attention, attention)
            if isinstance(spec.attention, GQASpec)
            else MLAttention(spec.attention, attention)
        )
        self.mlp = GatedMLP(spec.mlp, under("mlp."))

    def __call__(self, x: Tensor, batch: Batch, cache: Tensor, table: Tensor) -> Tensor:
        """The residual stream x [T, hidden] -> [T, hidden]."""
        attended = self.attention(rms_norm(x, self.attention_norm, self.eps), batch, cache, table)
        normed, x = add_rms_norm(attended, x, self.mlp_norm, self.eps)
        return x + self.mlp(normed)


class Transformer:
    """A whole model on one device, in one dtype."""

    def __init__(self, spec: ModelSpec, outer: Mapping[str, Tensor], layers: Iterator[Mapping[str, Tensor]]) -> None:
        """`outer`: embed_tokens.weight, norm.weight, lm_head.weight unless tied. `layers` is consumed one by one."""
        self.spec = spec
        self.embedding = outer["embed_tokens.weight"]
        self.norm = outer["norm.weight"]
        self.head = Linear(self.embedding if spec.tie_embeddings else outer["lm_head.weight"])
        self.layers = [Layer(s, spec.norm_eps, t) for s, t in zip(spec.layers, layers, strict=True)]
        keys = [rope_key(layer.attention) for layer in spec.layers]
        self.rotary = Rotary(keys, self.embedding.device)
        self._table_of_layer = [self.rotary.index(*key) for key in keys]

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def new_cache(self, num_blocks: int, block_size: int) -> list[Tensor]:
        """An empty cache: per layer [num_blocks, block_size, cache_width], zeroed, since 0 * NaN outlives a mask."""
        return [
            torch.zeros(num_blocks, block_size, s.attention.cache_width, dtype=self.dtype, device=self.device)
            for s in self.spec.layers
        ]

    def forward(self, token_ids: Tensor, batch: Batch, cache: list[Tensor]) -> Tensor:
        """token_ids int64 [T] -> final normed hidden states [T, hidden]; writes the tokens' rows into the cache."""
        tables = self.rotary.tables(batch.positions)
        x = F.embedding(token_ids, self.embedding)
        for layer, layer_cache, index in zip(self.layers, cache, self._table_of_layer, strict=True):
            x = layer(x, batch, layer_cache, tables[index])
        return rms_norm(x, self.norm, self.spec.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, hidden] -> [n, vocab], in the model's dtype."""
        return self.head(hidden)
