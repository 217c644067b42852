"""An answer on its way: batches from the engine room go through an encoder, for one reader or for many."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

from anyio import CancelScope, from_thread, to_thread

from service import answers
from service.avatars import Avatar
from service.engine import Batch
from service.engine_room import EngineRoom
from service.errors import InsufficientStorage
from service.folders import is_full
from service.formats.clip import Clip
from service.metrics import Metrics
from service.poses import PoseSequence
from service.tracing import note_time

INLINE_VERTEX_FRAMES, INLINE_FRAMES = 80_000, 20
"""To encode so many as numbers takes 0.3 ms; to ask a thread for it takes longer on a busy machine."""


@dataclass(frozen=True)
class Order:
    """What is to be made."""

    avatar: Avatar
    lod: str
    media_type: str
    poses: PoseSequence
    clip: Clip


@dataclass
class Times:
    """Where the time of an answer went so far, seconds; for `Server-Timing`."""

    spent: dict[str, float] = field(default_factory=dict)
    frames: int = 0
    """Computed so far."""

    def add(self, what: str, seconds: float) -> None:
        self.spent[what] = self.spent.get(what, 0.0) + seconds
        note_time(what, self.spent[what])

    def header(self) -> str:
        return ", ".join(f"{what};dur={1000 * seconds:.3f}" for what, seconds in self.spent.items())


class _Feed:
    """Batches for an encoder in a worker thread.  As a rule the next one lies there before the encoder asks."""

    def __init__(self, batches: AsyncGenerator[Batch, None], times: Times) -> None:
        self._batches, self._times = batches, times
        self._waiting: deque[Batch] = deque()
        self._ended = False

    async def fill(self) -> None:
        """Wait for a batch, unless one lies there."""
        if self._waiting or self._ended:
            return
        batch = await anext(self._batches, None)
        if batch is None:
            self._ended = True
            return
        self._times.add("queue", batch.queue_s)
        self._times.add("infer", batch.seconds)
        self._times.frames += len(batch.vertices)
        self._waiting.append(batch)

    def is_small(self) -> bool:
        """Whether a batch lies there that is soon encoded."""
        shape = self._waiting[0].vertices.shape[:2] if self._waiting else (0, 0)
        return 0 < shape[0] <= INLINE_FRAMES and shape[0] * shape[1] <= INLINE_VERTEX_FRAMES

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._waiting:
            from_thread.run(self.fill)
        if not self._waiting:
            raise StopIteration
        return self._waiting.popleft()


async def pieces(
    room: EngineRoom,
    order: Order,
    times: Times,
    metrics: Metrics,
    deadline: float | None = None,
    in_background: bool = False,
) -> AsyncGenerator[bytes, None]:
    """The answer in pieces, the first once the first frame is computed; a piece may be empty.

    No more than a few batches are in memory, and nothing is computed far ahead of the one who takes the pieces.

    Raises:
        InsufficientStorage: the disk has no room for what the answer is made in.
        AvatarServiceError: as `EngineRoom.sequence`.
    """
    needs_batches = answers.TABLE[order.media_type].needs_batches
    quick = order.media_type in (answers.FRAMES, answers.FRAMES_Q16)
    sequence = room.sequence(order.avatar, order.lod, order.poses, deadline, in_background=in_background)
    feed = _Feed(sequence, times)
    chunks = answers.encode(order.media_type, feed, order.clip)
    order.avatar.pins += 1
    try:
        async with aclosing(sequence):
            while True:
                if needs_batches:
                    await feed.fill()
                began = time.perf_counter()
                try:
                    if quick and feed.is_small():
                        piece = next(chunks, None)
                    else:
                        piece = await to_thread.run_sync(next, chunks, None)
                except OSError as error:
                    if is_full(error):
                        raise InsufficientStorage("the disk is full") from error
                    raise
                seconds = time.perf_counter() - began
                times.add("encode", seconds)
                metrics.encode_seconds.observe(seconds)
                if piece is None:
                    return
                yield piece
    finally:
        order.avatar.pins -= 1
        with suppress(ValueError):  # a thread that cannot be called off is still in it
            chunks.close()  # type: ignore[attr-defined]


class Production:
    """One computation that several readers take from, each from its beginning.

    Goes on while there is one reader; then what it has made is thrown away.  All of it is in memory until the last
    reader has gone, so it is for answers of bounded size.
    """

    def __init__(self, source: AsyncGenerator[bytes, None]) -> None:
        self._source = source
        self._pieces: list[bytes] = []
        self._error: Exception | None = None
        self._more = asyncio.Event()
        self._readers = 0
        self._scope = CancelScope()
        self.ended = False
        """Finished, failed or called off: it takes no more readers."""
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            with self._scope:
                async with aclosing(self._source):
                    async for piece in self._source:
                        self._pieces.append(piece)
                        self._wake()
        except Exception as error:  # handed to the readers
            self._error = error
        finally:
            self.ended = True
            self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()

    async def read(self) -> AsyncGenerator[bytes, None]:
        """All pieces, as they come.  Close it (`aclosing`) to be counted no more.

        Raises:
            What the source raised.
        """
        self._readers += 1
        at = 0
        try:
            while True:
                while at < len(self._pieces):
                    at += 1
                    yield self._pieces[at - 1]
                if self.ended:
                    break
                await self._more.wait()
            if self._error is not None:
                raise self._error
        finally:
            self._readers -= 1
            if not self._readers:
                self.ended = True
                self._scope.cancel()
