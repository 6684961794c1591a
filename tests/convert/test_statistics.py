"""Calibration statistics and layer streams against `transformers`' own activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert.errors import ConversionError
from convert.quality import Comparison, relative_error
from convert.statistics import collect
from convert.stream import Stream, chunks
from engine.checkpoint import open_checkpoint
from engine.model.transformer import AttentionHalf, MLPHalf
from engine.spec import GQASpec, ModelSpec
from tests.convert.sources import make_source, oracle

SPEC = ModelSpec(260, 6, 1e-5, 64, True, "float32", ())


def windows_of(count: int, length: int, last: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = [length] * count + ([last] if last else [])
    return [torch.randint(0, 260, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.inference_mode()
def test_moments_are_those_of_the_source_models_keys_and_values(tmp_path: Path, family: str) -> None:
    source = make_source(tmp_path / "source", family=family)
    windows = windows_of(5, 33, last=7)
    expected = hooked_moments(oracle(source, torch.float64), windows)
    checkpoint = open_checkpoint(source)
    stream = Stream(windows, checkpoint.outer()["embed_tokens.weight"], checkpoint.spec)
    for index, spec in enumerate(checkpoint.spec.layers):
        assert isinstance(spec.attention, GQASpec)
        tensors = checkpoint.layer(index)
        half = AttentionHalf(spec, checkpoint.spec, tensors)
        attention = {name.removeprefix("self_attn."): t for name, t in tensors.items() if "self_attn" in name}
        found = collect(spec.attention, attention, stream.inputs(half))
        assert found.tokens == 5 * 33 + 7
        assert found.kv_moment.dtype == torch.float64
        torch.testing.assert_close(found.kv_moment, expected[index], rtol=1e-4, atol=1e-4)
        stream.attend(half)
        stream.feed(MLPHalf(spec, checkpoint.spec, tensors))


def hooked_moments(model: Any, windows: list[list[int]]) -> list[Tensor]:
    """Per layer, the mean of [k; v] [k; v]^T of what k_proj and v_proj put out."""
    seen: dict[tuple[int, str], list[Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        for name in ("k_proj", "v_proj"):

            def record(_module: object, _inputs: object, output: Tensor, key: tuple[int, str] = (index, name)) -> None:
                seen.setdefault(key, []).append(output[0])

            getattr(layer.self_attn, name).register_forward_hook(record)
    for window in windows:
        model(torch.tensor([window]))
    moments = []
    for index in range(len(model.model.layers)):
        kv = torch.cat([torch.cat(seen[index, name]) for name in ("k_proj", "v_proj")], 1)
        moments.append(kv.T @ kv / len(kv))
    return moments


def test_damaged_weights_are_refused() -> None:
    spec = GQASpec(1, 1, 2, 1.0, None)  # type: ignore[arg-type]  # rotations play no part
    tensors = {f"{n}_proj.weight": torch.full((2, 3), float("inf")) for n in "kv"}
    with pytest.raises(ConversionError, match="not finite"):
        collect(spec, tensors, [torch.ones(4, 3)])


def test_chunks_hold_windows_of_one_length_up_to_a_limit() -> None:
    windows = windows_of(7, 10, last=4)
    parts = list(chunks(windows, torch.randn(260, 6), SPEC, limit=35))
    assert [(c.num_windows, c.length) for c in parts] == [(3, 10), (3, 10), (1, 10), (1, 4)]
    assert [t for c in parts for t in c.token_ids.tolist()] == [t for w in windows for t in w]
    assert [t for c in parts for t in c.targets.tolist()] == [t for w in windows for t in w[1:]]
    first = parts[0]
    positions = torch.arange(30)[:, None]
    assert (first.predicting(positions).flatten() % 10).tolist() == list(range(9)) * 3
    assert first.seen.tolist() == list(range(1, 10)) * 3


def test_a_window_longer_than_the_limit_goes_alone() -> None:
    parts = list(chunks(windows_of(2, 50), torch.randn(260, 6), SPEC, limit=35))
    assert [c.num_windows for c in parts] == [1, 1]


def test_comparison_is_the_textbook_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.quality.LOGIT_ELEMENTS", 11 * 4)  # four rows at a time
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 30, 11, generator=generator)
    targets = torch.randint(0, 11, (30,), generator=generator)
    seen = torch.arange(1, 16).repeat(2)  # two windows of 16
    comparison = Comparison(11)
    for part in (slice(0, 13), slice(13, 30)):
        comparison.add(a[part], b[part], targets[part], seen[part], lambda x: x, lambda x: x)
    p, q = (x.double().log_softmax(-1) for x in (a, b))
    report = comparison.report()
    assert report["kl"] == pytest.approx(
        torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()
    )
    assert report["perplexity"] == pytest.approx(torch.nn.functional.nll_loss(q, targets).exp().item())
    assert report["reference_perplexity"] == pytest.approx(torch.nn.functional.nll_loss(p, targets).exp().item())
    assert report["top1_agreement"] == pytest.approx((a.argmax(-1) == b.argmax(-1)).double().mean().item())
    assert comparison.tokens == 30
    assert [(bucket["from"], bucket["to"]) for bucket in report["kl_by_position"]] == [(1, 1), (2, 3), (4, 7), (8, 15)]
    for bucket in report["kl_by_position"]:
        inside = (bucket["from"] <= seen) & (seen <= bucket["to"])
        kl = torch.nn.functional.kl_div(q[inside], p[inside], log_target=True, reduction="batchmean").item()
        assert bucket["kl"] == pytest.approx(kl)
        assert bucket["tokens"] == int(inside.sum())


def test_the_last_bucket_ends_where_the_window_does() -> None:
    rows, comparison = torch.randn(9, 5), Comparison(5)
    seen = torch.tensor([1, 2, 3, 1023, 1024, 1025, 2, 1, 1])
    comparison.add(rows, rows, torch.zeros(9, dtype=torch.int64), seen, lambda x: x, lambda x: x)
    buckets = [(b["from"], b["to"], b["tokens"]) for b in comparison.kl_by_position]
    assert buckets == [(1, 1, 3), (2, 3, 3), (512, 1023, 1), (1024, 1025, 2)]


def test_comparison_refuses_nan() -> None:
    rows = torch.full((2, 5), float("nan"))
    with pytest.raises(ConversionError, match="not finite"):
        Comparison(5).add(rows, rows, torch.tensor([1, 2]), torch.tensor([1, 2]), lambda x: x, lambda x: x)


def test_relative_error() -> None:
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert relative_error([(a, a * 1.1), (b, b * 1.1)]) == pytest.approx(0.1)
    assert relative_error([(torch.zeros(2), torch.zeros(2))]) == 0
