"""Hugging Face configs of mixtures of experts over grouped-query attention, Mixtral and Qwen's -> ModelSpec.

Each is a dense family with other MLPs: its reader takes the config without what is said of experts here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from engine.checkpoint.json_file import Size, typed
from engine.checkpoint.layout import check_spec
from engine.checkpoint.llama import read_mistral, read_qwen2, read_qwen3
from engine.errors import CheckpointError
from engine.spec import ModelSpec, MoESpec

# Training only; and what newer versions of `transformers` call num_experts.
_NOT_DENSE = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "num_local_experts")


class _Mixtral(msgspec.Struct, kw_only=True):
    intermediate_size: Size
    num_local_experts: Size = 8
    num_experts_per_tok: Size = 2


class _Qwen(msgspec.Struct, kw_only=True):
    moe_intermediate_size: Size
    num_experts: Size
    num_experts_per_tok: Size
    shared_expert_intermediate_size: Annotated[int, Meta(ge=0, le=2**24)] = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: Size = 1
    mlp_only_layers: list[int] = []
    qkv_bias: bool = True


def read_mixtral(raw: dict[str, Any], dtype: str) -> ModelSpec:
    """`raw`: config.json; `dtype`: of the stored weights. Raises CheckpointError, naming the key."""
    own = _own(raw, _Mixtral)
    # Mistral's, whose intermediate_size is the experts'; without a window unless the config gives one.
    dense = read_mistral(
        {"sliding_window": None, **_rest(raw, _Mixtral), "intermediate_size": own.intermediate_size}, dtype
    )
    mixture = MoESpec(own.num_local_experts, own.num_experts_per_tok, own.intermediate_size)
    return _with_mixture(dense, mixture, lambda _: True)


def read_qwen2_moe(raw: dict[str, Any], dtype: str) -> ModelSpec:
    return _read_qwen(raw, dtype, read_qwen2)


def read_qwen3_moe(raw: dict[str, Any], dtype: str) -> ModelSpec:
    return _read_qwen({"head_dim": None, **raw}, dtype, read_qwen3)  # absent: hidden_size / num_attention_heads


def _read_qwen(raw: dict[str, Any], dtype: str, read_dense: Callable[[dict[str, Any], str], ModelSpec]) -> ModelSpec:
    own = _own({"num_experts": raw.get("num_local_experts"), **raw}, _Qwen)
    if not own.qkv_bias:
        raise CheckpointError("qkv_bias false is not supported; supported: true")
    if raw.get("use_sliding_window"):  # of which layers, `transformers` says otherwise than for the dense families
        raise CheckpointError("use_sliding_window is not supported")
    mixture = MoESpec(
        num_experts=own.num_experts,
        experts_per_token=own.num_experts_per_tok,
        intermediate_size=own.moe_intermediate_size,
        shared_intermediate_size=own.shared_expert_intermediate_size,
        shared_gate=own.shared_expert_intermediate_size > 0,
        normalize=own.norm_topk_prob,
    )
    return _with_mixture(
        read_dense(_rest(raw, _Qwen), dtype),
        mixture,
        lambda i: i not in own.mlp_only_layers and (i + 1) % own.decoder_sparse_step == 0,
    )


def mixtral_name(name: str) -> str:
    """Canonical name of a layer's tensor -> Mixtral's."""
    name = re.sub(r"^mlp\.", "block_sparse_moe.", name)
    for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        name = name.replace(ours, theirs)
    return name


def qwen_moe_name(name: str) -> str:
    """Canonical name of a layer's tensor -> Qwen's."""
    return name.replace("mlp.shared_experts.", "mlp.shared_expert.")


def _own(raw: dict[str, Any], kind: type[msgspec.Struct]) -> Any:  # noqa: ANN401 (an instance of `kind`)
    return typed({key: value for key, value in raw.items() if value is not None}, kind)


def _rest(raw: dict[str, Any], kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in (*kind.__struct_fields__, *_NOT_DENSE)}


def _with_mixture(dense: ModelSpec, mixture: MoESpec, is_sparse: Callable[[int], bool]) -> ModelSpec:
    layers = (replace(layer, mlp=mixture) if is_sparse(i) else layer for i, layer in enumerate(dense.layers))
    spec = replace(dense, layers=tuple(layers))
    check_spec(spec)
    return spec
