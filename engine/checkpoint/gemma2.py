"""Gemma-2's config.json -> ModelSpec: capped scores and logits, windows in every other layer, four norms a layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.checkpoint.config_keys import typed_config
from engine.checkpoint.json_file import Positive
from engine.checkpoint.layout import check_spec
from engine.checkpoint.llama import (
    Biases,
    LlamaConfig,
    attention_specs,
    gated_mlp,
    model_spec,
    sliding_layers,
)
from engine.spec import LayerSpec, ModelSpec

# What `transformers` takes for a key that is not there; a null is a null.
DEFAULTS: dict[str, Any] = {
    "head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
}  # fmt: skip


class Gemma2Config(LlamaConfig, kw_only=True):
    hidden_activation: str = "gelu_pytorch_tanh"  # hidden_act, where it is there as well, is not looked at
    query_pre_attn_scalar: Positive = 256.0
    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None
    sliding_window_size: int | None = None  # says sliding_window again


def read_gemma2(raw: dict[str, Any], dtype: str) -> ModelSpec:
    """`raw`: config.json; `dtype`: of the stored weights. Raises CheckpointError, naming the key."""
    config = typed_config(DEFAULTS | raw, Gemma2Config)
    has = config.sliding_window is not None
    sliding = sliding_layers(config, [has and i % 2 == 0 for i in range(config.num_hidden_layers)])
    mlp = gated_mlp(config, config.hidden_activation, bias=False)
    biases = Biases(config.attention_bias, config.attention_bias, False)
    layers = []
    for attention in attention_specs(config, raw, biases, sliding):
        attention = replace(
            attention,
            softmax_scale=config.query_pre_attn_scalar**-0.5,
            score_softcap=config.attn_logit_softcapping,
        )
        layers.append(LayerSpec(attention, mlp, post_norms=True))
    spec = replace(
        model_spec(config, dtype, layers),
        norm_offset=1.0,
        embedding_scale=config.hidden_size**0.5,
        logit_softcap=config.final_logit_softcapping,
    )
    check_spec(spec)
    return spec
