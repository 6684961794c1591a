"""Hugging Face configs of MiniCPM3 -> ModelSpec: latent attention, and what it adds to the residual stream scaled."""

from __future__ import annotations

import math
from typing import Any

from engine.checkpoint.config_keys import typed_config
from engine.checkpoint.json_file import Positive, Size
from engine.checkpoint.latent_attention import (
    HARMLESS,
    LatentConfig,
    check_activation,
    model_spec,
    read_latent_attention,
)
from engine.checkpoint.layout import check_spec
from engine.errors import CheckpointError
from engine.spec import GatedMLPSpec, LayerSpec, ModelSpec


class MiniCPM3Config(LatentConfig, kw_only=True):
    """Defaults are `transformers`', which are those of MiniCPM3-4B."""

    rms_norm_eps: Positive = 1e-5
    tie_word_embeddings: bool = True
    rope_interleave: bool = False
    mlp_bias: bool = False
    scale_emb: Positive = 12.0
    scale_depth: Positive = 1.4
    dim_model_base: Size = 256


def read_minicpm3(raw: dict[str, Any], dtype: str) -> ModelSpec:
    """`raw`: config.json; `dtype`: of the stored weights. Raises CheckpointError, naming the key."""
    raw = {"q_lora_rank": 768, **raw}
    heads, hidden = raw.get("num_attention_heads"), raw.get("hidden_size")
    if raw.get("v_head_dim") is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        raw = {**raw, "v_head_dim": hidden // heads}
    config = typed_config(raw, MiniCPM3Config, HARMLESS)
    check_activation(config, "silu", "swish")
    if config.rope_interleave:
        raise CheckpointError("rope_interleave is not supported; this family's RoPE is half-split")
    # `transformers` takes a null as: no such scaling.
    depth = math.sqrt(config.num_hidden_layers)
    spec = model_spec(
        config,
        dtype,
        (LayerSpec(read_latent_attention(config, raw), GatedMLPSpec(config.intermediate_size, config.mlp_bias)),)
        * config.num_hidden_layers,
        embedding_scale=config.scale_emb,
        residual_scale=1.0 if _null(raw, "scale_depth") else config.scale_depth / depth,
        logit_scale=1.0 if _null(raw, "dim_model_base") else config.dim_model_base / config.hidden_size,
    )
    check_spec(spec)
    return spec


def _null(raw: dict[str, Any], key: str) -> bool:
    return key in raw and raw[key] is None
