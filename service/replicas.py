"""Replicas that share a folder of avatars tell each other over Redis when one of them has changed an avatar.

Nothing waits for Redis: what could not be said is said when it is back, and what could not be heard is found by
comparing what is in memory with what is on the disk.
"""

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from anyio import to_thread
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from service.avatars import AvatarStore
from service.bundle.manifest import is_avatar_id
from service.errors import AvatarServiceError
from service.uploads import digest_of

log = logging.getLogger(__name__)
CHANNEL = "reposer:avatars"
RETRY_S = 1.0


class Replicas:
    """This process among the others; alone where there is no Redis."""

    def __init__(self, store: AvatarStore, redis_url: str | None) -> None:
        self._store, self._url, self._name = store, redis_url, uuid.uuid4().hex
        self._changed: asyncio.Queue[str] = asyncio.Queue()

    async def announce(self, avatar_id: str) -> None:
        """Say that an avatar was changed or deleted here; returns at once."""
        if self._url is not None:
            self._changed.put_nowait(avatar_id)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Listen and speak meanwhile."""
        if self._url is None:
            yield
            return
        # redis-py would try ten times for a minute before it says that Redis is gone; the loops here try on.
        redis = Redis.from_url(
            self._url, socket_connect_timeout=RETRY_S, socket_keepalive=True, retry=Retry(NoBackoff(), 0)
        )
        tasks = [asyncio.create_task(self._listen(redis)), asyncio.create_task(self._speak(redis))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task
            await redis.aclose()

    async def _speak(self, redis: Redis) -> None:
        while True:
            avatar_id = await self._changed.get()
            message = json.dumps({"avatar": avatar_id, "from": self._name})
            while True:
                try:
                    await asyncio.wait_for(redis.publish(CHANNEL, message), RETRY_S)
                    break
                except (RedisError, OSError) as error:
                    log.warning("the other replicas do not know yet that %s has changed: %s", avatar_id, error)
                    await asyncio.sleep(RETRY_S)

    async def _listen(self, redis: Redis) -> None:
        while True:
            try:
                async with redis.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(CHANNEL)
                    await self._catch_up()
                    async for message in channel.listen():
                        await self._hear(message["data"])
            except (RedisError, OSError) as error:
                log.warning("changes of other replicas are not heard: %s", error)
            await asyncio.sleep(RETRY_S)

    async def _hear(self, data: bytes) -> None:
        try:
            message = json.loads(data)
            avatar_id, sender = message["avatar"], message["from"]
        except (ValueError, TypeError, KeyError):
            log.warning("a message on %s is not ours", CHANNEL)
            return
        if sender != self._name and isinstance(avatar_id, str) and is_avatar_id(avatar_id):
            await self._refresh(avatar_id)

    async def _catch_up(self) -> None:
        for avatar in self._store.loaded():
            digest = await to_thread.run_sync(digest_of, self._store.bundle_dir / avatar.id)
            if digest != avatar.bundle.digest:
                await self._refresh(avatar.id)

    async def _refresh(self, avatar_id: str) -> None:
        if not (self._store.bundle_dir / avatar_id).is_dir():
            self._store.forget(avatar_id)
            return
        try:
            await self._store.reload(avatar_id)
        except AvatarServiceError as error:
            log.error("avatar %s stays as it was: %s", avatar_id, error, exc_info=error.__cause__)
