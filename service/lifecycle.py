"""The beginning and the end: what is in flight, and how the process stops taking work.

Draining: `/readyz` is 503 at once and new work is refused; what is in flight finishes, within a grace; then the server
may close.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import AvatarServiceError, Draining, Overloaded
from service.limits import refuse
from service.metrics import Metrics

log = logging.getLogger(__name__)
access_log = logging.getLogger("service.access")
PROBES = ("/livez", "/readyz", "/startupz", "/v2/health/live", "/v2/health/ready", "/metrics")
"""Answered to the end, neither counted nor logged."""


GONE = 499
"""What nginx calls a client that has gone before its answer."""


class Lifecycle:
    """Whether new work is taken, and what is still to be finished."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0
        self.finishers: list[Callable[[], Awaitable[None]]] = []
        """Called when draining begins, by whoever has work of other kinds: streams, jobs."""

    async def drain(self, grace_s: float) -> None:
        """Refuse new work and wait for what is in flight, but not longer than `grace_s`."""
        self.draining = True
        log.info("draining: %d requests in flight", self.in_flight)
        try:
            async with asyncio.timeout(grace_s):
                await asyncio.gather(*(finish() for finish in self.finishers))
                while self.in_flight:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            log.warning("%d requests are cut off after %g s", self.in_flight, grace_s)


class Traffic:
    """ASGI middleware: counts and logs requests, and refuses them while draining, or if there are too many.

    That one is for floods: long before it, the engine room refuses what it cannot compute in time.
    """

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle, metrics: Metrics, max_in_flight: int) -> None:
        self._app, self._lifecycle, self._metrics, self._max_in_flight = app, lifecycle, metrics, max_in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] in PROBES:
            return await self._app(scope, receive, send)
        error = self._refusal(scope)
        if scope["type"] == "websocket":
            return await self._stream(scope, receive, send, error)
        began, status, gone = time.monotonic(), GONE, False

        async def heard() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = GONE if gone else message["status"]
                return await send(message)
            sending = time.monotonic()
            await send(message)
            return self._metrics.send_seconds.observe(time.monotonic() - sending)

        # Those that are refused are in nobody's way: neither counted, nor waited for in the end.
        self._lifecycle.in_flight += error is None
        try:
            return await (refuse(scope, heard, answer, error) if error else self._app(scope, heard, answer))
        except Exception:
            status = 500  # what is answered further out; or an answer was broken off, whatever it began with
            raise
        finally:
            self._lifecycle.in_flight -= error is None
            seconds = time.monotonic() - began
            self._metrics.http_seconds.labels(status).observe(seconds)
            _log(scope, scope["method"], status, seconds)

    async def _stream(self, scope: Scope, receive: Receive, send: Send, error: AvatarServiceError | None) -> None:
        """A WebSocket: its status is the code that it was closed with, or that of the refusal."""
        began, status = time.monotonic(), 1006  # as a connection that ended without a word

        async def heard() -> Message:
            nonlocal status
            message = await receive()
            if message["type"] == "websocket.disconnect":
                status = message.get("code", status)
            return message

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "websocket.close":
                status = message.get("code", 1000)
            elif message["type"] == "websocket.http.response.start":
                status = message["status"]
            await send(message)

        try:
            await (refuse(scope, heard, answer, error) if error else self._app(scope, heard, answer))
        finally:
            _log(scope, "WebSocket", status, time.monotonic() - began)

    def _refusal(self, scope: Scope) -> AvatarServiceError | None:
        """Why nothing of the kind is served now; None if it is."""
        if self._lifecycle.draining:
            return Draining("the service is shutting down", {"Connection": "close", "Retry-After": "1"})
        if scope["type"] == "http" and self._lifecycle.in_flight >= self._max_in_flight:
            return Overloaded("too many requests are in flight")
        return None


def _log(scope: Scope, method: str, status: int, seconds: float) -> None:
    state = scope.get("state", {})
    # The path is the client's: escaped, so that it stays on its line.
    path = scope["path"].encode("unicode_escape").decode()
    fields = {"method": method, "path": path, "status": status, "seconds": round(seconds, 6)}
    fields |= {name: state[name] for name in ("problem", "reason") if name in state}
    if client := scope.get("client"):
        fields["client"] = client[0]
    if principal := state.get("principal"):
        fields["key"] = principal.name
    access_log.info("%s %s %d %.1f ms", method, path, status, 1000 * seconds, extra=fields)


@asynccontextmanager
async def background(*jobs: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Let `jobs` run meanwhile, and call them off in the end."""

    def report(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.error("a background job has failed", exc_info=error)

    tasks = [asyncio.create_task(job) for job in jobs]
    for task in tasks:
        task.add_done_callback(report)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
