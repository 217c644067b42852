"""Where frames are computed: work of many requests and streams goes in, batches go to the engine, results come back.

The order is `work_queue.py`'s.  Work whose client has gone, or whose deadline has passed, is not computed.  A fault of
the engine is dealt with here: too little memory by smaller batches, a spoilt session by a new one; if that does not
help, `gave_up` is set, and the process had better end.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from service.avatars import Avatar, AvatarStore, still_pose
from service.engine import Batch, Engine
from service.errors import (
    AvatarServiceError,
    AvatarUnavailable,
    DeadlinePassed,
    Draining,
    EngineFailed,
    OutOfMemory,
    OutputInvalid,
    Overloaded,
    Rebuilding,
)
from service.metrics import Metrics
from service.poses import PoseSequence
from service.sequences import Sequence, Sequences
from service.settings import Settings
from service.work_queue import Work, WorkQueue

log = logging.getLogger(__name__)
READ_AHEAD = 2
"""Pieces of a sequence that wait or are computed while the one before is encoded and sent."""
CHECK_TIMEOUT_S = 5.0
INLINE_S = 0.005
"""A live frame that takes no longer is computed on the event loop if nothing else is: to wake a thread for it, and to
be woken by it, takes a tenth of that, and on a virtual machine now and then as long again."""
INLINE_PART = 0.25
"""Of the event loop's time that may go into that."""
REBUILD_S = 2.0
"""About how long it takes to make a new engine; whoever comes meanwhile is refused, who was there before waits."""
REBUILD_INTERVAL_S = 30.0
"""An engine that has to be rebuilt twice within this time is given up."""


_Result = NDArray[np.float32] | AvatarServiceError


@dataclass(frozen=True)
class Reposed:
    """Frames that were computed, and how long that took."""

    vertices: NDArray[np.float32]
    """(F, V, 3), metres."""
    pelvis: NDArray[np.float32]
    """(F, 3), metres."""
    queue_s: float
    infer_s: float
    """Of the whole batch, in which others may have had a part."""


