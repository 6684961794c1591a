"""MHA2MLA: its choices and its layer as published, step by step, and what it writes, on the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert.cli import main
from convert.errors import ConversionError
from convert.methods.mha2mla import (
    PARTIAL_ROPE,
    SVD,
    MHA2MLAOptions,
    PairNorms,
    choose_pairs,
    collect_pair_norms,
    convert_layer,
    factor,
)
from engine.spec import GQASpec, RopeSpec
from tests.conftest import shared
from tests.convert.engine_runs import assert_engine_is_plain, decode_logits, prefill_logits
from tests.convert.plain_mla import rotate
from tests.convert.sources import APART, make_source, oracle, write_text

HIDDEN = 40


def gqa(heads: int = 4, kv_heads: int = 2, dim: int = 12, bias: bool = False, **rope: Any) -> GQASpec:
    inv_freq = tuple(50.0 ** (-2 * j / dim) for j in range(dim // 2))
    return GQASpec(heads, kv_heads, dim, 0.3, RopeSpec(inv_freq, **rope), bias, False)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_tensors(spec: GQASpec) -> dict[str, Tensor]:
    heads = {"q": spec.num_heads, "k": spec.num_kv_heads, "v": spec.num_kv_heads}
    out = {f"{n}_proj.weight": normal(h * spec.head_dim, HIDDEN, seed=i) / HIDDEN**0.5
           for i, (n, h) in enumerate(heads.items())}  # fmt: skip
    out["o_proj.weight"] = normal(HIDDEN, spec.num_heads * spec.head_dim, seed=3)
    if spec.qkv_bias:
        out |= {f"{n}_proj.bias": normal(h * spec.head_dim, seed=5 + i) for i, (n, h) in enumerate(heads.items())}
    return out


def published_mask(dim: int, rope_dim: int, version: str) -> Tensor:
    """Of the channels of a head, half-split, as the published code marks those that keep RoPE."""
    mask, half = torch.zeros(dim, dtype=torch.bool), rope_dim // 2
    if version == "high":
        mask[:half] = mask[dim // 2 : dim // 2 + half] = True
    elif version == "low":
        mask[dim - half :] = mask[dim // 2 - half : dim // 2] = True
    else:
        mask[0 : dim : dim // rope_dim] = True
    return mask


@pytest.mark.parametrize("rope_dim", [2, 4, 8, 16])
@pytest.mark.parametrize("version", ["high", "low", "uniform"])
def test_pairs_as_published(version: str, rope_dim: int) -> None:
    spec = gqa(dim=16)
    pairs = choose_pairs(spec, MHA2MLAOptions(8, rope_dim, version, "joint"), None)
    assert pairs.shape == (2, rope_dim // 2)
    marked = published_mask(16, rope_dim, version).nonzero().flatten().tolist()
    for own in pairs.tolist():
        assert sorted(own + [pair + 8 for pair in own]) == marked


def test_the_longest_pairs_of_each_kv_head() -> None:
    """2-norm: mean |q_j| * mean |k_j|, summed over the query heads of a group."""
    query = torch.tensor([[1.0, 5, 1, 1], [1, 1, 3, 1], [9, 1, 1, 1], [1, 1, 1, 2]])
    key = torch.tensor([[1.0, 1, 2, 1], [0.1, 1, 1, 4]])
    # sums over groups: (2, 6, 8, 2) and (1, 2, 2, 12)
    spec = gqa(dim=8)
    norms = PairNorms(query.double(), key.double())
    assert choose_pairs(spec, MHA2MLAOptions(8, 4, "2-norm", "joint"), norms).tolist() == [[1, 2], [1, 3]]
    assert choose_pairs(spec, MHA2MLAOptions(8, 2, "2-norm", "joint"), norms).tolist() == [[2], [3]]


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_pair_norms(layout: Any) -> None:
    spec = gqa(bias=True, layout=layout)
    tensors, x = layer_tensors(spec), normal(3, 7, HIDDEN, seed=20)
    norms = collect_pair_norms(spec, tensors, [x[:2], x[2:]])
    for name, found in (("q", norms.query), ("k", norms.key)):
        heads = (x.flatten(0, 1) @ tensors[f"{name}_proj.weight"].T + tensors[f"{name}_proj.bias"]).unflatten(
            1, (-1, 12)
        )
        for pair in range(6):
            channels = [pair, pair + 6] if layout == "half" else [2 * pair, 2 * pair + 1]
            torch.testing.assert_close(found[:, pair], heads[:, :, channels].norm(dim=2).mean(0))


def test_factors_are_truncated_svds() -> None:
    keys, values = normal(10, HIDDEN, seed=0), normal(14, HIDDEN, seed=1)
    down, up = factor(keys, values, 9, "joint")
    left = torch.linalg.svdvals(torch.cat((keys, values)))[9:]
    torch.testing.assert_close((torch.cat((keys, values)) - up @ down).norm(), left.norm())  # Eckart-Young
    down, up = factor(keys, values, 9, "split")
    assert (down.shape, up.shape) == ((9, HIDDEN), (24, 9))
    for part, rows, rank in ((keys, slice(10), 4), (values, slice(10, None), 5)):
        torch.testing.assert_close((part - up[rows] @ down).norm(), torch.linalg.svdvals(part)[rank:].norm())
    down, up = factor(keys[:2], values, 9, "split")  # the keys have no use for half
    torch.testing.assert_close(up[:2] @ down, keys[:2])
    torch.testing.assert_close((values - up[2:] @ down).norm(), torch.linalg.svdvals(values)[7:].norm())
    down, up = factor(keys, values[:2], 9, "split")
    torch.testing.assert_close(up[10:] @ down, values[:2])
    torch.testing.assert_close((keys - up[:10] @ down).norm(), torch.linalg.svdvals(keys)[7:].norm())


def published_attention(
    spec: GQASpec, tensors: dict[str, Tensor], kept: Tensor, rank: int, svd: str, x: Tensor
) -> Tensor:
    """The patched model's attention, as it computes: kept [g, D/2] marks pairs; full keys and values for every head."""
    g, d, layout = spec.num_kv_heads, spec.head_dim, spec.rope.layout
    mask = torch.cat((kept, kept), 1) if layout == "half" else kept.repeat_interleave(2, 1)  # [g, D]
    q, k = (x @ tensors[f"{n}_proj.weight"].T + tensors.get(f"{n}_proj.bias", 0.0) for n in "qk")
    dropped = ~mask.flatten()
    weights = tensors["k_proj.weight"][dropped], tensors["v_proj.weight"]
    biases = tensors.get("k_proj.bias", torch.zeros(g * d))[dropped], tensors.get("v_proj.bias", torch.zeros(g * d))

    def truncated(weight: Tensor, count: int) -> Tensor:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :count] * s[:count] @ v[:count]

    if svd == "joint":
        both = truncated(torch.cat(weights), rank).split([len(w) for w in weights])
    else:
        both = tuple(truncated(w, count) for w, count in zip(weights, (rank // 2, rank - rank // 2), strict=True))
    k_c, v = (x @ w.T + b for w, b in zip(both, biases, strict=True))
    k = k.masked_scatter(dropped.expand_as(k), k_c)
    outputs = []
    for h in range(spec.num_heads):
        own = h * g // spec.num_heads
        m = mask[own]
        turn = (torch.tensor(spec.rope.inv_freq, dtype=torch.float64)[kept[own]], layout, spec.rope.scale)
        query, key = q[:, h * d : (h + 1) * d], k[:, own * d : (own + 1) * d]
        # RoPE's amplitude is part of every score of the source, rotated or not.
        scores = rotate(query[:, m], *turn) @ rotate(key[:, m], *turn).T
        scores = scores + query[:, ~m] @ key[:, ~m].T * spec.rope.scale**2
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        a = (scores * spec.softmax_scale).masked_fill(future, float("-inf")).softmax(-1)
        outputs.append(a @ v[:, own * d : (own + 1) * d])
    return torch.cat(outputs, 1) @ tensors["o_proj.weight"].T


def converted_attention(mla: Any, made: dict[str, Tensor], x: Tensor) -> Tensor:
    """The MLA layer by its definition (docs/format.md)."""
    n, dr, r, groups = mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.kv_lora_rank, mla.rope_groups

    def linear(name: str, y: Tensor) -> Tensor:
        return y @ made[f"{name}.weight"].double().T + made.get(f"{name}.bias", torch.zeros(())).double()

    q, row = linear("q_proj", x).unflatten(1, (mla.num_heads, -1)), linear("kv_a_proj_with_mqa", x)
    up = (row[:, :r] @ made["kv_b_proj.weight"].double().T).unflatten(1, (mla.num_heads, -1))
    inv_freq = torch.tensor(mla.rope.inv_freq, dtype=torch.float64).view(groups, -1)
    k_rope, outputs = row[:, r:].unflatten(1, (groups, dr)), []
    for h in range(mla.num_heads):
        group = h * groups // mla.num_heads
        turn = (inv_freq[group], mla.rope.layout, mla.rope.scale)
        scores = q[:, h, :n] @ up[:, h, :n].T + rotate(q[:, h, n:], *turn) @ rotate(k_rope[:, group], *turn).T
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        outputs.append((scores * mla.softmax_scale).masked_fill(future, float("-inf")).softmax(-1) @ up[:, h, n:])
    return linear("o_proj", torch.cat(outputs, 1))


@pytest.mark.parametrize("svd", SVD)
@pytest.mark.parametrize("version", PARTIAL_ROPE)
@pytest.mark.parametrize(
    "case", [{}, {"bias": True, "layout": "interleaved", "scale": 1.3}, {"heads": 3, "kv_heads": 1}],
    ids=["gqa", "biases, interleaved, scaled", "mqa"],
)  # fmt: skip
def test_the_layer_is_the_published_one(case: dict[str, Any], version: str, svd: str) -> None:
    spec = gqa(**case)
    tensors, x = layer_tensors(spec), normal(15, HIDDEN, seed=21)
    options = MHA2MLAOptions(11, 4, version, svd)
    norms = collect_pair_norms(spec, tensors, [x])
    mla, made = convert_layer(spec, tensors, norms, options)
    kept = torch.zeros(spec.num_kv_heads, 6, dtype=torch.bool).scatter(1, choose_pairs(spec, options, norms), True)
    assert mla.cache_width == 11 + spec.num_kv_heads * 4
    expected = published_attention(spec, tensors, kept, 11, svd, x)
    torch.testing.assert_close(converted_attention(mla, made, x), expected)


def mha2mla(source: Path, out: Path, *options: str) -> Path:
    text = write_text(out.parent / "calibration.txt", 6000)
    arguments = ["--model", str(source), "--out", str(out), "--method", "mha2mla", "--calibration", str(text)]
    assert main([*arguments, "--calibration-tokens", "1024", *options]) == 0
    return out


ENGINE_CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "by itself": ({}, ["--cache-ratio", "0.5"]),
    "2-norm, qwen2": ({"family": "qwen2"}, ["--cache-ratio", "0.4", "--partial-rope", "2-norm", "--svd", "split"]),
    "mha, bf16": ({"num_key_value_heads": 4, "dtype": torch.bfloat16}, ["--cache-ratio", "0.4", "--svd", "joint"]),
    "mqa, no nope": ({"num_key_value_heads": 1}, ["--kv-lora-rank", "7", "--qk-rope-head-dim", "12"]),
    "gemma2": (APART["gemma2"], ["--cache-ratio", "0.5", "--partial-rope", "2-norm", "--svd", "joint"]),
}  # fmt: skip


@pytest.mark.parametrize(("config", "options"), ENGINE_CASES.values(), ids=ENGINE_CASES.keys())
def test_engine_against_plain_definition(tmp_path: Path, config: dict[str, Any], options: list[str]) -> None:
    out = mha2mla(make_source(tmp_path / "source", **config), tmp_path / "out", *options)
    ids = torch.randint(0, 260, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    assert_engine_is_plain(out, ids)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_lossless_with_rope_on_every_channel(tmp_path: Path, family: str) -> None:
    """And a rank that all values fit in. Qwen2's biases pass through as well."""
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    source = make_source(tmp_path / "source", family=family, rope_parameters=yarn)
    out = mha2mla(source, tmp_path / "out", "--kv-lora-rank", "24", "--qk-rope-head-dim", "12")
    ids = torch.randint(0, 260, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.inference_mode():
        expected = oracle(source)(torch.tensor([ids])).logits[0]
    for logits in (prefill_logits(out, ids), decode_logits(out, ids)):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("dr", "rank", "message"),
    [
        (5, 8, "--qk-rope-head-dim 5 does not fit heads of 12 channels"),
        (14, 8, "between 2 and 12"),
        (0, 8, "--qk-rope-head-dim 0"),
        (4, 1, "--kv-lora-rank 1 is out of range"),
        (4, 41, "between 2 and 40"),
    ],
)
def test_options_that_do_not_fit(dr: int, rank: int, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        convert_layer(gqa(), {}, None, MHA2MLAOptions(rank, dr, "high", "joint"))


def test_quality_on_a_trained_model(tmp_path: Path) -> None:
    """The fastest pairs are what this model wants rotated: the slowest lose nearly all of it."""
    text = shared("data/tinystories/tinystories_197k.txt")
    kl = {}
    for rope in ("high", "low"):
        arguments = [
            "--model",
            str(shared("models/tinystories-gqa64")),
            "--out",
            str(tmp_path / rope),
            "--method",
            "mha2mla",
        ]
        sizes = [
            "--kv-lora-rank",
            "64",
            "--qk-rope-head-dim",
            "32",
            "--partial-rope",
            rope,
            "--svd",
            "joint",
            "--refine",
            "none",
        ]
        assert main([*arguments, *sizes, "--calibration", str(text), "--calibration-tokens", "1024"]) == 0
        kl[rope] = json.loads((tmp_path / rope / "conversion.json").read_text())["quality"]["kl"]
    assert 0.03 < kl["high"] < 0.1
    assert kl["low"] > 1
