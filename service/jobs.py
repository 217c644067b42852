"""Reposing in the background, for what takes longer than a request should: queued by taskiq, kept on the disk.

The queue only wakes workers up.  What is wanted and who works on it lies on the disk (`job_store.py`), so a message
that is lost, or comes twice, does no harm: a job is found by looking, and is worked on by the one who has claimed it.
"""

import asyncio
import hashlib
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from anyio import to_thread
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from taskiq import AsyncBroker, InMemoryBroker
from taskiq.acks import AcknowledgeType
from taskiq.receiver import Receiver
from taskiq_redis import RedisStreamBroker

from service.avatars import AvatarStore
from service.engine_room import EngineRoom
from service.errors import AvatarServiceError, InsufficientStorage, JobNotFound, Overloaded, VersionNotFound
from service.folders import is_full
from service.formats.clip import Clip
from service.job_store import Job, JobStore
from service.metrics import Metrics
from service.production import Order, Times, pieces
from service.reposing import applied, key_of
from service.settings import Settings

log = logging.getLogger(__name__)
BEAT_S = 1.0
"""A worker shows at this interval that it lives, and how far it is, and looks whether its job is still wanted."""
LOOK_S = 5.0
"""Jobs that nobody was woken up for, or whose worker has died, are looked for at this interval."""
AGAIN_S = (1.0, 5.0, 30.0)
"""A job for which there is no room, for its avatar or on the device, is begun anew after so long."""
QUEUE = "reposer:jobs"
RESERVED_BYTES = 16 << 20
"""Room on the disk is asked for in such steps while a result is written."""


