"""CARE: its factors and its ranks as published, and what it writes, on the engine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert.cli import main
from convert.methods import transmla
from convert.methods.care import BASES, CareOptions, Spectra, adjusted_ranks, convert_layer, factor, spectra
from convert.methods.transmla import TransMLAOptions, rotation
from convert.statistics import LayerStatistics
from engine.checkpoint import open_checkpoint
from engine.spec import GQASpec, RopeSpec
from tests.convert.engine_runs import assert_engine_is_plain
from tests.convert.sources import APART, make_source, write_text

HEADS, GROUPS, D, DR, RANK = 6, 3, 8, 4, 13


def gqa() -> GQASpec:
    return GQASpec(HEADS, GROUPS, D, D**-0.5, RopeSpec(tuple(100.0 ** (-2 * j / D) for j in range(D // 2))))


def samples(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Correlated float64 rows with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mix + 0.5


class Published:
    """The steps of the published code on keys and values [T, g D]: the balanced x and the whole up-projection W."""

    def __init__(self, kv: Tensor) -> None:
        width = GROUPS * D
        k, v = kv.split(width, 1)
        self.turn = rotation(gqa(), k.T @ k, TransMLAOptions(RANK, DR, 2))
        rope_and_nope = k @ self.turn.T
        nope = rope_and_nope[:, DR:]
        self.rho = float(nope.norm(dim=0).mean() / v.norm(dim=0).mean())
        self.x = torch.cat((nope / self.rho, v), 1)
        select = torch.zeros(HEADS * D, width, dtype=torch.float64)  # each head's own KV head
        for h in range(HEADS):
            own = h * GROUPS // HEADS * D
            select[h * D : (h + 1) * D, own : own + D] = torch.eye(D, dtype=torch.float64)
        k_up, v_up = (select @ self.turn.T)[:, DR:] * self.rho, select
        rows = torch.block_diag(k_up, v_up).unflatten(0, (2, HEADS, D))
        self.up = rows.transpose(0, 1).flatten(0, 2)  # [H 2 D, n + g D]: each head's key, then its value

    def product(self, basis: str) -> Tensor:
        """up @ down: what becomes of x, [H 2 D, n + g D]."""
        moment = self.x.T @ self.x / len(self.x)
        mean = moment.diagonal().mean()
        damping = 0.01 * 10 if basis == "care" else 0.01
        values, vectors = torch.linalg.eigh(moment + damping * mean * torch.eye(len(moment), dtype=moment.dtype))
        power = 0.5 if basis == "care" else 4.0
        root = vectors @ torch.diag(values**power) @ vectors.T
        u, s, v = torch.linalg.svd(root @ self.up.T, full_matrices=False)
        if basis == "transmla-care":
            return self.up @ u[:, :RANK] @ u[:, :RANK].T
        down = torch.linalg.inv(root) @ u[:, :RANK] @ torch.diag(s[:RANK])
        return v[:RANK].T @ down.T


@pytest.mark.parametrize("basis", BASES)
def test_the_layer_is_the_published_one(basis: str) -> None:
    """Of any key and value, what every head reads from the latent."""
    spec, generator = gqa(), torch.Generator().manual_seed(0)
    rows = {"q": HEADS * D, "k": GROUPS * D, "v": GROUPS * D}
    tensors = {f"{n}_proj.weight": torch.randn(r, 20, generator=generator) for n, r in rows.items()}
    inputs = samples(300, 20)
    kv = torch.cat([inputs @ tensors[f"{n}_proj.weight"].double().T for n in "kv"], 1)
    published = Published(kv)
    mla, made = convert_layer(spec, tensors, LayerStatistics(300, kv.T @ kv / 300), CareOptions(RANK, DR, 2, basis))
    latent, k_rope = (inputs @ made["kv_a_proj_with_mqa.weight"].T).split((mla.kv_lora_rank, DR), 1)
    found = latent @ made["kv_b_proj.weight"].T
    expected = published.x @ published.product(basis).T
    assert (found - published.x @ published.up.T).norm() > 1e-2 * found.norm()  # something is lost, and the same
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(k_rope.abs(), (kv[:, : GROUPS * D] @ published.turn[:DR].T).abs())


def test_care_loses_least_of_the_outputs() -> None:
    """Without damping to speak of, E |W x - W' x|^2 is what no rank can go below: the PCA of W x."""
    x, scale = samples(4000, 12), torch.tensor([3.0] * 5 + [1.0] * 7, dtype=torch.float64)
    moment = x.T @ x / 4000
    encode, decode = factor(moment, scale, 4, "care")
    lost = ((x * scale) - x @ encode.T @ decode.T).pow(2).sum() / 4000
    least = torch.linalg.eigvalsh(scale[:, None] * moment * scale)[:-4].sum()
    assert least <= lost < 1.1 * least


@pytest.mark.parametrize("basis", BASES)
def test_spectra(basis: str) -> None:
    kv = samples(300, 2 * GROUPS * D)
    published = Published(kv)
    found = spectra(gqa(), {}, LayerStatistics(300, kv.T @ kv / 300), CareOptions(RANK, DR, 2, basis))
    nope = GROUPS * D - DR
    for spectrum, part, up in (
        (found.keys, published.x[:, :nope], published.up[:, :nope]),
        (found.values, published.x[:, nope:], published.up[:, nope:]),
    ):
        moment = part.T @ part / 300
        moment += (0.1 if basis == "care" else 0.01) * moment.diagonal().mean() * torch.eye(len(moment)).double()
        values, vectors = torch.linalg.eigh(moment)
        squares = torch.linalg.svdvals(vectors @ torch.diag(values.sqrt()) @ vectors.T @ up.T) ** 2
        torch.testing.assert_close(spectrum / spectrum[0], squares / squares[0])


