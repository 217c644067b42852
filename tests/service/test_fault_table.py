"""Every row of the table of faults has a test that provokes it."""

import re
from pathlib import Path

import pytest

FAULTS = {
    1: "a pose or translation is NaN or infinite",
    2: "poses of a wrong width, wrong joints, or ragged",
    3: "a matrix that is no rotation, a quaternion of zero, angles and translations out of range",
    4: "no frames",
    5: "a sequence that is too long",
    6: "a body above the limit, a lying length, a flood of chunks, a compressed bomb",
    7: "an .npz with objects, or a pickle",
    8: "an .npz that claims terabytes, inflates without end, or has thousands of members",
    9: "an .npz whose member is a path",
    10: "a graph that reaches out: external data, own operators, control flow",
    11: "a checkpoint with a huge header, or with tensors that overlap",
    12: "a zip or tar with traversal, links, devices, names that clash, or a bomb",
    13: "an id that is a path, or no name at all",
    14: "an avatar that is not there",
    15: "a bundle that was damaged on the disk",
    16: "uploads of one avatar at the same time",
    17: "more work than the machine can do",
    18: "a key that asks too often",
    19: "a deadline that passed while waiting",
    20: "a client that leaves in the middle",
    21: "a client that reads slowly",
    22: "a connection of which one half is gone",
    23: "a flood of messages, or messages of the wrong kind",
    24: "idle connections and oversized headers",
    25: "no memory left on the device",
    26: "an engine that fails and goes on failing",
    27: "an answer of the graph that is not finite",
    28: "no GPU at the start",
    29: "Redis gone, slow, restarting, full, or with values of the wrong type",
    30: "a full disk",
    31: "SIGTERM under load",
    32: "SIGKILL in the middle of an upload or a job",
    33: "an event loop blocked by large JSON",
    34: "JSON nested without end",
    35: "no key, a wrong one, or one for another plane",
    36: "a WebSocket opened by a page of another host",
    37: "odd frame rates, and a clock that jumps",
    38: "control letters in ids, headers and logs",
}
_NAME = re.compile(r"^(?:async )?def test_fault_(\d\d)_", re.MULTILINE)


@pytest.fixture(scope="module")
def tested() -> set[int]:
    sources = Path(__file__).parents[1].rglob("test_*.py")
    return {int(number) for source in sources for number in _NAME.findall(source.read_text())}


@pytest.mark.parametrize("number", FAULTS, ids=lambda number: f"{number:02d}")
def test_every_fault_is_provoked(tested: set[int], number: int) -> None:
    assert number in tested, f"no test_fault_{number:02d}_... provokes: {FAULTS[number]}"


def test_every_number_is_in_the_table(tested: set[int]) -> None:
    assert tested <= set(FAULTS)
