"""What OpenTelemetry sees of a request, where somebody has set it up; nothing here depends on it.

FastAPI opens the span of a request, under the `traceparent` that came with it.  Here that span learns where the time
went, and the lines of the log learn its trace.
"""

import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from service.lifecycle import PROBES

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig
    from opentelemetry.trace import Span
try:
    from opentelemetry import trace
except ImportError:
    trace = None

TELEMETRY: "TelemetryConfig" = {
    # Prometheus has the figures, and whoever keeps the log has the errors.
    "metrics": False,
    "logs": False,
    "exclude": lambda scope: scope.get("path") in PROBES,
}
"""For `FastAPI(telemetry=...)`."""
_request_span: ContextVar["Span | None"] = ContextVar("request_span", default=None)


class Tracing:
    """ASGI middleware: remembers the span of the request for those who work for it, in whatever span of their own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        span = trace.get_current_span() if trace else None
        if scope["type"] != "http" or span is None or not span.is_recording():
            return await self._app(scope, receive, send)
        span.set_attribute("reposer.request_id", scope["state"]["request_id"])
        token = _request_span.set(span)
        try:
            return await self._app(scope, receive, send)
        finally:
            _request_span.reset(token)


def note_time(what: str, seconds: float) -> None:
    """The request that this task works for has spent so long on `what`, all in all."""
    span = _request_span.get()
    if span is not None and span.is_recording():  # a job goes on when the request that asked for it has its answer
        span.set_attribute(f"reposer.{what}_ms", round(1000 * seconds, 3))


def add_trace(record: logging.LogRecord) -> bool:
    """A filter of a log handler, which lets everything through: says which trace and span the line belongs to."""
    context = trace.get_current_span().get_span_context() if trace else None
    if context is not None and context.is_valid:
        record.trace_id, record.span_id = f"{context.trace_id:032x}", f"{context.span_id:016x}"
    return True
