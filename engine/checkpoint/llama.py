"""Hugging Face configs of the Llama architecture and its near kin, Mistral, Qwen2, Qwen3 and MiMo -> ModelSpec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from engine.checkpoint.config_keys import typed_config
from engine.checkpoint.json_file import LayerCount, Size
from engine.checkpoint.layout import check_spec
from engine.checkpoint.rope import read_rope
from engine.errors import CheckpointError
from engine.spec import Activation, GatedMLPSpec, GQASpec, LayerSpec, ModelSpec

# hidden_act -> the function's name here; some have several names there.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh", "relu2": "relu_squared",
}  # fmt: skip


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
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None


Slides = Callable[[int, LlamaConfig], bool]  # whether a layer, by its number, has the window that the model has


@dataclass(frozen=True)
class Biases:
    qkv: bool
    o: bool
    mlp: bool


def read_llama(raw: dict[str, Any], dtype: str) -> ModelSpec:
    """`raw`: config.json; `dtype`: of the stored weights. Raises CheckpointError, naming the key."""
    config = typed_config(raw, LlamaConfig)
    window, sliding = config.sliding_window, sliding_layers(config, [False] * config.num_hidden_layers)
    if any(sliding) or (window is not None and window < config.max_position_embeddings):
        raise CheckpointError(
            f"sliding_window {window} and layer_types: a llama model with sliding windows is not supported; to use it "
            "where they make no difference, set max_position_embeddings to the window and delete both keys"
        )
    return _model(config, raw, dtype, Biases(config.attention_bias, config.attention_bias, config.mlp_bias), sliding)


def read_mistral(raw: dict[str, Any], dtype: str) -> ModelSpec:
    """Llama without biases, all layers with a sliding window unless it is null; an absent one is 4096."""
    config = typed_config({"sliding_window": 4096, **raw}, LlamaConfig)
    everywhere = [config.sliding_window is not None] * config.num_hidden_layers
    if sliding_layers(config, everywhere) != everywhere:
        raise CheckpointError(
            "layer_types contradicts sliding_window, which all layers of a mistral model have or none"
        )
    return _model(config, raw, dtype, Biases(False, False, False), everywhere)


def upper_layers(layer: int, config: LlamaConfig) -> bool:
    return layer >= config.max_window_layers


def read_qwen2(raw: dict[str, Any], dtype: str, slides: Slides = upper_layers) -> ModelSpec:
    """Llama with biases on queries, keys and values, and, where use_sliding_window, a window in those layers that
    `layer_types` names, or `slides` where the key is not there."""
    config = typed_config(raw, LlamaConfig)
    return _model(config, raw, dtype, Biases(True, False, False), _qwen_sliding_layers(config, slides))


def read_qwen3(raw: dict[str, Any], dtype: str, slides: Slides = upper_layers) -> ModelSpec:
    """Qwen2 without biases unless attention_bias, and with queries and keys normalised head by head."""
    config = typed_config({"head_dim": 128, **raw}, LlamaConfig)
    biases = Biases(config.attention_bias, config.attention_bias, False)
    spec = _model(config, raw, dtype, biases, _qwen_sliding_layers(config, slides))
    return replace(spec, layers=tuple(map(normed, spec.layers, [config.rms_norm_eps] * len(spec.layers))))


def read_mimo(raw: dict[str, Any], dtype: str) -> ModelSpec:
    """Qwen2; its layers for predicting several tokens at once (`model.mtp_layers.*`) are left out."""
    own = ("auto_map", "num_nextn_predict_layers")
    return read_qwen2({key: value for key, value in raw.items() if key not in own}, dtype)


def normed(layer: LayerSpec, eps: float) -> LayerSpec:
    """The layer with its queries and keys normalised head by head."""
    assert isinstance(layer.attention, GQASpec)
    return replace(layer, attention=replace(layer.attention, qk_norm_eps=eps))


def sliding_layers(config: LlamaConfig, default: list[bool]) -> list[bool]:
    """Which layers have the sliding window: `layer_types`, or the default where the key is not there."""
    if config.layer_types is None:
        return default
    for kind in config.layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            raise CheckpointError(
                f"layer_types: {kind!r:.40} is not supported; supported: full_attention, sliding_attention"
            )
    if len(config.layer_types) != config.num_hidden_layers:
        raise CheckpointError(f"layer_types has {len(config.layer_types)} entries, expected {config.num_hidden_layers}")
    return [kind == "sliding_attention" for kind in config.layer_types]


def _qwen_sliding_layers(config: LlamaConfig, slides: Slides) -> list[bool]:
    if not config.use_sliding_window:
        config.sliding_window = None
    has = config.sliding_window is not None
    return sliding_layers(config, [has and slides(i, config) for i in range(config.num_hidden_layers)])


def attention_specs(config: LlamaConfig, raw: dict[str, Any], biases: Biases, sliding: Sequence[bool]) -> list[GQASpec]:
    """Each layer's attention. A window that is no shorter than the context is none."""
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
    window = config.sliding_window
    if any(sliding) and (window is None or window < 1):
        raise CheckpointError(f"sliding_window {window}: expected at least 1, since there are layers that have one")
    full = GQASpec(
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        softmax_scale=head_dim**-0.5,
        rope=read_rope(raw, head_dim, config.max_position_embeddings),
        qkv_bias=biases.qkv,
        o_bias=biases.o,
    )
    shorter = window is not None and window < config.max_position_embeddings
    windowed = replace(full, sliding_window=window) if shorter else full
    return [windowed if slides else full for slides in sliding]


def gated_mlp(config: LlamaConfig, activation: str, bias: bool) -> GatedMLPSpec:
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"hidden_act {activation!r:.40} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return GatedMLPSpec(config.intermediate_size, bias, ACTIVATIONS[activation])


def model_spec(config: LlamaConfig, dtype: str, layers: Sequence[LayerSpec]) -> ModelSpec:
    return ModelSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        tie_embeddings=config.tie_word_embeddings,
        dtype=dtype,
        layers=tuple(layers),
    )


def _model(config: LlamaConfig, raw: dict[str, Any], dtype: str, biases: Biases, sliding: Sequence[bool]) -> ModelSpec:
    mlp = gated_mlp(config, config.hidden_act, biases.mlp)
    attentions = attention_specs(config, raw, biases, sliding)
    spec = model_spec(config, dtype, [LayerSpec(attention, mlp) for attention in attentions])
    check_spec(spec)
    return spec
