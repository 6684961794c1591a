"""The engine's own process: `python -m server.engine_process FD`, with one end of a socket pair as descriptor FD.

Invariant: the model never waits on the socket. Commands are taken in without waiting while there is work, and what the
other side is too slow to read is kept in memory (its size is bounded by the requests in flight). The process ends when
the other end of the socket closes, so that it never outlives the HTTP process, however that died.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Protocol

from engine.errors import EngineError, RequestError
from engine.messages import EngineStats, Output, Request
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
    decode_command,
    frame,
)

STATS_SECONDS = 0.1
READ_BYTES = 2**20


class Core(Protocol):
    """What of EngineCore is used here."""

    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_ids: Iterable[str]) -> None: ...
    def step(self) -> list[Output]: ...
    def stats(self) -> EngineStats: ...


Load = Callable[[Start], tuple[Core, EngineInfo]]


def load_core(start: Start) -> tuple[Core, EngineInfo]:
    """The model and the engine that `start` describes. Raises EngineError."""
    import torch

    from engine.checkpoint import open_checkpoint
    from engine.core import EngineCore
    from engine.model.load import dtype_name, load_model, resolve_device

    config = start.config
    if resolve_device(config.device).type == "cpu":
        torch.set_num_threads(start.threads or max(1, torch.get_num_threads() - 1))
    checkpoint = open_checkpoint(start.model)
    model = load_model(checkpoint, config.device, config.dtype, progress=sys.stderr.isatty())
    core = EngineCore(model, checkpoint.generation, config)
    defaults, spec, stats = checkpoint.generation, core.spec, core.stats()
    return core, EngineInfo(
        attention=spec.attention_kind,
        num_layers=len(spec.layers),
        vocab_size=spec.vocab_size,
        dtype=dtype_name(model.dtype),
        device=str(model.device),
        max_len=core.max_len,
        max_num_seqs=config.max_num_seqs,
        cache_tokens=stats.total_blocks * stats.block_size,
        block_size=stats.block_size,
        cache_bytes_per_token=spec.cache_bytes_per_token(model.dtype.itemsize),
        temperature=defaults.temperature,
        top_k=defaults.top_k,
        top_p=defaults.top_p,
        repetition_penalty=defaults.repetition_penalty,
    )


class Link:
    """The engine's end of the socket: reading that can wait or not, writing that never does."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._deframer = Deframer()
        self._unsent = bytearray()

    def receive(self, wait: bool) -> list[Command]:
        """The commands that have come; `wait`: at least one. Sends what was left unsent meanwhile."""
        self._send()
        while wait or select.select([self._socket], [], [], 0)[0]:
            select.select([self._socket], [self._socket] if self._unsent else [], [])
            self._send()
            try:
                data = self._socket.recv(READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            if not data:
                raise EOFError
            if commands := [decode_command(payload) for payload in self._deframer.feed(data)]:
                return commands
        return []

    def send(self, event: Event) -> None:
        self._unsent += frame(event)
        self._send()

    def _send(self) -> None:
        try:
            while self._unsent:
                sent = self._socket.send(memoryview(self._unsent)[:READ_BYTES], socket.MSG_DONTWAIT)
                del self._unsent[:sent]
        except BlockingIOError:
            return

    def send_last(self, event: Event) -> None:
        """Send all there is, waiting as long as it takes."""
        self._unsent += frame(event)
        self._socket.sendall(self._unsent)


def run(sock: socket.socket, load: Load) -> int:
    """Serve the other end of `sock` until it closes; the process's exit status."""
    threading.Thread(target=_exit_with, args=(sock,), daemon=True).start()
    link = Link(sock)
    try:
        start = link.receive(wait=True)[0]
        if not isinstance(start, Start):
            raise TypeError(f"the first command must be Start, not {start}")
        core, info = load(start)
        link.send(Ready(info))
        link.send(Stepped([], core.stats()))
        _serve(link, core)
    except (EOFError, ConnectionError):
        return 0
    except EngineError as error:
        link.send_last(Failed(str(error), input=True))
    except Exception as error:
        traceback.print_exc()
        link.send_last(Failed(f"{type(error).__name__}: {error}", input=False))
    return 1


def _serve(link: Link, core: Core) -> None:
    reported = 0.0  # when stats were last sent
    while True:
        idle = not core.has_work
        for command in link.receive(wait=idle):
            for event in _obey(core, command):
                link.send(event)
        outputs = core.step() if core.has_work else []
        now = time.monotonic()
        due = now - reported >= STATS_SECONDS or not core.has_work
        if outputs or due:
            link.send(Stepped(outputs, core.stats() if due else None))
            reported = now if due else reported


def _obey(core: Core, command: Command) -> list[Refused]:
    """Carry out a command; the requests of it that were refused."""
    refused: list[Refused] = []
    if isinstance(command, Add):
        for request in command.requests:
            try:
                core.add(request)
            except RequestError as error:
                refused.append(Refused(request.id, str(error), error.param))
    elif isinstance(command, Abort):
        core.abort(command.request_ids)
    return refused


def _exit_with(sock: socket.socket) -> None:
    """End this process at once when the other end of the socket is gone, whatever the main thread is doing."""
    poll = select.poll()
    poll.register(sock, 0)  # hang-ups are always reported
    poll.poll()
    os._exit(0)


def main(load: Load = load_core) -> None:
    """Signals are the HTTP process's to handle: it lets requests finish, then closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sock = socket.socket(fileno=int(sys.argv[1]))
    status = run(sock, load)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
