"""Streams over real sockets: the Python client, its reconnects, and a client that stops reading."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from service import demo
from service.app import create_app
from service.bundle.files import write_bundle
from service.client import AsyncClient, Client, ConnectionLost, PoseRefused, Refused, StreamClosed
from service.security import add_key
from service.settings import Settings
from service.streaming.session import Closing, Limits
from service.streaming.socket import StreamSocket
from service.streaming.wire import Close, encode_pose

pytestmark = pytest.mark.anyio
TIMEOUT_S = 60.0
POSES = np.random.default_rng(1).normal(0, 0.3, (100, 72)).astype(np.float32)


@asynccontextmanager
async def listening(**settings: Any) -> AsyncIterator[tuple[str, Any]]:
    """The application on a port of this machine, in this process: its URL, and itself."""
    app = create_app(Settings(**{"threads": 1} | settings))
    config = uvicorn.Config(
        app,
        port=0,
        http="h11",
        ws=StreamSocket,
        ws_max_size=Limits.message_bytes,
        ws_per_message_deflate=False,
        log_config=None,
    )
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        serving = asyncio.ensure_future(server.serve([listener]))
        async with asyncio.timeout(TIMEOUT_S):
            while not server.started:
                await asyncio.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", app
        finally:
            server.should_exit = True
            await serving


async def test_complete_through_broken_connections_every_frame_once_in_order(bundle_dir: Path) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async with listening(bundle_dir=bundle_dir) as (url, app), AsyncClient(url, sleep=sleep) as client:
        expected = [frame.vertices async for frame in client.repose("tiny", POSES, codec="f32")]
        async with client.stream("tiny", "complete", codec="f32", window=3) as stream:
            seen = []
            async for frame in stream.repose(POSES):
                seen.append(frame.seq)
                np.testing.assert_allclose(frame.vertices, expected[frame.seq], rtol=0, atol=1e-6)
                if len(seen) % 30 == 10:
                    for connection in app.state.streams._open:
                        connection.stop(Closing(Close.RESTART, "draining"))
            assert seen == list(range(len(POSES)))
            assert stream.hello["resumed"] is True
            assert len(slept) == 4
    assert all(0.125 <= seconds <= 0.25 for seconds in slept)  # each break is the first one again


async def test_live_one_task_sends_while_another_receives(bundle_dir: Path) -> None:
    async with (
        listening(bundle_dir=bundle_dir) as (url, _),
        AsyncClient(url) as client,
        client.stream("tiny", codec="q16d", lod="preview") as stream,
    ):
        done, seen = asyncio.Event(), []

        async def send() -> None:
            while not done.is_set():
                await stream.send(POSES[0], np.zeros(3))
                await asyncio.sleep(0.01)
            await stream.end()

        sending = asyncio.ensure_future(send())
        while (frame := await stream.receive(TIMEOUT_S)) is not None:
            seen.append(frame.seq)
            if len(seen) == 10:
                done.set()
        await sending
        assert seen == sorted(set(seen))
        assert stream.stats["poses"] == stream.stats["frames"] + stream.stats["dropped"]
        assert stream.stats["frames"] == len(seen)


async def test_live_frames_come_while_poses_still_do(bundle_dir: Path) -> None:
    async with (
        listening(bundle_dir=bundle_dir) as (url, _),
        AsyncClient(url) as client,
        client.stream("tiny", lod="preview", window=1) as stream,
    ):
        seen: list[int] = []

        def poses() -> Iterator[np.ndarray]:
            deadline = time.monotonic() + Limits.silence_s - 2  # then the stream would be opened anew
            while len(seen) < 3:
                assert time.monotonic() < deadline
                yield POSES[0]
                time.sleep(0.02)

        async for frame in stream.repose(poses()):
            seen.append(frame.seq)
        assert seen == sorted(set(seen))


async def test_the_clients_say_how_their_poses_are_meant(bundle_dir: Path) -> None:
    quaternions = np.random.default_rng(2).normal(0, 1, (3, 24, 4)).astype(np.float32)  # of any length
    meant: dict[str, Any] = {"frame": "camera", "rotation": "quat_wxyz", "normalize": True, "lod": "preview"}
    async with listening(bundle_dir=bundle_dir) as (url, _), AsyncClient(url) as client:
        expected = [frame.vertices async for frame in client.repose("tiny", quaternions, codec="f32", **meant)]
        async with client.stream("tiny", "complete", codec="f32", **meant) as stream:
            seen = [frame.vertices async for frame in stream.repose(quaternions)]

        def in_a_thread() -> list[Any]:
            with Client(url) as other, other.stream("tiny", "complete", codec="f32", **meant) as rows:
                return [frame.vertices for frame in rows.repose(quaternions.reshape(3, 96))]

        seen_there = await asyncio.to_thread(in_a_thread)
    for vertices in (seen, seen_there):
        np.testing.assert_allclose(vertices, expected, rtol=0, atol=1e-6)


async def test_the_client_gives_up_where_trying_again_is_of_no_use(bundle_dir: Path) -> None:
    async with listening(bundle_dir=bundle_dir) as (url, app), AsyncClient(url, retries=1) as client:
        with pytest.raises(Refused, match="404 avatar-not-found"):
            await client.stream("nobody").__aenter__()
        with pytest.raises(Refused, match="422 option-invalid"):
            await client.stream("tiny", lod="preview", colour="red").__aenter__()
        async with client.stream("tiny") as stream:
            await stream.send(np.full(72, np.nan))
            with pytest.raises(PoseRefused, match="pose-not-finite"):
                await stream.receive(TIMEOUT_S)
            await stream.send(POSES[0])
            frame = await stream.receive(TIMEOUT_S)
            assert frame is not None
            assert frame.seq == 1
            for connection in app.state.streams._open:
                connection.stop(Closing(Close.AVATAR_REMOVED, "avatar-removed"))
            with pytest.raises(StreamClosed, match="4404"):
                await stream.receive(TIMEOUT_S)
    with pytest.raises(ConnectionLost):
        await AsyncClient(url, retries=0).stream("tiny").__aenter__()


# A server process of its own


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, bundle_parts: Any) -> Path:
    """An avatar whose frames do not vanish in the buffers of a socket: 23,000 vertices, 276 KB as f32."""

    folder, small = tmp_path_factory.mktemp("large"), bundle_parts["meshes"]["standard"]
    names = ("vertices", "colors", "skin_joints", "skin_weights")
    many = {name: np.tile(getattr(small, name), (63, 1)) for name in names}
    meshes = {"standard": replace(small, **many), "preview": small}
    write_bundle(folder / "large", avatar_id="large", **bundle_parts | {"meshes": meshes})
    return folder


@pytest.fixture(scope="module")
def url(large: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPOSER_STREAM_SEND_TIMEOUT_S", "0.5")
        patch.setenv("OMP_NUM_THREADS", "1")
        with demo.running_server(large) as address:
            yield address


def test_the_sync_client_against_a_real_process(url: str) -> None:
    with Client(url) as client:
        expected = [frame.vertices for frame in client.repose("large", POSES[:5], codec="f32", lod="preview")]
        with client.stream("large", "complete", codec="f32", lod="preview") as stream:
            frames = list(stream.repose(POSES[:5]))
        assert [frame.seq for frame in frames] == list(range(5))
        assert stream.hello["vertices"] == len(expected[0])
        for frame, vertices in zip(frames, expected, strict=True):
            np.testing.assert_allclose(frame.vertices, vertices, rtol=0, atol=1e-6)
        with client.stream("large", "complete", lod="preview") as stream:
            for pose in POSES[:50]:  # more than there are credits, without receiving
                stream.send(pose)
            seen = [stream.receive(TIMEOUT_S) for _ in range(50)]
        assert [frame.seq for frame in seen if frame] == list(range(50))


def test_live_frames_come_to_the_sync_client_while_poses_still_do(url: str) -> None:
    with Client(url) as client, client.stream("large", lod="preview", window=1) as stream:
        seen: list[int] = []

        def poses() -> Iterator[np.ndarray]:
            deadline = time.monotonic() + Limits.silence_s - 2  # then the stream would be opened anew
            while len(seen) < 3:
                assert time.monotonic() < deadline
                yield POSES[0]
                time.sleep(0.02)

        for frame in stream.repose(poses()):
            seen.append(frame.seq)
        assert seen == sorted(set(seen))


def test_fault_21_a_client_that_stops_reading_is_closed_and_others_go_on(url: str) -> None:
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.connect(("127.0.0.1", httpx.URL(url).port))
    address = f"{url.replace('http', 'ws')}/avatars/large/stream?mode=complete&window=8"
    offered = [Subprotocol("reposer.v1.f32")]
    with connect(address, sock=narrow, subprotocols=offered, compression=None, max_size=None, max_queue=1) as stuck:
        assert stuck.subprotocol == offered[0]
        for seq in range(8):
            stuck.send(encode_pose(seq, POSES[seq]))
        with Client(url) as client, client.stream("large") as other:
            deadline = time.monotonic() + TIMEOUT_S
            # Over for the server, its close included, while nothing of it was read here.
            while not {'reposer_stream_ends_total{code="1008"} 1.0', "reposer_streams 1.0"} <= figures(url):
                assert time.monotonic() < deadline
                other.send(POSES[0])
                assert other.receive(TIMEOUT_S) is not None
        frames = sum(isinstance(message, bytes) for message in stuck_until_close(stuck))
        with pytest.raises(ConnectionClosed) as closed:
            stuck.recv()
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1008, "slow-consumer")
        assert frames <= 3  # so many were on their way, not all eight


def figures(url: str) -> set[str]:
    """The server's metrics, line by line."""
    return set(httpx.get(f"{url}/metrics").text.splitlines())


