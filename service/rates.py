"""How often a key may ask: token buckets, one for each key, in this process and, with Redis, over all replicas."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from redis.exceptions import ResponseError

from service.redis_link import RedisDown, RedisLink

MAX_BUCKETS = 10_000
# One time for each key: when its bucket is full again.  By the clock of Redis, as those of the replicas differ.
_TAKE = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1e6
local cost, room = 1 / ARGV[1], ARGV[2] / ARGV[1]
local full_at = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now) + cost
local wait = full_at - now - room
if wait > 1e-5 then return tostring(wait) end
redis.call('SET', KEYS[1], string.format('%.6f', full_at), 'PX', math.ceil((full_at - now) * 1000) + 1000)
return '0'
"""


@dataclass(frozen=True)
class Allowance:
    """What a bucket said."""

    wait_s: float
    """0 where the request may go on, else when the next one may come."""
    remaining: int
    full_s: float
    """Until the bucket is full again."""


class TokenBucket:
    """Fills with `per_s` tokens a second up to `burst`; each request takes one."""

    def __init__(self, per_s: float, burst: int, now_s: float) -> None:
        self._per_s, self._burst, self._level, self._seen_s = per_s, burst, float(burst), now_s

    def take(self, now_s: float) -> Allowance:
        """Take a token where there is one.  `now_s`: a monotonic clock."""
        self._level = min(self._burst, self._level + max(0.0, now_s - self._seen_s) * self._per_s)
        self._seen_s = now_s
        wait_s = 0.0 if self._level >= 1 else (1 - self._level) / self._per_s
        if not wait_s:
            self._level -= 1
        return Allowance(wait_s, math.floor(self._level), (self._burst - self._level) / self._per_s)


class RateLimiter:
    """One bucket for each name, those of the callers seen last; no limit where `per_s` is 0."""

    def __init__(
        self, per_s: float, burst: int, redis: RedisLink | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.per_s, self.burst, self._redis, self._clock = per_s, burst, redis, clock
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def take(self, name: str) -> Allowance | None:
        """Take a token of `name`; None where there is no limit."""
        if not self.per_s:
            return None
        now_s = self._clock()
        bucket = self._buckets.pop(name, None) or TokenBucket(self.per_s, self.burst, now_s)
        self._buckets[name] = bucket
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
        return bucket.take(now_s)

    async def take_everywhere(self, name: str) -> Allowance | None:
        """As `take`, and where that lets the caller in, from the bucket that all replicas share."""
        allowance = self.take(name)
        if self._redis is None or allowance is None or allowance.wait_s:
            return allowance
        try:
            wait_s = float(await self._redis.call("EVAL", _TAKE, 1, f"rate:{name}", self.per_s, self.burst))
        except (RedisDown, ResponseError):
            return allowance  # better too many than none
        return replace(allowance, wait_s=wait_s, remaining=0) if wait_s else allowance

    def headers(self, allowance: Allowance) -> dict[str, str]:
        """The RateLimit fields of an answer, and Retry-After for one that is refused."""
        window_s = math.ceil(self.burst / self.per_s)
        headers = {
            "RateLimit-Policy": f'"key";q={self.burst};w={window_s}',
            "RateLimit": f'"key";r={allowance.remaining};t={math.ceil(allowance.full_s)}',
        }
        return headers | ({"Retry-After": str(math.ceil(allowance.wait_s))} if allowance.wait_s else {})
