"""`python -m service.bench_service`: what the service adds to its engine, written to `out/bench/service.json`.

The server is `reposer serve` on the CPU, a process of its own with its default settings and a real Redis; this process
is its client and measures the bare engine beside it, in turns, so that a busy machine slows both.
"""

import argparse
import asyncio
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from itertools import chain
from pathlib import Path
from statistics import mean, median
from typing import Any

import httpx
import numpy as np

from service import load
from service.bench import row, write_report
from service.bundle.files import Bundle, read_bundle
from service.bundle.manifest import DEFAULT_LOD
from service.bundle.skeleton import axis_angle_to_matrix
from service.client import Client
from service.engine import OnnxEngine, repose_in_batches
from service.frames import frame_bytes
from service.load import Motion
from service.poses import PoseSequence

START_S = 120.0
STOP_S = 30.0
LIVE_FPS = 30.0
REPEATS_A_TURN = 5
"""Of a cached answer."""
REST_S = 0.2
"""After which a virtual machine has to wake up, whatever is asked."""
_ONCE = httpx.Limits(max_keepalive_connections=0)
HTTP = httpx.Client(trust_env=False, verify=False, timeout=10, limits=_ONCE)
"""Made once: that takes longer than its requests."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How long the parts take."""

    sequence_frames: int = 250
    repeats: int = 9
    """Turns of what is compared."""
    stream_s: float = 10.0
    """Of each of `repeats` live streams, and of those that share the machine."""
    streams: int = 8
    request_frames: int = 60
    """Of each request of the overload: two seconds of motion."""
    calm_requests: int = 300
    """Of a hundred, the 99th percentile is but the second slowest."""
    overload: float = 10.0
    """Times what the service can do."""
    overload_s: float = 60.0


@dataclass(frozen=True)
class Server:
    """The process that is measured."""

    url: str
    process: subprocess.Popen[bytes]


def main() -> None:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(prog="python -m service.bench_service", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("avatars/open"))
    parser.add_argument("--motion", type=Path, default=Path("assets/demo-motion.npz"))
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parsed = parser.parse_args()
    sizes = Sizes(**{name: getattr(parsed, name) for name in vars(Sizes())})
    write_report(parsed.out / "service.json", service_rows(parsed.bundle, parsed.motion, sizes))


def service_rows(bundle_path: Path, motion_path: Path, sizes: Sizes) -> list[Row]:
    """All rows; starts the server and Redis, and stops them."""
    bundle, motion = read_bundle(bundle_path), Motion.read(motion_path)
    engine = BareEngine(bundle)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis_url = stack.enter_context(redis(folder))
        server = stack.enter_context(serving(bundle_path.resolve().parent, folder, redis_url))
        return [
            *rest_rows(server, engine, motion, sizes),
            *cache_rows(server, bundle, motion, sizes),
            *stream_rows(server, engine, motion, sizes),
            *fairness_rows(server, bundle.manifest.id, motion, sizes),
            # Last, when the caches are full: what the server weighs then is not to grow.
            *overload_rows(server, bundle.manifest.id, motion, sizes),
        ]


