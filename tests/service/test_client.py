"""The Python client: what it needs, what it retries, and that it decodes what a real server sends."""

import ast
import asyncio
import io
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service import answers
from service.client import AsyncClient, AvatarChanged, Client, ConnectionLost, Frame, Refused
from service.client.backoff import Backoff
from service.client.calls import MEDIA_TYPES
from service.client.stream_state import StreamState
from service.frames import FrameEncoder, encode_frame

VERTICES = np.arange(12, dtype=np.float32).reshape(4, 3)
FRAMES = b"".join(
    encode_frame(VERTICES + n, np.zeros(3), seq=n, frame=n, last=n == 2, codec="q16") for n in range(3)
)  # fmt: skip
PROBLEM = {
    "type": "urn:reposer:problem:overloaded",
    "title": "The service is busy",
    "status": 503,
    "code": "overloaded",
}
APPLIED = {
    "reposer-frames": "3", "reposer-vertices": "4", "reposer-fps": "30", "reposer-up-axis": "z", "reposer-units": "m",
}  # fmt: skip

SERVER_ONLY = ("fastapi", "starlette", "pydantic", "pydantic_settings", "uvicorn", "onnxruntime", "onnx", "PIL",
               "redis", "taskiq", "prometheus_client", "torch")  # fmt: skip


@pytest.mark.parametrize(
    "statement",
    [
        "import service.client",
        "from service.__main__ import main; assert main(['repose', 'a', 'missing.npz', '-o', 'out.glb']) == 1",
    ],
)
def test_client_and_its_command_need_nothing_of_the_server(statement: str) -> None:
    # As in an installation without the extras: whoever tries to import them fails.
    program = f"""
import sys
for name in {SERVER_ONLY}:
    sys.modules[name] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {SERVER_ONLY} else find(name, *rest)
{statement}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_base_installation_has_whatever_the_client_imports() -> None:
    root = Path(__file__).parents[2]
    todo = {f"service.client.{path.stem}" for path in (root / "service" / "client").glob("*.py")}
    seen: set[str] = set()
    packages: set[str] = set()
    while todo:
        seen.add(module := todo.pop())
        path = root / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        # Inside of functions too: those fail late.
        for node in ast.walk(ast.parse(path.read_text())) if path.is_file() else ():
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = {node.module or ""} if isinstance(node, ast.ImportFrom) else {name.name for name in node.names}
                todo |= {name for name in names if name.startswith("service.")} - seen
                packages |= {name.partition(".")[0] for name in names}
    packages -= {"service"} | set(sys.stdlib_module_names)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    # The bar is the command's.
    assert packages | {"tqdm"} == {re.split(r"[<>=]", item)[0] for item in project["dependencies"]}


def test_every_format_has_its_suffix() -> None:
    assert {row.suffix: row.media_type for row in answers.TABLE.values()} == MEDIA_TYPES


class Server:
    """Answers in turn what it was given, and remembers what it was asked."""

    def __init__(self, *replies: httpx.Response | Exception) -> None:
        self.replies, self.requests = list(replies), []
        self.slept: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def run(self, kind: str, method: str, *arguments: Any, retries: int = 3, **options: Any) -> Any:
        """One call of the sync or the async client; the result, an iterator's as a list."""
        transport = httpx.MockTransport(self)
        if kind == "sync":
            with Client(
                "http://it/prefix/", "key", retries=retries, transport=transport, sleep=self.slept.append
            ) as one:
                result = getattr(one, method)(*arguments, **options)
                return list(result) if method == "repose" else result

        async def call() -> Any:
            async with AsyncClient(
                "http://it/prefix/", "key", retries=retries, transport=transport, sleep=self.sleep
            ) as other:
                result = getattr(other, method)(*arguments, **options)
                return [frame async for frame in result] if method == "repose" else await result

        return asyncio.run(call())


def busy(status: int = 503, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=PROBLEM | {"status": status}, headers=headers)


def good() -> httpx.Response:
    return httpx.Response(200, content=FRAMES)


both = pytest.mark.parametrize("kind", ["sync", "async"])


