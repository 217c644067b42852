"""Who is admitted beside whom: nobody is kept waiting for longer than it can bear, and long ones shut nobody out."""

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from service.errors import Overloaded
from service.metrics import Metrics
from service.sequences import MOST_DELAY, Sequences

AVATAR: Any = SimpleNamespace(id="tiny")


@pytest.fixture
def sequences() -> Sequences:
    """10 ms a frame; 50 ms are nothing to anybody."""
    queue: Any = SimpleNamespace(pace=lambda avatar, lod: SimpleNamespace(seconds_per_frame=0.01))
    return Sequences(queue, 0.05, Metrics())


def test_under_any_load_of_equals_nobody_is_kept_waiting_for_longer_than_it_can_bear(sequences: Sequences) -> None:
    most, started, together = 0.0, 0, 0
    running: list[tuple[ExitStack, Any]] = []
    for _ in range(2000):  # a frame of one in turn, and each time another one asks
        with ExitStack() as stack:
            try:
                one = stack.enter_context(sequences.admitted(AVATAR, "preview", 100))
                running.append((stack.pop_all(), one))
                started += 1
            except Overloaded:
                pass
        most, together = max([most, *(one.delay_s for _, one in running)]), max(together, len(running))
        stack, one = running.pop(0)
        one.frames_left -= 1
        if one.frames_left:
            running.append((stack, one))
        else:
            stack.close()
    assert started >= 20  # 2000 frames of 100 each: the engine never stood still
    assert together >= 2
    assert 0 < most <= MOST_DELAY + 1e-9  # of a second, which each takes alone
    for stack, _ in running:
        stack.close()


def test_a_long_one_does_not_shut_out_short_ones(sequences: Sequences) -> None:
    with sequences.admitted(AVATAR, "preview", 1000) as long:
        for _ in range(500):
            with sequences.admitted(AVATAR, "preview", 5):
                pass
        assert long.delay_s > MOST_DELAY * long.own_s  # more than it would bear from its equals
        with pytest.raises(Overloaded):
            sequences.check(AVATAR, "preview", 1000)


def test_asking_changes_nothing_and_those_who_ended_are_forgotten(sequences: Sequences) -> None:
    with sequences.admitted(AVATAR, "preview", 100) as one:
        one.frames_left = int(100 * MOST_DELAY)
        for _ in range(5):
            sequences.check(AVATAR, "preview", 100)
        assert one.delay_s == 0
    assert len(sequences) == 0
