"""One open WebSocket: carries messages between a `Session` and the network, and poses to the engine room.

Three tasks: one reads, one computes and sends, one watches the clock.  The first to end ends all, so nothing is left of
a client that has gone.  No send is waited for longer than its limit: a socket that is full is a client that is slow.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from anyio import to_thread
from starlette.websockets import WebSocket, WebSocketDisconnect

from service.avatars import Avatar
from service.engine_room import EngineRoom
from service.errors import AvatarServiceError, DeadlinePassed, Draining, Overloaded
from service.frames import FrameEncoder
from service.metrics import Metrics
from service.settings import Settings
from service.streaming.session import Closing, Out, Pose, Session, error_message
from service.streaming.wire import Close

log = logging.getLogger(__name__)
LIVE_DEADLINE_S = 1.0
"""A live pose that waited longer than this is not worth computing."""
MAX_TICK_S = 1.0
INLINE_VERTICES = 20_000
"""To encode so many takes 0.3 ms; to ask a thread for it takes longer on a busy machine."""


class _End(Exception):  # noqa: N818 - the end of a connection is no error
    """The connection ends; None where the client has gone already."""

    def __init__(self, closing: Closing | None) -> None:
        super().__init__(closing)
        self.closing = closing


class Connection:
    """From the hello to the close."""

    def __init__(
        self,
        websocket: WebSocket,
        session: Session,
        avatar: Avatar,
        lod: str,
        encoder: FrameEncoder,
        room: EngineRoom,
        metrics: Metrics,
        settings: Settings,
        look_around: Callable[[], Closing | None],
    ) -> None:
        """`look_around` is asked about every second whether something outside ends this connection."""
        self._websocket, self._session, self._avatar, self._lod = websocket, session, avatar, lod
        self._encoder, self._room, self._metrics, self._settings = encoder, room, metrics, settings
        self._look_around = look_around
        self._wake = asyncio.Event()
        self._sending = asyncio.Lock()
        self._stopped: asyncio.Future[Closing] = asyncio.get_running_loop().create_future()

    def stop(self, closing: Closing) -> None:
        """End the connection from outside."""
        if not self._stopped.done():
            self._stopped.set_result(closing)

    async def run(self, hello: dict[str, Any]) -> None:
        """Say hello, serve, close.  Raises nothing; when it returns, nothing of the connection is left."""
        tasks = [asyncio.ensure_future(part) for part in (self._talk(hello), self._compute(), self._watch())]
        try:
            done, _ = await asyncio.wait([*tasks, self._stopped], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._metrics.frames_dropped.inc(self._session.stats.dropped)
        # Several may have ended at once; a client that has gone needs no close.
        endings = [_closing_of(part) for part in done]
        closing = None if None in endings else endings[0]
        self._metrics.stream_ends.labels("gone" if closing is None else str(int(closing.code))).inc()
        if closing is not None:
            await self._close(closing)

    async def _talk(self, hello: dict[str, Any]) -> None:
        await self._say([hello])
        while True:
            event = await self._websocket.receive()
            if event["type"] == "websocket.disconnect":
                raise _End(None)
            text = event.get("text")
            message = event["bytes"] if text is None else text
            await self._say(self._session.receive(message, time.monotonic()))
            self._wake.set()

    async def _compute(self) -> None:
        session = self._session
        while True:
            now = time.monotonic()
            await self._say(session.finish())
            poses = session.take(now)
            if poses:
                await self._repose(poses)
                continue
            # Nothing waits, too much is unacknowledged, or it is too early for the rate: only that ends by itself.
            self._wake.clear()
            try:
                async with asyncio.timeout(session.wait_s(now) or None):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _repose(self, poses: list[Pose]) -> None:
        session, live = self._session, self._session.mode == "live"
        rotations, translation = np.array([p.rotations for p in poses]), np.array([p.translation for p in poses])
        deadline = poses[0].arrived_s + LIVE_DEADLINE_S if live else None
        try:
            done = await self._room.repose(
                self._avatar, self._lod, rotations, translation, live=live, deadline=deadline
            )
        except (Overloaded, DeadlinePassed) as error:
            await self._say(session.not_computed(poses, time.monotonic(), error))
            return
        except Draining as error:
            raise _End(Closing(Close.RESTART, error.code)) from error
        except AvatarServiceError as error:
            log.error("stream of %s: %s: %s", self._avatar.id, error.code, error, exc_info=error.__cause__)
            await self._say([error_message(error), Closing(Close.ENGINE_FAILED, error.code)])
            return
        for pose, vertices, pelvis in zip(poses, done.vertices, done.pelvis, strict=True):
            began = time.monotonic()
            numbers = session.frame_sent(pose, began)
            frame = partial(
                self._encoder.encode,
                vertices,
                pelvis,
                seq=numbers.seq,
                frame=numbers.frame,
                last=False,
                dropped=numbers.dropped_before,
                client_us=numbers.client_us,
                server_us=min(int(1e6 * (began - pose.arrived_s)), 0xFFFFFFFF),
            )
            inline = self._encoder.codec != "q16d" and len(vertices) <= INLINE_VERTICES
            data = frame() if inline else await to_thread.run_sync(frame)
            encoded = time.monotonic()
            await self._send({"type": "websocket.send", "bytes": data})
            self._metrics.encode_seconds.observe(encoded - began)
            self._metrics.send_seconds.observe(time.monotonic() - encoded)

    async def _watch(self) -> None:
        tick_s = min(MAX_TICK_S, self._session.limits.heartbeat_s / 4)
        while True:
            await asyncio.sleep(tick_s)
            await self._say(self._session.tick(time.monotonic()))
            if closing := self._look_around():
                raise _End(closing)

    async def _say(self, messages: list[Out]) -> None:
        for message in messages:
            if isinstance(message, Closing):
                raise _End(message)
            await self._send({"type": "websocket.send", "text": json.dumps(message, separators=(",", ":"))})

    async def _send(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._settings.stream_send_timeout_s), self._sending:
                await self._websocket.send(message)
        except TimeoutError:
            raise _End(Closing(Close.POLICY, "slow-consumer")) from None

    async def _close(self, closing: Closing) -> None:
        try:
            # On a socket that is full this would wait for ever, too.
            async with asyncio.timeout(self._settings.stream_close_timeout_s):
                await self._websocket.close(closing.code, closing.reason)
        except (TimeoutError, RuntimeError, WebSocketDisconnect):
            pass  # it has gone by itself meanwhile, or will be cut off


def _closing_of(part: asyncio.Future[Any]) -> Closing | None:
    """How a finished part of the connection wants it to end."""
    error = part.exception()
    if error is None:
        return part.result()
    if isinstance(error, _End):
        return error.closing
    if isinstance(error, WebSocketDisconnect):
        return None
    log.error("a stream failed", exc_info=error)
    return Closing(Close.ENGINE_FAILED, AvatarServiceError.code)
