"""Streamed pieces joined are the whole decode, cut at the first stop string, whatever the tokens and the splits."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.sampling_params import SamplingParams
from engine.stop_strings import StopStrings
from engine.text_stream import TextStream
from engine.tokenizer import Tokenizer
from tests.conftest import shared
from tests.engine.tokenizer_folders import load, tokenizer_folder, tokenizers_root  # noqa: F401  (fixtures)

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def stream(tokenizer: Tokenizer, ids: list[int], params: SamplingParams, seed: int = 0) -> tuple[list[str], TextStream]:
    """Push `ids` in random groups, the last of them finished; the pieces."""
    rng, text, pieces, start = random.Random(seed), TextStream(tokenizer, params), [], 0
    while start < len(ids):
        end = start + rng.randrange(1, 4)
        pieces.append(text.push(ids[start:end], finished=end >= len(ids) and rng.random() < 0.5))
        start = end
    return [*pieces, text.push([], finished=True)], text


def cut(text: str, stops: tuple[str, ...], include: bool) -> str:
    """The reference: the occurrence that ends first, of those the longest stop string."""
    found = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not found:
        return text
    end, minus_length = min(found)
    return text[: end if include else end + minus_length]


def token_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Sequences rich in raw bytes, halves of characters and special tokens."""
    anything = st.integers(0, tokenizer.vocab_size - 1)
    parts = [i for i in range(min(tokenizer.vocab_size, 3000)) if _is_part(tokenizer.token_bytes(i))]
    special = sorted(tokenizer.special_ids)
    return st.lists(st.one_of([anything, *(st.sampled_from(ids) for ids in (parts, special) if ids)]), max_size=20)


def _is_part(raw: bytes) -> bool:
    try:
        return not raw.decode()
    except UnicodeDecodeError:
        return True


@quick
@given(data=st.data(), skip=st.booleans(), seed=st.integers(0, 99))
def test_any_ids_give_the_whole_decode(tokenizer_folder: Path, data, skip: bool, seed: int):  # noqa: F811
    tokenizer = load(tokenizer_folder)
    ids = data.draw(token_ids(tokenizer))
    pieces, _ = stream(tokenizer, ids, SamplingParams(skip_special_tokens=skip), seed)
    assert "".join(pieces) == tokenizer.decode(ids, skip)


@quick
@given(text=st.text(), seed=st.integers(0, 99))
def test_real_text_never_shows_half_a_character(tokenizer_folder: Path, text: str, seed: int):  # noqa: F811
    tokenizer = load(tokenizer_folder)
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    pieces, _ = stream(tokenizer, ids, SamplingParams(), seed)
    shown = ""
    for piece in pieces:
        shown += piece
        assert whole.startswith(shown)
    assert shown == whole


@quick
@given(
    text=st.text("abAB ü漢", max_size=40),
    stops=st.lists(st.text("abAB ü漢", min_size=1, max_size=5), max_size=4).map(tuple),
    include=st.booleans(),
    seed=st.integers(0, 99),
)
def test_stop_strings(tokenizer_folder: Path, text, stops, include: bool, seed: int):  # noqa: F811
    tokenizer = load(tokenizer_folder)
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    pieces, state = stream(tokenizer, ids, SamplingParams(stop=stops, include_stop_str_in_output=include), seed)
    assert "".join(pieces) == cut(whole, stops, include)
    assert (state.stopped is not None) == any(stop in whole for stop in stops)


@quick
@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4))
def test_no_more_is_held_than_could_become_a_stop_string(text: str, stops: list[str]):
    search, seen = StopStrings(stops), ""
    for char in text:
        if search.feed(char) is not None:
            break
        seen += char
        tails = [n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])]
        assert search.held == max(tails)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@quick
@given(ids=st.lists(st.integers(0, 4), max_size=8))
def test_a_metaspace_decoder(tmp_path_factory, scheme: str, ids: list[int]):
    folder = tmp_path_factory.getbasetemp() / f"metaspace-{scheme}"
    if not folder.exists():
        folder.mkdir()
        vocab = {"▁": 0, "▁a": 1, "b": 2, "▁▁c": 3, "d▁": 4}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
        backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
        backend.save(str(folder / "tokenizer.json"))
    tokenizer = load(folder)
    pieces, _ = stream(tokenizer, ids, SamplingParams())
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.fixture
def stories() -> Tokenizer:
    return load(shared("models/stories260K"))


def test_text_is_shown_as_soon_as_it_is_safe(stories: Tokenizer):
    text = TextStream(stories, SamplingParams(stop=("day!",)))
    shown = [text.push([i]) for i in stories.encode("One day, one day! She", add_special_tokens=False)]
    assert text.stopped == "day!"
    assert "".join(shown) == "One day, one "
    assert shown[0]  # nothing is held that cannot begin a stop string


def test_stop_strings_wait_for_min_tokens(stories: Tokenizer):
    ids = stories.encode("One day, one day", add_special_tokens=False)
    first = len(stories.encode("One day", add_special_tokens=False))
    pieces, state = stream(stories, ids, SamplingParams(stop=("day",), min_tokens=first))
    assert "".join(pieces) == "One day, one "
    assert state.stopped == "day"


def test_a_continuation_keeps_its_first_space(stories: Tokenizer):
    prompt, more = "Once upon a", " time there was"
    ids = stories.encode(prompt + more, add_special_tokens=False)
    ids = ids[len(stories.encode(prompt, add_special_tokens=False)) :]
    assert TextStream(stories, SamplingParams(), continues_text=True).push(ids, finished=True) == more
    assert TextStream(stories, SamplingParams()).push(ids, finished=True) == more[1:] == stories.decode(ids)


@pytest.mark.parametrize("include", [False, True])
def test_the_stop_token_is_no_text(stories: Tokenizer, include: bool):
    ids = stories.encode("One day", add_special_tokens=False)
    text = TextStream(stories, SamplingParams(include_stop_str_in_output=include))
    shown = text.push(ids, finished=True, ended_by_token=True)
    assert shown == stories.decode(ids if include else ids[:-1])


def test_long_outputs_cost_linear_time(stories: Tokenizer):
    """Counted, not timed: every token's piece is looked up once."""
    calls = 0
    original = stories.piece

    class Counting:
        pieces, special_ids, first_piece = stories.pieces, stories.special_ids, staticmethod(stories.first_piece)

        @staticmethod
        def piece(token_id: int):
            nonlocal calls
            calls += 1
            return original(token_id)

    text = TextStream(Counting(), SamplingParams(stop=("never",)))  # type: ignore[arg-type]
    for _ in range(5000):
        text.push([300])
    assert calls == 4999
