"""What a Prometheus server asks for: requests by outcome, tokens, how long people wait, how full it is.

A registry of its own, so that two servers in one process, and tests, do not share counters.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterator

    from medcot.serve.app import Writes
    from medcot.serve.rows import Row

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """The counters of a server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "medcot_requests_total", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self._answers = Counter(
            "medcot_answers_total", "Answers by model and end.", ["model", "end"], registry=self.registry
        )
        self._tokens = Counter("medcot_tokens_total", "Tokens by kind.", ["model", "kind"], registry=self.registry)
        self._first = Histogram(
            "medcot_first_token_seconds", "From request to first token.", registry=self.registry, buckets=SECONDS
        )
        self._each = Histogram(
            "medcot_token_seconds", "Of a token, after the first.", registry=self.registry, buckets=TOKEN_SECONDS
        )

    def watch(self, scheduler: Writes) -> None:
        """Tell how full a scheduler is, whenever somebody asks."""
        self.registry.register(_Fill(scheduler))

    def note(self, row: Row) -> None:
        """Count a row that has ended."""
        job, num_tokens = row.job, len(row.written)
        self._answers.labels(job.model, row.ending).inc()
        self._tokens.labels(job.model, "read").inc(len(job.prompt_ids))
        self._tokens.labels(job.model, "written").inc(num_tokens)
        self._tokens.labels(job.model, "thought").inc(row.num_think)
        if row.first_s is not None:
            self._first.observe(row.first_s - job.asked_s)
            if num_tokens > 1:
                self._each.observe((time.monotonic() - row.first_s) / (num_tokens - 1))

    def render(self) -> bytes:
        """Return it all in Prometheus's text format."""
        return generate_latest(self.registry)


class _Fill:
    """Gauges that are read from a scheduler when they are asked for."""

    def __init__(self, scheduler: Writes) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """As prometheus_client asks a collector."""
        yield GaugeMetricFamily("medcot_slots", "Answers that can be written together.", self._scheduler.num_slots)
        yield GaugeMetricFamily("medcot_running", "Answers being written.", self._scheduler.num_running)
        yield GaugeMetricFamily("medcot_waiting", "Requests without a slot.", self._scheduler.num_waiting)
