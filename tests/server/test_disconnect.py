"""Clients that leave, at any stage, take their work and their blocks with them."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from tests.server.running import Server, serving

openai = pytest.importorskip("openai")


async def one_chat(client, rng: random.Random) -> str:
    """A random request, left early or heard out."""
    ask = {
        "model": "stories",
        "messages": [{"role": "user", "content": "dog " * rng.choice([1, 5, 40, 150])}],
        "max_tokens": rng.choice([1, 10, 60, 200]),
        "n": rng.choice([1, 1, 1, 3]),
        "temperature": rng.choice([0, 1]),
    }
    patience = rng.choice([None, None, 0.001, 0.05, 0.3, 1.0])
    try:
        async with asyncio.timeout(patience):
            if rng.random() < 0.3:
                answer = await client.chat.completions.create(**ask)
                assert all(choice.finish_reason in ("stop", "length") for choice in answer.choices)
                return "whole"
            finished = 0
            leave_at = rng.choice([None, None, 1, 7])
            count = 0
            async with await client.chat.completions.create(**ask, stream=True) as stream:
                async for chunk in stream:
                    finished += sum(choice.finish_reason is not None for choice in chunk.choices)
                    count += 1
                    if count == leave_at:
                        return "left"
            assert finished == ask["n"]
            return "streamed"
    except TimeoutError:
        return "gave up"


async def test_two_hundred_chats_with_random_disconnects(server: Server):
    rng = random.Random(1)
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0, timeout=60) as client:
        busy = asyncio.Semaphore(40)

        async def one(seed: int) -> str:
            async with busy:
                return await one_chat(client, random.Random(seed))

        ends = await asyncio.gather(*(one(rng.getrandbits(32)) for _ in range(200)))
    assert {"whole", "left", "streamed", "gave up"} == set(ends)
    await asyncio.to_thread(server.wait_idle)
    assert (await asyncio.to_thread(server.post, "/v1/completions", {"prompt": "Once", "max_tokens": 4}))[0] == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wait", [0.0, 0.3])
async def test_leaving_ends_the_work_at_once(chat_folder, stream: bool, wait: float):
    """512 tokens at 50 ms each would take half a minute; the engine is idle within moments of the client's leaving."""
    with serving("--model", str(chat_folder), env={"FAKE_STEP_SECONDS": "0.05"}) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        body = b'{"prompt": "a", "max_tokens": 500, "stream": %s}' % (b"true" if stream else b"false")
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        if wait:
            await asyncio.sleep(wait)
            assert server.metric("mla_requests_running") == 1
        writer.close()
        start = time.monotonic()
        await asyncio.sleep(0.3)
        server.wait_idle(2)
        assert time.monotonic() - start < 3
        if wait:
            assert server.metric('mla_choices_total{finish_reason="abort"}') == 1


async def test_a_reader_who_stops_reading_holds_up_nobody(chat_folder):
    with serving("--model", str(chat_folder), "--max-model-len", "100000", env={"FAKE_STEP_SECONDS": "0"}) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]), limit=1)
        body = b'{"prompt": "a", "max_tokens": 90000, "stream": true}'
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        start = time.monotonic()
        answer = await asyncio.to_thread(server.post, "/v1/completions", {"prompt": "b", "max_tokens": 50})
        assert answer[0] == 200
        assert time.monotonic() - start < 5
        writer.close()
        await asyncio.sleep(0.2)
        await asyncio.to_thread(server.wait_idle)
