"""Laws of the order in which frames are computed, under arbitrary traffic."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.work_queue import LIVE_IN_A_ROW, Work, WorkQueue

BUDGET, BATCH_S, VERTICES = 80_000, 0.1, 10_000


class Body:
    """Stands for an avatar: all the queue asks of one is how many vertices it has."""

    vertices = np.zeros((VERTICES, 3))

    def mesh(self, lod: str) -> Any:
        return self


BODIES = [Body(), Body()]
AVATAR: Any = BODIES[0]


def work(
    client: object,
    frames: int = 1,
    live: bool = False,
    avatar: Any = AVATAR,
    lod: str = "standard",
    frames_left: float = 1.0,
) -> Work:
    poses: Any = np.zeros((frames, 24, 3, 3)), np.zeros((frames, 3))
    return Work(client, avatar, lod, *poses, live, None, frames_left, 0.0, None)  # type: ignore[arg-type]


def known_speed(queue: WorkQueue, seconds_per_frame: float) -> None:
    for body in BODIES:
        for lod in ("standard", "preview"):
            queue.pace(body, lod).learn(1, seconds_per_frame)  # type: ignore[arg-type]


lengths = st.sampled_from([1.0, 50.0, math.inf])
arrivals = st.tuples(
    st.just("add"), st.integers(0, 4), st.integers(1, 9), st.booleans(), st.integers(0, 1), st.booleans(), lengths
)
traffic = st.lists(arrivals | st.just(("take",)) | st.just(("finish",)) | st.just(("call off",)), max_size=80)


@settings(deadline=None, max_examples=300)
@given(traffic, st.sampled_from([0.001, 0.03, 5.0]), st.integers(1, 3), st.randoms(use_true_random=False))
def test_whatever_comes_the_laws_hold(traffic: list[Any], seconds_per_frame: float, places: int, random: Any) -> None:
    queue, clients = WorkQueue(BUDGET, BATCH_S, places), [object() for _ in range(5)]
    known_speed(queue, seconds_per_frame)
    largest = queue.largest_batch(AVATAR, "standard")
    assert largest == max(1, min(BUDGET // VERTICES, int(BATCH_S / seconds_per_frame)))
    waiting: list[Work] = []
    running: list[list[Work]] = []
    bulk_seen: dict[Work, int] = {}

    def take() -> bool:
        batch = queue.take()
        if not batch:
            # One place is kept for live work, but the last one never: something always goes on.
            assert not waiting or (running and not any(w.live for w in waiting))
            return False
        first = batch[0]
        assert len({(w.avatar, w.lod, w.live) for w in batch}) == 1
        assert len({id(w.client) for w in batch}) == len(batch)
        assert sum(map(len, batch)) <= largest or len(batch) == 1
        for taken in batch:
            # The order of each client is kept, and nothing is taken twice, or after it was called off.
            line = [w for w in waiting if w.client is taken.client and w.live == taken.live]
            assert line[0] is taken
            waiting.remove(taken)
        if not first.live:
            for other in waiting:
                bulk_seen[other] = bulk_seen.get(other, 0) + 1
        # Live work had to wait for one bulk batch at most.
        assert all(bulk_seen.get(w, 0) <= 1 for w in batch + waiting if w.live)
        running.append(batch)
        return True

    for what, *details in traffic:
        if what == "add":
            client, frames, live, body, preview, left = details
            lod = "preview" if preview else "standard"
            piece = work(clients[client], frames, live, BODIES[body], lod, left)
            bulk_seen[piece] = any(not batch[0].live for batch in running)  # the first of them to end makes room
            queue.add(piece)
            waiting.append(piece)
        elif what == "take" and len(running) < places:
            take()
        elif what == "finish" and running:
            queue.finished(running.pop(0), went_well=False)
        elif what == "call off" and waiting:
            gone = waiting.pop(random.randrange(len(waiting)))
            queue.discard(gone)
    # Everything that was accepted and not called off is computed.
    while running or take():
        queue.finished(running.pop(0), went_well=False)
    assert not waiting


@given(st.lists(st.tuples(st.booleans(), st.floats(0.001, 5.0)), max_size=40))
def test_the_time_of_the_engine_is_shared_among_the_batches_in_it(events: list[tuple[bool, float]]) -> None:
    now = busy = 0.0
    queue, running, learnt = WorkQueue(BUDGET, BATCH_S, places=3, clock=lambda: now), [], []
    queue.pace(AVATAR, "standard").learn = lambda frames, seconds: learnt.append(seconds)  # type: ignore[method-assign]
    for takes, seconds in [*events, *[(False, 1.0)] * len(events)]:
        if takes:
            queue.add(work(object()))
            running.append(queue.take())
        elif running:
            queue.finished(running.pop(0), went_well=True)
        now += seconds
        busy += seconds if running else 0.0
    assert sum(learnt) == pytest.approx(busy)


def test_two_equal_batches_at_a_time_are_twice_as_fast_as_each_seems() -> None:
    now = 0.0
    queue = WorkQueue(BUDGET, BATCH_S, places=2, clock=lambda: now)
    running = []
    for n in range(20):
        now = n * 1.0  # one ends each second, after two
        if n >= 2:
            queue.finished(running.pop(0), went_well=True)
        queue.add(work(object(), frames=4))
        running.append(queue.take())
    assert queue.pace(AVATAR, "standard").seconds_per_frame == pytest.approx(0.25, rel=0.1)


def test_clients_take_turns_whatever_they_have_waiting() -> None:
    queue = WorkQueue(BUDGET, BATCH_S)
    known_speed(queue, 5.0)  # one frame a batch
    many, few = object(), object()
    for _ in range(6):
        queue.add(work(many))
    for _ in range(2):
        queue.add(work(few))
    served = []
    while batch := queue.take():
        served += [w.client for w in batch]
        queue.finished(batch, went_well=False)
    assert served[:4].count(few) == 2
    assert served[4:] == [many] * 4


@pytest.mark.parametrize("seconds_per_frame", [0.0, 5.0])  # one frame a batch; not measured yet, and known
def test_the_shortest_has_half_of_the_engine_and_the_others_half_of_their_turns(seconds_per_frame: float) -> None:
    queue = WorkQueue(BUDGET, BATCH_S)
    if seconds_per_frame:
        known_speed(queue, seconds_per_frame)
    lengths: dict[str, float] = {"job": math.inf, "longer": 400, "long": 300, "short": 10}
    clients = {name: object() for name in lengths}
    for name, left in lengths.items():
        for n in range(2 * int(min(left, 300))):
            queue.add(work(clients[name], frames_left=left - n))
    names = {id(client): name for name, client in clients.items()}
    served = []
    for _ in range(400):
        batch = queue.take()
        served += [names[id(work.client)] for work in batch]
        queue.finished(batch, went_well=False)
    # Of each two batches one at least is the shortest's, until it has no more.
    end = max(n for n, name in enumerate(served) if name == "short")
    assert all("short" in pair for pair in pairwise(served[:end]))
    assert end <= 2 * 20
    others = served[end + 1 :]
    assert all("long" in pair for pair in pairwise(others))
    # The rest have half of what taking turns would give them, however much of shorter ones there is.
    for name in ("job", "longer"):
        assert others.count(name) >= len(others) // (2 * 3) - 1


def test_what_is_not_known_yet_costs_the_others_no_more_than_a_batch() -> None:
    queue, long, short = WorkQueue(BUDGET, BATCH_S), object(), object()
    known_speed(queue, 0.012)
    new: Any = Body()  # of which nothing ever gets known
    for n in range(60):
        queue.add(work(long, 8, frames_left=1000 - 8 * n))
        queue.add(work(short, 8, frames_left=500 - 8 * n))
    served = {long: 0, short: 0}
    for n in range(60):
        if n % 6 == 0:
            queue.add(work(object(), 1, avatar=new, frames_left=math.inf))
        batch = queue.take()
        for piece in batch:
            served[piece.client] = served.get(piece.client, 0) + 1
        queue.finished(batch, went_well=False)
    assert min(served[long], served[short]) >= 10


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_the_shortest_has_half_of_the_time_however_small_its_pieces(frames: int) -> None:
    queue, job, short = WorkQueue(BUDGET, BATCH_S), object(), object()
    known_speed(queue, 0.012)  # eight frames a batch
    for _ in range(400):
        queue.add(work(job, 8, frames_left=math.inf))
    for n in range(200):
        queue.add(work(short, frames, frames_left=frames * (200 - n)))
    seconds = {job: 0, short: 0}
    while seconds[short] < 200 * frames:
        batch = queue.take()
        for piece in batch:
            seconds[piece.client] += len(piece)
        queue.finished(batch, went_well=False)
        assert seconds[job] <= seconds[short] + 2 * 8
    assert seconds[job] >= seconds[short] / 3 - 2 * 8


def test_live_goes_before_bulk_but_bulk_is_not_starved() -> None:
    queue = WorkQueue(BUDGET, BATCH_S)
    known_speed(queue, 0.05)  # two frames a batch
    bulk = object()
    for _ in range(10):
        queue.add(work(bulk, frames=2))
    lines = []
    for _ in range(60):
        queue.add(work(object(), live=True))  # a new live frame before every batch
        batch = queue.take()
        lines.append(batch[0].live)
        queue.finished(batch, went_well=False)
    assert lines[:LIVE_IN_A_ROW] == [True] * LIVE_IN_A_ROW
    assert lines.count(False) == 10
    gaps = np.diff([n for n, live in enumerate(lines) if not live])
    assert max(gaps) <= LIVE_IN_A_ROW + 2


def test_pieces_of_many_clients_are_merged_up_to_the_budget() -> None:
    queue = WorkQueue(BUDGET, BATCH_S)
    known_speed(queue, 0.001)
    for frames in (3, 4, 4, 1):
        queue.add(work(object(), frames))
    queue.add(work(object(), 2, avatar=BODIES[1]))
    assert [[len(w) for w in queue.take()] for _ in range(4)] == [[3, 4, 1], [4], [2], []]


def test_the_size_of_batches_follows_the_measured_speed() -> None:
    queue = WorkQueue(BUDGET, BATCH_S)
    assert queue.largest_batch(AVATAR, "standard") == 1
    for _ in range(20):
        queue.pace(AVATAR, "standard").learn(4, 4 * 0.02)
    assert queue.largest_batch(AVATAR, "standard") in (4, 5)
    queue.pace(AVATAR, "standard").learn(4, 4 * 0.1)  # once something held it up
    assert queue.largest_batch(AVATAR, "standard") in (3, 4, 5)
    queue.pace(AVATAR, "standard").most_frames = 3
    assert queue.largest_batch(AVATAR, "standard") == 3


def test_small_meshes_are_not_computed_one_by_one_however_slow_that_seems() -> None:
    class Small:
        vertices = np.zeros((512, 3))

        def mesh(self, lod: str) -> Any:
            return self

    queue, small = WorkQueue(BUDGET, BATCH_S), Small()
    queue.pace(small, "standard").learn(1, 10.0)  # type: ignore[arg-type]
    assert queue.largest_batch(small, "standard") == 16  # type: ignore[arg-type]


def test_live_work_stands_back_for_one_bulk_batch_only() -> None:
    def lines(live_first: bool) -> str:
        queue = WorkQueue(BUDGET, BATCH_S)
        known_speed(queue, 5.0)  # one frame a batch
        bulk, taken = object(), []
        for _ in range(3):
            queue.add(work(bulk))
        if not live_first:
            taken.append(queue.take())
        for _ in range(10):
            queue.add(work(object(), live=True))
        while batch := queue.take():
            taken.append(batch)
            queue.finished(taken[0] if len(taken) == 2 and not live_first else batch, went_well=False)
        return "".join("L" if batch[0].live else "B" for batch in taken)

    assert LIVE_IN_A_ROW == 4
    assert lines(live_first=True) == "LLLLB" + 6 * "L" + "BB"
    # A bulk batch that runs when they come counts too.
    assert lines(live_first=False) == "B" + 10 * "L" + "BB"


def test_asking_in_vain_beside_the_place_that_is_kept_takes_no_turn_from_live_work() -> None:
    queue = WorkQueue(BUDGET, BATCH_S, places=2, clock=lambda: 0.0)
    known_speed(queue, 5.0)  # one frame a batch
    for _ in range(2):
        queue.add(work(object(), live=True))
        queue.finished(queue.take(), went_well=False)
    for _ in range(2):
        queue.add(work(object()))
    running = queue.take()
    assert not running[0].live
    for _ in range(2 * LIVE_IN_A_ROW):
        assert not queue.take()
    queue.finished(running, went_well=False)
    queue.add(work(object(), live=True))
    assert queue.take()[0].live