@both
def test_repose_posts_poses_and_decodes_frames(kind: str) -> None:
    server = Server(good())
    poses = np.zeros((3, 72), np.float32)
    frames = server.run(kind, "repose", "open", poses, np.ones((3, 3)), lod="preview", up_axis="z", fps=None)
    assert [frame.seq for frame in frames] == [0, 1, 2]
    np.testing.assert_allclose(frames[2].vertices, VERTICES + 2, atol=1e-3)
    (request,) = server.requests
    assert (request.method, request.url.path) == ("POST", "/prefix/avatars/open/repose")
    assert dict(request.url.params) == {"lod": "preview", "up_axis": "z"}
    assert request.headers["authorization"] == "Bearer key"
    assert request.headers["content-type"] == "application/x-npz"
    with np.load(io.BytesIO(request.content), allow_pickle=False) as arrays:
        assert {name: arrays[name].shape for name in arrays.files} == {"poses": (3, 72), "trans": (3, 3)}


@both
def test_q16d_comes_as_float32(kind: str) -> None:
    encoder = FrameEncoder("q16d")
    encoded = [encoder.encode(VERTICES + n, np.zeros(3), seq=n, frame=n, last=n == 2) for n in range(3)]
    server = Server(httpx.Response(200, content=b"".join(encoded)))
    frames = server.run(kind, "repose", "open", np.zeros((3, 72)), codec="q16d")
    assert server.requests[0].headers["accept"].endswith(";codec=q16d")
    np.testing.assert_allclose(frames[2].vertices, VERTICES + 2, atol=1e-3)


@both
def test_what_is_put_off_is_tried_again_and_not_before_its_time(kind: str) -> None:
    server = Server(
        busy(503, **{"Retry-After": "2"}), busy(429, **{"Retry-After": "7"}), httpx.ConnectError("x"), good()
    )
    assert len(server.run(kind, "repose", "open", np.zeros((3, 72)))) == 3
    assert [server.slept[0] >= 2, server.slept[1] >= 7, 0.5 <= server.slept[2] <= 1.0] == [True] * 3


@both
def test_retries_are_bounded(kind: str) -> None:
    server = Server(*[busy() for _ in range(9)])
    with pytest.raises(Refused) as refused:
        server.run(kind, "repose", "open", np.zeros((3, 72)), retries=2)
    assert (refused.value.status, refused.value.code, len(server.requests)) == (503, "overloaded", 3)
    unreachable = Server(*[httpx.ConnectError("nobody there") for _ in range(9)])
    with pytest.raises(ConnectionLost, match="nobody there"):
        unreachable.run(kind, "avatars", retries=2)
    assert len(unreachable.requests) == 3


@both
def test_what_will_not_change_is_not_tried_again(kind: str) -> None:
    for reply in (busy(422), busy(401), busy(500), busy(503, **{"Retry-After": "86400"})):
        server = Server(reply)
        with pytest.raises(Refused):
            server.run(kind, "mesh", "open")
        assert server.slept == []
    with pytest.raises(Refused, match="502"):
        Server(httpx.Response(502, text="<html>")).run(kind, "avatars")


@both
def test_an_answer_that_breaks_off_is_no_answer(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConnectionLost):
        Server(httpx.Response(200, content=FRAMES[:-1])).run(kind, "repose", "open", np.zeros((3, 72)))

    def broken() -> Any:
        yield b"half of it"
        raise httpx.ReadError("gone")

    async def broken_async() -> Any:
        yield b"half of it"
        raise httpx.ReadError("gone")

    content = broken() if kind == "sync" else broken_async()
    with pytest.raises(ConnectionLost, match="gone"):
        Server(httpx.Response(200, content=content)).run(
            kind, "export", "open", np.zeros((1, 72)), tmp_path / "out.glb"
        )
    assert list(tmp_path.iterdir()) == []


@both
def test_export_writes_the_file_that_its_name_says(kind: str, tmp_path: Path) -> None:
    server, seen = Server(httpx.Response(200, content=b"x" * 70_000, headers=APPLIED)), []
    out = tmp_path / "walk.pc2.zip"
    (tmp_path / "poses.json").write_text(json.dumps({"poses": [[0.0] * 72]}))
    applied = server.run(kind, "export", "open", tmp_path / "poses.json", out, progress=lambda *done: seen.append(done))
    assert (applied.frames, applied.up_axis, applied.warning) == (3, "z", None)
    assert server.requests[0].headers["accept"] == "application/vnd.reposer.pc2+zip"
    assert server.requests[0].headers["content-type"] == "application/json"
    assert (out.stat().st_size, seen[-1]) == (70_000, (70_000, 70_000))
    with pytest.raises(ValueError, match=r"\.fbx"):
        server.run(kind, "export", "open", np.zeros((1, 72)), tmp_path / "out.fbx")


