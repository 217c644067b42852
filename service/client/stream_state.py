"""The client's half of a streaming session, without a network: `docs/protocol.md`.

Both `Stream` and `AsyncStream` carry messages in and out of it, and call `connected` again after a reconnect.
"""

import json
from collections import deque
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit

import numpy as np
from numpy.typing import ArrayLike

from service.client.calls import avatar_path
from service.client.errors import AvatarChanged, ClientError, ConnectionLost, PoseRefused, StreamClosed
from service.frames import Codec, Frame, FrameDecoder, FrameError
from service.streaming.wire import SUBPROTOCOLS, Close, encode_pose

FINAL = frozenset({Close.DONE, Close.WRONG_TYPE, Close.NOT_JSON, Close.TOO_BIG, Close.BAD_MESSAGES, *range(4400, 4405)})
"""Close codes after which a new connection would end as the old one did."""
MAX_FRAME_BYTES = 256 << 20


@dataclass
class StreamState:
    """What both sides have said so far."""

    url: str
    avatar: str
    options: dict[str, Any]
    codec: Codec
    hello: dict[str, Any] = field(default_factory=dict)
    """The server's first message; empty before the first connection."""
    stats: dict[str, int] = field(default_factory=dict)
    """As of the last `pong` or `end`."""
    inbox: deque[tuple[int, Frame | ClientError]] = field(default_factory=deque)
    """What has come and was not yet handed over, and over which connection."""
    ended: bool = False

    def __post_init__(self) -> None:
        self._complete = self.options.get("mode") == "complete"
        self._seq = -1
        self._connection = 0
        self._last_seq: int | None = None
        self._unanswered: deque[tuple[int, bytes]] = deque()
        self._end_said = False
        self._in_use = 0, 0  # the connection, which are counted from 1, and the seq
        self._decoder = FrameDecoder()

    @property
    def subprotocol(self) -> str:
        return next(name for name, codec in SUBPROTOCOLS.items() if codec == self.codec)

    def address(self) -> str:
        """Where to connect, for the first time or again."""
        base = urlsplit(self.url)
        query = {name: value for name, value in self.options.items() if value is not None}
        if self._last_seq is not None:
            query |= {"last_seq": self._last_seq, "bundle": self.hello["bundle"]}
        path = base.path.rstrip("/") + avatar_path(self.avatar, "stream")
        return urlunsplit(("wss" if base.scheme == "https" else "ws", base.netloc, path, urlencode(query), ""))

    def connected(self, first: str | bytes) -> list[str | bytes]:
        """The first message has come over a new connection; what is to be sent at once.

        Raises:
            ConnectionLost: it is no hello.
        """
        try:
            hello = json.loads(first)
            if hello["type"] != "hello" or hello["protocol"] != 1:
                raise ValueError
        except (ValueError, KeyError, TypeError) as error:
            raise ConnectionLost("this is not a Reposer stream") from error
        self._connection += 1
        if self.hello and hello["bundle"] != self.hello["bundle"]:
            self._put(AvatarChanged(f"{self.avatar} is now {hello['bundle']}"))
        self.hello, self._decoder = hello, FrameDecoder()
        if not self._complete:
            self._unanswered.clear()
        return [data for _, data in self._unanswered] + ([_text(type="end")] if self._end_said else [])

    @property
    def has_credit(self) -> bool:
        """Whether another pose may be sent; always so in live mode."""
        return not self._complete or len(self._unanswered) < self.hello["credits"]

    def pose(self, pose: ArrayLike, translation: ArrayLike | None, client_us: int) -> tuple[int, str | bytes]:
        """A pose as a message, and its `seq`."""
        self._seq += 1
        numbers = np.asarray(pose, np.float32)
        moved = np.zeros(3, np.float32) if translation is None else np.asarray(translation, np.float32)
        # 72 numbers of another shape are another rotation, such as (12, 6): not ours to take for axis-angle.
        if numbers.size == 72 and numbers.shape[-2:] in ((72,), (1, 72), (24, 3)) and moved.size == 3:
            data: str | bytes = encode_pose(self._seq, numbers, moved, client_us)
        else:
            data = _text(type="pose", seq=self._seq, t=client_us, pose=numbers.tolist(), trans=moved.tolist())
        if self._complete:
            self._unanswered.append((self._seq, data))  # type: ignore[arg-type]
        return self._seq, data

    def end(self) -> str:
        """The message that no more poses come."""
        self._end_said = True
        return _text(type="end")

    def received(self, message: str | bytes) -> list[str | bytes]:
        """A message has come; what to answer."""
        if isinstance(message, bytes):
            try:
                frame = self._decoder.decode(message)
            except FrameError as error:
                raise ConnectionLost(f"a frame is damaged: {error}") from error
            self._answered(frame.seq)
            self._last_seq = frame.seq
            self._put(frame)
            # In complete mode the credits bound what piles up here; in live mode what is not yet used must not.
            return [_text(type="ack", seq=frame.seq)] if self._complete else []
        document = json.loads(message)
        match document.get("type"):
            case "ping":
                return [_text(type="pong", t=document.get("t", 0))]
            case "error":
                self._answered(document.get("seq"))
                self._put(PoseRefused(document))
            case "pong" | "end":
                self.stats = document["stats"]
                self.ended = document["type"] == "end"
        return []

    def taken(self) -> Frame | ClientError:
        """The next of the inbox."""
        connection, item = self.inbox.popleft()
        if isinstance(item, Frame) and not self._complete:
            self._in_use = connection, item.seq
        return item

    def used(self) -> list[str | bytes]:
        """Whoever took an item is done with it; what to say."""
        (connection, seq), self._in_use = self._in_use, (0, 0)
        # A new connection counts its own frames only.
        return [_text(type="ack", seq=seq)] if connection == self._connection else []

    def _put(self, item: Frame | ClientError) -> None:
        self.inbox.append((self._connection, item))

    def closed(self, code: int, reason: str) -> StreamClosed | None:
        """The connection is closed: why no other should be opened, or None."""
        return StreamClosed(code, reason) if code in FINAL else None

    def _answered(self, seq: Any) -> None:
        self._unanswered = deque((number, data) for number, data in self._unanswered if number != seq)


def _text(**members: Any) -> str:
    return json.dumps(members, separators=(",", ":"))
