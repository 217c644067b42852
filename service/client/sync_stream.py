"""A stream for programs without an event loop."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

from numpy.typing import ArrayLike
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from service.client.backoff import RETRIED, Backoff
from service.client.calls import authorization
from service.client.errors import ClientError, ConnectionLost, Refused, StreamClosed
from service.client.stream_state import MAX_FRAME_BYTES, StreamState
from service.frames import Codec, Frame

OPEN_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0


class Stream:
    """Poses in, frames out.  A broken connection is made again, with growing waits; `send` and `receive` go on.

    Somebody must `receive`: that also acknowledges frames and answers the service's pings.  For one thread.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        avatar: str,
        options: dict[str, Any],
        codec: Codec,
        retries: int,
        sleep: Callable[[float], None],
    ) -> None:
        self._state = StreamState(url, avatar, options, codec)
        self._headers, self._backoff, self._sleep = authorization(key), Backoff(retries), sleep
        self._socket: ClientConnection | None = None
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave."""
        self._opened.close()

    @property
    def hello(self) -> dict[str, Any]:
        """What the service said first: vertices, codec, mesh, limits."""
        return self._state.hello

    @property
    def stats(self) -> dict[str, int]:
        """The service's counts as of the end."""
        return self._state.stats

    def send(self, pose: ArrayLike, translation: ArrayLike | None = None) -> int:
        """Send one pose, (72,) or any shape the service takes; returns its `seq`.

        Matrices, quaternions and 6d come joint by joint, such as (24, 4); as one row where the stream named `rotation`.
        In complete mode this may first have to wait for frames, which the next calls of `receive` hand over.
        """
        while not self._state.has_credit:
            self._pump(None)
        seq, data = self._state.pose(pose, translation, time.monotonic_ns() // 1000)
        self._send([data])
        return seq

    def receive(self, timeout_s: float | None = None) -> Frame | None:
        """The next frame; None after the end.

        To come for it says that the one before is done with: in live mode the service computes no more than `window`
        frames ahead of that.

        Raises:
            TimeoutError: no frame within `timeout_s`.
            PoseRefused, AvatarChanged: the stream goes on.
            StreamClosed, Refused, ConnectionLost: it does not.
        """
        self._send(self._state.used())
        while not self._state.inbox:
            if self._state.ended:
                return None
            self._pump(timeout_s)
        item = self._state.taken()
        if isinstance(item, ClientError):
            raise item
        return item

    def end(self) -> None:
        """Say that no more poses come; `receive` hands over the frames that are left, then None."""
        self._send([self._state.end()])

    def repose(self, poses: Iterable[ArrayLike]) -> Iterator[Frame]:
        """Send poses one after the other and yield what comes back; in complete mode a frame for each."""
        for pose in poses:
            self.send(pose)
            self._take_in()
            while self._state.inbox:
                yield self._next()
                # Said here, not with the next frame: within the window, that one may be waiting for it.
                self._send(self._state.used())
        self.end()
        while (frame := self.receive()) is not None:
            yield frame

    def _next(self) -> Frame:
        frame = self.receive()
        assert frame is not None  # the inbox was not empty
        return frame

    def _take_in(self) -> None:
        """What has come already, without waiting."""
        with contextlib.suppress(TimeoutError):
            while True:
                self._pump(0)

    def _pump(self, timeout_s: float | None) -> None:
        """Take in one message, or a new connection in place of a broken one."""
        assert self._socket is not None
        try:
            message = self._socket.recv(timeout_s)
        except ConnectionClosed as closed:
            self._reconnect(closed)
        else:
            self._backoff.succeeded()
            self._send(self._state.received(message))

    def _send(self, messages: Iterable[str | bytes]) -> None:
        assert self._socket is not None
        try:
            for message in messages:
                self._socket.send(message)
        except ConnectionClosed:
            pass  # the next `_pump` sees it, and what must not be lost is sent again

    def _reconnect(self, closed: ConnectionClosed) -> None:
        if self._state.ended:
            return
        code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")
        if final := self._state.closed(code, reason):
            raise final
        self._wait(None, StreamClosed(code, reason))
        self._connect()

    def _connect(self) -> None:
        while True:
            try:
                self._opened.close()
                opening = connect(
                    self._state.address(),
                    subprotocols=[Subprotocol(self._state.subprotocol)],
                    additional_headers=self._headers,
                    compression=None,
                    max_size=MAX_FRAME_BYTES,
                    open_timeout=OPEN_TIMEOUT_S,
                    close_timeout=CLOSE_TIMEOUT_S,
                )
                self._socket = self._opened.enter_context(opening)
                return self._send(self._state.connected(self._socket.recv(OPEN_TIMEOUT_S)))
            except InvalidStatus as denied:
                answer = denied.response
                refused = Refused.read(answer.status_code, bytes(answer.body or b""))
                if answer.status_code not in RETRIED:
                    raise refused from None
                self._wait(answer.headers.get("Retry-After"), refused)
            except (OSError, TimeoutError, WebSocketException) as error:
                self._wait(None, ConnectionLost(f"{self._state.url}: {error}"))

    def _wait(self, retry_after: str | None, failure: ClientError) -> None:
        wait_s = self._backoff.wait_s(retry_after)
        if wait_s is None:
            with contextlib.suppress(Exception):
                self.close()
            raise failure
        self._sleep(wait_s)
