"""Score-aware conversion: each step against a formulation of its own, and what it writes, on the engine."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert import attention_statistics
from convert.attention_statistics import AttentionStatistics, collect_attention
from convert.cli import main
from convert.errors import ConversionError
from convert.methods import low_rank
from convert.methods.low_rank import joint_low_rank, loss
from convert.methods.score_aware import (
    ScoreAwareOptions,
    balance,
    check_options,
    choose,
    convert_layer,
    key_map,
    query_map,
    rope_cost,
)
from engine.spec import GQASpec, MLASpec, RopeSpec
from tests.conftest import shared
from tests.convert.engine_runs import assert_engine_is_plain, decode_logits, prefill_logits
from tests.convert.plain_mla import rotate
from tests.convert.sources import APART, make_source, oracle, write_text

HIDDEN, LENGTH = 20, 12
CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "biases": {"bias": True},
    "interleaved, scaled": {"layout": "interleaved", "scale": 1.3},
    "mha": {"heads": 3, "kv_heads": 3},
    "mqa, 5 pairs": {"heads": 3, "kv_heads": 1, "dim": 10},
    "a window": {"window": 5},
    "a window, capped, biases": {"window": 4, "cap": 1.5, "bias": True},
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def gqa(
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    bias: bool = False,
    layout: Any = "half",
    scale: float = 1.0,
    window: int | None = None,
    cap: float | None = None,
) -> GQASpec:
    rope = RopeSpec(tuple(50.0 ** (-2 * j / dim) for j in range(dim // 2)), layout, scale)
    limits = {"sliding_window": window, "score_softcap": cap}
    return GQASpec(heads, kv_heads, dim, 1.7 * dim**-0.5, rope, bias, bias, **limits)  # type: ignore[arg-type]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_tensors(spec: GQASpec, hidden: int = HIDDEN) -> dict[str, Tensor]:
    rows = {"q": spec.num_heads, "k": spec.num_kv_heads, "v": spec.num_kv_heads}
    out = {f"{n}_proj.weight": normal(r * spec.head_dim, hidden, seed=i) / hidden**0.5
           for i, (n, r) in enumerate(rows.items())}  # fmt: skip
    out["o_proj.weight"] = normal(hidden, spec.num_heads * spec.head_dim, seed=3)
    if spec.qkv_bias:
        out |= {f"{n}_proj.bias": normal(r * spec.head_dim, seed=5 + i) for i, (n, r) in enumerate(rows.items())}
        out["o_proj.bias"] = normal(hidden, seed=9)
    return out


def inputs(count: int = 3, hidden: int = HIDDEN) -> Tensor:
    return normal(count, LENGTH, hidden, seed=20) + normal(hidden, seed=21)


def projected(spec: GQASpec, tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, hidden] -> q [H, T, D], k [g, T, D], v [g, T, D]."""
    q, k, v = (x @ tensors[f"{n}_proj.weight"].T + tensors.get(f"{n}_proj.bias", 0.0) for n in "qkv")
    q, k, v = (y.unflatten(1, (-1, spec.head_dim)).transpose(0, 1) for y in (q, k, v))
    return q, k, v


def rotated(spec: GQASpec, x: Tensor) -> Tensor:
    return rotate(x, torch.tensor(spec.rope.inv_freq, dtype=torch.float64), spec.rope.layout, spec.rope.scale)


def as_pairs(spec: GQASpec, x: Tensor) -> Tensor:
    re, im = x.chunk(2, -1) if spec.rope.layout == "half" else x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.complex(re, im)


