"""ModelSpec: everything a forward pass needs to know about a model, resolved once when it is loaded.

Invariant: nothing below `engine/checkpoint/` asks which family a model belongs to. A family's reader turns its
config.json into a ModelSpec, and the forward pass, the cache and the converter read the ModelSpec only. Every
attention number may differ from layer to layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding: pair `i` of a rotated vector at position `p` turns by `p * inv_freq[i]` radians.

    layout "half": pair i is channels (i, i + d/2), as in Hugging Face's Llama; "interleaved": (2i, 2i + 1), as in
    DeepSeek. `scale` multiplies cos and sin (YaRN's attention factor).
    """

    inv_freq: tuple[float, ...]  # [groups * d/2]: group after group where an MLASpec has several rope groups
    layout: Literal["half", "interleaved"] = "half"
    scale: float = 1.0


@dataclass(frozen=True)
class GQASpec:
    """Grouped-query attention; num_kv_heads == num_heads is MHA, 1 is MQA. Query head h reads KV head h*g//H."""

    num_heads: int  # H
    num_kv_heads: int  # g
    head_dim: int  # D
    softmax_scale: float
    rope: RopeSpec  # inv_freq [D/2]
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm_eps: float | None = None  # a number: each head's query and key go through an RMSNorm before they rotate
    sliding_window: int | None = None  # a query sees this many tokens, itself among them; None: all before it
    score_softcap: float | None = None  # a number c: scores become c * tanh(score / c)

    @property
    def cache_width(self) -> int:
        """Numbers cached per token: a row is [K of every KV head | V of every KV head]."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class HeadNormSpec:
    """Of a latent layer whose queries and keys are normalised head by head before anything else becomes of them.

    It projects queries, keys and values as the grouped-query attention that it was converted from, H heads and
    `num_kv_heads` of `head_dim` channels; queries and keys go through an RMSNorm; linear maps make of each head's query
    its rope query (the query itself is its nope query) and of all heads' [keys | values] the cache row.
    """

    num_kv_heads: int  # g
    head_dim: int  # D
    eps: float


@dataclass(frozen=True)
class MLASpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache row is [latent r | rope keys].

    `rope_groups` rope keys of `qk_rope_head_dim` channels each lie side by side; head h reads group
    h * rope_groups // num_heads. DeepSeek has one; a model that keeps a rotated key per KV head has as many as those.
    qk_nope_head_dim may be 0 (every score comes from the rope keys); so may qk_rope_head_dim.
    """

    num_heads: int  # H
    kv_lora_rank: int  # r
    qk_nope_head_dim: int  # n
    qk_rope_head_dim: int  # dr, per group
    v_head_dim: int  # v
    softmax_scale: float
    rope: RopeSpec  # inv_freq [rope_groups * dr/2]
    rope_groups: int = 1  # G
    q_lora_rank: int | None = None  # a number: queries are projected to this many channels, normalised, and up
    q_norm_eps: float | None = None  # of that norm; None without q_lora_rank
    latent_norm_eps: float | None = None  # None: the latent is cached as projected
    q_bias: bool = False  # of q_proj; with q_lora_rank, of q_a_proj; with head_norm, of q_proj, k_proj and v_proj
    kv_a_bias: bool = False
    o_bias: bool = False
    sliding_window: int | None = None  # as GQASpec's
    score_softcap: float | None = None  # as GQASpec's
    head_norm: HeadNormSpec | None = None  # then qk_nope_head_dim is its head_dim, or 0, and q_lora_rank None

    @property
    def rope_width(self) -> int:
        return self.rope_groups * self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers cached per token: a row is [latent | rope keys of every group]."""
        return self.kv_lora_rank + self.rope_width


AttentionSpec = GQASpec | MLASpec


Activation = Literal["silu", "gelu_tanh", "relu_squared"]


@dataclass(frozen=True)
class GatedMLPSpec:
    """down(activation(gate(x)) * up(x))."""

    intermediate_size: int
    bias: bool = False
    activation: Activation = "silu"


@dataclass(frozen=True)
class PlainMLPSpec:
    """down(activation(up(x)))."""

    intermediate_size: int
    bias: bool = False
    activation: Activation = "relu_squared"


@dataclass(frozen=True)
class MoESpec:
    """A mixture of gated-SiLU experts (DeepSeek-V3, arXiv 2412.19437, and those before it).

    A token's scores are scoring(router(x)). Selection looks at score + bias: of num_groups equal groups of experts the
    groups_per_token best (by their best score, or the sum of their two best) stay, and of those the experts_per_token
    best experts are taken. Their weights are the scores without the bias, normalised to sum 1 where `normalize`,
    times `scale`. The shared expert is added to all of it.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int  # of each expert
    shared_intermediate_size: int = 0  # of the expert that every token goes through; 0: there is none
    shared_gate: bool = False  # the shared expert's output is multiplied by the sigmoid of a projection of x
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    correction_bias: bool = False
    num_groups: int = 1
    groups_per_token: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    normalize: bool = True
    scale: float = 1.0


MLPSpec = GatedMLPSpec | PlainMLPSpec | MoESpec


@dataclass(frozen=True)
class LayerSpec:
    attention: AttentionSpec
    mlp: MLPSpec
    post_norms: bool = False  # Gemma-2: the outputs of attention and MLP are normalised too, before they are added


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: embedding, pre-norm layers with residuals, final RMSNorm, head."""

    vocab_size: int
    hidden_size: int
    norm_eps: float
    max_position_embeddings: int
    tie_embeddings: bool
    dtype: str  # of the stored weights: "float32", "bfloat16" or "float16"
    layers: tuple[LayerSpec, ...]
    norm_offset: float = 0.0  # RMSNorms over the hidden size multiply by offset + weight: Gemma's is 1
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # a number c: logits become c * tanh(logit / c)

    @property
    def attention_kind(self) -> Literal["gqa", "mla"]:
        return "mla" if isinstance(self.layers[0].attention, MLASpec) else "gqa"

    def cache_bytes_per_token(self, element_size: int) -> int:
        """Bytes that one token takes in the cache, over all layers."""
        return element_size * sum(layer.attention.cache_width for layer in self.layers)
