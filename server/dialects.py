"""The two forms an answer takes on the wire: chat completions and plain completions, whole or in chunks."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from engine.messages import TokenLogprobs
from engine.tokenizer import Tokenizer
from server.choice import Choice, Delta, token_text
from server.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)

Struct = msgspec.Struct


class Dialect(ABC):
    """Of one answer: every chunk carries the same id, model and time of creation."""

    id_prefix: str

    def __init__(self, model: str, tokenizer: Tokenizer, return_token_ids: bool) -> None:
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self.tokenizer = tokenizer
        self._return_token_ids = return_token_ids

    @abstractmethod
    def whole(self, choices: Sequence[tuple[Choice, Delta]], usage: Usage) -> Struct:
        """The answer of a request that does not stream; a choice's delta is then all of it."""

    @abstractmethod
    def chunk(self, choice: Choice, delta: Delta, first: bool, usage: Usage | UnsetType) -> Struct:
        """A streamed piece of one choice; `first`: its first one."""

    @abstractmethod
    def usage_chunk(self, usage: Usage) -> Struct:
        """The last chunk, of no choice."""

    def _ids(self, ids: list[int], wanted: bool = True) -> list[int] | UnsetType:
        return ids if wanted and self._return_token_ids else UNSET


class ChatDialect(Dialect):
    id_prefix = "chatcmpl"

    def whole(self, choices: Sequence[tuple[Choice, Delta]], usage: Usage) -> Struct:
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=ChatMessage(delta.text),
                    logprobs=self._logprobs(delta),
                    finish_reason=choice.finish_reason or "stop",
                    stop_reason=choice.stop_reason,
                    token_ids=self._ids(delta.token_ids),
                )
                for choice, delta in choices
            ],
            usage=usage,
            prompt_token_ids=self._ids(choices[0][0].request.prompt_ids),
        )

    def chunk(self, choice: Choice, delta: Delta, first: bool, usage: Usage | UnsetType) -> Struct:
        content = delta.text if delta.text or first else UNSET
        chunk_choice = ChatChunkChoice(
            index=choice.index,
            delta=ChatDelta("assistant" if first else UNSET, content),
            logprobs=self._logprobs(delta),
            finish_reason=choice.finish_reason,
            stop_reason=UNSET if choice.finish_reason is None else choice.stop_reason,
            token_ids=self._ids(delta.token_ids),
        )
        return ChatChunk(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[chunk_choice],
            usage=usage,
            prompt_token_ids=self._ids(choice.request.prompt_ids, wanted=first),
        )

    def usage_chunk(self, usage: Usage) -> Struct:
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=[], usage=usage)

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if delta.logprobs is None:
            return None
        return ChatLogprobs([self._token(*pair) for pair in zip(delta.token_ids, delta.logprobs, strict=True)])

    def _token(self, token_id: int, logprobs: TokenLogprobs) -> TokenLogprob:
        def top(token_id: int, logprob: float) -> TopLogprob:
            return TopLogprob(
                token_text(self.tokenizer, token_id), _finite(logprob), list(self.tokenizer.token_bytes(token_id))
            )

        own = top(token_id, logprobs.logprob)
        return TokenLogprob(own.token, own.logprob, own.bytes, [top(*entry) for entry in logprobs.top])


class CompletionDialect(Dialect):
    id_prefix = "cmpl"

    def __init__(self, model: str, tokenizer: Tokenizer, return_token_ids: bool) -> None:
        super().__init__(model, tokenizer, return_token_ids)
        self._offsets: dict[int, int] = {}  # choice index -> characters of the tokens so far

    def whole(self, choices: Sequence[tuple[Choice, Delta]], usage: Usage) -> Struct:
        return self._completion([self._choice(choice, delta, True) for choice, delta in choices], usage)

    def chunk(self, choice: Choice, delta: Delta, first: bool, usage: Usage | UnsetType) -> Struct:
        return self._completion([self._choice(choice, delta, first)], usage)

    def usage_chunk(self, usage: Usage) -> Struct:
        return self._completion([], usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | UnsetType) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def _choice(self, choice: Choice, delta: Delta, first: bool) -> CompletionChoice:
        return CompletionChoice(
            index=choice.index,
            text=delta.text,
            logprobs=self._logprobs(choice.index, delta),
            finish_reason=choice.finish_reason,
            stop_reason=UNSET if choice.finish_reason is None else choice.stop_reason,
            token_ids=self._ids(delta.token_ids),
            prompt_token_ids=self._ids(choice.request.prompt_ids, wanted=first),
        )

    def _logprobs(self, index: int, delta: Delta) -> CompletionLogprobs | None:
        if delta.logprobs is None:
            return None
        result = CompletionLogprobs([], [], [], [])
        for token_id, logprobs in zip(delta.token_ids, delta.logprobs, strict=True):
            text, logprob = token_text(self.tokenizer, token_id), _finite(logprobs.logprob)
            top: dict[str, float] = {}
            for other, value in logprobs.top:  # best first; of tokens with one text the best stands
                top.setdefault(token_text(self.tokenizer, other), _finite(value))
            top.setdefault(text, logprob)
            result.tokens.append(text)
            result.token_logprobs.append(logprob)
            result.top_logprobs.append(top)
            result.text_offset.append(self._offsets.get(index, 0))
            self._offsets[index] = result.text_offset[-1] + len(text)
        return result


def _finite(logprob: float) -> float:
    """JSON has no infinity; -9999 is what OpenAI sends for it."""
    return max(logprob, -9999.0)
