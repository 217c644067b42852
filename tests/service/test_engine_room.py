"""The engine room: every frame answered once and in order, and what it does about faults of clients and engines."""

import asyncio
import gc
import math
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.avatars import Avatar, AvatarStore
from service.bundle.files import write_bundle
from service.engine_room import INLINE_S, READ_AHEAD, EngineRoom
from service.errors import (
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
from service.settings import Settings
from service.work_queue import Work

pytestmark = pytest.mark.anyio
V = 368  # vertices of the tiny avatar


class Engine:
    """Frame n of a sequence stands n metres to the right; can be held up, and told to fail."""

    device, provider = "cpu", "scripted"

    def __init__(self, world: "World") -> None:
        self._world, self.spoilt, self.alone_up_to = world, False, world.alone_up_to

    def repose(self, canonical_vertices: Any, bones: Any, roots: Any) -> Any:
        world = self._world
        world.threads.append(threading.get_ident())
        world.meshes.add(len(canonical_vertices))
        world.inside += 1
        world.gate.wait(10)
        world.inside -= 1
        if world.spoils(roots):
            self.spoilt = True
        if self.spoilt:
            raise EngineFailed("the device is lost")
        steps = roots[:, 0, 3] - canonical_vertices[0, 0] * 0
        world.batches.append(len(bones))
        world.check_fault(steps)
        return world.change(np.asarray(canonical_vertices[None] + roots[:, None, :3, 3], np.float32))


class World:
    """What the engines of a test have in common."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[int] = []
        self.inside = 0
        """Batches that wait for the gate."""
        self.built = self.alone_up_to = 0
        self.meshes: set[int] = set()
        """Sizes of those that were reposed."""
        self.threads: list[int] = []
        """That computed the batches."""
        self.spoils: Callable[[Any], bool] = lambda roots: False
        self.check_fault: Callable[[Any], None] = lambda steps: None
        self.change: Callable[[Any], Any] = lambda vertices: vertices

    def make_engine(self, graph: bytes) -> Any:
        self.built += 1
        return Engine(self)


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.gate.set()


Opened = tuple[EngineRoom, AvatarStore, Avatar]


@asynccontextmanager
async def opened(bundle_dir: Path, world: World, **settings: Any) -> AsyncIterator[Opened]:
    """A room over the avatars of a folder, with `tiny` under lease; its speed is known: 1 ms a frame.

    One batch at a time, unless told otherwise: what waits for what is known then.
    """
    chosen = Settings(bundle_dir=bundle_dir, **{"batch_ms": 8.0, "parallel_inferences": 1} | settings)
    store = AvatarStore(bundle_dir, world.make_engine, chosen.avatar_bytes, chosen.require_gpu)
    async with EngineRoom(chosen, store, Metrics()) as room, AsyncExitStack() as leases:
        avatar = await leases.enter_async_context(store.lease("tiny"))
        world.batches.clear()
        pace = room._queue.pace(avatar, "standard")
        pace.learn = lambda frames, seconds: None  # type: ignore[method-assign]
        pace.seconds_per_frame = 0.001
        yield room, store, avatar


def walk(frames: int, start: int = 0) -> PoseSequence:
    still = np.tile(np.eye(3, dtype=np.float32), (frames, 24, 1, 1))
    steps = np.arange(start, start + frames, dtype=np.float32)[:, None] * np.array([1, 0, 0], np.float32)
    return PoseSequence(still, steps, 30.0, "y", "m", "matrix")


def step_of(avatar: Avatar, vertices: Any) -> list[int]:
    """Which frames these are."""
    return np.rint(vertices[:, 0, 0] - avatar.mesh("standard").vertices[0, 0]).astype(int).tolist()


async def live(room: EngineRoom, avatar: Avatar, frame: int = 0, **terms: Any) -> list[int]:
    poses = walk(1, frame)
    done = await room.repose(avatar, "standard", poses.rotations, poses.translation, **terms)
    np.testing.assert_allclose(done.pelvis, avatar.bundle.skeleton.rest_joints[:1] + poses.translation, atol=1e-5)
    return step_of(avatar, done.vertices)


async def several(room: EngineRoom, avatar: Avatar, start: int, frames: int) -> list[int]:
    """Frames of a client of its own, not live, as one piece; a batch holds 22."""
    poses = walk(frames, start)
    done = await room.repose(avatar, "standard", poses.rotations, poses.translation, live=False)
    return step_of(avatar, done.vertices)


async def frames_of(batches: AsyncIterator[Any]) -> int:
    return sum([len(batch.vertices) async for batch in batches])


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.001)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def computing(world: World, avatar: Avatar, room: EngineRoom) -> asyncio.Task[Any]:
    """A live frame that is in the engine, which is held up until `world.gate` is set."""
    world.gate.clear()
    task = asyncio.create_task(live(room, avatar))
    await settle()
    return task


@pytest.mark.parametrize("places", [1, 2, 3])
async def test_every_frame_comes_once_and_in_order(bundle_dir: Path, world: World, places: int) -> None:
    terms = {"batch_vertex_frames": 5 * V, "parallel_inferences": places, "queue_ms": 1000}
    async with opened(bundle_dir, world, **terms) as (room, _, avatar):

        async def all_of(frames: int, start: int) -> None:
            seen = []
            async for batch in room.sequence(avatar, "standard", walk(frames, start)):
                assert batch.start == len(seen)
                seen += step_of(avatar, batch.vertices)
            assert seen == list(range(start, start + frames))

        async def streamed(start: int) -> None:
            for frame in range(start, start + 20):
                assert await live(room, avatar, frame) == [frame]

        many = await room.repose(avatar, "standard", walk(23).rotations, walk(23).translation)
        assert step_of(avatar, many.vertices) == list(range(23))
        world.batches.clear()
        await asyncio.gather(all_of(100, 0), all_of(1, 1000), all_of(37, 2000), streamed(3000), streamed(4000))
    assert sum(world.batches) == 100 + 1 + 37 + 40
    assert max(world.batches) == 5


async def test_a_sequence_begins_with_one_frame_and_is_computed_ahead(bundle_dir: Path, world: World) -> None:
    async with opened(bundle_dir, world) as (room, _, avatar):
        batches = room.sequence(avatar, "standard", walk(100))
        assert len((await anext(batches)).vertices) == 1
        await asyncio.sleep(0.05)
        assert world.batches == [1, 2, 4][: 1 + READ_AHEAD]  # bounded, however long one waits
        await batches.aclose()


async def test_a_live_frame_overtakes_a_long_sequence(bundle_dir: Path, world: World) -> None:
    async with opened(bundle_dir, world) as (room, _, avatar):
        order: list[str] = []

        async def long() -> None:
            async for _ in room.sequence(avatar, "standard", walk(200)):
                order.append("bulk")

        task = asyncio.create_task(long())
        while len(order) < 3:
            await asyncio.sleep(0)
        before = len(order)
        await live(room, avatar)
        assert len(order) - before <= 1 + READ_AHEAD  # what was computed or in the engine already
        task.cancel()


async def on_the_loop(room: EngineRoom, world: World, avatar: Avatar, frames: int = 1, **terms: Any) -> bool:
    """Whether these frames are computed by the event loop itself, were it not for the part of its time that may go
    into that."""
    await live(room, avatar)  # so that it is known how long one takes
    room._inline_from_s = 0.0
    world.threads.clear()
    poses = walk(frames)
    await room.repose(avatar, "standard", poses.rotations, poses.translation, **terms)
    return threading.get_ident() in world.threads


async def test_a_live_frame_that_is_alone_and_quick_needs_no_thread(bundle_dir: Path, world: World) -> None:
    world.alone_up_to = V
    async with opened(bundle_dir, world, parallel_inferences=2) as (room, _, avatar):
        pace = room._queue.pace(avatar, "standard")
        assert await on_the_loop(room, world, avatar)
        assert not await on_the_loop(room, world, avatar, frames=2)
        assert not await on_the_loop(room, world, avatar, live=False)
        world.threads.clear()
        room._inline_from_s = 0.0
        assert await asyncio.gather(live(room, avatar, 1), live(room, avatar, 2)) == [[1], [2]]  # one batch
        assert threading.get_ident() not in world.threads
        for seconds, wanted in ((INLINE_S, True), (1.1 * INLINE_S, False), (0.0, False), (0.001, True)):
            pace.alone_s, room._inline_from_s = seconds, 0.0
            world.threads.clear()
            await live(room, avatar)
            assert (threading.get_ident() in world.threads) == wanted
            assert 0 < pace.alone_s < INLINE_S  # measured, there or here
        world.gate.clear()
        running = asyncio.create_task(several(room, avatar, 0, 2))
        await until(lambda: world.inside == 1)
        asyncio.get_running_loop().call_later(0.05, world.gate.set)
        assert not await on_the_loop(room, world, avatar)
        assert await running == [0, 1]
        # What goes wrong there is dealt with as elsewhere.
        world.spoils = lambda roots: roots[0, 0, 3] == 13
        room._inline_from_s = 0.0
        world.meshes.clear()
        with pytest.raises(EngineFailed):
            await live(room, avatar, 13)
        assert world.meshes == {len(mesh.vertices) for mesh in avatar.bundle.meshes.values()}  # none is new any more
        assert await live(room, avatar, 14) == [14]
        assert world.built == 2
        avatar.engine.alone_up_to = V - 1
        assert not await on_the_loop(room, world, avatar)


async def test_the_loop_computes_for_a_quarter_of_its_time_at_most(bundle_dir: Path, world: World) -> None:
    world.alone_up_to = V
    async with opened(bundle_dir, world) as (room, _, avatar):
        pace = room._queue.pace(avatar, "standard")
        pace.alone_s, world.change = 0.001, lambda vertices: (time.sleep(0.02), vertices)[1]
        assert await live(room, avatar) == [0]
        assert threading.get_ident() in world.threads
        until_s = room._inline_from_s
        assert until_s - time.monotonic() > 0.04
        for wait_s, wanted in ((0.0, False), (until_s - time.monotonic() + 0.001, True)):
            await asyncio.sleep(wait_s)
            pace.alone_s = 0.001
            world.threads.clear()
            assert await live(room, avatar) == [0]
            assert (threading.get_ident() in world.threads) == wanted


async def test_fault_17_overload_is_refused_with_a_time_to_come_back(bundle_dir: Path, world: World) -> None:
    async with opened(bundle_dir, world, queue_ms=50) as (room, _, avatar), AsyncExitStack() as stack:
        batches = await stack.enter_async_context(aclosing(room.sequence(avatar, "standard", walk(100))))  # 0.1 s
        await anext(batches)
        more = await stack.enter_async_context(aclosing(room.sequence(avatar, "standard", walk(100))))
        await anext(more)
        with pytest.raises(Overloaded) as refused:  # it would take three times as long as alone
            await anext(room.sequence(avatar, "standard", walk(100)))
        assert refused.value.headers["Retry-After"] == "1"
        assert await frames_of(room.sequence(avatar, "standard", walk(20))) == 20  # goes before both
        assert await frames_of(room.sequence(avatar, "standard", walk(100), in_background=True)) == 100
    async with opened(bundle_dir, world, live_queue_ms=5) as (room, _, avatar):
        running = await computing(world, avatar, room)
        waiting = [asyncio.create_task(live(room, avatar)) for _ in range(6)]
        await settle()
        with pytest.raises(Overloaded):
            await live(room, avatar)
        world.gate.set()
        assert await asyncio.gather(running, *waiting) == [[0]] * 7


async def test_what_ends_sooner_goes_first_and_what_is_in_the_background_last(bundle_dir: Path, world: World) -> None:
    terms = {"batch_vertex_frames": 5 * V, "queue_ms": 10_000}
    async with opened(bundle_dir, world, **terms) as (room, _, avatar):
        done = {"background": 0, "long": 0, "short": 0}
        at_the_end: dict[str, dict[str, int]] = {}

        async def compute(name: str, frames: int, **terms: Any) -> None:
            async for batch in room.sequence(avatar, "standard", walk(frames), **terms):
                done[name] += len(batch.vertices)
            at_the_end[name] = dict(done)

        world.change = lambda vertices: (time.sleep(0.002), vertices)[1]  # so that the next pieces are always there
        running = await computing(world, avatar, room)
        background = asyncio.create_task(compute("background", 250, in_background=True))
        both = [asyncio.create_task(compute(name, frames)) for name, frames in (("long", 400), ("short", 200))]
        await settle()
        world.gate.set()
        await asyncio.gather(running, background, *both)
    assert list(at_the_end) == ["short", "long", "background"]
    # Two thirds and a sixth each while there are three; then three quarters and one.
    assert at_the_end["short"]["long"] <= 200 / 4 + 20
    assert at_the_end["short"]["background"] <= 200 / 4 + 20
    assert 40 <= at_the_end["long"]["background"] < 250


async def test_at_the_end_nobody_is_left_waiting_whatever_place_is_kept(bundle_dir: Path, world: World) -> None:
    async with opened(bundle_dir, world, parallel_inferences=2) as (room, _, avatar):
        for frame in (0, 1):
            await live(room, avatar, frame)  # more is expected, and a place is kept for it
        world.gate.clear()
        waiting = [asyncio.create_task(several(room, avatar, 0, 22)) for _ in range(5)]
        await settle()
        asyncio.get_running_loop().call_later(0.2, world.gate.set)
    done, pending = await asyncio.wait(waiting, timeout=5)
    assert not pending
    assert all(isinstance(task.exception(), Draining) for task in done)


async def test_a_stream_is_not_taken_for_something_that_ends_soon(bundle_dir: Path, world: World) -> None:
    async with opened(bundle_dir, world) as (room, _, avatar):
        added: list[Work] = []
        add = room._queue.add
        room._queue.add = lambda work: (added.append(work), add(work))[1]  # type: ignore[method-assign]
        assert await several(room, avatar, 0, 3) == [0, 1, 2]
        assert await frames_of(room.sequence(avatar, "standard", walk(3))) == 3
    assert [work.frames_left for work in added] == [math.inf, 3, 2]


async def test_those_whose_clients_do_not_read_are_in_nobody_s_way(
    bundle_dir: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(bundle_dir, world, queue_ms=0) as (room, _, avatar), AsyncExitStack() as stack:
        for _ in range(5):
            batches = await stack.enter_async_context(aclosing(room.sequence(avatar, "standard", walk(100))))
            await anext(batches)
            # As if a second and more had passed, in which nobody came for the next batch.
            for sequence in room._sequences:
                sequence.taken_s -= 2
        assert len(room._sequences) == 5


async def test_fault_19_work_past_its_deadline_is_not_computed(bundle_dir: Path, world: World) -> None:
    async with opened(bundle_dir, world) as (room, _, avatar):
        running = await computing(world, avatar, room)
        with pytest.raises(DeadlinePassed):
            await live(room, avatar, deadline=time.monotonic() + 0.02)
        with pytest.raises(DeadlinePassed):
            [b async for b in room.sequence(avatar, "standard", walk(9), deadline=time.monotonic() - 1)]
        world.gate.set()
        await running
        await settle()
        assert await live(room, avatar, 7, deadline=time.monotonic() + 10) == [7]
        assert world.batches == [1, 1]


async def test_fault_19_the_deadline_is_looked_at_when_the_work_s_turn_comes(bundle_dir: Path, world: World) -> None:
    async with opened(bundle_dir, world) as (room, _, avatar):
        poses, now = walk(1), time.monotonic()
        terms = object(), avatar, "standard", poses.rotations, poses.translation, True
        # Straight into the queue: nobody waits, so no timer fires.
        late, early = (room._submit(Work(*terms, deadline, 1)) for deadline in (now, now + 30))
        await asyncio.wait([late.future, early.future], timeout=10)
        assert isinstance(late.future.exception(), DeadlinePassed)
        assert step_of(avatar, early.future.result().vertices) == [0]
        assert world.batches == [1]


async def test_fault_20_work_of_clients_that_have_gone_is_not_computed(bundle_dir: Path, world: World) -> None:
    async with opened(bundle_dir, world) as (room, _, avatar):
        running = await computing(world, avatar, room)
        for n in range(1000):
            if n % 2:
                gone = asyncio.create_task(live(room, avatar))
            else:
                batches = room.sequence(avatar, "standard", walk(1))
                gone = asyncio.create_task(anext(batches))  # type: ignore[arg-type]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
        assert not room._sequences
        assert not room._queue.take()
        world.gate.set()
        await running
        await settle()
        assert world.batches == [1]


async def test_fault_20_a_sequence_that_is_closed_stops_within_a_batch(bundle_dir: Path, world: World) -> None:
    async with opened(bundle_dir, world) as (room, _, avatar):
        batches = room.sequence(avatar, "standard", walk(1000))
        await anext(batches)
        world.gate.clear()
        await asyncio.sleep(0.02)  # the second piece is in the engine, the third one waits
        await batches.aclose()
        world.gate.set()
        assert await live(room, avatar, 5) == [5]
        assert world.batches[:1] == [1]
        assert sum(world.batches) <= 1 + 2 + 4 + 1
        assert not room._sequences


async def test_fault_25_out_of_memory_is_tried_again_with_half_the_batch(bundle_dir: Path, world: World) -> None:
    def little_memory(steps: Any) -> None:
        if len(steps) > 3:
            raise OutOfMemory("no memory")

    async with opened(bundle_dir, world) as (room, _, avatar):
        world.check_fault = little_memory
        done = [batch async for batch in room.sequence(avatar, "standard", walk(30))]
        assert [n for batch in done for n in step_of(avatar, batch.vertices)] == list(range(30))
        # Learnt: 4 frames were too many once, 2 were not.
        assert [size for size in world.batches if size > 3] == [4]


async def test_fault_25_two_batches_that_find_no_memory_together_are_halved_once(
    bundle_dir: Path, world: World
) -> None:
    def little_memory(steps: Any) -> None:
        if len(steps) > 6:
            raise OutOfMemory("no memory")

    async with opened(bundle_dir, world, parallel_inferences=2) as (room, _, avatar):
        world.check_fault = little_memory
        world.gate.clear()
        together = [asyncio.create_task(several(room, avatar, start, 12)) for start in (0, 100)]
        await until(lambda: world.inside == 2)
        world.gate.set()
        assert await asyncio.gather(*together) == [list(range(12)), list(range(100, 112))]
        assert room._queue.pace(avatar, "standard").most_frames == 6


async def test_fault_25_without_any_memory_it_is_503_and_idle_avatars_leave(
    bundle_dir: Path, tmp_path: Path, bundle_parts: Any, world: World
) -> None:
    def no_memory(steps: Any) -> None:
        raise OutOfMemory("no memory")

    for name in ("tiny", "idle", "busy"):
        write_bundle(tmp_path / name, avatar_id=name, **bundle_parts)
    async with opened(tmp_path, world) as (room, store, avatar), store.lease("busy"):
        async with store.lease("idle"):
            pass
        world.check_fault = no_memory
        with pytest.raises(Overloaded) as refused:
            await live(room, avatar)
        assert "Retry-After" in refused.value.headers
        assert sorted(found.id for found in store.loaded()) == ["busy", "tiny"]
        world.check_fault = lambda steps: None
        assert await live(room, avatar, 3) == [3]


async def test_fault_26_one_bad_piece_does_not_take_its_neighbours_with_it(bundle_dir: Path, world: World) -> None:
    def poisoned(steps: Any) -> None:
        if np.any(np.rint(steps) == 13):
            raise EngineFailed("a bad piece")

    async with opened(bundle_dir, world) as (room, _, avatar):
        running = await computing(world, avatar, room)
        together = [asyncio.create_task(live(room, avatar, n)) for n in (12, 13, 14)]
        await settle()
        world.check_fault = poisoned
        world.gate.set()
        found = await asyncio.gather(running, *together, return_exceptions=True)
        assert [found[n] for n in (0, 1, 3)] == [[0], [12], [14]]
        assert isinstance(found[2], EngineFailed)
        assert (world.built, room.gave_up.is_set()) == (1, False)


async def test_fault_26_a_spoilt_session_is_rebuilt_once(bundle_dir: Path, world: World) -> None:
    async with opened(bundle_dir, world) as (room, store, avatar):
        world.spoils = lambda roots: bool(np.any(np.rint(roots[:, 0, 3]) == 13))
        with pytest.raises(EngineFailed):
            await live(room, avatar, 13)
        assert await live(room, avatar, 4) == [4]  # the lease goes on, with a new engine
        assert world.built == 2
        # Again within seconds: given up, and with it the process, for there is no other avatar.
        with pytest.raises(EngineFailed):
            await live(room, avatar, 13)
        assert room.gave_up.is_set()
        assert world.built == 2
        with pytest.raises(AvatarUnavailable):
            await live(room, avatar, 4)
        with pytest.raises(AvatarUnavailable):
            async with store.lease("tiny"):
                pass


async def test_fault_26_while_an_engine_is_rebuilt_nobody_waits_for_it(bundle_dir: Path, world: World) -> None:
    async with opened(bundle_dir, world) as (room, store, avatar):
        may_go_on, make = threading.Event(), store._new_engine

        def make_slowly(graph: bytes) -> Any:
            may_go_on.wait(30)
            return make(graph)

        store._new_engine = make_slowly
        world.spoils = lambda roots: bool(np.any(np.rint(roots[:, 0, 3]) == 13))
        spoiling = asyncio.create_task(live(room, avatar, 13))
        await until(lambda: avatar.rebuilding)
        computed = len(world.threads)
        for refused in (
            live(room, avatar, 4),
            room.check(avatar),
            frames_of(room.sequence(avatar, "standard", walk(3))),
        ):
            with pytest.raises(Rebuilding) as error:
                await asyncio.wait_for(refused, 10)
            assert error.value.headers["Retry-After"] == "2"
        assert len(world.threads) == computed
        waits = asyncio.create_task(several(room, avatar, 4, 3))  # the next part of what was there before
        await asyncio.sleep(0.05)
        assert not spoiling.done()
        assert not waits.done()
        may_go_on.set()
        assert await waits == [4, 5, 6]
        with pytest.raises(EngineFailed):
            await spoiling
        assert not avatar.rebuilding
        assert await live(room, avatar, 4) == [4]


async def test_fault_26_what_was_in_flight_together_is_lost_together_and_the_engine_rebuilt_once(
    bundle_dir: Path, world: World
) -> None:
    async with opened(bundle_dir, world, parallel_inferences=2) as (room, _, avatar):
        world.spoils = lambda roots: bool(np.any(np.isin(np.rint(roots[:, 0, 3]), [13, 313])))
        world.gate.clear()
        pieces = [asyncio.create_task(several(room, avatar, start, 11)) for start in (13, 113, 213, 313)]
        await until(lambda: world.inside == 2)  # two batches of two pieces
        world.gate.set()
        found = await asyncio.gather(*pieces, return_exceptions=True)
        # Not tried again, piece for piece: one of them would spoil the new engine too.
        assert all(isinstance(error, EngineFailed) for error in found)
        assert (world.built, avatar.spoilt, room.gave_up.is_set()) == (2, False, False)
        assert await live(room, avatar, 4) == [4]


async def test_live_finds_a_place_beside_a_long_sequence(bundle_dir: Path, world: World) -> None:
    async with opened(bundle_dir, world, parallel_inferences=2, batch_vertex_frames=V) as (room, _, avatar):
        assert [await live(room, avatar, n) for n in (1, 2)] == [[1], [2]]  # more of it is expected now
        world.gate.clear()
        long = asyncio.create_task(several(room, avatar, 0, 20))
        await until(lambda: world.inside == 1)
        await asyncio.sleep(0.05)
        assert world.inside == 1  # two pieces wait, and a place is free
        waiting = asyncio.create_task(live(room, avatar, 7))
        await until(lambda: world.inside == 2)
        world.gate.set()
        assert await waiting == [7]
        assert await long == list(range(20))


async def test_a_probe_takes_no_place_from_a_long_sequence(bundle_dir: Path, world: World) -> None:
    async with opened(bundle_dir, world, parallel_inferences=2, batch_vertex_frames=V) as (room, _, avatar):
        await room.check(avatar)
        world.gate.clear()
        long = asyncio.create_task(several(room, avatar, 0, 20))
        await until(lambda: world.inside == 2)
        world.gate.set()
        assert await long == list(range(20))


async def test_fault_26_an_avatar_that_cannot_be_rebuilt_leaves_the_others_alone(
    tmp_path: Path, bundle_parts: Any, world: World
) -> None:
    for name in ("tiny", "other"):
        write_bundle(tmp_path / name, avatar_id=name, **bundle_parts)
    async with opened(tmp_path, world) as (room, store, avatar), store.lease("other") as other:
        avatar.engine.spoilt = True  # type: ignore[attr-defined]

        def no_more(graph: bytes) -> Any:
            raise AvatarUnavailable("no session can be made")

        store._new_engine = no_more
        with pytest.raises(EngineFailed):
            await live(room, avatar)
        assert not room.gave_up.is_set()
        assert [found.id for found in store.loaded()] == ["other"]
        assert await live(room, other, 2) == [2]
        await room.check(other)


async def test_an_error_nobody_thought_of_is_a_failed_engine_and_the_room_goes_on(
    bundle_dir: Path, world: World
) -> None:
    def surprise(steps: Any) -> None:
        if np.any(np.rint(steps) == 13):
            raise ZeroDivisionError

    async with opened(bundle_dir, world) as (room, _, avatar):
        world.check_fault = surprise
        with pytest.raises(EngineFailed):
            await live(room, avatar, 13)
        assert await live(room, avatar, 4) == [4]


async def test_fault_27_a_surface_with_nan_is_refused_and_only_that_one(bundle_dir: Path, world: World) -> None:
    def spoil(vertices: Any) -> Any:
        bad = np.rint(vertices[:, 0, 0]) == 13
        vertices[bad, 7, 1] = np.nan
        return vertices

    async with opened(bundle_dir, world) as (room, _, avatar):
        running = await computing(world, avatar, room)
        together = [asyncio.create_task(live(room, avatar, n)) for n in (12, 13, 14)]
        await settle()
        world.change = spoil
        world.gate.set()
        found = await asyncio.gather(running, *together, return_exceptions=True)
        assert [found[n] for n in (0, 1, 3)] == [[0], [12], [14]]
        assert isinstance(found[2], OutputInvalid)
        assert (found[2].status, found[2].code) == (500, "model-output-invalid")
        assert world.built == 1
        # All of them, and of the check too: that is no matter of the pose.
        world.change = lambda vertices: vertices * np.float32(np.nan)
        with pytest.raises(OutputInvalid):
            await live(room, avatar, 3)
        assert room.gave_up.is_set()


async def test_an_engine_that_is_busy_is_not_taken_for_a_broken_one(bundle_dir: Path, world: World) -> None:
    """An engine elsewhere serves others too, and says so."""

    faults: list[Exception] = []

    def refuse(vertices: Any) -> Any:
        raise faults.pop() if faults else Overloaded("others are served")

    async with opened(bundle_dir, world) as (room, _, avatar):
        world.change = refuse
        for _ in range(3):
            with pytest.raises(Overloaded):
                await live(room, avatar)
        assert len(world.batches) == 3  # who is busy is not asked how he is
        faults.append(EngineFailed("raised"))
        with pytest.raises(EngineFailed):
            await live(room, avatar)
        assert len(world.batches) == 5
        world.change = lambda vertices: vertices
        assert await live(room, avatar, 4) == [4]
        assert (world.built, avatar.spoilt, room.gave_up.is_set()) == (1, False, False)
    store = AvatarStore(bundle_dir, world.make_engine)
    world.change = refuse
    with pytest.raises(Overloaded):
        async with store.lease("tiny"):
            pass
    world.change = lambda vertices: vertices
    async with store.lease("tiny") as avatar:
        assert avatar.id == "tiny"


async def test_fault_28_without_the_gpu_that_is_required_nothing_is_served(bundle_dir: Path, world: World) -> None:
    settings = Settings(bundle_dir=bundle_dir, require_gpu=True)
    store = AvatarStore(bundle_dir, world.make_engine, require_gpu=True)
    async with EngineRoom(settings, store, Metrics()) as room:
        await room.preload()
        assert room.gave_up.is_set()
        with pytest.raises(AvatarUnavailable):
            async with store.lease("tiny"):
                pass


async def test_fault_37_a_jump_of_the_clock_changes_nothing(
    bundle_dir: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(bundle_dir, world) as (room, _, avatar):
        for jump_s in (1e6, -1e6):
            monkeypatch.setattr(time, "time", lambda jump_s=jump_s: 1.8e9 + jump_s)
            assert await live(room, avatar, 3, deadline=time.monotonic() + 30) == [3]
            done = [b async for b in room.sequence(avatar, "standard", walk(9), time.monotonic() + 30)]
            assert sum(len(b.vertices) for b in done) == 9


async def test_what_waits_when_the_room_closes_is_answered(bundle_dir: Path, world: World) -> None:
    async with opened(bundle_dir, world) as (room, _, avatar):
        running = await computing(world, avatar, room)
        waiting = asyncio.create_task(live(room, avatar))
        await settle()
        world.gate.set()
    found = await asyncio.wait_for(asyncio.gather(running, waiting, return_exceptions=True), 10)
    assert all(isinstance(one, Draining) or one == [0] for one in found)


async def test_an_avatar_that_has_left_is_freed_while_the_room_goes_on(
    tmp_path: Path, bundle_parts: Any, world: World
) -> None:
    for name in ("tiny", "other"):
        write_bundle(tmp_path / name, avatar_id=name, **bundle_parts)

    async def use(room: EngineRoom, store: AvatarStore) -> weakref.ref[Avatar]:
        async with store.lease("other") as other:
            assert await live(room, other, 3) == [3]
            with pytest.raises(DeadlinePassed):
                await live(room, other, deadline=0.0)
            return weakref.ref(other)

    async with opened(tmp_path, world) as (room, store, avatar):
        other = await use(room, store)
        store.forget("other")
        assert await live(room, avatar) == [0]
        await settle()
        gc.collect()
        assert other() is None
