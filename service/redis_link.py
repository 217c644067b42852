"""Redis, as something that may be gone: a call takes 50 ms at most, and while Redis is down it takes none.

redis-py by itself tries for 4 to 59 seconds before it gives up (redis/redis-py#4082).  Here a call is tried once.  One
that timed out, or three in a row that failed or took more than half of that time, open a breaker: from then on calls
fail at once, and a task in the background looks every few seconds whether Redis is back.
"""

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

log = logging.getLogger(__name__)
FAILURES_TO_OPEN = 3
SLOW = 0.5
"""Of the time that a call may take: a Redis that needs so long each time costs more than it gains."""
RETRY_S = 5.0
CONNECTIONS = 64


class RedisDown(Exception):  # noqa: N818 - what went wrong is the name
    """Redis did not answer, or is known not to."""


class RedisLink:
    """One Redis for the event loop's thread."""

    def __init__(self, url: str, timeout_s: float = 0.05, retry_s: float = RETRY_S) -> None:
        self._timeout_s, self._retry_s = timeout_s, retry_s
        pool = BlockingConnectionPool.from_url(
            url, max_connections=CONNECTIONS, timeout=timeout_s, socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0), retry_on_timeout=False,
        )  # fmt: skip
        self._redis = Redis(connection_pool=pool)
        self._failures = 0
        self._slow_s = 0.0
        """When the last slow call that counts was over."""
        self._recovery: asyncio.Task[None] | None = None
        self.attempts = 0
        """Calls that reached for the network."""

    @property
    def up(self) -> bool:
        """Whether calls are tried."""
        return self._recovery is None

    async def call(self, *command: Any, timeout_s: float | None = None) -> Any:
        """One command.

        Raises:
            RedisDown: no answer in time, or none expected.
            ResponseError: Redis answered with an error; it is up.
        """
        if not self.up:
            raise RedisDown("Redis is down")
        self.attempts += 1
        began = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s or self._timeout_s):
                answer = await self._redis.execute_command(*command)
        except ResponseError:
            self._failures = 0
            raise
        except (RedisError, OSError) as error:
            self._failed(f"{type(error).__name__} {error}", FAILURES_TO_OPEN if isinstance(error, TimeoutError) else 1)
            raise RedisDown("Redis does not answer") from error
        ended = time.monotonic()
        # What may take longer is waited for by nobody.
        if timeout_s is not None or ended - began <= SLOW * self._timeout_s:
            self._failures = 0
        elif began >= self._slow_s:  # else whatever held up another one may have held up this one too
            self._slow_s = ended
            self._failed("slow")
        return answer

    def _failed(self, why: str, failures: int = 1) -> None:
        self._failures += failures
        if self._failures >= FAILURES_TO_OPEN and self._recovery is None:
            log.warning("going on without Redis: %s", why)
            self._recovery = asyncio.create_task(self._recover())

    async def _recover(self) -> None:
        while True:
            await asyncio.sleep(self._retry_s)
            self.attempts += 1
            with suppress(RedisError, OSError):
                async with asyncio.timeout(SLOW * self._timeout_s):
                    await self._redis.execute_command("PING")
                log.info("Redis is back")
                self._failures, self._recovery = 0, None
                return

    async def aclose(self) -> None:
        """Close all connections."""
        if self._recovery is not None:
            self._recovery.cancel()
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()
