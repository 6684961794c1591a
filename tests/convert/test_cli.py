"""The commands from end to end, as a user runs them: results, errors, and what they leave behind."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert.cli import main
from convert.layer_store import LayerStore
from convert.partial import partial_folder
from engine.checkpoint import open_checkpoint
from tests.checkpoint.folders import write_shards
from tests.convert.sources import BOS, EOS, make_source, oracle, write_text

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source", max_position_embeddings=64)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", 4000)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_convert_on_sampled_text_then_evaluate(
    tmp_path: Path, source: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--model", str(source), "--out", str(out), "--calibration-tokens", "512"]
    assert main([*arguments, "--json", str(tmp_path / "convert.json")]) == 0
    printed = capsys.readouterr().out
    assert "cache bytes per token" in printed
    errors = json.loads((tmp_path / "convert.json").read_text())["quality"]["attention_errors"]
    assert f"worst layer {errors.index(max(errors))} {max(errors):.2g}" in printed
    assert f"python -m server --model {out}" in printed
    report = json.loads((tmp_path / "convert.json").read_text())
    fit = ((80 << 30) - report["weight_bytes"]) // (64 * report["cache_bytes_per_token"])
    (line,) = (line for line in printed.splitlines() if "conversations of 64 tokens in 80 GiB" in line)  # the context
    assert line.endswith(f" {fit:,}")
    record = json.loads((out / "conversion.json").read_text())
    assert {key: report[key] for key in record} == record
    assert record["source"] == "source"
    assert str(tmp_path) not in json.dumps(record)
    assert record["method"] == "score-aware"
    assert record["calibration"]["source"] == "sampled from the source model"
    assert len(record["quality"]["attention_errors"]) == 2
    best = min(record["trials"], key=lambda trial: trial["kl"])
    assert record["options"]["sizes"] == best["sizes"]
    assert 0.8 < 2 * record["cache_bytes_per_token"] / record["source_cache_bytes_per_token"] <= 1
    spec = open_checkpoint(out).spec
    assert spec.cache_bytes_per_token(4) == record["cache_bytes_per_token"]
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert open_checkpoint(out).generation.eos_token_ids == (EOS,)

    evaluate = ["evaluate", "--model", str(out), "--reference", str(source), "--text", str(text)]
    assert main([*evaluate, "--json", str(tmp_path / "evaluate.json")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "evaluate.json").read_text())
    assert {"perplexity", "reference_perplexity", "kl", "top1_agreement"} < set(report)
    assert {"cache_bytes_per_token", "reference_cache_bytes_per_token"} < set(report)
    assert report["window"] == 64
    assert f"{report['perplexity']:.4f}" in printed
    assert report["kl"] > 0.01


@pytest.mark.parametrize("adds_bos", [True, False])
def test_evaluate_against_transformers(tmp_path: Path, text: Path, adds_bos: bool) -> None:
    """Two unrelated models on the same windows, in float64."""
    folders = [make_source(tmp_path / str(s), seed=s, adds_bos=adds_bos) for s in (1, 2)]
    arguments = ["--model", str(folders[1]), "--reference", str(folders[0]), "--text", str(text), "--window", "50"]
    assert main(["evaluate", *arguments, "--json", str(tmp_path / "e.json")]) == 0
    report = json.loads((tmp_path / "e.json").read_text())

    data = text.read_bytes()
    alphabet = json.loads((folders[0] / "tokenizer.json").read_text())["model"]["vocab"]
    spelled = {" ": "Ġ", "\n": "Ċ"}
    ids = [alphabet[spelled.get(chr(byte), chr(byte))] for byte in data]
    windows = [[BOS, *ids[i : i + 49]] for i in range(0, len(ids), 49)]
    if not adds_bos:
        windows = [ids[i : i + 50] for i in range(0, len(ids) - 1, 49)]
    nll, kl, agreed, count = [0.0, 0.0], 0.0, 0, 0
    models = [oracle(folder, torch.float64) for folder in folders]
    for window in windows:
        with torch.inference_mode():
            p, q = (m(torch.tensor([window])).logits[0, :-1].log_softmax(-1) for m in models)
        targets = torch.tensor(window[1:])[:, None]
        nll = [n - x.gather(1, targets).sum().item() for n, x in zip(nll, (p, q), strict=True)]
        kl += (p.exp() * (p - q)).sum().item()
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(targets)
    assert report["tokens"] == count == (len(data) if adds_bos else len(data) - 1)
    assert report["reference_perplexity"] == pytest.approx(math.exp(nll[0] / count), rel=1e-4)
    assert report["perplexity"] == pytest.approx(math.exp(nll[1] / count), rel=1e-4)
    assert report["kl"] == pytest.approx(kl / count, rel=1e-4)
    assert report["top1_agreement"] == pytest.approx(agreed / count, abs=2 / count)
    assert report["bits_per_byte"] == pytest.approx(nll[1] / math.log(2) / count, rel=1e-4)  # a byte a token


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(tmp_path: Path, source: Path, text: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    """On a terminal, with what refinement did for each layer; elsewhere nothing at all."""
    shown = Terminal() if terminal else io.StringIO()
    sizes = ["--kv-lora-rank", "8", "--qk-rope-head-dim", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", shown)
        assert main(["--model", str(source), "--out", str(tmp_path / "out"), "--calibration", str(text), *sizes]) == 0
    if not terminal:
        assert shown.getvalue() == ""
        return
    last = json.loads((tmp_path / "out" / "conversion.json").read_text())["refinement"][-1]
    errors = f"error {last['error_before']:.3g} -> {last['error_after']:.3g}"
    assert re.search(rf"converting: 100%.* 2/2 .*{errors}", shown.getvalue())
    assert "fitting, learning rate" in shown.getvalue()


def test_same_seed_same_files(tmp_path: Path, source: Path) -> None:
    arguments = ["--model", str(source), "--calibration-tokens", "256"]
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main([*arguments, "--out", str(tmp_path / name), "--seed", seed]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    weights = [contents(tmp_path / name)["model.safetensors"] for name in "ac"]
    assert weights[0] != weights[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_of_the_output(tmp_path: Path, source: Path, text: Path, dtype: str) -> None:
    out = tmp_path / "out"
    arguments = ["--model", str(source), "--out", str(out), "--calibration", str(text)]
    assert main([*arguments, "--dtype", dtype]) == 0
    assert {str(t.dtype) for t in load_file(out / "model.safetensors").values()} == {f"torch.{dtype}"}
    record = json.loads((out / "conversion.json").read_text())
    element = 4 if dtype == "float32" else 2
    assert record["cache_bytes_per_token"] == element * open_checkpoint(out).spec.cache_bytes_per_token(1)


def test_too_little_text_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_source(tmp_path / "source", num_key_value_heads=4, head_dim=24)
    for chars, expected in ((150, True), (4000, False)):
        text = write_text(tmp_path / "text.txt", chars)
        arguments = ["--model", str(source), "--out", str(tmp_path / "out"), "--calibration", str(text), "--overwrite"]
        assert main(arguments) == 0
        said = "cannot tell 192 dimensions of keys and values apart" in capsys.readouterr().out
        assert said == bool(json.loads((tmp_path / "out" / "conversion.json").read_text())["warnings"]) == expected


TRANSMLA = ("--method", "transmla")
CONVERT_ERRORS: dict[str, tuple[list[str], str]] = {
    "ratio above 1": (["--cache-ratio", "1.5"], "--cache-ratio 1.5 is out of range"),
    "ratio 0": (["--cache-ratio", "0"], "--cache-ratio 0 is out of range"),
    "ratio too small": (["--cache-ratio", "0.01"], "leaves no room"),
    "rank alone": (["--kv-lora-rank", "8"], "go together"),
    "rope alone": (["--qk-rope-head-dim", "4"], "go together"),
    "ratio and rank": (["--cache-ratio", ".5", "--kv-lora-rank", "8", "--qk-rope-head-dim", "4"], "not both"),
    "rope dim no divisor": (
        [*TRANSMLA, "--kv-lora-rank", "8", "--qk-rope-head-dim", "8"],
        "must be even and divide 12",
    ),
    "odd rope dim": (["--kv-lora-rank", "8", "--qk-rope-head-dim", "3"], "must be even, between 2 and the 24"),
    "negative rank": (["--kv-lora-rank", "-1", "--qk-rope-head-dim", "4"], "--kv-lora-rank -1 is out of range"),
    "rank too large": (["--kv-lora-rank", "45", "--qk-rope-head-dim", "4"], "between 1 and 44"),
    "freqfold": ([*TRANSMLA, "--freqfold", "4"], "--freqfold 4 does not fit"),
    "freqfold of another method": (["--freqfold", "4"], "--freqfold is an option of --method transmla"),
    "svd of another method": (["--svd", "joint"], "--svd is an option of --method mha2mla"),
    "exact with a ratio": (["--method", "exact", "--cache-ratio", "0.5"], "as large as the source's"),
    "exact with a freqfold": (["--method", "exact", "--freqfold", "2"], "--freqfold is an option of --method transmla"),
    "few tokens": (["--calibration-tokens", "3"], "--calibration-tokens 3 is too few"),
    "no such text": (["--calibration", "nowhere.txt"], "nowhere.txt: cannot be read"),
    "json nowhere": (["--json", "nowhere/x.json"], "--json nowhere/x.json: cannot be written"),
    "device": (["--device", "tpu"], "tpu"),
    "no such model": (["--model", "nowhere"], "nowhere: no such folder"),
}


@pytest.mark.parametrize(("options", "message"), CONVERT_ERRORS.values(), ids=CONVERT_ERRORS.keys())
def test_errors_of_convert(
    tmp_path: Path, source: Path, text: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    folder = tmp_path / "folder"
    arguments = ["--model", str(source), "--out", str(folder / "out"), "--calibration", str(text), *options]
    assert_fails(main(arguments), capsys, message)
    assert not folder.exists() or not any(folder.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cache-ratio", "much"], "invalid float value: 'much'"),
        (["--freqfold", "0"], "'0' is neither a positive number nor auto"),
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["evaluate"], "unrecognized arguments: evaluate"),
    ],
)
def test_errors_of_usage(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--model", "a", "--out", "b", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def assert_fails(code: int, capsys: pytest.CaptureFixture[str], message: str) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]


def test_a_converted_model_is_not_converted_again(
    tmp_path: Path, source: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--method", "exact", "--calibration", str(text)]
    assert main(["--model", str(source), "--out", str(tmp_path / "a"), *arguments]) == 0
    again = main(["--model", str(tmp_path / "a"), "--out", str(tmp_path / "b"), *arguments])
    assert_fails(again, capsys, "already uses latent attention")


def test_overwriting(tmp_path: Path, source: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--model", str(source), "--out", str(out), "--calibration", str(text), "--method", "exact"]
    assert main(arguments) == 0
    before = contents(out)
    assert_fails(main(arguments), capsys, "exists and is not empty")
    assert contents(out) == before
    assert main([*arguments, "--dtype", "bfloat16", "--overwrite"]) == 0
    assert contents(out) != before
    assert_fails(main([*arguments, "--out", str(source), "--overwrite"]), capsys, "source model")
    assert_fails(main([*arguments, "--out", str(tmp_path), "--overwrite"]), capsys, "source model")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_a_failure_midway_leaves_the_earlier_output_and_what_is_finished(
    tmp_path: Path,
    source: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: type[BaseException],
) -> None:
    out = tmp_path / "folder" / "out"
    arguments = ["--model", str(source), "--out", str(out), "--calibration", str(text), "--method", "exact"]
    assert main(arguments) == 0
    before = contents(out)

    def keep_once(*args: Any) -> None:
        keep(*args)
        raise failure

    keep = LayerStore.keep
    monkeypatch.setattr(LayerStore, "keep", keep_once)
    if failure is RuntimeError:  # a fault of the program's own is not hidden
        with pytest.raises(RuntimeError):
            main([*arguments, "--overwrite"])
    else:
        assert main([*arguments, "--overwrite"]) == (130 if failure is KeyboardInterrupt else 2)
    assert "the same command continues" in capsys.readouterr().err
    assert sorted((tmp_path / "folder").iterdir()) == [partial_folder(out), out]
    assert contents(out) == before
    monkeypatch.undo()
    assert main([*arguments, "--overwrite"]) == 0
    assert list((tmp_path / "folder").iterdir()) == [out]
    assert contents(out) == before


def test_a_run_terminated_before_anything_is_finished_leaves_nothing(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    command = [sys.executable, "-m", "convert", "--model", str(source), "--out", str(folder / "out")]
    process = subprocess.Popen([*command, "--calibration-tokens", "1000000"], cwd=REPOSITORY, env=os.environ)
    try:
        deadline = time.monotonic() + 60
        while not any(folder.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    finally:
        process.kill()
        process.wait()
    assert not any(folder.iterdir())


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
LAST = "model.layers.1.self_attn.v_proj.weight"


def edit_shard(folder: Path, edit: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(folder / SHARDS[1])
    save_file({**tensors, LAST: edit(tensors[LAST])}, folder / SHARDS[1])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def drop_from_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][LAST]
    path.write_text(json.dumps(index))


DAMAGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "truncated shard": (lambda source, _: truncate(source / SHARDS[1]), f"{SHARDS[1]}: truncated or corrupt"),
    "NaN in the last layer": (lambda source, _: edit_shard(source, lambda t: t * math.nan), f"tensor {LAST} has"),
    "wrong dtype": (lambda source, _: edit_shard(source, lambda t: t.to(torch.int8)), f"tensor {LAST} has dtype I8"),
    "missing index entry": (lambda source, _: drop_from_index(source), f"weight_map lacks tensor {LAST}"),
    "missing shard": (lambda source, _: (source / SHARDS[1]).unlink(), f"{SHARDS[1]}: no such file"),
    "empty text": (lambda _, text: text.write_text(" \n"), "text.txt: is empty"),
    "not UTF-8": (lambda _, text: text.write_bytes(b"caf\xe9 " * 999), "text.txt: not UTF-8 text (byte 3)"),
    "too little text": (lambda _, text: text.write_text("a few words"), "tokens are too few to calibrate on"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_input(
    tmp_path: Path,
    source: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path, Path], object],
    message: str,
) -> None:
    """One error; the source, an earlier output and all around it stay as they were."""
    tensors = load_file(source / "model.safetensors")
    last = {name: t for name, t in tensors.items() if name.startswith("model.layers.1.")}
    write_shards(source, dict(zip(SHARDS, ({n: t for n, t in tensors.items() if n not in last}, last), strict=True)))
    out = tmp_path / "folder" / "out"
    arguments = ["--model", str(source), "--calibration", str(text), "--out", str(out), "--overwrite"]
    assert main([*arguments, "--method", "exact"]) == 0
    damage(source, text)
    before = contents(source), contents(out)
    capsys.readouterr()
    assert_fails(main(arguments), capsys, message)
    assert (contents(source), contents(out)) == before
    assert list(out.parent.iterdir()) == [out]


def test_errors_of_evaluate(tmp_path: Path, source: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(model: Path, reference: Path, *options: str) -> int:
        arguments = ["evaluate", "--model", str(model), "--reference", str(reference), "--text", str(text)]
        return main([*arguments, *options])

    wider = make_source(tmp_path / "wider", vocab_size=300)
    assert_fails(run(wider, source), capsys, "a vocabulary of 300 tokens")
    without_bos = make_source(tmp_path / "without", adds_bos=False)
    assert_fails(run(without_bos, source), capsys, "different tokenizers")
    assert_fails(run(source, source, "--window", "65"), capsys, "--window 65 is out of range")
    assert_fails(run(source, source, "--window", "1"), capsys, "--window 1 is out of range")
    assert_fails(run(source, tmp_path / "nowhere"), capsys, "no such folder")
    assert_fails(run(source, source, "--text", str(tmp_path)), capsys, "cannot be read")
    assert_fails(run(source, source, "--json", str(tmp_path)), capsys, "--json")
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert_fails(run(source, source, "--text", str(empty)), capsys, "is empty")


def test_one_token_without_bos_cannot_be_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_source(tmp_path / "source", adds_bos=False)
    (tmp_path / "a.txt").write_text("a")
    arguments = ["--model", str(source), "--reference", str(source), "--text", str(tmp_path / "a.txt")]
    assert_fails(main(["evaluate", *arguments]), capsys, "too short")


@pytest.mark.parametrize("command", [[], ["evaluate"], ["compare"], ["export"]])
def test_help(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: {' '.join(['python -m convert', *command])} [-h] --model" in printed
