"""The server process: it drains, it ends in time with the right status, and it says how it is meanwhile."""

import asyncio
import io
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import h11
import httpx
import numpy as np
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from service import scheduling, serve
from service.frames import decode_stream
from service.settings import Settings

END_S = 60.0
"""Generous: the machine of a test may be slow."""


Start = Callable[..., tuple[subprocess.Popen[bytes], str]]


@pytest.fixture
def start(bundle_dir: Path, tmp_path: Path) -> Iterator[Start]:
    """`reposer serve` in a process of its own: the process and its URL."""
    started = []

    def run(*arguments: str, **environment: str) -> tuple[subprocess.Popen[bytes], str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "service", "serve", "--bundles", str(bundle_dir), "--port", str(port)]
        log = open(tmp_path / "log", "wb")  # noqa: SIM115 - the process has it
        process = subprocess.Popen([*command, *arguments], env=os.environ | environment, stderr=log)
        started.append((process, log))
        return process, f"http://127.0.0.1:{port}"

    yield run
    for process, log in started:
        process.kill()
        process.wait()
        log.close()


HTTP = httpx.Client(timeout=30, verify=False, trust_env=False)  # made once: that takes longer than all its requests


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    yield
    HTTP.close()


def wait_for(url: str, status: int) -> httpx.Response:
    until = time.monotonic() + END_S
    while time.monotonic() < until:
        try:
            answer = HTTP.get(url)
            if answer.status_code == status:
                return answer
        except httpx.HTTPError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{url} never answered {status}")


def motion(frames: int, save: Any = np.savez) -> bytes:
    file = io.BytesIO()
    save(file, poses=np.zeros((frames, 72), np.float32))
    return file.getvalue()


HEADERS = {"Content-Type": "application/x-npz", "Accept": "application/vnd.reposer.frames"}


def stuck_client(url: str, frames: int = 10_000) -> socket.socket:
    """Asks for frames, 45 MB of them unless told otherwise, and reads none."""
    host, port = url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    client.connect((host, int(port)))
    body = motion(frames)
    more = {"Content-Length": str(len(body)), "Connection": "close"}
    head = "".join(f"{name}: {value}\r\n" for name, value in (HEADERS | more).items())
    client.sendall(f"POST /avatars/tiny/repose HTTP/1.1\r\nHost: {host}\r\n{head}\r\n".encode() + body)
    client.recv(1, socket.MSG_PEEK)  # the answer has begun
    return client


def test_fault_31_sigterm_under_load_lets_what_is_in_flight_finish(start: Start, tmp_path: Path) -> None:
    server, url = start("--cpu", REPOSER_DRAIN_GRACE_S="300")
    wait_for(f"{url}/readyz", 200)
    assert HTTP.get(f"{url}/avatars/nobody").status_code == 404
    with HTTP.stream("POST", f"{url}/avatars/tiny/repose", content=motion(2000), headers=HEADERS) as answer:
        pieces = answer.iter_raw()
        received = [next(pieces)]  # 9 MB are more than all buffers hold: it goes on only when it is read
        server.send_signal(signal.SIGTERM)
        not_ready = wait_for(f"{url}/readyz", 503)
        assert not_ready.json()["code"] == "draining"
        assert HTTP.get(f"{url}/livez").status_code == 200
        refused = HTTP.post(f"{url}/avatars/tiny/repose", content=motion(1), headers=HEADERS)
        assert (refused.status_code, refused.json()["code"]) == (503, "draining")
        assert refused.headers["connection"] == "close"
        assert "Retry-After" in refused.headers
        assert server.poll() is None
        received += list(pieces)
    assert [frame.frame for frame in decode_stream(received)] == list(range(2000))
    assert server.wait(END_S) == 0
    records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {"time", "level", "logger", "message", "request_id"} <= set(records[0])
    done = [record for record in records if record.get("status") == 200 and record["logger"] == "service.access"]
    assert any(record["path"] == "/avatars/tiny/repose" and record["request_id"] != "-" for record in done)
    refusals = {(record["path"], record["status"], record["problem"]) for record in records if "problem" in record}
    assert refusals == {("/avatars/nobody", 404, "avatar-not-found"), ("/avatars/tiny/repose", 503, "draining")}
    assert not any("problem" in record for record in done)
    # What a 5xx keeps from the client is in the log.
    reasons = {record["reason"] for record in records if record.get("problem") == "draining"}
    assert reasons == {"the service is shutting down"}