@both
def test_the_time_that_the_service_is_given_travels_as_a_header_and_options_as_the_query(
    kind: str, tmp_path: Path
) -> None:
    server = Server(good(), httpx.Response(200, content=b"x", headers=APPLIED), good())
    poses = np.zeros((3, 72))
    server.run(kind, "repose", "open", poses, timeout_s=1.5, normalize=True, target_fps=25)
    server.run(kind, "export", "open", poses, tmp_path / "out.npz", timeout_s=60, rotation="axis_angle")
    server.run(kind, "repose", "open", poses)
    assert [request.headers.get("request-timeout") for request in server.requests] == ["1.5", "60", None]
    assert [dict(request.url.params) for request in server.requests] == [
        {"normalize": "true", "target_fps": "25"},
        {"rotation": "axis_angle"},
        {},
    ]


A_JOB = {"id": "f00", "avatar": "open", "frames": 9}


def job(state: str, done: int = 0, **more: Any) -> httpx.Response:
    return httpx.Response(200, json=A_JOB | {"state": state, "frames_done": done} | more)


@both
def test_a_job_is_asked_for_and_its_result_fetched_when_it_is_there(kind: str, tmp_path: Path) -> None:
    made = Server(job("queued")).run(kind, "submit", "open", np.zeros((9, 72)), "walk.usdz", fps=25)
    assert (made.id, made.state, made.frames, made.ended) == ("f00", "queued", 9, False)
    result, seen = httpx.Response(200, content=b"x" * 9, headers=APPLIED), []
    server = Server(job("queued"), job("running", 4), job("done", 9), result)
    server.run(kind, "fetch", "f00", tmp_path / "walk.usdz", progress=lambda *done: seen.append(done))
    assert [request.url.path for request in server.requests] == [*["/prefix/jobs/f00"] * 3, "/prefix/jobs/f00/result"]
    assert ((tmp_path / "walk.usdz").read_bytes(), seen) == (b"x" * 9, [(0, 9), (4, 9), (9, 9)])
    with pytest.raises(Refused):
        Server(job("failed", error="engine-failed"), busy(409)).run(kind, "fetch", "f00", tmp_path / "other.usdz")
    assert [path.name for path in tmp_path.iterdir()] == ["walk.usdz"]


@both
def test_a_job_is_waited_for_while_the_service_is_started_anew(kind: str, tmp_path: Path) -> None:
    def lost(count: int) -> list[httpx.ReadError]:
        return [httpx.ReadError("gone")] * count

    result = httpx.Response(200, content=b"x" * 9, headers=APPLIED)
    server = Server(*lost(5), job("running", 4), *lost(5), job("done", 9), result)
    server.run(kind, "fetch", "f00", tmp_path / "walk.usdz")
    assert len(server.requests) == 13
    with pytest.raises(ConnectionLost, match="gone"):
        Server(job("running", 4), *lost(6)).run(kind, "fetch", "f00", tmp_path / "other.usdz")
    assert [path.name for path in tmp_path.iterdir()] == ["walk.usdz"]


@both
def test_a_job_can_be_cancelled(kind: str) -> None:
    server = Server(httpx.Response(204))
    server.run(kind, "cancel", "f00")
    assert [(request.method, request.url.path) for request in server.requests] == [("DELETE", "/prefix/jobs/f00")]


@pytest.mark.anyio
async def test_a_job_of_the_real_service(serve: Any, tmp_path: Path) -> None:
    async def soon(_: float) -> None:
        await asyncio.sleep(0.02)

    async with (
        serve(jobs_dir=tmp_path / "jobs") as app,
        AsyncClient("http://reposer", transport=httpx.ASGITransport(app.app), sleep=soon) as client,
    ):
        job = await client.submit("tiny", np.zeros((5, 72)), "still.npz")
        assert (await client.submit("tiny", np.zeros((5, 72)), "other.npz")).id == job.id
        assert [(each.id, each.avatar) for each in await client.jobs()] == [(job.id, "tiny")]
        applied = await client.fetch(job.id, tmp_path / "still.npz")
        assert (applied.frames, applied.vertices) == (5, 368)
        await client.cancel(job.id)
        with pytest.raises(Refused, match="404"):
            await client.job(job.id)
        assert await client.jobs() == []
    with np.load(tmp_path / "still.npz", allow_pickle=False) as arrays:
        assert arrays["vertices"].shape == (5, 368, 3)