def stuck_until_close(stream: Any) -> Iterator[str | bytes]:
    """What is left to read."""
    try:
        while True:
            yield stream.recv(TIMEOUT_S)
    except ConnectionClosed:
        pass


@pytest.mark.parametrize("code", [1009, 1007])
def test_fault_05_23_what_the_socket_refuses(url: str, code: int) -> None:
    address = f"{url.replace('http', 'ws')}/avatars/large/stream"
    with connect(address, subprotocols=[Subprotocol("reposer.v1.q16")], compression=None) as stream:
        stream.recv()
        if code == 1009:
            stream.send("x" * 100_000)
        else:
            stream.send(b"\xff\xfe", text=True)
        with pytest.raises(ConnectionClosed) as closed:
            stream.recv(TIMEOUT_S)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == code


def test_fault_23_messages_in_crumbs_and_compression_that_was_not_agreed_on(url: str) -> None:
    address = f"{url.replace('http', 'ws')}/avatars/large/stream"
    with connect(address, subprotocols=[Subprotocol("reposer.v1.q16")], compression="deflate") as stream:
        assert stream.response is not None
        assert "Sec-WebSocket-Extensions" not in stream.response.headers  # nothing to inflate, so no bomb
        stream.recv()
        stream.send(bytes([byte]) for byte in encode_pose(7, POSES[0]))
        assert isinstance(stream.recv(TIMEOUT_S), bytes)


