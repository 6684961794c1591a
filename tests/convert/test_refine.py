"""Refinement: its forward pass against the engine, its closed form against lstsq, and what it promises."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert import conversion, differentiable
from convert.cli import main
from convert.differentiable import mla_attention, mla_heads
from convert.joint import JointOptions, refine_jointly
from convert.methods import exact
from convert.output_fit import fit_output
from convert.pipeline import Precision
from convert.refine import Batch, RefineOptions, held_out_error, refine_layer
from engine.checkpoint import open_checkpoint
from engine.checkpoint.layout import layer_tensors
from engine.model.batch import Batch as TokenBatch
from engine.model.mla import MLAttention
from engine.model.rotary import Rotary
from engine.model.transformer import rope_key
from engine.spec import GatedMLPSpec, GQASpec, HeadNormSpec, LayerSpec, MLASpec, RopeSpec
from tests.convert.sources import make_source, write_text

HIDDEN, LENGTH = 24, 40
SPECS: dict[str, dict[str, Any]] = {
    "as written": {"kv_a_bias": True, "o_bias": True},
    "no nope": {"qk_nope_head_dim": 0, "q_bias": True},
    "no rope": {"qk_rope_head_dim": 0},
    "groups": {"rope_groups": 2, "layout": "half", "scale": 1.2},
    "latent norm": {"latent_norm_eps": 1e-5},
    "head norms": {"head_norm": HeadNormSpec(2, 6, 1e-5), "q_bias": True, "kv_a_bias": True},
    "window": {"sliding_window": 7},
    "cap": {"score_softcap": 3.0},
}


def mla(layout: Any = "interleaved", scale: float = 1.0, **settings: Any) -> MLASpec:
    sizes = {"num_heads": 4, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6}
    sizes |= settings
    pairs = sizes.get("rope_groups", 1) * sizes["qk_rope_head_dim"] // 2
    rope = RopeSpec(tuple(0.7**i for i in range(pairs)), layout, scale)
    return MLASpec(softmax_scale=0.4, rope=rope, **sizes)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(s: MLASpec, seed: int = 0) -> dict[str, Tensor]:
    shapes = layer_tensors(LayerSpec(s, GatedMLPSpec(1)), HIDDEN)
    shapes = {name.removeprefix("self_attn."): shape for name, shape in shapes.items() if name.startswith("self_attn.")}
    return {
        name: 2 * normal(*shape, seed=seed + i) / (shape[-1] ** 0.5 if len(shape) > 1 else 2)
        for i, (name, shape) in enumerate(shapes.items())
    }


def batches(s: MLASpec, tensors: dict[str, Tensor], count: int, seed: int) -> list[Batch]:
    inputs = (normal(3, LENGTH, HIDDEN, seed=seed + i) for i in range(count))
    return [(x, mla_attention(s, tensors, x)) for x in inputs]


@pytest.mark.parametrize("settings", SPECS.values(), ids=SPECS.keys())
def test_the_differentiable_forward_is_the_engines(settings: dict[str, Any]) -> None:
    spec = mla(**settings)
    tensors, x = weights(spec), normal(3, LENGTH, HIDDEN, seed=9)
    batch = TokenBatch.dense(3, LENGTH, 16, x.device)
    cache = torch.zeros(9, 16, spec.cache_width)
    table = Rotary([rope_key(spec)], x.device).tables(batch.positions)[0]
    expected = MLAttention(spec, tensors)(x.flatten(0, 1), batch, cache, table)
    torch.testing.assert_close(mla_attention(spec, tensors, x).flatten(0, 1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", SPECS.values(), ids=SPECS.keys())
def test_heads_in_parts_are_heads_together(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, and gradients of all weights."""
    spec = mla(**settings)
    x = normal(3, LENGTH, HIDDEN, seed=9).double()

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        tensors = {name: t.double().requires_grad_() for name, t in weights(spec).items()}
        out = mla_attention(spec, tensors, x)
        out.square().sum().backward()
        return out.detach(), {name: t.grad for name, t in tensors.items() if t.grad is not None}

    together, gradients = run()
    assert len(gradients) == len(weights(spec))
    for heads in (1, 3):  # of four
        monkeypatch.setattr(
            differentiable, "PART_NUMBERS", heads * 3 * LENGTH * (spec.qk_nope_head_dim + spec.qk_rope_head_dim)
        )
        parts, others = run()
        torch.testing.assert_close(parts, together)
        torch.testing.assert_close(others, gradients)


