"""Answers by `Accept` and by the request's headers: codecs, text, entity tags, deadlines, one computation for many."""

import io
import json
import threading
import time
from typing import Any

import anyio
import httpx
import numpy as np
import pytest
from starlette.datastructures import Headers

from service import answers, production
from service.answers import FORMATS, FRAMES, FRAMES_Q16, FRAMES_Q16D, NDJSON, TABLE
from service.avatars import Avatar
from service.bundle.files import read_bundle
from service.cache import answer_key
from service.engine import Batch
from service.errors import OptionInvalid, TooManyFrames
from service.formats.clip import Clip
from service.frames import FrameEncoder, decode_stream
from service.metrics import Metrics
from service.poses import PoseSequence
from service.production import Order, Production, Times, pieces
from service.reposing import deadline_of

pytestmark = pytest.mark.anyio
URL = "/avatars/tiny/repose"


async def post(client: httpx.AsyncClient, motion: Any, query: str = "", **headers: str) -> httpx.Response:
    file = io.BytesIO()
    np.savez(file, **motion)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.post(
        URL + query, content=file.getvalue(), headers={"Content-Type": "application/x-npz"} | named
    )


async def test_codecs_hold_the_same_surface(serve: Any, motion: Any) -> None:
    async with serve() as client:
        found = {kind: await post(client, motion, accept=kind) for kind in (FRAMES, FRAMES_Q16, FRAMES_Q16D)}
    frames = {kind: list(decode_stream([answer.content])) for kind, answer in found.items()}
    for kind, codec in ((FRAMES_Q16, "q16"), (FRAMES_Q16D, "q16d")):
        assert found[kind].headers["content-type"] == f"{FRAMES};codec={codec}"
        assert [frame.key for frame in frames[kind]] == [codec == "q16" or n == 0 for n in range(7)]
        for exact, rough in zip(frames[FRAMES], frames[kind], strict=True):
            np.testing.assert_allclose(rough.vertices, exact.vertices, rtol=0, atol=rough.half_extent / 65000)
    for kind in (FRAMES, FRAMES_Q16):
        assert int(found[kind].headers["content-length"]) == len(found[kind].content)
        assert all(frame.server_us == 0 for frame in frames[kind])


async def test_text_has_a_line_for_each_frame_and_a_limit(serve: Any, motion: Any, bundle_parts: Any) -> None:
    async with serve() as client:
        answer = await post(client, motion, "?fps=20", accept=NDJSON)
        frames = list(decode_stream([(await post(client, motion)).content]))
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["frame"] for line in lines] == list(range(7))
    assert [line["time"] for line in lines] == [n / 20 for n in range(7)]
    for line, frame in zip(lines, frames, strict=True):
        np.testing.assert_allclose(line["vertices"], frame.vertices, rtol=0, atol=2e-6)
        np.testing.assert_allclose(line["pelvis"], frame.root, rtol=0, atol=2e-6)
    mesh = bundle_parts["meshes"]["preview"]
    most = answers.MAX_NDJSON_VERTEX_FRAMES // len(mesh.vertices)
    answers.check_length(NDJSON, Clip("tiny", mesh, most, 30.0))
    with pytest.raises(TooManyFrames):
        answers.check_length(NDJSON, Clip("tiny", mesh, most + 1, 30.0))


async def test_an_entity_tag_stands_for_what_was_asked(serve: Any, engine: Any, motion: Any) -> None:
    async with serve(make_engine=lambda _: engine) as client:
        first = await post(client, motion)
        tag = first.headers["etag"]
        assert tag.startswith('"')
        assert len(tag) == 66
        computed = len(engine.batches)
        same = await post(client, motion, if_none_match=f'"other", {tag}')
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
        assert len(engine.batches) == computed
        moved = motion | {"trans": motion["trans"] + 1e-3}
        changed = await post(client, moved, if_none_match=tag)
        assert changed.status_code == 200
        assert changed.headers["etag"] != tag
        assert (await post(client, motion, accept=FRAMES_Q16)).headers["etag"] != tag
        assert (await post(client, motion)).headers["etag"] == tag


async def test_no_store_neither_reads_nor_writes_the_cache(serve: Any, engine: Any, motion: Any) -> None:
    async with serve(make_engine=lambda _: engine) as client:
        cache = client.app.state.reposing.cache
        fresh = await post(client, motion, cache_control="No-Store")
        assert (fresh.headers["x-cache"], fresh.headers["cache-control"], len(cache)) == ("bypass", "no-store", 0)
        assert (await post(client, motion)).headers["x-cache"] == "miss"
        computed = len(engine.batches)
        again = await post(client, motion, cache_control="no-store")
        assert (again.headers["x-cache"], again.content) == ("bypass", fresh.content)
        assert len(engine.batches) > computed


