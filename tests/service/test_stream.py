"""Streams through the whole application, without a network: what is said, who is let in, and what is left behind."""

import asyncio
import io
import itertools
import json
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.bundle.files import write_bundle
from service.bundle.skeleton import axis_angle_to_matrix
from service.errors import EngineFailed, Overloaded
from service.frames import FrameDecoder
from service.security import add_key, remove_key
from service.streaming.wire import bearer_subprotocol, encode_pose

pytestmark = pytest.mark.anyio
REST = np.zeros(72, np.float32)
DOCUMENT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
Q16 = ("reposer.v1.q16",)
TIMEOUT_S = 60.0


class Socket:
    """The client's end of a WebSocket that ends in the application."""

    def __init__(self, app: Any, path: str, query: str, subprotocols: tuple[str, ...], headers: dict[str, str]) -> None:
        offered = {"sec-websocket-protocol": ", ".join(subprotocols)} if subprotocols else {}
        self.scope = {
            "type": "websocket", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
            "scheme": "ws", "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
            "headers": [(k.encode(), v.encode()) for k, v in ({"host": "reposer"} | headers | offered).items()],
            "client": ("127.0.0.1", 1), "server": ("reposer", 80), "subprotocols": list(subprotocols), "state": {},
            "extensions": {"websocket.http.response": {}},
        }  # fmt: skip
        self._to_app: asyncio.Queue[Any] = asyncio.Queue()
        self._from_app: asyncio.Queue[Any] = asyncio.Queue()
        self.reads = asyncio.Event()
        """Cleared: a client that has stopped reading."""
        self.reads.set()
        self._to_app.put_nowait({"type": "websocket.connect"})
        self.task = asyncio.ensure_future(app(self.scope, self._to_app.get, self._send))

    async def _send(self, message: Any) -> None:
        await self.reads.wait()
        self._from_app.put_nowait(message)

    async def next(self) -> Any:
        """The application's next message, as it is in ASGI."""
        async with asyncio.timeout(TIMEOUT_S):
            return await self._from_app.get()

    async def text(self) -> dict[str, Any]:
        message = await self.next()
        assert "text" in message, message
        return json.loads(message["text"])

    async def frame(self, decoder: FrameDecoder) -> Any:
        message = await self.next()
        assert message.get("bytes"), message
        frame = decoder.decode(message["bytes"])
        return frame

    async def close(self) -> tuple[int, str]:
        """What comes last."""
        while (message := await self.next())["type"] != "websocket.close":
            pass
        async with asyncio.timeout(TIMEOUT_S):
            await self.task
        return message["code"], message["reason"]

    async def denial(self) -> tuple[int, dict[str, Any], dict[str, str]]:
        start, body = await self.next(), await self.next()
        assert start["type"] == "websocket.http.response.start"
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return start["status"], json.loads(body["body"]), headers

    def say(self, **message: Any) -> None:
        self._to_app.put_nowait({"type": "websocket.receive", "text": json.dumps(message)})

    def pose(self, seq: int, pose: Any = REST, translation: Any = None, client_us: int = 0) -> None:
        data = encode_pose(seq, pose, translation, client_us)
        self._to_app.put_nowait({"type": "websocket.receive", "bytes": data})

    def text_raw(self, text: str) -> None:
        self._to_app.put_nowait({"type": "websocket.receive", "text": text})

    def bytes_raw(self, data: bytes) -> None:
        self._to_app.put_nowait({"type": "websocket.receive", "bytes": data})

    async def leave(self) -> None:
        self._to_app.put_nowait({"type": "websocket.disconnect", "code": 1006})
        async with asyncio.timeout(TIMEOUT_S):
            await self.task


def knock(
    client: Any, avatar: str = "tiny", subprotocols: tuple[str, ...] = Q16, headers: Any = None, **query: Any
) -> Socket:
    """A handshake; what comes of it is to be seen."""
    return Socket(client.app, f"/avatars/{avatar}/stream", urlencode(query), subprotocols, headers or {})


@asynccontextmanager
async def opened(client: Any, **how: Any) -> AsyncIterator[tuple[Socket, dict[str, Any]]]:
    """An accepted stream and its hello."""
    stream = knock(client, **how)
    accept = await stream.next()
    assert accept["type"] == "websocket.accept", accept
    assert accept["subprotocol"] == how.get("subprotocols", Q16)[0]
    try:
        yield stream, await stream.text()
    finally:
        stream.reads.set()
        await stream.leave()


