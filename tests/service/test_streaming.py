"""Frames in order, in bounded memory, the first before the last is computed; and an end when the client goes."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import httpx
import numpy as np
import pytest

from service.answers import FORMATS, FRAMES, NPZ, encode, negotiate
from service.engine import repose_in_batches
from service.errors import NotAcceptable, OutputInvalid
from service.formats.clip import Clip
from service.frames import decode_stream, frame_bytes
from service.poses import PoseSequence

pytestmark = pytest.mark.anyio
FRAME_COUNT = 100


def poses(count: int = FRAME_COUNT) -> PoseSequence:
    still = np.tile(np.eye(3, dtype=np.float32), (count, 24, 1, 1))
    steps = np.arange(count, dtype=np.float32)[:, None] * np.array([1, 0, 0], np.float32)
    return PoseSequence(still, steps, 30.0, "y", "m", "matrix")


def test_batches_start_with_one_frame_and_stay_within_the_budget(skeleton: Any, engine: Any) -> None:
    vertices = np.zeros((50, 3), np.float32)
    batches = list(repose_in_batches(engine, skeleton, vertices, poses(), batch_vertex_frames=50 * 8 + 7))
    assert engine.batches == [1, 2, 4, 8, *[8] * 10, 5]
    assert [batch.start for batch in batches] == np.cumsum([0, *engine.batches[:-1]]).tolist()


def test_a_mesh_above_the_budget_goes_frame_by_frame(skeleton: Any, engine: Any) -> None:
    list(repose_in_batches(engine, skeleton, np.zeros((50, 3), np.float32), poses(3), batch_vertex_frames=10))
    assert engine.batches == [1, 1, 1]


@pytest.mark.parametrize("media_type", [FRAMES, NPZ])
def test_the_first_piece_needs_the_first_frame_only(
    skeleton: Any, engine: Any, bundle_parts: Any, media_type: str
) -> None:
    mesh = bundle_parts["meshes"]["preview"]
    batches = repose_in_batches(engine, skeleton, mesh.vertices, poses(), 1 << 16)
    chunks = encode(media_type, batches, Clip("tiny", mesh, FRAME_COUNT, 30.0))
    assert next(chunks)
    assert engine.batches == [1]
    assert sum(1 for _ in chunks) > 2
    assert sum(engine.batches) == FRAME_COUNT


async def call(app: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
    """One posted sequence, straight through ASGI: httpx's transport hands answers out only when they are whole."""
    headers = {"content-type": "application/json", "accept": FRAMES}
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": "/avatars/tiny/repose", "raw_path": b"/avatars/tiny/repose", "query_string": b"",
        "root_path": "", "headers": [(k.encode(), v.encode()) for k, v in headers.items()], "client": ("test", 1),
        "server": ("test", 80),
    }  # fmt: skip
    await app(scope, receive, send)


def posted(count: int = FRAME_COUNT) -> dict[str, Any]:
    body = json.dumps({"poses": np.zeros((count, 63)).tolist(), "translations": poses(count).translation.tolist()})
    return {"type": "http.request", "body": body.encode(), "more_body": False}


async def test_the_first_frame_leaves_before_the_last_is_computed(serve: Any, engine: Any, skeleton: Any) -> None:
    events: list[tuple[int, bytes]] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and message["body"]:
            events.append((sum(engine.batches), message["body"]))

    async def receive() -> Any:
        return message.pop() if message else await anyio.sleep_forever()

    message = [posted()]
    async with serve(make_engine=lambda _: engine) as client:
        engine.batches.clear()
        await call(client.app, receive, send)
    assert events[0][0] <= 1 + 2 + 4  # the room reads two pieces ahead
    assert len(events[0][1]) == frame_bytes(368)
    assert events[-1][0] == FRAME_COUNT
    frames = list(decode_stream(data for _, data in events))
    assert [(frame.seq, frame.frame) for frame in frames] == [(n, n) for n in range(FRAME_COUNT)]
    assert [frame.last for frame in frames] == [False] * (FRAME_COUNT - 1) + [True]
    pelvis = skeleton.rest_joints[0]
    for n, frame in enumerate(frames):
        np.testing.assert_allclose(frame.root, pelvis + np.array([n, 0, 0]), rtol=0, atol=1e-5)
        assert frame.half_extent == pytest.approx(np.abs(frame.vertices - frame.root).max(), abs=1e-5)


async def test_a_client_that_goes_stops_the_work_and_leaves_no_answer(serve: Any, engine: Any) -> None:
    gone = anyio.Event()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            gone.set()
            await anyio.sleep(0.05)

    async def receive() -> Any:
        if message:
            return message.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    message = [posted()]
    # One batch at a time: what is computed after the client has gone is what was in flight then.
    async with serve(make_engine=lambda _: engine, batch_vertex_frames=1, parallel_inferences=1) as client:
        engine.batches.clear()
        await call(client.app, receive, send)
        assert 1 <= sum(engine.batches) <= 3
        assert len(client.app.state.reposing.cache) == 0
        whole = await client.post("/avatars/tiny/repose", json=json.loads(posted()["body"]))
        assert whole.headers["x-cache"] == "miss"


async def test_a_stream_that_breaks_in_the_middle_is_not_kept(serve: Any, engine: Any) -> None:
    async with serve(make_engine=lambda _: engine) as client:
        # From frame 50 on, which is 50 m away; the engine is sound when it is looked at.
        engine.spoil = lambda v: v * np.float32(np.nan) if v.max() > 50 else v
        with pytest.raises((httpx.HTTPError, RuntimeError, OutputInvalid, ExceptionGroup)):
            await strictly(client).post("/avatars/tiny/repose", json=json.loads(posted()["body"]))
        assert len(client.app.state.reposing.cache) == 0


def strictly(client: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://reposer")


def test_every_format_can_be_negotiated_by_name() -> None:
    assert [negotiate(kind) for kind in FORMATS] == list(FORMATS)
    for accept in ("", ",", ";", "a/b;q=x", "image/*"):
        if accept == "":
            assert negotiate(accept) == FRAMES
        else:
            with pytest.raises(NotAcceptable):
                negotiate(accept)
