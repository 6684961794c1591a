"""Timing one grid point on an engine: `batch` prompts of `context` tokens, each continued by `output` tokens.

Definitions: time to first token (TTFT) runs from the moment all prompts are handed over, and is the median over them;
time per output token (TPOT) is taken while all sequences decode, that is after the last one's first token; throughput
counts output tokens over the whole run.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass

from engine.core import EngineCore
from engine.messages import Request
from engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Point:
    """One cell of the grid."""

    context: int
    batch: int


@dataclass(frozen=True)
class Timing:
    """Seconds, and output tokens per second."""

    ttft: float
    tpot: float
    throughput: float


def random_prompts(point: Point, vocab_size: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(point.context)] for _ in range(point.batch)]


def run(
    core: EngineCore, prompts: list[list[int]], params: SamplingParams
) -> tuple[list[list[int]], list[list[float]]]:
    """All prompts at once -> each one's output tokens, and the times they came at, in seconds after the start."""
    tokens: list[list[int]] = [[] for _ in prompts]
    times: list[list[float]] = [[] for _ in prompts]
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        core.add(Request(id=str(i), prompt_ids=prompt, params=params))
    while core.has_work:
        outputs = core.step()
        now = time.perf_counter() - start
        for output in outputs:
            tokens[int(output.request_id)] += output.token_ids
            times[int(output.request_id)] += [now] * len(output.token_ids)
    return tokens, times


def time_engine(core: EngineCore, prompts: list[list[int]], output: int) -> Timing:
    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    _, times = run(core, prompts, params)
    all_started, end = max(t[0] for t in times), max(t[-1] for t in times)
    steps = sum(moment > all_started for moment in max(times, key=lambda t: t[-1]))
    return Timing(
        ttft=statistics.median(t[0] for t in times),
        tpot=(end - all_started) / steps,
        throughput=sum(map(len, times)) / end,
    )


def median_timing(timings: Iterable[Timing]) -> Timing:
    rows = list(timings)
    return Timing(*(statistics.median(getattr(t, name) for t in rows) for name in ("ttft", "tpot", "throughput")))
