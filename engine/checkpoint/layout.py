"""Which tensors a model has: names and shapes derived from its ModelSpec, and the checks that hold for any of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

from engine.errors import CheckpointError
from engine.spec import (
    GatedMLPSpec,
    GQASpec,
    HeadNormSpec,
    LayerSpec,
    MLASpec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    PlainMLPSpec,
    RopeSpec,
)

Shape = tuple[int, ...]

DTYPES = ("float32", "bfloat16", "float16")
MAX_NAMED = 4  # tensors an error message lists
MAX_EXPERTS = 2**18  # over all layers: each has tensors with names, and none is made for a number that is a mistake


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
    norms = ["input_layernorm", "post_attention_layernorm"]
    if layer.post_norms:  # named as Gemma-2's, where post_attention_layernorm is the norm of the attention's output
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    shapes: dict[str, Shape] = {f"{norm}.weight": (hidden,) for norm in norms}
    a = layer.attention
    attention = _gqa_tensors(a, hidden) if isinstance(a, GQASpec) else _mla_tensors(a, hidden)
    shapes |= {f"self_attn.{name}": shape for name, shape in attention.items()}
    return shapes | {f"mlp.{name}": shape for name, shape in _mlp_tensors(layer.mlp, hidden).items()}


def _linear(name: str, out: int, into: int, bias: bool = False) -> dict[str, Shape]:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def _gqa_tensors(a: GQASpec, hidden: int) -> dict[str, Shape]:
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    shapes = _linear("q_proj", q, hidden, a.qkv_bias)
    shapes |= _linear("k_proj", kv, hidden, a.qkv_bias) | _linear("v_proj", kv, hidden, a.qkv_bias)
    if a.qk_norm_eps is not None:
        shapes |= {"q_norm.weight": (a.head_dim,), "k_norm.weight": (a.head_dim,)}
    return shapes | _linear("o_proj", hidden, q, a.o_bias)


def _mla_tensors(a: MLASpec, hidden: int) -> dict[str, Shape]:
    q, kv = a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim), a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
    row_of = hidden  # channels that the cache row is a projection of
    if a.head_norm is not None:
        dim, keys = a.head_norm.head_dim, a.head_norm.num_kv_heads * a.head_norm.head_dim
        shapes = _linear("q_proj", a.num_heads * dim, hidden, a.q_bias)
        shapes |= _linear("k_proj", keys, hidden, a.q_bias) | _linear("v_proj", keys, hidden, a.q_bias)
        shapes |= {"q_norm.weight": (dim,), "k_norm.weight": (dim,)}
        shapes |= _linear("q_rope_proj", a.num_heads * a.qk_rope_head_dim, dim)
        row_of = 2 * keys
    elif a.q_lora_rank is None:
        shapes = _linear("q_proj", q, hidden, a.q_bias)
    else:
        shapes = _linear("q_a_proj", a.q_lora_rank, hidden, a.q_bias)
        shapes |= {"q_a_layernorm.weight": (a.q_lora_rank,)} | _linear("q_b_proj", q, a.q_lora_rank)
    shapes |= _linear("kv_a_proj_with_mqa", a.cache_width, row_of, a.kv_a_bias)
    if a.latent_norm_eps is not None:
        shapes["kv_a_layernorm.weight"] = (a.kv_lora_rank,)
    shapes |= _linear("kv_b_proj", kv, a.kv_lora_rank)
    return shapes | _linear("o_proj", hidden, a.num_heads * a.v_head_dim, a.o_bias)


def _mlp_tensors(mlp: MLPSpec, hidden: int) -> dict[str, Shape]:
    def dense(prefix: str, size: int, bias: bool = False) -> dict[str, Shape]:
        """A gated MLP."""
        shapes = _linear(f"{prefix}gate_proj", size, hidden, bias) | _linear(f"{prefix}up_proj", size, hidden, bias)
        return shapes | _linear(f"{prefix}down_proj", hidden, size, bias)

    if isinstance(mlp, GatedMLPSpec):
        return dense("", mlp.intermediate_size, mlp.bias)
    if isinstance(mlp, PlainMLPSpec):
        up = _linear("up_proj", mlp.intermediate_size, hidden, mlp.bias)
        return up | _linear("down_proj", hidden, mlp.intermediate_size, mlp.bias)
    shapes: dict[str, Shape] = {"gate.weight": (mlp.num_experts, hidden)}
    if mlp.correction_bias:
        shapes["gate.e_score_correction_bias"] = (mlp.num_experts,)
    for i in range(mlp.num_experts):
        shapes |= dense(f"experts.{i}.", mlp.intermediate_size)
    if mlp.shared_intermediate_size:
        shapes |= dense("shared_experts.", mlp.shared_intermediate_size)
    if mlp.shared_gate:
        shapes |= _linear("shared_expert_gate", 1, hidden)
    return shapes


def expected_tensors(spec: ModelSpec, rename: Callable[[str], str] = str) -> dict[str, Shape]:
    """Name in the file -> shape, of every tensor a model has; a tied head is stored as the embedding alone.

    `rename`: canonical name of a layer's tensor -> that in the file.
    """
    shapes = {stored_name(name): shape for name, shape in outer_tensors(spec).items()}
    for i, layer in enumerate(spec.layers):
        for name, shape in layer_tensors(layer, spec.hidden_size).items():
            shapes[stored_name(rename(name), i)] = shape
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
    _check(math.isfinite(spec.norm_offset), "norm_offset must be a finite number")
    for name in ("embedding_scale", "residual_scale", "logit_scale"):
        _check(_positive(getattr(spec, name)), f"{name} must be a positive number")
    _check(spec.logit_softcap is None or _positive(spec.logit_softcap), "logit_softcap must be null or positive")
    _check(bool(spec.layers), "the model has no layers")
    experts = sum(layer.mlp.num_experts for layer in spec.layers if isinstance(layer.mlp, MoESpec))
    _check(experts <= MAX_EXPERTS, f"num_experts: {experts} in all are more than the {MAX_EXPERTS} supported")
    for i, layer in enumerate(spec.layers):
        where = f"layer {i}: "
        _check(layer.mlp.intermediate_size >= 1, f"{where}intermediate_size must be at least 1")
        window, cap = layer.attention.sliding_window, layer.attention.score_softcap
        _check(window is None or 1 <= window < 2**31, f"{where}sliding_window must be null or at least 1")
        _check(cap is None or _positive(cap), f"{where}score_softcap must be null or positive")
        if isinstance(layer.mlp, MoESpec):
            _check_moe(layer.mlp, where)
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
    _check(a.qk_norm_eps is None or _positive(a.qk_norm_eps), f"{where}qk_norm_eps must be null or positive")
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
    _check(a.q_lora_rank is None or a.q_lora_rank >= 1, f"{where}q_lora_rank must be null or at least 1")
    _check(
        (a.q_lora_rank is None) == (a.q_norm_eps is None) and (a.q_norm_eps is None or _positive(a.q_norm_eps)),
        f"{where}q_norm_eps must be a positive number with q_lora_rank, and null without",
    )
    _check(
        a.latent_norm_eps is None or _positive(a.latent_norm_eps), f"{where}latent_norm_eps must be null or positive"
    )
    if a.head_norm is not None:
        _check_head_norm(a, a.head_norm, where)
    _check_rope(a.rope, a.rope_width // 2, where)


def _check_head_norm(a: MLASpec, norm: HeadNormSpec, where: str) -> None:
    for name in ("num_kv_heads", "head_dim"):
        _check(getattr(norm, name) >= 1, f"{where}head_norm: {name} must be at least 1")
    _check(_positive(norm.eps), f"{where}head_norm: eps must be a positive number")
    _check(a.qk_nope_head_dim in (0, norm.head_dim), f"{where}qk_nope_head_dim must be 0 or head_norm's head_dim")
    _check(a.q_lora_rank is None, f"{where}head_norm and q_lora_rank exclude each other")


def _check_moe(m: MoESpec, where: str) -> None:
    for name in ("num_experts", "experts_per_token", "num_groups", "groups_per_token"):
        _check(getattr(m, name) >= 1, f"{where}{name} must be at least 1")
    _check(m.shared_intermediate_size >= 0, f"{where}shared_intermediate_size must be at least 0")
    _check(bool(m.shared_intermediate_size) or not m.shared_gate, f"{where}shared_gate without a shared expert")
    _check(m.num_experts % m.num_groups == 0, f"{where}{m.num_experts} experts are not {m.num_groups} equal groups")
    _check(m.groups_per_token <= m.num_groups, f"{where}groups_per_token is more than there are groups")
    group = m.num_experts // m.num_groups
    _check(m.experts_per_token <= group * m.groups_per_token, f"{where}experts_per_token is more than can be chosen")
    _check(m.group_score == "max" or group >= 2, f"{where}group_score top2_sum needs groups of two experts or more")
    _check(_positive(m.scale), f"{where}scale must be a positive number")


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