def test_fault_31_a_stuck_client_cannot_keep_the_process(start: Start) -> None:
    server, url = start("--cpu", REPOSER_DRAIN_GRACE_S="1")
    wait_for(f"{url}/readyz", 200)
    with stuck_client(url):
        server.send_signal(signal.SIGTERM)
        assert server.wait(END_S) == 0


def test_fault_21_a_client_that_takes_nothing_is_cut_off_and_a_slow_one_is_not(start: Start, tmp_path: Path) -> None:
    _, url = start("--cpu", REPOSER_SEND_IDLE_S="1")
    wait_for(f"{url}/readyz", 200)
    with stuck_client(url, frames=2000) as slow, stuck_client(url):
        received, slowly_until = b"", time.monotonic() + 4
        # So slowly that nothing leaves what the server holds in all that time: its kernel holds megabytes, too.
        while piece := slow.recv(1 << 14 if time.monotonic() < slowly_until else 1 << 20):
            received += piece
            time.sleep(0.1 if time.monotonic() < slowly_until else 0.0)
        assert [frame.frame for frame in decode_stream([received.partition(b"\r\n\r\n")[2]])] == list(range(2000))
        until = time.monotonic() + END_S
        while "reposer_requests_in_flight 0.0" not in HTTP.get(f"{url}/metrics").text:
            assert time.monotonic() < until
            time.sleep(0.1)
    assert (tmp_path / "log").read_text().count("is cut off") == 1


class Transport(asyncio.Transport):
    """A connection on which so many bytes wait."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.left, self.aborted = 0, False

    def get_write_buffer_size(self) -> int:
        return self.left

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def is_closing(self) -> bool:
        return self.aborted

    def resume_reading(self) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("left", "cut_off"),
    [([900, 900], True), ([900, 500, 500], True), ([900, 500, 100, 0], False), ([900, 0], False), ([0], False)],
)
async def test_fault_21_the_last_bit_of_an_answer_that_nobody_takes(
    left: list[int], cut_off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is too little for the server to wait for."""
    config = uvicorn.Config(print, log_config=None)  # type: ignore[arg-type]
    protocol, transport = serve.HttpProtocol(config, ServerState(), {}, send_idle_s=0.05), Transport()
    sizes = iter(left)
    monkeypatch.setattr(protocol, "_bytes_left", lambda: next(sizes))
    transport.set_protocol(protocol)
    protocol.connection_made(transport)
    transport.left = left[0]
    protocol.on_response_complete()
    await asyncio.sleep(0.4)
    assert transport.aborted == cut_off
    protocol.connection_lost(None)


