"""One choice of an answer while it grows: engine Outputs in, text and log-probabilities out."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.messages import Output, Request, TokenLogprobs
from engine.text_stream import TextStream
from engine.tokenizer import Tokenizer
from server.errors import ApiError
from server.responses import FinishReason, PromptTokensDetails, Usage


@dataclass
class Delta:
    """What a choice gained by some Outputs."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None  # one for each token, where asked for


class Choice:
    """Invariant: `finish_reason` is None until the last delta; the deltas' texts joined are the choice's text."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer, continues_text: bool) -> None:
        self.index = index
        self.request = request
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None  # the stop string or stop token that ended it
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self._text = TextStream(tokenizer, request.params, continues_text)

    def push(self, output: Output) -> Delta:
        """Take in the request's next Output. Raises ApiError where the engine gave the request up."""
        if output.finish_reason == "abort":
            raise ApiError("server_error", output.error or "the engine gave the request up")
        self.num_tokens += len(output.token_ids)
        self.num_cached_tokens = output.num_cached_tokens
        text = self._text.push(
            output.token_ids,
            finished=output.finish_reason is not None,
            ended_by_token=output.finish_reason == "stop",
        )
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        if self._text.stopped is not None:
            self.finish_reason, self.stop_reason = "stop", self._text.stopped
        return Delta(text, output.token_ids, output.logprobs)


def usage(choices: list[Choice], choices_per_prompt: int) -> Usage:
    """Of a request: each prompt counts once, however many choices it has."""
    firsts = choices[::choices_per_prompt]
    prompt = sum(len(choice.request.prompt_ids) for choice in firsts)
    completion = sum(choice.num_tokens for choice in choices)
    cached = sum(choice.num_cached_tokens for choice in firsts)
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token by itself, for log-probabilities; one that is no whole character is written as its bytes."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
