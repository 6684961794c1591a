"""Hugging Face configs of the Llama architecture and its near kin, Mistral and Qwen2 -> ModelSpec.

A key that this reader does not know is refused unless it is unset (null, false, 0 or empty), is among the HARMLESS, or
starts with "_": what changes the mathematics must not pass unseen, and a key known to be harmless can be deleted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from engine.checkpoint.json_file import LayerCount, Size, typed
from engine.checkpoint.layout import check_spec
from engine.checkpoint.rope import read_rope
from engine.errors import CheckpointError
from engine.spec import GatedMLPSpec, GQASpec, LayerSpec, ModelSpec

# Keys that say nothing about what the model computes: bookkeeping, training, and defaults of decoding.
_BOOKKEEPING = (
    "architectures attention_dropout attn_implementation base_model_name_or_path bos_token_id chunk_size_feed_forward "
    "classifier_dropout diversity_penalty do_sample dtype early_stopping eos_token_id id2label initializer_range "
    "is_decoder is_llama_config label2id length_penalty max_length max_new_tokens max_sequence_length min_length "
    "model_max_length model_type name_or_path num_beam_groups num_beams num_labels num_return_sequences "
    "output_attentions output_hidden_states output_scores pad_token_id pretraining_tp problem_type "
    "repetition_penalty return_dict return_dict_in_generate suppress_tokens task_specific_params temperature "
    "tokenizer_class top_k top_p torch_dtype transformers.js_config transformers_version typical_p unsloth_fixed "
    "unsloth_version use_cache"
)
HARMLESS = frozenset(_BOOKKEEPING.split())


class LlamaConfig(msgspec.Struct, kw_only=True):
    """The keys that say what the model computes, with `transformers`' defaults."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: LayerCount
    num_attention_heads: Size
    max_position_embeddings: Annotated[int, Meta(ge=1, le=2**31)]
    num_key_value_heads: Size | None = None  # None: as many as attention heads
    head_dim: Annotated[int, Meta(ge=1, le=2**16)] | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    rms_norm_eps: Annotated[float, Meta(gt=0, le=1)] = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    use_sliding_window: bool = False
    max_window_layers: int | None = None
    layer_types: list[str] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None


@dataclass(frozen=True)
class Biases:
    qkv: bool
    o: bool
    mlp: bool


def read_llama(raw: dict[str, Any], dtype: str) -> ModelSpec:
    """`raw`: config.json; `dtype`: of the stored weights. Raises CheckpointError, naming the key."""
    config = _typed_config(raw)
    return _spec(config, raw, dtype, Biases(config.attention_bias, config.attention_bias, config.mlp_bias))


def read_mistral(raw: dict[str, Any], dtype: str) -> ModelSpec:
    """Llama without biases, with a sliding window unless it is null: `transformers` takes an absent one as 4096."""
    return _spec(_typed_config({"sliding_window": 4096, **raw}), raw, dtype, Biases(False, False, False))


def read_qwen2(raw: dict[str, Any], dtype: str) -> ModelSpec:
    """Llama with biases on queries, keys and values, and a sliding window where use_sliding_window says so."""
    config = _typed_config(raw)
    if not config.use_sliding_window:
        config.sliding_window = None
    return _spec(config, raw, dtype, Biases(True, False, False))


def _typed_config(raw: dict[str, Any]) -> LlamaConfig:
    for key, value in raw.items():
        known = key in LlamaConfig.__struct_fields__ or key in HARMLESS or key.startswith("_")
        if not known and value not in (None, False, 0, "", [], {}):
            raise CheckpointError(
                f"{key} ({value!r:.60}) is not understood; delete it from the file if what the model computes does not "
                "depend on it"
            )
    return typed({key: value for key, value in raw.items() if value is not None}, LlamaConfig)


def _spec(config: LlamaConfig, raw: dict[str, Any], dtype: str, biases: Biases) -> ModelSpec:
    _check_supported(config)
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    if not config.head_dim and config.hidden_size % config.num_attention_heads:
        raise CheckpointError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}"
        )
    num_kv_heads = config.num_key_value_heads or config.num_attention_heads
    if config.num_attention_heads % num_kv_heads:
        raise CheckpointError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    attention = GQASpec(
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        softmax_scale=head_dim**-0.5,
        rope=read_rope(raw, head_dim, config.max_position_embeddings),
        qkv_bias=biases.qkv,
        o_bias=biases.o,
    )
    layer = LayerSpec(attention, GatedMLPSpec(config.intermediate_size, biases.mlp))
    spec = ModelSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        tie_embeddings=config.tie_word_embeddings,
        dtype=dtype,
        layers=(layer,) * config.num_hidden_layers,
    )
    check_spec(spec)
    return spec


def _check_supported(config: LlamaConfig) -> None:
    if config.hidden_act not in ("silu", "swish"):  # one function under two names
        raise CheckpointError(f"hidden_act {config.hidden_act!r:.40} is not supported; supported: silu")
    window = config.sliding_window
    if window is not None and window < config.max_position_embeddings:
        raise CheckpointError(
            f"sliding_window {window} is not supported; to use the model where it makes no difference, set "
            f"max_position_embeddings to {window}"
        )
    for kind in config.layer_types or ():
        if kind != "full_attention":
            raise CheckpointError(f"layer_types: {kind!r:.40} is not supported; supported: full_attention")
