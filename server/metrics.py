"""What /metrics shows: the engine's own counters as they last came, and times as the HTTP process saw them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.messages import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
_TPOT_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_DURATION_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """One per server, with a registry of its own."""

    def __init__(self, engine_stats: Callable[[], EngineStats | None]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine_stats))
        registry = self._registry
        self.time_to_first_token = Histogram(
            "mla_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self.time_per_output_token = Histogram(
            "mla_time_per_output_token_seconds",
            "Of a finished choice, after its first token",
            buckets=_TPOT_BUCKETS,
            registry=registry,
        )
        self.request_duration = Histogram(
            "mla_request_duration_seconds",
            "From a request's arrival to the end of a finished choice",
            buckets=_DURATION_BUCKETS,
            registry=registry,
        )
        self.choices = Counter(
            "mla_choices",
            "Choices ended, by how; abort: by a disconnect or an error",
            ["finish_reason"],
            registry=registry,
        )
        self.responses = Counter(
            "mla_http_responses", "HTTP responses begun, by route and status", ["route", "status"], registry=registry
        )

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the latest EngineStats when asked; nothing is kept up to date in between."""

    _GAUGES = (
        ("mla_requests_running", "Sequences the engine computes now", "num_running"),
        ("mla_requests_waiting", "Sequences that wait for room", "num_waiting"),
        ("mla_cache_blocks", "Cache blocks in all", "total_blocks"),
        ("mla_cache_blocks_free", "Cache blocks no running sequence holds", "free_blocks"),
        ("mla_cache_blocks_reusable", "Of the free ones, those that hold a reusable prefix", "cached_blocks"),
    )
    _COUNTERS = (
        ("mla_prompt_tokens", "Prompt tokens of sequences that got their first token", "prompt_tokens"),
        ("mla_generated_tokens", "Tokens generated", "generated_tokens"),
        ("mla_prefix_hit_tokens", "Prompt tokens found in the prefix cache", "prefix_hit_tokens"),
        ("mla_preemptions", "Sequences put back to make room for others", "preemptions"),
    )

    def __init__(self, engine_stats: Callable[[], EngineStats | None]) -> None:
        self._engine_stats = engine_stats

    def collect(self) -> Iterator[Metric]:
        stats = self._engine_stats()
        if stats is None:
            return
        for name, text, attribute in self._GAUGES:
            yield GaugeMetricFamily(name, text, value=getattr(stats, attribute))
        for name, text, attribute in self._COUNTERS:
            yield CounterMetricFamily(name, text, value=getattr(stats, attribute))
        used = 1 - stats.free_blocks / max(stats.total_blocks, 1)
        yield GaugeMetricFamily("mla_cache_usage_ratio", "Fraction of the cache running sequences hold", value=used)
