"""The load generator against a server of canned answers, whose timing is known."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from bench.__main__ import main
from bench.serve import Answer, spread, summary

GAP = 0.02


class Canned:
    """Streams `max_tokens` words, one every GAP seconds; every `fail_every`-th request is refused."""

    def __init__(self) -> None:
        self.fail_every = 0
        self.bodies: list[dict] = []
        self.running = self.most = 0

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "canned"}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.fail_every and len(self.bodies) % self.fail_every == 0:
            return web.json_response({"error": {"message": "no"}}, status=429)
        self.running += 1
        self.most = max(self.most, self.running)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(body["max_tokens"]):
            await asyncio.sleep(GAP)
            await response.write(b"data: " + json.dumps({"choices": [{"text": "word "}]}).encode() + b"\n\n")
        usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
        await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        self.running -= 1
        return response


@pytest.fixture
def canned() -> Iterator[tuple[Canned, str]]:
    canned, ready, loop = Canned(), threading.Event(), asyncio.new_event_loop()
    url: list[str] = []

    async def serve() -> None:
        app = web.Application()
        app.router.add_get("/v1/models", canned.models)
        app.router.add_post("/v1/completions", canned.completions)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        ready.set()

    def run() -> None:
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    yield canned, url[0]
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def bench(monkeypatch: pytest.MonkeyPatch, url: str, *options: str) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "serve", "--url", url, *options])
    main()


def test_closed_loop(canned: tuple[Canned, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server, url = canned
    out = tmp_path / "out.json"
    bench(monkeypatch, url, "--requests", "6", "--concurrency", "2", "--output-tokens", "5", "--json", str(out))
    results = json.loads(out.read_text())
    assert results["requests"] == 6
    assert results["errors"] == {}
    assert server.most == 2
    assert {b["model"] for b in server.bodies} == {"canned"}
    assert len({b["prompt"] for b in server.bodies}) == 6
    assert results["ttft_ms"]["p50"] >= 1e3 * GAP * 0.9
    assert results["tpot_ms"]["p50"] >= 1e3 * GAP * 0.9
    assert results["output_tokens_per_second"] * results["seconds"] == pytest.approx(30)
    assert results["prompt_tokens_per_second"] * results["seconds"] == pytest.approx(42)


def test_open_loop_does_not_wait_for_answers(canned: tuple[Canned, str], monkeypatch: pytest.MonkeyPatch) -> None:
    server, url = canned
    bench(monkeypatch, url, "--requests", "8", "--rate", "500", "--output-tokens", "10")
    assert server.most > 4


def test_refused_requests_are_counted(
    canned: tuple[Canned, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server, url = canned
    server.fail_every = 3
    with pytest.raises(SystemExit) as exit_status:
        bench(monkeypatch, url, "--requests", "6", "--output-tokens", "2")
    assert exit_status.value.code == 1
    assert "2 x status 429" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--rate", "0"], ["--requests", "0"]])
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    with pytest.raises(SystemExit) as exit_status:
        bench(monkeypatch, "http://127.0.0.1:9", *options)  # nobody listens there
    assert exit_status.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_percentiles() -> None:
    assert spread([0.001 * i for i in range(1, 102)]) == pytest.approx({"mean": 51, "p50": 51, "p90": 91, "p99": 100})
    assert spread([0.5]) == {"mean": 500, "p50": 500, "p90": 500, "p99": 500}
    answers = [Answer([1.0, 2.0, 4.0], 4.0, 5, 4), Answer(error="gone")]
    results = summary(answers, 8.0)
    assert results["tpot_ms"]["p50"] == pytest.approx(1000)
    assert results["errors"] == {"gone": 1}
    assert results["output_tokens_per_second"] == 0.5
