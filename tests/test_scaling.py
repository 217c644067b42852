"""Laws of the queueing model behind docs/scaling.md, and its tables as they are printed.

That the model agrees with a real service is seen by `scripts/simulate-scale --check`: it takes minutes.
"""

import importlib.util
import json
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
COSTS: dict[str, Any] = {
    "vertices": {"preview": 5000}, "engine_s": {"preview": [0.002, 0.006]}, "encode_s": {"preview": {"q16": 0.0003}},
    "spread": [1.0],
    "by_streams": {
        "pose_s": [0.0003, 0.0003], "frame_s": [0.0005, 0.0005], "client_pose_s": [0.0002, 0.0002],
        "client_frame_s": [0.0004, 0.0004], "handoff_s": [0.0, 0.0], "wire_s": [0.001, 0.001],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    loader = SourceFileLoader("simulate_scale", str(ROOT / "scripts" / "simulate-scale"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module


def test_a_stream_alone_waits_for_nobody(scale: ModuleType) -> None:
    found = scale.simulate(COSTS, 1, client=True)
    # Pose of the client, the way, pose, engine, frame and its coding, frame of the client.
    assert found["mean_ms"] == pytest.approx(0.2 + 1.0 + 0.3 + 8.0 + 0.5 + 0.3 + 0.4)
    assert found["p99_ms"] == pytest.approx(found["mean_ms"])
    assert found["frames_per_s"] == pytest.approx(scale.FPS, rel=0.01)
    assert found["engine"] == pytest.approx(30 * 0.008 / scale.PLACES, rel=0.01)


def test_a_full_engine_gives_what_it_can_and_drops_the_rest(scale: ModuleType) -> None:
    found = scale.simulate(COSTS, 12, cores=4)
    assert found["frames_per_s"] == pytest.approx(scale.PLACES / 0.008, rel=0.02)
    assert found["dropped_pct"] == pytest.approx(100 * (1 - scale.PLACES * 125 / 360), abs=2)
    assert found["engine"] == pytest.approx(1, rel=0.01)


def test_frames_of_one_avatar_share_what_a_batch_costs(scale: ModuleType) -> None:
    shared = scale.simulate(COSTS, 12, one_avatar=True, cores=4)["frames_per_s"]
    # Batches that have the engine for about 25 ms, which two share: 3 to 7 frames.
    assert scale.PLACES * 3 / 0.020 * 0.97 < shared < scale.PLACES * 7 / 0.044 * 1.03


def test_a_slow_event_loop_is_the_limit_instead(scale: ModuleType) -> None:
    found = scale.simulate(_with(frame_s=[0.02, 0.02]), 12)
    assert found["loop"] > 0.99
    assert found["frames_per_s"] < 1 / 0.02


def test_costs_lie_between_those_of_one_stream_and_of_many(scale: ModuleType) -> None:
    costs = _with(frame_s=[0.008, 0.001])
    alone, two, many, more = (
        scale.among(costs, streams)["frame_s"] for streams in (1, 2, scale.TOGETHER, 2 * scale.TOGETHER)
    )
    assert alone == pytest.approx(0.008)
    assert many == pytest.approx(0.001)
    assert two == pytest.approx(0.001 + 0.007 * (1 / 2 - 1 / scale.TOGETHER) / (1 - 1 / scale.TOGETHER))
    assert 0 < more < many
    assert scale.simulate(costs, 1, client=True)["mean_ms"] == pytest.approx(0.2 + 1.0 + 0.3 + 8.0 + 8.0 + 0.3 + 0.4)


def _with(**by_streams: list[float]) -> dict[str, Any]:
    return COSTS | {"by_streams": COSTS["by_streams"] | by_streams}


def test_on_one_core_threads_slow_each_other(scale: ModuleType) -> None:
    alone, shared = (scale.simulate(COSTS, 12, cores=cores) for cores in (2, 1))
    # All that is done for a frame and for the poses that are sent for it, one after the other.
    assert scale.PLACES * shared["engine"] + shared["loop"] == pytest.approx(1, rel=0.01)
    assert shared["frames_per_s"] < 0.9 * alone["frames_per_s"]


def test_who_would_wait_too_long_is_refused(scale: ModuleType) -> None:
    found = scale.simulate(COSTS, 60, cores=4)
    assert found["p99_ms"] < 1e3 * (scale.QUEUE_S + 0.1)


def test_the_tables_are_those_of_the_recorded_measurements(scale: ModuleType) -> None:
    printed = scale.tables(json.loads(scale.RECORDED.read_text()))
    text = (ROOT / "docs" / "scaling.md").read_text()
    for table in printed.split("\n\n"):
        assert table.strip() in text, f"scripts/simulate-scale says\n{table}"
