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

    @property
    def cache_width(self) -> int:
        """Numbers cached per token: a row is [K of every KV head | V of every KV head]."""
        return 2 * self.num_kv_heads * self.head_dim


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
    q_lora_rank: int | None = None
    latent_norm_eps: float | None = None  # None: the latent is cached as projected
    q_bias: bool = False
    kv_a_bias: bool = False
    o_bias: bool = False

    @property
    def rope_width(self) -> int:
        return self.rope_groups * self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers cached per token: a row is [latent | rope keys of every group]."""
        return self.kv_lora_rank + self.rope_width


AttentionSpec = GQASpec | MLASpec


@dataclass(frozen=True)
class GatedMLPSpec:
    """down(silu(gate(x)) * up(x))."""

    intermediate_size: int
    bias: bool = False


@dataclass(frozen=True)
class LayerSpec:
    attention: AttentionSpec
    mlp: GatedMLPSpec


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

    @property
    def attention_kind(self) -> Literal["gqa", "mla"]:
        return "mla" if isinstance(self.layers[0].attention, MLASpec) else "gqa"

    def cache_bytes_per_token(self, element_size: int) -> int:
        """Bytes that one token takes in the cache, over all layers."""
        return element_size * sum(layer.attention.cache_width for layer in self.layers)
