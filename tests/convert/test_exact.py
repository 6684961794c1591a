"""`--method exact` against the source in `transformers`: the same logits, the same text, a cache of the same size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.cli import main
from engine.checkpoint import open_checkpoint
from engine.messages import Request
from engine.model.load import load_model
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from tests.convert.engine_runs import assert_greedy, decode_logits, greedy, prefill_logits
from tests.convert.sources import APART, make_source, oracle, write_text
from tests.engine.tiny import engine, run, tokens

TOLERANCE = 1e-4
CONFIGS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "head_dim not hidden / heads, not a power of two": {"head_dim": 10, "num_attention_heads": 6},
    "biases on q, k, v and o": {"attention_bias": True, "mlp_bias": True},
    "biases on q, k and v": {"family": "qwen2"},
    "tied, bf16": {"tie_word_embeddings": True, "dtype": torch.bfloat16},
    **APART,
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                 "original_max_position_embeddings": 64}},
}  # fmt: skip


def convert_exactly(source: Path, out: Path) -> Path:
    text = write_text(out.parent / "calibration.txt", 4000)
    assert main(["--model", str(source), "--out", str(out), "--method", "exact", "--calibration", str(text)]) == 0
    return out


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_random_models(tmp_path: Path, config: dict[str, Any]) -> None:
    source = make_source(tmp_path / "source", **config)
    out = convert_exactly(source, tmp_path / "out")
    model = oracle(source)
    ids = torch.randint(0, 260, (50,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    assert expected.std() > 0.1
    for logits in (prefill_logits(out, ids), decode_logits(out, ids)):
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    assert_greedy(greedy(out, ids[:5], 200), model, ids[:5])
    assert_same_cache(source, out)


@pytest.mark.parametrize("name", ["mistral, a window", "qwen3, biases and a window", "gemma2"])
def test_requests_side_by_side(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks, contexts expanded in pieces, windows that begin in different places of each sequence."""
    monkeypatch.setattr("engine.model.mla.EXPAND_TOKENS", 16)
    source = make_source(tmp_path / "source", **APART[name])
    out = convert_exactly(source, tmp_path / "out")
    core = engine(load_model(out, "cpu", "float32"), block_size=8, max_batched_tokens=16)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(260, (n,), generator=generator).tolist() for n in (40, 3, 25, 17)]
    params = SamplingParams(temperature=0.0, max_tokens=30)
    found = run(core, [Request(id=str(i), prompt_ids=p, params=params) for i, p in enumerate(prompts)])
    model = oracle(source)
    for i, prompt in enumerate(prompts):
        assert_greedy(tokens(found[str(i)]), model, prompt)


def test_shared_models(tmp_path: Path, shared_model: Path) -> None:
    out = convert_exactly(shared_model, tmp_path / "out")
    model = oracle(shared_model)
    ids = Tokenizer.from_folder(shared_model).encode("Once upon a time, there was a little girl named Lily. One day")
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    for logits in (prefill_logits(out, ids), decode_logits(out, ids)):
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    assert_greedy(greedy(out, ids[:8], 200), model, ids[:8])
    assert_same_cache(shared_model, out)


def assert_same_cache(source: Path, out: Path) -> None:
    specs = [open_checkpoint(path).spec for path in (source, out)]
    assert specs[0].cache_bytes_per_token(4) == specs[1].cache_bytes_per_token(4)
    record = json.loads((out / "conversion.json").read_text())
    assert record["cache_bytes_per_token"] == record["source_cache_bytes_per_token"]
    assert record["quality"]["kl"] < 1e-6
    assert max(record["quality"]["attention_errors"]) < 1e-5
