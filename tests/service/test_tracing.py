"""Traces: a request has one span under the caller's, which says where the time went, and the log names it."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import anyio
import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from service.serve import set_up_logging
from service.tracing import add_trace

pytestmark = pytest.mark.anyio
URL = "/avatars/tiny/repose"
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {
    "traceparent": f"00-{TRACE}-{CALLER}-01",
    "X-Request-Id": "abc-1",
    "Accept": "application/vnd.reposer.frames",
}


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What FASTAPI_OTEL_AUTO_CONFIGURE sets up, with an exporter that keeps the spans here."""
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # `set_tracer_provider` works once a process.
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    yield exporter
    provider.shutdown()


def poses(frames: int) -> dict[str, Any]:
    return {"poses": np.random.default_rng(frames).uniform(-0.3, 0.3, (frames, 72)).tolist()}


def of_requests(exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER]


async def test_the_span_of_a_request_says_where_the_time_went(serve: Any, exporter: InMemorySpanExporter) -> None:
    async with serve() as client:
        answers = [await client.post(URL, json=poses(3), headers=HEADERS) for _ in range(2)]
    assert [answer.headers["X-Cache"] for answer in answers] == ["miss", "hit"]
    computed, at_hand = of_requests(exporter)
    assert computed.name == "POST /avatars/{avatar_id}/repose"
    assert computed.parent is not None
    assert (f"{computed.context.trace_id:032x}", f"{computed.parent.span_id:016x}") == (TRACE, CALLER)
    spent = {name: value for name, value in (computed.attributes or {}).items() if name.endswith("_ms")}
    assert spent.keys() == {f"reposer.{what}_ms" for what in ("parse", "cache", "queue", "infer", "encode")}
    assert all(isinstance(value, float) and value >= 0 for value in spent.values())
    assert (computed.attributes or {})["reposer.request_id"] == "abc-1"
    assert {"reposer.cache_ms"} <= (at_hand.attributes or {}).keys()
    assert "reposer.infer_ms" not in (at_hand.attributes or {})


async def test_the_span_has_the_time_of_the_whole_answer(serve: Any, exporter: InMemorySpanExporter) -> None:
    async with serve(batch_vertex_frames=1) as client:  # a batch for each frame
        for control in ("no-cache", "no-store"):  # computed for all who ask, and for one
            answer = await client.post(URL, json=poses(40), headers=HEADERS | {"Cache-Control": control})
            assert answer.status_code == 200
            at_first_frame = dict(part.split(";dur=") for part in answer.headers["Server-Timing"].split(", "))
            attributes = of_requests(exporter)[-1].attributes or {}
            assert attributes["reposer.infer_ms"] > float(at_first_frame["infer"])  # type: ignore[operator]


async def test_requests_at_the_same_time_have_their_own_spans(serve: Any, exporter: InMemorySpanExporter) -> None:
    async with serve() as client, anyio.create_task_group() as group:
        for number in range(4):
            headers = HEADERS | {"X-Request-Id": f"r{number}", "traceparent": f"00-{number + 1:032x}-{CALLER}-01"}
            group.start_soon(
                lambda headers=headers, number=number: client.post(URL, json=poses(5 + number), headers=headers)
            )
    found = {span.context.trace_id: (span.attributes or {})["reposer.request_id"] for span in of_requests(exporter)}
    assert found == {number + 1: f"r{number}" for number in range(4)}
    assert all("reposer.infer_ms" in (span.attributes or {}) for span in of_requests(exporter))


async def test_a_job_does_not_write_into_a_span_that_has_ended(
    serve: Any, exporter: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve() as client:
        job = (await client.post("/avatars/tiny/jobs", json=poses(3), headers=HEADERS)).json()
        with anyio.fail_after(30):
            while (await client.get(f"/jobs/{job['id']}")).json()["state"] != "done":
                await anyio.sleep(0.05)
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]


async def test_probes_have_no_span(serve: Any, exporter: InMemorySpanExporter) -> None:
    async with serve() as client:
        for path in ("/livez", "/readyz", "/metrics", "/info"):
            assert (await client.get(path)).status_code == 200
    assert [span.name for span in of_requests(exporter)] == ["GET /info"]


async def test_the_log_names_the_trace(
    serve: Any, exporter: InMemorySpanExporter, capsys: pytest.CaptureFixture[str]
) -> None:
    before = logging.root.handlers[:]
    try:
        set_up_logging()
        async with serve() as client:
            await client.post(URL, json=poses(1), headers=HEADERS)
    finally:
        logging.root.handlers[:] = before
    records = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (access,) = [record for record in records if record["logger"] == "service.access"]
    (span,) = of_requests(exporter)
    assert (access["trace_id"], access["span_id"]) == (TRACE, f"{span.context.span_id:016x}")


async def test_where_nobody_has_set_it_up_there_is_nothing_of_it(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    caplog.handler.addFilter(add_trace)
    async with serve() as client:
        assert (await client.post(URL, json=poses(1), headers=HEADERS)).status_code == 200
    (access,) = [record for record in caplog.records if record.name == "service.access"]
    assert not hasattr(access, "trace_id")


def test_it_can_be_done_without() -> None:
    program = """
import logging, sys
sys.modules["opentelemetry"] = None
sys.modules["service.lifecycle"] = type(sys)("stub")
sys.modules["service.lifecycle"].PROBES = ()
from service import tracing
tracing.note_time("infer", 1.0)
assert tracing.trace is None and tracing.add_trace(logging.makeLogRecord({}))
"""
    subprocess.run([sys.executable, "-c", program], check=True)
