"""What `scripts/simulate-scale` is told of this machine: costs of frames, streams and bytes, and a service under load.

The engine and the service run on one thread each, with `avatars/open` at `preview` where nothing else is said.
"""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from service.bench import _commit, _machine, motion_transforms
from service.bundle.files import read_bundle
from service.client import AsyncClient
from service.engine import OnnxEngine
from service.frames import FrameEncoder
from service.load import Motion, live_streams

ROOT = Path(__file__).resolve().parent.parent
BUNDLE, MOTION = ROOT / "avatars" / "open", ROOT / "assets" / "demo-motion.npz"
BATCHES = (1, 2, 4, 8)
REPEATS, SPREAD_REPEATS, FRAMES = 25, 300, 40
ALONE_S, LOADED_S = 10.0, 20.0
Delays = list[tuple[float, float]]
"""Of each frame, seconds from the sending of its pose to its coming, and of those until it was computed."""
POSES_A_S = 100.0
"""Of a stream that is sent poses and hardly any frames."""


def costs(fps: float, codecs: Iterable[str], together: int) -> dict[str, Any]:
    """Everything that the model needs; seconds and bytes.

    Args:
        together: streams; what depends on their number is measured with one and with so many.
    """
    bundle = read_bundle(BUNDLE)
    engine = OnnxEngine(bundle.repose_onnx, threads=1, cpu_only=True)
    bones, roots = motion_transforms(bundle, MOTION)
    found: dict[str, Any] = {"machine": _machine(), "commit": _commit(), "avatar": bundle.manifest.id}
    found |= {name: {} for name in ("vertices", "engine_s", "bytes", "encode_s")}
    for lod, mesh in bundle.meshes.items():

        def repose(frames: int, points: Any = mesh.vertices) -> Any:
            return engine.repose(points, bones[:frames], roots[:frames])

        times = [typical(seconds_of(lambda n=n: repose(n), REPEATS)) for n in BATCHES]
        frame_s = min(times[0], max(0.0, (times[-1] - times[0]) / (BATCHES[-1] - BATCHES[0])))
        found["vertices"][lod], found["engine_s"][lod] = len(mesh.vertices), [times[0] - frame_s, frame_s]
        coded = {codec: encoded(codec, repose(FRAMES), roots[:FRAMES, :3, 3]) for codec in codecs}
        found["encode_s"][lod] = {codec: seconds for codec, (seconds, _) in coded.items()}
        found["bytes"][lod] = {codec: size for codec, (_, size) in coded.items()}
    preview = bundle.meshes["preview"].vertices
    single = np.array(seconds_of(lambda: engine.repose(preview, bones[:1], roots[:1]), SPREAD_REPEATS))
    found["spread"] = (np.percentile(single, range(1, 100, 2)) / typical(single)).round(3).tolist()
    return found | service_costs(fps, found, together)


def seconds_of(action: Callable[[], Any], times: int) -> list[float]:
    """CPU time of each of so many calls, after one that is not counted."""
    spent = []
    for _ in range(times + 1):
        began = time.process_time()
        action()
        spent.append(time.process_time() - began)
    return spent[1:]


def typical(values: Any) -> float:
    """The lower quartile: other programs on the machine make some calls slower, and none faster."""
    return float(np.percentile(values, 25))


def encoded(codec: Any, frames: Any, pelvis: Any) -> tuple[float, int]:
    """Typical seconds and mean bytes of a frame, the first one not counted."""
    encoder, spent, sizes = FrameEncoder(codec), [], []
    for vertices, root in zip(frames, pelvis, strict=True):
        began = time.process_time()
        sizes.append(len(encoder.encode(vertices, root, seq=0, frame=0, last=False)))
        spent.append(time.process_time() - began)
    return typical(spent[1:]), round(float(np.mean(sizes[1:])))


def service_costs(fps: float, found: dict[str, Any], together: int) -> dict[str, Any]:
    """What event loop and client spend on a pose and on a frame, and what the ways between them take."""
    with serving() as (url, process):
        asyncio.run(streams_of(url, 1, fps, 2.0))
        both = [stream_costs(url, process, fps, found, streams) for streams in (1, together)]
        avatar_bytes = metric(url, "avatar_bytes") / metric(url, "avatars_loaded")
    for way in ("handoff_s", "wire_s"):
        # Ways do not get longer with more streams: what seems so is waiting, which the model does by itself.
        both[1][way] = min(costs[way] for costs in both)
    by_streams = {name: [costs[name] for costs in both] for name in both[0]}
    return {"by_streams": by_streams, "avatar_bytes": avatar_bytes}


