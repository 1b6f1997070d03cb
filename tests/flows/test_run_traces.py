"""Traces: what a collector receives of a run over real OTLP/HTTP, and nothing loaded where nobody wants them."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flows.progress import LogDisplay, Outcome
from flows.project import open_project
from flows.recording import recorded
from flows.run_record import RunRecord, begin_run, read_runs
from flows.run_traces import RunTraces, exported
from flows.selection import Selection
from stages.base import Progress
from stages.errors import ConfigError, ShardError
from stages.executor import ClusterConfig, LocalExecutor
from stages.manifest import Manifest
from stages.runner import StageProgress, run_stage
from tests.conftest import free_port

TOP = Path(__file__).parents[2]
TINY = str(TOP / "tests" / "tiny.yaml")
SECRET = "planted-key-of-the-collector"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass
class Collector:
    """What came in over OTLP/HTTP."""

    url: str = ""
    headers: list[dict[str, str]] = field(default_factory=list)
    requests: list[ExportTraceServiceRequest] = field(default_factory=list)

    @property
    def spans(self) -> list[Span]:
        scopes = [scope for request in self.requests for one in request.resource_spans for scope in one.scope_spans]
        return sorted((span for scope in scopes for span in scope.spans), key=lambda span: span.start_time_unix_nano)

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            is_ours = self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
            if is_ours:
                collector.headers.append(dict(self.headers.items()))
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200 if is_ours else 404)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        collector.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield collector
        server.shutdown()


def values(span: Span) -> dict[str, Any]:
    """The attributes of a span as plain values."""
    return {
        item.key: [one.string_value for one in item.value.array_value.values]
        if item.value.HasField("array_value")
        else getattr(item.value, item.value.WhichOneof("value"))
        for item in span.attributes
    }


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    with collecting() as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        yield found


@pytest.mark.slow
def test_a_run_arrives_with_its_stages_and_batches(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"x-api-key={SECRET}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    monkeypatch.setenv("TRACEPARENT", PARENT)
    project = open_project(TINY, (f"root={tmp_path}/store", f"source.shapes.port={free_port()}"))
    stages = ("source", "download")
    manifests: dict[str, Manifest] = {}
    with recorded(project, Selection(stages), TINY, LogDisplay()) as recording:
        for name in stages:
            stage, fingerprint = project.stages[name], project.states[name].fingerprint
            inputs = {upstream: manifests[upstream] for upstream in stage.upstream}
            show = recording.display.update
            manifests[name] = run_stage(stage, fingerprint, inputs, LocalExecutor(), ClusterConfig(), on_progress=show)
            recording.display.end(Outcome(stage=name, status="done", manifest=manifests[name]))
        recording.note_result("done", [], 0)
    [run] = collector.named("unclip run")
    assert values(run)["unclip.run"] == read_runs(project.config.root)[0].id
    assert values(run)["unclip.stages"] == list(stages) and values(run)["unclip.status"] == "done"
    assert f"{run.trace_id.hex()}-{run.parent_span_id.hex()}" in PARENT
    for name in stages:
        [stage_span] = collector.named(name)
        assert stage_span.parent_span_id == run.span_id and stage_span.trace_id == run.trace_id
        seen = values(stage_span)
        assert seen["unclip.samples.in"] == manifests[name].num_in and seen["unclip.status"] == "done"
        assert seen["unclip.fingerprint"] == manifests[name].fingerprint
        batches = collector.named(f"{name} shards")
        assert {batch.parent_span_id for batch in batches} == {stage_span.span_id}
        assert sum(values(batch)["unclip.shards"] for batch in batches) == len(manifests[name].records)
        assert sum(values(batch)["unclip.samples"] for batch in batches) == manifests[name].num_in
        assert all(stage_span.start_time_unix_nano <= batch.start_time_unix_nano for batch in batches)
        assert all(batch.end_time_unix_nano <= stage_span.end_time_unix_nano for batch in batches)
    assert {headers["x-api-key"] for headers in collector.headers} == {SECRET}
    [resource] = {str(one.resource) for request in collector.requests for one in request.resource_spans}
    assert "unclip" in resource and "deployment.environment" in resource and "unknown_service" not in resource
    stored = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert SECRET.encode() not in stored and SECRET not in str(collector.spans)


def test_a_failure_is_an_error_without_its_secrets(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with exported(begun(tmp_path)) as traces:
        traces.update(StageProgress(stage="filter", num_done=0, num_shards=2))
        error = ShardError(f"cannot read with {SECRET}")
        traces.end(Outcome(stage="filter", status="failed", error=error))
        traces.end(Outcome(stage="embed", status="not ready"))
    [failed], [run] = collector.named("filter"), collector.named("unclip run")
    for span in (failed, run):
        assert span.status.code == Status.StatusCode.STATUS_CODE_ERROR and span.status.message.endswith("with ***")
    assert not collector.named("embed")


def test_what_breaks_a_run_off_ends_its_spans(collector: Collector, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), exported(begun(tmp_path)) as traces:
        traces.update(StageProgress(stage="filter", num_done=0, num_shards=2))
        traces.update(StageProgress(stage="filter", num_done=1, num_shards=2, num_samples=5))
        raise KeyboardInterrupt
    assert {span.name: values(span).get("unclip.status") for span in collector.spans} == {
        "unclip run": "cancelled",
        "filter": "cancelled",
        "filter shards": None,
    }


@pytest.mark.parametrize(
    ("status", "errors"), [("cancelled", []), ("failed", [f"the server is gone: {SECRET}"]), ("done", [])]
)
def test_a_run_whose_end_is_noted_ends_like_that(
    status: str, errors: list[str], collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever runs the stages swallows Ctrl-C, and not every failure is a stage's."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    project = open_project(TINY, [f"root={tmp_path}/store"])
    with recorded(project, Selection(("source",)), TINY, LogDisplay()) as recording:
        recording.note_result(status, errors, 1)
    [run] = collector.named("unclip run")
    assert values(run)["unclip.status"] == read_runs(project.config.root)[0].status == status
    assert (run.status.code == Status.StatusCode.STATUS_CODE_ERROR) == (status == "failed")
    assert run.status.message == ("the server is gone: ***" if errors else "")


def test_batches_partition_the_work_of_a_stage(tmp_path: Path) -> None:
    """Ten shards in 25 seconds, then a second try that begins with what the first one has committed."""
    memory, provider, now_ns = InMemorySpanExporter(), TracerProvider(), [0]
    provider.add_span_processor(SimpleSpanProcessor(memory))
    traces = RunTraces(provider.get_tracer("test"), begun(tmp_path), batch_s=10, clock_ns=lambda: now_ns[0])
    for done in (50, 90):  # by another run, for which this one waits
        traces.update(StageProgress(stage="x", num_done=done, num_shards=100, is_waiting=True))
    for done in range(11):
        inner = Progress(done=done * 3, total=30, unit="steps", numbers={"loss": 1 - done / 10})
        progress = StageProgress(stage="x", num_done=done, num_shards=12, num_samples=done * 7, inner=inner)
        now_ns[0] = int(done * 2.5e9)
        traces.update(progress)
    for done, num_samples in ((10, 0), (12, 28)):
        traces.update(StageProgress(stage="x", num_done=done, num_shards=12, num_samples=num_samples))
    traces.end(Outcome(stage="x", status="done"))
    traces.close(None)
    batches = [span for span in memory.get_finished_spans() if span.name == "x shards"]
    assert [batch.attributes["unclip.shards"] for batch in batches] == [4, 4, 2, 2]
    assert [batch.attributes["unclip.samples"] for batch in batches] == [28, 28, 14, 28]
    assert [batch.attributes.get("unclip.steps") for batch in batches] == [12, 12, 6, None]
    assert [batch.attributes.get("unclip.loss") for batch in batches][:2] == [0.6, pytest.approx(0.2)]
    edges = [(batch.start_time, batch.end_time) for batch in batches]
    assert edges[:2] == [(0, 10_000_000_000), (10_000_000_000, 20_000_000_000)]


def test_a_collector_that_is_not_there_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    with exported(begun(tmp_path)) as traces:
        for stage in ("filter", "embed"):
            traces.end(Outcome(stage=stage, status="cached"))
            time.sleep(1.5)
    assert [record.name for record in caplog.records] == ["flows.run_traces"]
    assert f"do not arrive at {url}: " in caplog.text


def test_another_protocol_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match="http/protobuf alone"), exported(begun(tmp_path)):
        pass


def test_nothing_is_imported_where_nobody_collects(tmp_path: Path) -> None:
    code = f"""
import sys
from flows.run_record import begin_run
from flows.recording import recorded
from flows.project import open_project
from flows.progress import LogDisplay
from flows.selection import Selection
project = open_project({TINY!r}, ["root={tmp_path}/store"])
with recorded(project, Selection(("source",)), "x", LogDisplay()):
    pass
found = [name for name in sys.modules if name.startswith("opentelemetry")]
assert not found, found
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=TOP, env=kept | {"PYTHONPATH": str(TOP)})


def begun(tmp_path: Path) -> RunRecord:
    return begin_run(str(tmp_path), config="x.yaml", config_digest="d", selected=["filter"], estimates={})
