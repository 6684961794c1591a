"""Whatever is wrong with a request gets OpenAI's error shape, the right status, and the name of the field."""

from __future__ import annotations

import json

import pytest

from tests.server.running import Server

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


def error(answer: tuple[int, dict], status: int) -> dict:
    assert answer[0] == status, answer
    assert set(answer[1]) == {"error"}
    assert set(answer[1]["error"]) == {"message", "type", "param", "code"}
    return answer[1]["error"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [2**63]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [512]}, "prompt"),
        ({"prompt": [1] * 600}, "prompt"),
        ({"prompt": "dog " * 600}, "prompt"),
        ({"prompt": "dog " * 100000}, "prompt"),
        ({"prompt": ["a"] * 2000}, "prompt"),
        ({"prompt": "a", "n": 10**9}, "n"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": ["a"] * 100, "n": 128}, "n"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "7"}, "max_tokens"),
        ({"prompt": "a", "min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "top_p": 1.5}, "top_p"),
        ({"prompt": "a", "top_k": -2}, "top_k"),
        ({"prompt": "a", "top_k": 2**40}, "top_k"),
        ({"prompt": "a", "min_p": 2}, "min_p"),
        ({"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
        ({"prompt": "a", "frequency_penalty": -3}, "frequency_penalty"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "a", "seed": 2**63}, "seed"),
        ({"prompt": "a", "seed": 1.5}, "seed"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
        ({"prompt": "a", "stop": "x" * 5000}, "stop"),
        ({"prompt": "a", "stop": [1]}, "stop[0]"),
        ({"prompt": "a", "stop_token_ids": [512]}, "stop_token_ids"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "model": 5}, "model"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias"),
        ({"prompt": "a", "guided_json": {"type": "object"}}, "guided_json"),
        ({"prompt": "a", "prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"prompt": "a", "cache_salt": "s"}, "cache_salt"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("stream", [False, True])
def test_completions(server: Server, body: dict, param: str, stream: bool):
    failure = error(server.post(COMPLETIONS, {"stream": stream, **body}), 400)
    assert failure["type"] == "invalid_request_error"
    assert failure["param"] == param
    assert failure["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
         "messages[0].content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
         "messages[0].tool_calls[0].function.arguments"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "messages[0].function_call"),
        ({"messages": [{"role": "tool", "content": "5"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "dog " * 600}]}, "prompt"),
        ({"messages": [{"role": "user", "content": "dog " * 100000}]}, "messages"),
        ({**CHAT, "tools": [{"type": "function"}]}, "tools"),
        ({**CHAT, "tool_choice": "required"}, "tool_choice"),
        ({**CHAT, "response_format": {"type": "json_object"}}, "response_format"),
        ({**CHAT, "modalities": ["audio"]}, "modalities"),
        ({**CHAT, "audio": {"voice": "alloy"}}, "audio"),
        ({**CHAT, "top_logprobs": 5}, "top_logprobs"),
        ({**CHAT, "logprobs": 5}, "logprobs"),
        ({**CHAT, "logprobs": True, "top_logprobs": "5"}, "top_logprobs"),
        ({**CHAT, "chat_template": "{{ 1 }}"}, "chat_template"),
        ({**CHAT, "chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
        ({**CHAT, "chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs"),
        ({**CHAT, "max_completion_tokens": 0}, "max_tokens"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_chat(server: Server, body: dict, param: str):
    assert error(server.post(CHATS, body), 400)["param"] == param


def test_what_a_template_says_when_it_refuses_reaches_the_user(server: Server):
    failure = error(server.post(CHATS, {"messages": [{"role": "tool", "content": "5"}]}), 400)
    assert "no tools here" in failure["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"nonsense", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"[" * 10**6,
             b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "seed": 1e999}'],
)  # fmt: skip
def test_broken_bodies(server: Server, body: bytes):
    error(server.post(COMPLETIONS, body), 400)


def test_values_that_mean_not_used_are_taken(server: Server):
    unused = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}, "n": None}
    unused |= {"stop": None, "echo": False, "suffix": "", "best_of": 1, "functions": None, "modalities": ["text"]}
    unused |= {"stream_options": None, "seed": None, "metadata": {"a": "b"}, "service_tier": "auto"}
    status, body = server.post(CHATS, {**CHAT, **unused, "max_tokens": 1})
    assert (status, body["usage"]["completion_tokens"]) == (200, 1)


def test_unknown_model(server: Server):
    failure = error(server.post(COMPLETIONS, {"model": "gpt-4", "prompt": "a"}), 404)
    assert failure["code"] == "model_not_found"
    assert "stories" in failure["message"]


def test_unknown_route_and_method(server: Server):
    error(server.post("/v1/nothing", {}), 404)
    status, text = server.get(COMPLETIONS)
    error((status, json.loads(text)), 405)


def test_too_large_a_body(server: Server):
    error(server.post(COMPLETIONS, b" " * (33 * 2**20)), 413)


def test_the_server_is_whole_afterwards(server: Server):
    server.wait_idle()
    assert server.post(COMPLETIONS, {"prompt": "Once", "max_tokens": 2})[0] == 200
