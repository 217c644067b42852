"""One reposing request from its body to its answer.

All input is checked, and the first bytes made, before the status line leaves: a 200 is broken off later
only if the machine itself fails.  Parsing, computing and encoding run in worker threads, but for what takes less
than to ask one, and one small batch at a time, so that the event loop stays free, requests share the device
fairly, and a client that has gone stops the work at the next batch.
"""

import asyncio
import hashlib
import math
import mmap
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from anyio import to_thread
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from service import answers
from service.avatars import AvatarStore
from service.cache import AnswerCache, Pieces, answer_key, byte_count
from service.engine_room import EngineRoom
from service.errors import BodyTooLarge, OptionInvalid, TooManyFrames, UnsupportedMedia
from service.formats.clip import Clip
from service.metrics import Metrics
from service.poses import PoseSequence, parse_json, parse_npz
from service.production import Order, Production, Times, pieces
from service.schemas import ReposeQuery
from service.settings import Settings

DIGEST, ARRIVED = "reposer.request_digest", "reposer.arrived_s"
"""In the scope: what the request is known by, if its body is short; when its head was there, on the monotonic clock."""
JSON_TYPES = ("application/json",)
NPZ_TYPES = ("application/x-npz", "application/x-smpl", "application/octet-stream", "application/zip")
MAX_TIMEOUT_S = 24 * 3600
BLOCK_BYTES, SLICE_BYTES = 512 << 10, 1 << 20
"""What is kept lies in blocks of that size or more, and leaves in slices of that size or less."""
REMEMBERED = 1024
"""Requests of which is known what they ask for."""
SHORT_BYTES, SHORT = 96 << 10, 500
"""A body that is parsed in two milliseconds, frames whose key takes one.  A thread needs many times that on a busy
machine: it waits for Python's lock at every step, and whoever has it waits for a core."""


@dataclass(frozen=True)
class _Known:
    """What a request asks for, as it was understood."""

    key: str
    """Of the answer."""
    media_type: str
    headers: dict[str, str]
    """What was applied."""


