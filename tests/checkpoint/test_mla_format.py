"""This project's own config.json: exact round trips, a file fixed for all time, and what is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint import open_checkpoint
from engine.checkpoint.mla_format import config_from_spec, format_config, spec_from_config
from engine.errors import CheckpointError
from engine.spec import (
    GatedMLPSpec,
    GQASpec,
    HeadNormSpec,
    LayerSpec,
    MLASpec,
    ModelSpec,
    MoESpec,
    PlainMLPSpec,
    RopeSpec,
)  # fmt: skip
from tests.checkpoint.folders import llama_folder

PLAIN = MLASpec(
    num_heads=4, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=6, softmax_scale=6**-0.5,
    rope=RopeSpec((1.0,)),
)  # fmt: skip
RICH = MLASpec(
    num_heads=4, kv_lora_rank=5, qk_nope_head_dim=0, qk_rope_head_dim=4, v_head_dim=3, softmax_scale=0.25,
    rope=RopeSpec((1.0, 0.1, 0.5, 1 / 3), "interleaved", 1.25), rope_groups=2, latent_norm_eps=1e-6, q_bias=True,
    kv_a_bias=True, o_bias=True, sliding_window=9, score_softcap=50.0, head_norm=HeadNormSpec(2, 4, 1e-6),
)  # fmt: skip
SMALL = ModelSpec(
    vocab_size=16, hidden_size=8, norm_eps=1e-5, max_position_embeddings=32, tie_embeddings=False, dtype="float32",
    layers=(LayerSpec(PLAIN, GatedMLPSpec(12)), LayerSpec(RICH, GatedMLPSpec(10, True), post_norms=True)),
)  # fmt: skip

# As version 1 was written; a change that breaks this text breaks every converted model on disk.
FIXED = """{
  "model_type": "mla_server",
  "format_version": 1,
  "vocab_size": 16,
  "hidden_size": 8,
  "norm_eps": 1e-05,
  "max_position_embeddings": 32,
  "tie_embeddings": false,
  "dtype": "float32",
  "norm_offset": 0.0,
  "embedding_scale": 1.0,
  "residual_scale": 1.0,
  "logit_scale": 1.0,
  "logit_softcap": null,
  "ropes": [
    {"inv_freq": [1.0], "layout": "half", "scale": 1.0},
    {"inv_freq": [1.0, 0.1, 0.5, 0.3333333333333333], "layout": "interleaved", "scale": 1.25}
  ],
  "layers": [
    {"attention": {"kind": "mla", "num_heads": 4, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, \
"v_head_dim": 6, "softmax_scale": 0.408248290463863, "rope": 0, "rope_groups": 1, "q_lora_rank": null, \
"q_norm_eps": null, "latent_norm_eps": null, "q_bias": false, "kv_a_bias": false, "o_bias": false, \
"sliding_window": null, "score_softcap": null, "head_norm": null}, \
"mlp": {"kind": "gated", "intermediate_size": 12, "bias": false, "activation": "silu"}, "post_norms": false},
    {"attention": {"kind": "mla", "num_heads": 4, "kv_lora_rank": 5, "qk_nope_head_dim": 0, "qk_rope_head_dim": 4, \
"v_head_dim": 3, "softmax_scale": 0.25, "rope": 1, "rope_groups": 2, "q_lora_rank": null, \
"q_norm_eps": null, "latent_norm_eps": 1e-06, "q_bias": true, "kv_a_bias": true, "o_bias": true, \
"sliding_window": 9, "score_softcap": 50.0, "head_norm": {"num_kv_heads": 2, "head_dim": 4, "eps": 1e-06}}, \
"mlp": {"kind": "gated", "intermediate_size": 10, "bias": true, "activation": "silu"}, "post_norms": true}
  ]
}
"""

positive = st.floats(min_value=5e-324, max_value=1e300, allow_subnormal=True)
frequency = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def attentions(draw: st.DrawFn) -> MLASpec:
    groups, half = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    count = groups * half
    low_rank = draw(st.booleans())
    return MLASpec(
        num_heads=groups * draw(st.integers(1, 4)),
        kv_lora_rank=draw(st.integers(1, 512)),
        qk_nope_head_dim=draw(st.integers(0 if half else 1, 128)),
        qk_rope_head_dim=2 * half,
        v_head_dim=draw(st.integers(1, 128)),
        softmax_scale=draw(positive),
        rope=RopeSpec(
            tuple(draw(st.lists(frequency, min_size=count, max_size=count))),
            draw(st.sampled_from(["half", "interleaved"])),
            draw(positive),
        ),
        rope_groups=groups,
        q_lora_rank=draw(st.integers(1, 2048)) if low_rank else None,
        q_norm_eps=draw(positive) if low_rank else None,
        latent_norm_eps=draw(st.none() | positive),
        sliding_window=draw(st.none() | st.integers(1, 2**31 - 1)),
        score_softcap=draw(st.none() | positive),
        q_bias=draw(st.booleans()),
        kv_a_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
    )


activations = st.sampled_from(["silu", "gelu_tanh", "relu_squared"])


@st.composite
def mixtures(draw: st.DrawFn) -> MoESpec:
    groups, size = draw(st.integers(1, 8)), draw(st.integers(2, 32))
    kept, shared = draw(st.integers(1, groups)), draw(st.integers(0, 99))
    return MoESpec(
        num_experts=groups * size,
        experts_per_token=draw(st.integers(1, kept * size)),
        intermediate_size=draw(st.integers(1, 99)),
        shared_intermediate_size=shared,
        shared_gate=shared > 0 and draw(st.booleans()),
        scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
        correction_bias=draw(st.booleans()),
        num_groups=groups,
        groups_per_token=kept,
        group_score=draw(st.sampled_from(["max", "top2_sum"])),
        normalize=draw(st.booleans()),
        scale=draw(positive),
    )


mlps = mixtures() | st.builds(GatedMLPSpec, st.integers(1, 99), st.booleans(), activations)
mlps |= st.builds(PlainMLPSpec, st.integers(1, 99), st.booleans(), activations)
layers = st.builds(LayerSpec, attentions(), mlps, st.booleans())
specs = st.builds(
    ModelSpec,
    vocab_size=st.integers(1, 200_000),
    hidden_size=st.integers(1, 9000),
    norm_eps=positive,
    max_position_embeddings=st.integers(1, 2**31),
    tie_embeddings=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    layers=st.lists(layers, min_size=1, max_size=4).map(tuple),
    norm_offset=frequency,
    embedding_scale=positive,
    residual_scale=positive,
    logit_scale=positive,
    logit_softcap=st.none() | positive,
)


@settings(deadline=None, max_examples=200)
@given(specs)
def test_round_trip(spec):
    """Through the text of the file, so floats included; equality is to the bit but for the sign of zero."""
    assert spec_from_config(json.loads(format_config(config_from_spec(spec))), spec.dtype) == spec


def test_text_of_version_1():
    assert format_config(config_from_spec(SMALL)) == FIXED
    assert spec_from_config(json.loads(FIXED), "float32") == SMALL


def test_layers_that_rotate_alike_share_an_entry():
    many = ModelSpec(16, 8, 1e-5, 32, False, "float32", SMALL.layers * 40)
    assert len(config_from_spec(many)["ropes"]) == 2


def test_gqa_is_not_stored():
    gqa = LayerSpec(GQASpec(4, 2, 4, 0.5, RopeSpec((1.0, 0.1))), GatedMLPSpec(12))
    with pytest.raises(CheckpointError, match="layer 1"):
        config_from_spec(ModelSpec(16, 8, 1e-5, 32, False, "float32", (SMALL.layers[0], gqa)))


def change(path: str, value: Any) -> dict[str, Any]:
    """SMALL's config with the value at `path` ("layers.1.mlp.bias") set, or removed for `...`."""
    config: Any = json.loads(FIXED)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = config
    for part in parents:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "names"),
    [
        ("format_version", 2, ("format_version 2", "1")),
        ("format_version", "1", ("format_version",)),
        ("format_version", True, ("format_version",)),
        ("format_version", ..., ("format_version",)),
        ("dtype", "bfloat16", ("dtype", "bfloat16", "float32")),
        ("vocab_size", ..., ("missing", "vocab_size")),
        ("vocab_size", "16", ("vocab_size", "int")),
        ("vocab_size", 0, ("vocab_size",)),
        ("norm_eps", -1.0, ("norm_eps",)),
        ("softcap", 30.0, ("unknown", "softcap")),
        ("ropes", {}, ("ropes",)),
        ("ropes.1", 3, ("ropes",)),
        ("ropes.1.layout", "spiral", ("ropes[1].layout", "spiral")),
        ("ropes.1.scale", 0.0, ("layer 1", "scale")),
        ("ropes.1.inv_freq", [1.0], ("layer 1", "inv_freq", "expected 4")),
        ("ropes.1.inv_freq.2", "x", ("ropes[1].inv_freq[2]",)),
        ("ropes.0.twist", 1, ("ropes[0]", "twist")),
        ("layers", [], ("no layers",)),
        ("layers", 3, ("layers",)),
        ("layers.1", [], ("layers",)),
        ("layers.1.attention", 3, ("layers[1].attention",)),
        ("layers.1.attention.kind", "gqa", ("layers[1].attention", "kind", "gqa", "mla")),
        ("layers.1.attention.rope", 2, ("layers[1].attention.rope", "2")),
        ("layers.1.attention.rope", -1, ("layers[1].attention.rope",)),
        ("layers.1.attention.rope", True, ("layers[1].attention.rope",)),
        ("layers.1.attention.kv_lora_rank", ..., ("layers[1].attention", "missing", "kv_lora_rank")),
        ("layers.1.attention.kv_lora_rank", 6.5, ("layers[1].attention.kv_lora_rank",)),
        ("layers.1.attention.kv_lora_rank", 0, ("layer 1", "kv_lora_rank")),
        ("layers.1.attention.rope_groups", 3, ("layer 1", "3 rope groups")),
        ("layers.1.attention.q_lora_rank", 4, ("layer 1", "q_lora_rank")),
        ("layers.1.attention.qk_norm", True, ("layers[1].attention", "unknown", "qk_norm")),
        ("layers.0.attention.qk_rope_head_dim", 3, ("layer 0", "qk_rope_head_dim 3")),
        ("layers.1.attention.softmax_scale", 0, ("layer 1", "softmax_scale")),
        ("layers.1.attention.sliding_window", 0, ("layer 1", "sliding_window")),
        ("layers.1.attention.score_softcap", -1.0, ("layer 1", "score_softcap")),
        ("layers.1.attention.head_norm", True, ("layers[1].attention.head_norm",)),
        ("layers.1.attention.head_norm.eps", ..., ("layers[1].attention.head_norm", "missing", "eps")),
        ("layers.1.attention.head_norm.twist", 1, ("layers[1].attention.head_norm", "unknown", "twist")),
        ("layers.1.attention.head_norm.head_dim", 0, ("layer 1", "head_norm", "head_dim")),
        ("layers.1.attention.head_norm.eps", 0.0, ("layer 1", "head_norm", "eps")),
        ("layers.1.attention.qk_nope_head_dim", 2, ("layer 1", "qk_nope_head_dim", "head_dim")),
        ("layers.1.mlp.kind", "mixture", ("layers[1].mlp", "mixture", "gated, plain, moe")),
        ("layers.1.mlp.bias", 1, ("layers[1].mlp.bias", "bool")),
        ("layers.1.moe", {}, ("layers[1]", "unknown", "moe")),
    ],
)
def test_refused(path, value, names):
    with pytest.raises(CheckpointError) as caught:
        spec_from_config(change(path, value), "float32")
    for name in names:
        assert name in str(caught.value)


