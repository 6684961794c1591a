"""Text to ids and back equals transformers' AutoTokenizer, on every tokenizer at hand; broken folders are named."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import CheckpointError, RequestError
from engine.tokenizer import Tokenizer, copy_tokenizer
from tests.conftest import shared
from tests.engine.tokenizer_folders import load, tokenizer_folder, tokenizers_root  # noqa: F401  (fixtures)

TEXTS = [
    "",
    "Hello",
    " Hello",
    "  two  spaces ",
    "a</s>b <s>c",
    "<s>x",
    "▁▁x",
    "Ünïcödé 漢字 🙂👩‍👩‍👧 \x00\t\n\r\n x",
    "Strasse e\u0301 \u00a0\u2028",
    "<|im_start|>user\nhi<|im_end|>\n",
    "1 22 333 4444 55555",
    "def f(x):\n    return  x**2  # ok\n",
    "<|start_story|> Once <unk> <|end_story|>",
    "a" * 3000,
]


@cache
def oracle(folder: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def check_same(folder: Path, text: str) -> None:
    ours, theirs = load(folder), oracle(folder)
    for special in (True, False):
        ids = ours.encode(text, add_special_tokens=special)
        assert ids == theirs.encode(text, add_special_tokens=special)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", TEXTS)
def test_same_ids_as_transformers(tokenizer_folder: Path, text: str):  # noqa: F811
    check_same(tokenizer_folder, text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.lists(st.one_of(st.text(), st.sampled_from(["<s>", "</s>", " ", "  ", "\n", "▁", "<|im_end|>"]))).map(
        "".join
    )
)
def test_same_ids_as_transformers_for_any_text(tokenizer_folder: Path, text: str):  # noqa: F811
    check_same(tokenizer_folder, text)


def test_named_tokens(tokenizer_folder: Path):  # noqa: F811
    ours, theirs = load(tokenizer_folder), oracle(tokenizer_folder)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    assert set(theirs.all_special_ids) <= ours.special_ids


def test_a_chat_prompt_has_one_bos():
    ours = Tokenizer.from_folder(shared("models/stories260K"))
    assert ours.encode("<s>Hi", add_special_tokens=False).count(ours.bos_id) == 1


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_copied_tokenizer_reads_the_same_beside_another_config(tmp_path: Path, family: str):
    """TinyStories-656K's LlamaTokenizer is rebuilt in a llama folder, and read as written in a mistral one."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    copy.mkdir()
    for file in shared("models/TinyStories-656K").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": family}))
    copy_tokenizer(source, copy)
    (copy / "config.json").write_text('{"model_type": "mla_server"}')
    for text in TEXTS:
        check_same(source, text)
        assert load(copy).encode(text) == load(source).encode(text)
    prefix_kept = load(source).encode(" Once") != load(source).encode("Once")
    assert prefix_kept == (family == "mistral")


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(RequestError, match="surrogate"):
        Tokenizer.from_folder(shared("models/stories260K")).encode("x\ud800")


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, "tokenizer.json: missing"),
        ({"tokenizer.json": "{"}, "tokenizer.json: not readable"),
        ({"tokenizer.json": "[]"}, "tokenizer.json: a JSON object"),
        ({"tokenizer.json": "{}"}, "tokenizer.json: decoder none is not supported"),
        ({"tokenizer.json": '{"decoder": {"type": "ByteLevel"}}'}, "tokenizer.json: not a usable tokenizer"),
        ({"tokenizer.json": '{"decoder": {"type": "WordPiece"}}'}, "decoder WordPiece is not supported"),
        ({"tokenizer_config.json": "nonsense"}, "tokenizer_config.json: not readable"),
    ],
)
def test_a_broken_folder_is_named(tmp_path: Path, files: dict[str, str], named: str):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=named):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(("template", "named"), [("{% if %}", "does not parse"), (5, "must be a string")])
def test_a_broken_template_is_named(tmp_path: Path, template: object, named: str):
    source = shared("models/stories260K/tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes(source.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match=f"tokenizer_config.json: .*{named}"):
        Tokenizer.from_folder(tmp_path)


def test_no_folder(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such folder"):
        Tokenizer.from_folder(tmp_path / "absent")
