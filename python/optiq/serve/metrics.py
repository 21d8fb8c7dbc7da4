"""What the server tells Prometheus."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from .usage import Usage

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

LAST_ERRORS = 20  # that the page shows

# Of the engine's Stats, and what each says.
_GAUGES = {
    "running": "answers that are being made",
    "waiting": "answers that wait for room",
    "kv_bytes": "bytes of keys and values of running answers",
    "drafted_tokens": "tokens that were guessed from earlier text, since the start",
    "accepted_tokens": "tokens that were guessed right, since the start",
}


class Metrics:
    """Counters of one server. They may be changed and read from any thread. `stats` has the
    engine's Stats of each model."""

    def __init__(self, stats: Callable[[], Mapping[str, Any]]) -> None:
        self._registry = CollectorRegistry()
        self._stats = stats
        registry: dict[str, Any] = {"registry": self._registry, "namespace": "optiq"}
        self.first_token = Histogram(
            "time_to_first_token_seconds",
            "from a request to its first token",
            buckets=_SECONDS,
            **registry,
        )
        self.between_tokens = Histogram(
            "inter_token_seconds", "from token to token", buckets=_TOKEN_SECONDS, **registry
        )
        self.requests = Counter("requests", "HTTP requests", ("path", "status"), **registry)
        self.errors = Counter("errors", "errors that clients were told", ("code",), **registry)
        self.aborts = Counter("aborts", "requests whose client went away", **registry)
        self._prompt = Counter("prompt_tokens", "tokens of prompts", **registry)
        self._cached = Counter(
            "cached_tokens", "tokens of prompts that the prefix cache held", **registry
        )
        self._generated = Counter("generated_tokens", "tokens of answers", **registry)
        self._finished = Counter("answers", "complete answers", ("reason",), **registry)
        self.last_errors: deque[tuple[float, str]] = deque(maxlen=LAST_ERRORS)  # time, code
        self._registry.register(self)  # collect() is all it needs

    def told(self, code: str) -> None:
        """A client was told of an error."""
        self.errors.labels(code).inc()
        self.last_errors.append((time.time(), code))

    def answered(self, reason: str, prompt: int, usage: Usage) -> None:
        """An answer is complete; `prompt` is 0 where another one has counted its tokens."""
        self._finished.labels(reason).inc()
        self._prompt.inc(prompt)
        self._cached.inc(usage.cached)
        self._generated.inc(usage.generated)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The engine's state at the time of asking."""
        all_stats = list(self._stats().values())
        for name, text in _GAUGES.items():
            value = sum(getattr(stats, name) for stats in all_stats)
            yield GaugeMetricFamily(f"optiq_{name}", text, value=value)

    def text(self) -> bytes:
        return generate_latest(self._registry)
