"""Finished answers in the process and in a real Redis, which is stopped, filled, wiped and killed on the way."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from redis.exceptions import ResponseError

from service.answers import FRAMES
from service.cache import AnswerCache, SharedCache
from service.redis_link import RedisDown, RedisLink

pytestmark = pytest.mark.anyio
PATIENT_S = 5.0
"""On a busy machine 50 ms are nothing; the tests of what is right must not depend on it."""


@asynccontextmanager
async def linked(url: str, timeout_s: float = PATIENT_S, retry_s: float = 60.0) -> AsyncIterator[RedisLink]:
    link = RedisLink(url, timeout_s, retry_s)
    yield link
    await link.aclose()


async def test_cache_drops_what_was_not_used_for_longest() -> None:
    cache = AnswerCache(max_bytes=100, max_entry_bytes=60)
    await cache.put("large", (bytes(61),))
    assert await cache.get("large") is None
    await cache.put("a", (bytes(40),))
    await cache.put("b", (bytes(40),))
    assert await cache.get("a") is not None
    await cache.put("c", (bytes(40),))
    assert (await cache.get("b"), len(cache)) == (None, 2)
    await cache.put("a", (bytes(60),))
    assert await cache.get("c") is not None
    await cache.put("d", (bytes(1),))
    assert (await cache.get("a"), len(cache)) == (None, 2)


async def test_what_one_replica_made_another_has(redis_server: Any) -> None:
    async with linked(redis_server.url) as one, linked(redis_server.url) as two:
        first, second = (AnswerCache(1 << 20, 1 << 20, SharedCache(link)) for link in (one, two))
        for answer in (b"", b"x", np.random.default_rng(0).bytes(900_000)):
            await first.put("av:k", (answer[:7], b"", answer[7:]))
            assert await second.get("av:k") == (answer,)
            second._entries.clear()
        long = bytes(range(256)) * 16_000  # more than one piece of reading
        shared = SharedCache(one)
        await shared.put("av:long", (long,))
        assert await SharedCache(two).get("av:long") == long
        await shared.put("av:huge", (bytes(SharedCache.MAX_BYTES + 1),))
        assert await shared.get("av:huge") is None
        assert 0 < await one.call("TTL", "av:k") <= 1.1 * SharedCache.TTL_S


@pytest.mark.parametrize("harm", ["version", "length", "cut", "bit", "short", "longer"])
async def test_a_damaged_value_is_a_miss_and_deleted(redis_server: Any, harm: str) -> None:
    async with linked(redis_server.url) as link:
        shared = SharedCache(link)
        await shared.put("av:k", (b"the answer",))
        value = bytearray(await link.call("GET", "av:k"))
        if harm == "version":
            value[0] = 2
        elif harm == "length":
            value[8] = 0xFF
        elif harm == "bit":
            value[-1] ^= 1
        spoilt = {"cut": bytes(value[:-1]), "short": b"\x01", "longer": bytes(value) + b"!"}.get(harm, bytes(value))
        await link.call("SET", "av:k", spoilt)
        assert await shared.get("av:k") is None
        assert await link.call("EXISTS", "av:k") == 0


async def test_fault_29_a_key_of_another_type_is_a_miss_and_deleted(redis_server: Any) -> None:
    async with linked(redis_server.url) as link:
        shared = SharedCache(link)
        await link.call("LPUSH", "av:k", "1")
        assert await shared.get("av:k") is None
        assert link.up
        await shared.put("av:k", (b"answer",))
        assert await shared.get("av:k") == b"answer"


async def test_fault_29_a_full_redis_keeps_nothing_and_is_not_down(redis_server: Any) -> None:
    async with linked(redis_server.url) as link:
        shared = SharedCache(link)
        await link.call("CONFIG", "SET", "maxmemory", "1mb")
        for _ in range(2 * 3):
            await shared.put("av:k", (bytes(2 << 20),))
            assert await shared.get("av:k") is None
        assert link.up
        async with shared.turn("av:k") as answer:  # the lock cannot be written either
            assert answer is None


async def test_fault_29_wiped_while_in_use(redis_server: Any) -> None:
    async with linked(redis_server.url) as link:
        shared = SharedCache(link)

        async def use(n: int) -> None:
            for _ in range(20):
                await shared.put(f"av:{n}", (bytes([n]) * 1000,))
                assert await shared.get(f"av:{n}") in (None, bytes([n]) * 1000)

        async def wipe() -> None:
            for _ in range(10):
                await link.call("FLUSHALL")

        await asyncio.gather(wipe(), *(use(n) for n in range(5)))
        assert link.up


async def test_fault_29_a_redis_that_hangs_is_tried_once(redis_server: Any) -> None:
    async with linked(redis_server.url, timeout_s=0.05) as link:
        redis_server.process.send_signal(signal.SIGSTOP)
        shared = SharedCache(link)
        for _ in range(10):
            assert await shared.get("av:k") is None
            await shared.put("av:k", (b"answer",))
            async with shared.turn("av:k") as answer:
                assert answer is None
        assert (link.attempts, link.up) == (1, False)


async def test_fault_29_a_redis_that_is_slow_is_left_alone_until_it_is_not(
    redis_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with linked(redis_server.url, timeout_s=1.0, retry_s=0.05) as link:
        execute, delay_s = link._redis.execute_command, 0.6

        async def slowly(*command: Any) -> Any:
            await asyncio.sleep(delay_s)
            return await execute(*command)

        monkeypatch.setattr(link._redis, "execute_command", slowly)
        # Where more time is given, nobody waits for it.
        for _ in range(4):
            assert await link.call("PING", timeout_s=5.0)
        assert link.up
        # What held up one may have held up those beside it too.
        assert await asyncio.gather(*(link.call("PING") for _ in range(5)))
        for _ in range(2):
            assert link.up
            assert await link.call("PING")  # an answer is an answer
        assert not link.up
        await asyncio.sleep(1.0)
        assert not link.up  # it answers, but no sooner
        delay_s = 0.0
        async with asyncio.timeout(20):
            while not link.up:
                await asyncio.sleep(0.02)


async def test_fault_29_a_redis_that_is_gone_is_tried_three_times(redis_server: Any) -> None:
    async with linked(redis_server.url) as link:
        shared = SharedCache(link)
        await shared.put("av:k", (b"answer",))
        redis_server.process.kill()
        redis_server.process.wait()
        attempts = link.attempts
        for _ in range(10):
            assert await shared.get("av:k") is None
        assert link.attempts - attempts == 3
        with pytest.raises(RedisDown):
            await link.call("PING")


async def test_fault_29_a_redis_that_comes_back_is_used_again(redis_server: Any) -> None:
    async with linked(redis_server.url, retry_s=0.05) as link:
        shared = SharedCache(link)
        redis_server.process.kill()
        redis_server.process.wait()
        for _ in range(3):
            await shared.get("av:k")
        assert not link.up
        redis_server.start()
        async with asyncio.timeout(20):
            while not link.up:
                await asyncio.sleep(0.02)
        await shared.put("av:k", (b"answer",))
        assert await shared.get("av:k") == b"answer"


async def test_an_error_of_redis_is_not_redis_being_down(redis_server: Any) -> None:
    async with linked(redis_server.url) as link:
        for _ in range(5):
            with pytest.raises(ResponseError):
                await link.call("NOSUCHCOMMAND")
        assert link.up


async def test_a_call_that_was_called_off_does_not_spoil_the_next(redis_server: Any) -> None:
    async with linked(redis_server.url) as link:
        shared = SharedCache(link)
        for n in range(20):
            await shared.put(f"av:{n}", (str(n).encode(),))
        for n in range(20):
            task = asyncio.create_task(shared.get(f"av:{n}"))
            for _ in range(n % 5):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert await shared.get(f"av:{(n + 7) % 20}") == str((n + 7) % 20).encode()


async def test_two_replicas_make_an_answer_once(redis_server: Any) -> None:
    async with linked(redis_server.url) as one, linked(redis_server.url) as two:
        caches = [AnswerCache(1 << 20, 1 << 20, SharedCache(link)) for link in (one, two)]
        made = 0

        async def make(cache: AnswerCache) -> bytes:
            nonlocal made
            async with cache.turn("av:k") as answer:
                if answer is None:
                    made += 1
                    await asyncio.sleep(0.2)
                    answer = b"answer"
                    await cache.put("av:k", (answer,))
            return answer

        assert await asyncio.gather(*map(make, caches)) == [b"answer"] * 2
        assert made == 1
        assert await one.call("EXISTS", "av:k:lock") == 0


async def test_a_replica_that_was_killed_keeps_no_one_waiting_for_long(
    redis_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SharedCache, "WAIT_S", 0.2)
    async with linked(redis_server.url) as link:
        await link.call("SET", "av:k:lock", "another's", "PX", SharedCache.LOCK_MS)
        async with SharedCache(link).turn("av:k") as answer:
            assert answer is None
        assert await link.call("GET", "av:k:lock") == b"another's"


async def post(client: Any, poses: Any) -> Any:
    answer = await client.post("/avatars/tiny/repose", json={"poses": poses}, headers={"Accept": FRAMES})
    assert answer.status_code == 200
    return answer


async def test_fault_29_answers_come_with_and_without_redis(serve: Any, engine: Any, redis_server: Any) -> None:
    poses = [[0.1] * 72] * 3
    settings = {"redis_url": redis_server.url, "redis_timeout_ms": 1000 * PATIENT_S, "cache_entry_bytes": 1 << 20}
    async with serve(make_engine=lambda _: engine, **settings) as one, serve(**settings) as two:
        assert (await post(one, poses)).headers["x-cache"] == "miss"
        assert (await post(two, poses)).headers["x-cache"] == "hit"  # as another replica made it
        redis_server.process.kill()
        redis_server.process.wait()
        for n in range(4):
            other = [[0.1 * n] * 72] * 2
            assert (await post(one, other)).headers["x-cache"] == "miss"
            assert (await post(one, other)).headers["x-cache"] == "hit"
        assert (await one.get("/readyz")).status_code == 200
