"""The sequences that are computed at a time: how long others keep one waiting, and who is refused for that."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.avatars import Avatar
from service.errors import Overloaded
from service.metrics import Metrics
from service.work_queue import WorkQueue

UNDER_OVERLOAD = 0.1
"""What remains under overload of the time that a sequence can be kept waiting.  With what it costs to refuse the rest,
and whatever else holds the machine up, it then takes less than twice as long as alone."""
OVERLOAD_S = 1.0
"""About so far back it is looked whether most were refused."""
MOST_TOGETHER = 4
"""All others may take so many times as long as a sequence may be kept waiting, until each has had as much as it."""
STALLED_S = 1.0
"""A sequence whose client has not come for more for so long is not in the way of others."""


@dataclass(eq=False)
class Sequence:
    """A bulk request on its way."""

    avatar: Avatar
    lod: str
    frames_left: int
    taken_s: float = math.inf
    """When it took the last batch out; infinite while it waits for one."""


class Sequences:
    """Those that are admitted, and whether there are too many.

    What ends sooner goes first (`work_queue.py`), so those that have less left than a sequence takes itself keep it
    waiting; the longer ones have half of the engine meanwhile at most, so a few of them do not shut it out.  A few may
    wait for each other.  If most have to be refused, that is an overload: nobody gains if all take long, so until it is
    over nearly nobody waits, and the rest are told at once to come back.
    """

    def __init__(self, queue: WorkQueue, queue_s: float, metrics: Metrics) -> None:
        """`queue_s`: so long everybody can be kept waiting, and as long as it takes itself."""
        self._queue, self._queue_s, self._metrics = queue, queue_s, metrics
        self._admitted: set[Sequence] = set()
        self._lately_refused = self._lately_admitted = 0.0
        self._counted_s = -math.inf

    def __len__(self) -> int:
        return len(self._admitted)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._admitted)

    @contextmanager
    def admitted(self, avatar: Avatar, lod: str, frames: int) -> Iterator[Sequence]:
        """Admit a sequence, until it ends.

        Raises:
            Overloaded: as `check`.
        """
        self.check(avatar, lod, frames)
        self._count(refused=False)
        sequence = Sequence(avatar, lod, frames)
        self._admitted.add(sequence)
        try:
            yield sequence
        finally:
            self._admitted.discard(sequence)

    def check(self, avatar: Avatar, lod: str, frames: int) -> None:
        """Whether a sequence would be admitted now.

        Raises:
            Overloaded: others would keep it waiting for too long.
        """
        own_s = self._seconds(avatar, lod, frames)
        left = [self._left(other) for other in self._admitted]
        sooner_s = sum(left_s for left_s in left if left_s <= own_s)
        together_s = sum(min(left_s, own_s) for left_s in left)
        bearable_s = max(own_s, self._queue_s)
        if sooner_s > bearable_s * (UNDER_OVERLOAD if self._overloaded() else 1) or (
            together_s > bearable_s * MOST_TOGETHER
        ):
            self._count(refused=True)
            self._metrics.refused("overloaded")
            raise Overloaded(f"others would keep it waiting for {together_s:.2g} s", retry_after_s=together_s)

    def _overloaded(self) -> bool:
        self._fade()
        return self._lately_refused > self._lately_admitted + 1

    def _count(self, *, refused: bool) -> None:
        self._fade()
        self._lately_refused += refused
        self._lately_admitted += not refused

    def _fade(self) -> None:
        now = time.monotonic()
        kept = math.exp((self._counted_s - now) / OVERLOAD_S)
        self._lately_refused, self._lately_admitted = kept * self._lately_refused, kept * self._lately_admitted
        self._counted_s = now

    def _left(self, sequence: Sequence) -> float:
        """Seconds of the engine that it will still take soon."""
        stalled = time.monotonic() - sequence.taken_s >= STALLED_S
        return 0.0 if stalled else self._seconds(sequence.avatar, sequence.lod, sequence.frames_left)

    def _seconds(self, avatar: Avatar, lod: str, frames: int) -> float:
        return frames * self._queue.pace(avatar, lod).seconds_per_frame