class Gate:
    """An engine that computes only when it is let."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.device, self.provider, self.alone_up_to = engine.device, engine.provider, 0
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.error: Exception | None = None

    def repose(self, *inputs: Any) -> Any:
        self.entered.set()
        assert self.open.wait(TIMEOUT_S)
        if self.error:
            raise self.error
        return self._engine.repose(*inputs)


async def until(condition: Any) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.005)


def nothing_left(app: Any) -> bool:
    """No stream, no lease, no queued work."""
    pins = [avatar.pins for avatar in app.state.store.loaded()]
    return len(app.state.streams) == 0 and not any(pins) and not app.state.room._queue.take()


async def test_hello_says_what_was_agreed_on(serve: Any) -> None:
    async with serve() as client, opened(client, lod="preview", mode="complete", up_axis="z", window=3) as (_, hello):
        mesh = await client.get(hello["mesh"]["url"])
        assert (hello["type"], hello["protocol"], hello["avatar"], hello["codec"]) == ("hello", 1, "tiny", "q16")
        assert (hello["mode"], hello["window"], hello["resumed"]) == ("complete", 3, False)
        applied = {"up_axis": "z", "units": "m", "frame": "world", "rotation": None, "normalize": False}
        assert (hello["input"], hello["up_axis"]) == (applied, "y")
        assert hello["mesh"]["etag"] == mesh.headers["etag"]
        assert hello["vertices"] == 184
        documented = json.loads(DOCUMENT.split("```json\n")[1].split("```")[0])
        assert shape_of(hello) == shape_of(documented)


def shape_of(message: Any) -> Any:
    """The names of its members, in order, without their values."""
    return [(name, shape_of(value)) for name, value in message.items()] if isinstance(message, dict) else None


@pytest.mark.parametrize("codec", ["f32", "q16", "q16d"])
async def test_frames_are_those_of_rest(serve: Any, motion: Any, codec: str) -> None:
    async with serve() as client:
        expected = await rest_vertices(client, motion["poses"], motion["trans"], up_axis="z", units="cm")
        how: dict[str, Any] = {"subprotocols": (f"reposer.v1.{codec}",), "up_axis": "z", "units": "cm"}
        async with opened(client, mode="complete", window=8, **how) as (stream, _):
            for n, (pose, moved) in enumerate(zip(motion["poses"], motion["trans"], strict=True)):
                stream.say(type="pose", seq=3 * n, t=n, pose=pose.tolist(), trans=moved.tolist())
            decoder = FrameDecoder()
            for n, vertices in enumerate(expected):
                frame = await stream.frame(decoder)
                assert (frame.seq, frame.frame, frame.client_us, frame.last, frame.dropped) == (
                    3 * n,
                    n,
                    n,
                    False,
                    False,
                )
                assert 0 < frame.server_us < 1e6 * TIMEOUT_S
                np.testing.assert_allclose(frame.vertices, vertices, rtol=0, atol=1e-6 if codec == "f32" else 4e-5)


async def rest_vertices(client: Any, poses: Any, translations: Any, **query: str) -> Any:
    """(F, V, 3): what REST makes of the same poses."""
    answer = await client.post(
        "/avatars/tiny/repose",
        params=query,
        json={"poses": poses.tolist(), "translations": translations.tolist()},
        headers={"Accept": "application/x-npz"},
    )
    assert answer.status_code == 200, answer.text
    with np.load(io.BytesIO(answer.content), allow_pickle=False) as arrays:
        return arrays["vertices"]


async def stream_vertices(client: Any, poses: Any, translations: Any, *, binary: bool = False, **query: str) -> Any:
    """(F, V, 3): the frames of a stream, exact."""
    async with opened(client, subprotocols=("reposer.v1.f32",), mode="complete", window=8, **query) as (stream, hello):
        assert query.items() <= hello["input"].items()
        for seq, (pose, moved) in enumerate(zip(poses, translations, strict=True)):
            if binary:
                stream.pose(seq, pose, moved)
            else:
                stream.say(type="pose", seq=seq, pose=pose.tolist(), trans=moved.tolist())
        decoder = FrameDecoder()
        return np.array([(await stream.frame(decoder)).vertices for _ in poses])


@pytest.mark.parametrize("binary", [False, True])
async def test_a_stream_of_a_camera_places_what_rest_places(serve: Any, motion: Any, binary: bool) -> None:
    poses, moved = motion["poses"], motion["trans"]
    async with serve() as client:
        seen = await stream_vertices(client, poses, moved, binary=binary, frame="camera")
        there = await rest_vertices(client, poses, moved, frame="camera")
        world = await rest_vertices(client, poses, moved)
    np.testing.assert_allclose(seen, there, rtol=0, atol=1e-6)
    np.testing.assert_allclose(seen, world * [1, -1, -1], rtol=0, atol=2e-6)  # half a turn about x


@pytest.mark.parametrize("rotation", ["matrix", "quat_wxyz", "6d"])
async def test_a_pose_may_come_as_any_rotation(serve: Any, motion: Any, rotation: str) -> None:
    poses, moved = motion["poses"], motion["trans"]
    given = as_rotation(poses.reshape(-1, 24, 3), rotation)
    async with serve() as client:
        expected = await stream_vertices(client, poses, moved, binary=True)
        by_shape = await stream_vertices(client, given, moved)
        named = await stream_vertices(client, given, moved, rotation=rotation)
        rows = await stream_vertices(client, given.reshape(len(given), -1), moved, rotation=rotation)
    for vertices in (by_shape, named, rows):
        np.testing.assert_allclose(vertices, expected, rtol=0, atol=2e-6)


def as_rotation(axis_angle: Any, rotation: str) -> Any:
    """(F, 24, 3) as matrices, as quaternions w x y z, or as the first two columns of the matrices."""
    if rotation == "quat_wxyz":
        angle = np.linalg.norm(axis_angle, axis=-1, keepdims=True)
        return np.concatenate([np.cos(angle / 2), np.sin(angle / 2) * axis_angle / angle], axis=-1)
    matrices = axis_angle_to_matrix(axis_angle)
    return matrices if rotation == "matrix" else np.concatenate([matrices[..., 0], matrices[..., 1]], axis=-1)


async def test_a_stream_keeps_to_the_rotation_it_named(serve: Any) -> None:
    async with serve() as client, opened(client, rotation="quat_wxyz") as (stream, _):
        stream.pose(0)  # binary, so axis-angle
        assert (await stream.text())["code"] == "pose-shape-invalid"
        stream.say(type="pose", seq=1, pose=REST.reshape(24, 3).tolist())
        assert (await stream.text())["code"] == "pose-shape-invalid"
        stream.say(type="pose", seq=2, pose=[[1, 0, 0, 0]] * 24)
        assert (await stream.frame(FrameDecoder())).seq == 2


@pytest.mark.parametrize(
    ("pose", "code"),
    [
        (2 * np.tile(np.eye(3), (24, 1, 1)), "pose-not-rotation"),
        (np.full((24, 4), 0.7), "pose-not-rotation"),
        (np.tile([2.0, 0, 0, 0, 2.0, 0], (24, 1)), "pose-not-rotation"),
        (np.full(72, 12.0), "pose-out-of-range"),
    ],
)
async def test_fault_03_numbers_that_are_no_rotations(serve: Any, pose: Any, code: str) -> None:
    still = np.zeros((1, 3))
    async with serve() as client:
        async with opened(client) as (stream, _):
            stream.say(type="pose", seq=0, pose=pose.tolist())
            error = await stream.text()
            assert (error["code"], error["status"], error["seq"]) == (code, 422, 0)
        expected = await rest_vertices(client, pose[None], still, normalize="true")
        async with opened(client, subprotocols=("reposer.v1.f32",), normalize="true") as (stream, hello):
            assert hello["input"]["normalize"] is True
            stream.say(type="pose", seq=0, pose=pose.tolist())
            vertices = (await stream.frame(FrameDecoder())).vertices
            np.testing.assert_allclose(vertices, expected[0], rtol=0, atol=1e-6)
            stream.say(type="pose", seq=1, pose=np.zeros((24, 4)).tolist())  # nothing to go by
            assert (await stream.text())["code"] == "pose-not-rotation"


async def test_live_the_newest_pose_wins(serve: Any, engine: Any) -> None:
    gate = Gate(engine)
    async with serve(make_engine=lambda _: gate) as client, opened(client, window=8) as (stream, _):
        gate.open.clear()
        gate.entered.clear()
        stream.pose(0)
        await until(gate.entered.is_set)
        for seq in range(1, 10):
            stream.pose(seq)
        stream.say(type="ping", t=5)
        pong = await stream.text()
        assert (pong["type"], pong["t"], pong["stats"]["poses"], pong["stats"]["dropped"]) == ("pong", 5, 10, 8)
        gate.open.set()
        decoder = FrameDecoder()
        frames = [await stream.frame(decoder) for _ in range(2)]
        assert [(frame.seq, frame.frame, frame.dropped) for frame in frames] == [(0, 0, False), (9, 1, True)]


async def test_complete_answers_every_pose_once_in_order_and_says_end(serve: Any) -> None:
    async with serve() as client:
        stream = knock(client, mode="complete", window=4)
        await stream.next()
        hello, decoder, sent, seen = await stream.text(), FrameDecoder(), 0, []
        while len(seen) < 60:
            while sent < 60 and sent - len(seen) < hello["credits"]:
                stream.pose(sent)
                sent += 1
            frame = await stream.frame(decoder)
            seen.append(frame.seq)
            stream.say(type="ack", seq=frame.seq)
        assert seen == list(range(60))
        stream.say(type="end")
        end = await stream.text()
        assert (end["type"], end["stats"]) == ("end", {"poses": 60, "frames": 60, "dropped": 0, "refused": 0})
        assert await stream.close() == (1000, "end")
        assert nothing_left(client.app)


async def test_a_stream_goes_on_after_a_bad_pose(serve: Any) -> None:
    async with serve() as client, opened(client) as (stream, _):
        stream.pose(1, np.full(72, np.nan))
        error = await stream.text()
        assert (error["type"], error["code"], error["seq"]) == ("error", "pose-not-finite", 1)
        stream.pose(2)
        assert (await stream.frame(FrameDecoder())).seq == 2


async def test_resuming_asks_for_the_same_bundle(serve: Any) -> None:
    async with serve() as client:
        async with opened(client) as (_, hello):
            pass
        async with opened(client, last_seq=7, bundle=hello["bundle"]) as (stream, again):
            assert again["resumed"] is True
            stream.pose(7)
            assert (await stream.text())["code"] == "seq-invalid"
            stream.pose(8)
            assert (await stream.frame(FrameDecoder())).seq == 8
        async with opened(client, last_seq=7, bundle="0" * 64) as (stream, other):
            assert other["resumed"] is False
            stream.pose(0)
            assert (await stream.frame(FrameDecoder())).seq == 0


# Who is let in


async def test_fault_13_a_name_that_is_none(serve: Any) -> None:
    async with serve() as client:
        for name in ("..", "a" * 300, "Tiny", "tiny.", "-"):
            status, problem, _ = await knock(client, avatar=name).denial()
            assert (status, problem["code"]) == (404, "avatar-not-found")


async def test_fault_14_an_unknown_avatar_or_lod(serve: Any) -> None:
    async with serve() as client:
        status, problem, headers = await knock(client, avatar="nobody").denial()
        assert (status, problem["code"], problem["status"]) == (404, "avatar-not-found", 404)
        assert headers["content-type"] == "application/problem+json"
        status, problem, _ = await knock(client, lod="enormous").denial()
        assert (status, problem["code"]) == (404, "lod-not-found")
        assert nothing_left(client.app)


@pytest.mark.parametrize("offered", [(), ("chat",), ("reposer.v2.q16",), (bearer_subprotocol("x"),)])
async def test_a_subprotocol_of_ours_must_be_offered(serve: Any, offered: tuple[str, ...]) -> None:
    async with serve() as client:
        status, problem, _ = await knock(client, subprotocols=offered).denial()
        assert (status, problem["code"]) == (400, "subprotocol-unsupported")


async def test_the_first_subprotocol_that_is_ours_is_taken(serve: Any) -> None:
    async with serve() as client:
        stream = knock(client, subprotocols=(bearer_subprotocol("x"), "chat", "reposer.v1.f32", "reposer.v1.q16"))
        assert (await stream.next())["subprotocol"] == "reposer.v1.f32"
        await stream.leave()


@pytest.mark.parametrize(
    "query",
    [{"mode": "fast"}, {"max_fps": "0"}, {"max_fps": "nan"}, {"window": "9"}, {"up_axis": "x"}, {"key": "secret"},
     {"last_seq": "5"}, {"last_seq": "-1", "bundle": "x"}, {"frame": "room"}, {"rotation": "euler"},
     {"normalize": "perhaps"}, {"fps": "30"}],
)  # fmt: skip
async def test_a_query_that_will_not_do(serve: Any, query: dict[str, str]) -> None:
    async with serve() as client:
        status, problem, _ = await knock(client, **query).denial()
        assert (status, problem["code"]) == (422, "option-invalid")
        assert "secret" not in json.dumps(problem)


async def test_options_that_contradict_each_other_are_refused_as_in_rest(serve: Any) -> None:
    query = {"frame": "camera", "up_axis": "z"}
    async with serve() as client:
        status, problem, _ = await knock(client, **query).denial()
        answer = await client.post("/avatars/tiny/repose", params=query, json={"poses": [[0] * 72]})
        assert status == answer.status_code == 422
        said = ("type", "title", "status", "code", "detail")
        assert [problem[name] for name in said] == [answer.json()[name] for name in said]
        assert nothing_left(client.app)


async def test_fault_35_a_key_missing_or_wrong_and_one_taken_away(serve: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    key = add_key(keys, "someone", ("data",))
    admin = add_key(keys, "admin", ("admin",))
    async with serve(keys_file=keys, stream_silence_s=0.4) as client:
        for how, expected in (
            ({}, 401),
            ({"headers": {"authorization": "Bearer wrong"}}, 401),
            ({"subprotocols": (*Q16, bearer_subprotocol("wrong"))}, 401),
            ({"headers": {"authorization": f"Bearer {admin}"}}, 403),
        ):
            status, problem, headers = await knock(client, **how).denial()
            assert (status, problem["status"]) == (expected, expected)
            assert ("www-authenticate" in headers) == (expected == 401)
        stream = knock(client, subprotocols=(*Q16, bearer_subprotocol(key)))
        assert (await stream.next())["type"] == "websocket.accept"
        remove_key(keys, "someone")
        assert await stream.close() == (4401, "unauthorized")


async def test_fault_36_a_foreign_page(serve: Any) -> None:
    async with serve() as client:
        status, problem, _ = await knock(client, headers={"origin": "https://elsewhere.example"}).denial()
        assert (status, problem["code"]) == (403, "origin-refused")


async def test_fault_17_too_many_streams(serve: Any) -> None:
    async with serve(max_streams=2) as client, opened(client), opened(client):
        status, problem, headers = await knock(client).denial()
        assert (status, problem["code"]) == (503, "overloaded")
        assert int(headers["retry-after"]) > 0


async def test_fault_18_too_many_streams_or_handshakes_of_one_key(serve: Any) -> None:
    async with serve(max_streams_per_key=1) as client:
        async with opened(client):
            status, problem, headers = await knock(client).denial()
            assert (status, problem["code"]) == (429, "rate-limited")
            assert int(headers["retry-after"]) > 0
        async with opened(client):
            pass  # the place is free again
    async with serve(requests_per_s=0.01, burst_requests=1) as client, opened(client):
        status, problem, headers = await knock(client).denial()
        assert (status, problem["code"]) == (429, "rate-limited")
        assert int(headers["retry-after"]) > 0


# How it ends


@pytest.mark.parametrize(
    ("send", "code"),
    [
        (lambda stream: stream.text_raw("[" * 60_000), 1007),
        (lambda stream: stream.text_raw("x" * 70_000), 1009),
        (lambda stream: stream.bytes_raw(b"text where binary belongs"), 1003),
        (lambda stream: [stream.pose(n, np.full(72, np.inf)) for n in range(3)], 1007),
        (lambda stream: [stream.say(type="pose", seq=n, pose=[0.0] * 71) for n in range(3)], 4422),
        (lambda stream: [stream.say(type="pose", seq=n, pose=np.ones((24, 3, 3)).tolist()) for n in range(3)], 4422),
        (lambda stream: [stream.say(type="ping") for _ in range(400)], 4429),
    ],
)
async def test_messages_that_end_a_stream(serve: Any, send: Any, code: int) -> None:
    async with serve() as client:
        stream = knock(client)
        await stream.next()
        send(stream)
        assert (await stream.close())[0] == code
        assert nothing_left(client.app)


async def test_fault_17_overload(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve() as client:

        async def refuse(*_: Any, **__: Any) -> Any:
            raise Overloaded("too many live frames wait")

        monkeypatch.setattr(client.app.state.room, "repose", refuse)
        complete = knock(client, mode="complete")
        await complete.next()
        complete.pose(0)
        assert await complete.close() == (1013, "overloaded")
        async with opened(client) as (live, _):
            live.pose(0)
            live.say(type="end")  # not closed for overload: there was nothing to wait for
            assert (await live.text())["stats"] == {"poses": 1, "frames": 0, "dropped": 1, "refused": 0}


async def test_fault_20_a_client_that_goes_takes_its_work_with_it(serve: Any, engine: Any) -> None:
    gate = Gate(engine)
    async with serve(make_engine=lambda _: gate, parallel_inferences=1) as client:
        gate.open.clear()
        gate.entered.clear()
        other = knock(client)
        await other.next()
        other.pose(0)
        await until(gate.entered.is_set)  # the engine is busy with another's frame
        stream = knock(client, mode="complete")
        await stream.next()
        for seq in range(20):
            stream.pose(seq)
        await asyncio.sleep(0.05)
        await stream.leave()
        await other.leave()
        engine.batches.clear()
        gate.open.set()
        await asyncio.sleep(0.05)
        assert sum(engine.batches) <= 1
        assert nothing_left(client.app)


async def test_fault_20_two_hundred_abrupt_disconnects_leave_nothing(serve: Any) -> None:
    async with serve(max_streams=256, max_streams_per_key=256) as client:
        before = asyncio.all_tasks()
        rng = np.random.default_rng(0)
        for _ in range(20):
            streams = [knock(client, lod="preview", mode=str(rng.choice(["live", "complete"]))) for _ in range(10)]
            for stream in streams:
                for seq in range(int(rng.integers(0, 8))):
                    stream.pose(seq)
            await asyncio.sleep(float(rng.uniform(0, 0.02)))
            await asyncio.gather(*(stream.leave() for stream in streams))
        await until(lambda: asyncio.all_tasks() == before)
        assert nothing_left(client.app)
        async with opened(client) as (stream, _):
            stream.pose(0)
            assert (await stream.frame(FrameDecoder())).seq == 0


async def test_fault_21_a_client_that_does_not_read(serve: Any) -> None:
    async with serve(stream_send_timeout_s=0.2, stream_close_timeout_s=0.2) as client:
        stream = knock(client, window=8)
        await stream.next()
        await stream.text()
        stream.reads.clear()
        stream.pose(0)
        async with opened(client) as (other, _):
            other.pose(0)
            assert (await other.frame(FrameDecoder())).seq == 0  # others go on
            async with asyncio.timeout(TIMEOUT_S):
                await stream.task  # although not even the close can be sent
        assert nothing_left(client.app)
        metrics = (await client.get("/metrics")).text
        assert 'reposer_stream_ends_total{code="1008"} 1.0' in metrics


async def test_fault_22_a_client_that_is_silent(serve: Any) -> None:
    async with serve(stream_silence_s=0.4) as client:
        stream = knock(client)
        await stream.next()
        await stream.text()
        assert (await stream.text())["type"] == "ping"
        assert await stream.close() == (1008, "silent")


async def test_fault_26_an_engine_that_fails(serve: Any, engine: Any) -> None:
    gate = Gate(engine)
    async with serve(make_engine=lambda _: gate) as client:
        gate.error = EngineFailed("no kernel image")
        await ends_with_1011(client)


async def test_fault_27_a_surface_that_is_not_finite(serve: Any, engine: Any) -> None:
    async with serve(make_engine=lambda _: engine) as client:
        engine.spoil = lambda vertices: vertices * np.float32(np.nan)
        await ends_with_1011(client)


async def ends_with_1011(client: Any) -> None:
    """One pose, an error that tells nothing of the inside, and the close."""
    stream = knock(client)
    await stream.next()
    await stream.text()
    stream.pose(0)
    error = await stream.text()
    assert (error["type"], error["status"] >= 500, "detail" in error) == ("error", True, False)
    assert (await stream.close())[0] == 1011
    assert nothing_left(client.app)


async def test_fault_31_draining(serve: Any) -> None:
    async with serve() as client:
        stream = knock(client)
        await stream.next()
        await client.app.state.lifecycle.drain(5.0)
        assert await stream.close() == (1012, "draining")
        status, problem, headers = await knock(client).denial()
        assert (status, problem["code"]) == (503, "draining")
        assert "retry-after" in headers
        assert nothing_left(client.app)


async def test_fault_15_an_avatar_that_is_damaged(serve: Any, bundle_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "avatars"
    shutil.copytree(bundle_dir, folder)
    (folder / "tiny" / "mesh.preview.glb").write_bytes(b"glTF")
    async with serve(bundle_dir=folder) as client:
        status, problem, headers = await knock(client).denial()
        assert (status, problem["code"]) == (503, "avatar-unavailable")
        assert 1 <= int(headers["retry-after"]) <= 30


async def test_fault_15_an_avatar_that_is_replaced_or_removed(
    serve: Any, bundle_dir: Path, tmp_path: Path, bundle_parts: Any
) -> None:
    folder = tmp_path / "avatars"
    shutil.copytree(bundle_dir, folder)
    async with serve(bundle_dir=folder, stream_silence_s=2.0) as client:
        stream = knock(client)
        await stream.next()
        shutil.rmtree(folder / "tiny")
        write_bundle(folder / "tiny", avatar_id="tiny", **bundle_parts | {"metrics": {"iou": 0.6}})
        await client.app.state.store.reload("tiny")
        assert await stream.close() == (1012, "avatar-replaced")
        stream = knock(client)
        await stream.next()
        assert (await client.delete("/avatars/tiny")).status_code == 204
        assert await stream.close() == (4404, "avatar-removed")


# Whatever is sent

REPLIES = {"error", "config", "ping", "pong", "end"}
sent_seqs = st.integers(0, 40)
said = st.one_of(
    st.builds(lambda seq: encode_pose(seq, REST), sent_seqs),
    st.builds(lambda seq: json.dumps({"type": "pose", "seq": seq, "pose": REST.tolist()}), sent_seqs),
    st.builds(lambda seq: json.dumps({"type": "ack", "seq": seq}), sent_seqs),
    st.sampled_from(
        ['{"type": "ping"}', '{"type": "end"}', '{"type": "config", "window": 1}', '{"type": 1}', "[", "{}"]
    ),
    st.builds(lambda seq: encode_pose(seq, np.full(72, np.nan)), sent_seqs),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.just(None),  # wait a little
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mode=st.sampled_from(["live", "complete"]), messages=st.lists(said, max_size=40))
def test_whatever_is_sent_the_answers_are_of_the_protocol_and_nothing_is_left(
    one_server: tuple[asyncio.Runner, Any], mode: str, messages: list[str | bytes | None]
) -> None:
    runner, client = one_server

    async def talk() -> list[Any]:
        stream = knock(client, mode=mode, lod="preview", window=3)
        for message in messages:
            if message is None:
                await asyncio.sleep(0.002)
            elif isinstance(message, str):
                stream.text_raw(message)
            else:
                stream.bytes_raw(message)
        await asyncio.sleep(0.01)
        await stream.leave()
        return [stream._from_app.get_nowait() for _ in range(stream._from_app.qsize())]

    answers = runner.run(talk())
    assert answers[0]["type"] == "websocket.accept"
    texts = [json.loads(answer["text"]) for answer in answers if answer.get("text")]
    assert texts[0]["type"] == "hello"
    assert {text["type"] for text in texts[1:]} <= REPLIES
    decoder = FrameDecoder()
    frames = [decoder.decode(answer["bytes"]) for answer in answers if answer.get("bytes")]
    assert [frame.frame for frame in frames] == list(range(len(frames)))
    assert all(before.seq < after.seq for before, after in itertools.pairwise(frames))
    closes = [n for n, answer in enumerate(answers) if answer["type"] == "websocket.close"]
    assert closes in ([], [len(answers) - 1])
    assert nothing_left(client.app)


@pytest.fixture
def one_server(serve: Any) -> Iterator[tuple[asyncio.Runner, Any]]:
    """The application in a loop of its own, for tests that are called many times."""
    with asyncio.Runner() as runner:
        started = serve()
        client = runner.run(started.__aenter__())
        yield runner, client
        runner.run(started.__aexit__(None, None, None))
