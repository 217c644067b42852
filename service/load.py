"""Load on a running service; `service.bench_service` makes figures of it.

Everything is bounded in count and time.  Each request has poses of its own, so that no cache answers by accident.
"""

import asyncio
import itertools
import time
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import numpy as np
from numpy.typing import NDArray

from service.client import AsyncClient, Client
from service.client.aio_stream import AsyncStream
from service.client.calls import frames_type, repose_call

MAX_IN_FLIGHT = 256
"""Requests not yet answered; above it, the load waits, and what it waits for shows in the times."""
FRAME_TIMEOUT_S = 30.0
RECEIVED_AT_ONCE = 1 << 18
MEMORY_INTERVAL_S = 0.25
_changes = itertools.count(1)


@dataclass(frozen=True)
class Motion:
    """What is posted."""

    poses: NDArray[np.float32]
    """(F, 72), axis-angle."""
    translation: NDArray[np.float32]
    """(F, 3), metres."""

    @classmethod
    def read(cls, path: Path) -> "Motion":
        """A motion file of ours."""
        with np.load(path, allow_pickle=False) as file:
            return cls(file["poses"].reshape(-1, 72).astype(np.float32), file["trans"].astype(np.float32))

    def of_length(self, frames: int) -> "Motion":
        """So many frames, from the beginning again where they end; moved a little, differently each time."""
        index = np.arange(frames) % len(self.poses)
        moved = self.translation[index] + np.float32(1e-4 * next(_changes))
        return Motion(self.poses[index], moved)


@dataclass
class Answered:
    """Times of requests, seconds."""

    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """What was neither an answer nor an honest refusal."""
    server_bytes: list[int] = field(default_factory=list)
    """Memory of the server, again and again meanwhile."""


@dataclass(frozen=True)
class Received:
    """A frame of a live stream."""

    at_s: float
    delay_s: float
    """From the sending of its pose."""


def received_seconds(
    http: HTTPConnection, avatar: str, motion: Motion, frame_bytes: int, x_cache: str | None = "miss"
) -> tuple[float, float]:
    """Seconds until the first and until the last frame of a sequence have come, as q16.

    With the standard library: httpx takes as long to receive a cached answer as the service takes to send it.

    Args:
        x_cache: how the service is to have come by the answer; None: in whatever way.
    """
    call = repose_call(avatar, motion.poses, motion.translation, frames_type("q16"), {})
    expected = frame_bytes * len(motion.poses)
    received = memoryview(bytearray(max(frame_bytes, RECEIVED_AT_ONCE)))
    began = time.perf_counter()
    http.request("POST", call.path, call.body, call.headers)
    answer = http.getresponse()
    size = answer.readinto(received[:frame_bytes])
    first = time.perf_counter() - began
    # Piece by piece into the same place: to be given memory for the whole takes a client as long as to receive it.
    while count := answer.readinto(received):
        size += count
    seconds = time.perf_counter() - began
    came_by = answer.headers["X-Cache"]
    if (answer.status, size, came_by) != (200, expected, x_cache or came_by):
        wanted = f"expected {expected} bytes, a {x_cache or 'hit or miss'}"
        raise RuntimeError(f"{wanted}; got {size} with status {answer.status}, {came_by}")
    return first, seconds


def decoded_seconds(client: Client, avatar: str, motion: Motion) -> float:
    """Seconds until the last frame of a sequence is decoded, as users of the client wait for it."""
    began = time.perf_counter()
    count = sum(1 for _ in client.repose(avatar, motion.poses, motion.translation, codec="q16"))
    if count != len(motion.poses):
        raise RuntimeError(f"expected {len(motion.poses)} frames, got {count}")
    return time.perf_counter() - began


async def live_streams(
    url: str, avatar: str, motion: Motion, count: int, fps: float, seconds: float
) -> list[list[Received]]:
    """What each of `count` live streams got, to which `fps` poses a second were sent."""
    async with AsyncClient(url, retries=0) as client:
        starts = [n / (count * fps) for n in range(count)]
        return await asyncio.gather(*(_live(client, avatar, motion, fps, seconds, start) for start in starts))


