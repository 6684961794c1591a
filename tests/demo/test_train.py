"""A minute-long training in miniature: it learns, resumes, and writes a checkpoint that others read alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.checkpoint import open_checkpoint
from engine.model.batch import Batch
from engine.model.load import load_model

TRAIN = Path(__file__).resolve().parents[2] / "demo" / "train.py"
WORDS = ("cat", "dog", "boat", "tree", "bird", "ball")


def stories(count: int) -> str:
    text = (
        "Once upon a time, there was a {a}. The {a} saw a {b} near the {c}. It wanted to play with the {b}, and so it "
        "ran to the {c}. They played all day, and then the {a} went home. The {a} was very happy with {b} {i}."
    )
    pick = [dict(zip("abc", (WORDS[i % 6], WORDS[i // 6 % 6], WORDS[i // 36 % 6]), strict=True)) for i in range(count)]
    return "<|endoftext|>".join(text.format(**p, i=i) for i, p in enumerate(pick))


def train(folder: Path, minutes: float) -> str:
    command = [sys.executable, str(TRAIN), "--out", str(folder / "model"), "--stories", str(folder / "stories.txt"),
               "--minutes", str(minutes), "--batch-tokens", "1024", "--threads", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout + done.stderr


def test_trains_resumes_and_writes_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text(stories(400), encoding="utf-8")
    steps, seen = [], []
    for minutes in (0.05, 0.1):
        assert "bits per byte" in train(tmp_path, minutes)
        state = torch.load(tmp_path / "model.state.pt", weights_only=True)
        steps.append(state["step"])
        seen.append(state["seen"])
        assert minutes * 60 <= state["seconds"] < minutes * 60 + 30  # a second run adds what is missing, no more
    assert 0 < steps[0] < steps[1]
    assert seen == [1024 * n for n in steps]
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.spec.layers[0].attention.num_heads == 8
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.randint(0, 250, (70,))
    with torch.inference_mode():
        model = load_model(checkpoint, "cpu")
        logits = model.logits(model.forward(ids, Batch.dense(1, 70), model.new_cache(2, 64)))
        assert (logits - reference(ids[None]).logits[0]).abs().max() < 1e-4


def test_names_a_missing_file(tmp_path: Path) -> None:
    command = [sys.executable, str(TRAIN), "--out", str(tmp_path / "m"), "--stories", str(tmp_path / "absent.txt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "absent.txt" in done.stderr
    assert "Traceback" not in done.stderr
