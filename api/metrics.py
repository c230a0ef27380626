"""Prometheus metrics: requests of this process, and the state of all jobs as SQL tells it, asked every few seconds."""

import threading
import time
from collections.abc import Iterator
from typing import Any, Final

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Engine, text

from shared.database import AWAY
from shared.jobs.state import QUEUES
from shared.jobs.workers import GONE_AFTER

CACHE_SECONDS: Final = 5.0

_WAITING: Final = text("""
SELECT queue, CASE WHEN state = 'queued' AND queued_at IS NULL THEN 'waiting' ELSE state END, count(*),
    coalesce(extract(epoch FROM clock_timestamp() - min(queued_at)), 0)
FROM jobs WHERE state IN ('queued', 'running', 'canceling', 'pausing', 'paused') GROUP BY 1, 2
""")
_FINISHED: Final = text("SELECT type, state, count(*) FROM jobs WHERE completed_at IS NOT NULL GROUP BY type, state")
_ATTEMPTS: Final = text("SELECT outcome, count(*) FROM attempts WHERE outcome IS NOT NULL GROUP BY outcome")
_WORKERS: Final = text("""
SELECT CASE WHEN state <> 'stopped' AND seen_at < clock_timestamp() - :gone_after THEN 'gone' ELSE state END, count(*)
FROM workers GROUP BY 1
""")
_MODELS: Final = text("SELECT name, model_hits, model_misses FROM workers ORDER BY name")
_OUTBOX: Final = text("SELECT count(*) FROM outbox WHERE sent_at IS NULL")


class Meters:
    """The metrics of one app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Histogram(
            "noisemill_http_request_seconds",
            "Seconds from a request to the first byte of its answer",
            ["method", "route", "status"],
            registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60),
        )


class JobCollector(Collector):
    """Gauges and counters from SQL. Every API process shows the same: take one, do not sum them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._metrics: list[Metric] = []

    def describe(self) -> list[Metric]:
        """Nothing is asked at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            if time.monotonic() - self._read_at > CACHE_SECONDS:
                self._metrics = self._read()
                self._read_at = time.monotonic()
            yield from self._metrics

    def _read(self) -> list[Metric]:
        up = GaugeMetricFamily("noisemill_database_up", "Whether the database answers")
        try:
            with self._engine.connect() as connection:
                metrics = [*_queues(connection), *_totals(connection)]
        except AWAY:
            up.add_metric([], 0)
            return [up]
        up.add_metric([], 1)
        return [up, *metrics]


def _queues(connection: Any) -> list[Metric]:
    depth = GaugeMetricFamily("noisemill_queue_jobs", "Jobs that have not ended", labels=["queue", "state"])
    oldest = GaugeMetricFamily(
        "noisemill_queue_oldest_seconds", "How long the oldest queued job waits", labels=["queue"]
    )
    # What scales workers must see a zero, not a gap.
    counts = {(queue, state): 0 for queue in sorted(set(QUEUES.values())) for state in ("queued", "running")}
    ages = dict.fromkeys(sorted(set(QUEUES.values())), 0.0)
    for queue, state, count, age in connection.execute(_WAITING):
        counts[queue, state] = count
        if state == "queued":
            ages[queue] = float(age)
    for labels, count in counts.items():
        depth.add_metric(labels, count)
    for queue, age in ages.items():
        oldest.add_metric([queue], age)
    outbox = GaugeMetricFamily("noisemill_outbox_bells", "Bells that were not published yet")
    outbox.add_metric([], connection.execute(_OUTBOX).scalar_one())
    return [depth, oldest, outbox]


def _totals(connection: Any) -> list[Metric]:
    finished = CounterMetricFamily("noisemill_jobs_finished", "Jobs that ended", labels=["type", "state"])
    for kind, state, count in connection.execute(_FINISHED):
        finished.add_metric([kind, state], count)
    attempts = CounterMetricFamily("noisemill_attempts", "Attempts that ended", labels=["outcome"])
    for outcome, count in connection.execute(_ATTEMPTS):
        attempts.add_metric([outcome], count)
    workers = GaugeMetricFamily("noisemill_workers", "Workers by what they do", labels=["state"])
    for state, count in connection.execute(_WORKERS, {"gone_after": GONE_AFTER}):
        workers.add_metric([state], count)
    return [finished, attempts, workers, *_models(connection)]


def _models(connection: Any) -> list[Metric]:
    hits = CounterMetricFamily("noisemill_model_hits", "Jobs whose model was loaded already", labels=["worker"])
    misses = CounterMetricFamily("noisemill_model_misses", "Jobs whose model had to be loaded", labels=["worker"])
    for name, num_hits, num_misses in connection.execute(_MODELS):
        hits.add_metric([name], num_hits)
        misses.add_metric([name], num_misses)
    return [hits, misses]
