"""The attention that every natively latent family has, under DeepSeek's names, from its config.json -> MLASpec.

Epsilons of the two latent norms are 1e-6 whatever `rms_norm_eps` says, as in each family's own code and in
`transformers`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from engine.checkpoint.json_file import LayerCount, Size
from engine.checkpoint.rope import read_rope
from engine.errors import CheckpointError
from engine.spec import LayerSpec, MLASpec, ModelSpec

LATENT_NORM_EPS = 1e-6
# Keys that change nothing here: what other keys say already, how a model was trained, and whose code ran it elsewhere.
HARMLESS = frozenset(["auto_map", "embedding_initializer_range", "head_dim", "qk_head_dim"])


class LatentConfig(msgspec.Struct, kw_only=True):
    """The keys that these families share. What every published config.json gives has no default."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: LayerCount
    num_attention_heads: Size
    max_position_embeddings: Annotated[int, Meta(ge=1, le=2**31)]
    kv_lora_rank: Size
    qk_nope_head_dim: Annotated[int, Meta(ge=0, le=2**16)]
    qk_rope_head_dim: Annotated[int, Meta(ge=0, le=2**16)]
    v_head_dim: Size
    q_lora_rank: Size | None = None
    num_key_value_heads: Size | None = None
    hidden_act: str = "silu"
    rms_norm_eps: Annotated[float, Meta(gt=0, le=1)] = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    rope_interleave: bool = True
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None


def read_latent_attention(config: LatentConfig, raw: dict[str, Any]) -> MLASpec:
    """Raises CheckpointError, naming the key."""
    if config.num_key_value_heads not in (None, config.num_attention_heads):
        raise CheckpointError(
            f"num_key_value_heads {config.num_key_value_heads} is not supported; with latent attention there are as "
            f"many as attention heads, {config.num_attention_heads}"
        )
    key_width = config.qk_nope_head_dim + config.qk_rope_head_dim
    if key_width == 0:
        raise CheckpointError("qk_nope_head_dim and qk_rope_head_dim are both 0")
    rope = read_rope(raw, config.qk_rope_head_dim, config.max_position_embeddings)
    low_rank = config.q_lora_rank is not None
    return MLASpec(
        num_heads=config.num_attention_heads,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        softmax_scale=key_width**-0.5 * yarn_mscale(raw) ** 2,
        rope=replace(rope, layout="interleaved" if config.rope_interleave else "half"),
        q_lora_rank=config.q_lora_rank,
        q_norm_eps=LATENT_NORM_EPS if low_rank else None,
        latent_norm_eps=LATENT_NORM_EPS,
        q_bias=config.attention_bias and low_rank,
        kv_a_bias=config.attention_bias,
        o_bias=config.attention_bias,
    )


def yarn_mscale(raw: dict[str, Any]) -> float:
    """What YaRN's mscale_all_dim multiplies queries and keys by; `read_rope` has checked the types."""
    rope: dict[str, Any] = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    mscale, factor = rope.get("mscale_all_dim") or 0.0, rope.get("factor") or 1.0
    is_yarn = rope.get("rope_type", rope.get("type")) == "yarn"
    return 0.1 * mscale * math.log(factor) + 1.0 if is_yarn and factor > 1 else 1.0


def model_spec(config: LatentConfig, dtype: str, layers: tuple[LayerSpec, ...], **scales: float) -> ModelSpec:
    return ModelSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        tie_embeddings=config.tie_word_embeddings,
        dtype=dtype,
        layers=layers,
        **scales,
    )


def check_activation(config: LatentConfig, *supported: str) -> None:
    if config.hidden_act not in supported:
        raise CheckpointError(f"hidden_act {config.hidden_act!r:.40} is not supported; supported: {supported[0]}")
