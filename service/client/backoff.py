"""How long to wait before the next try."""

import random
from collections.abc import Callable

from service.client.calls import Job
from service.client.errors import ConnectionLost

FIRST_S, LONGEST_S = 0.25, 8.0
LONGEST_RETRY_AFTER_S = 20.0
RETRIED = (429, 503)
"""Answers that say: later."""


class Backoff:
    """Tries, bounded in number; the waits double from 0.25 to 8 s, each times a random number from 0.5 to 1."""

    def __init__(self, retries: int, chance: Callable[[], float] = random.random) -> None:
        self._retries, self._chance = retries, chance
        self._tries = 0

    def wait_s(self, retry_after: str | None = None) -> float | None:
        """Seconds before the next try, at least what the service asked for; None when there is none left."""
        if self._tries >= self._retries:
            return None
        longest = min(LONGEST_S, FIRST_S * 2.0**self._tries)
        self._tries += 1
        # A date, which the header may also hold, is not sent by this service.
        asked = float(retry_after) if retry_after and retry_after.isdecimal() else 0.0
        if asked > LONGEST_RETRY_AFTER_S:
            return None
        return max(asked, longest * (0.5 + 0.5 * self._chance()))

    def succeeded(self) -> None:
        """Begin anew."""
        self._tries = 0


class Polls:
    """Looks at a job, with pauses that grow to 8 s.

    Five in a row may fail: while the service is started anew, the job is only delayed.
    """

    def __init__(self, progress: Callable[[int, int | None], None] | None) -> None:
        self._progress, self._pauses, self._misses = progress, Backoff(6), Backoff(5)

    def saw(self, job: Job) -> float | None:
        """Seconds before the next look; None where the job has ended."""
        self._misses.succeeded()
        if self._progress:
            self._progress(job.frames_done, job.frames)
        return None if job.ended else self._wait_s()

    def missed(self, error: ConnectionLost) -> float:
        """Seconds before the next look.  Raises `error` if there is none."""
        if self._misses.wait_s() is None:
            raise error
        return self._wait_s()

    def _wait_s(self) -> float:
        return self._pauses.wait_s() or LONGEST_S
