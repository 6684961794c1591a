"""The offline API on a real checkpoint: text in, text out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.errors import RequestError
from engine.llm import LLM
from engine.sampling_params import SamplingParams
from tests.conftest import shared

PROMPTS = ["Once upon a time", "The dog ran to", "One day, Lily and her mom went", "Tom was"]
GREEDY = SamplingParams(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def folder() -> Path:
    return shared("models/tinystories-gqa64")


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, device="cpu", cache_tokens=4096)


def assert_idle(llm: LLM) -> None:
    llm.core.scheduler.check()
    stats = llm.core.stats()
    assert (stats.num_running, stats.num_waiting, stats.free_blocks) == (0, 0, stats.total_blocks)


def test_text_is_that_of_transformers(llm: LLM, folder: Path):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    completions = llm.generate(PROMPTS, GREEDY, progress=False)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()
        assert completion.prompt_ids == ids[0].tolist()
        assert completion.token_ids == expected
        whole = tokenizer.decode(ids[0].tolist() + expected, skip_special_tokens=True)
        assert whole == tokenizer.decode(ids[0], skip_special_tokens=True) + completion.text
    assert_idle(llm)


def test_a_stream_is_the_completion_in_pieces(llm: LLM):
    for params in (GREEDY, SamplingParams(seed=5, max_tokens=40, stop=("the", "."))):
        (completion,) = llm.generate(PROMPTS[:1], params, progress=False)
        pieces = list(llm.stream(PROMPTS[0], params))
        assert len(pieces) > 1
        assert "".join(pieces) == completion.text


def test_a_stop_string_ends_the_request_and_the_text_before_it(llm: LLM):
    whole = llm.generate(PROMPTS, GREEDY, progress=False)
    stop = whole[0].text[20:24]
    params = SamplingParams(temperature=0, max_tokens=40, stop=(stop,))
    for free, stopped in zip(whole, llm.generate(PROMPTS, params, progress=False), strict=True):
        if stop in free.text:
            assert stopped.text == free.text[: free.text.index(stop)]
            assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
            assert len(stopped.token_ids) < 40
        else:
            assert stopped == free
    assert_idle(llm)


def test_one_params_for_each_prompt(llm: LLM):
    each = [SamplingParams(temperature=0, max_tokens=n, logprobs=n - 1) for n in (1, 2, 3, 4)]
    completions = llm.generate(PROMPTS, each, progress=False)
    assert [len(c.token_ids) for c in completions] == [1, 2, 3, 4]
    assert [len(c.logprobs or []) for c in completions] == [1, 2, 3, 4]
    assert completions[3].logprobs is not None
    assert all(token == p.top[0][0] for token, p in zip(completions[3].token_ids, completions[3].logprobs, strict=True))
    with pytest.raises(RequestError, match="4 prompts came with 1"):
        llm.generate(PROMPTS, each[:1])


def test_streams_run_interleaved_and_may_be_dropped(llm: LLM):
    expected = [completion.text for completion in llm.generate(PROMPTS, GREEDY, progress=False)]
    streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS]
    texts = [next(stream) for stream in streams]
    streams[3].close()
    assert llm.core.stats().num_running == 3
    for i in range(3):
        texts[i] += "".join(streams[i])
    assert texts[:3] == expected[:3]
    assert_idle(llm)


def test_token_ids_are_prompts_too(llm: LLM):
    (by_text,) = llm.generate(PROMPTS[:1], GREEDY, progress=False)
    (by_ids,) = llm.generate([by_text.prompt_ids], GREEDY, progress=False)
    assert by_ids == by_text


def test_a_bad_prompt_refuses_the_lot(llm: LLM):
    for prompts, words in (([[1], []], "empty"), ([[1], [10**9]], "vocabulary"), (["a", "b" * 20_000], "context")):
        with pytest.raises(RequestError, match=words):
            llm.generate(prompts, GREEDY)
        assert_idle(llm)
    with pytest.raises(RequestError, match="list"):
        llm.generate("Once")
    with pytest.raises(RequestError, match="chat template"):
        llm.chat([{"role": "user", "content": "Hello"}])


def test_an_interrupt_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    step, calls = llm.core.step, []

    def interrupted() -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(llm.core, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY, progress=False)
    assert_idle(llm)
    assert len(llm.generate(PROMPTS, GREEDY, progress=False)[0].token_ids) == 40


def test_the_bar_shows_tokens_per_second(llm: LLM, capsys: pytest.CaptureFixture[str]):
    llm.generate(PROMPTS, GREEDY)
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "tokens/s" in shown
