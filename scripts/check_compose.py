"""What docker-compose.yml promises, seen to hold on a real engine; `scripts/check-compose` runs it.

Two replicas come up, answer through nginx over HTTP and WebSocket, go on while Redis restarts and while a replica is
killed, give way to a new image without a failed request, finish what they have begun when they are told to stop, are
watched, and are not root.  At the end nothing is left of it but the engine's cache of builds.
"""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
from compose_stack import ROOT, WAIT_S, Stack, expect, say

from service.client import Client, ClientError, ConnectionLost

AVATAR, LOD = "open", "preview"
REPOSE = f"/avatars/{AVATAR}/repose"
STOP_S = 15.0
RESUMED_S = 2.0
LOAD_THREADS = 3


def main() -> int:
    """Run every check; returns the exit status."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    stack = Stack(port)
    try:
        stack.build()
        stack.up()
        trickle = HeaderTrickle(port)
        for check in CHECKS:
            check(stack)
            say(f"ok: {check.__doc__}")
        trickle.check()
        say("ok: a client that trickles its header is left")
        failed = False
    except (AssertionError, ClientError, httpx.HTTPError, OSError, subprocess.SubprocessError) as error:
        say(f"FAILED: {type(error).__name__}: {error}")
        print(stack.compose("logs", "--tail", "40", check=False), file=sys.stderr)
        failed = True
    finally:
        stack.down()
    say("failed" if failed else "all holds, and nothing is left")
    return int(failed)


def poses(frames: int) -> np.ndarray:
    """A walk on the spot, no two alike: an answer out of the cache would prove nothing.  (F, 72), radians."""
    return 0.3 * np.random.default_rng().uniform(-1, 1, (frames, 72))


def repose(url: str, frames: int, retries: int = 4) -> int:
    """Repose over HTTP; the number of frames that came, each seen to be whole."""
    with Client(url, retries=retries) as client:
        got = list(client.repose(AVATAR, poses(frames), lod=LOD))
    expect("finite vertices", all(np.isfinite(frame.vertices).all() for frame in got))
    return len(got)


@contextmanager
def load(url: str, retries: int = 4) -> Iterator[list[str]]:
    """Requests one after the other in a few threads meanwhile; yields the failures so far, "" for each success."""
    outcomes: list[str] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                repose(url, 2, retries=retries)
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


def serving(stack: Stack) -> str:
    """The replica that has the avatar."""
    repose(stack.url, 1)
    address = stack.served_by(REPOSE, 10)[-1]
    return next(container for container in stack.containers("service") if stack.address(container) == address)


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
    served_by = stack.served_by(REPOSE, 60)
    expect(f"one address, got {set(served_by)}", len(served_by) >= 6 and len(set(served_by)) == 1)


def confinement(stack: Stack) -> None:
    """nobody is root, nothing but volumes and /tmp can be written, memory is bounded, and there is no torch"""
    for service in ("service", "redis", "nginx"):
        confined(stack, service)
    replica = stack.containers("service")[0]
    torch = stack.docker("exec", replica, "python", "-c", "import torch", check=False)
    expect("no torch", "No module named 'torch'" in torch)


def confined(stack: Stack, service: str) -> None:
    for container in stack.containers(service):
        (facts,) = json.loads(stack.docker("inspect", container))
        expect(f"{service} is not root", stack.docker("exec", container, "id", "-u") != "0")
        expect(f"{service}: read-only root", facts["HostConfig"]["ReadonlyRootfs"])
        expect(f"{service}: bounded memory", facts["HostConfig"]["Memory"] > 0)
        written = stack.docker("exec", container, "touch", "/etc/x", check=False)
        expect(f"{service}: nothing can be written, got {written}", "Read-only file system" in written)


def contents(stack: Stack) -> None:
    """the image lists what it holds, which is what was pinned"""
    replica = stack.containers("service")[0]
    listed, viewer = (
        {part["name"]: part["version"] for part in json.loads(stack.docker("exec", replica, "cat", path))["components"]}
        for path in ("/usr/share/doc/reposer/sbom.json", "/usr/share/doc/reposer/sbom-viewer.json")
    )
    program = "import importlib.metadata as m; print('\\n'.join(f'{d.name}=={d.version}' for d in m.distributions()))"
    installed = stack.docker("exec", replica, "python", "-c", program).splitlines()
    expect("what is installed is listed", {f"{name}=={version}" for name, version in listed.items()} == {*installed})
    pinned = {simple(line) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    loose = [line for line in installed if simple(line) not in pinned and not line.startswith("reposer==")]
    expect(f"only what is pinned, got {loose}", not loose and len(installed) > 20)
    expect(f"the viewer's parts, got {viewer}", "three" in viewer)
    say(f"{len(installed)} distributions and {len(viewer)} npm packages")


def simple(distribution: str) -> str:
    """`name==version` with the name as indexes compare names."""
    name, equals, version = distribution.partition("==")
    return re.sub(r"[-_.]+", "-", name).lower() + equals + version


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
    victim, count, came_s = serving(stack), 100, []

    def paced() -> Iterator[np.ndarray]:
        for pose in poses(count):
            yield pose
            time.sleep(0.05)

    def stream() -> list[int]:
        frames = []
        with Client(stack.url) as client, client.stream(AVATAR, "complete", lod=LOD) as stream:
            for frame in stream.repose(paced()):
                came_s.append(time.monotonic())
                frames.append(frame.seq)
        return frames

    with load(stack.url) as outcomes, ThreadPoolExecutor(1) as pool:
        streaming = pool.submit(stream)
        stack.wait_until("frames of the stream", lambda: len(came_s) >= 10)
        stack.docker("kill", victim)
        done = len(outcomes)
        seqs = streaming.result(WAIT_S)
        stack.wait_until("requests after the kill", lambda: len(outcomes) >= done + 10)
    failures = [outcome for outcome in outcomes if outcome]
    expect(f"at most {LOAD_THREADS} failures, got {failures}", len(failures) <= LOAD_THREADS)
    lost = ConnectionLost.__name__
    expect(f"none but broken answers, got {failures}", all(failure.startswith(lost) for failure in failures))
    expect(f"every pose has its frame, got {len(set(seqs))}", len(set(seqs)) == count)
    paused_s = max(np.diff(came_s))
    say(f"{len(outcomes)} requests, {len(failures)} broken answers")
    say(f"the stream paused for {paused_s:.1f} s (promised: {RESUMED_S:g} s)")
    stack.docker("start", victim)
    stack.compose("up", "--detach", "--no-build", "--wait")


def roll(stack: Stack) -> None:
    """replicas of a new image take the place of the old ones, and no request fails"""
    old = stack.containers("service")
    stack.build_next()
    with load(stack.url, retries=0) as outcomes:
        began = time.monotonic()
        stack.run("scripts/roll", *stack.options)
        took_s, done = time.monotonic() - began, len(outcomes)
        stack.wait_until("requests after the change", lambda: len(outcomes) >= done + 10)
    failures = [outcome for outcome in outcomes if outcome]
    expect(f"no failure, got {failures}", not failures)
    new = stack.containers("service")
    expect(f"as many others, got {old} and {new}", len(new) == len(old) and not {*old} & {*new})
    labels = {stack.docker("inspect", "-f", '{{index .Config.Labels "check"}}', container) for container in new}
    expect(f"of the new image, got {labels}", labels == {"next"})
    say(f"{len(new)} replicas changed in {took_s:.0f} s; {len(outcomes)} requests, none tried twice by its client")


def drain(stack: Stack) -> None:
    """a replica that is told to stop finishes what it has begun, and ends with 0"""
    victim, count, came = serving(stack), 600, []

    def long_request() -> None:
        with Client(stack.url) as client:
            for frame in client.repose(AVATAR, poses(count), lod="standard"):
                came.append(frame.frame)
                time.sleep(0.003)  # however fast the machine, it is not over when the replica is told to stop

    with load(stack.url) as outcomes, ThreadPoolExecutor(1) as pool:
        long = pool.submit(long_request)
        stack.wait_until("frames of a request", lambda: bool(came))
        began = time.monotonic()
        stack.docker("stop", "--time", f"{STOP_S:.0f}", victim)
        took_s = time.monotonic() - began
        long.result(WAIT_S)
        expect(f"every frame in order, got {len(came)}", came == list(range(count)))
    failures = [outcome for outcome in outcomes if outcome]
    expect(f"no failure, got {failures}", not failures)
    status = stack.docker("inspect", "-f", "{{.State.ExitCode}}", victim)
    expect(f"exit status 0, got {status}", status == "0")
    expect(f"stopped within {STOP_S:g} s, got {took_s:.1f}", took_s < STOP_S)
    say(f"stopped in {took_s:.1f} s; {len(outcomes)} requests meanwhile")


def keys(stack: Stack) -> None:
    """with a file of keys, those who have none are refused, but for Prometheus"""
    key = stack.compose("run", "--rm", "keys", "add", "check").splitlines()[-1]
    stack.environment["REPOSER_KEYS_FILE"] = "/var/lib/reposer/keys/keys.json"
    stack.environment["REPLICAS"] = "1"
    stack.compose("up", "--detach", "--no-build", "--wait")
    stack.wait_until("401 without a key", lambda: httpx.get(f"{stack.url}/avatars").status_code == 401)
    with Client(stack.url, key) as client:
        expect("avatars with a key", len(client.avatars()) == 1)
    replica = stack.containers("service")[0]
    program = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8000/metrics').status)"
    expect("metrics for Prometheus", stack.docker("exec", replica, "python", "-c", program) == "200")
    expect("no metrics in front", httpx.get(f"{stack.url}/metrics").status_code == 404)


def observability(stack: Stack) -> None:
    """Prometheus watches every replica, and understands what the dashboard asks"""
    stack.build_prometheus()
    images = ["prometheus"]
    if "PROMETHEUS_IMAGE" in stack.environment and "GRAFANA_IMAGE" not in stack.environment:
        say("Grafana is not tried: there is no image of it")
    else:
        images.append("grafana")
    stack.compose("--profile", "observability", "up", "--detach", "--no-build", "--wait", *images)
    (prometheus,) = stack.containers("prometheus")

    def ask(query: str) -> str:
        return stack.docker("exec", prometheus, "promtool", "query", "instant", "http://127.0.0.1:9090", query)

    for image in images:
        confined(stack, image)
    replicas = len(stack.containers("service"))
    stack.wait_until("an eye on every replica", lambda: f"=> {replicas} @" in ask('sum(up{job="reposer"})'))
    expect("frames were counted", "=>" in ask("sum(reposer_frames_total) > 0"))
    dashboard = json.loads((ROOT / "docker/observability/reposer.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    answered = [ask(query.replace("$__rate_interval", "1m")) for query in queries]
    say(f"{replicas} replicas, {len(queries)} queries, {sum(map(bool, answered))} of them with something to show")
    if "grafana" in images:
        address = stack.compose("--profile", "observability", "port", "grafana", "3000")
        shown = httpx.get(f"http://{address}/api/dashboards/uid/reposer").json()
        expect("the dashboard is there", len(shown["dashboard"]["panels"]) == len(dashboard["panels"]))


CHECKS = (
    *(answers, streams, viewer, limits, affinity, confinement, contents, redis_restart),
    *(replica_killed, roll, observability, drain, keys),
)


if __name__ == "__main__":
    sys.exit(main())
