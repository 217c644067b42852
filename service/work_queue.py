"""Which frames are computed next: pieces of work wait in two lines, live and bulk, and leave in batches.

- A batch is work of one avatar, one level of detail and one line, within the budget of vertex-frames and about
  the time of a micro-batch.  Nothing waits for a batch to fill: it gathers while the one before is computed.
- In each line the clients take turns, one piece each, whatever number of pieces they have waiting.  In the bulk line
  half of the engine's time goes to the one that would end soonest instead: a short sequence has that at least, whatever
  long ones there are, and a long one half of its turns.
- Live goes first.  If it never pauses, bulk gets a batch now and then, but the same piece of live work never has
  to wait for two of them.
- Several batches are computed at a time, so that the engine has the next one when one ends.  While there are live
  streams, bulk leaves one of these places free.
"""

import asyncio
import math
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.avatars import Avatar

LIVE_IN_A_ROW = 4
"""So many live batches go before a bulk one that waits, at most."""
LIVE_LINGERS_S = 1.0
"""After two pieces of live work within so long more is expected, for as long; after one, as of a probe, it is not."""
LEAST_VERTEX_FRAMES = 8192
"""Batches of less are mostly overhead, so their time says nothing about larger ones."""


@dataclass(eq=False)
class Work:
    """Frames that are computed together, of one client."""

    client: object
    """Whose turn it is: compared by identity."""
    avatar: Avatar
    lod: str
    rotations: NDArray[np.float32]
    """(F, 24, 3, 3)"""
    translation: NDArray[np.float32]
    """(F, 3), metres."""
    live: bool
    deadline: float | None
    """On the monotonic clock."""
    frames_left: float
    """Of its client, these among them; infinite for who is in no hurry."""
    enqueued_s: float = field(default_factory=time.monotonic)
    future: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    stood_back: bool = False
    """A bulk batch has run while this live work waited."""
    share_s: float = 0.0
    """Of the first piece of a batch: what the clock of `_Shares` said when it was taken."""

    def __len__(self) -> int:
        return len(self.rotations)


@dataclass
class Pace:
    """How fast one level of detail of one avatar is computed."""

    vertices: int
    seconds_per_frame: float = 0.0
    """0 as long as nothing was measured."""
    alone_s: float = 0.0
    """How long the last live frame took that was computed alone; 0 as long as there was none."""
    most_frames: int = 1 << 30
    """Lowered when the device runs out of memory."""

    def learn(self, frames: int, seconds: float) -> None:
        """Take the measurement of one batch into the moving average, with less weight if something held it up."""
        now = seconds / frames
        weight = 1.0 if not self.seconds_per_frame else 0.5 if now < self.seconds_per_frame else 0.125
        self.seconds_per_frame += weight * (now - self.seconds_per_frame)


class _Line:
    """Clients in the order of their turns, each with the pieces that wait."""

    def __init__(self) -> None:
        self._clients: OrderedDict[int, deque[Work]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._clients)

    def __iter__(self) -> Iterator[Work]:
        return (work for pieces in self._clients.values() for work in pieces)

    def add(self, work: Work) -> None:
        self._clients.setdefault(id(work.client), deque()).append(work)

    def heads(self) -> list[Work]:
        """The first piece of each client."""
        return [pieces[0] for pieces in self._clients.values()]

    def remove(self, work: Work) -> bool:
        """Take out a piece; whether it was there."""
        pieces = self._clients.get(id(work.client))
        if pieces is None or work not in pieces:
            return False
        pieces.remove(work)
        if not pieces:
            del self._clients[id(work.client)]
        return True

    def serve(self, work: Work, *, in_turn: bool) -> None:
        """Take out the first piece of a client, which goes to the end of the line with the others that it has if it
        was its turn."""
        if in_turn:
            self._clients.move_to_end(id(work.client))
        self.remove(work)


