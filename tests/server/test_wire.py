"""Frames survive any cut of the byte stream; what is no message is refused."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.messages import EngineStats, Output, Request, TokenLogprobs
from engine.sampling_params import SamplingParams
from server.wire import Abort, Add, Deframer, Failed, Refused, Start, Stepped, decode_command, decode_event, frame

PARAMS = SamplingParams(temperature=0.5, stop=("a", "漢"), seed=-5, logprobs=3)
OUTPUT = Output(request_id="x", token_ids=[1, 2], logprobs=[TokenLogprobs(-0.5, [(1, -0.5)])] * 2, finish_reason="stop")
STATS = EngineStats(**dict.fromkeys(EngineStats.__struct_fields__, 7))
COMMANDS = [
    Start("m", EngineConfig(cache_tokens=5)),
    Add([Request(id="r", prompt_ids=[1], params=PARAMS)]),
    Abort(["r"]),
]
EVENTS = [Failed("no", input=True), Refused("r", "no", None), Stepped([OUTPUT], STATS), Stepped([])]


@given(cuts=st.lists(st.integers(0, 2000)), data=st.data())
def test_any_cut(cuts: list[int], data):
    messages = data.draw(st.lists(st.sampled_from(COMMANDS)))
    raw = b"".join(map(frame, messages))
    edges = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    deframer = Deframer()
    payloads = [p for a, b in itertools.pairwise(edges) for p in deframer.feed(raw[a:b])]
    assert [decode_command(payload) for payload in payloads] == messages


@pytest.mark.parametrize("event", EVENTS)
def test_events(event):
    (payload,) = Deframer().feed(frame(event))
    assert decode_event(payload) == event


@pytest.mark.parametrize("payload", [b"", b"\xc1", msgspec.msgpack.encode({"type": "Nope"}), msgspec.msgpack.encode(5)])
def test_what_is_no_command_is_refused(payload: bytes):
    with pytest.raises(msgspec.MsgspecError):
        decode_command(payload)


def test_an_absurd_length_is_refused():
    with pytest.raises(ValueError, match="frame"):
        list(Deframer().feed(b"\xff\xff\xff\xff"))
