"""The decoder: embedding, layers, final norm, head. Inference only, weights as plain tensors.

A layer computes  x += attention(norm(x));  x += mlp(norm(x)).  With post_norms, what is added is normalised as well.
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
from engine.model.mlp import GatedMLP, PlainMLP
from engine.model.moe import MixtureOfExperts
from engine.model.rotary import Rotary
from engine.spec import AttentionSpec, GatedMLPSpec, GQASpec, LayerSpec, MLPSpec, ModelSpec, PlainMLPSpec, RopeSpec
from engine.tensor_map import under


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


class Half:
    """x + post_norm(f(norm(x))), of which attention or MLP is f: what stands around it. Both halves make a layer.

    Invariant: a half reads no tensors of the other.
    """

    def __init__(self, model: ModelSpec, norm: Tensor, post_norm: Tensor | None) -> None:
        """`model`: what all layers share; its own `layers` are not looked at. Norms are given as stored."""
        self.norm = norm_weight(norm, model)
        self.post_norm = None if post_norm is None else norm_weight(post_norm, model)
        self.eps = model.norm_eps
        self.residual_scale = model.residual_scale

    def normed(self, x: Tensor) -> Tensor:
        """The residual stream [T, hidden] -> what f sees of it, alike."""
        return rms_norm(x, self.norm, self.eps)

    def added(self, output: Tensor) -> Tensor:
        """What f puts out [T, hidden] -> what that adds to the residual stream, alike."""
        if self.post_norm is not None:
            output = rms_norm(output, self.post_norm, self.eps)
        return output if self.residual_scale == 1 else output * self.residual_scale


class AttentionHalf(Half):
    """`tensors`: a layer's, named as in the checkpoint, without the `model.layers.<i>.` before them."""

    def __init__(self, spec: LayerSpec, model: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
        post_norm = tensors["post_attention_layernorm.weight"] if spec.post_norms else None
        super().__init__(model, tensors["input_layernorm.weight"], post_norm)
        self.spec = spec
        attention = under(tensors, "self_attn.")
        self.attention = (
            GQAttention(spec.attention, attention)
            if isinstance(spec.attention, GQASpec)
            else MLAttention(spec.attention, attention)
        )


class MLPHalf(Half):
    """`tensors`: as AttentionHalf's."""

    def __init__(self, spec: LayerSpec, model: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
        norm = "pre_feedforward_layernorm" if spec.post_norms else "post_attention_layernorm"
        post_norm = tensors["post_feedforward_layernorm.weight"] if spec.post_norms else None
        super().__init__(model, tensors[f"{norm}.weight"], post_norm)
        self.mlp = make_mlp(spec.mlp, under(tensors, "mlp."))


class Layer:
    """One decoder layer."""

    def __init__(self, spec: LayerSpec, model: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
        """As the halves'."""
        self.attention_half = AttentionHalf(spec, model, tensors)
        self.mlp_half = MLPHalf(spec, model, tensors)

    def __call__(self, x: Tensor, batch: Batch, cache: Tensor, table: Tensor) -> Tensor:
        """The residual stream x [T, hidden] -> [T, hidden]."""
        first, second = self.attention_half, self.mlp_half
        added = first.added(first.attention(first.normed(x), batch, cache, table))
        normed, x = add_rms_norm(added, x, second.norm, second.eps)
        return x + second.added(second.mlp(normed))


def make_mlp(spec: MLPSpec, tensors: Mapping[str, Tensor]) -> GatedMLP | PlainMLP | MixtureOfExperts:
    if isinstance(spec, GatedMLPSpec):
        return GatedMLP(spec, tensors)
    return PlainMLP(spec, tensors) if isinstance(spec, PlainMLPSpec) else MixtureOfExperts(spec, tensors)


def norm_weight(weight: Tensor, model: ModelSpec) -> Tensor:
    """What an RMSNorm multiplies by. An offset is added in fp32, and the sum stays so: bf16 would round it."""
    return weight.float() + model.norm_offset if model.norm_offset else weight


class Transformer:
    """A whole model on one device, in one dtype."""

    def __init__(self, spec: ModelSpec, outer: Mapping[str, Tensor], layers: Iterator[Mapping[str, Tensor]]) -> None:
        """`outer`: embed_tokens.weight, norm.weight, lm_head.weight unless tied. `layers` is consumed one by one."""
        self.spec = spec
        self.embedding = outer["embed_tokens.weight"]
        self.norm = norm_weight(outer["norm.weight"], spec)
        self.head = Linear(self.embedding if spec.tie_embeddings else outer["lm_head.weight"])
        self.layers = [Layer(s, spec, t) for s, t in zip(spec.layers, layers, strict=True)]
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

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [...] -> what enters the first layer, [..., hidden]."""
        return embed(token_ids, self.embedding, self.spec)

    def forward(self, token_ids: Tensor, batch: Batch, cache: list[Tensor]) -> Tensor:
        """token_ids int64 [T] -> final normed hidden states [T, hidden]; writes the tokens' rows into the cache."""
        tables = self.rotary.tables(batch.positions)
        x = self.embed(token_ids)
        for layer, layer_cache, index in zip(self.layers, cache, self._table_of_layer, strict=True):
            x = layer(x, batch, layer_cache, tables[index])
        return rms_norm(x, self.norm, self.spec.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, hidden] -> [n, vocab], in the model's dtype."""
        return finish_logits(self.head(hidden), self.spec)


def embed(token_ids: Tensor, embedding: Tensor, spec: ModelSpec) -> Tensor:
    x = F.embedding(token_ids, embedding)
    # The factor is rounded to the model's dtype first, as it was in training: in bf16, Gemma's 55.4256 is 55.5.
    return x if spec.embedding_scale == 1 else x * torch.tensor(spec.embedding_scale, dtype=x.dtype)


def finish_logits(logits: Tensor, spec: ModelSpec) -> Tensor:
    """What the head gives -> logits: scaled and capped, as the model has it."""
    if spec.logit_scale != 1:
        logits = logits * spec.logit_scale
    if spec.logit_softcap is not None:
        logits = torch.tanh(logits / spec.logit_softcap) * spec.logit_softcap
    return logits
