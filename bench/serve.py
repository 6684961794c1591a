"""`python -m bench serve`: load on an OpenAI-compatible server, and what its clients see.

Closed loop (the default): `--concurrency` clients, each sending its next request when the last is answered. Open loop:
`--rate` requests per second arrive at random (Poisson), whether or not earlier ones are answered; raise it until the
time to first token grows without bound, and that is the server's capacity.

Prompts are random words, so that none shares a prefix with another; answers are forced to their full length.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from engine.errors import EngineError

WORDS = (
    "the", "a", "cat", "dog", "boat", "tree", "sun", "rain", "went", "saw", "took", "small", "big", "red", "old",
    "happy", "quick", "over", "under", "with", "and", "then",
)  # fmt: skip


@dataclass
class Answer:
    """One request, in seconds after it was sent. `tokens` as the server counts them."""

    token_times: list[float] = field(default_factory=list)  # arrival of every piece of text
    end: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.token_times[0]

    @property
    def tpot(self) -> float:
        """From the first piece to the last, by each token after the first."""
        return (self.token_times[-1] - self.token_times[0]) / max(1, self.tokens - 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", required=True, help="where the server is, such as http://127.0.0.1:8000")
    parser.add_argument("--model", help="model name (default: the first that the server lists)")
    parser.add_argument("--requests", type=int, default=64, help="requests in all (default 64)")
    parser.add_argument("--concurrency", type=int, default=8, help="closed loop: clients at once (default 8)")
    parser.add_argument("--rate", type=float, help="open loop: requests per second, instead of --concurrency")
    parser.add_argument("--prompt-words", type=int, default=100, help="words in a prompt (default 100)")
    parser.add_argument("--output-tokens", type=int, default=64, help="tokens in an answer (default 64)")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one request (default 600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results there")


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON of every server-sent event up to [DONE]. Raises EngineError for an error event."""
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            return
        event = json.loads(line[6:])
        if event.get("error"):
            raise EngineError(str(event["error"].get("message", event["error"])))
        yield event


async def ask(session: aiohttp.ClientSession, body: dict[str, Any]) -> Answer:
    """One streamed completion; what goes wrong is noted in the answer, not raised."""
    answer = Answer()
    start = time.perf_counter()
    try:
        async with session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                raise EngineError(f"status {response.status}: {(await response.text())[:200]}")
            async for event in events(response):
                if event.get("choices") and event["choices"][0].get("text"):
                    answer.token_times.append(time.perf_counter() - start)
                if event.get("usage"):
                    answer.prompt_tokens = event["usage"]["prompt_tokens"]
                    answer.tokens = event["usage"]["completion_tokens"]
        if not answer.token_times:
            raise EngineError("the answer had no text")
    except (TimeoutError, EngineError, aiohttp.ClientError, ValueError, KeyError) as error:
        answer.error = str(error) or type(error).__name__
    answer.end = time.perf_counter() - start
    return answer


async def load(args: argparse.Namespace) -> tuple[list[Answer], float]:
    """Every answer, and the seconds that all of them took."""
    rng = random.Random(args.seed)
    headers, timeout = {"Authorization": f"Bearer {args.api_key}"}, aiohttp.ClientTimeout(args.timeout)
    connector = aiohttp.TCPConnector(limit=0)
    url = args.url.rstrip("/")
    async with aiohttp.ClientSession(url, connector=connector, headers=headers, timeout=timeout) as session:
        model = args.model or await first_model(session)
        bodies = [
            {
                "model": model, "prompt": " ".join(rng.choices(WORDS, k=args.prompt_words)), "stream": True,
                "max_tokens": args.output_tokens, "ignore_eos": True, "temperature": 0.0,
                "stream_options": {"include_usage": True},
            }
            for _ in range(args.requests)
        ]  # fmt: skip
        slots = asyncio.Semaphore(args.requests if args.rate else args.concurrency)
        with tqdm(total=args.requests, unit="request") as bar:

            async def one(body: dict[str, Any]) -> Answer:
                async with slots:
                    answer = await ask(session, body)
                bar.update()
                return answer

            start = time.perf_counter()
            tasks = []
            for body in bodies:
                tasks.append(asyncio.create_task(one(body)))
                if args.rate:
                    await asyncio.sleep(rng.expovariate(args.rate))
            return await asyncio.gather(*tasks), time.perf_counter() - start


async def first_model(session: aiohttp.ClientSession) -> str:
    try:
        async with session.get("/v1/models") as response:
            response.raise_for_status()
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, ValueError, KeyError, IndexError) as error:
        raise EngineError(f"no OpenAI-compatible server answers there: {error}") from None


def spread(seconds: list[float]) -> dict[str, float]:
    """Mean and percentiles, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else seconds * 99
    return {name: 1e3 * value for name, value in
            (("mean", statistics.fmean(seconds)), ("p50", cuts[49]), ("p90", cuts[89]), ("p99", cuts[98]))}  # fmt: skip


def summary(answers: list[Answer], seconds: float) -> dict[str, Any]:
    good = [a for a in answers if a.error is None]
    gaps = [b - a for answer in good for a, b in zip(answer.token_times, answer.token_times[1:], strict=False)]
    return {
        "requests": len(answers),
        "errors": dict(Counter(a.error for a in answers if a.error is not None)),
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": sum(a.tokens for a in good) / seconds,
        "prompt_tokens_per_second": sum(a.prompt_tokens for a in good) / seconds,
        "ttft_ms": spread([a.ttft for a in good]),
        "tpot_ms": spread([a.tpot for a in good]),
        "inter_token_ms": spread(gaps or [0.0]),
        "request_ms": spread([a.end for a in good]),
    }


def main(args: argparse.Namespace) -> None:
    if min(args.requests, args.concurrency, args.prompt_words, args.output_tokens) < 1 or (args.rate or 1) <= 0:
        raise EngineError("--requests, --concurrency, --prompt-words, --output-tokens and --rate must be above 0")
    answers, seconds = asyncio.run(load(args))
    failed = [a.error for a in answers if a.error is not None]
    if len(failed) == len(answers):
        raise EngineError(f"every request failed, the first with: {failed[0]}")
    results = summary(answers, seconds)
    print(f"{results['requests']} requests, {len(failed)} failed, in {seconds:.1f} s")
    print(
        f"{results['requests_per_second']:.2f} requests/s, {results['output_tokens_per_second']:.1f} output tokens/s, "
        f"{results['prompt_tokens_per_second']:.1f} prompt tokens/s"
    )
    print(f"{'ms':>22} {'mean':>9} {'p50':>9} {'p90':>9} {'p99':>9}")
    titles = (("ttft_ms", "time to first token"), ("tpot_ms", "time per output token"),
              ("inter_token_ms", "between pieces"), ("request_ms", "whole request"))  # fmt: skip
    for key, title in titles:
        print(f"{title:>22} " + " ".join(f"{results[key][name]:>9.2f}" for name in ("mean", "p50", "p90", "p99")))
    for message, count in results["errors"].items():
        print(f"{count} x {message}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if failed:
        raise SystemExit(1)
