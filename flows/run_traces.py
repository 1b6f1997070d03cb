"""Traces of a run by OpenTelemetry: a span per run, per stage, and per batch of a stage's shards, sent by OTLP/HTTP.

::

    unclip run                  config, store, version, how it ended
      download                  samples, shards, quarantines, how it ended
        download shards         what was committed in some ten seconds: shards, samples, failures, retries, steps
        download shards
      ...

Where to send, with which headers and how patiently is said by the standard variables (``OTEL_EXPORTER_OTLP_*``,
``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``); a trace that the run is a part of, by ``TRACEPARENT``. Without an
endpoint nothing of OpenTelemetry is imported for this.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flows.progress import Outcome
from flows.run_record import RunRecord
from stages.errors import ConfigError
from stages.redaction import hide_secrets
from stages.runner import StageProgress

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

BATCH_S = 10.0
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_OURS = "http/protobuf"
# What a collector that does not answer may cost at the end of a run.
_LAST_S = 5.0

logger = logging.getLogger(__name__)


@dataclass
class _Open:
    """A running stage.

    Attributes:
        span: its span.
        began_ns: when its current batch began.
        before: where the stage was then.
        latest: where it is.
    """

    span: Span
    began_ns: int
    before: StageProgress
    latest: StageProgress


class RunTraces:
    """Makes the spans; a ``Display``.

    Args:
        tracer: makes spans.
        record: the run.
        batch_s: seconds a batch of shards lasts at least.
        clock_ns: nanoseconds since 1970.
    """

    def __init__(
        self,
        tracer: Tracer,
        record: RunRecord,
        *,
        batch_s: float = BATCH_S,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._tracer = tracer
        self._batch_ns = int(batch_s * 1e9)
        self._clock_ns = clock_ns
        self._guard = threading.Lock()
        self._open: dict[str, _Open] = {}
        self._failed: list[str] = []
        self._result: tuple[str, Sequence[str]] | None = None
        self._run = tracer.start_span(
            "unclip run", context=_given_context(), start_time=clock_ns(), attributes=_attributes_of(record)
        )

    def update(self, progress: StageProgress) -> None:
        """See ``Display``."""
        if progress.is_waiting:  # what another run does is in that one's traces
            return
        with self._guard:
            now_ns = self._clock_ns()
            stage = self._open.get(progress.stage)
            if stage is None:
                span = self._begin(progress.stage, self._run, now_ns, {"unclip.stage": progress.stage})
                stage = self._open[progress.stage] = _Open(span, now_ns, progress, progress)
            elif _begins_again(stage.latest, progress):
                self._close_batch(stage, now_ns)
                stage.before = progress
            stage.latest = progress
            if now_ns - stage.began_ns >= self._batch_ns:
                self._close_batch(stage, now_ns)

    def end(self, outcome: Outcome) -> None:
        """See ``Display``."""
        if outcome.status == "not ready":
            return
        with self._guard:
            now_ns = self._clock_ns()
            stage = self._open.pop(outcome.stage, None)
            if stage is not None:
                self._close_batch(stage, now_ns)
            name, attributes = outcome.stage, {"unclip.stage": outcome.stage}
            span = stage.span if stage is not None else self._begin(name, self._run, now_ns, attributes)
            span.set_attribute("unclip.status", outcome.status)
            if (manifest := outcome.manifest) is not None:
                span.set_attributes(
                    {
                        "unclip.fingerprint": manifest.fingerprint,
                        "unclip.shards": len(manifest.records),
                        "unclip.shards.quarantined": len(manifest.quarantined),
                        "unclip.samples.in": manifest.num_in,
                        "unclip.samples.kept": manifest.num_kept,
                    }
                )
            if outcome.status == "failed":
                self._failed.append(outcome.message)
                _mark_failed(span, outcome.message)
            span.end(now_ns)

    def note_result(self, status: str, errors: Sequence[str]) -> None:
        """Say how the run ended; without it, the stages and what ends the run tell."""
        with self._guard:
            self._result = (status, errors)

    def close(self, error: BaseException | None) -> None:
        """End every span that is still open.

        Args:
            error: what broke the run off, if something did.
        """
        with self._guard:
            now_ns = self._clock_ns()
            for stage in self._open.values():
                self._close_batch(stage, now_ns)
                stage.span.set_attribute("unclip.status", "cancelled")
                stage.span.end(now_ns)
            self._open.clear()
            if isinstance(error, Exception):
                self._failed.append(f"{type(error).__name__}: {error}")
            seen = "failed" if self._failed else "cancelled" if error is not None else "done"
            status, errors = self._result or (seen, self._failed)
            self._run.set_attribute("unclip.status", status)
            if status == "failed":
                _mark_failed(self._run, "; ".join(errors))
            self._run.end(now_ns)

    def _begin(self, name: str, parent: Span, at_ns: int, attributes: Mapping[str, str | int | float]) -> Span:
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(parent)
        return self._tracer.start_span(name, context=context, start_time=at_ns, attributes=dict(attributes))

    def _close_batch(self, stage: _Open, now_ns: int) -> None:
        """Write what was done since the batch began as a span, if anything was; begin the next one."""
        done = _difference(stage.before, stage.latest)
        if any(done.values()):
            name = stage.latest.stage
            inner = stage.latest.inner
            numbers = {f"unclip.{key}": value for key, value in inner.numbers.items()} if inner is not None else {}
            span = self._begin(f"{name} shards", stage.span, stage.began_ns, {"unclip.stage": name, **done, **numbers})
            span.end(now_ns)
        stage.began_ns, stage.before = now_ns, stage.latest


class _FailuresToldOnce(logging.Filter):
    """Turns what the exporter says of every try, for hours if need be, into one line of ours."""

    def __init__(self) -> None:
        super().__init__()
        self._told = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Take a line of the exporter."""
        if record.levelno >= logging.WARNING and not self._told:
            self._told = True
            place = next(os.environ[name] for name in reversed(_ENDPOINTS) if os.environ.get(name))
            what = record.getMessage().rstrip(".")
            logger.warning("traces do not arrive at %s: %s; the run goes on, and this is said once", place, what)
        return False