class Jobs:
    """The jobs of this process and of all replicas that share its folder."""

    def __init__(self, settings: Settings, store: AvatarStore, room: EngineRoom, metrics: Metrics) -> None:
        self.store = JobStore(settings.jobs_dir, settings.jobs_bytes)
        self._avatars, self._room, self._metrics = store, room, metrics
        self._broker = _broker(settings.redis_url)

        async def job(job_id: str) -> None:  # taskiq takes no methods
            await self.work(job_id)

        self._task = self._broker.register_task(job, task_name="reposer.job")
        self._one_at_a_time = asyncio.Semaphore(1)
        self._working: set[asyncio.Task[None]] = set()

    async def add(self, order: Order, owner: str) -> tuple[Job, bool]:
        """Write down what is wanted, and wake a worker; the job that is there already, if it was asked for before.

        Args:
            owner: name of the key that asks; what another one has asked for is another job.

        Raises:
            InsufficientStorage: there is no room for it.
        """
        key = await to_thread.run_sync(key_of, order)
        job = Job(
            id=hashlib.sha256(f"{owner} {key}".encode()).hexdigest(),
            owner=owner,
            avatar=order.avatar.id,
            bundle=order.avatar.bundle.digest,
            lod=order.lod,
            media_type=order.media_type,
            frames=len(order.poses),
            fps=order.poses.fps,
            created_s=time.time(),
            applied=applied(order),
        )
        job, is_new = await to_thread.run_sync(self.store.add, job, order.poses)
        if is_new:
            # Nobody waits for a queue that does not answer.
            self._work_on(self._wake(job.id))
        return job, is_new

    async def _wake(self, job_id: str) -> None:
        """Tell one worker of one replica.  Without Redis, or without this, they look for themselves."""
        with suppress(Exception):
            async with asyncio.timeout(1.0):
                await self._task.kiq(job_id)

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Work on jobs meanwhile."""
        await to_thread.run_sync(self.store.sweep)
        tasks = [asyncio.create_task(self._look())]
        if isinstance(self._broker, InMemoryBroker):
            await self._broker.startup()
        else:
            tasks.append(asyncio.create_task(self._listen()))
        try:
            yield
        finally:
            tasks += self._working
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._broker.shutdown()

    async def _listen(self) -> None:
        """Be woken up over Redis, whenever it is there."""
        while True:
            receiver = Receiver(self._broker, max_async_tasks=1, ack_type=AcknowledgeType.WHEN_RECEIVED)
            with suppress(Exception):
                await receiver.listen(asyncio.Event())
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                for job_id in await to_thread.run_sync(lambda: list(self.store.waiting())):
                    await self.work(job_id)
            except Exception:
                log.exception("the jobs cannot be looked through")

    async def work(self, job_id: str) -> None:
        """Do a job, unless somebody does it or it has ended."""
        # A task of its own, which is called off when the process ends; taskiq's would go on.
        await asyncio.wait([self._work_on(self._claim_and_do(job_id))])

    def _work_on(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        return task

    async def _claim_and_do(self, job_id: str) -> None:
        async with self._one_at_a_time:
            try:
                claim = await to_thread.run_sync(self.store.claim, job_id)
                if claim is not None:
                    await self._watch(await to_thread.run_sync(self.store.get, job_id), claim)
            except (JobNotFound, OSError):
                log.warning("job %s was removed, or its folder cannot be written", job_id, exc_info=True)

    async def _watch(self, job: Job, claim: Path) -> None:
        """Do a job, and show meanwhile that somebody does."""
        times = Times()
        doing = asyncio.create_task(self._do(job, times))
        try:
            while not doing.done():
                await asyncio.wait([doing], timeout=BEAT_S)
                if (await to_thread.run_sync(self.store.get, job.id)).state == "cancelled":
                    doing.cancel()
                    await asyncio.wait([doing])
                elif not doing.done():
                    os.utime(claim)  # which is not there any more where the job was removed, and asked for again
                    job.state, job.frames_done = "running", times.frames
                    await to_thread.run_sync(self.store.save, job)
            await self._end(job, doing)
        except asyncio.CancelledError:
            # The process ends in good order: that is no mark against the job.
            claim.unlink(missing_ok=True)
            raise
        finally:
            doing.cancel()
            await asyncio.gather(doing, return_exceptions=True)

    async def _end(self, job: Job, doing: asyncio.Task[int]) -> None:
        if doing.cancelled():
            job.state = "cancelled"
        elif (error := doing.exception()) is None:
            job.state, job.frames_done, job.result_bytes = "done", job.frames, doing.result()
        else:
            log.error("job %s failed", job.id, exc_info=error)
            job.state = "failed"
            job.error = error.code if isinstance(error, AvatarServiceError) else AvatarServiceError.code
        await to_thread.run_sync(self.store.save, job)

    async def _do(self, job: Job, times: Times) -> int:
        """Write the result, the second time if there was no room at first; gives its size."""
        for wait_s in AGAIN_S:
            try:
                return await self._once(job, times)
            except Overloaded as error:
                log.info("job %s is begun anew: %s", job.id, error)
                times.frames = 0
                await asyncio.sleep(wait_s)
        return await self._once(job, times)

    async def _once(self, job: Job, times: Times) -> int:
        poses = await to_thread.run_sync(self.store.poses, job)
        async with self._avatars.lease(job.avatar) as avatar:
            if avatar.bundle.digest != job.bundle:
                raise VersionNotFound(f"the avatar {job.avatar} was changed meanwhile")
            clip = Clip(avatar.id, avatar.mesh(job.lod), len(poses), poses.fps, avatar.bundle.skeleton, poses)
            order = Order(avatar, job.lod, job.media_type, poses, clip)
            return await self._write(job.id, order, times)

    async def _write(self, job_id: str, order: Order, times: Times) -> int:
        result = self.store.result(job_id)
        # Of its own name: who was given up for dead may still write.
        part = result.with_name(f"result.{uuid.uuid4().hex}.part")
        size = unaccounted = 0
        try:
            with part.open("wb") as file:
                made = pieces(self._room, order, times, self._metrics, in_background=True)
                async with aclosing(made) as source:
                    async for piece in source:
                        if unaccounted < len(piece):
                            unaccounted = max(len(piece), RESERVED_BYTES)
                            await to_thread.run_sync(self.store.make_room, unaccounted)
                        size, unaccounted = size + len(piece), unaccounted - len(piece)
                        await to_thread.run_sync(_write, file, piece)
            part.replace(result)
            return size
        except OSError as error:
            if is_full(error):
                raise InsufficientStorage("the disk is full") from error
            raise
        finally:
            part.unlink(missing_ok=True)


def _write(file: BinaryIO, piece: bytes) -> None:
    file.write(piece)


def _broker(redis_url: str | None) -> AsyncBroker:
    if redis_url is None:
        return InMemoryBroker()
    # redis-py would try for a minute before it says that Redis is gone.  A read waits two seconds for something.
    return RedisStreamBroker(
        redis_url, queue_name=QUEUE, consumer_group_name=QUEUE, maxlen=1000, unacknowledged_lock_timeout=10.0,
        socket_connect_timeout=1.0, socket_timeout=5.0, retry=Retry(NoBackoff(), 0),
    )  # fmt: skip
