"""Texts, windows, and the parts that a calibration is split into."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from convert import calibration
from convert.errors import ConversionError
from convert.text import cut_windows, read_text, window_bos
from engine.checkpoint import open_checkpoint
from engine.core import EngineCore
from engine.tokenizer import Tokenizer
from tests.convert.sources import ASSISTANT, BOS, EOS, USER, VOCAB, make_source, write_text


@pytest.mark.parametrize("bos", [None, 99])
@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 11, 100])
def test_every_token_is_predicted_once(count: int, bos: int | None) -> None:
    ids = list(range(count))
    windows = cut_windows(ids, 10, bos)
    predicted = [token for window in windows for token in window[1:]]
    assert predicted == (ids[1:] if bos is None else ids)
    assert all(1 < len(window) <= 10 for window in windows)
    assert all(len(window) == 10 for window in windows[:-1])
    if bos is not None:
        assert all(window[0] == bos for window in windows)


def test_window_bos_is_what_the_tokenizer_adds(tmp_path: Path) -> None:
    for adds_bos, expected in ((True, BOS), (False, None)):
        source = make_source(tmp_path / str(adds_bos), adds_bos=adds_bos)
        assert window_bos(Tokenizer.from_folder(source)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n\t\n", "is empty"), (b"good so far \xff\xfe", "not UTF-8 text.*byte 12"), (None, "read")],
)
def test_bad_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConversionError, match=message) as caught:
        read_text(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("context", "lengths"), [(64, {64}), (512, {256, 512})])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_parts_share_no_predicted_token(tmp_path: Path, adds_bos: bool, context: int, lengths: set[int]) -> None:
    folder = make_source(tmp_path / "source", max_position_embeddings=context, adds_bos=adds_bos)
    source, path = open_checkpoint(folder), write_text(tmp_path / "text.txt", 60_000)
    found = calibration.from_files(source, [path], 8192, 0)
    assert found.record == {
        "source": "files", "files": ["text.txt"], "windows": sorted(lengths), "tokens": 8192, "held_out_tokens": 1024
    }  # fmt: skip
    # Three quarters in long windows; of what is too little for that, half.
    for part, tokens, far in ((found.fit, 8192, 6144), (found.select, 1024, 512), (found.check, 1024, 512)):
        assert sum(map(len, part)) == tokens
        assert {len(window) for window in part} == lengths
        assert sum(len(window) for window in part if len(window) == context) == (tokens if context == 64 else far)
    every = [*found.select, *found.check, *found.fit]
    # Windows overlap by the one token that gives context, and by nothing else.
    assert all(b[0] == (BOS if adds_bos else a[-1]) for a, b in pairwise(every))
    text = Tokenizer.from_folder(source.path).decode([t for window in every for t in window[1:]])
    assert all(line in path.read_text() for line in text.splitlines()[1:-1])
    assert len(text) == sum(len(window) - 1 for window in every)


def test_same_seed_same_text(tmp_path: Path) -> None:
    source = open_checkpoint(make_source(tmp_path / "source"))
    paths = [write_text(tmp_path / f"{i}.txt", 50_000, seed=i) for i in range(2)]
    drawn = [calibration.from_files(source, paths, 2048, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert drawn[0].fit != drawn[2].fit


def test_a_short_text_gives_what_it_has(tmp_path: Path) -> None:
    source = open_checkpoint(make_source(tmp_path / "source"))
    found = calibration.from_files(source, [write_text(tmp_path / "text.txt", 600)], 32768, 0)
    assert min(map(len, (found.fit, found.select, found.check))) >= 1
    assert found.record["tokens"] == sum(map(len, found.fit)) < 600
    (tmp_path / "shorter.txt").write_text("too short to learn from")
    with pytest.raises(ConversionError, match=r"shorter\.txt: 23 tokens are too few"):
        calibration.from_files(source, [tmp_path / "shorter.txt"], 32768, 0)


@pytest.mark.parametrize("chat", [False, True])
def test_text_sampled_from_the_model(tmp_path: Path, chat: bool) -> None:
    source = open_checkpoint(make_source(tmp_path / "source", chat=chat, max_position_embeddings=64))
    drawn = [calibration.from_model(source, 1024, seed, "cpu") for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert drawn[0].fit != drawn[2].fit
    ids = [t for window in drawn[0].fit for t in window[1:]]
    assert sum(map(len, drawn[0].fit)) == 1024
    assert all(0 <= t < VOCAB for t in ids)


@pytest.mark.parametrize("chat", [False, True])
def test_half_of_the_samples_are_chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: bool) -> None:
    """Their prompts are `<s><|user|>` and then `<s><|user|>` the words drawn `</s><|assistant|>`."""
    prompts: list[list[int]] = []
    add = EngineCore.add
    monkeypatch.setattr(EngineCore, "add", lambda core, r: (prompts.append(r.prompt_ids), add(core, r)))
    source = open_checkpoint(make_source(tmp_path / "source", chat=chat, max_position_embeddings=64))
    calibration.from_model(source, 2048, 0, "cpu")
    plain = [p for p in prompts if p == [BOS]]
    openings = [p for p in prompts if p == [BOS, USER]]
    replies = [p for p in prompts if p[:2] == [BOS, USER] and p[-2:] == [EOS, ASSISTANT]]
    assert len(plain) + len(openings) + len(replies) == len(prompts)
    assert len(plain) >= len(openings) >= len(replies)
    assert bool(replies) == bool(openings) == chat
    assert len(openings) >= len(plain) - 20 or not chat


def test_a_model_with_nothing_to_start_from(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", bos_token_id=None, eos_token_id=None)
    (source / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(ConversionError, match="give calibration text with --calibration"):
        calibration.from_model(open_checkpoint(source), 1024, 0, "cpu")
