"""LLM: the offline API.

llm = LLM("./mla")
for completion in llm.generate(["Once upon a time", "The end"], SamplingParams(max_tokens=50)):
    print(completion.text)
for piece in llm.stream("Once upon a time"):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import EngineError, RequestError
from engine.hub import local_folder
from engine.messages import FinishReason, Output, Request, TokenLogprobs
from engine.model.load import load_model
from engine.sampling_params import SamplingParams
from engine.text_stream import TextStream
from engine.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


@dataclass
class Completion:
    """What a prompt was continued with; it grows until finish_reason is set."""

    prompt_ids: list[int]
    text: str = ""  # without the end token or stop string that ended it, unless include_stop_str_in_output
    token_ids: list[int] = field(default_factory=list)  # with it
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or stop string; None for the model's own end
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids, where asked for
    num_cached_tokens: int = 0  # prompt tokens that were found in the cache


class _Request:
    """A request in flight and the completion it is growing."""

    def __init__(self, request: Request, text: TextStream) -> None:
        self.id = request.id
        self.text = text
        self.completion = Completion(request.prompt_ids)

    @property
    def finished(self) -> bool:
        return self.completion.finish_reason is not None

    def take(self, output: Output) -> None:
        """Raises EngineError where the engine had to give the request up."""
        done = self.completion
        if output.error is not None:
            raise EngineError(output.error)
        done.token_ids += output.token_ids
        done.num_cached_tokens = output.num_cached_tokens
        if output.logprobs is not None:
            done.logprobs = (done.logprobs or []) + output.logprobs
        ended_by_token = output.finish_reason == "stop"
        done.text += self.text.push(output.token_ids, output.finish_reason is not None, ended_by_token)
        done.finish_reason, done.stop_reason = output.finish_reason, output.stop_reason
        if self.text.stopped is not None:
            done.finish_reason, done.stop_reason = "stop", self.text.stopped


class LLM:
    """A model, its tokenizer and an engine, in this process. Not for use by several threads at once."""

    def __init__(self, path: str | Path, *, progress: bool = False, **config: Any) -> None:  # noqa: ANN401
        """`path`: a checkpoint folder, or org/name on the hub; `config`: the fields of EngineConfig.

        `progress` shows a bar while the weights are read. Raises EngineError.
        """
        self.config = EngineConfig(**config)
        folder = local_folder(path)
        checkpoint = open_checkpoint(folder)
        self.tokenizer = Tokenizer.from_folder(folder)
        model = load_model(checkpoint, self.config.device, self.config.dtype, progress)
        self.core = EngineCore(model, checkpoint.generation, self.config)
        defaults = checkpoint.generation
        named = {name: getattr(defaults, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")}
        # What the checkpoint recommends, for calls that bring no SamplingParams.
        self.default_params = SamplingParams(**{name: value for name, value in named.items() if value is not None})
        self._in_flight: dict[str, _Request] = {}
        self._ids = count()

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = True,
    ) -> list[Completion]:
        """Continue texts or lists of token ids, all together -> completions in the order of the prompts.

        `params`: one for all, or one for each. Raises RequestError for a prompt that cannot be served; then none is.
        """
        if isinstance(prompts, str):
            raise RequestError("prompts must be a list; for one prompt, pass [prompt]", "prompts")
        if not isinstance(params, Sequence):
            params = [params or self.default_params] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts came with {len(params)} SamplingParams", "params")
        requests: list[_Request] = []
        try:
            for prompt, one in zip(prompts, params, strict=True):
                requests.append(self._add(self._encode(prompt), one, continues=True))
            self._finish(requests, progress)
        finally:
            self._abandon(requests)
        return [request.completion for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The continuation of one prompt, piece by piece as it comes. Several streams may run interleaved.

        Refuses the prompt (RequestError) at once; an iterator that is dropped half-way ends its request.
        """
        return self._pieces(self._add(self._encode(prompt), params or self.default_params, continues=True))

    def chat(self, messages: Messages, params: SamplingParams | None = None) -> Completion:
        """The assistant's answer to [{"role": ..., "content": ...}, ...], by the checkpoint's chat template."""
        request = self._add(self._render(messages), params or self.default_params, continues=False)
        try:
            self._finish([request], progress=False)
        finally:
            self._abandon([request])
        return request.completion

    def stream_chat(self, messages: Messages, params: SamplingParams | None = None) -> Iterator[str]:
        """As `chat`, piece by piece."""
        return self._pieces(self._add(self._render(messages), params or self.default_params, continues=False))

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _render(self, messages: Messages) -> list[int]:
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(messages), add_special_tokens=False)

    def _add(self, prompt_ids: list[int], params: SamplingParams, continues: bool) -> _Request:
        request = Request(id=str(next(self._ids)), prompt_ids=prompt_ids, params=params)
        self.core.add(request)
        continues = continues and any(token not in self.tokenizer.special_ids for token in prompt_ids)
        added = self._in_flight[request.id] = _Request(request, TextStream(self.tokenizer, params, continues))
        return added

    def _step(self) -> list[_Request]:
        """One step of the engine, for everybody -> the requests that got a token.

        A stop string ends its request before the next step, so no text depends on timing.
        """
        served = []
        for output in self.core.step():
            request = self._in_flight[output.request_id]
            request.take(output)
            if request.finished:
                self._abandon([request])
            served.append(request)
        return served

    def _finish(self, requests: list[_Request], progress: bool) -> None:
        started, generated = time.perf_counter(), 0
        with tqdm(total=len(requests), unit="prompt", disable=not progress, dynamic_ncols=True) as bar:
            waiting_for = {request.id for request in requests}
            while waiting_for:
                served = self._step()
                generated += len(served)
                waiting_for.difference_update([request.id for request in served if request.finished])
                bar.set_postfix_str(f"{generated / (time.perf_counter() - started):.1f} tokens/s", refresh=False)
                bar.update(len(requests) - len(waiting_for) - bar.n)

    def _pieces(self, request: _Request) -> Iterator[str]:
        shown = 0
        try:
            while True:
                piece = request.completion.text[shown:]
                if piece:
                    shown += len(piece)
                    yield piece
                elif request.finished:
                    return
                else:
                    self._step()
        finally:
            self._abandon([request])

    def _abandon(self, requests: list[_Request]) -> None:
        """Forget requests; those still in the engine end there."""
        self.core.abort([request.id for request in requests])
        for request in requests:
            self._in_flight.pop(request.id, None)
