"""What methods see of a layer with normalised queries and keys, and how their maps are put after the norms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert.linear_view import linear_view
from convert.statistics import collect
from engine.checkpoint import open_checkpoint
from engine.spec import GQASpec, HeadNormSpec, MLASpec, RopeSpec
from tests.convert.sources import APART, make_source, oracle
from tests.model.test_mla_definition import attention

HEADS, KV_HEADS, DIM, HIDDEN = 4, 2, 6, 10
SOURCE = GQASpec(HEADS, KV_HEADS, DIM, 0.7, RopeSpec((1.0, 0.3, 0.1)), True, True, 1e-3, 5, 2.0)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def source_tensors() -> dict[str, Tensor]:
    rows = {"q": HEADS * DIM, "k": KV_HEADS * DIM, "v": KV_HEADS * DIM}
    out = {f"{n}_proj.weight": normal(r, HIDDEN, seed=i) for i, (n, r) in enumerate(rows.items())}
    out |= {f"{n}_proj.bias": normal(r, seed=5 + i) for i, (n, r) in enumerate(rows.items())}
    out |= {f"{n}_norm.weight": 1 + 0.3 * normal(DIM, seed=10 + i) for i, n in enumerate("qk")}
    return out | {"o_proj.weight": normal(HIDDEN, HEADS * DIM, seed=20), "o_proj.bias": normal(HIDDEN, seed=21)}


@pytest.mark.parametrize(("nope", "rope"), [(DIM, 4), (4, 2), (0, 4), (4, 0)])
def test_maps_after_the_norms_are_the_layer_over_normed_inputs(nope: int, rope: int) -> None:
    """A layer as a method makes it, over [q; k; v], gives what the finished one gives over the hidden state."""
    tensors, x = source_tensors(), normal(9, HIDDEN, seed=30)
    view = linear_view(SOURCE, tensors)
    (u,) = view.inputs([x])
    inv_freq = (1.0, 0.2)[: rope // 2]
    made_spec = MLASpec(HEADS, 7, nope, rope, DIM, 0.7, RopeSpec(inv_freq, "interleaved"), kv_a_bias=True, o_bias=True)
    maps = normal(HEADS, nope + rope, DIM, seed=40)
    q_proj = torch.zeros(HEADS, nope + rope, len(u[0]), dtype=torch.float64)
    for h in range(HEADS):  # a map of the head's own query, as every method makes it
        q_proj[h] = maps[h] @ view.tensors["q_proj.weight"][h * DIM : (h + 1) * DIM]
    kv = torch.cat((view.tensors["k_proj.weight"], view.tensors["v_proj.weight"]))
    made = {
        "q_proj.weight": q_proj.flatten(0, 1),
        "kv_a_proj_with_mqa.weight": normal(7 + rope, 2 * KV_HEADS * DIM, seed=41) @ kv,
        "kv_a_proj_with_mqa.bias": normal(7 + rope, seed=42),
        "kv_b_proj.weight": normal(HEADS * (nope + DIM), 7, seed=43),
        "o_proj.weight": view.tensors["o_proj.weight"],
        "o_proj.bias": view.tensors["o_proj.bias"],
    }
    spec, out = view.finish(made_spec, made)
    assert spec.head_norm == HeadNormSpec(KV_HEADS, DIM, 1e-3)
    assert (spec.sliding_window, spec.score_softcap, spec.q_bias) == (5, 2.0, True)
    assert spec.qk_nope_head_dim == (DIM if nope else 0)
    limited = replace(made_spec, sliding_window=5, score_softcap=2.0)
    torch.testing.assert_close(attention(spec, x, out), attention(limited, u, made))


def test_a_layer_without_norms_is_seen_as_it_is() -> None:
    plain = replace(SOURCE, qk_norm_eps=None)
    tensors, parts = source_tensors(), [normal(3, HIDDEN, seed=1)]
    view = linear_view(plain, tensors)
    assert view.spec is plain
    assert view.tensors is tensors
    assert view.inputs(parts) is parts
    mla = MLASpec(HEADS, 7, 6, 4, 6, 0.7, RopeSpec((1.0, 0.2), "interleaved"))
    assert view.finish(mla, {}) == (replace(mla, sliding_window=5, score_softcap=2.0), {})


@pytest.mark.parametrize("config", [APART["qwen3"], APART["qwen3, biases and a window"]], ids=["plain", "biases"])
@torch.inference_mode()
def test_statistics_are_of_normed_keys(tmp_path: Path, config: dict[str, Any]) -> None:
    """Against what `transformers`' k_norm and v_proj put out in the first layer."""
    source = make_source(tmp_path, **config)
    seen: dict[str, Tensor] = {}
    model, checkpoint = oracle(source, torch.float64), open_checkpoint(source)
    first = model.model.layers[0]
    for name in ("k_norm", "v_proj"):
        module = getattr(first.self_attn, name)
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.update({name: output[0].flatten(1)}))
    first.input_layernorm.register_forward_hook(lambda _m, _i, output: seen.update(x=output[0]))
    model(torch.randint(0, 260, (1, 40), generator=torch.Generator().manual_seed(5)))
    spec = checkpoint.spec.layers[0].attention
    assert isinstance(spec, GQASpec)
    stored = checkpoint.layer(0)
    tensors = {n.removeprefix("self_attn."): stored[n].double() for n in stored if n.startswith("self_attn.")}
    view = linear_view(spec, tensors)
    found = collect(view.spec, view.tensors, view.inputs([seen["x"][None]])).kv_moment
    kv = torch.cat((seen["k_norm"], seen["v_proj"]), 1)
    torch.testing.assert_close(found, kv.T @ kv / len(kv))