def wanted() -> bool:
    """Tell whether the environment names a place to send traces to."""
    return any(os.environ.get(name) for name in _ENDPOINTS)


@contextlib.contextmanager
def exported(record: RunRecord) -> Iterator[RunTraces]:
    """Make and send the spans of a run for the length of a ``with`` block.

    A collector that does not answer is told in the log and costs seconds, never the run.

    Raises:
        ConfigError: if OpenTelemetry is not installed, or another protocol than OTLP over HTTP is asked for.
    """
    _refuse_other_protocols()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"{_ENDPOINTS[0]} is set, but {error.name} is not installed; "
            "`pip install 'unclip-pipeline[otel]'`, or unset the variable"
        ) from error

    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "unclip"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    exporter_log, told = logging.getLogger(OTLPSpanExporter.__module__), _FailuresToldOnce()
    exporter_log.addFilter(told)
    traces = RunTraces(provider.get_tracer("unclip", record.code_version), record)
    broken: BaseException | None = None
    try:
        yield traces
    except BaseException as failure:
        broken = failure
        raise
    finally:
        traces.close(broken)
        # It may take half a minute where nobody answers; what is not sent by then is given up with the process.
        sending = threading.Thread(target=provider.shutdown, name="traces", daemon=True)
        sending.start()
        sending.join(_LAST_S)
        if not sending.is_alive():
            exporter_log.removeFilter(told)


def _refuse_other_protocols() -> None:
    for name in _PROTOCOLS:
        if protocol := os.environ.get(name):
            if protocol != _OURS:
                raise ConfigError(
                    f"{name}: {protocol}: traces are sent by {_OURS} alone; write that, with the collector's port for "
                    "it (4318 as a rule) in OTEL_EXPORTER_OTLP_ENDPOINT"
                )
            return


def _given_context() -> Context | None:
    """Return the trace that whoever started this process is in; None if there is none."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    given = os.environ.get("TRACEPARENT")
    return TraceContextTextMapPropagator().extract({"traceparent": given}) if given else None


def _attributes_of(record: RunRecord) -> dict[str, str | list[str]]:
    return {
        "unclip.run": record.id,
        "unclip.config": record.config,
        "unclip.config.digest": record.config_digest,
        "unclip.stages": list(record.selected),
    }


def _begins_again(before: StageProgress, after: StageProgress) -> bool:
    """Tell whether a stage is tried once more: it counts from what is committed, and its samples from none."""
    return after.num_done < before.num_done or after.num_samples < before.num_samples


def _difference(before: StageProgress, after: StageProgress) -> dict[str, int]:
    """Say what happened between two moments of a stage."""
    counts = {
        "unclip.shards": after.num_done - before.num_done,
        "unclip.samples": after.num_samples - before.num_samples,
        "unclip.failures": after.num_failures - before.num_failures,
        "unclip.retries": after.num_retries - before.num_retries,
    }
    if after.inner is not None and after.inner.unit == "steps":
        first = before.inner.done if before.inner is not None else 0
        counts["unclip.steps"] = max(0, after.inner.done - first)
    return counts


def _mark_failed(span: Span, message: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR, hide_secrets(message)))