class _Shares:
    """The engine's time, as each batch sees it: of n that are computed at a time, each has an nth of the engine."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._seen_s = clock, clock()
        self._running, self._each_s = 0, 0.0

    def change(self, by: int) -> float:
        """So many batches more are computed from now on; seconds of the engine that one all along would have had."""
        now = self._clock()
        if self._running:
            self._each_s += (now - self._seen_s) / self._running
        self._seen_s = now
        self._running += by
        return self._each_s


class WorkQueue:
    """Work that waits.  For the event loop's thread only.

    Args:
        batch_vertex_frames: the largest batch.
        batch_s: about how long a batch may have the engine.
        places: how many batches are computed at a time.
        clock: seconds, monotonic.
    """

    def __init__(
        self, batch_vertex_frames: int, batch_s: float, places: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._budget, self._batch_s, self._places, self._clock = batch_vertex_frames, batch_s, places, clock
        self._live, self._bulk = _Line(), _Line()
        self._live_in_a_row = self._bulk_running = 0
        self._ahead_s = 0.0
        """What those that end soonest have had of the engine beyond what went in turn."""
        self._live_seen_s = self._live_expected_s = -math.inf
        self._shares = _Shares(clock)
        self._paces: weakref.WeakKeyDictionary[Avatar, dict[str, Pace]] = weakref.WeakKeyDictionary()

    def add(self, work: Work) -> None:
        work.stood_back = work.live and self._bulk_running > 0
        if work.live:
            now = self._clock()
            if now - self._live_seen_s < LIVE_LINGERS_S:
                self._live_expected_s = now + LIVE_LINGERS_S
            self._live_seen_s = now
        (self._live if work.live else self._bulk).add(work)

    def discard(self, work: Work) -> None:
        """Forget work, if it still waits."""
        (self._live if work.live else self._bulk).remove(work)

    def take(self) -> list[Work]:
        """The next batch, empty if nothing waits or may go.  Say `finished` when it is computed."""
        batch = self._next()
        if batch:
            batch[0].share_s = self._shares.change(+1)
        return batch

    def _next(self) -> list[Work]:
        bulk_may_go = not self._live or (
            self._live_in_a_row >= LIVE_IN_A_ROW and not any(work.stood_back for work in self._live)
        )
        if self._bulk and bulk_may_go and not self._last_place():
            self._live_in_a_row = 0
            self._bulk_running += 1
            for work in self._live:
                work.stood_back = True
            in_turn = self._ahead_s > 0
            batch = self._gather(self._bulk, in_turn=in_turn)
            # As long as nothing is known of an avatar, a batch of it counts as any other.
            seconds_per_frame = self.pace(batch[0].avatar, batch[0].lod).seconds_per_frame
            seconds = sum(map(len, batch)) * seconds_per_frame or self._batch_s
            self._ahead_s += -seconds if in_turn else seconds
            return batch
        self._live_in_a_row = self._live_in_a_row + bool(self._live) if self._bulk else 0
        return self._gather(self._live, in_turn=True)

    def _last_place(self) -> bool:
        """Whether bulk would take the place that is kept for live work."""
        return 0 < self._places - 1 <= self._bulk_running and self._clock() < self._live_expected_s

    def finished(self, batch: list[Work], *, went_well: bool) -> None:
        """`batch` is not computed any more; how long it took is to be learnt from if it went well."""
        self._bulk_running -= not batch[0].live
        seconds = self._shares.change(-1) - batch[0].share_s
        if went_well:
            self.pace(batch[0].avatar, batch[0].lod).learn(sum(map(len, batch)), seconds)

    def _gather(self, line: _Line, *, in_turn: bool) -> list[Work]:
        heads = line.heads()
        if not in_turn:
            heads.sort(key=self._seconds_left)
        batch: list[Work] = []
        frames = 0
        for work in heads:
            if batch and (work.avatar is not batch[0].avatar or work.lod != batch[0].lod):
                continue
            if batch and frames + len(work) > self.largest_batch(work.avatar, work.lod):
                continue
            batch.append(work)
            frames += len(work)
        for work in batch:
            line.serve(work, in_turn=in_turn)
        return batch

    def pace(self, avatar: Avatar, lod: str) -> Pace:
        """What is known of the speed of an avatar."""
        paces = self._paces.setdefault(avatar, {})
        if lod not in paces:
            paces[lod] = Pace(len(avatar.mesh(lod).vertices))
        return paces[lod]

    def _seconds_left(self, work: Work) -> float:
        """How long its client would take alone from here on."""
        # Frames of which nothing is known yet count as frames, so that infinitely many of them still do.
        return work.frames_left * (self.pace(work.avatar, work.lod).seconds_per_frame or 1.0)

    def largest_batch(self, avatar: Avatar, lod: str) -> int:
        """Frames within the budget and the time of a micro-batch; few as long as the speed is not known."""
        pace = self.pace(avatar, lod)
        within_time = int(self._batch_s / pace.seconds_per_frame) if pace.seconds_per_frame else 1
        worth_it = max(within_time, LEAST_VERTEX_FRAMES // pace.vertices)
        return max(1, min(self._budget // pace.vertices, worth_it, pace.most_frames))

    def live_seconds(self) -> float:
        """How long the live work that waits will take."""
        return sum(len(work) * self.pace(work.avatar, work.lod).seconds_per_frame for work in self._live)
