"""Prometheus metrics of a run, over HTTP while it runs; ``cluster/grafana/unclip.json`` is the dashboard for them."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

from flows.progress import Outcome
from stages.errors import ConfigError
from stages.runner import StageProgress

# As in ``cluster/training.py``, which must not be imported here: it would bring Ray.
_RESTARTED = "training_restarted"
_COUNTERS = {
    "unclip_samples": "samples that went into the shards done by this run",
    "unclip_shard_failures": "tries of shards that failed",
    "unclip_shard_retries": "tries of shards after their first one",
    "unclip_training_restarts": "times a training group died and was started again",
}
_GAUGES = {
    "unclip_shards": "shards of the stage",
    "unclip_shards_done": "shards committed, by earlier runs too",
    "unclip_shards_quarantined": "shards given up on",
    "unclip_stage_running": "1 while the stage runs",
    "unclip_stage_failed": "1 if the stage failed",
    "unclip_stage_seconds": "seconds the finished stage took in this run",
    "unclip_training_step": "optimizer steps done",
    "unclip_training_steps": "optimizer steps in all",
    "unclip_training_loss": "loss of the latest reported step",
    "unclip_training_samples_per_second": "samples per second over all ranks",
    "unclip_training_data_wait_fraction": "share of the time in which the first rank waits for data, 0 to 1",
}
_OF_INNER = {
    "loss": "unclip_training_loss",
    "samples_per_s": "unclip_training_samples_per_second",
    "data_wait": "unclip_training_data_wait_fraction",
}
# What a scrape shows: the names that dashboards and alerts use.
EXPORTED = frozenset({*(f"{name}_total" for name in _COUNTERS), *_GAUGES})


class RunMetrics(logging.Handler):
    """Keeps the numbers; a ``Display``, and a log handler that counts restarts."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge

        super().__init__(logging.WARNING)
        self.registry = CollectorRegistry()
        kinds = ((Counter, _COUNTERS), (Gauge, _GAUGES))
        self._metrics: dict[str, Any] = {
            name: kind(name, text, ["stage"], registry=self.registry)
            for kind, texts in kinds
            for name, text in texts.items()
        }
        self._seen: dict[tuple[str, str], int] = {}
        self._guard = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        """Count a restart."""
        if getattr(record, "event", "") == _RESTARTED:
            self._metrics["unclip_training_restarts"].labels(getattr(record, "stage", "")).inc()

    def update(self, progress: StageProgress) -> None:
        """See ``Display``."""
        stage = progress.stage
        self._count(stage, "unclip_samples", progress.num_samples)
        self._count(stage, "unclip_shard_failures", progress.num_failures)
        self._count(stage, "unclip_shard_retries", progress.num_retries)
        self._set(stage, "unclip_shards", progress.num_shards)
        self._set(stage, "unclip_shards_done", progress.num_done)
        self._set(stage, "unclip_shards_quarantined", progress.num_quarantined)
        self._set(stage, "unclip_stage_running", 0 if progress.finished else 1)
        inner = progress.inner
        # From the first look on: `increase` knows nothing of a counter whose first value is the first restart.
        self._metrics["unclip_training_restarts"].labels(stage)
        if inner is not None and inner.unit == "steps":
            self._set(stage, "unclip_training_step", inner.done)
            self._set(stage, "unclip_training_steps", inner.total)
            for name, value in inner.numbers.items():
                if name in _OF_INNER:
                    self._set(stage, _OF_INNER[name], value)

    def end(self, outcome: Outcome) -> None:
        """See ``Display``."""
        stage = outcome.stage
        self._set(stage, "unclip_stage_running", 0)
        self._set(stage, "unclip_stage_failed", 1 if outcome.status == "failed" else 0)
        self._set(stage, "unclip_stage_seconds", outcome.wall_time_s)
        if outcome.manifest is not None:
            num_done, num_quarantined = len(outcome.manifest.records), len(outcome.manifest.quarantined)
            self._set(stage, "unclip_shards", num_done + num_quarantined)
            self._set(stage, "unclip_shards_done", num_done)
            self._set(stage, "unclip_shards_quarantined", num_quarantined)

    @contextlib.contextmanager
    def served(self, host: str, port: int) -> Iterator[int]:
        """Serve them for the length of a ``with`` block; give the port, which the system chooses if it is 0.

        Raises:
            ConfigError: if the port is taken.
        """
        from prometheus_client import start_http_server

        try:
            server, thread = start_http_server(port, host, self.registry)
        except OSError as error:
            raise ConfigError(
                f"cluster.metrics_port: {port}: cannot listen on {host} ({error.strerror}); choose another port"
            ) from error
        logging.getLogger().addHandler(self)
        try:
            yield server.server_port
        finally:
            logging.getLogger().removeHandler(self)
            server.shutdown()
            server.server_close()
            thread.join()

    def _set(self, stage: str, name: str, value: float) -> None:
        self._metrics[name].labels(stage).set(value)

    def _count(self, stage: str, name: str, value: int) -> None:
        """Raise a counter to what a stage reports; a stage that begins again reports from 0."""
        with self._guard:
            before = self._seen.get((stage, name), 0)
            self._seen[stage, name] = value
        self._metrics[name].labels(stage).inc(value - before if value >= before else value)
