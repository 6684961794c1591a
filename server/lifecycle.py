"""From start to exit: the port, the engine, the application, and how they end.

Exit status: 0 after SIGTERM or SIGINT, 1 where the port is taken or the engine died, 2 where what was asked for cannot
be served.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.tokenizer import Tokenizer
from server.app import make_app
from server.banner import banner
from server.engine_client import ENGINE_COMMAND, EngineClient
from server.errors import EngineGone, shutting_down
from server.metrics import Metrics
from server.state import Admission, ServerState
from server.wire import Start

GONE_SECONDS = 1.0  # how long /health says that the engine is gone before the process ends
CLOSE_SECONDS = 2.0  # for connections to take their last bytes

log = logging.getLogger("server")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    model: str
    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_waiting: int = 1024
    shutdown_timeout: float = 60.0
    engine: EngineConfig
    threads: int | None = None


def run(config: ServerConfig, engine_command: Sequence[str] = ENGINE_COMMAND) -> int:
    """Serve until told to stop; the process's exit status. One line on stderr says what went wrong, if anything did."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        with _bind(config.host, config.port) as sock:
            return asyncio.run(_serve(config, sock, engine_command))
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (EngineGone, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the handlers of signals stand
        return 0


def _bind(host: str, port: int) -> socket.socket:
    """Taken before the model is loaded, so that a port in use costs no minutes. Raises OSError saying which."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(1024)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return sock


async def _serve(config: ServerConfig, sock: socket.socket, engine_command: Sequence[str]) -> int:
    stop = _Stop()
    tokenizer = Tokenizer.from_folder(config.model)
    start = Start(config.model, config.engine, config.threads)
    starting = asyncio.create_task(EngineClient.start(start, engine_command))
    await stop.first_of(starting)
    if not starting.done():
        starting.cancel()
        await asyncio.wait([starting])
        return 0
    engine = starting.result()
    try:
        state = ServerState(
            engine=engine,
            tokenizer=tokenizer,
            model_name=config.model_name,
            model_path=str(Path(config.model).resolve()),
            created=int(time.time()),
            admission=Admission(engine.info.max_num_seqs + config.max_waiting),
            metrics=Metrics(lambda: engine.stats),
            api_keys=tuple(key.encode() for key in config.api_keys),
        )
        runner = web.AppRunner(
            make_app(state), handler_cancellation=True, access_log=None, shutdown_timeout=CLOSE_SECONDS
        )
        await runner.setup()
        await web.SockSite(runner, sock).start()
        print(banner(state, sock), flush=True)
        try:
            return await _until_stopped(config, state, stop)
        finally:
            await runner.cleanup()
            state.text_threads.shutdown(wait=False, cancel_futures=True)
    finally:
        await engine.close()


async def _until_stopped(config: ServerConfig, state: ServerState, stop: _Stop) -> int:
    gone = asyncio.create_task(state.engine.gone.wait())
    await stop.first_of(gone)
    if gone.done():
        return await _mourn(state)
    state.admission.closed = True
    log.info("shutting down: %d sequences to finish", state.engine.num_in_flight)
    empty = asyncio.create_task(state.admission.empty.wait())
    again = asyncio.create_task(stop.again.wait())
    await asyncio.wait([empty, again, gone], timeout=config.shutdown_timeout, return_when=asyncio.FIRST_COMPLETED)
    if gone.done():
        return await _mourn(state)
    if not empty.done():
        log.warning("%d sequences are cut off", state.engine.num_in_flight)
        state.engine.give_up(shutting_down())
        await asyncio.wait([empty], timeout=CLOSE_SECONDS)
    return 0


async def _mourn(state: ServerState) -> int:
    log.error("the engine is gone: %s", state.engine.why_gone)
    await asyncio.sleep(GONE_SECONDS)
    return 1


class _Stop:
    """SIGTERM and SIGINT: the first asks for an orderly end, the second for a quick one."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.again = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._note)

    def _note(self) -> None:
        (self.again if self.asked.is_set() else self.asked).set()

    async def first_of(self, task: asyncio.Task) -> None:  # type: ignore[type-arg]
        """Until the task is done or a signal came."""
        asked = asyncio.create_task(self.asked.wait())
        await asyncio.wait([asked, task], return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