def test_fault_20_two_hundred_clients_that_vanish(url: str) -> None:
    port = httpx.URL(url).port
    request = (
        b"GET /avatars/large/stream HTTP/1.1\r\nHost: it\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
        b"Sec-WebSocket-Protocol: reposer.v1.q16\r\n\r\n"
    )
    masked = b"\x82\xfe\x01\x3c" + bytes(4) + encode_pose(0, POSES[0])

    def vanish(count: int) -> None:
        for n in range(count):
            with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as one:
                # Reset, not closed: the server is not told.
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                one.sendall(request)
                if n % 4:
                    assert b"101" in one.recv(1 << 12)
                    one.sendall(masked)
                if n % 4 > 2:
                    one.recv(1 << 16)

    threads = [threading.Thread(target=vanish, args=(25,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + TIMEOUT_S
    while "reposer_streams 0.0" not in figures(url):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with Client(url) as client, client.stream("large") as stream:
        stream.send(POSES[0])
        assert stream.receive(TIMEOUT_S) is not None


def test_fault_31_a_server_that_ends_tells_its_streams_to_come_back(bundle_dir: Path) -> None:
    with contextlib.ExitStack() as streams:
        with demo.running_server(bundle_dir) as address:
            url = f"{address.replace('http', 'ws')}/avatars/tiny/stream"
            opening = connect(url, subprotocols=[Subprotocol("reposer.v1.q16")], compression=None)
            stream = streams.enter_context(opening)
            stream.send(encode_pose(0, POSES[0]))
            assert [type(stream.recv(TIMEOUT_S)) for _ in range(2)] == [str, bytes]
        with pytest.raises(ConnectionClosed) as closed:
            stream.recv(TIMEOUT_S)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1012, "draining")


async def test_a_stream_and_its_refusal_have_a_line_in_the_access_log(
    bundle_dir: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    key = add_key(tmp_path / "keys", "studio", ("data",))
    with caplog.at_level("INFO", "service.access"):
        async with listening(bundle_dir=bundle_dir, keys_file=tmp_path / "keys") as (url, _):
            async with AsyncClient(url, key=key) as client, client.stream("tiny", lod="preview") as stream:
                await stream.send(POSES[0], np.zeros(3))
                await stream.end()
                while await stream.receive(TIMEOUT_S) is not None:
                    pass
            async with AsyncClient(url, retries=0) as stranger:
                with pytest.raises(Refused):
                    async with stranger.stream("tiny"):
                        pass
            async with asyncio.timeout(TIMEOUT_S):
                while len(lines := [vars(record) for record in caplog.records if record.name == "service.access"]) < 2:
                    await asyncio.sleep(0.01)
    assert {line["method"] for line in lines} == {"WebSocket"}
    assert {line["path"] for line in lines} == {"/avatars/tiny/stream"}
    assert [(line["status"], line.get("key"), line["client"]) for line in lines] == [
        (1000, "studio", "127.0.0.1"),
        (401, None, "127.0.0.1"),
    ]
    assert (lines[1]["problem"], "problem" in lines[0]) == ("unauthorized", False)
