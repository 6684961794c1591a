"""POST /v1/completions and /v1/chat/completions: one path from the request's bytes to the answer's.

Invariant: from admission to the end of the handler, however it ends (answer, error, disconnect), the request's places
and its work in the engine are given back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
from aiohttp import web
from msgspec import UNSET

from engine.messages import Output, Request
from engine.sampling_params import SamplingParams
from server.choice import Choice, Delta, usage
from server.dialects import ChatDialect, CompletionDialect, Dialect
from server.engine_client import Channel
from server.errors import ApiError, api_error, error_json
from server.requests import ChatRequest, CompletionRequest, GenerationRequest, parse
from server.responses import Usage
from server.state import STATE, ServerState

BODY_SECONDS = 60.0
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for plain completions
EVENT_STREAM = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}

log = logging.getLogger("server")


@dataclass
class Job:
    """A request understood: what to compute, and how to say it."""

    options: GenerationRequest
    params: SamplingParams
    dialect: Dialect
    num_prompts: int
    continues_text: bool  # the answer goes on from the prompt's own text, as no answer in a chat does


async def chat_completions(http: web.Request) -> web.StreamResponse:
    state, arrived = http.app[STATE], time.monotonic()
    state.admission.check_open()
    request = parse(await _read_body(http), ChatRequest)
    state.check_model(request.model)
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError("invalid_request_error", "top_logprobs needs logprobs to be true", "top_logprobs")
    params = request.sampling_params(state.engine.info, max_tokens, logprobs)
    dialect = ChatDialect(state.model_name, state.tokenizer, bool(request.return_token_ids))

    def prompt_ids() -> list[list[int]]:
        template = state.tokenizer.chat_template
        argument_objects = template is not None and template.takes_argument_objects
        messages = [message.for_template(i, argument_objects) for i, message in enumerate(request.messages)]
        text = state.tokenizer.apply_chat_template(
            messages, request.add_generation_prompt is not False, request.chat_template_kwargs
        )
        return [_encode(state, text, bool(request.add_special_tokens), "messages")]

    with state.admission.admit(request.num_choices):
        prompts = await asyncio.get_running_loop().run_in_executor(state.text_threads, prompt_ids)
        return await _answer(http, state, Job(request, params, dialect, 1, continues_text=False), prompts, arrived)


async def completions(http: web.Request) -> web.StreamResponse:
    state, arrived = http.app[STATE], time.monotonic()
    state.admission.check_open()
    request = parse(await _read_body(http), CompletionRequest)
    state.check_model(request.model)
    max_tokens = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    if request.min_tokens is not None and request.max_tokens is None:
        max_tokens = max(max_tokens, request.min_tokens)
    params = request.sampling_params(state.engine.info, max_tokens, request.logprobs)
    dialect = CompletionDialect(state.model_name, state.tokenizer, bool(request.return_token_ids))
    given = request.prompts

    def prompt_ids() -> list[list[int]]:
        special = request.add_special_tokens is not False
        return [_encode(state, p, special, "prompt") if isinstance(p, str) else p for p in given]

    with state.admission.admit(request.num_choices * len(given)):
        prompts = await asyncio.get_running_loop().run_in_executor(state.text_threads, prompt_ids)
        job = Job(request, params, dialect, len(given), continues_text=True)
        return await _answer(http, state, job, prompts, arrived)


async def _read_body(http: web.Request) -> bytes:
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await http.read()
    except TimeoutError:
        message = f"the body did not arrive within {BODY_SECONDS:g} seconds"
        raise ApiError("request_timeout_error", message) from None


def _encode(state: ServerState, text: str, add_special_tokens: bool, param: str) -> list[int]:
    if len(text) > state.max_prompt_chars:
        message = f"the prompt of {len(text)} characters is longer than the model's {state.engine.info.max_len} tokens"
        raise ApiError("invalid_request_error", message, param, "context_length_exceeded")
    return state.tokenizer.encode(text, add_special_tokens=add_special_tokens)


async def _answer(
    http: web.Request, state: ServerState, job: Job, prompts: list[list[int]], arrived: float
) -> web.StreamResponse:
    """Compute and send. Errors before the first token are raised, and get a status of their own."""
    choices = _choices(state, job, prompts)
    collector = Collector(state, choices, arrived)
    try:
        async with state.engine.submit([choice.request for choice in choices]) as channel:
            news = await channel.outputs()
            if job.options.stream:
                return await _stream(http, job, collector, channel, news)
            deltas = [Delta() for _ in choices]
            while news:
                for choice, delta in collector.push(channel, news):
                    _extend(deltas[choice.index], delta)
                news = await channel.outputs()
            whole = job.dialect.whole(list(zip(choices, deltas, strict=True)), _usage(job, choices))
            return web.Response(body=msgspec.json.encode(whole), content_type="application/json")
    finally:
        collector.close()


def _choices(state: ServerState, job: Job, prompts: list[list[int]]) -> list[Choice]:
    """n for each prompt, in order. A given seed gives each of the n its own stream of randomness."""
    n, seed = job.options.num_choices, job.params.seed
    special = state.tokenizer.special_ids
    choices = []
    for index in range(n * len(prompts)):
        prompt, params = prompts[index // n], job.params
        if seed is not None and index % n:
            params = msgspec.structs.replace(params, seed=(seed + index % n + 2**63) % 2**64 - 2**63)
        request = Request(id=f"{job.dialect.id}-{index}", prompt_ids=prompt, params=params)
        continues = job.continues_text and any(token not in special for token in prompt)
        choices.append(Choice(index, request, state.tokenizer, continues))
    return choices


class Collector:
    """Gives each Output to its choice, stops the engine where a stop string was found, and keeps the times."""

    def __init__(self, state: ServerState, choices: Sequence[Choice], arrived: float) -> None:
        self.choices = list(choices)
        self._by_id = {choice.request.id: choice for choice in choices}
        self._metrics = state.metrics
        self._arrived = arrived
        self._first_token: dict[int, float] = {}  # choice index -> when
        self._unfinished = set(self._by_id)

    def push(self, channel: Channel, outputs: Sequence[Output]) -> Iterator[tuple[Choice, Delta]]:
        for output in outputs:
            choice = self._by_id[output.request_id]
            if choice.finish_reason is not None:  # its stop string came earlier in these very outputs
                continue
            delta = choice.push(output)
            now = time.monotonic()
            if choice.index not in self._first_token:
                self._first_token[choice.index] = now
                self._metrics.time_to_first_token.observe(now - self._arrived)
            if choice.finish_reason is not None:
                channel.drop(output.request_id)
                self._finish(choice, now)
            yield choice, delta

    def _finish(self, choice: Choice, now: float) -> None:
        self._unfinished.discard(choice.request.id)
        self._metrics.choices.labels(choice.finish_reason).inc()
        self._metrics.request_duration.observe(now - self._arrived)
        if choice.num_tokens > 1:
            elapsed = now - self._first_token[choice.index]
            self._metrics.time_per_output_token.observe(elapsed / (choice.num_tokens - 1))

    def close(self) -> None:
        self._metrics.choices.labels("abort").inc(len(self._unfinished))


def _extend(whole: Delta, delta: Delta) -> None:
    whole.text += delta.text
    whole.token_ids += delta.token_ids
    if delta.logprobs is not None:
        whole.logprobs = (whole.logprobs or []) + delta.logprobs


def _usage(job: Job, choices: list[Choice]) -> Usage:
    return usage(choices, job.options.num_choices)


async def _stream(
    http: web.Request, job: Job, collector: Collector, channel: Channel, news: list[Output]
) -> web.StreamResponse:
    """Server-sent events. From here on the status is sent: an error becomes an event, and [DONE] ends even that."""
    response = web.StreamResponse(headers=EVENT_STREAM)
    await response.prepare(http)
    try:
        begun: set[int] = set()
        while news:
            chunks = [
                _event(_chunk(job, choice, delta, begun))
                for choice, delta in collector.push(channel, news)
                if _has_news(job, choice, delta, begun)
            ]
            await response.write(b"".join(chunks))
            news = await channel.outputs()
        if job.options.includes_usage:
            await response.write(_event(job.dialect.usage_chunk(_usage(job, collector.choices))))
    except (ConnectionError, asyncio.CancelledError):
        raise  # nobody is listening
    except Exception as error:
        if not isinstance(error, ApiError):
            log.error("a stream ended early: %s", error)
        await response.write(b"data: " + error_json(api_error(error)) + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def _has_news(job: Job, choice: Choice, delta: Delta, begun: set[int]) -> bool:
    """Not every token shows: text may be held back. The first chunk is sent in any case, as the token has come."""
    shows = delta.text or delta.logprobs or choice.finish_reason is not None or job.options.return_token_ids
    return bool(shows) or choice.index not in begun


def _chunk(job: Job, choice: Choice, delta: Delta, begun: set[int]) -> msgspec.Struct:
    first = choice.index not in begun
    begun.add(choice.index)
    return job.dialect.chunk(choice, delta, first, usage([choice], 1) if job.options.usage_in_chunks else UNSET)


def _event(chunk: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"
