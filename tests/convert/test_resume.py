"""Conversions that are killed, interrupted or run out of disk: the same command goes on, to the same bytes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from convert import conversion, partial, plan
from convert.cli import main
from convert.layer_store import LayerStore, TrialStore
from convert.partial import partial_folder, partial_work
from engine.checkpoint.writer import REPLACED
from tests.convert.sources import make_source, write_text

REPOSITORY = Path(__file__).resolve().parents[2]
LAYERS = 3
EXPORT = ["--export", "deepseek_v3"]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    source = make_source(tmp_path / "source", max_position_embeddings=64, num_hidden_layers=LAYERS)
    text = write_text(tmp_path / "text.txt", 3000)
    return ["--model", str(source), "--calibration", str(text)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def expected(tmp_path: Path, arguments: list[str]) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    assert main([*arguments, "--out", str(tmp_path / "undisturbed")]) == 0
    return contents(tmp_path / "undisturbed")


class Stop(BaseException):
    """As final as a signal."""


@contextmanager
def stopping_after(layers: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Convert so many layers, then raise Stop; 0: raise it once two candidates are tried on layer 1.

    -> how often statistics were collected.
    """
    collected: list[int] = []
    collect, keep_trial, keep_layer = plan.collect_attention, TrialStore.keep, LayerStore.keep

    def counted(*args: Any) -> Any:
        collected.append(1)
        return collect(*args)

    def trial(store: TrialStore, candidate: int, layer: int, made: Any) -> None:
        keep_trial(store, candidate, layer, made)
        if not layers and (candidate, layer) == (1, 1):
            raise Stop

    left = layers

    def converted(store: LayerStore, candidate: int, layer: int, made: Any) -> None:
        nonlocal left
        keep_layer(store, candidate, layer, made)
        left -= 1
        if not left:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(plan, "collect_attention", counted)
        patch.setattr(TrialStore, "keep", trial)
        patch.setattr(LayerStore, "keep", converted)
        yield collected


@pytest.mark.parametrize("how", ["writes", "moments"])
def test_killed_at_any_point(tmp_path: Path, arguments: list[str], how: str) -> None:
    """SIGKILL before every single file that is written, and at random moments; an earlier output stands until the end.

    Each attempt gets a little further than the one before. At random moments there are candidates to choose among.
    """
    out = tmp_path / "folder" / "out"
    assert main([*arguments, "--method", "exact", "--out", str(out)]) == 0
    if how == "writes":
        arguments = [*arguments, "--kv-lora-rank", "12", "--qk-rope-head-dim", "12"]
    assert main([*arguments, "--out", str(tmp_path / "undisturbed")]) == 0
    expected = contents(tmp_path / "undisturbed")
    command = [sys.executable, "-m", "tests.convert.killed_runs", how, "0", str(out), *arguments, "--overwrite"]
    found = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, check=True, timeout=120)
    result = json.loads(found.stdout)
    assert result["code"] == 0
    assert contents(out) == expected
    seen = [{Path(path).parts[0] for path in state} for state in result["states"]]
    assert seen[-1] == {"out"}
    assert all(state <= {"out", ".out.partial"} for state in seen)
    if how == "writes":
        assert len(seen) > 2 * LAYERS + 8
        # The one moment that the output is not in its place is between two renames, from which the next run recovers.
        assert {".out.partial"} in seen


def test_finished_layers_are_not_converted_again(
    tmp_path: Path,
    arguments: list[str],
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with stopping_after(0, monkeypatch) as collected, pytest.raises(Stop):
        main([*arguments, "--out", str(out)])
    assert len(collected) == 2  # of the layers that all splits were tried on
    with stopping_after(2, monkeypatch) as collected, pytest.raises(Stop):
        main([*arguments, "--out", str(out)])
    assert len(collected) == LAYERS - 1 + 2  # layers 1, for other candidates, and 2; then two to convert
    assert not (partial_folder(out) / "trials").exists()
    assert f"the same command continues, from what is in {partial_folder(out)}" in capsys.readouterr().err
    with stopping_after(LAYERS, monkeypatch) as collected:
        assert main([*arguments, "--out", str(out)]) == 0
    assert len(collected) == LAYERS - 2
    assert contents(out) == expected
    assert not partial_folder(out).exists()


@pytest.mark.parametrize("change", ["option", "text", "source"])
def test_another_request_starts_over(
    tmp_path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
) -> None:
    out = tmp_path / "out"
    with stopping_after(1, monkeypatch), pytest.raises(Stop):
        main([*arguments, "--out", str(out)])
    capsys.readouterr()
    if change == "option":
        arguments = [*arguments, "--seed", "1"]
    elif change == "text":
        write_text(tmp_path / "text.txt", 3000, seed=1)
    else:
        make_source(tmp_path / "source", max_position_embeddings=64, num_hidden_layers=LAYERS, seed=1)
    assert main([*arguments, "--out", str(out)]) == 0
    what = {"option": "seed", "text": "calibration text", "source": "state of the source"}[change]
    assert f"starting over: {partial_folder(out)} was begun with another {what}\n" in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path / "again")]) == 0
    assert contents(out) == contents(tmp_path / "again")