def stream_costs(url: str, process: int, fps: float, found: dict[str, Any], streams: int) -> dict[str, float]:
    """Of each of so many streams of one avatar."""
    before = spent_s(process)
    asyncio.run(streams_of(url, streams, POSES_A_S, ALONE_S, max_fps=1.0))
    pose_s, client_pose_s = (spent_s(process) - before) / (streams * POSES_A_S * ALONE_S)
    before = spent_s(process)
    delays = asyncio.run(streams_of(url, streams, fps, ALONE_S))
    of_poses = streams * fps * ALONE_S * np.array([pose_s, client_pose_s])
    service_s, client_s = (spent_s(process) - before - of_poses) / len(delays)
    engine_s, encode_s = sum(found["engine_s"]["preview"]), found["encode_s"]["preview"]["q16"]
    frame_s, client_frame_s = max(0.0, service_s - engine_s - encode_s), max(0.0, client_s)
    # Ways are waited for, not worked on: those of the frames that nobody held up.
    whole_s, computed_s = np.percentile(delays, 5, axis=0).tolist()
    known_s = pose_s + client_pose_s + encode_s + frame_s + client_frame_s
    return {
        "pose_s": pose_s, "frame_s": frame_s, "client_pose_s": client_pose_s, "client_frame_s": client_frame_s,
        "handoff_s": max(0.0, computed_s - engine_s), "wire_s": max(0.0, whole_s - computed_s - known_s),
    }  # fmt: skip


async def streams_of(url: str, streams: int, per_s: float, seconds: float, **options: Any) -> Delays:
    """What `one_stream` tells, of so many that begin one after the other."""
    starts = [n / (streams * per_s) for n in range(streams)]
    told = await asyncio.gather(*(one_stream(url, per_s, seconds, start, **options) for start in starts))
    return [delay for stream in told for delay in stream]


async def one_stream(
    url: str, per_s: float, seconds: float, start_s: float, **options: Any
) -> list[tuple[float, float]]:
    """Send poses; of each frame the delay since its pose was sent, and the time until it was computed."""
    delays = []

    async def receive() -> None:
        while (frame := await stream.receive(30.0)) is not None:
            delays.append((1e-6 * (time.monotonic_ns() // 1000 - frame.client_us), 1e-6 * frame.server_us))

    motion = Motion.read(MOTION)
    async with AsyncClient(url) as client, client.stream("open", "live", lod="preview", **options) as stream:
        receiving = asyncio.create_task(receive())
        await asyncio.sleep(start_s)
        began = time.monotonic()
        for n in range(int(per_s * seconds)):
            await asyncio.sleep(began + n / per_s - time.monotonic())
            await stream.send(motion.poses[n % len(motion.poses)], motion.translation[n % len(motion.poses)])
        await stream.end()
        await receiving
    return delays


def loaded(fps: float, counts: Iterable[int]) -> Iterator[tuple[int, float, dict[str, float]]]:
    """So many streams of one avatar, the cores that are free for them, and what they get from a real service, its
    clients on the same machine."""
    with serving() as (url, _):
        asyncio.run(live(url, 1, fps, 2.0))
        for streams in counts:
            before = free_cores()
            delays = np.array(asyncio.run(live(url, streams, fps, LOADED_S)))
            rate = len(delays) / LOADED_S
            yield streams, (before + free_cores()) / 2, {
                "frames_per_s": rate, "mean_ms": 1e3 * delays.mean(), "p99_ms": 1e3 * np.percentile(delays, 99),
                "dropped_pct": max(0.0, 100 * (1 - rate / (fps * streams))),
            }  # fmt: skip


def free_cores() -> float:
    """The CPU time that as many busy programs as there are cores get in a second: less where others are at work."""
    program = (
        "import time; t = time.perf_counter()\nwhile time.perf_counter() < t + 2: pass\nprint(time.process_time() / 2)"
    )
    command = [sys.executable, "-c", program]
    spinning = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in os.sched_getaffinity(0)]
    return sum(float(process.communicate()[0]) for process in spinning)


async def live(url: str, streams: int, fps: float, seconds: float) -> list[float]:
    """The delays of all frames of live streams."""
    received = await live_streams(url, "open", Motion.read(MOTION), streams, fps, seconds)
    return [frame.delay_s for frames in received for frame in frames]


@contextmanager
def serving() -> Iterator[tuple[str, int]]:
    """`reposer serve` with one thread for the engine: its URL and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "service", "serve", "--cpu", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"REPOSER_THREADS": "1"}, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                httpx.get(f"{url}/readyz", timeout=10).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def spent_s(process: int) -> Any:
    """(2,): seconds of CPU so far of the service and of this process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return np.array([(int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), time.process_time()])


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"reposer_{name} "))