class EngineRoom:
    """Computes for everybody.  `async with room:` starts and stops it; for the event loop's thread only."""

    def __init__(self, settings: Settings, store: AvatarStore, metrics: Metrics) -> None:
        self._settings, self._store, self._metrics = settings, store, metrics
        self._queue = WorkQueue(
            settings.batch_vertex_frames, settings.batch_ms / 1000, places=settings.parallel_inferences
        )
        self._pool = ThreadPoolExecutor(settings.parallel_inferences, "engine")
        self._sequences = Sequences(self._queue, settings.queue_ms / 1000, metrics)
        self._wake = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._in_threads = 0
        """Batches that are computed there."""
        self._inline_from_s = self._rebuilt_s = -math.inf
        self._healing = asyncio.Lock()
        """What is in flight at a time fails together: one of them looks after the engine."""
        self.gave_up = asyncio.Event()
        """The engine fails, and did not come back: nothing can be computed any more."""

    async def __aenter__(self) -> "EngineRoom":
        self._workers = [asyncio.create_task(self._work()) for _ in range(self._settings.parallel_inferences)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        while batch := self._queue.take():
            _refuse(batch, Draining("the service is shutting down"))
            self._queue.finished(batch, went_well=False)
        self._pool.shutdown(wait=False)

    async def preload(self) -> None:
        """Load what fits into memory.  No avatar at all on a GPU, where one is required, is a reason to give up."""
        await self._store.preload()
        if self._settings.require_gpu and not self._store.loaded():
            log.critical("a GPU is required, and no avatar runs on one")
            self.gave_up.set()

    # What requests and streams call.

    async def repose(
        self,
        avatar: Avatar,
        lod: str,
        rotations: NDArray[np.float32],
        translation: NDArray[np.float32],
        live: bool = True,
        deadline: float | None = None,
        client: object = None,
    ) -> Reposed:
        """Compute a few frames at once: (F, 24, 3, 3), (F, 3), F seldom more than one.

        Args:
            live: go before the work of sequences.
            deadline: on the clock of `time.monotonic`.
            client: who asks; clients take turns.  Needed by those who ask again before they were answered.

        Raises:
            LodNotFound: the avatar has no such level of detail.
            Overloaded: too much waits already, or the engine is being rebuilt.
            DeadlinePassed: it was not computed in time.
            EngineFailed, OutputInvalid, AvatarUnavailable: it cannot be computed.
        """
        avatar.mesh(lod)
        if live:
            self._check_engine(avatar)
        if live and self._queue.live_seconds() > self._settings.live_queue_ms / 1000:
            self._metrics.refused("overloaded")
            raise Overloaded("too many live frames wait")
        client, size = client or object(), self._queue.largest_batch(avatar, lod)
        cuts = [slice(start, start + size) for start in range(0, len(rotations), size)]
        works = [
            self._submit(Work(client, avatar, lod, *part, live, deadline, math.inf))  # streams have no end
            for part in ((rotations[cut], translation[cut]) for cut in cuts)
        ]
        try:
            done = [await self._result(work) for work in works]
        finally:
            self._call_off(works)
        if len(done) == 1:
            return done[0]
        vertices, pelvis = (np.concatenate([getattr(p, name) for p in done]) for name in ("vertices", "pelvis"))
        return Reposed(vertices, pelvis, sum(p.queue_s for p in done), sum(p.infer_s for p in done))

    async def sequence(
        self,
        avatar: Avatar,
        lod: str,
        poses: PoseSequence,
        deadline: float | None = None,
        in_background: bool = False,
    ) -> AsyncGenerator[Batch, None]:
        """Compute a sequence of any length in bounded memory; a piece or two ahead of the one who takes them.

        The first batch is one frame, so that it can leave at once.  Close the iterator (`aclosing`) to call off what
        is not computed yet.

        Args:
            in_background: nobody waits for it: it is never refused, nobody is refused for it, and it has its turns only
                while others end sooner.

        Raises:
            As `repose`; Overloaded only before the first batch.
        """
        start = 0
        if not in_background:
            self._check_engine(avatar)
        order = avatar, lod, len(poses)
        with nullcontext(Sequence(*order)) if in_background else self._sequences.admitted(*order) as sequence:
            pieces = self._pieces(avatar, lod, poses, False, deadline, sequence, in_background)
            try:
                async for done in pieces:
                    sequence.frames_left -= len(done.vertices)
                    sequence.taken_s = time.monotonic()
                    yield Batch(start, done.vertices, done.pelvis, done.infer_s, done.queue_s)
                    sequence.taken_s = math.inf
                    start += len(done.vertices)
            finally:
                await pieces.aclose()

    async def check(self, avatar: Avatar) -> None:
        """Compute a frame in its turn, however much waits.

        Raises:
            AvatarServiceError: it does not come, or not within seconds, or it is not finite.
        """
        self._check_engine(avatar)
        still = PoseSequence(*still_pose(), 30.0, "y", "m", "matrix")
        deadline = time.monotonic() + CHECK_TIMEOUT_S
        async for _ in self._pieces(avatar, avatar.smallest_lod, still, True, deadline, object()):
            pass

    def check_admission(self, avatar: Avatar, lod: str, frames: int) -> None:
        """Whether a sequence would be admitted now; for those who have to prepare something.

        Raises:
            Overloaded: it would not.
        """
        self._check_engine(avatar)
        self._sequences.check(avatar, lod, frames)

    def _check_engine(self, avatar: Avatar) -> None:
        if avatar.rebuilding:
            self._metrics.refused(Rebuilding.code)
            raise Rebuilding(f"the engine of {avatar.id} is being rebuilt", REBUILD_S)

    # Cutting and waiting.

    async def _pieces(
        self,
        avatar: Avatar,
        lod: str,
        poses: PoseSequence,
        live: bool,
        deadline: float | None,
        client: object,
        in_background: bool = False,
    ) -> AsyncGenerator[Reposed, None]:
        """The frames in order, in pieces that start with one frame and double up to the largest batch."""
        submitted: deque[Work] = deque()
        start, size = 0, 1
        try:
            while start < len(poses) or submitted:
                while start < len(poses) and len(submitted) <= READ_AHEAD:
                    size = min(size, self._queue.largest_batch(avatar, lod))
                    part = slice(start, start + size)
                    frames = poses.rotations[part], poses.translation[part]
                    left = math.inf if in_background else len(poses) - start
                    submitted.append(self._submit(Work(client, avatar, lod, *frames, live, deadline, left)))
                    start, size = start + size, 2 * size
                yield await self._result(submitted.popleft())
        finally:
            self._call_off(submitted)

    def _submit(self, work: Work) -> Work:
        if work.avatar.spoilt:
            raise AvatarUnavailable(f"the engine of {work.avatar.id} failed")
        self._queue.add(work)
        self._wake.set()
        return work

    async def _result(self, work: Work) -> Reposed:
        try:
            if work.deadline is None:
                return await work.future
            async with asyncio.timeout(max(0.0, work.deadline - time.monotonic())):
                return await work.future
        except TimeoutError:
            self._metrics.refused("deadline")
            raise DeadlinePassed("not computed within the time given") from None
        finally:
            # Whoever leaves, leaves nothing behind.
            self._queue.discard(work)

    def _call_off(self, works: Iterable[Work]) -> None:
        for work in works:
            self._queue.discard(work)
            work.future.cancel()

    # Computing.

    async def _work(self) -> None:
        while True:
            batch = self._queue.take()
            if not batch:
                self._wake.clear()
                await self._wake.wait()
                continue
            went_well = False
            try:
                went_well = await self._compute(batch)
            except asyncio.CancelledError:
                _refuse(batch, Draining("the service is shutting down"))
                raise
            except Exception as error:  # the room goes on, whatever it was
                log.exception("a batch of %s was lost", batch[0].avatar.id)
                _refuse(batch, EngineFailed(f"the batch was lost: {error}"))
            finally:
                self._queue.finished(batch, went_well=went_well)

    async def _compute(self, batch: list[Work]) -> bool:
        """Answer every piece of a batch, one way or another; whether the engine computed it in one go."""
        wanted, began = [], time.monotonic()
        for work in batch:
            if work.deadline is not None and work.deadline <= began:
                _refuse([work], DeadlinePassed("not computed within the time given"))
            elif not work.future.done():
                wanted.append(work)
        if not wanted:
            return False
        avatar, went_well = wanted[0].avatar, False
        engine, most_frames = avatar.engine, self._queue.pace(avatar, wanted[0].lod).most_frames
        results: list[_Result]
        try:
            results = await self._infer(wanted)
            went_well = len(wanted) == len(batch)
        except OutOfMemory:
            results = await self._in_halves(wanted, min(sum(map(len, wanted)), most_frames))
        except Overloaded as error:  # an engine that serves others too: it is busy, not broken
            results = [error for _ in wanted]
        except AvatarServiceError as error:
            results = await self._after_failure(wanted, engine, error)
        if all(isinstance(result, OutputInvalid) for result in results):
            went_well = False  # what follows is not the time of a batch
            await self._heal(avatar, engine)
        seconds = time.monotonic() - began
        if went_well and wanted[0].live and len(wanted) == len(wanted[0]) == 1:
            self._queue.pace(avatar, wanted[0].lod).alone_s = seconds
        self._answer(wanted, results, began, seconds)
        # In the loop's next turn, behind those who now have what they waited for.
        asyncio.get_running_loop().call_soon(self._count, wanted, began, seconds)
        return went_well

    async def _infer(self, works: list[Work]) -> list[_Result]:
        most_frames = self._queue.pace(works[0].avatar, works[0].lod).most_frames
        began = time.monotonic()
        if self._inline(works, began):
            try:
                return _infer(works, most_frames)
            finally:
                ended = time.monotonic()
                self._inline_from_s = ended + (ended - began) * (1 / INLINE_PART - 1)
        self._in_threads += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, _infer, works, most_frames)
        finally:
            self._in_threads -= 1

    def _inline(self, works: list[Work], now: float) -> bool:
        """Whether the event loop has the time to compute this itself."""
        work = works[0]
        pace = self._queue.pace(work.avatar, work.lod)
        return (
            (work.live and len(works) == len(work) == 1 and pace.vertices <= work.avatar.engine.alone_up_to)
            and (0 < pace.alone_s <= INLINE_S and now >= self._inline_from_s)
            and not self._in_threads
        )

    def _count(self, works: list[Work], began: float, seconds: float) -> None:
        self._metrics.computed(works[0].live, sum(map(len, works)), len(works), seconds)
        for work in works:
            self._metrics.queue_seconds.observe(began - work.enqueued_s)

    def _answer(self, works: list[Work], results: list[_Result], began: float, seconds: float) -> None:
        for work, result in zip(works, results, strict=True):
            if isinstance(result, AvatarServiceError):
                self._metrics.refused(result.code)
                _refuse([work], result)
            elif not work.future.done():
                pelvis = work.avatar.bundle.skeleton.rest_joints[0] + work.translation
                work.future.set_result(Reposed(result, pelvis, began - work.enqueued_s, seconds))

    # Faults.

    async def _in_halves(self, works: list[Work], tried: int) -> list[_Result]:
        """Once more in batches of less than the `tried` frames, after all that is idle was dropped."""
        avatar, pace = works[0].avatar, self._queue.pace(works[0].avatar, works[0].lod)
        # What was learnt stays: it is as well for the pieces that are cut already.
        pace.most_frames = min(pace.most_frames, max(1, tried // 2))
        log.warning("no memory: once more, and from now on, at most %d frames of %s", pace.most_frames, avatar.id)
        self._store.drop_idle(but=avatar)
        try:
            async with self._healing:
                return await self._infer(works)
        except AvatarServiceError:
            return [Overloaded("the device has no memory left", retry_after_s=5)] * len(works)

    async def _after_failure(self, works: list[Work], engine: Engine, error: AvatarServiceError) -> list[_Result]:
        """If the engine still works, one of the pieces was to blame: each once more, alone."""
        log.error("a batch of %s failed: %s", works[0].avatar.id, error, exc_info=error.__cause__)
        if not await self._heal(works[0].avatar, engine) or len(works) == 1:
            return [error] * len(works)
        results: list[_Result] = []
        for work in works:
            try:
                results += await self._infer([work])
            except AvatarServiceError as failure:
                results.append(failure)
        return results

    async def _heal(self, avatar: Avatar, engine: Engine) -> bool:
        """Check an engine that failed; if it is spoilt, rebuild it, but not again and again.  Whether it was sound."""
        async with self._healing:
            if avatar.spoilt or avatar.engine is not engine:
                return False  # another batch that was in flight has seen to it
            if await self._sound(avatar):
                return True
            now = time.monotonic()
            rebuilt, self._rebuilt_s = now - self._rebuilt_s > REBUILD_INTERVAL_S, now
            log.error("the engine of %s is spoilt", avatar.id)
            for lod in avatar.bundle.meshes:  # how soon a new one computes is not known
                self._queue.pace(avatar, lod).alone_s = 0.0
            if rebuilt and await self._store.rebuild(avatar):
                return False
            self._store.give_up(avatar)
            for other in self._store.loaded():
                if await self._sound(other):
                    return False
            log.critical("no engine works any more")
            self.gave_up.set()
            return False

    async def _sound(self, avatar: Avatar) -> bool:
        try:
            await asyncio.get_running_loop().run_in_executor(self._pool, avatar.check)
        except Overloaded:
            return True
        except Exception as error:
            log.warning("the check of %s failed: %s", avatar.id, error)
            return False
        return True


def _infer(works: list[Work], most_frames: int) -> list[_Result]:
    """In a thread, or at once: the vertices (F, V, 3) of each piece of work, or what is wrong with them."""
    avatar, lod = works[0].avatar, works[0].lod
    rotations = _joined([work.rotations for work in works])
    translation = _joined([work.translation for work in works])
    starts = range(0, len(rotations), most_frames)
    try:
        vertices = _joined(
            [avatar.repose(lod, rotations[n : n + most_frames], translation[n : n + most_frames]) for n in starts]
        )
    except AvatarServiceError:
        raise
    except MemoryError as error:
        raise OutOfMemory("no memory") from error
    except Exception as error:  # whatever it is, the room goes on
        raise EngineFailed("the engine failed in an unknown way") from error
    ends = accumulate(map(len, works))
    pieces = [vertices[end - len(work) : end] for work, end in zip(works, ends, strict=True)]
    return [
        piece if np.isfinite(piece).all() else OutputInvalid("the graph gave vertices that are not finite")
        for piece in pieces
    ]


def _joined(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _refuse(works: list[Work], error: AvatarServiceError) -> None:
    for work in works:
        if not work.future.done():
            work.future.set_exception(error)