class Reposing:
    """Answers reposing requests for all avatars of a store."""

    def __init__(
        self, settings: Settings, store: AvatarStore, room: EngineRoom, cache: AnswerCache, metrics: Metrics
    ) -> None:
        self._settings, self._store, self._room, self._metrics = settings, store, room, metrics
        self.cache = cache
        self._on_its_way: dict[str, Production] = {}
        self._known: OrderedDict[bytes, _Known] = OrderedDict()  # by what `request_digest` gives

    def repeated(self, avatar_id: str, request: Request) -> Response | None:
        """The answer to a request that is known, byte for byte, if it takes no computing: all else is left out.

        Raises:
            OptionInvalid: the time that it is given is none.
        """
        known, avatar = self._known.get(request.scope[DIGEST]), self._store.in_memory(avatar_id)
        if known is None or avatar is None or avatar.bundle.digest != known.headers["Reposer-Bundle"]:
            return None
        deadline_of(request.headers)
        answer = self._at_hand(known, request, Times())
        if answer is not None:
            self._store.touch(avatar)
        return answer

    def is_on_its_way(self, digest: bytes) -> bool:
        """Whether the answer to the request that is known by this is being made."""
        known = self._known.get(digest)
        return known is not None and known.key in self._on_its_way

    async def answer(self, avatar_id: str, query: ReposeQuery, request: Request) -> Response:
        """Read the poses out of `request` and repose the avatar.

        Raises:
            AvatarServiceError: the poses, the avatar or the format asked for will not do; the subclass says why.
        """
        times, deadline = Times(), deadline_of(request.headers, request.scope.get(ARRIVED))
        order = await self.order(avatar_id, query, request, times)
        known = await _understood(order)
        if (answer := self._at_hand(known, request, times)) is not None:
            return answer
        key, headers = known.key, known.headers | {"X-Cache": "miss"}
        if _no_store(request):
            source = self._pieces(order, times, deadline)
            headers |= {"X-Cache": "bypass", "Cache-Control": "no-store"}
        else:
            if key not in self._on_its_way:
                # Before Redis and other replicas are asked: a refusal should cost little.
                self._check_admission(order)
            # Those that were refused are not remembered: they would drive out those that have an answer.
            self._remember(request, known)
            began = time.perf_counter()
            cached = await self.cache.get(key)
            times.add("cache", time.perf_counter() - began)
            if cached is not None:
                return self._hit(cached, known, times)
            self._metrics.cache.labels("miss").inc()
            size = answers.exact_bytes(order.media_type, order.clip)
            if deadline is None and size is not None and size <= self.cache.max_entry_bytes:
                source = self._shared(key, order, times)
            else:
                source = self._kept(key, order, times, deadline)
        try:
            # A file that leaves as a whole has no bytes before it is made; until then it can fail with a status.
            while not (first := await anext(source)):
                if await request.is_disconnected():
                    raise ClientDisconnect
        except BaseException:
            await source.aclose()
            raise
        size = answers.exact_bytes(order.media_type, order.clip)
        if size is not None:
            headers["Content-Length"] = str(size)
        headers["Server-Timing"] = times.header()
        return _Stream(first, source, order.media_type, headers)

    def _remember(self, request: Request, known: _Known) -> None:
        if (digest := request.scope.get(DIGEST)) is not None:
            self._known[digest] = known
            self._known.move_to_end(digest)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)

    def _at_hand(self, known: _Known, request: Request, times: Times) -> Response | None:
        """The answer that takes no computing, if there is one here."""
        # A proxy that compresses marks what it has from us as weak.
        tags = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if known.headers["ETag"] in tags:
            return Response(status_code=304, headers=known.headers)
        began = time.perf_counter()
        cached = None if _no_store(request) else self.cache.at_hand(known.key)
        times.add("cache", time.perf_counter() - began)
        if cached is None:
            return None
        self._remember(request, known)
        return self._hit(cached, known, times)

    def _hit(self, cached: Pieces, known: _Known, times: Times) -> Response:
        self._metrics.cache.labels("hit").inc()
        headers = known.headers | {"X-Cache": "hit", "Server-Timing": times.header()}
        return _Whole(cached, known.media_type, headers)

    async def order(
        self, avatar_id: str, query: ReposeQuery, request: Request, times: Times, in_background: bool = False
    ) -> Order:
        """What `request` asks for, checked.

        Args:
            in_background: as a job, which may be longer.

        Raises:
            AvatarServiceError: it cannot be done; the subclass says why.
        """
        settings = self._settings
        async with self._store.lease(avatar_id) as avatar:
            mesh = avatar.mesh(query.lod)
            media_type = answers.negotiate(request.headers.get("accept"))
            body_is_json = _body_is_json(request)
            body = await read_body(request, settings.max_json_bytes if body_is_json else settings.max_npz_bytes)
            began = time.perf_counter()
            pelvis = avatar.bundle.skeleton.rest_joints[0]
            most = settings.max_job_frames if in_background else settings.max_frames
            how = {"options": query.options(), "pelvis": pelvis, "max_frames": most}
            try:
                poses = await _parsed(body, body_is_json, settings.max_npz_bytes, how)
            except TooManyFrames as error:
                hint = f"; POST /avatars/{avatar_id}/jobs takes {settings.max_job_frames}"
                raise TooManyFrames(f"{error}{'' if in_background else hint}", limit_frames=most) from error
            times.add("parse", time.perf_counter() - began)
        clip = Clip(avatar.id, mesh, len(poses), poses.fps, avatar.bundle.skeleton, poses)
        answers.check_length(media_type, clip)
        return Order(avatar, query.lod, media_type, poses, clip)

    def _pieces(self, order: Order, times: Times, deadline: float | None) -> AsyncGenerator[bytes, None]:
        return pieces(self._room, order, times, self._metrics, deadline)

    async def _kept(self, key: str, order: Order, times: Times, deadline: float | None) -> AsyncGenerator[bytes, None]:
        """The answer in pieces; the whole of it is kept at the end, if it is not too long."""
        expected = answers.exact_bytes(order.media_type, order.clip) or 0
        kept = _Kept(self.cache.max_entry_bytes, expected)
        async with aclosing(self._pieces(order, times, deadline)) as source:
            async for piece in source:
                await kept.add(piece)
                yield piece
        # Only here: what failed or was broken off is never kept.
        if (blocks := kept.blocks()) is not None:
            await self.cache.put(key, blocks)

    def _shared(self, key: str, order: Order, times: Times) -> AsyncGenerator[bytes, None]:
        """The same, computed once for all who ask at the same time, here or in another replica."""
        production = self._on_its_way.get(key)
        if production is None or production.ended:
            self._check_admission(order)
            production = self._on_its_way[key] = Production(self._in_turn(key, order, times))
            production.task.add_done_callback(lambda _: self._forget(key))
        return production.read()

    def _check_admission(self, order: Order) -> None:
        if answers.TABLE[order.media_type].needs_batches:
            self._room.check_admission(order.avatar, order.lod, len(order.poses))

    async def _in_turn(self, key: str, order: Order, times: Times) -> AsyncGenerator[bytes, None]:
        async with self.cache.turn(key) as answer:
            if answer is not None:
                yield answer
                return
            async with aclosing(self._kept(key, order, times, None)) as source:
                async for piece in source:
                    yield piece

    def _forget(self, key: str) -> None:
        if key in self._on_its_way and self._on_its_way[key].ended:
            del self._on_its_way[key]


