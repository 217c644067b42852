"""The first thing a request meets: limits on all that arrives, before any of it is believed.

The server below reads headers and bodies of any size and in crumbs of any size (uvicorn 0.54 answers a header of two
megabytes), so sizes are counted here.  What a proxy in front should do, time limits on headers, is not done here.
"""

import contextlib
import contextvars
import re
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

import anyio
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from service.errors import (
    AvatarServiceError,
    BodyBroken,
    BodyTooLarge,
    BodyTooSlow,
    HeadersTooLarge,
    TargetInvalid,
    UnsupportedMedia,
    as_problem,
)
from service.settings import Settings

MAX_HEADER_BYTES = 16 << 10
MAX_HEADERS = 64
MAX_TARGET_BYTES = 4 << 10
SMALL_BODY_BYTES = 64 << 10
UNREAD_BODY_S = 0.5
"""How long a refusal waits for a small body."""
LEAST_BYTES_PER_S = 1000
"""In the mean, beside the time that a single part may take."""
MIN_MEAN_PIECE_BYTES, PIECES_FORGIVEN = 64, 4096
"""A body of more pieces than are forgiven may not be cut into smaller ones than this in the mean."""

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
"""Of the request that this task works for; safe to write into a log."""
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Limits:
    """ASGI middleware: names the request, refuses what is too large, and counts the body while it is read."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        name = _name_request(scope)
        body = _Body(receive, self._body_limit(scope), self._settings.body_idle_s)
        answered = substituted = False

        async def answer(message: Message) -> None:
            nonlocal answered, substituted
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                if body.error is not None and not answered:
                    # Whatever the application made of a body that was refused under its hands.
                    substituted = True
                    await refuse(scope, receive, named, body.error)
                answered = True
            if not substituted:
                await named(message)

        async def named(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", name.encode())]}
            await send(message)

        try:
            check_head(scope)
            if scope["type"] == "http":
                body.check_announced(scope)
        except AvatarServiceError as error:
            return await refuse(scope, receive, named, error)
        token = request_id.set(name)
        try:
            await self._app(scope, receive if scope["type"] == "websocket" else body.receive, answer)
        finally:
            request_id.reset(token)
        return None

    def _body_limit(self, scope: Scope) -> int:
        if scope["type"] == "http" and scope["method"] == "PUT":
            return self._settings.max_bundle_bytes
        return max(self._settings.max_json_bytes, self._settings.max_npz_bytes)


async def refuse(scope: Scope, receive: Receive, send: Send, error: AvatarServiceError) -> None:
    """Answer a request or a WebSocket handshake with the problem of `error`."""
    connection = HTTPConnection(scope)
    response = await as_problem(connection, error)
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(response)
        return
    announced = connection.headers.get("content-length", "0" if scope["method"] in ("GET", "HEAD", "DELETE") else "")
    if announced.isdecimal() and len(announced) < 10 and int(announced) <= SMALL_BODY_BYTES:
        await _read_out(receive)
    else:
        # Nobody wants to receive the rest of it only to keep the connection.
        response.headers["Connection"] = "close"
    await response(scope, receive, send)


async def _read_out(receive: Receive) -> None:
    """Receive a small body that nobody reads: a connection closed on top of it is reset, the answer lost with it."""
    # A fault of the body itself is for whoever counts it: `Limits` answers with that one instead.
    with anyio.move_on_after(UNREAD_BODY_S), contextlib.suppress(AvatarServiceError):
        while (await receive()).get("more_body", False):
            pass


def check_head(scope: Scope) -> None:
    """Refuse a head that no caller of ours sends.

    Raises:
        HeadersTooLarge: more than 64 headers or 16 KiB of them.
        TargetInvalid: a long path or query, or letters in the path that could only harm a log.
        UnsupportedMedia: a compressed body, which could inflate to anything.
    """
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers)
    if size > MAX_HEADER_BYTES or len(headers) > MAX_HEADERS:
        raise HeadersTooLarge(f"expected at most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together")
    path = scope["path"]
    if not (path.isascii() and path.isprintable()):
        # Not even as an echo: the problem names the path, and so does the log.
        scope["path"] = "/"
        raise TargetInvalid("the path has letters that no path of this service has")
    if len(path) + len(scope["query_string"]) > MAX_TARGET_BYTES:
        scope["path"] = "/"
        raise TargetInvalid(f"expected a path and query of at most {MAX_TARGET_BYTES} bytes")
    encodings = [value.strip().lower() for name, value in headers if name == b"content-encoding"]
    if any(encoding != b"identity" for encoding in encodings):
        raise UnsupportedMedia("expected a body without Content-Encoding")


class _Body:
    """The body as it comes in; the first fault is kept."""

    def __init__(self, receive: Receive, limit: int, idle_s: float) -> None:
        self._receive, self._limit, self._idle_s = receive, limit, idle_s
        self._bytes = self._pieces = 0
        self._waited_s = 0.0
        """For the client, not for ourselves."""
        self._announced: int | None = None
        self._complete = False
        self.error: AvatarServiceError | None = None

    def check_announced(self, scope: Scope) -> None:
        lengths = {value for name, value in scope["headers"] if name == b"content-length"}
        if not lengths:
            return
        text = lengths.pop()
        if lengths or not text.isdigit():
            raise BodyBroken("expected one Content-Length that is a number")
        self._announced = int(text[:20])
        if self._announced > self._limit:
            raise self._too_large()

    async def receive(self) -> Message:
        if self.error is not None:
            raise self.error
        if self._complete:
            return await self._receive()
        began, wait_s = time.monotonic(), self._idle_s + self._bytes / LEAST_BYTES_PER_S - self._waited_s
        try:
            with anyio.fail_after(min(self._idle_s, wait_s)):
                message = await self._receive()
            self._waited_s += time.monotonic() - began
            self._count(message)
        except TimeoutError:
            self.error = BodyTooSlow(
                f"expected the next part of the body within {self._idle_s:g} s, and {LEAST_BYTES_PER_S} bytes a second"
            )
            raise self.error from None
        except AvatarServiceError as error:
            self.error = error
            raise
        return message

    def _count(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] != "http.request":
            return
        self._bytes += len(message.get("body", b""))
        self._pieces += 1
        self._complete = not message.get("more_body", False)
        if self._bytes > self._limit:
            raise self._too_large()
        if self._pieces > PIECES_FORGIVEN and self._bytes < self._pieces * MIN_MEAN_PIECE_BYTES:
            raise BodyBroken("the body comes in too many too small pieces")
        if self._announced is not None and (
            self._bytes > self._announced or (self._complete and self._bytes < self._announced)
        ):
            raise BodyBroken(f"expected the announced {self._announced} bytes, got {self._bytes}")

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"expected at most {self._limit} bytes", limit_bytes=self._limit)


def _name_request(scope: Scope) -> str:
    """The caller's request id where it can do no harm, else a new one; kept in `request.state.request_id`."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    fits = len(given) == 1 and _REQUEST_ID.fullmatch(given[0])
    name = given[0].decode() if fits else uuid.uuid4().hex
    scope.setdefault("state", {})["request_id"] = name
    return name