def causal_softmax(scores: Tensor, spec: GQASpec) -> Tensor:
    """In the spec's window and under its cap."""
    seen = torch.ones_like(scores, dtype=torch.bool).tril().triu(1 - (spec.sliding_window or len(scores)))
    if spec.score_softcap is not None:
        scores = spec.score_softcap * (scores / spec.score_softcap).tanh()
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def direct_statistics(spec: GQASpec, tensors: dict[str, Tensor], windows: Tensor) -> AttentionStatistics:
    """The definitions, one head, query and key at a time."""
    heads, d, width = spec.num_heads, spec.head_dim, spec.cache_width
    tokens = windows.shape[0] * windows.shape[1]
    query, mixed = torch.zeros(heads, d, d, dtype=torch.float64), torch.zeros(heads, tokens, width, dtype=torch.float64)
    first, second, total = torch.zeros(width).double(), torch.zeros(width, width).double(), 0.0
    turned = torch.zeros(heads, d // 2, dtype=torch.complex128)
    evenly, pairs, heads_total = torch.zeros_like(turned), 0, torch.zeros(heads, 1, dtype=torch.float64)
    freq = torch.tensor(spec.rope.inv_freq, dtype=torch.float64)
    for i, x in enumerate(windows):
        q, k, v = projected(spec, tensors, x)
        kv = torch.cat((k.transpose(0, 1).flatten(1), v.transpose(0, 1).flatten(1)), 1)
        for h in range(heads):
            g = h * spec.num_kv_heads // heads
            w_o = tensors["o_proj.weight"][:, h * d : (h + 1) * d]
            scores = rotated(spec, q[h]) @ rotated(spec, k[g]).T * spec.softmax_scale
            a = causal_softmax(scores, spec)
            slope = 1 - (scores / spec.score_softcap).tanh() ** 2 if spec.score_softcap else torch.ones_like(scores)
            for t in range(LENGTH):
                mixed[h, i * LENGTH + t] = a[t] @ kv
                for s in range(t + 1):
                    w = (slope[t, s] * a[t, s] * (w_o @ (v[g, s] - a[t] @ v[g]))).pow(2).sum()
                    query[h] += w * torch.outer(q[h, t], q[h, t])
                    first, second = first + w * kv[s], second + w * torch.outer(kv[s], kv[s])
                    total += float(w)
                    if t - s < (spec.sliding_window or LENGTH):
                        turn = torch.exp(1j * freq * (t - s))
                        turned[h], evenly[h] = turned[h] + w * turn, evenly[h] + turn
                        heads_total[h], pairs = heads_total[h] + w, pairs + 1
    flat = mixed.flatten(0, 1)
    rotation = 0.9 * turned / heads_total + 0.1 * evenly / (pairs / heads)
    return AttentionStatistics(
        tokens, query / tokens, first / total, second / total, mixed.mean(1), flat.T @ flat / len(flat), rotation
    )


@cases
@pytest.mark.parametrize("block", [1, 200, 1 << 24])
def test_statistics_are_their_definitions(case: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_statistics, "BLOCK_ELEMENTS", block)
    spec = gqa(**case)
    tensors, windows = layer_tensors(spec), inputs()
    expected = direct_statistics(spec, tensors, windows)
    found = collect_attention(spec, tensors, [windows[:2], windows[2:]])
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), value, rtol=2e-5, atol=2e-5)  # the rotations are fp32


def test_statistics_refuse_what_is_not_finite() -> None:
    spec = gqa()
    tensors = layer_tensors(spec) | {"k_proj.weight": torch.full((16, HIDDEN), float("nan"), dtype=torch.float64)}
    with pytest.raises(ConversionError, match="not finite"):
        collect_attention(spec, tensors, [inputs()])


