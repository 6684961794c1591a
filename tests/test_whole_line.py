"""What a user gets, on trained checkpoints: the bundled demo and those of ../shared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from convert.cli import main as convert
from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import Request
from engine.model.load import load_model
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from tests.conftest import MODELS, SHARED
from tests.convert.engine_runs import assert_greedy, greedy
from tests.convert.sources import oracle

DEMO = Path(__file__).resolve().parents[1] / "demo" / "stories"
SOURCES = {"demo": DEMO} | {name: SHARED / "models" / name for name in MODELS}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest) -> Path:
    path = SOURCES[request.param]
    if not path.exists():
        pytest.skip(f"needs {path.name}")
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo at half its cache, calibrated on a little text, which is quick."""
    folder = tmp_path_factory.mktemp("converted")
    text = folder / "text.txt"
    text.write_text("Once upon a time there was a little cat who loved to sail in a small red boat. " * 60, "utf-8")
    assert convert(["--model", str(DEMO), "--out", str(folder / "mla"), "--calibration", str(text)]) == 0
    return folder / "mla"


def test_the_source_generates_what_transformers_does(source: Path) -> None:
    ids = Tokenizer.from_folder(source).encode("Once upon a time, there was a little")
    assert_greedy(greedy(source, ids, 200), oracle(source), ids)


def test_the_demo_converted_exactly_generates_the_same(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a dog. " * 100, "utf-8")
    out = tmp_path / "exact"
    assert convert(["--model", str(DEMO), "--out", str(out), "--method", "exact", "--calibration", str(text)]) == 0
    ids = Tokenizer.from_folder(DEMO).encode("Once upon a time, there was a little")
    assert_greedy(greedy(out, ids, 200), oracle(DEMO), ids)


def test_the_cache_holds_the_latent_and_nothing_else(converted: Path) -> None:
    checkpoint = open_checkpoint(converted)
    core = EngineCore(load_model(checkpoint, "cpu"), checkpoint.generation, EngineConfig(cache_tokens=640))
    held = sum(layer.numel() * layer.element_size() for layer in core.runner.cache)
    widths = [layer.attention.kv_lora_rank + layer.attention.rope_width for layer in checkpoint.spec.layers]
    assert held == 640 * 4 * sum(widths)
    record = json.loads((converted / "conversion.json").read_text())
    assert record["cache_bytes_per_token"] * 2 == record["source_cache_bytes_per_token"]


@pytest.mark.parametrize("config", [{"max_num_seqs": 8}, {"cache_tokens": 1024}, {"max_batched_tokens": 50}], ids=str)
def test_thirty_two_at_once_write_what_each_writes_alone(converted: Path, config: dict[str, int]) -> None:
    checkpoint, tokenizer = open_checkpoint(converted), Tokenizer.from_folder(converted)
    model = load_model(checkpoint, "cpu", "float32")
    opening = "Once upon a time, there was a little girl named Lily who liked to play in the park with her dog. "
    prompts = [tokenizer.encode(opening * (3 * i % 7) + f"{w} went to the")
               for i, w in enumerate(("The cat", "Tom", "A big dog", "Her mom") * 8)]  # fmt: skip
    params = [SamplingParams(temperature=(i % 4) / 3, seed=i, max_tokens=10 + i, ignore_eos=True) for i in range(32)]

    def texts(together: bool) -> list[list[int]]:
        core = EngineCore(model, checkpoint.generation, EngineConfig(**({"cache_tokens": 4096} | config)))
        tokens: dict[str, list[int]] = {str(i): [] for i in range(32)}
        for i, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            core.add(Request(id=str(i), prompt_ids=prompt, params=one))
            while core.has_work and (not together or i == 31):
                for output in core.step():
                    tokens[output.request_id] += output.token_ids
        stats = core.stats()
        assert stats.free_blocks == stats.total_blocks
        if together and "cache_tokens" in config:
            assert stats.preemptions > 0
        if together and "max_num_seqs" in config:  # the later ones find what the earlier ones computed
            assert stats.prefix_hit_tokens > 0
        return list(tokens.values())

    assert texts(together=True) == texts(together=False)