class _Whole(Response):
    """Sends what is at hand, in slices.  There is nothing to call off when the client has gone, so that takes none of
    the tasks of a `StreamingResponse`: what is sent to nobody is dropped by the server below."""

    def __init__(self, answer: Pieces, media_type: str, headers: dict[str, str]) -> None:
        super().__init__(media_type=media_type, headers=headers | {"Content-Length": str(byte_count(answer))})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for block in map(memoryview, self._answer):
            for start in range(0, len(block), SLICE_BYTES):
                body = block[start : start + SLICE_BYTES]
                await send({"type": "http.response.body", "body": body, "more_body": True})
                # To a fast reader, all of it would be sent before anybody else's turn comes.
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})


class _Stream(StreamingResponse):
    """Sends pieces as they come, and calls off the rest when the client has gone, or was never reached."""

    def __init__(
        self, first: bytes, rest: AsyncGenerator[bytes, None], media_type: str, headers: dict[str, str]
    ) -> None:
        super().__init__(_not_empty(first, rest), media_type=media_type, headers=headers)
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await super().__call__(scope, receive, send)


class _Kept:
    """An answer that is to be kept, in blocks; large ones lie apart from all other memory, as what is kept for long
    would riddle it with holes.  Only large ones, as the system bounds how many there are.

    Given up, as no reason to break the answer off, where it gets longer than `most_bytes` or there is no memory for it.
    """

    def __init__(self, most_bytes: int, expected_bytes: int = 0) -> None:
        self._left, self._given_up = most_bytes, expected_bytes > most_bytes
        self._apart: list[memoryview] = []
        self._full: list[bytes] = []
        """A block that is copied when the next one is full too: what is left over at the end goes with the last."""
        self._next: list[bytes] = []
        self._next_bytes = 0

    async def add(self, piece: bytes) -> None:
        """The next piece.  It is copied while the answer is made: all at once would hold everybody up in the end."""
        self._left -= len(piece)
        if self._given_up or self._left < 0:
            self._give_up()
            return
        self._next_bytes += len(piece)
        self._next.append(piece)
        if self._next_bytes >= BLOCK_BYTES:
            full, self._full, self._next, self._next_bytes = self._full, self._next, [], 0
            try:
                if full:
                    self._apart.append(await to_thread.run_sync(_apart, full))
            except (OSError, MemoryError):
                self._give_up()

    def blocks(self) -> Pieces | None:
        """What was added; None if it was given up."""
        last = self._full + self._next
        try:
            end = _apart(last) if byte_count(last) >= BLOCK_BYTES else b"".join(last)
        except (OSError, MemoryError):
            self._give_up()
        return None if self._given_up else (*self._apart, end)

    def _give_up(self) -> None:
        self._given_up = True
        self._apart, self._full, self._next = [], [], []


def _apart(pieces: list[bytes]) -> memoryview:
    memory = mmap.mmap(-1, byte_count(pieces), access=mmap.ACCESS_COPY)
    # NumPy copies without Python's lock, so that other threads go on.
    into, start = np.frombuffer(memory, np.uint8), 0
    for piece in pieces:
        into[start : start + len(piece)] = np.frombuffer(piece, np.uint8)
        start += len(piece)
    return memoryview(memory).toreadonly()


