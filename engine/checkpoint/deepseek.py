"""Hugging Face configs of DeepSeek-V2 and V3 and of those that share their architecture -> ModelSpec.

V3's is also Moonlight's and Kimi-K2's, and, with other defaults, that of GLM-4 MoE-lite; Youtu is a V3 without experts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from engine.checkpoint.config_keys import typed_config
from engine.checkpoint.fp8 import read_fp8_block
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
from engine.spec import GatedMLPSpec, LayerSpec, MLPSpec, ModelSpec, MoESpec

_HARMLESS = HARMLESS | frozenset(
    # Training, layouts of other engines, and layers that predict further tokens, which are not loaded.
    [
        *("aux_loss_alpha", "ep_size", "num_mtp_layers", "num_nextn_predict_layers", "output_router_logits"),
        *("router_aux_loss_coef", "seq_aux"),
    ]
)


class DeepSeekConfig(LatentConfig, kw_only=True):
    mlp_bias: bool = False  # of the dense layers
    n_routed_experts: Annotated[int, Meta(ge=0, le=2**16)] = 0  # 0: every layer is dense
    n_shared_experts: Annotated[int, Meta(ge=0, le=2**10)] = 0
    num_experts_per_tok: Size | None = None
    moe_intermediate_size: Size | None = None
    first_k_dense_replace: Annotated[int, Meta(ge=0, le=4096)] = 0
    moe_layer_freq: Size = 1
    mlp_layer_types: list[Literal["dense", "sparse"]] | None = None  # by layer, in place of the two above
    n_group: Size = 1
    topk_group: Size = 1
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "noaux_tc"
    scoring_func: Literal["softmax", "sigmoid"] = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 1.0
    quantization_config: dict[str, Any] | None = None


V2_DEFAULTS: dict[str, Any] = {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False}
GLM_DEFAULTS: dict[str, Any] = {"first_k_dense_replace": 1}


def read_deepseek_v2(raw: dict[str, Any], dtype: str) -> ModelSpec:
    """`raw`: config.json; `dtype`: of the stored weights. Raises CheckpointError, naming the key."""
    return _read(V2_DEFAULTS | raw, dtype, scales_or_normalizes=True)


def read_deepseek_v3(raw: dict[str, Any], dtype: str) -> ModelSpec:
    """DeepSeek-V3 and R1, Moonlight, Kimi-K2, Youtu."""
    return _read(raw, dtype)


def read_glm4_moe_lite(raw: dict[str, Any], dtype: str) -> ModelSpec:
    return _read(GLM_DEFAULTS | raw, dtype)


def _read(raw: dict[str, Any], dtype: str, scales_or_normalizes: bool = False) -> ModelSpec:
    """`scales_or_normalizes`: weights that are normalised are not scaled by routed_scaling_factor (V2)."""
    config = typed_config(raw, DeepSeekConfig, _HARMLESS)
    if "q_lora_rank" not in raw:  # null where queries are not low-rank; absent, `transformers` takes 1536
        raise CheckpointError("q_lora_rank is missing; it is null where queries are projected at once")
    if config.quantization_config:
        read_fp8_block(raw)
    check_activation(config, "silu", "swish")
    attention = read_latent_attention(config, raw)
    dense = GatedMLPSpec(config.intermediate_size, config.mlp_bias)
    sparse = _mixture(config, scales_or_normalizes) if config.n_routed_experts else None
    layers = tuple(
        LayerSpec(attention, sparse if sparse is not None and is_sparse else dense) for is_sparse in _sparse(config)
    )
    spec = model_spec(config, dtype, layers)
    check_spec(spec)
    return spec


def _sparse(config: DeepSeekConfig) -> list[bool]:
    """Which layers are mixtures, where there are any."""
    count, kinds = config.num_hidden_layers, config.mlp_layer_types
    if kinds is not None:
        if len(kinds) != count:
            raise CheckpointError(f"mlp_layer_types has {len(kinds)} entries for {count} layers")
        return [kind == "sparse" for kind in kinds]
    return [i >= config.first_k_dense_replace and i % config.moe_layer_freq == 0 for i in range(count)]


def _mixture(config: DeepSeekConfig, scales_or_normalizes: bool) -> MLPSpec:
    if config.num_experts_per_tok is None or config.moe_intermediate_size is None:
        raise CheckpointError("n_routed_experts needs num_experts_per_tok and moe_intermediate_size")
    grouped, corrected = config.topk_method != "greedy", config.topk_method == "noaux_tc"
    normalize = (
        config.norm_topk_prob and config.num_experts_per_tok > 1 if scales_or_normalizes else config.norm_topk_prob
    )
    return MoESpec(
        num_experts=config.n_routed_experts,
        experts_per_token=config.num_experts_per_tok,
        intermediate_size=config.moe_intermediate_size,
        shared_intermediate_size=config.n_shared_experts * config.moe_intermediate_size,
        scoring=config.scoring_func,
        correction_bias=corrected,
        num_groups=config.n_group if grouped else 1,
        groups_per_token=config.topk_group if grouped else 1,
        group_score="top2_sum" if corrected else "max",
        normalize=normalize,
        scale=1.0 if scales_or_normalizes and normalize else config.routed_scaling_factor,
    )