def test_waits_grow_within_their_bounds() -> None:
    low, high = Backoff(9, lambda: 0.0), Backoff(9, lambda: 1.0)
    waits = [(low.wait_s(), high.wait_s()) for _ in range(9)]
    assert waits[:3] == [(0.125, 0.25), (0.25, 0.5), (0.5, 1.0)]
    assert waits[-1] == (4.0, 8.0)
    assert low.wait_s() is None
    low.succeeded()
    assert low.wait_s() == 0.125


# The client's half of a stream

HELLO = {"type": "hello", "protocol": 1, "bundle": "b", "credits": 2}


def state(mode: str) -> StreamState:
    made = StreamState("https://it/prefix", "open", {"mode": mode, "lod": None}, "q16")
    made.connected(json.dumps(HELLO))
    return made


def frame(seq: int) -> bytes:
    return encode_frame(VERTICES, np.zeros(3), seq=seq, frame=0, last=False, codec="q16")


def test_addresses_say_where_to_go_on() -> None:
    live = state("live")
    assert live.address() == "wss://it/prefix/avatars/open/stream?mode=live"
    live.received(frame(7))
    assert live.address() == "wss://it/prefix/avatars/open/stream?mode=live&last_seq=7&bundle=b"


def test_addresses_say_how_the_poses_are_meant() -> None:
    options = {"frame": "camera", "rotation": "quat_wxyz", "normalize": True, "units": None}
    assert StreamState("http://it", "open", options, "q16").address() == (
        "ws://it/avatars/open/stream?frame=camera&rotation=quat_wxyz&normalize=True"
    )


@pytest.mark.parametrize("shape", [(72,), (24, 3), (12, 6), (18, 4), (8, 3, 3), (24, 4), (96,), (22, 3)])
def test_only_axis_angle_of_24_joints_goes_as_a_binary_pose(shape: tuple[int, ...]) -> None:
    _, data = state("live").pose(np.zeros(shape), None, 0)
    assert isinstance(data, bytes) == (shape in ((72,), (24, 3)))
    if isinstance(data, str):
        assert np.shape(json.loads(data)["pose"]) == shape


def test_live_acknowledges_what_was_used_once_and_only_to_the_connection_it_came_from() -> None:
    live = state("live")
    assert live.used() == live.received(frame(0)) == live.received(frame(1)) == live.received(frame(2)) == []
    assert isinstance(live.taken(), Frame)
    assert live.used() == ['{"type":"ack","seq":0}']
    assert live.used() == []
    live.taken()
    assert live.connected(json.dumps(HELLO)) == live.used() == []
    live.taken()
    assert live.used() == []


def test_complete_sends_again_what_has_no_answer() -> None:
    complete = state("complete")
    sent = [complete.pose(np.zeros(72), None, 0)[1] for _ in range(2)]
    assert not complete.has_credit
    assert complete.received(frame(0)) == ['{"type":"ack","seq":0}']
    complete.taken()
    assert complete.used() == []
    assert complete.has_credit
    sent.append(complete.pose(np.zeros((24, 3, 3)), None, 0)[1])
    assert isinstance(sent[2], str)  # no room for matrices in a binary pose
    complete.received(json.dumps({"type": "error", "code": "pose-not-rotation", "seq": 2}))
    end = complete.end()
    assert complete.connected(json.dumps(HELLO)) == [sent[1], end]


def test_another_bundle_after_a_reconnect_is_told_once() -> None:
    live = state("live")
    live.connected(json.dumps(HELLO | {"bundle": "c"}))
    assert isinstance(live.taken(), AvatarChanged)
    assert not live.inbox


@pytest.mark.parametrize("first", ["", "[]", "{}", '{"type": "hello", "protocol": 2, "bundle": "b"}'])
def test_what_is_no_stream_of_ours(first: str) -> None:
    with pytest.raises(ConnectionLost):
        StreamState("http://it", "open", {}, "q16").connected(first)


def test_pings_are_answered_and_stats_kept() -> None:
    live = state("live")
    assert live.received('{"type":"ping","t":5}') == ['{"type":"pong","t":5}']
    live.received('{"type":"end","stats":{"frames":3}}')
    assert (live.ended, live.stats) == (True, {"frames": 3})


@pytest.mark.parametrize(
    ("code", "final"),
    [
        *((code, False) for code in (1006, 1008, 1012, 1013, 4429)),
        *((code, True) for code in (1000, 1007, 4401, 4404, 4422)),
    ],
)
def test_which_closes_are_final(code: int, final: bool) -> None:
    assert (state("live").closed(code, "") is not None) is final