MIXTURE = MoESpec(
    num_experts=8, experts_per_token=3, intermediate_size=10, shared_intermediate_size=4, num_groups=4,
    groups_per_token=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"num_experts": 0}, ("num_experts",)),
        ({"num_experts": 9}, ("9 experts", "4 equal groups")),
        ({"experts_per_token": 5}, ("experts_per_token",)),
        ({"groups_per_token": 5}, ("groups_per_token",)),
        ({"groups_per_token": 0}, ("groups_per_token",)),
        ({"intermediate_size": 0}, ("intermediate_size",)),
        ({"shared_intermediate_size": -1}, ("shared_intermediate_size",)),
        ({"shared_intermediate_size": 0, "shared_gate": True}, ("shared_gate",)),
        ({"num_groups": 8, "group_score": "top2_sum", "experts_per_token": 2}, ("group_score",)),
        ({"scale": 0.0}, ("scale",)),
        ({"scoring": "tanh"}, ("layers[0].mlp.scoring", "tanh")),
    ],
)
def test_mixtures_that_make_no_sense(changes, names):
    config = config_from_spec(replace(SMALL, layers=(replace(SMALL.layers[0], mlp=MIXTURE),)))
    assert spec_from_config(config, "float32").layers[0].mlp == MIXTURE
    config["layers"][0]["mlp"] |= changes
    with pytest.raises(CheckpointError) as caught:
        spec_from_config(config, "float32")
    for name in ("0", *names):
        assert name in str(caught.value)


def test_error_names_the_file(tmp_path):
    folder, _ = llama_folder(tmp_path)
    (folder / "config.json").write_text(json.dumps(change("vocab_size", ...)))
    with pytest.raises(CheckpointError, match=r"config\.json: missing keys: vocab_size"):
        open_checkpoint(folder)


def test_example_in_the_documentation():
    page = Path(__file__).resolve().parents[2] / "docs" / "format.md"
    example = json.loads(page.read_text().split("```json\n")[1].split("```")[0])
    assert spec_from_config(example, "bfloat16").layers[0].attention.cache_width == 64