def test_a_second_process_is_refused(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with partial_work(out, {"request": 1}, "none") as (work, _):
        work.keep("mine", 1)
        assert main([*arguments, "--out", str(out)]) == 2
        assert f"error: {out}: another process is writing to it" in capsys.readouterr().err
        assert work.read("mine") == 1
    assert not partial_folder(out).exists()


def test_interrupted_as_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left, but what a process that was killed had set aside of an earlier output is back in its place."""
    out = tmp_path / "out"

    def stop(*_: Any) -> None:
        raise Stop

    monkeypatch.setattr(partial, "_claim", stop)
    for earlier in (False, True):
        if earlier:
            (partial_folder(out) / REPLACED).mkdir(parents=True)
            (partial_folder(out) / REPLACED / "config.json").write_text("{}")
        with pytest.raises(Stop), partial_work(out, {"request": 1}, None):
            pass
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")] == ["out/config.json"] * earlier
        assert not partial_folder(out).exists()


def test_a_full_disk(
    tmp_path: Path, arguments: list[str], expected: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel refuses to let a file grow, as it does when the disk is full; there is room later."""
    out = tmp_path / "folder" / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, kept in ((2000, False), (60_000, True)):  # less than the calibration text, and less than a layer
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            assert main([*arguments, "--out", str(out)]) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert "cannot be written: [Errno 27]" in lines[0]
        assert list(out.parent.iterdir()) == ([partial_folder(out)] if kept else [])
    assert main([*arguments, "--out", str(out)]) == 0
    assert contents(out) == expected


@pytest.mark.parametrize(("options", "cleanings"), [([], 0), (EXPORT, 0), (EXPORT, 1)])
def test_killed_while_cleaning_up(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, options: list[str], cleanings: int
) -> None:
    """All is in its place, partial work beside it still: after so many cleanings, first the export's, if there is one.

    The same command finds nothing left to do.
    """
    out = tmp_path / "folder" / "out"
    arguments += ["--method", "exact", *options, "--out", str(out)]
    remove, left = partial._remove, cleanings

    def killed(folder: Path) -> None:
        nonlocal left
        if not left:
            raise Stop
        left -= 1
        remove(folder)

    with monkeypatch.context() as patch:
        patch.setattr(partial, "_remove", killed)
        with pytest.raises(Stop):
            main(arguments)
    assert partial_folder(out).exists()
    names = ["out", *(["out-deepseek_v3"] if options else [])]
    before = [contents(out.with_name(name)) for name in names]
    written = (out / "config.json").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (out / "config.json").stat().st_mtime_ns == written
    assert [contents(out.with_name(name)) for name in names] == before
    assert sorted(path.name for path in out.parent.iterdir()) == names


def test_killed_while_exporting(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL before every single file that is written from the first of the export on: it is finished, and no more."""
    arguments += ["--kv-lora-rank", "12", "--qk-rope-head-dim", "12", "--refine", "none", *EXPORT]
    assert main([*arguments, "--out", str(tmp_path / "undisturbed")]) == 0
    expected = [contents(tmp_path / name) for name in ("undisturbed", "undisturbed-deepseek_v3")]
    out = tmp_path / "folder" / "out"
    exported = out.with_name("out-deepseek_v3")

    def killed(*_: Any, **__: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "export_model", killed)
        with pytest.raises(Stop):
            main([*arguments, "--out", str(out)])
    assert not exported.exists()
    written = (out / "config.json").stat().st_mtime_ns
    command = [sys.executable, "-m", "tests.convert.killed_runs", "writes", "0", str(out), *arguments]
    found = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, check=True, timeout=120)
    result = json.loads(found.stdout)
    assert result["code"] == 0
    assert len(result["states"]) > LAYERS + 4
    assert [contents(out), contents(exported)] == expected
    assert (out / "config.json").stat().st_mtime_ns == written  # not converted again
    assert sorted(out.parent.iterdir()) == [out, exported]
    capsys.readouterr()
    assert main([*arguments, "--out", str(out)]) == 2
    assert f"error: {out}: exists and is not empty" in capsys.readouterr().err
    assert [contents(out), contents(exported)] == expected