class BareEngine:
    """What the server has inside, without the server."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self._engine = bundle, OnnxEngine(bundle.repose_onnx, cpu_only=True)

    def seconds(self, motion: Motion, lod: str, most_frames: int) -> list[float]:
        """Of each batch of a sequence: 1, 2, 4 and so on frames, up to `most_frames`."""
        vertices = self.bundle.meshes[lod].vertices
        rotations = axis_angle_to_matrix(motion.poses.reshape(-1, 24, 3)).astype(np.float32)
        poses = PoseSequence(rotations, motion.translation, LIVE_FPS, "y", "m", "matrix")
        budget = most_frames * len(vertices)
        return [b.seconds for b in repose_in_batches(self._engine, self.bundle.skeleton, vertices, poses, budget)]

    def paced_seconds(self, motion: Motion, lod: str, fps: float) -> list[float]:
        """Of each frame, asked for at this rate: a core that has slept in between is slower than one that has not."""
        vertices, skeleton = self.bundle.meshes[lod].vertices, self.bundle.skeleton
        rotations = axis_angle_to_matrix(motion.poses.reshape(-1, 24, 3)).astype(np.float32)
        spent, began = [], time.perf_counter()
        for n, (rotation, translation) in enumerate(zip(rotations, motion.translation, strict=True)):
            time.sleep(max(0.0, began + n / fps - time.perf_counter()))
            started = time.perf_counter()
            bones = skeleton.bone_transforms(rotation[None])
            self._engine.repose(vertices, bones, skeleton.root_transforms(rotation[None], translation[None]))
            spent.append(time.perf_counter() - started)
        return spent


def rest_rows(server: Server, engine: BareEngine, motion: Motion, sizes: Sizes) -> list[Row]:
    """A sequence over HTTP, received and received and decoded, and the same in the engine, in turns; the first turn is
    not counted."""
    avatar, frame = engine.bundle.manifest.id, _frame_bytes(engine.bundle)
    http, http_first, decoded, bare, bare_batch, batches = [], [], [], [], [], []
    with _plain_client(server) as plain, Client(server.url, retries=0) as client:
        for _ in range(sizes.repeats + 1):
            sequence = motion.of_length(sizes.sequence_frames)
            before = _bulk_batches(server)
            first, whole = load.received_seconds(plain, avatar, sequence, frame)
            frames, count = np.subtract(_bulk_batches(server), before)
            largest = math.ceil(frames / count)
            seconds = engine.seconds(sequence, DEFAULT_LOD, largest)
            http.append(whole)
            http_first.append(first)
            decoded.append(load.decoded_seconds(client, avatar, motion.of_length(sizes.sequence_frames)))
            bare.append(sum(seconds))
            bare_batch.append(max(seconds[-2], seconds[-1]))
            batches.append(largest)
    figures = [median(values[1:]) for values in (http, http_first, decoded, bare, bare_batch, batches)]
    whole, first, seen, engine_whole, engine_batch, largest = figures
    return [
        row("rest_s", whole, "s"),
        row("rest_decoded_s", seen, "s"),
        row("rest_engine_s", engine_whole, "s"),
        row("rest_frames_a_batch", largest, "frames"),
        row("rest_over_engine", whole / engine_whole, "ratio", 1.25, at_least=False),
        row("rest_decoded_over_engine", seen / engine_whole, "ratio"),
        row("rest_first_frame_ms", 1000 * first, "ms"),
        row("rest_first_frame_over_engine_batch", first / engine_batch, "ratio", 2.0, at_least=False),
    ]


def cache_rows(server: Server, bundle: Bundle, motion: Motion, sizes: Sizes) -> list[Row]:
    """A sequence once, then again and again, without a rest as before the first time, and once after one; the first
    turn is not counted."""
    computed, repeated, rested = [], [], []
    with _plain_client(server) as client:
        for _ in range(sizes.repeats + 1):
            order = client, bundle.manifest.id, motion.of_length(sizes.sequence_frames), _frame_bytes(bundle)
            computed.append(load.received_seconds(*order)[1])
            # It is put into the cache behind its last byte: the first of these may be too early.
            for _ in range(2):
                load.received_seconds(*order, x_cache=None)
            repeated.append(median(load.received_seconds(*order, x_cache="hit")[1] for _ in range(REPEATS_A_TURN)))
            time.sleep(REST_S)
            rested.append(load.received_seconds(*order, x_cache="hit")[1])
    figures = [median(values[1:]) for values in (computed, repeated, rested)]
    whole, repeat, after_rest = figures
    return [
        row("cache_computed_ms", 1000 * whole, "ms"),
        row("cache_repeat_ms", 1000 * repeat, "ms"),
        row("cache_speedup", whole / repeat, "ratio", 20.0),
        row("cache_repeat_after_rest_ms", 1000 * after_rest, "ms"),
        row("cache_speedup_after_rest", whole / after_rest, "ratio"),
    ]


def _plain_client(server: Server) -> closing[HTTPConnection]:
    return closing(HTTPConnection(server.url.removeprefix("http://"), timeout=60))


def _frame_bytes(bundle: Bundle) -> int:
    return frame_bytes(len(bundle.meshes[DEFAULT_LOD].vertices), "q16")


def stream_rows(server: Server, engine: BareEngine, motion: Motion, sizes: Sizes) -> list[Row]:
    """One live stream, and the engine's frames at the same rate, in turns."""
    avatar, turns = engine.bundle.manifest.id, []
    ticks = _processor_ticks()
    for _ in range(sizes.repeats):
        alone = engine.paced_seconds(motion.of_length(math.ceil(LIVE_FPS * sizes.stream_s)), "preview", LIVE_FPS)
        (received,) = asyncio.run(load.live_streams(server.url, avatar, motion, 1, LIVE_FPS, sizes.stream_s))
        turns.append((alone, [frame.delay_s for frame in received]))
    frames, delays = (list(chain.from_iterable(part)) for part in zip(*turns, strict=True))
    # What was promised is of all turns together.  The host of a virtual machine may take it away for seconds, and the
    # slowest hundredth are then those of one turn: the middle one and the worst tell that from a slow service.
    overheads = [1000 * (_p99(delayed) - median(alone)) for alone, delayed in turns]
    return [
        row("ws_engine_frame_ms", 1000 * median(frames), "ms"),
        row("ws_engine_frame_p99_ms", 1000 * _p99(frames), "ms"),
        row("ws_live_median_ms", 1000 * median(delays), "ms"),
        row("ws_live_p99_ms", 1000 * _p99(delays), "ms"),
        row("ws_live_p99_overhead_ms", 1000 * (_p99(delays) - median(frames)), "ms", 5.0, at_least=False),
        row("ws_live_p99_overhead_middle_turn_ms", median(overheads), "ms"),
        row("ws_live_p99_overhead_worst_turn_ms", max(overheads), "ms"),
        # This one leaves out what the machine does to the engine too.
        row("ws_live_p99_over_engine_p99_ms", 1000 * (_p99(delays) - _p99(frames)), "ms"),
        row("ws_host_steal_pct", _steal_pct(ticks), "%"),
    ]