async def test_timing_says_where_the_time_went(serve: Any, motion: Any) -> None:
    async with serve() as client:
        first, again = await post(client, motion), await post(client, motion)
        other = await post(client, motion | {"fps": 30})  # what it would be anyway
    computed = {"parse", "cache", "queue", "infer", "encode"}
    # What is known byte for byte is not even parsed.
    for answer, names in ((first, computed), (again, {"cache"}), (other, {"parse", "cache"})):
        entries = [entry.split(";dur=") for entry in answer.headers["server-timing"].split(", ")]
        assert {name for name, _ in entries} == names
        assert all(float(milliseconds) >= 0 for _, milliseconds in entries)


async def test_what_was_applied_is_said(serve: Any, motion: Any) -> None:
    async with serve() as client:
        answer = await post(client, motion, "?frame=camera&fps=60&target_fps=30&units=cm&normalize=true")
    said = {name: answer.headers[f"reposer-{name}"] for name in ("frame", "fps", "posted-fps", "frames", "units")}
    assert said == {"frame": "camera", "fps": "30", "posted-fps": "60", "frames": "4", "units": "cm"}


@pytest.mark.parametrize("header", ["Request-Timeout", "X-Deadline-Ms"])
@pytest.mark.parametrize("value", ["", "soon", "nan", "inf", "0", "-1", "1e12"])
def test_a_deadline_is_a_time_from_now(header: str, value: str) -> None:
    with pytest.raises(OptionInvalid, match=header):
        deadline_of(Headers({header: value}))


def test_the_earlier_of_two_deadlines_counts() -> None:
    now = time.monotonic()
    deadline = deadline_of(Headers({"Request-Timeout": "100", "X-Deadline-Ms": "2000"}))
    assert deadline is not None
    assert 2 <= deadline - now < 50
    assert deadline_of(Headers({})) is None


async def test_what_cannot_be_done_in_time_is_a_504(serve: Any, engine: Any, motion: Any) -> None:
    async with serve(make_engine=lambda _: engine) as client:
        answer = await post(client, motion, x_deadline_ms="0.001")
        assert (answer.status_code, answer.json()["code"]) == (504, "deadline")
        assert (await post(client, motion, request_timeout="60")).status_code == 200
        assert (await post(client, motion)).headers["x-cache"] == "hit"
        wrong = await post(client, motion, request_timeout="soon")
        assert (wrong.status_code, wrong.json()["code"]) == (422, "option-invalid")


async def test_many_who_ask_at_once_are_computed_once(serve: Any, engine: Any, motion: Any) -> None:
    async with serve(make_engine=lambda _: engine) as client:
        found: list[httpx.Response] = []

        async def ask() -> None:
            found.append(await post(client, motion))

        engine.batches.clear()
        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(ask)
        assert sum(engine.batches) == 7
        assert {answer.content for answer in found} == {found[0].content}
        assert client.app.state.reposing._on_its_way == {}


async def test_a_failure_reaches_all_who_wait_and_is_not_kept(serve: Any, engine: Any, motion: Any) -> None:
    async with serve(make_engine=lambda _: engine) as client:
        far = motion | {"trans": motion["trans"] + 20}
        engine.spoil = lambda v: v * np.float32(np.nan) if v.max() > 10 else v  # not the still pose of a check
        statuses: list[int] = []

        async def ask() -> None:
            statuses.append((await post(client, far)).status_code)

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(ask)
        assert statuses == [500] * 3
        assert len(client.app.state.reposing.cache) == 0
        engine.spoil = lambda v: v
        assert (await post(client, far)).headers["x-cache"] == "miss"


class Source:
    """Counts what was made, and whether it was called off."""

    def __init__(self) -> None:
        self.made, self.closed = 0, False

    async def pieces(self) -> Any:
        try:
            for n in range(1000):
                await anyio.sleep(0)
                self.made = n + 1
                yield bytes([n % 256])
        finally:
            self.closed = True


async def test_a_production_ends_with_its_last_reader_and_not_before() -> None:
    source = Source()
    production = Production(source.pieces())
    one, other = production.read(), production.read()
    await anext(one)
    assert await anext(other) == b"\x00"
    await one.aclose()
    assert [await anext(other) for _ in range(5)] == [bytes([n]) for n in range(1, 6)]
    assert not production.ended
    await other.aclose()
    await production.task
    assert source.closed
    assert source.made < 1000
    assert production.ended


async def test_a_late_reader_gets_everything() -> None:
    production = Production(Source().pieces())
    early = production.read()
    await anext(early)
    await production.task
    late = [piece async for piece in production.read()]
    assert len(late) == 1000
    assert len([piece async for piece in early]) == 999


