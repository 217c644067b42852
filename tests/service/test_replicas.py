"""Replicas that share a folder and a Redis: a change in one is seen by all, and so is how often a key has asked."""

import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from redis.asyncio import Redis

from service import replicas as replicas_module
from service.avatars import AvatarStore
from service.bundle.files import read_bundle, write_bundle
from service.rates import RateLimiter
from service.redis_link import RedisLink
from service.replicas import CHANNEL, Replicas

pytestmark = pytest.mark.anyio


@pytest.fixture
def folder(bundle_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(bundle_dir / "tiny", tmp_path / "avatars" / "tiny")
    return tmp_path / "avatars"


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        await client.flushall()
        yield client


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    with anyio.fail_after(30):
        while not await true():
            await anyio.sleep(0.02)


@asynccontextmanager
async def replica(folder: Path, engine: Any, url: str) -> AsyncIterator[tuple[AvatarStore, Replicas]]:
    """A replica that has `tiny` in memory."""
    store = AvatarStore(folder, lambda _: engine)
    async with store.lease("tiny"):
        pass
    replicas = Replicas(store, url)
    async with replicas.connected():
        yield store, replicas


def digests(store: AvatarStore) -> list[str]:
    return [avatar.bundle.digest for avatar in store.loaded()]


def change(folder: Path, bundle_parts: Any, iou: float) -> str:
    write_bundle(folder / "tiny", avatar_id="tiny", **bundle_parts | {"metrics": {"iou": iou}})
    return read_bundle(folder / "tiny").digest


async def listeners(redis: Redis, count: int) -> bool:
    return dict(await redis.pubsub_numsub(CHANNEL))[CHANNEL.encode()] == count


async def test_a_change_reaches_the_others(
    folder: Path, engine: Any, redis: Redis, redis_url: str, bundle_parts: Any
) -> None:
    async with replica(folder, engine, redis_url) as (_, one), replica(folder, engine, redis_url) as (other, _):
        await until(lambda: listeners(redis, 2))
        new = change(folder, bundle_parts, 0.9)
        await one.announce("tiny")
        await until(is_true(lambda: digests(other) == [new]))
        shutil.rmtree(folder / "tiny")
        await one.announce("tiny")
        await until(is_true(lambda: not digests(other)))


def is_true(condition: Callable[[], bool]) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return condition()

    return check


async def test_nonsense_on_the_channel_harms_nobody(
    folder: Path, engine: Any, redis: Redis, redis_url: str, bundle_parts: Any
) -> None:
    async with replica(folder, engine, redis_url) as (store, _):
        await until(lambda: listeners(redis, 1))
        for data in (b"", b"\xff", b"[]", b"7", b'{"avatar": 7, "from": "x"}', b'{"avatar": "../tiny", "from": "x"}'):
            await redis.publish(CHANNEL, data)
        before = digests(store)
        (folder / "tiny" / "repose.onnx").write_bytes(b"damaged")
        await redis.publish(CHANNEL, json.dumps({"avatar": "tiny", "from": "x"}))
        new = change(folder, bundle_parts, 0.9)
        assert digests(store) == before
        await redis.publish(CHANNEL, json.dumps({"avatar": "tiny", "from": "x"}))
        await until(is_true(lambda: digests(store) == [new]))


async def test_what_was_not_heard_is_found(
    folder: Path, engine: Any, redis: Redis, redis_url: str, bundle_parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas_module, "RETRY_S", 0.2)
    async with replica(folder, engine, redis_url) as (store, _):
        await until(lambda: listeners(redis, 1))
        new = change(folder, bundle_parts, 0.9)
        # The connection breaks, as when Redis is restarted.
        await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        await until(is_true(lambda: digests(store) == [new]))


async def test_what_could_not_be_said_is_said_later(
    folder: Path, engine: Any, redis: Redis, redis_url: str, bundle_parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas_module, "RETRY_S", 0.2)
    async with replica(folder, engine, redis_url) as (_, one), replica(folder, engine, redis_url) as (other, _):
        await until(lambda: listeners(redis, 2))
        new = change(folder, bundle_parts, 0.9)
        await redis.execute_command("CLIENT", "PAUSE", "1000")
        with anyio.fail_after(0.5):
            await one.announce("tiny")
        await until(is_true(lambda: digests(other) == [new]))


async def test_a_dead_redis_hinders_nobody(folder: Path, engine: Any) -> None:
    async with replica(folder, engine, "redis://127.0.0.1:1/0") as (store, one):
        await one.announce("tiny")
        await anyio.sleep(0.05)
        assert len(store.loaded()) == 1


async def test_replicas_share_a_bucket(redis: Redis, redis_url: str) -> None:
    links = [RedisLink(redis_url, 5.0) for _ in range(2)]
    limiters = [RateLimiter(0.01, 5, link) for link in links]
    taken = [await limiters[n % 2].take_everywhere("a") for n in range(8)]
    assert [allowance is not None and allowance.wait_s == 0 for allowance in taken] == [True] * 5 + [False] * 3
    refused = taken[-1]
    assert refused is not None
    assert 90 < refused.wait_s <= 100
    other = await limiters[0].take_everywhere("b")
    assert other is not None
    assert other.wait_s == 0
    for link in links:
        await link.aclose()


async def test_a_shared_bucket_fills_again(redis: Redis, redis_url: str) -> None:
    link = RedisLink(redis_url, 5.0)
    limiters = [RateLimiter(20.0, 1, link) for _ in range(2)]
    first, second = [await limiter.take_everywhere("a") for limiter in limiters]
    assert first is not None
    assert second is not None
    assert first.wait_s == 0
    await anyio.sleep(max(second.wait_s, 0) + 0.06)
    third = await RateLimiter(20.0, 1, link).take_everywhere("a")
    assert third is not None
    assert third.wait_s == 0
    await link.aclose()


@pytest.mark.parametrize("fault", ["gone", "wrong type"])
async def test_without_redis_the_local_bucket_decides(redis: Redis, redis_url: str, fault: str) -> None:
    await redis.lpush("rate:a", "not a time")
    link = RedisLink(redis_url if fault == "wrong type" else "redis://127.0.0.1:1/0", 5.0)
    limiter = RateLimiter(0.01, 2, link)
    allowances = [await limiter.take_everywhere("a") for _ in range(3)]
    assert [allowance is not None and allowance.wait_s == 0 for allowance in allowances] == [True, True, False]
    await link.aclose()
