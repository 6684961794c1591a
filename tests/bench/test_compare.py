"""The comparison end to end on small real checkpoints, and that it refuses to time what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import report
from bench.checks import check_engine
from bench.compare import grid
from bench.workload import Point, Timing, median_timing, random_prompts, run, time_engine
from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import EngineError
from engine.model.load import load_model
from engine.sampling_params import SamplingParams
from tests.conftest import shared


def core_of(path: Path, **config: int) -> EngineCore:
    checkpoint = open_checkpoint(path)
    return EngineCore(load_model(checkpoint, "cpu"), checkpoint.generation, EngineConfig(cache_tokens=2048, **config))


def test_command_writes_table_json_and_plot(tmp_path: Path) -> None:
    source = shared("models/stories260K")
    python = [sys.executable, "-m"]
    convert = [*python, "convert", "--model", str(source), "--out", str(tmp_path / "mla"), "--method", "exact"]
    subprocess.run(convert, check=True, capture_output=True, timeout=120)
    out, plot = tmp_path / "c.json", tmp_path / "c.png"
    done = subprocess.run(
        [*python, "bench", "compare", "--mla", str(tmp_path / "mla"), "--gqa", str(source), "--contexts", "16",
         "--batches", "1", "3", "--output-tokens", "4", "--rounds", "1", "--json", str(out), "--plot", str(plot)],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert [(r["context"], r["batch"]) for r in results["rows"]] == [(16, 1), (16, 3)]
    assert results["top1_agreement"] == 1.0  # an exact conversion
    sizes = results["sizes"]
    assert sizes["mla"]["cache_bytes_per_token"] == sizes["gqa"]["cache_bytes_per_token"] == 5 * 2 * 4 * 8 * 4
    for row in results["rows"]:
        for name in ("mla", "gqa", "transformers"):
            assert row[name]["ttft"] > 0
            assert row[name]["tpot"] > 0
            assert row[name]["throughput"] > 0
    assert "cache bytes per token" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_engine_is_found_out() -> None:
    core = core_of(shared("models/stories260K"))
    prompts = [[1, 50, 60], [1, 70, 80, 90, 100]]
    assert check_engine(core, prompts, 8).passed
    healthy = core.runner.model.layers[2].mlp_half.mlp.down
    calls = iter(range(10**6))
    core.runner.model.layers[2].mlp_half.mlp.down = lambda x: healthy(x) * (1 if next(calls) % 2 else 1.5)  # type: ignore[assignment]
    assert not check_engine(core, prompts, 8).passed


def test_timing_counts_what_it_says() -> None:
    core = core_of(shared("models/stories260K"), max_batched_tokens=8)
    prompts = random_prompts(Point(context=6, batch=3), vocab_size=512, seed=0)
    assert prompts == random_prompts(Point(6, 3), 512, 0)
    tokens, times = run(core, prompts, SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
    assert [len(t) for t in tokens] == [len(t) for t in times] == [5, 5, 5]
    assert all(sorted(t) == t for t in times)
    timing = time_engine(core, prompts, 5)
    assert timing.ttft > 0
    assert timing.tpot > 0
    assert median_timing([Timing(1, 2, 3), Timing(3, 1, 2), Timing(2, 3, 1)]) == Timing(2, 2, 2)


def test_a_grid_that_does_not_fit_is_refused() -> None:
    import argparse

    args = argparse.Namespace(output_tokens=10, rounds=1, batches=[1], contexts=[95])
    with pytest.raises(EngineError, match="--contexts 95"):
        grid(args, 100)
    args.contexts = None
    assert grid(args, 100) == [Point(12, 1), Point(75, 1)]


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "compare", "--mla", str(tmp_path / "no"), "--gqa", str(tmp_path / "no")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_table_without_transformers() -> None:
    timing = {"ttft": 0.1, "tpot": 0.01, "throughput": 50.0}
    size = {"weight_bytes": 1, "cache_bytes_per_token": 2, "tokens_that_fit": 3}
    text = report.table(
        {
            "environment": {"device_name": "x", "dtype": "float32", "threads": 1}, "top1_agreement": 0.5,
            "models": {"mla": "a", "gqa": "b"}, "memory_gib": 24, "sizes": {"mla": size, "gqa": size},
            "rows": [{"context": 1, "batch": 2, "mla": timing, "gqa": timing | {"tpot": 0.02}}],
        }
    )  # fmt: skip
    assert "2.00x" in text
    assert "transformers" not in text


def test_tokens_are_checked_in_the_models_dtype() -> None:
    checkpoint = open_checkpoint(shared("models/tinystories-gqa64"))
    core = EngineCore(load_model(checkpoint, "cpu", "bfloat16"), checkpoint.generation, EngineConfig(cache_tokens=512))
    check = check_engine(core, [[1, 5, 6, 7]], 8)
    assert check.passed
    assert check.tolerance == 0.5
    assert core.runner.model.dtype == torch.bfloat16