class Room:
    """Stands for the engine room: remembers how far it was asked to compute."""

    def __init__(self, vertices: Any) -> None:
        self.vertices, self.batches, self.closed = vertices, 0, False

    async def sequence(self, avatar: Any, lod: str, poses: PoseSequence, deadline: Any, **_: Any) -> Any:
        try:
            for start in range(0, len(poses), 5):
                self.batches += 1
                part = self.vertices[start : start + 5]
                yield Batch(start, part, part[:, 0], 0.01, 0.02)
        finally:
            self.closed = True


@pytest.fixture(scope="module")
def avatar(bundle_dir: Any) -> Avatar:
    return Avatar(read_bundle(bundle_dir / "tiny"), None)  # type: ignore[arg-type]


def order_of(avatar: Avatar, media_type: str, count: int) -> Order:
    rotations = np.tile(np.eye(3, dtype=np.float32), (count, 24, 1, 1))
    poses = PoseSequence(rotations, np.zeros((count, 3), np.float32), 30.0, "y", "m", "matrix")
    mesh = avatar.mesh("preview")
    clip = Clip("tiny", mesh, count, 30.0, avatar.bundle.skeleton, poses)
    return Order(avatar, "preview", media_type, poses, clip)


@pytest.mark.parametrize("media_type", FORMATS)
async def test_every_format_is_the_same_in_pieces(avatar: Avatar, media_type: str) -> None:
    order = order_of(avatar, media_type, 23)
    room = Room(np.tile(order.clip.mesh.vertices, (23, 1, 1)))
    found, behind = [], []
    async for piece in pieces(room, order, Times(), Metrics()):  # type: ignore[arg-type]
        found.append(piece)
        behind.append(room.batches)
    assert room.batches == (5 if TABLE[media_type].needs_batches else 0)
    if TABLE[media_type].needs_batches and media_type != answers.USD:  # which writes 32 frames at once
        assert behind[0] == 1  # a first piece only once a frame was computed
    expected = b"".join(answers.encode(media_type, iter([Batch(0, room.vertices, room.vertices[:, 0], 0)]), order.clip))
    if media_type not in (FRAMES_Q16D, answers.USD):
        assert b"".join(found) == expected


@pytest.mark.parametrize("media_type", [FRAMES, FRAMES_Q16, FRAMES_Q16D])
@pytest.mark.parametrize("allowed", [(5, 5), (4, 5), (5, 4)])
async def test_what_is_soon_encoded_needs_no_thread(
    avatar: Avatar, media_type: str, allowed: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    order, encode, used = order_of(avatar, media_type, 25), FrameEncoder.encode, set[int]()

    def noting(*arguments: Any, **terms: Any) -> bytes:
        used.add(threading.get_ident())
        return encode(*arguments, **terms)

    monkeypatch.setattr(FrameEncoder, "encode", noting)
    monkeypatch.setattr(production, "INLINE_VERTEX_FRAMES", allowed[0] * len(order.clip.mesh.vertices))
    monkeypatch.setattr(production, "INLINE_FRAMES", allowed[1])
    room = Room(np.tile(order.clip.mesh.vertices, (25, 1, 1)))  # five frames at a time
    async for _ in pieces(room, order, Times(), Metrics()):  # type: ignore[arg-type]
        pass
    here = threading.get_ident()
    assert used == {here} if media_type != FRAMES_Q16D and allowed == (5, 5) else here not in used


async def test_what_is_not_taken_is_not_computed(avatar: Avatar) -> None:
    order = order_of(avatar, FRAMES, 100)
    room = Room(np.tile(order.clip.mesh.vertices, (100, 1, 1)))
    source = pieces(room, order, Times(), Metrics())  # type: ignore[arg-type]
    await anext(source)
    await anext(source)
    assert (room.batches, avatar.pins) == (2, 1)
    await source.aclose()
    assert (room.batches, room.closed, avatar.pins) == (2, True, 0)


def test_equal_poses_have_equal_keys_and_others_have_not(avatar: Avatar) -> None:
    poses = order_of(avatar, FRAMES, 3).poses
    nearly = PoseSequence(poses.rotations + np.float32(1e-7), poses.translation, 30.0, "z", "cm", "6d")
    key = answer_key("d" * 64, "preview", FRAMES, poses)
    assert key.startswith(f"av:1:{'d' * 64}:{FRAMES}:")
    assert answer_key("d" * 64, "preview", FRAMES, nearly) == key
    moved = PoseSequence(poses.rotations, poses.translation + np.float32(1e-5), 30.0, "y", "m", "matrix")
    slow = PoseSequence(poses.rotations, poses.translation, 29.0, "y", "m", "matrix")
    others = [
        answer_key("e" * 64, "preview", FRAMES, poses),
        answer_key("d" * 64, "standard", FRAMES, poses),
        answer_key("d" * 64, "preview", FRAMES_Q16, poses),
        answer_key("d" * 64, "preview", FRAMES, moved),
        answer_key("d" * 64, "preview", FRAMES, slow),
    ]
    assert len({key, *others}) == 6
