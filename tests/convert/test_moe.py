"""Mixtures of experts over grouped-query attention: the attention is converted, the experts are carried over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from convert.cli import main
from engine.checkpoint import open_checkpoint
from engine.spec import MLASpec, MoESpec
from tests.convert.engine_runs import assert_greedy, decode_logits, greedy, prefill_logits
from tests.convert.sources import VOCAB, save_tokenizer, write_text
from tests.model.native_folders import CONFIGS, make_native

TOLERANCE = 1e-4
SOURCES = {
    "mixtral": CONFIGS["mixtral", "as published, made small"],
    "qwen2_moe": CONFIGS["qwen2_moe", "some layers dense"],
    "qwen3_moe": CONFIGS["qwen3_moe", "a window, biases, some layers dense"],
}


@pytest.mark.parametrize("family", SOURCES)
def test_an_exact_conversion(tmp_path: Path, family: str) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    model = make_native(source, family, SOURCES[family] | {"vocab_size": VOCAB})
    save_tokenizer(source)
    text = write_text(tmp_path / "calibration.txt", 4000)
    assert main(["--model", str(source), "--out", str(out), "--method", "exact", "--calibration", str(text)]) == 0
    ids = torch.randint(4, VOCAB, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    for logits in (prefill_logits(out, ids), decode_logits(out, ids)):
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    assert_greedy(greedy(out, ids[:5], 60), model, ids[:5])


def test_a_conversion_that_saves_carries_the_experts_over(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    make_native(source, "mixtral", SOURCES["mixtral"] | {"vocab_size": VOCAB})
    save_tokenizer(source)
    text = write_text(tmp_path / "calibration.txt", 6000)
    command = ["--model", str(source), "--out", str(out), "--cache-ratio", "0.5", "--calibration", str(text)]
    assert main([*command, "--calibration-tokens", "512"]) == 0
    before, after = open_checkpoint(source), open_checkpoint(out)
    assert 0.45 < after.spec.cache_bytes_per_token(4) / before.spec.cache_bytes_per_token(4) <= 0.5
    for layer in after.spec.layers:
        assert isinstance(layer.attention, MLASpec)
        assert isinstance(layer.mlp, MoESpec)
    stored = load_file(source / "model.safetensors")
    written = load_file(out / "model.safetensors")
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    for ours, theirs in names.items():
        expert = stored[f"model.layers.2.block_sparse_moe.experts.3.{theirs}.weight"]
        assert torch.equal(written[f"model.layers.2.mlp.experts.3.{ours}.weight"], expert)
    gate = stored["model.layers.2.block_sparse_moe.gate.weight"]
    assert torch.equal(written["model.layers.2.mlp.gate.weight"], gate)
