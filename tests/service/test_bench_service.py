"""The benchmark of the service: all of it, at tiny sizes, on a real server and a real Redis; no timing is judged."""

import io
import json
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service import bench_service, load
from service.bench import write_report
from service.bench_service import Sizes

TINY = Sizes(
    sequence_frames=6,
    repeats=1,
    stream_s=0.4,
    streams=2,
    request_frames=3,
    calm_requests=3,
    overload=2.0,
    overload_s=0.3,
)
TARGETS = {
    "rest_over_engine": 1.25,
    "rest_first_frame_over_engine_batch": 2.0,
    "cache_speedup": 20.0,
    "ws_live_p99_overhead_ms": 5.0,
    "ws_fairness_min": 0.7,
    "ws_delay_late_over_early": 1.5,
    "overload_p99_ratio": 2.0,
    "overload_refusal_ms": 20.0,
    "rss_growth_pct": 10.0,
    "overload_crashes": 0,
}


@pytest.fixture(scope="module")
def motion_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("motion") / "motion.npz"
    rng = np.random.default_rng(3)
    np.savez(path, poses=rng.normal(0, 0.3, (5, 72)).astype(np.float32), trans=np.zeros((5, 3), np.float32))
    return path


def test_every_promise_of_the_service_is_a_row_with_its_target_in_order(
    bundle_dir: Path, motion_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPOSER_MAX_FRAMES", "1")  # of whoever calls: not for the server that is measured
    started: list[Any] = []
    popen: Any = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    rows = bench_service.service_rows(bundle_dir / "tiny", motion_file, TINY)
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)

    write_report(tmp_path / "bench" / "service.json", rows)
    found = json.loads((tmp_path / "bench" / "service.json").read_text())["rows"]
    judged = {entry["name"]: entry["target"] for entry in found if entry["target"] is not None}
    assert list(judged.items()) == list(TARGETS.items())
    values = {entry["name"]: entry["value"] for entry in found}
    assert values["overload_crashes"] == 0
    assert values["overload_accepted"] >= 1
    assert 0 < values["ws_fairness_min"] <= 1
    assert values["overload_host_steal_pct"] is None or 0 <= values["overload_host_steal_pct"] <= 100
    assert all(value is None or np.isfinite(value) for value in values.values())


def test_a_server_that_dies_is_a_crash_and_not_a_refusal(motion_file: Path) -> None:
    motion = load.Motion.read(motion_file)
    nobody = "http://127.0.0.1:9"
    answered = bench_service.asyncio.run(load.one_by_one(nobody, "tiny", motion, frames=2, count=1))
    assert (answered.accepted, answered.refused, len(answered.failed)) == ([], [], 1)


class _Answering:
    """A connection on which everything is answered like this."""

    def __init__(self, body: bytes, x_cache: str) -> None:
        self.status, self.headers, self._body = 200, {"X-Cache": x_cache}, io.BytesIO(body)

    def request(self, *_: Any) -> None: ...

    def getresponse(self) -> Any:
        return self

    def readinto(self, into: memoryview) -> int:
        return self._body.readinto(into)


@pytest.mark.parametrize(
    ("x_cache", "expected", "frames", "counts"),
    [
        ("hit", "hit", 7, True),
        ("miss", "miss", 7, True),
        ("hit", None, 7, True),
        ("hit", "miss", 7, False),
        ("miss", "hit", 7, False),
        ("hit", "hit", 6, False),
        ("hit", None, 8, False),
    ],
)
def test_only_the_whole_answer_from_where_it_is_expected_counts(
    motion_file: Path, x_cache: str, expected: str | None, frames: int, counts: bool
) -> None:
    connection: Any = _Answering(bytes(100 * frames), x_cache)
    motion = load.Motion.read(motion_file).of_length(7)
    with nullcontext() if counts else pytest.raises(RuntimeError, match="expected 700 bytes"):
        first, whole = load.received_seconds(connection, "tiny", motion, 100, x_cache=expected)
        assert 0 < first <= whole


def test_no_two_requests_are_the_same_to_a_cache(motion_file: Path) -> None:
    motion = load.Motion.read(motion_file)
    first, second = motion.of_length(7), motion.of_length(7)
    np.testing.assert_array_equal(first.poses, second.poses)
    np.testing.assert_array_equal(first.poses[5:], motion.poses[:2])
    assert (np.abs(first.translation - second.translation) > 1e-5).all()