@pytest.mark.parametrize("o_bias", [True, False])
def test_the_output_projection_is_least_squares(o_bias: bool) -> None:
    spec = mla(o_bias=o_bias)
    tensors = weights(spec)
    text = [(x, y + 0.3 * normal(*y.shape, seed=50)) for x, y in batches(spec, weights(spec, 60), 3, 70)]
    fitted = fit_output(spec, tensors, text)
    heads = torch.cat([mla_heads(spec, tensors, x).flatten(0, 1) for x, _ in text]).double()
    target = torch.cat([y.flatten(0, 1) for _, y in text]).double()
    columns = torch.cat((heads, torch.ones(len(heads), 1, dtype=torch.float64)), 1) if o_bias else heads
    best = (columns @ torch.linalg.lstsq(columns, target).solution - target).square().sum()
    found = torch.cat([mla_attention(spec, fitted, x).flatten(0, 1) for x, _ in text]).double()
    given = torch.cat([mla_attention(spec, tensors, x).flatten(0, 1) for x, _ in text]).double()
    assert best <= (found - target).square().sum() < 1.01 * best < 0.9 * (given - target).square().sum()
    assert {n for n in tensors if not torch.equal(fitted[n], tensors[n])} == {n for n in tensors if "o_proj" in n}


@pytest.mark.parametrize("settings", [SPECS["as written"], SPECS["groups"], SPECS["head norms"]])
def test_refinement_finds_its_way_back(settings: dict[str, Any]) -> None:
    """Weights that were disturbed come nearer to those that made the targets; no argument is changed."""
    spec = mla(**settings)
    true = weights(spec)
    start = {name: t + 0.1 * t.square().mean().sqrt() * normal(*t.shape, seed=80) for name, t in true.items()}
    given = {name: t.clone() for name, t in start.items()}
    fit, held_out = batches(spec, true, 12, 100), batches(spec, true, 2, 200)
    refined, record = refine_layer(spec, start, fit, held_out, RefineOptions(seed=3))
    assert record["error_before"] == pytest.approx(held_out_error(spec, start, held_out))
    assert record["error_after"] == pytest.approx(held_out_error(spec, refined, held_out), rel=1e-4)
    assert record["error_after"] < 0.6 * record["error_before"]
    assert all(torch.equal(given[name], start[name]) for name in start)
    again, same = refine_layer(spec, start, fit, held_out, RefineOptions(seed=3))
    assert same == record
    assert all(torch.equal(again[name], refined[name]) for name in refined)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_layer_is_never_worse_than_it_began(stored: torch.dtype) -> None:
    """Text to fit on that says nothing about the text held out, where the start was exact."""
    spec = mla(o_bias=True)
    true = {name: t.to(stored).float() for name, t in weights(spec).items()}
    held_out = batches(spec, true, 2, 200)
    misleading = [(x, y.flip(0)) for x, y in batches(spec, weights(spec, 60), 3, 100)]
    given = {name: t.to(stored) for name, t in true.items()}
    refined, record = refine_layer(spec, given, misleading, held_out, RefineOptions(min_steps=20))
    assert record["error_after"] == record["error_before"] < 1e-6
    assert record["steps"] == 0
    assert all(torch.equal(refined[name].float(), true[name]) and refined[name].dtype == stored for name in true)


def test_errors_are_of_what_is_stored() -> None:
    spec = mla()
    true = weights(spec)
    start = {name: t.bfloat16() for name, t in true.items()}
    fit, held_out = batches(spec, true, 2, 100), batches(spec, true, 2, 200)
    refined, record = refine_layer(spec, start, fit, held_out, RefineOptions(min_steps=20))
    assert record["error_before"] > 1e-4  # rounding alone
    as_read = {name: t.float() for name, t in refined.items()}
    assert record["error_after"] == pytest.approx(held_out_error(spec, as_read, held_out), rel=1e-4)


