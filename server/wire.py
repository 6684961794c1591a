"""What the HTTP process and the engine process say to each other, and how it lies on the socket between them.

A frame is four bytes of length, big-endian, and a msgpack message: typed, checked against these classes when it is
read, and never pickled.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

from engine.config import EngineConfig
from engine.messages import EngineStats, Output, Request

LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 2**30


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first command: load this."""

    model: str
    config: EngineConfig
    threads: int | None = None  # of a CPU engine; None: every core but the HTTP process's own


class Add(msgspec.Struct, frozen=True, tag=True):
    requests: list[Request]


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[str]


Command = Start | Add | Abort  # the end of the stream is the command to exit


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is being served, as the engine resolved it."""

    attention: str  # "mla" or "gqa"
    num_layers: int
    vocab_size: int
    dtype: str
    device: str
    max_len: int  # tokens of the longest sequence that can be served, prompt and output
    max_num_seqs: int
    cache_tokens: int
    block_size: int
    cache_bytes_per_token: int
    temperature: float | None = None  # the checkpoint's own sampling values, where it has any
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot go on, and exits. `input`: on account of what the user gave it, not of a fault of its own."""

    message: str
    input: bool


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A request the engine did not take, with the words of its RequestError."""

    request_id: str
    message: str
    param: str | None


class Stepped(msgspec.Struct, frozen=True, tag=True):
    """The news of one step, of all requests. `stats` come now and then, and whenever the engine falls idle."""

    outputs: list[Output]
    stats: EngineStats | None = None


Event = Ready | Failed | Refused | Stepped

_encoder = msgspec.msgpack.Encoder()
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode


def frame(message: Command | Event) -> bytes:
    payload = _encoder.encode(message)
    return LENGTH.pack(len(payload)) + payload


class Deframer:
    """Bytes as they come in, frames' payloads out. Raises ValueError at a length nobody would send."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes")
            end = start + LENGTH.size + length
            if len(self._buffer) < end:
                break
            payload = bytes(self._buffer[start + LENGTH.size : end])
            start = end
            yield payload
        del self._buffer[:start]
