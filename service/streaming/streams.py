"""All streams of the process: who may open one, what is agreed on at the start, and how all of them are ended."""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.websockets import WebSocket

from service.avatars import Avatar, AvatarStore
from service.bundle.manifest import DEFAULT_LOD, mesh_file
from service.engine_room import EngineRoom
from service.errors import AvatarServiceError, Draining, OptionInvalid, Overloaded, RateLimited, Unauthorized
from service.frames import FrameEncoder
from service.limits import refuse
from service.metrics import Metrics
from service.poses import Options, check_axes, parse_one
from service.security import ANONYMOUS, Guard, Principal
from service.settings import Settings
from service.streaming.connection import Connection
from service.streaming.session import Closing, Limits, Placed, Session
from service.streaming.wire import MAX_SEQ, PROTOCOL_VERSION, SUBPROTOCOLS, Close, choose_subprotocol

RETRY_S = 5
DEFAULT_WINDOW = 2


class SubprotocolUnsupported(AvatarServiceError):  # noqa: N818 - as in service/errors.py
    """None of the offered subprotocols is one of ours."""

    status, code, title = 400, "subprotocol-unsupported", "No offered subprotocol is supported"


class StreamQuery(BaseModel):
    """What a stream is opened with; `docs/protocol.md`, section 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lod: str = Field(default=DEFAULT_LOD, max_length=32)
    mode: Literal["live", "complete"] = "live"
    max_fps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    window: Annotated[int, Field(ge=1, le=Limits.max_window)] = DEFAULT_WINDOW
    up_axis: Literal["y", "z"] = "y"
    units: Literal["m", "cm"] = "m"
    frame: Literal["world", "camera"] = "world"
    rotation: Literal["axis_angle", "matrix", "quat_wxyz", "6d"] | None = None
    """None leaves it to the shape of each pose."""
    normalize: bool = False
    last_seq: Annotated[int, Field(ge=0, le=MAX_SEQ)] | None = None
    bundle: str | None = Field(default=None, max_length=128)

    @model_validator(mode="after")
    def _both_or_none(self) -> "StreamQuery":
        if (self.last_seq is None) != (self.bundle is None):
            raise ValueError("last_seq and bundle belong together")
        return self

    def options(self) -> Options:
        """How the poses of this stream are meant."""
        return Options(self.up_axis, self.units, self.rotation, frame=self.frame, normalize=self.normalize)


class Streams:
    """Opens streams while there is room, and ends them."""

    def __init__(
        self, settings: Settings, store: AvatarStore, room: EngineRoom, guard: Guard, metrics: Metrics
    ) -> None:
        self._settings, self._store, self._room = settings, store, room
        self._guard, self._metrics = guard, metrics
        self._limits = Limits(
            messages_per_s=settings.stream_messages_per_s,
            max_fps=settings.stream_max_fps,
            heartbeat_s=settings.stream_silence_s / 2,
            silence_s=settings.stream_silence_s,
        )
        self._open: set[Connection] = set()
        self._by_caller: Counter[str] = Counter()
        self._draining = False

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    async def serve(self, websocket: WebSocket, avatar_id: str) -> None:
        """Answer one handshake, and the stream that follows, to its end."""
        try:
            with self._place(websocket):
                query = _query(websocket)
                subprotocol = choose_subprotocol(websocket.scope["subprotocols"])
                if subprotocol is None:
                    raise SubprotocolUnsupported(f"expected one of {', '.join(SUBPROTOCOLS)}")
                async with self._store.lease(avatar_id) as avatar:
                    avatar.mesh(query.lod)
                    await websocket.accept(subprotocol)
                    await self._run(websocket, avatar, query, subprotocol)
        except AvatarServiceError as error:
            # Raised before the accept only: afterwards a connection ends with a close.
            await refuse(websocket.scope, websocket.receive, websocket.send, error)  # type: ignore[arg-type]

    async def drain(self) -> None:
        """Refuse new streams, end the open ones with 1012, and wait for them."""
        self._draining = True
        for connection in self._open:
            connection.stop(Closing(Close.RESTART, Draining.code))
        while self._open:
            await asyncio.sleep(0.01)

    @contextmanager
    def _place(self, websocket: WebSocket) -> Iterator[None]:
        """A place among the streams, for as long as the stream lives."""
        if self._draining:
            raise Draining("the service is shutting down", {"Retry-After": str(RETRY_S)})
        if self._by_caller.total() >= self._settings.max_streams:
            raise Overloaded("too many streams are open", RETRY_S)
        caller = _caller(websocket)
        if self._by_caller[caller] >= self._settings.max_streams_per_key:
            raise RateLimited(
                f"expected at most {self._settings.max_streams_per_key} streams of one key",
                {"Retry-After": str(RETRY_S)},
            )
        self._by_caller[caller] += 1
        try:
            yield
        finally:
            self._by_caller[caller] -= 1
            self._by_caller += Counter()  # forgets who has none left

    async def _run(self, websocket: WebSocket, avatar: Avatar, query: StreamQuery, subprotocol: str) -> None:
        resumed = query.last_seq is not None and query.bundle == avatar.bundle.digest
        session = Session(
            query.mode,
            partial(_placed, query.options(), avatar),
            time.monotonic(),
            limits=self._limits,
            max_fps=min(query.max_fps or self._limits.max_fps, self._limits.max_fps),
            window=query.window,
            last_seq=query.last_seq if resumed and query.last_seq is not None else -1,
        )
        codec = SUBPROTOCOLS[subprotocol]
        connection = Connection(
            websocket,
            session,
            avatar,
            query.lod,
            FrameEncoder(codec),
            self._room,
            self._metrics,
            self._settings,
            partial(self._look_around, websocket, avatar),
        )
        self._open.add(connection)
        self._metrics.streams.inc()
        try:
            await connection.run(_hello(session, avatar, query, codec, resumed))
        finally:
            self._open.discard(connection)
            self._metrics.streams.dec()

    def _look_around(self, websocket: WebSocket, avatar: Avatar) -> Closing | None:
        """Whether the avatar or the key are no longer what they were when the stream was opened."""
        if avatar.spoilt:
            return Closing(Close.ENGINE_FAILED, "engine-failed")
        if not any(avatar is loaded for loaded in self._store.loaded()):
            # A pinned avatar leaves the memory only when it is replaced or deleted.
            there = (self._store.bundle_dir / avatar.id).is_dir()
            return (
                Closing(Close.RESTART, "avatar-replaced") if there else Closing(Close.AVATAR_REMOVED, "avatar-removed")
            )
        try:
            self._guard.principal(websocket.headers)
        except Unauthorized as error:
            return Closing(Close.KEY_EXPIRED, error.code)
        return None


def _placed(options: Options, avatar: Avatar, pose: Any, translation: Any) -> Placed:
    checked = parse_one(pose, translation, options, avatar.bundle.skeleton.rest_joints[0])
    return checked.rotations[0], checked.translation[0]


def _query(websocket: WebSocket) -> StreamQuery:
    try:
        query = StreamQuery.model_validate(dict(websocket.query_params))
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc'])) or 'query'}: {e['msg']}" for e in error.errors())
        raise OptionInvalid("; ".join(problems)) from None
    check_axes(query.frame, query.up_axis)
    return query


def _caller(websocket: WebSocket) -> str:
    """Whose streams are counted together: those of a key, or where there are none those of an address."""
    principal: Principal = getattr(websocket.state, "principal", ANONYMOUS)
    if principal is ANONYMOUS and websocket.client:
        return websocket.client.host
    return principal.name


def _hello(session: Session, avatar: Avatar, query: StreamQuery, codec: str, resumed: bool) -> dict[str, Any]:
    limits, files = session.limits, avatar.bundle.manifest.files
    return {
        "type": "hello",
        "protocol": PROTOCOL_VERSION,
        "session": secrets.token_hex(8),
        "resumed": resumed,
        "avatar": avatar.id,
        "bundle": avatar.bundle.digest,
        "lod": query.lod,
        "vertices": len(avatar.mesh(query.lod).vertices),
        "codec": codec,
        "mode": session.mode,
        "up_axis": "y",
        "units": "m",
        "input": query.model_dump(include={"up_axis", "units", "frame", "rotation", "normalize"}),
        "mesh": {
            "url": f"/avatars/{avatar.id}/mesh?lod={query.lod}",
            "etag": f'"{files[mesh_file(query.lod)].sha256[:32]}"',
        },
        "max_fps": session.max_fps,
        "window": session.window,
        "credits": limits.credits,
        "heartbeat_s": limits.heartbeat_s,
        "silence_s": limits.silence_s,
        "limits": {
            "message_bytes": limits.message_bytes,
            "messages_per_s": limits.messages_per_s,
            "bad_messages": limits.bad_messages,
            "max_fps": limits.max_fps,
            "max_window": limits.max_window,
        },
    }