@cases
def test_balanced_components_give_the_sources_scores(case: dict[str, Any]) -> None:
    """All of them, rotated at their own frequencies, in one key that every head shares."""
    spec = gqa(**case)
    tensors, x = layer_tensors(spec), inputs()[0]
    learnt, width = collect_attention(spec, tensors, [inputs()]), spec.num_kv_heads * spec.head_dim
    components = balance(spec, learnt.query_moment, learnt.kv_moment[:width, :width])
    every = torch.arange(width // 2)
    q, k, _ = projected(spec, tensors, x)
    keys = k.transpose(0, 1).flatten(1) @ key_map(spec, components, every).T
    freq = torch.tensor(spec.rope.inv_freq, dtype=torch.float64)[every // spec.num_kv_heads]
    for h, queries in enumerate(query_map(spec, components, every, None)):
        found = rotate(q[h] @ queries.T, freq, "interleaved", spec.rope.scale)
        found = found @ rotate(keys, freq, "interleaved", spec.rope.scale).T
        expected = rotated(spec, q[h]) @ rotated(spec, k[h * spec.num_kv_heads // spec.num_heads]).T
        torch.testing.assert_close(found, expected)


def moments(rows: Tensor) -> Tensor:
    return rows.mT @ rows / rows.shape[-2]


@cases
def test_energies_and_costs_are_those_of_the_components(case: dict[str, Any]) -> None:
    """Of queries and keys that know nothing of each other: sum_h E|q'|^2 E|k'|^2, and of that what rho leaves over."""
    spec = gqa(**case)
    groups, pairs_each = spec.num_kv_heads, spec.head_dim // 2
    q, k = normal(spec.num_heads, 50, spec.head_dim, seed=1), normal(50, groups * spec.head_dim, seed=2)
    rho = torch.polar(normal(spec.num_heads, pairs_each, seed=3).sigmoid(), normal(spec.num_heads, pairs_each, seed=4))
    components = balance(spec, moments(q), moments(k))
    cost = rope_cost(spec, components, moments(q), rho)
    every = torch.arange(groups * pairs_each)
    keys = torch.view_as_complex((k @ key_map(spec, components, every).T).unflatten(1, (-1, 2)))
    energy, lost = torch.zeros(2, len(every), dtype=torch.float64)
    for h, queries in enumerate(query_map(spec, components, every, None)):
        made = torch.view_as_complex((q[h] @ queries.T).unflatten(1, (-1, 2)))
        own = made.abs().pow(2).mean(0) * keys.abs().pow(2).mean(0)
        energy += own
        lost += own * (1 - rho[h, every // groups].abs() ** 2)
    torch.testing.assert_close(components.energy.flatten(), energy)
    torch.testing.assert_close(cost.flatten(), lost)
    for f in range(pairs_each):  # components of one frequency are uncorrelated
        own = keys[:, f * groups : (f + 1) * groups]
        covariance = own.mH @ own / 50
        torch.testing.assert_close(covariance, covariance.diagonal().real.diag().to(covariance))


def test_the_dearest_keep_rope() -> None:
    cost = torch.tensor([[5.0, 1.0], [2.0, 3.0], [4.0, 4.0]])
    rope, nope = choose(cost, 4)
    assert (rope.tolist(), nope.tolist()) == ([0, 3, 4, 5], [1, 2])


def random_moment(size: int, seed: int) -> Tensor:
    return moments(normal(3 * size, size, seed=seed) @ normal(size, size, seed=seed + 1))


def test_low_rank_of_one_moment_is_pca() -> None:
    moment = random_moment(14, 0)
    encode, decode = joint_low_rank(moment, moment, 6, 5)
    found = loss(encode, decode, moment, moment, 6)
    torch.testing.assert_close(found, torch.linalg.eigvalsh(moment)[:-5].sum())
    torch.testing.assert_close(decode.T @ decode, torch.eye(5, dtype=torch.float64))


def test_low_rank_of_unrelated_keys_and_values_shares_the_rank_out() -> None:
    key, value = (torch.zeros(14, 14, dtype=torch.float64) for _ in range(2))
    key[:6, :6], value[6:, 6:] = random_moment(6, 1), random_moment(8, 2) * 3
    encode, decode = joint_low_rank(key, value, 6, 5)
    torch.testing.assert_close(loss(encode, decode, key, value, 6), torch.linalg.eigvalsh(key + value)[:-5].sum())


@pytest.mark.parametrize("rank", [1, 5, 13])
def test_low_rank_is_a_minimum(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    key, value = random_moment(14, 3), random_moment(14, 4)
    losses = []
    for steps in (0, 1, 2, 10, 600):
        monkeypatch.setattr(low_rank, "STEPS", steps)
        maps = joint_low_rank(key, value, 6, rank)
        losses.append(float(loss(*maps, key, value, 6)))
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(losses))
    maps = tuple(m.clone().requires_grad_() for m in maps)
    loss(*maps, key, value, 6).backward()  # type: ignore[no-untyped-call]
    assert all(m.grad is not None and m.grad.abs().max() < 1e-3 * losses[-1] for m in maps)


def mla_attention(spec: MLASpec, tensors: dict[str, Tensor], x: Tensor, source: GQASpec) -> Tensor:
    """The plain definition: [T, hidden] -> [T, hidden], no cache, no absorption; in the source's window and cap."""
    n, rank = spec.qk_nope_head_dim, spec.kv_lora_rank
    q = (x @ tensors["q_proj.weight"].T + tensors.get("q_proj.bias", 0.0)).unflatten(1, (spec.num_heads, -1))
    row = x @ tensors["kv_a_proj_with_mqa.weight"].T + tensors["kv_a_proj_with_mqa.bias"]
    up = (row[:, :rank] @ tensors["kv_b_proj.weight"].T).unflatten(1, (spec.num_heads, -1))
    freq = torch.tensor(spec.rope.inv_freq, dtype=torch.float64)
    turn = (freq, spec.rope.layout, spec.rope.scale)
    out = []
    for h in range(spec.num_heads):
        scores = rotate(q[:, h, n:], *turn) @ rotate(row[:, rank:], *turn).T + q[:, h, :n] @ up[:, h, :n].T
        out.append(causal_softmax(scores * spec.softmax_scale, source) @ up[:, h, n:])
    return torch.cat(out, 1) @ tensors["o_proj.weight"].T + tensors["o_proj.bias"]


def gqa_attention(
    spec: GQASpec, tensors: dict[str, Tensor], x: Tensor, learnt: AttentionStatistics, count: int
) -> Tensor:
    """The source's attention, but that all but `count` components of its keys get the constant rho for a rotation."""
    q, k, v = projected(spec, tensors, x)
    groups, width = spec.num_kv_heads, spec.num_kv_heads * spec.head_dim
    components = balance(spec, learnt.query_moment, learnt.kv_moment[:width, :width])
    rope, nope = choose(rope_cost(spec, components, learnt.query_moment, learnt.rotation), count)
    freq = torch.tensor(spec.rope.inv_freq, dtype=torch.float64)
    distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
    qc, kc = as_pairs(spec, q), as_pairs(spec, k)  # [H, T, F], [g, T, F]
    out = []
    for h in range(spec.num_heads):
        scores = torch.zeros(len(x), len(x), dtype=torch.float64)
        for number in torch.cat((rope, nope)).tolist():
            f, c = divmod(number, groups)
            made = components.query[f, c, h * groups // spec.num_heads] * qc[h, :, f]
            key = (components.key[f, c][:, None] * kc[:, :, f]).sum(0)
            turn = torch.exp(1j * freq[f] * distance) if number in rope.tolist() else learnt.rotation[h, f]
            scores += (made[:, None] * key.conj() * turn).real
        a = causal_softmax(scores * spec.softmax_scale * spec.rope.scale**2, spec)
        out.append(a @ v[h * groups // spec.num_heads])
    return torch.cat(out, 1) @ tensors["o_proj.weight"].T + tensors.get("o_proj.bias", 0.0)


@cases
@pytest.mark.parametrize("every", [False, True])
def test_full_rank_is_its_plain_definition(case: dict[str, Any], every: bool) -> None:
    spec = gqa(**case)
    tensors, x = layer_tensors(spec), inputs()[0]
    learnt, width = collect_attention(spec, tensors, [inputs()]), spec.num_kv_heads * spec.head_dim
    rope = width if every else 4
    mla, made = convert_layer(spec, tensors, learnt, ScoreAwareOptions(2 * width - rope, rope))
    expected = gqa_attention(spec, tensors, x, learnt, rope // 2)
    torch.testing.assert_close(mla_attention(mla, made, x, spec), expected, rtol=1e-6, atol=1e-6)


def test_centring_is_exact() -> None:
    """Whatever means are taken off, they come back."""
    spec = gqa(bias=True)
    tensors, x = layer_tensors(spec), inputs()[0]
    learnt = collect_attention(spec, tensors, [inputs()])
    moved = replace(learnt, kv_mean=normal(32, seed=30), mixed_mean=normal(4, 32, seed=31))
    made = [convert_layer(spec, tensors, s, ScoreAwareOptions(26, 6)) for s in (learnt, moved)]
    outs = [mla_attention(*one, x, spec) for one in made]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-6, atol=1e-6)
    assert (made[0][1]["o_proj.bias"] - made[1][1]["o_proj.bias"]).abs().max() > 0.1


def test_means_take_no_rank() -> None:
    """Inputs of 3 dimensions and keys and values far from zero: a latent of 3 loses nothing."""
    spec = gqa(bias=True)
    tensors, x = layer_tensors(spec, hidden=3), inputs(3, hidden=3)
    tensors |= {f"{n}_proj.bias": 3 * tensors[f"{n}_proj.bias"] for n in "kv"}
    learnt = collect_attention(spec, tensors, [x])
    found, expected = (
        mla_attention(*convert_layer(spec, tensors, learnt, ScoreAwareOptions(rank, 4)), x[0], spec) for rank in (3, 28)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_layer_that_adds_nothing() -> None:
    spec = gqa()
    tensors = layer_tensors(spec)
    tensors["o_proj.weight"].zero_()
    learnt = collect_attention(spec, tensors, [inputs()])
    mla, made = convert_layer(spec, tensors, learnt, ScoreAwareOptions(8, 4))
    assert all(torch.isfinite(t).all() for t in made.values())
    assert mla_attention(mla, made, inputs()[0], spec).abs().max() == 0


@pytest.mark.parametrize(
    ("rope", "rank", "message"),
    [
        (3, 8, "--qk-rope-head-dim 3 does not fit"),
        (0, 8, "--qk-rope-head-dim 0 does not fit"),
        (18, 8, "between 2 and the 16 channels"),
        (6, 27, "--kv-lora-rank 27 is out of range.*between 1 and 26"),
        (6, 0, "--kv-lora-rank 0"),
    ],
)
def test_options_that_do_not_fit(rope: int, rank: int, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        check_options(gqa(), ScoreAwareOptions(rank, rope))


def converted(source: Path, out: Path, *options: str) -> Path:
    text = write_text(out.parent / "calibration.txt", 8000)
    arguments = ["--model", str(source), "--out", str(out), "--method", "score-aware", "--calibration", str(text)]
    assert main([*arguments, *options]) == 0
    return out


YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                            "original_max_position_embeddings": 64}}  # fmt: skip
ENGINE_CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "half": ({}, ["--cache-ratio", "0.5"]),
    "all": ({}, ["--cache-ratio", "1"]),
    "biases": ({"attention_bias": True}, ["--cache-ratio", "0.6"]),
    "qwen2": ({"family": "qwen2"}, ["--kv-lora-rank", "13", "--qk-rope-head-dim", "10"]),
    "mha, one pair": ({"num_key_value_heads": 4}, ["--kv-lora-rank", "31", "--qk-rope-head-dim", "2"]),
    "mqa, no nope": ({"num_key_value_heads": 1}, ["--kv-lora-rank", "7", "--qk-rope-head-dim", "12"]),
    "head_dim 10, bf16": ({"head_dim": 10, "dtype": torch.bfloat16}, ["--cache-ratio", "0.4"]),
    "yarn": (YARN, ["--cache-ratio", "0.5"]),
    **{name: (config, ["--cache-ratio", "0.5"]) for name, config in APART.items()},
}  # fmt: skip


@pytest.mark.parametrize(("config", "options"), ENGINE_CASES.values(), ids=ENGINE_CASES.keys())
def test_engine_against_plain_definition(tmp_path: Path, config: dict[str, Any], options: list[str]) -> None:
    out = converted(make_source(tmp_path / "source", **config), tmp_path / "out", *options)
    ids = torch.randint(0, 260, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    assert_engine_is_plain(out, ids)


WHOLE: dict[str, dict[str, Any]] = {
    "plain": {}, "qwen2": {"family": "qwen2"}, "mqa": {"num_key_value_heads": 1}, "yarn": YARN,
    "qwen3": APART["qwen3, biases and a window"], "gemma2": APART["gemma2"],
}  # fmt: skip


@pytest.mark.parametrize("config", WHOLE.values(), ids=WHOLE.keys())
def test_the_whole_cache_loses_nothing(tmp_path: Path, config: dict[str, Any]) -> None:
    """With a rope key as wide as all keys and a latent as wide as all values."""
    source = make_source(tmp_path / "source", **config)
    out = converted(source, tmp_path / "out", "--cache-ratio", "1")
    ids = torch.randint(0, 260, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.inference_mode():
        expected = oracle(source)(torch.tensor([ids])).logits[0]
    for logits in (prefill_logits(out, ids), decode_logits(out, ids)):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert json.loads((out / "conversion.json").read_text())["quality"]["kl"] < 1e-6


def test_quality_on_a_trained_model(tmp_path: Path) -> None:
    """At half the cache in one fixed split, calibrated on little text, neither refined: TransMLA's KL over eight.

    With sizes of its own choice and the default calibration it is less than a tenth: bench/results/.
    """
    text, model = shared("data/tinystories/tinystories_197k.txt"), shared("models/tinystories-gqa64")
    arguments = ["--model", str(model), "--calibration", str(text), "--calibration-tokens", "8192"]
    sizes = ["--kv-lora-rank", "64", "--qk-rope-head-dim", "64", "--refine", "none"]
    kl = []
    for method, options in (("transmla", ["--freqfold", "2"]), ("score-aware", [])):
        out = tmp_path / method
        assert main([*arguments, "--out", str(out), "--method", method, *sizes, *options]) == 0
        kl.append(json.loads((out / "conversion.json").read_text())["quality"]["kl"])
    assert kl[1] <= kl[0] / 8
