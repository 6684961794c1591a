"""Rotary frequencies against `transformers`' own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.checkpoint.rope import read_rope
from engine.errors import CheckpointError

thetas = st.sampled_from([10000.0, 500000.0, 1e6, 10000, 37.5])
factors = st.floats(1.0, 64.0)
lengths = st.integers(64, 32768)
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

kinds = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("default")}),
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": factors}),
    st.fixed_dictionaries({"rope_type": st.just("dynamic"), "factor": st.sampled_from([1.0, 2.0, 4.0, 8.0])}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": factors,
            "low_freq_factor": st.floats(0.5, 2.0),
            "high_freq_factor": st.floats(2.5, 32.0),
            "original_max_position_embeddings": lengths,
        }
    ),
    st.fixed_dictionaries(
        {"rope_type": st.just("yarn"), "factor": factors, "original_max_position_embeddings": lengths},
        optional={
            "attention_factor": st.floats(0.1, 3.0),
            "beta_fast": st.floats(8.0, 64.0),
            "beta_slow": st.floats(0.5, 2.0),
            "mscale": st.floats(0.0, 2.0),
            "mscale_all_dim": st.floats(0.0, 2.0),
            "truncate": st.booleans(),
        },
    ),
)


def oracle(head_dim: int, max_position: int, **rope: Any) -> tuple[list[float], float]:
    config = LlamaConfig(
        head_dim=head_dim, max_position_embeddings=max_position, hidden_size=head_dim, num_attention_heads=1, **rope
    )
    kind = config.rope_parameters["rope_type"]
    function = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    inv_freq, scale = function(config)
    return inv_freq.tolist(), scale


@settings(deadline=None, max_examples=150)
@given(kinds, thetas, st.sampled_from([4, 6, 8, 64, 80, 128]), lengths)
def test_frequencies_equal(kind, theta, head_dim, max_position):
    inv_freq, scale = oracle(head_dim, max_position, rope_parameters={**kind, "rope_theta": theta})
    found = read_rope({"rope_parameters": {**kind, "rope_theta": theta}}, head_dim, max_position)
    assert list(found.inv_freq) == inv_freq
    assert found.scale == pytest.approx(scale, rel=1e-12)
    assert found.layout == "half"
    assert read_rope({"rope_scaling": kind, "rope_theta": theta}, head_dim, max_position) == found


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_theta": 500.0},
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 500},
        {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 8.0, **LLAMA3}},
        {"rope_parameters": {"rope_theta": 77.0}, "rope_theta": 500.0},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1e6},
    ],
)
def test_older_spellings(config):
    inv_freq, scale = oracle(16, 128, **{key: dict(v) if isinstance(v, dict) else v for key, v in config.items()})
    found = read_rope(config, 16, 128)
    assert list(found.inv_freq) == inv_freq
    assert found.scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(
    ("rope", "names"),
    [
        ({"rope_type": "proportional"}, ("proportional", "dynamic, linear, llama3, longrope, yarn")),
        ({"rope_type": "dynamic"}, ("factor",)),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, ("short_factor has 1", "8")),
        ({"rope_type": "made-up"}, ("made-up", "supported")),
        ({"type": "su", "factor": 2.0}, ("su", "supported")),
        ({"rope_type": 3}, ("rope_type", "3")),
        ({"rope_type": "linear"}, ("factor",)),
        ({"rope_type": "linear", "factor": "2"}, ("factor", "float")),
        ({"rope_type": "linear", "factor": 0}, ("factor",)),
        ({"rope_type": "linear", "factor": -1.0}, ("factor",)),
        ({"rope_type": "linear", "factor": 2.0, "twist": 1}, ("twist",)),
        ({"rope_type": "default", "mrope_section": [1, 1, 2]}, ("mrope_section",)),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
        ({"rope_type": "default", "rope_theta": 1.0}, ("rope_theta",)),
        ({"rope_type": "default", "rope_theta": "big"}, ("rope_theta",)),
        ({"rope_type": "llama3", "factor": 8.0}, ("low_freq_factor",)),
        ({"rope_type": "llama3", "factor": 8.0, **LLAMA3, "high_freq_factor": 1.0}, ("low_freq_factor",)),
        ({"full_attention": {"rope_type": "default"}, "sliding_attention": {}}, ("attention",)),
        ([1], ("object",)),
        ("linear", ("object",)),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_refused(rope, names, key):
    with pytest.raises(CheckpointError) as caught:
        read_rope({key: rope}, 16, 128)
    for name in names:
        assert name in str(caught.value)


def test_partial_rotary_factor_at_the_top():
    with pytest.raises(CheckpointError, match="partial_rotary_factor"):
        read_rope({"partial_rotary_factor": 0.25}, 16, 128)
    assert read_rope({"partial_rotary_factor": 1.0}, 16, 128) == read_rope({}, 16, 128)