async def _live(
    client: AsyncClient, avatar: str, motion: Motion, fps: float, seconds: float, start_s: float
) -> list[Received]:
    received = []
    async with client.stream(avatar, "live", lod="preview", max_fps=4 * fps) as stream:
        await asyncio.sleep(start_s)
        sending = asyncio.create_task(_send(stream, motion, fps, seconds))
        while (frame := await stream.receive(FRAME_TIMEOUT_S)) is not None:
            now_us = time.monotonic_ns() // 1000
            received.append(Received(now_us / 1e6, (now_us - frame.client_us) / 1e6))
        await sending
    return received


async def _send(stream: AsyncStream, motion: Motion, fps: float, seconds: float) -> None:
    began = time.monotonic()
    for n in range(max(1, int(seconds * fps))):
        await asyncio.sleep(began + n / fps - time.monotonic())
        frame = n % len(motion.poses)
        await stream.send(motion.poses[frame], motion.translation[frame])
    await stream.end()


async def one_by_one(url: str, avatar: str, motion: Motion, frames: int, count: int) -> Answered:
    """Requests for short sequences, each after the one before."""
    answered = Answered()
    for request in _requests(url, avatar, motion, frames, count):
        await _ask(url, request, answered)
    return answered


async def at_a_rate(
    url: str, avatar: str, motion: Motion, frames: int, per_s: float, seconds: float, server: int
) -> Answered:
    """Requests for short sequences, `per_s` a second whatever becomes of them; `server` is the process to weigh."""
    answered, tasks = Answered(), set()
    requests = _requests(url, avatar, motion, frames, int(per_s * seconds))
    began = time.monotonic()
    weighing = asyncio.create_task(_weigh(server, answered))
    for n, request in enumerate(requests):
        await asyncio.sleep(began + n / per_s - time.monotonic())
        if time.monotonic() - began > seconds:
            break
        while len(tasks) >= MAX_IN_FLIGHT:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        tasks.add(task := asyncio.create_task(_ask(url, request, answered)))
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    weighing.cancel()
    return answered


def _requests(url: str, avatar: str, motion: Motion, frames: int, count: int) -> list[bytes]:
    """So many requests, each with a connection of its own, as they are sent.

    Made before, and by hand: the load has the same cores as the server, and with a client library what is measured
    under load is mostly that library.
    """
    made = []
    for _ in range(count):
        moved = motion.of_length(frames)
        call = repose_call(avatar, moved.poses, moved.translation, frames_type("q16"), {"lod": "preview"})
        length = {"Host": urlsplit(url).netloc, "Content-Length": str(len(call.body)), "Connection": "close"}
        head = [f"POST {call.path}?{urlencode(call.query)} HTTP/1.1", *map(": ".join, (call.headers | length).items())]
        made.append("\r\n".join([*head, "", ""]).encode() + call.body)
    return made


async def _ask(url: str, request: bytes, answered: Answered) -> None:
    """One request, from before its connection is opened to the last byte of the answer."""
    address = urlsplit(url)
    began = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1 << 20)
        with closing(writer):
            writer.write(request)
            status = int((await reader.readline()).split()[1])
            answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            await reader.readexactly(int(answer.partition("content-length:")[2].split()[0]))
        await writer.wait_closed()
    except Exception as error:  # whatever it is, it counts
        answered.failed.append(repr(error))
        return
    seconds = time.perf_counter() - began
    if status == 200:
        answered.accepted.append(seconds)
    elif status == 503:
        answered.refused.append(seconds)
    else:
        answered.failed.append(f"status {status}")


async def _weigh(server: int, answered: Answered) -> None:
    while True:
        answered.server_bytes.append(resident_bytes(server))
        await asyncio.sleep(MEMORY_INTERVAL_S)


def resident_bytes(process: int) -> int:
    """Memory of a process; 0 if it is no more."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)