def fairness_rows(server: Server, avatar: str, motion: Motion, sizes: Sizes) -> list[Row]:
    """Several live streams, which together want more than there is."""
    streams = asyncio.run(load.live_streams(server.url, avatar, motion, sizes.streams, LIVE_FPS, sizes.stream_s))
    counts = [len(stream) for stream in streams]
    received = sorted((frame.at_s, frame.delay_s) for stream in streams for frame in stream)
    third = max(1, len(received) // 3)
    early, late = (median(delay for _, delay in part) for part in (received[:third], received[-third:]))
    return [
        row("ws_shared_fps", mean(counts) / sizes.stream_s, "frames/s"),
        row("ws_fairness_min", min(counts) / mean(counts), "ratio", 0.7),
        row("ws_shared_delay_p99_ms", 1000 * _p99([delay for _, delay in received]), "ms"),
        # "Never by growing delay": half as much again is left to chance.
        row("ws_delay_late_over_early", late / early, "ratio", 1.5, at_least=False),
    ]


def overload_rows(server: Server, avatar: str, motion: Motion, sizes: Sizes) -> list[Row]:
    """Short sequences from one client at a time, then many times as many as that."""
    calm = asyncio.run(load.one_by_one(server.url, avatar, motion, sizes.request_frames, sizes.calm_requests))
    if not calm.accepted:
        raise RuntimeError(f"the service does not answer: {calm.failed[:1]}")
    before = load.resident_bytes(server.process.pid)
    rate = sizes.overload / median(calm.accepted)
    frames, process, ticks = sizes.request_frames, server.process.pid, _processor_ticks()
    busy = asyncio.run(load.at_a_rate(server.url, avatar, motion, frames, rate, sizes.overload_s, process))
    for failure in sorted(set(busy.failed))[:5]:
        print(f"failed under overload: {failure}", file=sys.stderr)
    growth = 100 * (max(busy.server_bytes) / before - 1) if before else None
    refusal_ms = 1000 * _p99(busy.refused) if busy.refused else None
    ratio = _p99(busy.accepted) / _p99(calm.accepted) if busy.accepted else None
    crashes = len(calm.failed) + len(busy.failed) + (server.process.poll() is not None)
    return [
        row("overload_offered_per_s", rate, "requests/s"),
        row("overload_accepted", len(busy.accepted), "requests"),
        row("overload_refused", len(busy.refused), "requests"),
        row("overload_calm_p99_ms", 1000 * _p99(calm.accepted), "ms"),
        row("overload_p99_ratio", ratio, "ratio", 2.0, at_least=False),
        row("overload_refusal_ms", refusal_ms, "ms", 20.0, at_least=False),
        row("rss_growth_pct", growth, "%", 10.0, at_least=False),
        row("overload_crashes", crashes, "failures", 0, at_least=False),
        row("overload_host_steal_pct", _steal_pct(ticks), "%"),
    ]


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    """A Redis of our own that keeps nothing on the disk; its URL."""
    port = _free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with _running(command, dict(os.environ), folder / "redis.log") as process:
        _wait(process, folder / "redis.log", lambda: socket.create_connection(("127.0.0.1", port), timeout=1).close())
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def serving(bundles: Path, folder: Path, redis_url: str) -> Iterator[Server]:
    """`reposer serve`, ready."""
    port = _free_port()
    command = [sys.executable, "-m", "service", "serve", "--cpu", "--bundles", str(bundles), "--port", str(port)]
    # Settings of whoever calls are not those that are to be measured.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REPOSER_")}
    environment |= {"REPOSER_REDIS_URL": redis_url, "REPOSER_JOBS_DIR": str(folder / "jobs")}
    with _running(command, environment, folder / "server.log") as process:
        url = f"http://127.0.0.1:{port}"
        _wait(process, folder / "server.log", lambda: HTTP.get(f"{url}/readyz").raise_for_status())
        yield Server(url, process)


@contextmanager
def _running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], log: Path, ready: Callable[[], Any]) -> None:
    until = time.monotonic() + START_S
    while True:
        try:
            ready()
            return
        except (OSError, httpx.HTTPError) as error:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{log.stem} does not start: {error}\n{log.read_text()[-2000:]}") from error
            time.sleep(0.05)


def _bulk_batches(server: Server) -> tuple[float, float]:
    """Frames and batches of sequences that the server has computed so far."""
    text = HTTP.get(f"{server.url}/metrics").text
    found = dict(re.findall(r'^reposer_batch_frames_(sum|count)\{line="bulk"\} (\S+)', text, re.MULTILINE))
    return float(found.get("sum", 0)), float(found.get("count", 0))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _processor_ticks() -> list[int]:
    """What all cores have done so far, by kind; the eighth is what their host took away.  Linux only, else empty."""
    try:
        return [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    except OSError:
        return []


def _steal_pct(before: list[int]) -> float | None:
    """Of the time that the cores could have worked: what a machine that is not ours alone lost to others since."""
    spent = np.subtract(_processor_ticks(), before)
    return 100 * float(spent[7] / spent.sum()) if spent.any() else None


def _p99(values: list[float]) -> float:
    return float(np.percentile(values, 99))


if __name__ == "__main__":
    main()
