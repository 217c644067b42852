"""Who is admitted beside whom: equals wait a little for each other, under overload hardly; nobody for long ones."""

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from service import sequences
from service.errors import Overloaded
from service.metrics import Metrics
from service.sequences import OVERLOADED_S, STALLED_S, UNDER_OVERLOAD, Sequences

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
    for _ in range(3000):  # a frame of the oldest one, and meanwhile two more ask
        for _ in range(2):
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


def test_an_overload_is_over_when_nobody_was_refused_for_a_while(admitting: Sequences, clock: Clock) -> None:
    with admitting.admitted(AVATAR, "preview", 100) as one, admitting.admitted(AVATAR, "preview", 100) as other:
        assert not admits(admitting, 100)
        one.frames_left, other.frames_left = 5, 40
        for _ in range(10):  # refusing goes on, and so does the overload
            clock.now += 0.9 * OVERLOADED_S
            assert not admits(admitting, 100)
        other.frames_left = 5
        assert admits(admitting, 100)
        other.frames_left = 40
        clock.now += OVERLOADED_S
        assert admits(admitting, 100)


def test_longer_ones_shut_nobody_out(admitting: Sequences) -> None:
    with ExitStack() as stack:
        for frames in (10_000, 9_000, 8_000):
            one = stack.enter_context(admitting.admitted(AVATAR, "preview", frames))
            one.frames_left = 700
        assert not admits(admitting, 1000)  # an overload, from now on
        for frames in (1, 10, 699):
            assert admits(admitting, frames)


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