def convert(source: Path, out: Path, text: Path, *options: str) -> dict[str, Any]:
    sizes = ["--kv-lora-rank", "8", "--qk-rope-head-dim", "4"]
    arguments = ["--model", str(source), "--out", str(out), "--calibration", str(text), *options]
    assert main([*arguments, *([] if "exact" in options else sizes)]) == 0
    record: dict[str, Any] = json.loads((out / "conversion.json").read_text())
    return record


@pytest.mark.parametrize("method", ["score-aware", "transmla"])
def test_refined_conversions(tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    source, text = make_source(tmp_path / "source"), write_text(tmp_path / "text.txt", 6000)
    bare = convert(source, tmp_path / "bare", text, "--method", method, "--refine", "none")
    assert "layers refined" not in capsys.readouterr().out
    refined = convert(source, tmp_path / "refined", text, "--method", method)
    assert "layers refined" in capsys.readouterr().out
    assert bare["refinement"] is None
    assert len(refined["refinement"]) == 2
    for layer in refined["refinement"]:
        assert set(layer) == {"error_before", "error_after", "learning_rate", "steps"}
        assert layer["error_after"] < layer["error_before"]
    # On text that neither fitted nor chose:
    after, before = (sum(report["quality"]["attention_errors"]) for report in (refined, bare))
    assert after < before
    assert refined["quality"]["kl"] < bare["quality"]["kl"]


def test_exact_is_not_refined(tmp_path: Path) -> None:
    source, text = make_source(tmp_path / "source"), write_text(tmp_path / "text.txt", 3000)
    record = convert(source, tmp_path / "out", text, "--method", "exact", "--refine", "layer")
    assert record["refinement"] is None
    assert record["options"]["refine"] == "none"


def test_joint_refinement(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "RefineOptions", partial(RefineOptions, passes=1, min_steps=20))
    monkeypatch.setattr(conversion, "JointOptions", partial(JointOptions, steps=30))
    source, text = make_source(tmp_path / "source"), write_text(tmp_path / "text.txt", 6000)
    by_layer = convert(source, tmp_path / "layer", text)
    jointly = convert(source, tmp_path / "joint", text, "--refine", "joint", "--dtype", "float32")
    assert "jointly refined: KL" in capsys.readouterr().out
    assert jointly["refinement"] == by_layer["refinement"]
    assert jointly["joint"]["kl_after"] < jointly["joint"]["kl_before"]
    assert jointly["quality"]["kl"] < by_layer["quality"]["kl"]  # on text that neither fitted nor chose
    assert jointly["options"]["refine"] == "joint"


def test_the_joint_forward_is_the_engines(tmp_path: Path) -> None:
    """Exact conversion: the student predicts what the source does, so that the KL is nothing but rounding."""
    source = open_checkpoint(make_source(tmp_path / "source"))
    layers = []
    for i, layer in enumerate(source.spec.layers):
        tensors = source.layer(i)
        own = {n.removeprefix("self_attn."): t for n, t in tensors.items() if n.startswith("self_attn.")}
        assert isinstance(layer.attention, GQASpec)
        mla, made = exact.convert_layer(layer.attention, own)
        mla = dataclasses.replace(
            mla, sliding_window=layer.attention.sliding_window, score_softcap=layer.attention.score_softcap
        )
        rest = {n: t for n, t in tensors.items() if not n.startswith("self_attn.")}
        layers.append(
            (dataclasses.replace(layer, attention=mla), rest | {f"self_attn.{n}": t for n, t in made.items()})
        )
    precision = Precision(torch.device("cpu"), torch.float32)
    windows = [[(7 * i + j) % 256 for j in range(30)] for i in range(4)]
    tensors, record = refine_jointly(source, layers, windows, windows, precision, JointOptions(steps=2))
    assert record["kl_before"] < 1e-6
    assert record["steps"] == 0 or record["kl_after"] < record["kl_before"]
    assert len(tensors) == len(layers)
