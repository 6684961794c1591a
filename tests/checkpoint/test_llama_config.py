"""config.json of Llama and its kin: defaults as `transformers` has them, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import (
    CONFIG_MAPPING,
    Gemma2Config,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

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
        ({"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types", "sliding")),
        ({"layer_types": ["full_attention", "chunked_attention"]}, ("layer_types", "chunked_attention")),
        ({"layer_types": ["full_attention"]}, ("layer_types", "1 entries", "2")),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantization_config", "gptq", "made from")),
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


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Gemma2Config])
def test_every_key_transformers_writes_is_accepted(kind):
    """Its whole configuration, defaults included, and the decoding defaults that older versions kept there."""
    generation = {k: v for k, v in GenerationConfig().to_dict().items() if not isinstance(v, dict)}
    written = json.loads(kind(num_hidden_layers=2).to_json_string(use_diff=False))
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


def windows(model_type: str, **changes: Any) -> list[int | None]:
    return [layer.attention.sliding_window for layer in read(model_type, **changes).layers]


def test_sliding_windows():
    """Where `transformers` masks by one that is shorter than the context; Llama, where it does not, has none."""
    assert read(sliding_window=64) == read() == read(sliding_window=None)
    assert read("mistral", sliding_window=None) == read()
    assert read("mistral") == read()  # transformers takes 4096, which 64 positions never reach
    assert windows("mistral", max_position_embeddings=8192) == [4096, 4096]
    assert windows("mistral", sliding_window=63) == [63, 63]
    qwen = {"sliding_window": 32, "max_window_layers": 1}
    types = {"layer_types": ["sliding_attention", "full_attention"]}
    for family in ("qwen2", "qwen3"):
        assert windows(family, **qwen) == [None, None]
        assert windows(family, **qwen, use_sliding_window=True) == [None, 32]
        assert windows(family, **qwen, use_sliding_window=True, **types) == [32, None]
        assert windows(family, use_sliding_window=True, sliding_window=32) == [None, None]  # from layer 28 on
    assert windows("gemma2", sliding_window=32) == [32, None]
    assert windows("gemma2", sliding_window=32, **types) == [32, None]
    assert windows("gemma2", sliding_window=None) == [None, None]


@pytest.mark.parametrize(
    ("family", "changes", "names"),
    [
        ("mistral", {"sliding_window": 32, "layer_types": ["full_attention"] * 2}, ("layer_types", "sliding_window")),
        ("mistral", {"sliding_window": 0}, ("sliding_window 0",)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": -1, "max_window_layers": 0}, ("sliding_window -1",)),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, ("sliding_window None",)),
        ("qwen3", {"num_experts": 8}, ("num_experts", "8")),
        ("gemma2", {"hidden_activation": "gelu"}, ("gelu", "gelu_pytorch_tanh")),
        ("gemma2", {"attn_logit_softcapping": 0.0}, ("attn_logit_softcapping",)),
        ("gemma2", {"query_pre_attn_scalar": 0}, ("query_pre_attn_scalar",)),
        ("gemma2", {"use_bidirectional_attention": True}, ("use_bidirectional_attention",)),
        ("mimo", {"use_mrope": True}, ("use_mrope",)),
    ],
)
def test_refused_of_a_family(family, changes, names):
    with pytest.raises(CheckpointError) as caught:
        read(family, **changes)
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "mpt", "falcon", "opt", "gpt_neox", "phi", "gemma3_text", "cohere"])
def test_what_has_no_reader_is_refused(tmp_path, kind):
    """Learned positions, ALiBi, partial rotation, another order of the layer: by the name of the model type."""
    folder, _ = llama_folder(tmp_path)
    (folder / "config.json").write_text(CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
    with pytest.raises(CheckpointError, match=rf"model_type '{kind}' is not supported.*llama.*gemma2"):
        open_checkpoint(folder)


BOOKKEEPING = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 1, "initializer_range": 0.02,
    "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
    "use_cache": True,
}  # fmt: skip
# The keys that these families' own files have beside CONFIG's and BOOKKEEPING.
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma2": {
        "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "final_logit_softcapping": 30.0,
        "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_size": 4096,
    },
    "mimo": {
        "auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig"}, "head_dim": 128, "hidden_act": "silu",
        "max_window_layers": 36, "num_nextn_predict_layers": 1, "sliding_window": 32768, "use_mrope": False,
        "use_sliding_window": False,
    },
    "qwen3": {
        "head_dim": 128, "hidden_act": "silu", "max_window_layers": 36, "sliding_window": None,
        "use_sliding_window": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", AS_PUBLISHED)
def test_keys_of_published_configs_are_understood(family):
    spec = read(family, **BOOKKEEPING, **AS_PUBLISHED[family], max_position_embeddings=8192)
    assert [layer.attention.sliding_window for layer in spec.layers] == [4096 if family == "gemma2" else None, None]
    assert attention(spec).qkv_bias == (family == "mimo")
    assert (attention(spec).qk_norm_eps is not None) == (family == "qwen3")


def test_gemma2():
    spec = read("gemma2", query_pre_attn_scalar=144, rms_norm_eps=1e-6)
    layer = spec.layers[0]
    assert (layer.attention.softmax_scale, layer.attention.score_softcap, spec.logit_softcap) == (1 / 12, 50.0, 30.0)
    assert (layer.post_norms, layer.mlp.activation, spec.norm_offset) == (True, "gelu_tanh", 1.0)
    assert (spec.embedding_scale, spec.tie_embeddings, layer.attention.head_dim) == (4.0, True, 256)
    uncapped = read("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert uncapped.layers[0].attention.score_softcap is uncapped.logit_softcap is None


def test_biases():
    both = attention(read(attention_bias=True))
    assert both.qkv_bias
    assert both.o_bias
    assert read(mlp_bias=True).layers[0].mlp.bias
    assert not read().layers[0].mlp.bias
