"""Native MLA families and mixtures: what is refused by name, FP8 weights, layers that predict further tokens."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from engine.checkpoint import open_checkpoint
from engine.checkpoint.checkpoint import FAMILIES
from engine.checkpoint.layout import expected_tensors
from engine.errors import CheckpointError
from engine.spec import GatedMLPSpec, MLASpec, ModelSpec, MoESpec, PlainMLPSpec
from tests.checkpoint.folders import random_tensors
from tests.model.native_folders import MADE_AS

LATENT: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 64, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}  # fmt: skip
MIXTURE: dict[str, Any] = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 12,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 8], "activation_scheme": "dynamic"}
BASES: dict[str, dict[str, Any]] = {
    "deepseek_v2": LATENT | MIXTURE,
    "deepseek_v3": LATENT | MIXTURE,
    "kimi_k2": LATENT | MIXTURE,
    "glm4_moe_lite": LATENT | MIXTURE,
    "youtu": LATENT,
    "minicpm3": LATENT,
    "plm": LATENT,
    "mixtral": LATENT,
    "qwen2_moe": LATENT | QWEN,
    "qwen3_moe": LATENT | QWEN | {"shared_expert_intermediate_size": 0},
}
for _name in ("mixtral", "qwen2_moe", "qwen3_moe"):
    BASES[_name] = {key: value for key, value in BASES[_name].items() if "lora" not in key and "head_dim" not in key}


def read(family: str, **changes: Any) -> ModelSpec:
    config = {key: value for key, value in (BASES[family] | changes).items() if value is not ...}
    return FAMILIES[family].read({"model_type": family, **config}, "float32")


def latent(spec: ModelSpec) -> MLASpec:
    assert isinstance(spec.layers[0].attention, MLASpec)
    return spec.layers[0].attention


def write(folder: Path, family: str, **changes: Any) -> tuple[Path, dict[str, Tensor]]:
    config = {"model_type": family, **BASES[family], **changes}
    spec = FAMILIES[family].read(config, "float32")
    tensors = random_tensors(spec)
    if (rename := FAMILIES[family].rename) is not str:
        tensors = dict(zip(expected_tensors(spec, rename), tensors.values(), strict=True))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


@pytest.mark.parametrize("family", BASES)
def test_a_folder_of_every_family(tmp_path: Path, family: str) -> None:
    folder, tensors = write(tmp_path, family)
    checkpoint = open_checkpoint(folder)
    last = len(checkpoint.spec.layers) - 1
    shapes = [tuple(tensor.shape) for name, tensor in tensors.items() if f"layers.{last}." in name]
    assert [tuple(tensor.shape) for tensor in checkpoint.layer(last).values()] == shapes


@pytest.mark.parametrize(
    ("family", "changes", "names"),
    [
        ("deepseek_v3", {"kv_lora_rank": ...}, ("kv_lora_rank",)),
        ("deepseek_v3", {"q_lora_rank": ...}, ("q_lora_rank",)),
        ("deepseek_v3", {"q_lora_rank": 0}, ("q_lora_rank",)),
        ("deepseek_v3", {"qk_rope_head_dim": 3}, ("qk_rope_head_dim 3",)),
        ("deepseek_v3", {"qk_rope_head_dim": 0, "qk_nope_head_dim": 0}, ("qk_nope_head_dim", "qk_rope_head_dim")),
        ("deepseek_v3", {"num_key_value_heads": 1}, ("num_key_value_heads 1",)),
        ("deepseek_v3", {"hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
        ("deepseek_v3", {"scoring_func": "tanh"}, ("scoring_func", "tanh")),
        ("deepseek_v3", {"topk_method": "random"}, ("topk_method", "random")),
        ("deepseek_v3", {"n_group": 3}, ("4 experts", "3 equal groups")),
        ("deepseek_v3", {"topk_group": 3}, ("groups_per_token",)),
        ("deepseek_v3", {"num_experts_per_tok": 4}, ("experts_per_token",)),
        ("deepseek_v3", {"num_experts_per_tok": ...}, ("num_experts_per_tok",)),
        ("deepseek_v3", {"n_routed_experts": 2**16, "num_hidden_layers": 100}, ("num_experts", "6488064")),
        ("deepseek_v3", {"moe_intermediate_size": ...}, ("moe_intermediate_size",)),
        ("deepseek_v3", {"routed_scaling_factor": -1}, ("routed_scaling_factor",)),
        ("deepseek_v3", {"norm_topk_prob": 1}, ("norm_topk_prob",)),
        ("deepseek_v3", {"index_topk": 2048}, ("index_topk", "2048")),
        ("deepseek_v3", {"sliding_window": 32}, ("sliding_window", "32")),
        ("deepseek_v3", {"quantization_config": {"quant_method": "awq"}}, ("quantization_config", "awq", "fp8")),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, ("quantization_config", "weight_block_size")),
        ("deepseek_v3", {"rope_scaling": {"type": "su"}}, ("rope_scaling", "su", "yarn")),
        ("deepseek_v3", {"rope_scaling": YARN | {"mscale_all_dim": "1"}}, ("rope_scaling", "mscale_all_dim")),
        ("deepseek_v2", {"mla_use_nope": True}, ("mla_use_nope",)),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, ("mlp_layer_types", "1", "3")),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense", "sparse", "linear"]}, ("mlp_layer_types", "linear")),
        ("youtu", {"layer_types": ["full_attention"]}, ("layer_types",)),
        ("minicpm3", {"scale_emb": 0}, ("scale_emb",)),
        ("minicpm3", {"rope_interleave": True}, ("rope_interleave",)),
        ("minicpm3", {"quantization_config": FP8}, ("quantization_config",)),
        (
            "minicpm3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0]}},
            ("rope_scaling", "short_factor has 1", "expected 2"),
        ),
        ("minicpm3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, ("rope_scaling", "long_factor")),
        ("plm", {"hidden_act": "silu"}, ("hidden_act", "silu", "relu2")),
        ("plm", {"mlp_bias": True}, ("mlp_bias",)),
        ("mixtral", {"num_local_experts": 0}, ("num_local_experts",)),
        ("mixtral", {"sliding_window": 0}, ("sliding_window 0",)),
        ("qwen3_moe", {"num_local_experts": 5}, ("num_local_experts 5", "num_experts")),
        ("qwen3_moe", {"num_experts": ..., "num_local_experts": "4"}, ("num_experts", "int")),
        ("mixtral", {"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping",)),
        ("qwen2_moe", {"num_experts": ...}, ("num_experts",)),
        ("qwen2_moe", {"qkv_bias": False}, ("qkv_bias",)),
        ("qwen2_moe", {"num_experts_per_tok": 5}, ("experts_per_token",)),
    ],
)  # fmt: skip
def test_refused(family: str, changes: dict[str, Any], names: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(family, **changes)
    for name in names:
        assert name in str(caught.value)


def test_keys_that_change_nothing_are_accepted() -> None:
    harmless = {
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}, "aux_loss_alpha": 0.001,
        "ep_size": 1, "head_dim": 4, "num_nextn_predict_layers": 1, "seq_aux": True, "_name_or_path": "x",
    }  # fmt: skip
    assert read("deepseek_v3", **harmless) == read("deepseek_v3")


@pytest.mark.parametrize("family", [family for family in BASES if family not in MADE_AS])
def test_every_key_transformers_writes_is_accepted(family: str) -> None:
    """Its whole configuration, defaults included."""
    settings = {"num_key_value_heads": 2, **BASES[family]}
    written = json.loads(CONFIG_MAPPING[family](**settings).to_json_string(use_diff=False))
    assert FAMILIES[family].read(written | {"dtype": "bfloat16"}, "bfloat16").hidden_size == 16


def test_which_layers_are_mixtures() -> None:
    def sparse(**changes: Any) -> list[bool]:
        return [isinstance(layer.mlp, MoESpec) for layer in read("deepseek_v3", num_hidden_layers=5, **changes).layers]

    assert sparse() == [False, True, True, True, True]
    assert sparse(first_k_dense_replace=0, moe_layer_freq=2) == [True, False, True, False, True]
    assert sparse(n_routed_experts=0) == [False] * 5
    assert sparse(n_routed_experts=None) == [False] * 5
    assert all(isinstance(layer.mlp, GatedMLPSpec) for layer in read("youtu").layers)
    assert all(isinstance(layer.mlp, PlainMLPSpec) for layer in read("plm").layers)


def test_scaling_of_normalised_weights_as_deepseek_publishes_it() -> None:
    """V2 normalises or scales, V3 does both."""

    def mixture(family: str, **changes: Any) -> MoESpec:
        mlp = read(family, **changes).layers[-1].mlp
        assert isinstance(mlp, MoESpec)
        return mlp

    assert (mixture("deepseek_v2").normalize, mixture("deepseek_v2").scale) == (False, 2.5)
    both = mixture("deepseek_v2", norm_topk_prob=True)
    assert (both.normalize, both.scale) == (True, 1.0)
    assert (mixture("deepseek_v3").normalize, mixture("deepseek_v3").scale) == (True, 2.5)
    assert mixture("deepseek_v2", topk_method="greedy").num_groups == 1
    assert mixture("deepseek_v2", topk_method="group_limited_greedy").group_score == "max"
    assert mixture("deepseek_v3").group_score == "top2_sum"


def test_yarn_scales_scores_by_mscale_all_dim_twice() -> None:
    plain, scaled = latent(read("deepseek_v3")), latent(read("deepseek_v3", rope_scaling=YARN))
    assert scaled.softmax_scale == pytest.approx(plain.softmax_scale * 1.3688879454**2, rel=1e-9)  # 0.1 ln 40 + 1
    assert scaled.rope.scale == 1.0
    alone = latent(read("deepseek_v3", rope_scaling=YARN | {"mscale_all_dim": 0}))
    assert alone.softmax_scale == plain.softmax_scale
    assert alone.rope.scale == pytest.approx(1.3688879454, rel=1e-9)


def test_one_list_of_longrope_factors_for_a_model() -> None:
    factors = {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}

    def first(original: int) -> tuple[float, float]:
        rope = latent(read("minicpm3", rope_scaling=factors | {"original_max_position_embeddings": original})).rope
        return rope.inv_freq[0], rope.scale

    assert first(64) == first(128) == (1.0, 1.0)  # 64 positions in all: within the original length
    assert first(16) == (pytest.approx(1 / 3), pytest.approx((1 + 1 / 2) ** 0.5))  # log 4 / log 16


def test_layers_that_predict_further_tokens_are_skipped_by_name(tmp_path: Path) -> None:
    folder, tensors = write(tmp_path, "deepseek_v3", num_nextn_predict_layers=1)
    further = {"model.layers.3.eh_proj.weight": torch.full((16, 32), float("nan"))}
    further["model.layers.3.mlp.experts.0.up_proj.weight"] = torch.zeros(3)
    save_file(tensors | further, folder / "model.safetensors")
    assert len(open_checkpoint(folder).spec.layers) == 3
    save_file(tensors | {"model.layers.4.eh_proj.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks: model\.layers\.4\.eh_proj"):
        open_checkpoint(folder)
    for count in (0, None):  # a config that says nothing of them
        write(tmp_path, "deepseek_v3", num_nextn_predict_layers=count)
        save_file(tensors | further, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"lacks: model\.layers\.3\.eh_proj"):
            open_checkpoint(folder)


def write_fp8(folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, dict[str, Tensor]]:
    """All projections in FP8 but the router's, as published; -> the folder and what its tensors stand for."""
    _, tensors = write(folder, "deepseek_v3", quantization_config=FP8)
    generator = torch.Generator().manual_seed(0)
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        if tensor.dim() == 1 or "layers" not in name or "mlp.gate." in name:
            stored[name] = meant[name] = tensor.to(dtype)
            continue
        weight = (tensor * 100).to(torch.float8_e4m3fn)
        blocks = [-(-size // 8) for size in tensor.shape]
        scale = torch.rand(blocks, generator=generator) * 2.0 ** torch.randint(-12, 0, blocks, generator=generator)
        stored[name], stored[f"{name}_scale_inv"] = weight, scale
        exact = weight.double() * torch.kron(scale.double(), torch.ones(8, 8))[: tensor.shape[0], : tensor.shape[1]]
        meant[name] = exact.to(dtype)
    save_file(stored, folder / "model.safetensors")
    return folder, meant


class TestFp8:
    NAME = "model.layers.1.mlp.experts.2.gate_proj.weight"  # [20, 16], so 3 x 2 blocks of 8 x 8, the last of 4 rows

    def edit(self, folder: Path, name: str, tensor: Tensor | None) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(name) if tensor is None else tensors.update({name: tensor})
        save_file(tensors, folder / "model.safetensors")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_weights_are_multiplied_out(self, tmp_path: Path, dtype: torch.dtype) -> None:
        """To the model's dtype, that of its embedding; each element rounded once from the exact product."""
        folder, meant = write_fp8(tmp_path, dtype)
        checkpoint = open_checkpoint(folder)
        assert checkpoint.spec.dtype == str(dtype).removeprefix("torch.")
        for i in range(3):
            for name, tensor in checkpoint.layer(i).items():
                assert tensor.dtype == dtype
                torch.testing.assert_close(tensor, meant[f"model.layers.{i}.{name}"], rtol=2**-7, atol=0)
        exact = torch.stack(
            [t == meant[f"model.layers.2.{n}"] for n, t in checkpoint.layer(2).items() if "up_proj" in n]
        )
        assert exact.float().mean() > 0.99  # fp32 products in between may round a few the other way

    def test_weights_that_stay(self, tmp_path: Path) -> None:
        """As stored, and a scale for each row; the others as ever."""
        folder, meant = write_fp8(tmp_path, torch.float32)
        checkpoint, stored = open_checkpoint(folder), load_file(folder / "model.safetensors")
        assert checkpoint.fp8_block == (8, 8)
        name, kept = self.NAME.removeprefix("model.layers.1."), checkpoint.fp8_weights(1)
        assert {f"model.layers.1.{n}_scale_inv" for n in kept} == {
            n for n in stored if re.search(r"layers\.1\..*_inv", n)
        }
        tensors = checkpoint.layer(1, [name])
        weight, scale = tensors[name], tensors[name.replace("weight", "scale")]
        assert torch.equal(weight.view(torch.uint8), stored[self.NAME].view(torch.uint8))
        assert torch.equal(scale, stored[f"{self.NAME}_scale_inv"].repeat_interleave(8, 0)[:20])
        assert set(tensors) == {*checkpoint.layer(1), name.replace("weight", "scale")}
        torch.testing.assert_close(weight.float() * scale.repeat_interleave(8, 1), meant[self.NAME])
        other = "mlp.experts.1.gate_proj.weight"
        assert torch.equal(tensors[other], checkpoint.layer(1)[other])

    @pytest.mark.parametrize("value", [float("nan"), -float("nan")])
    def test_weights_that_stay_are_finite(self, tmp_path: Path, value: float) -> None:
        folder, _ = write_fp8(tmp_path)
        weight = load_file(folder / "model.safetensors")[self.NAME]
        weight[19, 15] = value
        assert weight.view(torch.uint8)[19, 15] == (0x7F if math.copysign(1, value) > 0 else 0xFF)
        self.edit(folder, self.NAME, weight)
        name = self.NAME.removeprefix("model.layers.1.")
        with pytest.raises(CheckpointError, match=r"experts\.2\.gate_proj\.weight has weights that are NaN"):
            open_checkpoint(folder).layer(1, [name])[name]
        self.edit(folder, f"{self.NAME}_scale_inv", torch.full((3, 2), 1e37))
        with pytest.raises(CheckpointError, match=r"experts\.2\.gate_proj\.weight has weights .* infinite"):
            open_checkpoint(folder).layer(1, [name])[name.replace("weight", "scale")]

    def test_scales_missing_mis_shaped_or_of_another_dtype(self, tmp_path: Path) -> None:
        scale = f"{self.NAME}_scale_inv"
        for tensor in (None, torch.ones(2, 2), torch.ones(3, 2, dtype=torch.bfloat16)):
            folder, _ = write_fp8(tmp_path)
            self.edit(folder, scale, tensor)
            with pytest.raises(
                CheckpointError, match=r"experts\.2\.gate_proj\.weight_scale_inv must be float32 \[3, 2\]"
            ):
                open_checkpoint(folder)

    def test_a_scale_that_belongs_to_no_weight(self, tmp_path: Path) -> None:
        folder, _ = write_fp8(tmp_path)
        self.edit(folder, "model.layers.1.mlp.gate.weight_scale_inv", torch.ones(1, 2))
        with pytest.raises(CheckpointError, match=r"lacks: model\.layers\.1\.mlp\.gate\.weight_scale_inv"):
            open_checkpoint(folder)

    def test_not_finite(self, tmp_path: Path) -> None:
        folder, _ = write_fp8(tmp_path)
        self.edit(folder, self.NAME, torch.full((20, 16), float("nan")).to(torch.float8_e4m3fn))
        with pytest.raises(CheckpointError, match=r"experts\.2\.gate_proj\.weight has weights that are NaN"):
            dict(open_checkpoint(folder).layer(1))

    def test_fp8_without_saying_so(self, tmp_path: Path) -> None:
        folder, _ = write_fp8(tmp_path)
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="float8_e4m3fn"):
            open_checkpoint(folder)
