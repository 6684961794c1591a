"""Hugging Face configs of PLM (arXiv 2503.12167) -> ModelSpec: latent attention, squared-ReLU MLPs without a gate."""

from __future__ import annotations

from typing import Any

from engine.checkpoint.config_keys import typed_config
from engine.checkpoint.latent_attention import (
    HARMLESS,
    LatentConfig,
    check_activation,
    model_spec,
    read_latent_attention,
)
from engine.checkpoint.layout import check_spec
from engine.spec import LayerSpec, ModelSpec, PlainMLPSpec


class PLMConfig(LatentConfig, kw_only=True):
    hidden_act: str = "relu2"
    tie_word_embeddings: bool = True
    rope_theta: float | None = 100000.0


def read_plm(raw: dict[str, Any], dtype: str) -> ModelSpec:
    """`raw`: config.json; `dtype`: of the stored weights. Raises CheckpointError, naming the key."""
    raw = {"rope_theta": 100000.0, **raw}
    config = typed_config(raw, PLMConfig, HARMLESS)
    check_activation(config, "relu2", "relu_squared")
    layer = LayerSpec(read_latent_attention(config, raw), PlainMLPSpec(config.intermediate_size))
    spec = model_spec(config, dtype, (layer,) * config.num_hidden_layers)
    check_spec(spec)
    return spec