async def _not_empty(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if first:
        yield first
    async for piece in rest:
        if piece:
            yield piece


def request_digest(scope: Scope, body: bytes) -> bytes:
    """The same for requests that ask for the same, and only for them."""
    headers = Headers(scope=scope)
    asked = scope["path"], scope["query_string"], headers.getlist("accept"), headers.getlist("content-type")
    return hashlib.sha256(repr(asked).encode() + b" " + body).digest()


def key_of(order: Order) -> str:
    """The key of the answer; takes a while for long sequences."""
    return answer_key(order.avatar.bundle.digest, order.lod, order.media_type, order.poses)


async def _understood(order: Order) -> _Known:
    key = key_of(order) if len(order.poses) <= SHORT else await to_thread.run_sync(key_of, order)
    headers = applied(order) | {"ETag": f'"{hashlib.sha256(key.encode()).hexdigest()}"', "Vary": "Accept"}
    return _Known(key, order.media_type, headers)


def deadline_of(headers: Headers, arrived_s: float | None = None) -> float | None:
    """When the client stops waiting, on the clock of `time.monotonic`: the earlier one, if there are two.

    Args:
        arrived_s: when the head of the request was there; None: now.

    Raises:
        OptionInvalid: a time that is not a number above zero.
    """
    deadlines = []
    for name, unit_s in (("Request-Timeout", 1.0), ("X-Deadline-Ms", 0.001)):
        if name in headers:
            try:
                seconds = float(headers[name]) * unit_s
            except ValueError:
                seconds = math.nan
            if not 0 < seconds <= MAX_TIMEOUT_S:
                raise OptionInvalid(f"expected {name} to be above 0 and at most a day")
            deadlines.append((time.monotonic() if arrived_s is None else arrived_s) + seconds)
    return min(deadlines, default=None)


async def _parsed(body: bytes, is_json: bool, max_npz_bytes: int, how: dict[str, Any]) -> PoseSequence:
    """Poses, checked; by a thread, so that the event loop is free meanwhile, unless they are few numbers as bytes."""
    if is_json:
        return await to_thread.run_sync(partial(parse_json, body, **how))
    # Resampling makes much out of little, and so does inflating.
    if len(body) <= SHORT_BYTES and how["options"].target_fps is None:
        with suppress(BodyTooLarge):
            return parse_npz(body, max_bytes=SHORT_BYTES, **how)
    return await to_thread.run_sync(partial(parse_npz, body, max_bytes=max_npz_bytes, **how))


async def read_body(request: Request, limit: int) -> bytes:
    """The body, counted while it is read: what Content-Length says is only a first hint.

    Raises:
        BodyTooLarge: more than `limit` bytes.
    """
    too_large = BodyTooLarge(f"expected at most {limit} bytes; long sequences travel as .npz", limit_bytes=limit)
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and len(announced) < 20 and int(announced) > limit:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def _no_store(request: Request) -> bool:
    return "no-store" in request.headers.get("cache-control", "").lower()


def is_npz(headers: Headers) -> bool:
    """Whether the body is said to be an archive of arrays."""
    return _content_type(headers) in NPZ_TYPES


def _content_type(headers: Headers) -> str:
    return headers.get("content-type", "").split(";")[0].strip().lower()


def _body_is_json(request: Request) -> bool:
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMedia("expected a body without Content-Encoding")
    content_type = _content_type(request.headers)
    if content_type not in JSON_TYPES + NPZ_TYPES:
        expected = ", ".join(JSON_TYPES + NPZ_TYPES)
        raise UnsupportedMedia(f"expected a Content-Type among {expected}, got {content_type[:60]!r}")
    return content_type in JSON_TYPES


def applied(order: Order) -> dict[str, str]:
    """What was applied, so that nobody has to guess."""
    avatar, poses = order.avatar, order.poses
    headers = {
        "Reposer-Avatar": avatar.id,
        "Reposer-Bundle": avatar.bundle.digest,
        "Reposer-Lod": order.lod,
        "Reposer-Frames": str(order.clip.frame_count),
        "Reposer-Vertices": str(len(order.clip.mesh.vertices)),
        "Reposer-Fps": f"{poses.fps:.6g}",
        "Reposer-Up-Axis": poses.up_axis,
        "Reposer-Units": poses.units,
        "Reposer-Rotation": poses.rotation,
        "Reposer-Frame": poses.frame,
        "Reposer-Device": avatar.engine.device,
        "Content-Disposition": f'attachment; filename="{avatar.id}{answers.TABLE[order.media_type].suffix}"',
    }
    if poses.posted_fps is not None:
        headers["Reposer-Posted-Fps"] = f"{poses.posted_fps:.6g}"
    if poses.warnings:
        headers["Warning"] = ", ".join(f'299 reposer "{text}"' for text in poses.warnings)
    return headers
