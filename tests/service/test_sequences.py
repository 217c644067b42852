"""Who is admitted beside whom: equals wait a little for each other, under overload hardly; nobody for long ones."""

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from service import sequences
from service.errors import Overloaded
from service.metrics import Metrics
from service.sequences import MOST_TOGETHER, OVERLOAD_S, STALLED_S, UNDER_OVERLOAD, Sequences

AVATAR: Any = SimpleNamespace(id="tiny")
FRAME_S, QUEUE_S = 0.01, 0.05


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(sequences, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


@pytest.fixture
def admitting(clock: Clock) -> Sequences:
    queue: Any = SimpleNamespace(pace=lambda avatar, lod: SimpleNamespace(seconds_per_frame=FRAME_S))
    return Sequences(queue, QUEUE_S, Metrics())


def admits(admitting: Sequences, frames: int) -> bool:
    try:
        admitting.check(AVATAR, "preview", frames)
    except Overloaded:
        return False
    return True


@pytest.mark.parametrize("frames", [1, 4, 100])
def test_equals_wait_for_each_other_as_long_as_each_takes_itself_or_the_time_that_is_nothing(
    admitting: Sequences, frames: int
) -> None:
    with ExitStack() as stack:
        for _ in range(1 + max(1, round(QUEUE_S / FRAME_S) // frames)):
            stack.enter_context(admitting.admitted(AVATAR, "preview", frames))
        with pytest.raises(Overloaded) as refused:
            stack.enter_context(admitting.admitted(AVATAR, "preview", frames))
        assert refused.value.headers["Retry-After"] == "2" if frames == 100 else "1"


def test_under_overload_equals_are_computed_nearly_one_after_the_other(admitting: Sequences, clock: Clock) -> None:
    waited, running, began = [], [], clock.now
    for _ in range(3000):  # a frame of the oldest one, and meanwhile a few more ask
        for _ in range(3):
            with ExitStack() as stack:
                try:
                    one = stack.enter_context(admitting.admitted(AVATAR, "preview", 100))
                    waited.append((clock.now - began, sum(other.frames_left for _, other in running) * FRAME_S))
                    running.append((stack.pop_all(), one))
                except Overloaded:
                    pass
        clock.now += FRAME_S
        running[0][1].frames_left -= 1
        if not running[0][1].frames_left:
            running.pop(0)[0].close()
    assert len(waited) >= 3000 / 100  # the engine never stood still
    first = [delay_s for at_s, delay_s in waited if at_s == 0]
    assert (len(first), max(first)) == (2, 1.0)  # before anybody was refused
    assert 0 < max(delay_s for at_s, delay_s in waited if at_s) <= UNDER_OVERLOAD  # of the second that each takes
    for stack, _ in running:
        stack.close()


def test_an_overload_begins_when_most_are_refused_and_is_forgotten(admitting: Sequences, clock: Clock) -> None:
    with admitting.admitted(AVATAR, "preview", 100) as one, admitting.admitted(AVATAR, "preview", 100) as other:
        for refused in range(1, 6):
            one.frames_left, other.frames_left = 90, 20
            assert not admits(admitting, 100)
            one.frames_left, other.frames_left = 20, 20  # 0.4 s of the second that it would take
            assert admits(admitting, 100) == (refused <= 3)  # two were admitted, and one is a beginning
        one.frames_left, other.frames_left = 5, 4
        assert admits(admitting, 100)
        one.frames_left, other.frames_left = 20, 20
        clock.now += 3 * OVERLOAD_S
        assert admits(admitting, 100)


@pytest.mark.parametrize("burst", [0, 30])
def test_an_engine_that_is_half_busy_refuses_hardly_any_whatever_came_before(
    admitting: Sequences, clock: Clock, burst: int
) -> None:
    """As it would if each refusal made the next one likelier."""
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.exponential(2 * 5 * FRAME_S, 2000))  # five frames each
    running: list[tuple[ExitStack, Any]] = []
    done = refused = 0

    def ask() -> bool:
        with ExitStack() as stack:
            try:
                one = stack.enter_context(admitting.admitted(AVATAR, "preview", 5))
            except Overloaded:
                return False
            running.append((stack.pop_all(), one))
            return True

    for _ in range(burst):
        ask()
    began = clock.now
    while done < len(arrivals) or running:
        while done < len(arrivals) and began + arrivals[done] <= clock.now:
            refused += not ask()
            done += 1
        clock.now += FRAME_S
        if running:
            running[0][1].frames_left -= 1
            if not running[0][1].frames_left:
                running.pop(0)[0].close()
    assert refused <= 0.1 * len(arrivals)


def test_longer_ones_shut_nobody_out_unless_they_are_very_many(admitting: Sequences) -> None:
    with ExitStack() as stack:
        for frames in (10_000, 9_000, 8_000):
            one = stack.enter_context(admitting.admitted(AVATAR, "preview", frames))
            one.frames_left = 700
        for _ in range(20):
            assert not admits(admitting, 1000)  # an overload, from now on
        for frames in (1, 10, 699):
            assert admits(admitting, frames)
        for _ in range(MOST_TOGETHER - 3):
            stack.enter_context(admitting.admitted(AVATAR, "preview", 600))
        assert admits(admitting, 599)
        stack.enter_context(admitting.admitted(AVATAR, "preview", 599))
        assert not admits(admitting, 598)
        assert admits(admitting, 1)


def test_those_whose_clients_do_not_read_are_not_waited_for(admitting: Sequences, clock: Clock) -> None:
    with ExitStack() as stack:
        for _ in range(2):
            one = stack.enter_context(admitting.admitted(AVATAR, "preview", 100))
            one.taken_s = clock.now
        assert not admits(admitting, 100)
        clock.now += STALLED_S
        assert admits(admitting, 100)


def test_asking_admits_nobody_and_those_who_ended_are_forgotten(admitting: Sequences) -> None:
    with admitting.admitted(AVATAR, "preview", 100):
        assert all(admits(admitting, 100) for _ in range(5))
    assert len(admitting) == 0
