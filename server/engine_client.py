"""The HTTP process's side of the engine: start it, hand it requests, hear its news, notice its end.

Invariant: every request handed over is in `_channels` until its last Output, its abort or the engine's end, whichever
comes first; and whoever opened a channel closes it, so the engine never works for somebody who has left.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from types import TracebackType

from engine.errors import EngineError, RequestError
from engine.messages import EngineStats, Output, Request
from server.errors import EngineGone
from server.wire import (
    Abort,
    Add,
    Command,
    Deframer,
    EngineInfo,
    Event,
    Failed,
    Ready,
    Refused,
    Start,
    Stepped,
    decode_event,
    frame,
)

ENGINE_COMMAND = (sys.executable, "-m", "server.engine_process")
READ_BYTES = 2**20


class Channel:
    """The news of some requests, from the moment they are handed over; `async with` it, so that it is closed."""

    def __init__(self, client: EngineClient, requests: Sequence[Request]) -> None:
        self._client = client
        self._open = {request.id for request in requests}
        self._news: deque[Output] = deque()
        self._error: Exception | None = None
        self._wake = asyncio.Event()

    async def outputs(self) -> list[Output]:
        """All Outputs that have come since the last call, at least one; [] once every request has ended.

        Raises RequestError where the engine refuses a request, EngineGone where it died.
        """
        while self._open and not self._news and self._error is None:
            self._wake.clear()
            await self._wake.wait()
        if self._error is not None:
            raise self._error
        news = list(self._news)
        self._news.clear()
        return news

    def drop(self, request_id: str) -> None:
        """No more of this request is wanted: it is aborted, and nothing of it comes any more."""
        if request_id in self._open:
            self._open.discard(request_id)
            self._client.abort([request_id])
        self._news = deque(output for output in self._news if output.request_id != request_id)

    def deliver(self, output: Output) -> None:
        self._news.append(output)
        if output.finish_reason is not None:
            self._open.discard(output.request_id)
        self._wake.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._wake.set()

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self._client.abort(list(self._open))
            self._open.clear()


class EngineClient:
    """Made by start(). `gone` is set when the engine's process has ended, for whatever reason."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.info: EngineInfo  # from start() on
        self.stats: EngineStats | None = None  # the latest
        self.gone = asyncio.Event()
        self.why_gone = "the engine process ended unexpectedly"
        self._process = process
        self._writer = writer
        self._deframer = Deframer()
        self._channels: dict[str, Channel] = {}
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[EngineInfo] = loop.create_future()
        self._reading = loop.create_task(self._read(reader))

    @classmethod
    async def start(cls, start: Start, command: Sequence[str] = ENGINE_COMMAND) -> EngineClient:
        """A client whose engine has loaded. Raises EngineError with the engine's words where it could not."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen([*command, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        client = cls(process, *await asyncio.open_connection(sock=ours))
        client._send(start)
        try:
            client.info = await client._ready
        except BaseException:
            await client.close()
            raise
        return client

    @property
    def num_in_flight(self) -> int:
        return len(self._channels)

    @property
    def pid(self) -> int:
        return self._process.pid

    def submit(self, requests: Sequence[Request]) -> Channel:
        """Hand over requests. Raises EngineGone."""
        if self.gone.is_set():
            raise EngineGone(self.why_gone)
        channel = Channel(self, requests)
        self._channels |= dict.fromkeys((request.id for request in requests), channel)
        self._send(Add(list(requests)))
        return channel

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._channels.pop(request_id, None)
        if not self.gone.is_set():
            self._send(Abort(list(request_ids)))

    def give_up(self, error: Exception) -> None:
        """End everything in flight: the engine drops it, and whoever waits for it gets `error`."""
        if self._channels and not self.gone.is_set():
            self._send(Abort(list(self._channels)))
        for channel in {id(channel): channel for channel in self._channels.values()}.values():
            channel.fail(error)
        self._channels.clear()

    async def close(self) -> None:
        """Tell the engine to exit, and wait until it has."""
        self._writer.close()
        try:
            await asyncio.wait_for(asyncio.to_thread(self._process.wait), timeout=10)
        except TimeoutError:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        self._reading.cancel()

    def _send(self, command: Command) -> None:
        self._writer.write(frame(command))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while data := await reader.read(READ_BYTES):
                for payload in self._deframer.feed(data):
                    self._hear(decode_event(payload))
        except ConnectionError:
            pass
        finally:
            self._end()

    def _hear(self, event: Event) -> None:
        if isinstance(event, Stepped):
            self.stats = event.stats or self.stats
            for output in event.outputs:
                last = output.finish_reason is not None
                channel = self._channels.pop(output.request_id, None) if last else self._channels.get(output.request_id)
                if channel is not None:
                    channel.deliver(output)
        elif isinstance(event, Refused):
            if (channel := self._channels.pop(event.request_id, None)) is not None:
                channel.fail(RequestError(event.message, event.param))
        elif isinstance(event, Failed):
            self.why_gone = event.message
            if event.input and not self._ready.done():
                self._ready.set_exception(EngineError(event.message))
        elif isinstance(event, Ready):
            self._ready.set_result(event.info)

    def _end(self) -> None:
        """The engine is gone: everybody who waits for it hears so."""
        self.gone.set()
        if not self._ready.done():
            self._ready.set_exception(EngineGone(self.why_gone))
        self.give_up(EngineGone(self.why_gone))
