"""`convert compare`: its rows are what converting and evaluating give, and it keeps its texts apart."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from convert import compare
from convert.cli import main
from tests.convert.sources import make_source, write_text

METHODS = ("score-aware", "transmla", "mha2mla", "care")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source", max_position_embeddings=64, num_hidden_layers=2)


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """To calibrate on, and to measure on."""
    return write_text(tmp_path / "a.txt", 3000), write_text(tmp_path / "b.txt", 1500, seed=1)


def run(source: Path, texts: tuple[Path, Path], *options: str) -> list[str]:
    arguments = ["compare", "--model", str(source), "--calibration", str(texts[0]), "--text", str(texts[1])]
    return [*arguments, "--calibration-tokens", "512", *options]


def assert_fails(code: int, capsys: pytest.CaptureFixture[str], message: str) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("refinements", "methods"),
    [(("none",), METHODS), (("layer",), ("transmla",)), (("none", "joint"), ("score-aware",))],
)
def test_rows_are_what_converting_and_evaluating_give(
    tmp_path: Path,
    source: Path,
    texts: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    refinements: tuple[str, ...],
    methods: tuple[str, ...],
) -> None:
    """However many conversions go together in one pass."""
    monkeypatch.setattr(compare, "GROUP_BYTES", 1 << 20)
    options = ["--cache-ratios", "0.5", "--methods", *methods, "--refine", *refinements]
    assert main(run(source, texts, *options, "--json", str(tmp_path / "c.json"))) == 0
    report = json.loads((tmp_path / "c.json").read_text())
    assert [(row["method"], row["refine"]) for row in report["rows"]] == list(product(methods, refinements))
    for row in report["rows"]:
        out = tmp_path / f"{row['method']}-{row['refine']}"
        arguments = ["--model", str(source), "--out", str(out), "--method", row["method"], "--cache-ratio", "0.5"]
        arguments += ["--refine", row["refine"]]
        assert main([*arguments, "--calibration", str(texts[0]), "--calibration-tokens", "512"]) == 0
        evaluate = ["evaluate", "--model", str(out), "--reference", str(source), "--text", str(texts[1])]
        assert main([*evaluate, "--json", str(tmp_path / "e.json")]) == 0
        expected = json.loads((tmp_path / "e.json").read_text())
        assert expected.keys() | {"method", "cache_ratio", "refine", "options", "layers"} == row.keys()
        record = json.loads((out / "conversion.json").read_text())
        assert row["layers"] == record["layers"]
        assert row["options"].items() <= record["options"].items()
        same = ("tokens", "window", "text", "cache_bytes_per_token", "reference_cache_bytes_per_token")
        assert {key: row[key] for key in same} == {key: expected[key] for key in same}
        for key in ("perplexity", "reference_perplexity", "kl", "top1_agreement", "bits_per_byte"):
            assert row[key] == pytest.approx(expected[key], rel=1e-3), key
        assert len(row["kl_by_position"]) == 6


def test_what_cannot_be_made_says_why(
    tmp_path: Path, source: Path, texts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--methods", "exact", "transmla", "--cache-ratios", "1.0", "0.5", "0.02"]
    plot = tmp_path / "c.png"
    assert main(run(source, texts, *options, "--json", str(tmp_path / "c.json"), "--plot", str(plot))) == 0
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    found = {(row["method"], row["cache_ratio"]): row for row in rows}
    assert len(found) == 6
    assert found["exact", 1.0]["kl"] < 1e-6
    assert found["exact", 1.0]["top1_agreement"] > 0.99
    assert found["exact", 1.0]["cache_bytes_per_token"] == found["exact", 1.0]["reference_cache_bytes_per_token"]
    errors = {key: row["error"] for key, row in found.items() if "error" in row}
    assert errors.keys() == {("exact", 0.5), ("exact", 0.02), ("transmla", 0.02)}
    assert "as large as the source's" in errors["exact", 0.5]
    assert "leaves no room" in errors["transmla", 0.02]
    printed = capsys.readouterr().out
    assert f"transmla at 2.0%: {errors['transmla', 0.02]}" in printed
    assert f"{found['transmla', 0.5]['kl']:.4g}" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_nothing_that_can_be_made(source: Path, texts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert_fails(main(run(source, texts, "--cache-ratios", "0.001")), capsys, "leaves no room")
    assert_fails(main(run(source, texts, "--cache-ratios", "2")), capsys, "out of range")


def test_the_source_writes_calibration_text(tmp_path: Path, source: Path, texts: tuple[Path, Path]) -> None:
    arguments = ["compare", "--model", str(source), "--text", str(texts[1]), "--calibration-tokens", "256"]
    options = ["--methods", "transmla", "--cache-ratios", "0.5", "--json", str(tmp_path / "c.json")]
    assert main([*arguments, *options]) == 0
    report = json.loads((tmp_path / "c.json").read_text())
    assert report["calibration"]["source"] == "sampled from the source model"


@pytest.mark.parametrize("how", ["path", "copy", "another way to the same file"])
def test_one_text_is_not_for_both(
    tmp_path: Path, source: Path, texts: tuple[Path, Path], capsys: pytest.CaptureFixture[str], how: str
) -> None:
    other: Any = {
        "path": texts[0],
        "copy": tmp_path / "copy.txt",
        "another way to the same file": tmp_path / "source" / ".." / "a.txt",
    }[how]
    other.write_text(texts[0].read_text())
    assert_fails(main(run(source, (texts[0], other))), capsys, "are the same text")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibration-tokens", "3"], "--calibration-tokens 3 is too few"),
        (["--window", "65"], "--window 65 is out of range: the model allows 2 to 64 tokens"),
        (["--json", "nowhere/x.json"], "--json nowhere/x.json: cannot be written"),
        (["--plot", "nowhere/x.png"], "--plot nowhere/x.png: cannot be written"),
        (["--plot", "x.doc"], "must end in .png, .svg or .pdf"),
        (["--text", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--calibration", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--model", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_errors(
    source: Path, texts: tuple[Path, Path], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert_fails(main(run(source, texts, *options)), capsys, message)


def test_evaluate_draws_kl_by_position(tmp_path: Path, source: Path, texts: tuple[Path, Path]) -> None:
    arguments = ["evaluate", "--model", str(source), "--reference", str(source), "--text", str(texts[1])]
    assert main([*arguments, "--plot", str(tmp_path / "e.svg"), "--json", str(tmp_path / "e.json")]) == 0
    assert "<svg" in (tmp_path / "e.svg").read_text()
    buckets = json.loads((tmp_path / "e.json").read_text())["kl_by_position"]
    assert [(b["from"], b["to"]) for b in buckets] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63)]
