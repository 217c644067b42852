"""A stream for programs with an event loop; the same calls as `Stream`, awaited."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, Self

from numpy.typing import ArrayLike
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

from service.client.backoff import RETRIED, Backoff
from service.client.calls import authorization
from service.client.errors import ClientError, ConnectionLost, Refused, StreamClosed
from service.client.stream_state import MAX_FRAME_BYTES, StreamState
from service.frames import Codec, Frame

OPEN_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0


class AsyncStream:
    """Poses in, frames out; `Stream` says what the calls do.  One task may send while another receives."""

    def __init__(
        self,
        url: str,
        key: str | None,
        avatar: str,
        options: dict[str, Any],
        codec: Codec,
        retries: int,
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._state = StreamState(url, avatar, options, codec)
        self._headers, self._backoff, self._sleep = authorization(key), Backoff(retries), sleep
        self._socket: ClientConnection | None = None
        self._pumping, self._ready = asyncio.Lock(), asyncio.Event()

    async def __aenter__(self) -> Self:
        await self._connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Leave."""
        if self._socket is not None:
            await self._socket.close()

    @property
    def hello(self) -> dict[str, Any]:
        """What the service said first: vertices, codec, mesh, limits."""
        return self._state.hello

    @property
    def stats(self) -> dict[str, int]:
        """The service's counts as of the end."""
        return self._state.stats

    async def send(self, pose: ArrayLike, translation: ArrayLike | None = None) -> int:
        """Send one pose, (72,) or any shape the service takes; returns its `seq`.

        Matrices, quaternions and 6d come joint by joint, such as (24, 4); as one row where the stream named `rotation`.
        In complete mode this may first have to wait for frames, which the next calls of `receive` hand over.
        """
        while not self._state.has_credit:
            await self._pump(None)
        await self._ready.wait()  # or it might overtake what a new connection sends again
        seq, data = self._state.pose(pose, translation, time.monotonic_ns() // 1000)
        await self._send([data])
        return seq

    async def receive(self, timeout_s: float | None = None) -> Frame | None:
        """The next frame; None after the end.

        To come for it says that the one before is done with: in live mode the service computes no more than `window`
        frames ahead of that.

        Raises:
            TimeoutError: no frame within `timeout_s`.
            PoseRefused, AvatarChanged: the stream goes on.
            StreamClosed, Refused, ConnectionLost: it does not.
        """
        await self._send(self._state.used())
        while not self._state.inbox:
            if self._state.ended:
                return None
            await self._pump(timeout_s)
        item = self._state.taken()
        if isinstance(item, ClientError):
            raise item
        return item

    async def end(self) -> None:
        """Say that no more poses come; `receive` hands over the frames that are left, then None."""
        await self._send([self._state.end()])

    async def repose(self, poses: Iterable[ArrayLike]) -> AsyncIterator[Frame]:
        """Send poses one after the other and yield what comes back; in complete mode a frame for each."""
        for pose in poses:
            await self.send(pose)
            await self._take_in()
            while self._state.inbox:
                yield await self._next()
                # Said here, not with the next frame: within the window, that one may be waiting for it.
                await self._send(self._state.used())
        await self.end()
        while (frame := await self.receive()) is not None:
            yield frame

    async def _next(self) -> Frame:
        frame = await self.receive()
        assert frame is not None  # the inbox was not empty
        return frame

    async def _take_in(self) -> None:
        """What has come already, without waiting."""
        with contextlib.suppress(TimeoutError):
            while True:
                await self._pump(0)

    async def _pump(self, timeout_s: float | None) -> None:
        """Take in one message, or a new connection in place of a broken one."""
        seen = len(self._state.inbox)
        async with asyncio.timeout(timeout_s) as limit, self._pumping:
            if len(self._state.inbox) > seen:
                return  # another task has taken it in
            assert self._socket is not None
            try:
                message = await self._socket.recv()
            except ConnectionClosed as closed:
                limit.reschedule(None)  # or it might be left half made
                await self._reconnect(closed)
            else:
                self._backoff.succeeded()
                await self._send(self._state.received(message))

    async def _send(self, messages: Iterable[str | bytes]) -> None:
        assert self._socket is not None
        try:
            for message in messages:
                await self._socket.send(message)
        except ConnectionClosed:
            pass  # the next `_pump` sees it, and what must not be lost is sent again

    async def _reconnect(self, closed: ConnectionClosed) -> None:
        if self._state.ended:
            return
        code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")
        if final := self._state.closed(code, reason):
            raise final
        await self._wait(None, StreamClosed(code, reason))
        await self._connect()

    async def _connect(self) -> None:
        self._ready.clear()
        try:
            await self._try_to_connect()
        finally:
            self._ready.set()

    async def _try_to_connect(self) -> None:
        while True:
            try:
                self._socket = await connect(
                    self._state.address(),
                    subprotocols=[Subprotocol(self._state.subprotocol)],
                    additional_headers=self._headers,
                    compression=None,
                    max_size=MAX_FRAME_BYTES,
                    open_timeout=OPEN_TIMEOUT_S,
                    close_timeout=CLOSE_TIMEOUT_S,
                )
                return await self._send(self._state.connected(await self._socket.recv()))
            except InvalidStatus as denied:
                answer = denied.response
                refused = Refused.read(answer.status_code, bytes(answer.body or b""))
                if answer.status_code not in RETRIED:
                    raise refused from None
                await self._wait(answer.headers.get("Retry-After"), refused)
            except (OSError, TimeoutError, WebSocketException) as error:
                await self._wait(None, ConnectionLost(f"{self._state.url}: {error}"))

    async def _wait(self, retry_after: str | None, failure: ClientError) -> None:
        wait_s = self._backoff.wait_s(retry_after)
        if wait_s is None:
            with contextlib.suppress(Exception):
                await self.close()
            raise failure
        await self._sleep(wait_s)
