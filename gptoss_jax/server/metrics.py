"""What the server measures, for Prometheus: latencies and requests as they happen, the engine's own
numbers as they are when asked."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from gptoss_jax.batching.requests import BatchingEngine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
STEPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
SIZES = (16, 64, 256, 1024, 4096, 16384, 65536, 131072)
HELP = {
    "slots": "Sequences that may be at work at once",
    "slots_busy": "Sequences at work",
    "queue": "Requests that wait",
    "cache_pages": "Pages of the key-value cache",
    "cache_pages_busy": "Pages of the key-value cache in use",
    "prompt_tokens": "Prompt tokens read, cached ones included",
    "cached_tokens": "Prompt tokens taken from the prefix cache",
    "generated_tokens": "Tokens generated",
    "steps": "Steps of the engine",
    "draft_tokens": "Tokens drafted",
    "accepted_tokens": "Drafted tokens that were accepted",
    "requests": "Requests taken by the engine",
    "cancelled": "Completions cancelled",
}


class Metrics:
    """The server's numbers, all named gptoss_*; one registry a server."""

    def __init__(self, engine: BatchingEngine):
        self.registry = CollectorRegistry()
        own: Any = {"registry": self.registry}
        self.requests = Counter(
            "gptoss_http_requests", "Answered requests", ["route", "status"], **own
        )
        self.duration = Histogram(
            "gptoss_request_duration_seconds",
            "From the request to the end of its answer",
            ["route"],
            buckets=SECONDS,
            **own,
        )
        self.first_token = Histogram(
            "gptoss_time_to_first_token_seconds",
            "From the request to its first token",
            buckets=SECONDS,
            **own,
        )
        self.between_tokens = Histogram(
            "gptoss_time_between_tokens_seconds",
            "Between the tokens of one completion",
            buckets=STEPS,
            **own,
        )
        self.prompt_tokens = Histogram(
            "gptoss_request_prompt_tokens", "Prompt tokens of a request", buckets=SIZES, **own
        )
        self.completion_tokens = Histogram(
            "gptoss_request_completion_tokens",
            "Tokens generated for a request",
            buckets=SIZES,
            **own,
        )
        self.finished = Counter(
            "gptoss_completions_finished", "Completions by why they ended", ["reason"], **own
        )
        self.registry.register(_EngineNumbers(engine))

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineNumbers:
    """The engine's statistics, read when they are asked for."""

    def __init__(self, engine: BatchingEngine):
        self.engine = engine

    def collect(self) -> Iterator[Any]:
        for name, value in self.engine.statistics().items():
            plain = name.removesuffix("_total")
            text = HELP.get(plain, plain.replace("_", " "))
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(f"gptoss_engine_{plain}", text, value=value)
