"""How long to wait before the next try."""

import random
from collections.abc import Callable

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
    """Looks at something that takes long, with pauses that grow to 8 s.

    So many in a row may fail: while the service is started anew, a job is only delayed.
    """

    def __init__(self, may_fail: int = 5) -> None:
        self._pauses, self._may_fail, self._failed = Backoff(6), may_fail, 0

    def saw(self) -> None:
        """It could be seen."""
        self._failed = 0

    def gives_up(self) -> bool:
        """It could not be seen; whether that was once too often."""
        self._failed += 1
        return self._failed > self._may_fail

    def wait_s(self) -> float:
        """Seconds before the next look."""
        return self._pauses.wait_s() or LONGEST_S
