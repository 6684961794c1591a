"""config.json of Llama, Mistral and Qwen2: defaults as `transformers` has them, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import GenerationConfig, LlamaConfig, MistralConfig, Qwen2Config

from engine.checkpoint import open_checkpoint
from engine.checkpoint.checkpoint import FAMILIES
from engine.errors import CheckpointError
from engine.spec import GQASpec, ModelSpec
from tests.checkpoint.folders import CONFIG, edit_config, llama_folder


def read(model_type: str = "llama", **changes: Any) -> ModelSpec:
    config = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    return FAMILIES[model_type].read(config, "float32")


def attention(spec: ModelSpec) -> GQASpec:
    found = spec.layers[0].attention
    assert isinstance(found, GQASpec)
    return found


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"vocab_size": "32"}, ("vocab_size", "int")),
        ({"vocab_size": ...}, ("vocab_size",)),
        ({"vocab_size": None}, ("vocab_size",)),
        ({"vocab_size": 0}, ("vocab_size",)),
        ({"hidden_size": -16}, ("hidden_size",)),
        ({"hidden_size": 16.5}, ("hidden_size",)),
        ({"hidden_size": True}, ("hidden_size",)),
        ({"hidden_size": [16]}, ("hidden_size",)),
        ({"hidden_size": 10**30}, ("hidden_size",)),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers",)),
        ({"num_attention_heads": 3}, ("num_attention_heads", "16")),
        ({"num_attention_heads": 5, "head_dim": 4}, ("num_attention_heads 5", "num_key_value_heads 2")),
        ({"num_key_value_heads": 3}, ("num_key_value_heads 3",)),
        ({"num_key_value_heads": 0}, ("num_key_value_heads",)),
        ({"num_key_value_heads": 8}, ("num_key_value_heads 8",)),
        ({"head_dim": 5}, ("head_dim 5",)),
        ({"head_dim": 0}, ("head_dim",)),
        ({"max_position_embeddings": ...}, ("max_position_embeddings",)),
        ({"rms_norm_eps": 0}, ("rms_norm_eps",)),
        ({"rms_norm_eps": "1e-5"}, ("rms_norm_eps",)),
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
        ({"tie_word_embeddings": "yes"}, ("tie_word_embeddings",)),
        ({"attention_bias": 1}, ("attention_bias",)),
        ({"rope_theta": -1.0}, ("rope_theta",)),
        ({"rope_scaling": {"rope_type": "new"}}, ("rope_scaling", "new", "llama3")),
        ({"rope_scaling": "linear"}, ("rope_scaling",)),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
        ({"sliding_window": 32}, ("sliding_window", "32")),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types", "sliding_attention")),
        ({"quantization_config": {"quant_method": "fp8"}}, ("quantization_config", "fp8")),
        ({"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping", "50.0")),
        ({"embedding_multiplier": 12}, ("embedding_multiplier", "12")),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, ("auto_map",)),
    ],
)
def test_refused(tmp_path, changes, names):
    folder, _ = llama_folder(tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    for name in ("config.json", *names):
        assert name in str(caught.value)


def test_unset_and_harmless_keys_are_accepted():
    unset = {"quantization_config": None, "attn_logit_softcapping": None, "use_qk_norm": False, "num_experts": 0}
    harmless = {"architectures": ["LlamaForCausalLM"], "_name_or_path": "x", "pretraining_tp": 2, "use_cache": True}
    assert read(**unset, **harmless) == read()


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config])
def test_every_key_transformers_writes_is_accepted(kind):
    """Its whole configuration, defaults included, and the decoding defaults that older versions kept there."""
    generation = {k: v for k, v in GenerationConfig().to_dict().items() if not isinstance(v, dict)}
    written = json.loads(kind(num_hidden_layers=2).to_json_string(use_diff=False))
    if kind is MistralConfig:
        written["sliding_window"] = None
    FAMILIES[kind.model_type].read(generation | written | {"dtype": "bfloat16"}, "bfloat16")


def test_defaults_are_those_of_transformers():
    required = {
        key: CONFIG[key]
        for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings",
        )
    }  # fmt: skip
    for kind in (LlamaConfig, Qwen2Config):
        theirs = kind(**required, num_key_value_heads=None)
        ours = FAMILIES[kind.model_type].read(required, "float32")
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.tie_embeddings == theirs.tie_word_embeddings
        assert attention(ours).num_kv_heads == theirs.num_key_value_heads
        assert attention(ours).head_dim == 4


def test_sliding_windows():
    """Refused exactly where `transformers` would mask by one that is shorter than the context."""
    assert read(sliding_window=64) == read() == read(sliding_window=None)
    assert read("mistral", sliding_window=None) == read()
    assert read("mistral") == read()  # transformers takes 4096, which 64 positions never reach
    with pytest.raises(CheckpointError, match="sliding_window 4096"):
        read("mistral", max_position_embeddings=8192)
    qwen = {"sliding_window": 32, "max_window_layers": 1}
    assert not attention(read("qwen2", **qwen)).o_bias
    assert attention(read("qwen2", **qwen, use_sliding_window=False)).qkv_bias
    with pytest.raises(CheckpointError, match="sliding_window 32"):
        read("qwen2", **qwen, use_sliding_window=True)


def test_biases():
    both = attention(read(attention_bias=True))
    assert both.qkv_bias
    assert both.o_bias
    assert read(mlp_bias=True).layers[0].mlp.bias
    assert not read().layers[0].mlp.bias
