"""The OpenAI protocol, judged by the `openai` client against a running server on a real model."""

from __future__ import annotations

import json
import random

import pytest

from engine.tokenizer import Tokenizer
from tests.server.running import Server

openai = pytest.importorskip("openai")

MODEL = "stories"
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog."


@pytest.fixture
def client(server: Server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def stream_bytes(server: Server, path: str, **body) -> bytes:
    status, text = server.request("POST", path, json.dumps({"stream": True, **body}).encode())
    assert status == 200
    return text.encode()


def test_chat_streamed_is_chat_whole(client):
    ask = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me."}], "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**ask)
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.completion_tokens == 40
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].delta.role for c in chunks if c.choices] == ["assistant"] + [None] * (len(chunks) - 2)
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.model_dump() | {"prompt_tokens_details": None} == whole.usage.model_dump() | {
        "prompt_tokens_details": None
    }


def test_an_earlier_tool_call_reaches_the_template(client):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":  1}'}}
    user = {"role": "user", "content": "Hi"}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "assistant", "content": '{"a": 1}'}]
    answers = [
        client.chat.completions.create(model=MODEL, messages=[turn, user], max_tokens=10, temperature=0)
        for turn in turns
    ]
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_completion_is_what_transformers_generates(client, chat_folder):
    transformers = pytest.importorskip("transformers")
    import torch

    tokenizer = Tokenizer.from_folder(chat_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(chat_folder, dtype=torch.float32)
    prompt = tokenizer.encode("Once upon a time")
    with torch.no_grad():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0].tolist()
    answer = client.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=60, temperature=0, extra_body={"return_token_ids": True}
    ).choices[0]
    assert prompt + answer.token_ids == expected
    assert "Once upon a time" + answer.text == tokenizer.decode(expected)


def test_prompt_in_its_four_forms(client, chat_folder):
    ids = Tokenizer.from_folder(chat_folder).encode("The dog")
    for prompt, count in (("The dog", 1), (["The dog"] * 2, 2), (ids, 1), ([ids, ids], 2)):
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0)
        assert [choice.index for choice in answer.choices] == list(range(count))
        assert len({choice.text for choice in answer.choices}) == 1
        assert answer.usage.prompt_tokens == count * len(ids)
        assert answer.usage.completion_tokens == count * 8


def test_plain_completions_end_after_sixteen_tokens_unless_told(client):
    assert client.completions.create(model=MODEL, prompt="The", temperature=0).usage.completion_tokens == 16


def test_n_choices_differ_and_a_seed_repeats_them(client):
    ask = {"model": MODEL, "prompt": "Once", "n": 4, "max_tokens": 24, "seed": 5, "extra_body": {"ignore_eos": True}}
    first, second = (client.completions.create(**ask) for _ in range(2))
    assert len({choice.text for choice in first.choices}) > 1
    assert [choice.text for choice in first.choices] == [choice.text for choice in second.choices]
    assert first.usage.completion_tokens == 4 * 24
    assert first.usage.prompt_tokens == 2  # the prompt counts once: BOS and "Once"
    streamed = {index: "" for index in range(4)}
    finishes: list[int] = []
    for chunk in client.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            finishes += [choice.index] * (choice.finish_reason is not None)
    assert list(streamed.values()) == [choice.text for choice in first.choices]
    assert sorted(finishes) == [0, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_before_them(client, stream: bool):
    ask = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 60, "temperature": 0}
    text = client.completions.create(**ask).choices[0].text
    stop = text[20:24]
    answer = client.completions.create(**ask, stop=["not there", stop], stream=stream)
    if stream:
        chunks = [choice for chunk in answer for choice in chunk.choices]
        assert "".join(chunk.text for chunk in chunks) == text[: text.index(stop)]
        assert chunks[-1].finish_reason == "stop"
        assert chunks[-1].stop_reason == stop
    else:
        assert answer.choices[0].text == text[: text.index(stop)]
        assert (answer.choices[0].finish_reason, answer.choices[0].stop_reason) == ("stop", stop)
        assert answer.usage.completion_tokens < 60