@pytest.mark.anyio
@pytest.mark.parametrize("then", ["another request", "a request it had sent before", "a stream", "nothing"])
async def test_what_comes_after_an_answer_is_not_taken_for_its_rest(then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = uvicorn.Config(print, log_config=None)
    protocol, transport = serve.HttpProtocol(config, ServerState(), {}, send_idle_s=0.05), Transport()
    monkeypatch.setattr(protocol, "_bytes_left", lambda: 900)  # of one answer or of the next
    transport.set_protocol(protocol)
    protocol.connection_made(transport)
    transport.left = 900

    def begin(_: Any = None) -> None:
        if then == "a stream":
            transport.set_protocol(asyncio.Protocol())
        elif then == "a request it had sent before":
            protocol.cycle = Mock(response_complete=False)

    monkeypatch.setattr(H11Protocol, "on_response_complete", begin)
    monkeypatch.setattr(H11Protocol, "data_received", lambda *_: None)
    protocol.on_response_complete()
    if then == "another request":
        protocol.data_received(b"GET")
    await asyncio.sleep(0.3)
    assert transport.aborted == (then == "nothing")
    # While an answer waits for the client, what it sends is no reason to wait longer.
    transport.set_protocol(protocol)
    protocol.pause_writing()
    protocol.data_received(b"GET")
    await asyncio.sleep(0.3)
    assert transport.aborted


def test_clients_that_leave_a_cached_answer_leave_nothing_behind(start: Start) -> None:
    server, url = start("--cpu", REPOSER_DRAIN_GRACE_S="300")
    wait_for(f"{url}/readyz", 200)
    body = motion(2000, np.savez_compressed)  # short, so that the gate knows it; 9 MB are more than all buffers hold
    first = HTTP.post(f"{url}/avatars/tiny/repose", content=body, headers=HEADERS)
    until = time.monotonic() + END_S
    while HTTP.post(f"{url}/avatars/tiny/repose", content=body, headers=HEADERS).headers["X-Cache"] != "hit":
        assert time.monotonic() < until  # it is kept behind its last byte
    for read in (0, 1 << 20):
        with HTTP.stream("POST", f"{url}/avatars/tiny/repose", content=body, headers=HEADERS) as answer:
            assert answer.headers["X-Cache"] == "hit"
            pieces = answer.iter_raw()
            assert sum(len(next(pieces)) for _ in range(read >> 16)) <= len(first.content) / 2
    again = HTTP.post(f"{url}/avatars/tiny/repose", content=body, headers=HEADERS)
    assert (again.headers["X-Cache"], again.content) == ("hit", first.content)
    server.send_signal(signal.SIGTERM)
    assert server.wait(END_S) == 0  # long before the time that what is in flight would have


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=5), st.booleans())
def test_a_connection_sends_what_h11_sends_and_does_not_copy_a_body(pieces: list[bytes], sized: bool) -> None:
    mine, plain = serve.Connection(h11.SERVER), h11.Connection(h11.SERVER)
    length = ("Content-Length", str(sum(map(len, pieces)))) if sized else ("Transfer-Encoding", "chunked")
    for connection in (mine, plain):
        connection.receive_data(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        assert isinstance(connection.next_event(), h11.Request)
    data = [h11.Data(data=memoryview(piece)) for piece in pieces]  # type: ignore[arg-type]
    for event in (h11.Response(status_code=200, headers=[length]), *data, h11.EndOfMessage(), h11.ConnectionClosed()):
        sent, expected = mine.send(event), plain.send(event)
        if sized and isinstance(event, h11.Data):
            assert sent is event.data
        assert sent == expected


def test_an_idle_server_ends_at_once(start: Start) -> None:
    server, url = start("--cpu", REPOSER_DRAIN_GRACE_S="300")
    wait_for(f"{url}/startupz", 200)
    server.send_signal(signal.SIGINT)
    assert server.wait(END_S) == 0


def test_fault_28_a_gpu_that_is_required_and_missing_ends_the_process_with_70(start: Start) -> None:
    server, _ = start("--cpu", REPOSER_REQUIRE_GPU="1")
    assert server.wait(END_S) == 70


def test_no_byte_waits_for_those_before_it_to_be_acknowledged(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would for up to 40 ms, where the kernel gathers small pieces and the client's is slow to acknowledge."""
    at_once = []

    def run(_: serve._Server, sockets: list[socket.socket]) -> None:
        (listening,) = sockets
        with listening:
            listening.listen()
            with socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
                at_once.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(serve._Server, "run", run)
    # These would change the process that the tests run in.
    monkeypatch.setattr(serve, "set_up_logging", lambda: None)
    monkeypatch.setattr(serve, "ask_for_short_slices", lambda: True)
    monkeypatch.setattr(serve.gc, "freeze", lambda: None)
    serve.serve(Settings(bundle_dir=bundle_dir, jobs_dir=tmp_path / "jobs"), "127.0.0.1", 0)
    assert at_once == [1]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities and slices of threads")
def test_threads_have_short_slices_and_those_that_compute_give_way(start: Start, tmp_path: Path) -> None:
    process, url = start("--cpu")
    wait_for(f"{url}/readyz", 200)
    HTTP.post(f"{url}/avatars/tiny/repose", json={"poses": [[0.0] * 72] * 9}).raise_for_status()
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    found = {int(task.name): scheduling.of_thread(int(task.name)) for task in tasks}
    computing = [slice_ns for nice, slice_ns in found.values() if nice == scheduling.COMPUTING_NICE]
    assert computing
    assert found[process.pid][0] == 0
    version = tuple(int(n) for n in platform.release().split(".")[:2])
    if version >= (6, 12):
        # Those of NumPy's library, which are there before, serve nobody.
        assert {found[process.pid][1], *computing} == {scheduling.SLICE_NS}
    else:
        assert "no short slices" in (tmp_path / "log").read_text()
