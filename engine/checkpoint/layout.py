"""Which tensors a model has: names and shapes derived from its ModelSpec, and the checks that hold for any of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from engine.errors import CheckpointError
from engine.spec import GQASpec, LayerSpec, MLASpec, ModelSpec, RopeSpec

Shape = tuple[int, ...]

DTYPES = ("float32", "bfloat16", "float16")
MAX_NAMED = 4  # tensors an error message lists


class HasShape(Protocol):
    """A tensor, or a header's entry for one."""

    @property
    def shape(self) -> Shape: ...


def stored_name(name: str, layer: int | None = None) -> str:
    """Canonical name, of a layer's tensor or an outer one -> name in the file."""
    if layer is not None:
        return f"model.layers.{layer}.{name}"
    return name if name.startswith("lm_head.") else f"model.{name}"


def outer_tensors(spec: ModelSpec) -> dict[str, Shape]:
    """Canonical name -> shape of what no layer owns."""
    shapes: dict[str, Shape] = {"embed_tokens.weight": (spec.vocab_size, spec.hidden_size)}
    shapes["norm.weight"] = (spec.hidden_size,)
    if not spec.tie_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, spec.hidden_size)
    return shapes


def layer_tensors(layer: LayerSpec, hidden: int) -> dict[str, Shape]:
    """Canonical name -> shape of one layer's tensors. Projections are [out, in]."""
    shapes: dict[str, Shape] = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}

    def linear(name: str, out: int, into: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (out, into)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    a = layer.attention
    if isinstance(a, GQASpec):
        linear("self_attn.q_proj", a.num_heads * a.head_dim, hidden, a.qkv_bias)
        linear("self_attn.k_proj", a.num_kv_heads * a.head_dim, hidden, a.qkv_bias)
        linear("self_attn.v_proj", a.num_kv_heads * a.head_dim, hidden, a.qkv_bias)
        linear("self_attn.o_proj", hidden, a.num_heads * a.head_dim, a.o_bias)
    else:
        linear("self_attn.q_proj", a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim), hidden, a.q_bias)
        linear("self_attn.kv_a_proj_with_mqa", a.cache_width, hidden, a.kv_a_bias)
        if a.latent_norm_eps is not None:
            shapes["self_attn.kv_a_layernorm.weight"] = (a.kv_lora_rank,)
        linear("self_attn.kv_b_proj", a.num_heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank, False)
        linear("self_attn.o_proj", hidden, a.num_heads * a.v_head_dim, a.o_bias)
    linear("mlp.gate_proj", layer.mlp.intermediate_size, hidden, layer.mlp.bias)
    linear("mlp.up_proj", layer.mlp.intermediate_size, hidden, layer.mlp.bias)
    linear("mlp.down_proj", hidden, layer.mlp.intermediate_size, layer.mlp.bias)
    return shapes


def expected_tensors(spec: ModelSpec) -> dict[str, Shape]:
    """Name in the file -> shape, of every tensor a model has; a tied head is stored as the embedding alone."""
    shapes = {stored_name(name): shape for name, shape in outer_tensors(spec).items()}
    for i, layer in enumerate(spec.layers):
        for name, shape in layer_tensors(layer, spec.hidden_size).items():
            shapes[stored_name(name, i)] = shape
    return shapes


def check_tensors(where: object, expected: Mapping[str, Shape], found: Mapping[str, HasShape]) -> None:
    """Raises CheckpointError, naming them, where tensors are missing, extra or mis-shaped."""

    def named(names: list[str]) -> str:
        return ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")

    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"{where}: missing tensors: {named(missing)}")
    if extra := sorted(name for name in found if name not in expected):
        raise CheckpointError(f"{where}: tensors that the model described in config.json lacks: {named(extra)}")
    wrong = [
        f"{name} is {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if tuple(found[name].shape) != shape
    ]
    if wrong:
        raise CheckpointError(f"{where}: tensors of the wrong shape: {named(wrong)}")


def check_spec(spec: ModelSpec) -> None:
    """Raises CheckpointError where a spec's numbers contradict each other or are beyond what the engine computes."""
    _check(spec.dtype in DTYPES, f"dtype {spec.dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
        _check(getattr(spec, name) >= 1, f"{name} must be at least 1")
    _check(_positive(spec.norm_eps), "norm_eps must be a positive number")
    _check(bool(spec.layers), "the model has no layers")
    for i, layer in enumerate(spec.layers):
        where = f"layer {i}: "
        _check(layer.mlp.intermediate_size >= 1, f"{where}intermediate_size must be at least 1")
        _check(_positive(layer.attention.softmax_scale), f"{where}softmax_scale must be a positive number")
        if isinstance(layer.attention, GQASpec):
            _check_gqa(layer.attention, where)
        else:
            _check_mla(layer.attention, where)


def _check_gqa(a: GQASpec, where: str) -> None:
    for name in ("num_heads", "num_kv_heads", "head_dim"):
        _check(getattr(a, name) >= 1, f"{where}{name} must be at least 1")
    _check(
        a.num_heads % a.num_kv_heads == 0, f"{where}{a.num_heads} heads do not share {a.num_kv_heads} KV heads evenly"
    )
    _check(a.head_dim % 2 == 0, f"{where}head_dim {a.head_dim} is odd, which rotary embedding cannot use")
    _check_rope(a.rope, a.head_dim // 2, where)


def _check_mla(a: MLASpec, where: str) -> None:
    for name in ("num_heads", "kv_lora_rank", "v_head_dim", "rope_groups"):
        _check(getattr(a, name) >= 1, f"{where}{name} must be at least 1")
    for name in ("qk_nope_head_dim", "qk_rope_head_dim"):
        _check(getattr(a, name) >= 0, f"{where}{name} must be at least 0")
    _check(a.qk_nope_head_dim + a.qk_rope_head_dim > 0, f"{where}qk_nope_head_dim and qk_rope_head_dim are both 0")
    _check(a.qk_rope_head_dim % 2 == 0, f"{where}qk_rope_head_dim {a.qk_rope_head_dim} is odd")
    _check(
        a.num_heads % a.rope_groups == 0, f"{where}{a.num_heads} heads do not share {a.rope_groups} rope groups evenly"
    )
    _check(a.q_lora_rank is None, f"{where}q_lora_rank: a low-rank query projection is not supported")
    _check(
        a.latent_norm_eps is None or _positive(a.latent_norm_eps), f"{where}latent_norm_eps must be null or positive"
    )
    _check_rope(a.rope, a.rope_width // 2, where)


def _check_rope(rope: RopeSpec, frequencies: int, where: str) -> None:
    found = len(rope.inv_freq)
    _check(found == frequencies, f"{where}rope: inv_freq has {found} numbers, expected {frequencies}")
    finite = all(math.isfinite(f) for f in rope.inv_freq)
    _check(finite, f"{where}rope: inv_freq has numbers that are NaN or infinite")
    _check(_positive(rope.scale), f"{where}rope: scale must be a positive number")


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise CheckpointError(message)
