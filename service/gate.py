"""What a request for a sequence meets before it is parsed.

A request that was answered before, byte for byte, is given what is at hand.  The same poses written in another way have
the same answer, but only who reads them knows.

Under overload most others are refused, for nothing but their length.  The beginning of an .npz tells it; to read each
of them with care would take the time of those that were let in.  It is not to be believed, only good enough to refuse
by: whoever passes is looked at in full, and may still be refused.
"""

import re
import time
from collections import deque
from functools import partial

from pydantic import ValidationError
from starlette.datastructures import Headers, QueryParams
from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import answers
from service.avatars import AvatarStore
from service.engine_room import EngineRoom
from service.errors import AvatarServiceError, Overloaded, as_problem
from service.limits import refuse
from service.poses import frames_at_a_glance
from service.reposing import ARRIVED, DIGEST, SHORT_BYTES, Reposing, deadline_of, is_npz, request_digest
from service.schemas import ReposeQuery
from service.settings import Settings

_PATH = re.compile(r"/avatars/([^/]+)/repose")


class Gate:
    """ASGI middleware: of requests with short bodies, it answers those that were answered before, and refuses those
    that the engine room has no time for."""

    def __init__(
        self, app: ASGIApp, settings: Settings, store: AvatarStore, room: EngineRoom, reposing: Reposing
    ) -> None:
        self._app, self._store, self._room, self._reposing = app, store, room, reposing
        self._max_frames = settings.max_frames
        self._short_bytes = min(SHORT_BYTES, settings.max_npz_bytes, settings.max_json_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = _PATH.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if path is None:
            return await self._app(scope, receive, send)
        headers, received = Headers(scope=scope), deque[Message]()
        replay = partial(_receive, received, receive)
        scope[ARRIVED] = time.monotonic()
        announced = headers.get("content-length", "0")
        try:
            short = announced.isdecimal() and len(announced) < 10 and int(announced) <= self._short_bytes
            body = await _short_body(receive, received, self._short_bytes) if short else None
        except AvatarServiceError as error:
            return await refuse(scope, receive, send, error)
        if body is not None:
            scope[DIGEST] = request_digest(scope, body)
            response = None
            try:
                response = self._reposing.repeated(path[1], Request(scope))
                if response is None and not self._reposing.is_on_its_way(scope[DIGEST]):
                    self._check(path[1], scope, headers, body)
            except Overloaded as error:
                response = await as_problem(HTTPConnection(scope), error)
            except (AvatarServiceError, ValidationError):
                pass  # who reads it in full says why it will not do
            if response is not None:
                return await response(scope, replay, send)
        return await self._app(scope, replay, send)

    def _check(self, avatar_id: str, scope: Scope, headers: Headers, body: bytes) -> None:
        """Raises `Overloaded` if a sequence of that length would be refused now, and for nothing else; passes what it
        cannot tell."""
        avatar, frames = self._store.in_memory(avatar_id), frames_at_a_glance(body)
        if avatar is None or frames is None or frames > self._max_frames or "if-none-match" in headers:
            return
        query = ReposeQuery.model_validate(dict(QueryParams(scope["query_string"])))
        as_posted = query.every == 1 and query.target_fps is None
        deadline_of(headers)
        # Other formats are bounded in ways of their own.
        if as_posted and is_npz(headers) and answers.negotiate(headers.get("accept")) in answers.FRAME_STREAMS:
            avatar.mesh(query.lod)
            self._room.check_admission(avatar, query.lod, frames)


async def _short_body(receive: Receive, received: deque[Message], most_bytes: int) -> bytes | None:
    """The whole body if it is short; what was received for that is kept in `received`."""
    body, more = b"", True
    while more and len(body) <= most_bytes:
        message = await receive()
        received.append(message)
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body if len(body) <= most_bytes else None


async def _receive(received: deque[Message], receive: Receive) -> Message:
    return received.popleft() if received else await receive()
