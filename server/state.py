"""What the handlers share: the engine, the tokenizer, the settings, and who may come in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from engine.tokenizer import Tokenizer
from server.engine_client import EngineClient
from server.errors import ApiError, EngineGone, shutting_down
from server.metrics import Metrics


class Admission:
    """Counts sequences from before their prompts are tokenised to their end; past the limit, requests are turned away.

    Once closed nobody comes in, and `empty` is set when the last has left.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.closed = False
        self.empty = asyncio.Event()
        self.empty.set()
        self._inside = 0

    def check_open(self) -> None:
        if self.closed:
            raise shutting_down()
        if self._inside >= self.limit:
            self._turn_away()

    @contextmanager
    def admit(self, sequences: int) -> Iterator[None]:
        """Holds the places of a request's sequences. Raises ApiError where there are not enough."""
        if sequences > self.limit:
            message = f"n times the prompts is {sequences} sequences; this server takes at most {self.limit} at once"
            raise ApiError("invalid_request_error", message, "n")
        self.check_open()
        if self._inside + sequences > self.limit:
            self._turn_away()
        self._inside += sequences
        self.empty.clear()
        try:
            yield
        finally:
            self._inside -= sequences
            if self._inside == 0:
                self.empty.set()

    def _turn_away(self) -> None:
        message = f"{self._inside} sequences are running or waiting already; try again later"
        raise ApiError("rate_limit_error", message, code="queue_full")


@dataclass
class ServerState:
    engine: EngineClient
    tokenizer: Tokenizer
    model_name: str
    model_path: str
    created: int  # seconds since the epoch
    admission: Admission
    metrics: Metrics
    api_keys: tuple[bytes, ...] = ()
    text_threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "text"))

    @property
    def max_prompt_chars(self) -> int:
        """No text longer than this can fit: longer ones are refused before they cost a tokenisation."""
        return self.engine.info.max_len * self.tokenizer.max_token_chars

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            message = f"the model {name!r} does not exist; this server serves {self.model_name!r}"
            raise ApiError("not_found_error", message, "model", "model_not_found")

    def check_engine(self) -> None:
        if self.engine.gone.is_set():
            raise EngineGone(self.engine.why_gone)


STATE = web.AppKey("state", ServerState)
