"""The gate: what is refused for its length is refused before it is parsed, and nothing else is refused there."""

import asyncio
import io
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service import reposing
from service.answers import FRAMES, SKINNED
from service.bundle.files import write_bundle
from service.errors import Overloaded
from service.poses import frames_at_a_glance

pytestmark = pytest.mark.anyio
URL = "/avatars/tiny/repose"
MOST = 5
"""More frames than this are refused below."""
MARKERS = np.zeros((50, 3), np.float32)


def poses(frames: int) -> np.ndarray:
    return np.zeros((frames, 72), np.float32)


def packed(save: Any = np.savez, **arrays: Any) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


async def post(client: httpx.AsyncClient, body: Any, query: str = "", **headers: str) -> httpx.Response:
    headers = {"Content-Type": "application/x-npz", "Accept": FRAMES} | headers
    return await client.post(URL + query, content=body, headers=headers)


@pytest.fixture
def busy(serve: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A service that has time for few frames only."""

    def check(_: Any, lod: str, frames: int) -> None:
        if frames > MOST:
            raise Overloaded("others are served", retry_after_s=7)

    def start(**settings: Any) -> Any:
        started = serve(**settings)

        class Context:
            async def __aenter__(self) -> httpx.AsyncClient:
                client: httpx.AsyncClient = await started.__aenter__()
                monkeypatch.setattr(client.app.state.room, "check_admission", check)  # type: ignore[attr-defined]
                return client

            async def __aexit__(self, *error: object) -> None:
                await started.__aexit__(*error)

        return Context()

    return start


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames each body that was parsed had."""
    seen: list[int] = []
    real = reposing.parse_npz

    def parse_npz(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        seen.append(len(found))
        return found

    monkeypatch.setattr(reposing, "parse_npz", parse_npz)
    return seen


async def test_what_is_too_long_now_is_refused_unparsed(busy: Any, parsed: list[int]) -> None:
    async with busy() as client:
        refused = await post(client, packed(poses=poses(MOST + 1)))
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert (refused.headers["Retry-After"], refused.json()["retry_after_s"]) == ("7", 7)
        assert refused.headers["X-Request-Id"]
        assert not parsed
        assert (await post(client, packed(poses=poses(MOST)))).status_code == 200
        assert parsed == [MOST]


CASES: dict[str, tuple[bytes, str, dict[str, str], int]] = {
    "translations come first, so only who parses it knows": (
        packed(trans=poses(9)[:, :3], poses=poses(9)),
        "",
        {},
        503,
    ),
    "translations of something else": (
        packed(trans=poses(9)[:, :3], bodyPose=poses(1)[:, :66].reshape(1, 22, 3)),
        "",
        {},
        200,
    ),
    "not said to be an archive": (packed(poses=poses(9)), "", {"Content-Type": "text/plain"}, 415),
    "a time that is none": (packed(poses=poses(9)), "", {"Request-Timeout": "soon"}, 422),
    "compressed, so only who parses it knows": (packed(np.savez_compressed, poses=poses(9)), "", {}, 503),
    "one frame without an axis": (packed(poses=poses(9)[0]), "", {}, 200),
    "other arrays come first": (packed(markers=MARKERS, poses=poses(3)), "", {}, 200),
    "a few of many": (packed(poses=poses(50)), "?every=10", {}, 200),
    "resampled to fewer": (packed(poses=poses(50)), "?fps=120&target_fps=10", {}, 200),
    "made from the poses alone": (packed(poses=poses(9)), "", {"Accept": SKINNED}, 200),
    "no level of that name": (packed(poses=poses(9)), "?lod=none", {}, 404),
    "an unknown option": (packed(poses=poses(9)), "?speed=2", {}, 422),
    "an option that is no number": (packed(poses=poses(9)), "?every=x", {}, 422),
    "a format that is not there": (packed(poses=poses(9)), "", {"Accept": "image/png"}, 406),
    "more frames than anybody gets": (packed(poses=poses(61)), "", {}, 413),
    "not an archive": (b"PK\x03\x04" + b"x" * 60, "", {}, 422),
    "nothing": (b"", "", {}, 422),
    "text": (b'{"poses": [[0, 0]]}', "", {"Content-Type": "application/json"}, 422),
}


@pytest.mark.parametrize(("body", "query", "headers", "status"), CASES.values(), ids=CASES)
async def test_everything_else_is_left_to_those_who_read_it(
    busy: Any, body: bytes, query: str, headers: dict[str, str], status: int
) -> None:
    async with busy(max_frames=60) as client:
        answer = await post(client, body, query, **headers)
    assert answer.status_code == status, answer.text


async def test_what_was_let_in_before_is_looked_for_again(
    busy: Any, parsed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    long, other = packed(poses=poses(9)), packed(poses=poses(8))
    async with busy() as client:
        with monkeypatch.context() as idle:
            idle.setattr(client.app.state.room, "check_admission", lambda *_: None)
            first = await post(client, long)
            assert (first.status_code, first.headers["X-Cache"]) == (200, "miss")
        again = await post(client, long)
        assert (again.status_code, again.headers["X-Cache"]) == (200, "hit")
        parsed.clear()
        assert (await post(client, other)).status_code == 503
        assert (await post(client, long, "?fps=25")).status_code == 503
        assert (await post(client, long, Accept=FRAMES + ";codec=q16")).status_code == 503
        assert not parsed  # none of these is the same request


async def test_the_same_request_again_is_not_parsed_again(serve: Any, parsed: list[int]) -> None:
    body = packed(poses=poses(9))
    async with serve() as client:
        first, again = [await post(client, body) for _ in range(2)]
        assert (again.status_code, again.headers["X-Cache"], again.content) == (200, "hit", first.content)
        mine = {"x-cache", "server-timing", "x-request-id"}
        told, told_again = [{k: v for k, v in answer.headers.items() if k not in mine} for answer in (first, again)]
        assert told == told_again
        known = await post(client, body, **{"If-None-Match": f'"other", W/{first.headers["ETag"]}'})
        assert (known.status_code, known.headers["ETag"]) == (304, first.headers["ETag"])
        assert parsed == [9]
        # What differs in more than the time of its asking is read.
        computed = await post(client, body, **{"Cache-Control": "no-store"})
        assert (computed.headers["X-Cache"], computed.content) == ("bypass", first.content)
        assert (await post(client, body, **{"Content-Type": "application/json"})).status_code == 400
        assert (await post(client, body, **{"X-Deadline-Ms": "no"})).status_code == 422
        assert (await post(client, packed(poses=poses(9), fps=60))).headers["Reposer-Fps"] == "60"
        assert (await post(client, body, "?up_axis=z")).headers["Reposer-Up-Axis"] == "z"
        assert parsed == [9] * 4


async def test_an_avatar_of_which_a_cached_answer_is_asked_for_is_in_use(
    busy: Any, tmp_path: Path, bundle_parts: Any
) -> None:
    for name in ("tiny", "other"):
        write_bundle(tmp_path / "both" / name, avatar_id=name, **bundle_parts)
    body = packed(poses=poses(3))
    async with busy(bundle_dir=tmp_path / "both") as client:
        (await post(client, body)).raise_for_status()
        (await client.get("/avatars/other/mesh")).raise_for_status()
        loaded = client.app.state.store.loaded
        assert [avatar.id for avatar in loaded()] == ["other", "tiny"]
        assert (await post(client, packed(poses=poses(9)))).status_code == 503
        assert [avatar.id for avatar in loaded()] == ["other", "tiny"]  # those who are refused use nothing
        assert (await post(client, body)).headers["X-Cache"] == "hit"
        assert [avatar.id for avatar in loaded()] == ["tiny", "other"]


async def test_what_is_known_of_a_request_ends_with_the_avatar_it_was_for(serve: Any, parsed: list[int]) -> None:
    body = packed(poses=poses(9))
    async with serve() as client:
        first = await post(client, body)
        avatar = client.app.state.store.in_memory("tiny")
        avatar.bundle = replace(avatar.bundle, digest="0" * 64)
        again = await post(client, body)
        assert (again.headers["X-Cache"], again.headers["Reposer-Bundle"]) == ("miss", "0" * 64)
        assert again.headers["ETag"] != first.headers["ETag"]
        assert (await post(client, body, **{"If-None-Match": first.headers["ETag"]})).status_code == 200
        assert parsed == [9, 9]
        client.app.state.store.give_up(avatar)
        assert (await post(client, body)).status_code == 503


async def test_what_is_on_its_way_is_waited_for_however_busy_it_is(busy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    body, go_on = packed(poses=poses(9)), asyncio.Event()

    @asynccontextmanager
    async def turn(_: str) -> AsyncIterator[None]:
        await go_on.wait()
        yield None

    async with busy() as client:
        monkeypatch.setattr(client.app.state.reposing.cache, "turn", turn)
        with monkeypatch.context() as idle:
            idle.setattr(client.app.state.room, "check_admission", lambda *_: None)
            first = asyncio.create_task(post(client, body))
            while not client.app.state.reposing._on_its_way:
                await asyncio.sleep(0.001)
        second = asyncio.create_task(post(client, body))
        await asyncio.sleep(0.05)
        assert not second.done()
        go_on.set()
        assert [(await answer).status_code for answer in (first, second)] == [200, 200]


async def test_whoever_has_the_answer_is_told_so_however_busy_it_is(busy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    long = packed(poses=poses(9))
    async with busy() as client:
        with monkeypatch.context() as idle:
            idle.setattr(client.app.state.room, "check_admission", lambda *_: None)
            tag = (await post(client, packed(np.savez_compressed, poses=poses(9)))).headers["ETag"]
        assert (await post(client, long)).status_code == 503
        assert (await post(client, long, **{"If-None-Match": tag})).status_code == 304


async def test_only_so_many_requests_are_remembered(busy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reposing, "REMEMBERED", 2)
    bodies = [packed(poses=np.full((9, 72), 0.1 * n, np.float32)) for n in range(3)]
    async with busy() as client:
        with monkeypatch.context() as idle:
            idle.setattr(client.app.state.room, "check_admission", lambda *_: None)
            for n in (0, 1, 0, 2):
                assert (await post(client, bodies[n])).status_code == 200
        statuses = [(await post(client, body)).status_code for body in bodies]
    assert statuses == [200, 503, 200]  # the one not seen for longest is forgotten


@pytest.mark.parametrize("cut", [1, 7, 100, 5000, 70_000])
async def test_a_body_in_pieces_arrives_as_it_was_sent(busy: Any, parsed: list[int], cut: int) -> None:
    """Below and above the size up to which the gate reads it."""

    async def pieces(body: bytes) -> Any:
        for start in range(0, len(body), cut):
            yield body[start : start + cut]

    turned = np.random.default_rng(3).normal(0, 0.3, (MOST, 72)).astype(np.float32)
    short = packed(poses=turned)
    long = packed(poses=turned, more=np.zeros(reposing.SHORT_BYTES, np.uint8))
    assert len(short) < reposing.SHORT_BYTES < len(long)
    async with busy(cache_bytes=0) as client:
        whole = await post(client, short)
        for body in [short, long] if cut >= 100 else [short]:
            answer = await post(client, pieces(body))
            assert (answer.status_code, answer.content) == (200, whole.content)
        refused = await post(client, pieces(packed(poses=poses(9)))) if cut >= 7 else None
    assert refused is None or refused.status_code == 503
    assert set(parsed) == {MOST}


async def talk(client: Any, announced: int | str, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    """What is answered to these messages; more must not be asked for."""
    left, sent = list(messages), []

    async def receive() -> Any:
        assert left, "the client has sent everything, and is still waited for"
        return left.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/x-npz"), (b"content-length", str(announced).encode())]
    scope = {"type": "http", "method": "POST", "path": URL, "query_string": b"", "headers": headers}
    scope |= {"asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": "", "state": {}}
    await client.app(scope, receive, send)
    return sent


async def test_those_who_are_refused_drive_out_nobody(
    busy: Any, monkeypatch: pytest.MonkeyPatch, parsed: list[int]
) -> None:
    monkeypatch.setattr(reposing, "REMEMBERED", 2)
    long = packed(poses=poses(9))
    async with busy() as client:
        with monkeypatch.context() as idle:
            idle.setattr(client.app.state.room, "check_admission", lambda *_: None)
            assert (await post(client, long)).status_code == 200
        for n in range(4):  # each is parsed, as the gate cannot tell how long it is
            other = packed(np.savez_compressed, poses=poses(10 + n))
            assert (await post(client, other)).status_code == 503
        assert len(parsed) == 5
        assert (await post(client, long)).headers["X-Cache"] == "hit"
        # An answer that has left the cache is no reason to parse the request.
        client.app.state.reposing.cache._entries.clear()
        assert (await post(client, long)).status_code == 503
        assert len(parsed) == 5


async def test_a_long_body_is_not_waited_for(busy: Any) -> None:
    async with busy(max_npz_bytes=1000) as client:
        assert (await talk(client, 10**6))[0]["status"] == 413
        # More digits than Python makes a number of: left to those who count the body.
        body = {"type": "http.request", "body": b"PK"}
        assert (await talk(client, "0" * 5000 + "2", body))[0]["status"] < 500


async def test_a_deadline_counts_from_the_head_of_the_request(busy: Any) -> None:
    body, times = packed(poses=poses(3)), []

    async def slowly() -> AsyncIterator[bytes]:
        yield body[:100]
        times.append(time.monotonic())
        await asyncio.sleep(0.3)
        yield body[100:]

    headers = {"Content-Length": str(len(body)), "X-Deadline-Ms": "200"}
    async with busy() as client:
        answer = await post(client, slowly(), **headers)
    assert (answer.status_code, len(times)) == (504, 1)


async def test_a_refusal_waits_for_nothing_more(busy: Any) -> None:
    body = packed(poses=poses(9))
    cut = [{"type": "http.request", "body": part, "more_body": True} for part in (body[:300], body[300:])]
    async with busy() as client:
        start = (await talk(client, len(body), {"type": "http.request", "body": body}))[0]
        assert start["status"] == 503
        assert b"connection" not in dict(start["headers"])  # all of the body is here: the next request may come
        assert (await talk(client, len(body), *cut, {"type": "http.request", "body": b""}))[0]["status"] == 503


async def test_a_client_that_goes_in_the_middle_of_its_body_is_let_go(busy: Any, parsed: list[int]) -> None:
    body = packed(poses=poses(9))
    begun = {"type": "http.request", "body": body[:400], "more_body": True}
    async with busy() as client:
        sent = await talk(client, len(body), begun, {"type": "http.disconnect"})
    assert not parsed
    assert not sent or sent[0]["status"] >= 400


WHOLE = packed(poses=poses(12), trans=poses(12)[:, :3])


@given(st.integers(0, 400), st.integers(0, 255), st.integers(0, len(WHOLE)))
@example(18, 0xFF, len(WHOLE))
def test_a_glance_at_anything_is_a_number_or_nothing(at: int, byte: int, length: int) -> None:
    damaged = bytearray(WHOLE)
    damaged[at] = byte
    found = frames_at_a_glance(bytes(damaged[:length]))
    assert found is None or found >= 0


@given(st.binary(max_size=200))
def test_a_glance_at_bytes_is_harmless(body: bytes) -> None:
    for begun in (body, b"PK\x03\x04" + body, WHOLE[:60] + body):
        frames_at_a_glance(begun)


@given(st.integers(0, 3000), st.sampled_from(["poses", "pose"]))
@example(17, "poses")  # there is a line feed in its size
def test_a_glance_tells_the_length_of_what_numpy_saves(frames: int, name: str) -> None:
    assert frames_at_a_glance(packed(**{name: np.zeros((frames, 72), np.float16)})) == frames
    assert frames_at_a_glance(packed(trans=np.zeros((frames, 3)), **{name: np.zeros((1, 72))})) is None