def published_ranks(spectra_: list[Tensor], total: int, least: int, most: int) -> list[int]:
    """Greedy, as published: `least` and `most` for every layer."""
    count, ranks = len(spectra_), [least] * len(spectra_)
    for _ in range(total - least * count):
        scores = []
        for i, s in enumerate(spectra_):
            if ranks[i] >= most or ranks[i] >= len(s):
                scores.append(-1.0)
                continue
            residual = max(1 - float(s[: ranks[i]].sum() / s.sum()), 1e-12)
            horizon = math.sqrt((count - i) / ((count + 1) / 2))
            scores.append(
                float(s[ranks[i]] / s.sum()) / residual * horizon / math.sqrt(max(ranks[i], 1) / max(least, 1))
            )
        if max(scores) < 0:
            break
        ranks[scores.index(max(scores))] += 1
    return ranks


@pytest.mark.parametrize("rank", [4, 8, 12])
def test_adjusted_ranks_are_the_published_ones(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    decay = [0.72, 0.8, 0.75, 0.7, 0.78]  # near enough for every factor of the gain to matter
    layers = []
    for d in decay:
        noise = torch.rand(2, 12, generator=generator, dtype=torch.float64)
        falling = d ** torch.arange(12) * (1 + 0.1 * noise)
        layers.append(Spectra(*falling.sort(descending=True).values))
    found = adjusted_ranks(layers, [rank] * 5)
    keys = published_ranks([s.keys for s in layers], 5 * rank // 2, rank // 4, rank)
    values = published_ranks([s.values for s in layers], 5 * rank - sum(keys), rank // 4, rank)
    assert found == [k + v for k, v in zip(keys, values, strict=True)]
    assert sum(found) == 5 * rank
    assert len(set(found)) > 1


def test_ranks_that_have_nowhere_to_go() -> None:
    """Keys that RoPE keeps whole want none, and no layer gets more than it has dimensions."""
    empty, values = torch.zeros(0, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    assert adjusted_ranks([Spectra(empty, values)] * 3, [4] * 3) == [4, 4, 4]
    assert adjusted_ranks([Spectra(values, values)] * 3, [12] * 3) == [12, 12, 12]
    dead = torch.zeros(6, dtype=torch.float64)
    assert sum(adjusted_ranks([Spectra(dead, dead), Spectra(values, values)], [6, 6])) == 12


def test_dead_layers_stay_finite() -> None:
    tensors = {f"{n}_proj.weight": torch.zeros(r * D, 20) for n, r in (("q", HEADS), ("k", GROUPS), ("v", GROUPS))}
    nothing = LayerStatistics(9, torch.zeros(2 * GROUPS * D, 2 * GROUPS * D, dtype=torch.float64))
    for basis in BASES:
        _, made = convert_layer(gqa(), tensors, nothing, CareOptions(RANK, DR, 2, basis))
        assert all(torch.isfinite(t).all() for t in made.values())


def test_full_rank_is_transmla(tmp_path: Path) -> None:
    """Where nothing is cut off, neither the covariance nor the basis matters."""
    kv = samples(300, 2 * GROUPS * D)
    statistics, full = LayerStatistics(300, kv.T @ kv / 300), 2 * GROUPS * D - DR
    tensors = {
        f"{n}_proj.weight": samples(r * D, 20, seed=i)
        for i, (n, r) in enumerate((("q", HEADS), ("k", GROUPS), ("v", GROUPS)))
    }
    _, expected = transmla.convert_layer(gqa(), tensors, statistics, TransMLAOptions(full, DR, 2))
    for basis in BASES:
        _, made = convert_layer(gqa(), tensors, statistics, CareOptions(full, DR, 2, basis))
        products = [m["kv_b_proj.weight"] @ m["kv_a_proj_with_mqa.weight"][:full] for m in (made, expected)]
        torch.testing.assert_close(*products)


def care(source: Path, out: Path, *options: str) -> Path:
    text = write_text(out.parent / "calibration.txt", 6000)
    arguments = ["--model", str(source), "--out", str(out), "--method", "care", "--calibration", str(text)]
    assert main([*arguments, "--calibration-tokens", "1024", *options]) == 0
    return out


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, ["--cache-ratio", "0.5"]),
        ({"family": "qwen2"}, ["--kv-lora-rank", "13", "--qk-rope-head-dim", "6", "--freqfold", "2"]),
        ({"num_key_value_heads": 1}, ["--kv-lora-rank", "7", "--qk-rope-head-dim", "12"]),
        (APART["qwen3, biases and a window"], ["--kv-lora-rank", "20", "--qk-rope-head-dim", "6", "--freqfold", "2"]),
    ],
)  # fmt: skip
def test_engine_against_plain_definition(tmp_path: Path, config: dict[str, Any], options: list[str]) -> None:
    out = care(make_source(tmp_path / "source", **config), tmp_path / "out", *options)
    ids = torch.randint(0, 260, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    assert_engine_is_plain(out, ids)


def test_ranks_differ_by_layer_within_one_budget(tmp_path: Path) -> None:
    """Whichever ranks are taken, the cache is as large; those that were adjusted were among what was tried."""
    out = care(make_source(tmp_path / "source"), tmp_path / "out", "--cache-ratio", "0.5")
    record = json.loads((out / "conversion.json").read_text())
    adjusted = [trial for trial in record["trials"] if trial["ranks"] == "adjusted"]
    assert any(len(trial["sizes"]) == 2 for trial in adjusted)  # of two layers
    source, spec = (open_checkpoint(path).spec for path in (tmp_path / "source", out))
    assert spec.cache_bytes_per_token(1) * 2 <= source.cache_bytes_per_token(1)
