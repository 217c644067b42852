"""The sequences that are computed at a time: how long they keep each other waiting, and who is refused for that."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.avatars import Avatar
from service.errors import Overloaded
from service.metrics import Metrics
from service.work_queue import WorkQueue

MOST_DELAY = 0.1
"""Others keep a sequence waiting for at most this part of its own time: with what it costs to refuse the rest, and
whatever else holds the machine up, it then takes less than twice as long as alone.  With 0.25 no more get in."""
STALLED_S = 1.0
"""A sequence whose client has not come for more for so long is not in the way of others."""


@dataclass(eq=False)
class Sequence:
    """A bulk request on its way."""

    avatar: Avatar
    lod: str
    frames_left: int
    own_s: float
    """How long it takes alone."""
    delay_s: float
    """How long the others keep it waiting, those that came later too."""
    left_s: float = math.inf
    """When it took the last batch out; infinite while it waits for one."""


class Sequences:
    """Those that are admitted."""

    def __init__(self, queue: WorkQueue, queue_s: float, metrics: Metrics) -> None:
        """`queue_s`: so long everybody can be kept waiting."""
        self._queue, self._queue_s, self._metrics = queue, queue_s, metrics
        self._admitted: set[Sequence] = set()

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
        own_s, delays = self._delays(avatar, lod, frames)
        for other, delay_s in delays.items():
            other.delay_s += delay_s
        sequence = Sequence(avatar, lod, frames, own_s, sum(delays.values()))
        self._admitted.add(sequence)
        try:
            yield sequence
        finally:
            self._admitted.discard(sequence)

    def check(self, avatar: Avatar, lod: str, frames: int) -> None:
        """Whether a sequence would be admitted now.

        Raises:
            Overloaded: others would keep it waiting for too long, or it those that are about to finish.
        """
        own_s, delays = self._delays(avatar, lod, frames)
        delay_s = sum(delays.values())
        # Those that have more left than it takes hardly notice it, so a long one does not shut out the short ones.
        harmful = any(
            delay < own_s and other.delay_s + delay > self._bearable(other.own_s) for other, delay in delays.items()
        )
        if harmful or delay_s > self._bearable(own_s):
            self._metrics.refused("overloaded")
            raise Overloaded(f"others would keep it waiting for {delay_s:.1f} s", retry_after_s=delay_s)

    def _bearable(self, own_s: float) -> float:
        return max(MOST_DELAY * own_s, self._queue_s)

    def _delays(self, avatar: Avatar, lod: str, frames: int) -> tuple[float, dict[Sequence, float]]:
        """How long a sequence takes alone, and by how much it and each other one would keep each other waiting: they
        take turns, so by what the other has left, but not by more than this one takes itself."""
        own_s, now = frames * self._queue.pace(avatar, lod).seconds_per_frame, time.monotonic()
        delays = {}
        for other in self._admitted:
            if now - other.left_s < STALLED_S:
                left_s = other.frames_left * self._queue.pace(other.avatar, other.lod).seconds_per_frame
                delays[other] = min(left_s, own_s)
        return own_s, delays
