"""What arrives is bounded before it is believed; who asks too often waits."""

import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from service.admission import plane_of
from service.app import create_app
from service.errors import Draining
from service.limits import MAX_HEADER_BYTES, PIECES_FORGIVEN, Limits, refuse
from service.rates import MAX_BUCKETS, RateLimiter
from service.settings import Settings

pytestmark = pytest.mark.anyio
POSES = {"poses": [[0.1] * 72]}


@pytest.fixture(scope="module")
def address(bundle_dir: Path, run_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    few = {"max_json_bytes": 10_000, "max_npz_bytes": 10_000, "body_idle_s": 0.3}
    settings = Settings(bundle_dir=bundle_dir, threads=1, jobs_dir=tmp_path_factory.mktemp("jobs"), **few)
    with run_server(create_app(settings)) as address:
        yield address


def talk(address: tuple[str, int], *parts: bytes, pause_s: float = 0.0) -> bytes:
    """Send raw bytes and read until the server closes or answers."""
    with socket.create_connection(address, timeout=10) as connection:
        for part in parts:
            time.sleep(pause_s)
            try:
                connection.sendall(part)
            except OSError:  # refused before all was sent
                break
        answer = b""
        while b"\r\n\r\n" not in answer:
            try:
                piece = connection.recv(65_536)
            except ConnectionResetError:
                break
            if not piece:
                break
            answer += piece
    return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


POST = b"POST /avatars/tiny/repose HTTP/1.1\r\nHost: reposer\r\nContent-Type: application/json\r\n"


def test_fault_06_a_lying_length_is_refused(address: tuple[str, int]) -> None:
    assert status_of(talk(address, POST + b"Content-Length: 999999999999\r\n\r\n")) == 413
    assert status_of(talk(address, POST + b"Content-Length: -1\r\n\r\n")) == 400
    assert status_of(talk(address, POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}")) == 400


def test_fault_06_a_body_is_counted_while_it_is_read(address: tuple[str, int]) -> None:
    chunk = b"3e8\r\n" + b" " * 1000 + b"\r\n"
    assert status_of(talk(address, POST + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 20)) == 413


def test_fault_06_compressed_bodies_are_not_opened(address: tuple[str, int]) -> None:
    for encoding in (b"gzip", b"br", b"identity, gzip", b"zstd"):
        request = POST + b"Content-Encoding: " + encoding + b"\r\nContent-Length: 2\r\n\r\n{}"
        assert status_of(talk(address, request)) == 415


def test_a_body_that_stops_coming_is_408(address: tuple[str, int]) -> None:
    assert status_of(talk(address, POST + b"Content-Length: 100\r\n\r\n{")) == 408


def test_a_body_that_trickles_is_408_and_a_slow_one_is_read(address: tuple[str, int]) -> None:
    """Each of these parts comes in time."""
    assert status_of(talk(address, POST + b"Content-Length: 20\r\n\r\n", *[b" "] * 20, pause_s=0.1)) == 408
    # It is no JSON, which is known once all of it is there.
    assert status_of(talk(address, POST + b"Content-Length: 4000\r\n\r\n", *[b" " * 200] * 20, pause_s=0.1)) == 400


def test_fault_24_headers_are_bounded(address: tuple[str, int]) -> None:
    get = b"GET /livez HTTP/1.1\r\nHost: reposer\r\n"
    fits = get + b"A: " + b"a" * (MAX_HEADER_BYTES - 100) + b"\r\n\r\n"
    assert status_of(talk(address, fits)) == 200
    assert status_of(talk(address, get + b"A: " + b"a" * MAX_HEADER_BYTES + b"\r\n\r\n")) == 431
    many = b"".join(b"A%d: a\r\n" % n for n in range(64))
    assert status_of(talk(address, get + many + b"\r\n")) == 431
    # One packet of two megabytes, which uvicorn alone may answer with 200: refused by whoever sees it first.
    assert status_of(talk(address, get + b"A: " + b"a" * (2 << 20) + b"\r\n\r\n")) in (400, 431)
    assert status_of(talk(address, b"GET /avatars?lod=" + b"a" * 5000 + b" HTTP/1.1\r\nHost: reposer\r\n\r\n")) == 404


def test_fault_24_idle_connections_keep_nobody_out(address: tuple[str, int]) -> None:
    idle = [socket.create_connection(address) for _ in range(50)]
    try:
        for connection in idle[:25]:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: rep")
        assert status_of(talk(address, b"GET /livez HTTP/1.1\r\nHost: reposer\r\n\r\n")) == 200
    finally:
        for connection in idle:
            connection.close()


@pytest.mark.parametrize("target", [b"/avatars/ti%0any", b"/avatars/%1b[31m", b"/%00", "/avatars/ü".encode(), b"/%ff"])
def test_fault_38_control_letters_reach_no_log(
    address: tuple[str, int], target: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        answer = talk(address, b"GET " + target + b" HTTP/1.1\r\nHost: reposer\r\n\r\n")
    assert status_of(answer) in (400, 404)
    assert all(record.getMessage().isprintable() for record in caplog.records)


async def test_fault_38_request_ids_are_names_or_new(serve: Any) -> None:
    async with serve() as client:

        async def name_for(given: bytes | None) -> str:
            headers = [] if given is None else [(b"X-Request-Id", given)]
            answer = await client.get("/avatars/nobody", headers=headers)
            assert answer.json()["request_id"] == answer.headers["x-request-id"]
            return answer.headers["x-request-id"]

        assert await name_for(b"job-7_a.b") == "job-7_a.b"
        made = [await name_for(given) for given in (None, b"", b"a b", b'a","level":"error', b"a\x1b[0m", b"a" * 65)]
        assert len(set(made)) == len(made)
        assert all(len(name) == 32 and name.isalnum() for name in made)


async def call(app: Any, messages: list[Message], method: str = "POST") -> tuple[int, bytes]:
    """One request to `app` with a body in these pieces."""
    sent: list[Message] = []
    pieces = iter(messages)

    async def receive() -> Message:
        return next(pieces)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": "/x", "query_string": b"", "headers": [], "server": ("a", 1)}
    await app(scope | {"scheme": "http", "http_version": "1.1"}, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * (len(sent) - 1)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


async def reader(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads all and says how much; swallows what goes wrong, as careless libraries do."""
    size = 0
    try:
        while True:
            message = await receive()
            size += len(message.get("body", b""))
            if not message.get("more_body"):
                break
    except Exception:
        size = -1
    await Response(f"{size}")(scope, receive, send)


def pieces(*sizes: int) -> list[Message]:
    last = len(sizes) - 1
    return [{"type": "http.request", "body": bytes(n), "more_body": i < last} for i, n in enumerate(sizes)]


async def test_fault_06_a_flood_of_crumbs_is_refused(tmp_path: Path) -> None:
    app = Limits(reader, Settings(bundle_dir=tmp_path))
    crumbs = PIECES_FORGIVEN + 10
    assert (await call(app, pieces(*[1] * crumbs)))[0] == 400
    assert await call(app, pieces(*[0] * 100, 7)) == (200, b"7")
    assert await call(app, pieces(*[1000] * crumbs)) == (200, b"%d" % (1000 * crumbs))


async def test_fault_06_a_refusal_survives_an_application_that_swallows_it(tmp_path: Path) -> None:
    app = Limits(reader, Settings(bundle_dir=tmp_path, max_json_bytes=100, max_npz_bytes=100, max_bundle_bytes=200))
    assert await call(app, pieces(50, 50)) == (200, b"100")
    status, body = await call(app, pieces(50, 51))
    assert (status, b"body-too-large" in body) == (413, True)
    assert (await call(app, pieces(150), "PUT"))[0] == 200
    assert (await call(app, pieces(201), "PUT"))[0] == 413


@pytest.mark.parametrize(("announced", "read"), [(b"30", 3), (b"100000", 0)])
async def test_a_refusal_leaves_no_small_body_unread(announced: bytes, read: int) -> None:
    """Closed on top of bytes that nobody has read, a connection is reset, and the answer may be lost."""
    coming, order = iter(pieces(10, 10, 10)), []

    async def receive() -> Message:
        order.append("read")
        return next(coming)

    async def send(message: Message) -> None:
        order.append(message["type"])

    scope = {"type": "http", "method": "POST", "path": "/x", "query_string": b"", "server": ("a", 1), "scheme": "http"}
    headers = [(b"content-length", announced)]
    await refuse(scope | {"headers": headers}, receive, send, Draining("going", {"Connection": "close"}))
    assert order == ["read"] * read + ["http.response.start", "http.response.body"]


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@given(st.lists(st.tuples(st.floats(0, 5), st.sampled_from("ab")), max_size=60))
def test_no_key_gets_more_than_its_rate(waits: list[tuple[float, str]]) -> None:
    clock = Clock()
    limiter = RateLimiter(2.0, 3, clock=clock)
    taken_at: dict[str, list[float]] = {"a": [], "b": []}
    for wait_s, name in waits:
        clock.now_s += wait_s
        allowance = limiter.take(name)
        assert allowance is not None
        if allowance.wait_s:
            # Who waits as long as was said is let in.
            clock.now_s += allowance.wait_s + 1e-9
            allowance = limiter.take(name)
            assert allowance is not None
            assert not allowance.wait_s
        taken_at[name].append(clock.now_s)
    for times in taken_at.values():
        for first, start_s in enumerate(times):
            for last, end_s in enumerate(times[first:], first):
                assert last - first + 1 <= 3 + 2.0 * (end_s - start_s) + 1e-6


def test_buckets_are_bounded() -> None:
    limiter = RateLimiter(1.0, 1)
    for number in range(MAX_BUCKETS + 50):
        limiter.take(str(number))
    assert len(limiter._buckets) == MAX_BUCKETS


async def test_fault_18_who_asks_too_often_waits(serve: Any) -> None:
    async with serve(requests_per_s=0.01, burst_requests=3) as client:
        answers = [await client.get("/avatars") for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
        assert [answer.headers["ratelimit"].split(";")[1] for answer in answers] == ["r=2", "r=1", "r=0", "r=0", "r=0"]
        assert all(answer.headers["ratelimit-policy"] == '"key";q=3;w=300' for answer in answers)
        refused = answers[-1]
        assert (refused.json()["code"], 90 <= int(refused.headers["retry-after"]) <= 100) == ("rate-limited", True)
        assert "retry-after" not in answers[0].headers
        # Probes of the orchestrator are not counted.
        assert (await client.get("/livez")).status_code == 200


async def test_keys_do_not_share_a_bucket(serve: Any, tmp_path: Path) -> None:
    from service.security import add_key

    tokens = [add_key(tmp_path / "keys.json", name, ("data",)) for name in "ab"]
    async with serve(keys_file=tmp_path / "keys.json", requests_per_s=0.01, burst_requests=1) as client:
        statuses = [
            (await client.get("/avatars", headers={"Authorization": f"Bearer {token}"})).status_code
            for token in (tokens[0], tokens[0], tokens[1])
        ]
    assert statuses == [200, 429, 200]


PLANES = [
    ("http", "GET", "/avatars/tiny", None),
    ("http", "GET", "/avatars/tiny/load", None),
    ("http", "POST", "/avatars/tiny/repose", "data"),
    ("http", "POST", "/jobs", "data"),
    ("http", "DELETE", "/jobs/7", "data"),
    ("http", "PUT", "/avatars/tiny", "admin"),
    ("http", "DELETE", "/avatars/tiny", "admin"),
    ("http", "POST", "/avatars/tiny/load", "admin"),
    ("http", "POST", "/avatars/tiny/unload/", "admin"),
    ("http", "PATCH", "/avatars/tiny", "admin"),
    ("websocket", "", "/avatars/tiny/stream", "data"),
]


@pytest.mark.parametrize(("kind", "method", "path", "plane"), PLANES)
def test_every_call_has_its_plane(kind: str, method: str, path: str, plane: str | None) -> None:
    assert plane_of({"type": kind, "method": method, "path": path}) == plane
