"""Finished answers: those of this process, and, with Redis, those of all replicas.

A key is made of what an answer depends on, so nothing is ever invalidated: a new bundle has new keys.
"""

import asyncio
import hashlib
import logging
import random
import struct
import uuid
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import numpy as np
from anyio import CancelScope, to_thread
from redis.exceptions import ResponseError

from service.poses import PoseSequence
from service.redis_link import RedisDown, RedisLink

log = logging.getLogger(__name__)
SCHEMA = 1
"""Part of every key: a release that gives other answers counts it up."""
POSE_STEP = 1e-6
"""Rotations and translations, in metres, count as equal when they are so to this step."""


def answer_key(bundle_digest: str, lod: str, media_type: str, poses: PoseSequence) -> str:
    """Equal keys have equal answers: the poses count as they were understood, not as they were written."""
    digest = hashlib.sha256(f"{lod} {media_type} {poses.fps!r} {len(poses)} ".encode())
    for array in (poses.rotations, poses.translation):
        steps = np.divide(array, POSE_STEP, dtype=np.float64)
        digest.update(np.rint(steps, out=steps).astype("<i8").tobytes())
    kind = media_type.replace(":", "_")
    return f"av:{SCHEMA}:{bundle_digest}:{kind}:{digest.hexdigest()}"


Pieces = tuple[bytes | memoryview, ...]
"""An answer in blocks of bytes."""


class AnswerCache:
    """Least recently used answers up to a number of bytes, in front of those of all replicas."""

    def __init__(self, max_bytes: int, max_entry_bytes: int, shared: "SharedCache | None" = None) -> None:
        self.max_bytes, self.max_entry_bytes = max_bytes, min(max_entry_bytes, max_bytes)
        self._entries: OrderedDict[str, Pieces] = OrderedDict()
        self._bytes = 0
        self._shared = shared

    def __len__(self) -> int:
        return len(self._entries)

    def at_hand(self, key: str) -> Pieces | None:
        """The answer of `key`, now the most recently used one, if this process has it."""
        answer = self._entries.get(key)
        if answer is not None:
            self._entries.move_to_end(key)
        return answer

    async def get(self, key: str) -> Pieces | None:
        """The answer of `key`, from wherever it is."""
        answer = self.at_hand(key)
        if answer is None and self._shared is not None:
            whole = await self._shared.get(key)
            if whole is not None:
                answer = (whole,)
                self._keep(key, answer)
        return answer

    async def put(self, key: str, answer: Pieces) -> None:
        """Keep a whole answer, unless it is too long."""
        self._keep(key, answer)
        if self._shared is not None:
            await self._shared.put(key, answer)

    @asynccontextmanager
    async def turn(self, key: str) -> AsyncIterator[bytes | None]:
        """Meanwhile no other replica makes the answer of `key`; the answer, if one has just made it."""
        if self._shared is None:
            yield None
            return
        async with self._shared.turn(key) as answer:
            yield answer

    def _keep(self, key: str, answer: Pieces) -> None:
        if byte_count(answer) > self.max_entry_bytes:
            return
        self._bytes += byte_count(answer) - byte_count(self._entries.pop(key, ()))
        self._entries[key] = answer
        while self._bytes > self.max_bytes:
            self._bytes -= byte_count(self._entries.popitem(last=False)[1])


def byte_count(answer: Sequence[bytes | memoryview]) -> int:
    """All pieces together."""
    return sum(map(len, answer))


class SharedCache:
    """Answers in Redis.  Whatever is wrong with Redis or with a value is a miss; nothing is raised.

    A value is a version byte, the length (u64) and the CRC-32 (u32) of the answer, little-endian, then the answer.
    """

    VERSION = 1
    MAX_BYTES = 8 << 20
    CHUNK_BYTES = 1 << 20
    """Read at once, so that a large answer does not look like a Redis that hangs."""
    PUT_TIMEOUT_S = 1.0
    """Nobody waits for it: the answer has left by then."""
    TTL_S = 3600
    LOCK_MS = 10_000
    POLL_S = 0.05
    WAIT_S = 2.0
    """So long one replica waits for another to make an answer, before it makes it itself."""
    _HEADER = struct.Struct("<BQI")
    _RELEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0"

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def get(self, key: str) -> bytes | None:
        """The answer, if it is there and whole; a damaged value is deleted."""
        try:
            value = await self._link.call("GETRANGE", key, 0, self.CHUNK_BYTES - 1)
            if not value:
                return None
            length = self._length(value)
            while value and len(value) < length:
                more = await self._link.call("GETRANGE", key, len(value), len(value) + self.CHUNK_BYTES - 1)
                value = value + more if more else b""
            answer = await to_thread.run_sync(self._answer, value)
            if answer is None:
                await self._link.call("DEL", key)
            return answer
        except ResponseError:  # another kind of value under our key
            with suppress(RedisDown, ResponseError):
                await self._link.call("DEL", key)
        except RedisDown:
            pass
        return None

    async def put(self, key: str, answer: Pieces) -> None:
        """Keep an answer for an hour, if it is not too long and there is room."""
        if byte_count(answer) > self.MAX_BYTES:
            return
        value = await to_thread.run_sync(self._value, answer)
        # Not all that was put at the same time shall end at the same time.
        seconds = self.TTL_S + random.randrange(self.TTL_S // 10)
        try:
            await self._link.call("SET", key, value, "EX", seconds, timeout_s=self.PUT_TIMEOUT_S)
        except ResponseError as error:
            log.warning("Redis does not take an answer of %d bytes: %s", byte_count(answer), error)
        except RedisDown:
            pass

    @asynccontextmanager
    async def turn(self, key: str) -> AsyncIterator[bytes | None]:
        """As `AnswerCache.turn`; gives up waiting after two seconds."""
        lock, token = f"{key}:lock", uuid.uuid4().hex
        answer, mine = None, False
        with suppress(RedisDown, ResponseError):
            for _ in range(int(self.WAIT_S / self.POLL_S)):
                mine = bool(await self._link.call("SET", lock, token, "NX", "PX", self.LOCK_MS))
                if mine:
                    break
                await asyncio.sleep(self.POLL_S)
                answer = await self.get(key)
                if answer is not None:
                    break
        try:
            yield answer
        finally:
            if mine:
                # Also when the last reader has gone: others would wait for a lock that nobody holds.
                with CancelScope(shield=True), suppress(RedisDown, ResponseError):
                    await self._link.call("EVAL", self._RELEASE, 1, lock, token)

    def _value(self, answer: Pieces) -> bytes:
        checksum = 0
        for piece in answer:
            checksum = zlib.crc32(piece, checksum)
        return b"".join((self._HEADER.pack(self.VERSION, byte_count(answer), checksum), *answer))

    def _length(self, value: bytes) -> int:
        """Of the whole value, as its beginning says; 0 for one that is not ours."""
        if len(value) < self._HEADER.size or value[0] != self.VERSION:
            return 0
        return min(self._HEADER.unpack_from(value)[1], self.MAX_BYTES) + self._HEADER.size

    def _answer(self, value: bytes) -> bytes | None:
        if not value or self._length(value) != len(value):
            return None
        _, length, checksum = self._HEADER.unpack_from(value)
        answer = value[self._HEADER.size :]
        return answer if len(answer) == length and zlib.crc32(answer) == checksum else None
