"""Small random checkpoints of the families with latent attention or experts, made and saved by `transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip


def yarn(**changes: Any) -> dict[str, Any]:
    return {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 16,
        "beta_fast": 32.0, "beta_slow": 1.0, **changes,
    }  # fmt: skip


def longrope(**changes: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.3, 2.0, 2.5],
        "long_factor": [1.1, 1.7, 4.0, 9.0], "original_max_position_embeddings": 256, **changes,
    }  # fmt: skip


DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 50000.0}

# (model_type, what sets it apart) -> settings. An MLA family has LATENT, and unless it is dense EXPERTS, before them.
CONFIGS: dict[tuple[str, str], dict[str, Any]] = {
    ("deepseek_v2", "lite"): {"q_lora_rank": None, "rope_parameters": yarn(mscale=0.707, mscale_all_dim=0.707)},
    ("deepseek_v2", "groups"): {
        "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0,
        "rope_parameters": yarn(mscale=1.0, mscale_all_dim=0.5),
    },
    ("deepseek_v2", "biases, a width of its own for the experts"): {
        "attention_bias": True, "mlp_bias": False, "moe_intermediate_size": 9, "num_experts_per_tok": 1,
        "first_k_dense_replace": 2, "rope_parameters": DEFAULT_ROPE,
    },
    ("deepseek_v3", "groups"): {
        "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
        "rope_parameters": yarn(mscale=1.0, mscale_all_dim=1.0),
    },
    ("deepseek_v3", "moonlight, an epsilon that the latent norms do not share"): {
        "q_lora_rank": None, "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-2, "rope_parameters": DEFAULT_ROPE,
    },
    ("deepseek_v3", "half-split, weights as scored, biases"): {
        "rope_interleave": False, "norm_topk_prob": False, "attention_bias": True, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 0, "rope_parameters": yarn(),
    },
    ("kimi_k2", "as published, made small"): {
        "num_attention_heads": 8, "num_key_value_heads": 8, "n_shared_experts": 1, "routed_scaling_factor": 2.827,
        "rope_parameters": yarn(factor=32.0, rope_theta=50000.0, mscale=1.0, mscale_all_dim=1.0, beta_fast=1.0),
    },
    ("kimi_k2", "longer, an epsilon that the latent norms do not share"): {
        "rope_parameters": yarn(factor=64.0, mscale=1.0, mscale_all_dim=1.0), "v_head_dim": 8, "rms_norm_eps": 1e-2,
    },
    ("kimi_k2", "many experts"): {
        "n_routed_experts": 24, "num_experts_per_tok": 8, "rope_parameters": DEFAULT_ROPE, "qk_nope_head_dim": 16,
    },
    ("glm4_moe_lite", "as published, made small"): {
        "num_attention_heads": 5, "num_key_value_heads": 5, "qk_nope_head_dim": 12, "v_head_dim": 16,
        "n_shared_experts": 1, "routed_scaling_factor": 1.8, "rope_parameters": DEFAULT_ROPE,
    },
    ("glm4_moe_lite", "layers as listed"): {
        "mlp_layer_types": ["sparse", "dense", "sparse"], "n_group": 2, "topk_group": 1, "rope_parameters": yarn(),
    },
    ("glm4_moe_lite", "half-split, tied"): {
        "rope_interleave": False, "tie_word_embeddings": True, "rope_parameters": DEFAULT_ROPE,
    },
    ("youtu", "as published, made small"): {"rope_parameters": {"rope_type": "default", "rope_theta": 1600000.0}},
    ("youtu", "queries at once, not tied"): {
        "q_lora_rank": None, "tie_word_embeddings": False, "rope_parameters": DEFAULT_ROPE,
    },
    ("youtu", "biases, half-split"): {
        "attention_bias": True, "rope_interleave": False, "rope_parameters": yarn(mscale_all_dim=1.0),
    },
    ("minicpm3", "as published, made small"): {"rope_parameters": longrope(), "dim_model_base": 16},
    ("minicpm3", "long factors"): {
        "rope_parameters": longrope(original_max_position_embeddings=8), "v_head_dim": 9, "scale_depth": 0.9,
    },
    ("minicpm3", "nothing scaled, queries at once, biases"): {
        "scale_emb": 1, "scale_depth": None, "dim_model_base": None, "q_lora_rank": None, "attention_bias": True,
        "tie_word_embeddings": False, "rope_parameters": DEFAULT_ROPE,
    },
    ("plm", "as published, made small"): {"q_lora_rank": None, "rope_theta": 100000.0},
    ("plm", "low-rank queries"): {"num_attention_heads": 3, "num_key_value_heads": 3, "tie_word_embeddings": False},
    ("plm", "half-split, biases"): {"rope_interleave": False, "attention_bias": True},
    ("mixtral", "as published, made small"): {
        "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": DEFAULT_ROPE,
    },
    ("mixtral", "a window"): {"sliding_window": 16, "num_local_experts": 3, "rope_parameters": DEFAULT_ROPE},
    ("qwen2_moe", "as published, made small"): {
        "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 24,
    },
    ("qwen2_moe", "some layers dense"): {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True,
        "shared_expert_intermediate_size": 24, "mlp_only_layers": [0], "decoder_sparse_step": 2,
    },
    ("qwen3_moe", "as published, made small"): {
        "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 12, "norm_topk_prob": True,
    },
    ("qwen3_moe", "weights as scored"): {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "attention_bias": True,
    },
}  # fmt: skip
SPARSE = ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite")
# Families that have no class of their own in `transformers`: made as another, and named in the file.
MADE_AS = {"kimi_k2": "deepseek_v3", "plm": "youtu"}


class SquaredReLU(nn.Module):
    """PLM's MLP, down(relu(up(x))^2), to take the place of Youtu's: all else of the two is the same."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ACT2FN["relu2"](self.up_proj(x)))


def make_native(folder: Path, family: str, settings: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """Saved in `folder`, every weight random, norms, biases and routing biases too -> the model, in fp32."""
    latent = {} if family in ("mixtral", "qwen2_moe", "qwen3_moe") else LATENT
    kind = MADE_AS.get(family, family)
    merged = SIZES | latent | (EXPERTS if family in SPARSE else {}) | settings
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[kind](**merged), attn_implementation="eager", experts_implementation="eager"
    ).eval()
    if family == "plm":
        for layer in model.model.layers:
            layer.mlp = SquaredReLU(merged["hidden_size"], merged["intermediate_size"])
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                weight.normal_(std=0.3)
            elif name.endswith("weight") or name.endswith("bias") or "experts" in name:
                spread = 0.2 if weight.dim() == 1 else 1.5 * weight.shape[-1] ** -0.5
                weight.copy_((1.0 if "norm" in name else 0.0) + torch.randn_like(weight) * spread)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if family == "plm":
        config["hidden_act"] = "relu2"
    (folder / "config.json").write_text(json.dumps(config | {"model_type": family}))
    return model