def test_a_stop_token_ends_the_text_before_it(client):
    ask = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 60, "temperature": 0}
    more = {"return_token_ids": True}
    ids = client.completions.create(**ask, extra_body=more).choices[0].token_ids
    stop = ids[10]
    answer = client.completions.create(**ask, extra_body={**more, "stop_token_ids": [stop]}).choices[0]
    assert answer.token_ids == ids[: ids.index(stop) + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    included = {**more, "stop_token_ids": [stop], "include_stop_str_in_output": True}
    longer = client.completions.create(**ask, extra_body=included).choices[0]
    assert longer.text.startswith(answer.text)
    assert len(longer.text) > len(answer.text)


def test_completion_logprobs(client, chat_folder):
    tokenizer = Tokenizer.from_folder(chat_folder)
    choice = client.completions.create(
        model=MODEL, prompt="Once", max_tokens=12, temperature=0, logprobs=3, extra_body={"return_token_ids": True}
    ).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.tokens == [tokenizer.token_bytes(i).decode() for i in choice.token_ids]
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(12)]
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 3
        assert top[token] == logprob == max(top.values()) <= 0


def test_chat_logprobs_whole_and_streamed(client):
    ask = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 12}
    ask |= {"logprobs": True, "top_logprobs": 2}
    choice = client.chat.completions.create(**ask).choices[0]
    tokens = choice.logprobs.content
    assert len(tokens) == 12
    for token in tokens:
        assert bytes(token.bytes).decode() == token.token
        assert [token.token, token.logprob] == [token.top_logprobs[0].token, token.top_logprobs[0].logprob]
        assert len(token.top_logprobs) == 2
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True)]
    streamed = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    assert [t.logprob for t in streamed] == pytest.approx([t.logprob for t in tokens], abs=1e-4)


def test_a_prefix_seen_before_is_reported_as_cached(client):
    ask = {"model": MODEL, "prompt": STORY + " It was the third of seven.", "max_tokens": 2}
    client.completions.create(**ask)
    usage = client.completions.create(**ask).usage
    cached = usage.prompt_tokens_details.cached_tokens
    assert 0 < cached < usage.prompt_tokens
    assert cached % 16 == 0


def test_extensions(client):
    ask = {"model": MODEL, "prompt": "Once", "temperature": 0}
    extra = {"ignore_eos": True, "min_tokens": 70, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "unknown": 1}
    answer = client.completions.create(**ask, max_tokens=90, extra_body={**extra, "return_token_ids": True})
    assert answer.usage.completion_tokens == 90
    assert len(answer.choices[0].prompt_token_ids) == answer.usage.prompt_tokens
    chat = {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}
    chunks = list(client.chat.completions.create(
        **chat, stream=True, max_completion_tokens=5, user="me", store=False, extra_body={"return_token_ids": True}
    ))  # fmt: skip
    assert sum(len(chunk.choices[0].token_ids) for chunk in chunks) == 5
    assert chunks[0].prompt_token_ids


def test_models(client, chat_folder):
    (card,) = client.models.list().data
    assert (card.id, card.object, card.root) == (MODEL, "model", str(chat_folder))
    assert client.models.retrieve(MODEL).max_model_len == 512
    with pytest.raises(openai.NotFoundError, match="serves 'stories'"):
        client.models.retrieve("gpt-4")


def test_raw_stream_splits_anywhere(server: Server):
    """openai's own decoder reads the same events however the bytes are cut, and they are as the contract says."""
    from openai._streaming import SSEDecoder

    raw = stream_bytes(
        server,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=30,
        n=2,
        stream_options={"include_usage": True},
    )
    whole = [event.data for event in SSEDecoder().iter_bytes(iter([raw]))]
    rng = random.Random(0)
    for _ in range(50):
        cuts = sorted(rng.sample(range(len(raw)), 20))
        pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        assert [event.data for event in SSEDecoder().iter_bytes(iter(pieces))] == whole
    assert whole[-1] == "[DONE]"
    chunks = [json.loads(data) for data in whole[:-1]]
    assert chunks[-1]["choices"] == []
    assert all("usage" not in chunk for chunk in chunks[:-1])
    for index in (0, 1):
        own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert [i for i, choice in enumerate(own) if "role" in choice["delta"]] == [0]
        assert [i for i, choice in enumerate(own) if choice["finish_reason"]] == [len(own) - 1]


def test_metrics_and_health(server: Server, client):
    before = server.metric("mla_generated_tokens_total")
    client.completions.create(model=MODEL, prompt="Once", max_tokens=7, extra_body={"ignore_eos": True})
    server.wait_idle()
    assert server.metric("mla_generated_tokens_total") == before + 7
    assert server.metric("mla_time_to_first_token_seconds_count") > 0
    assert server.metric('mla_choices_total{finish_reason="length"}') > 0
    assert server.get("/health") == (200, '{"status": "ok"}')
