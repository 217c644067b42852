"""The service on a Ray of this machine: three avatars with room for two, overload, and replicas that are killed.

The engines note what they do, and hold every call while the gate is shut: all waits are for a state, none for a time.
"""

import hashlib
import itertools
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
from ray import cloudpickle, serve

from service.avatars import Avatar, still_pose
from service.bundle.files import read_bundle, write_bundle
from service.client import Client
from service.engine import OnnxEngine
from service.errors import AvatarUnavailable
from service.frames import StreamReader
from service.ray.app import application
from service.ray.engines import RemoteEngine
from service.ray.settings import RaySettings

# Nine processes start, on two cores that others may use as well.
TIMEOUT_S = 300.0
pytestmark = pytest.mark.timeout(4 * TIMEOUT_S)
MANY = 40
"""Requests: more than two replicas take, and let wait, together."""
FRAMES = "application/vnd.reposer.frames;codec=f32"


class Noting(OnnxEngine):
    """Writes down what it does, and computes only while there is no file `shut`."""

    def __init__(self, folder: str, graph: bytes) -> None:
        self.folder, self.graph = folder, hashlib.sha256(graph).hexdigest()
        super().__init__(graph, threads=1, cpu_only=True)
        self.note("loaded")

    def repose(self, *arguments: Any) -> Any:
        self.note("began")
        while os.path.exists(f"{self.folder}/shut"):
            time.sleep(0.01)
        vertices = super().repose(*arguments)
        self.note("done")
        return vertices

    def __del__(self) -> None:
        self.note("left")

    def note(self, what: str) -> None:
        notes = os.open(f"{self.folder}/notes", os.O_APPEND | os.O_CREAT | os.O_WRONLY)
        os.write(notes, json.dumps({"what": what, "graph": self.graph, "pid": os.getpid()}).encode() + b"\n")
        os.close(notes)


def until(true: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := true()):
        assert time.monotonic() < deadline, "it did not come to it"
        time.sleep(0.02)
    return found


class Cluster:
    """The service, and what its engines have noted."""

    def __init__(self, folder: Path, bundle_dir: Path, http: httpx.Client) -> None:
        self._folder, self._http = folder, http
        (folder / "notes").touch()
        bundles = {name: read_bundle(bundle_dir / name) for name in "abc"}
        self.avatars = {
            name: Avatar(bundle, OnnxEngine(bundle.repose_onnx, threads=1)) for name, bundle in bundles.items()
        }
        self._names = {hashlib.sha256(bundle.repose_onnx).hexdigest(): name for name, bundle in bundles.items()}
        self._asked = itertools.count(1)
        self._killed: set[int] = set()

    @property
    def url(self) -> str:
        return str(self._http.base_url)

    def post(self, name: str) -> httpx.Response:
        """Ask for a frame that nobody has asked for before."""
        body = {"poses": [[0.0] * 72], "translations": [[next(self._asked) / 64, 0, 0]]}
        return self._http.post(f"/avatars/{name}/repose?lod=preview", json=body, headers={"Accept": FRAMES})

    def ask(self, name: str) -> None:
        """The same; it must come, and be right."""
        answer = self.post(name)
        assert answer.status_code == 200, answer.text
        (frame,) = StreamReader().feed(answer.content)
        rotations, translation = still_pose()
        translation[0, 0] = frame.root[0] - self.avatars[name].bundle.skeleton.rest_joints[0, 0]
        expected = self.avatars[name].repose("preview", rotations, translation)[0]
        np.testing.assert_allclose(frame.vertices, expected, rtol=0, atol=1e-5)

    def in_flight(self) -> int:
        """Requests that the front is about to answer."""
        lines = self._http.get("/metrics").text.splitlines()
        return int(float(next(line for line in lines if line.startswith("reposer_requests_in_flight ")).split()[1]))

    def notes(self, what: str) -> list[tuple[str, int]]:
        """Of which avatar, and by which process, in order."""
        return [(self._names.get(line["graph"], "?"), line["pid"]) for line in self._lines() if line["what"] == what]

    def busy(self) -> set[int]:
        """Processes that compute, or would if the gate were open."""
        last = {line["pid"]: line["what"] for line in self._lines() if line["what"] in ("began", "done")}
        return {pid for pid, what in last.items() if what == "began"} - self._killed

    def _lines(self) -> list[Any]:
        return [json.loads(line) for line in (self._folder / "notes").read_bytes().splitlines()]

    def shut(self) -> None:
        (self._folder / "shut").touch()

    def is_shut(self) -> bool:
        return (self._folder / "shut").exists()

    def open(self) -> None:
        (self._folder / "shut").unlink(missing_ok=True)

    def kill_one_with_a_call(self) -> None:
        """Kill a replica while it computes; then another one has to do it."""
        self.shut()
        killed = until(self.busy).pop()
        self._killed.add(killed)
        os.kill(killed, signal.SIGKILL)
        until(self.busy)
        self.open()

    def whole(self) -> bool:
        """Both engine replicas run."""
        deployments = serve.status().applications["reposer"].deployments
        return deployments["Engines"].replica_states == {"RUNNING": 2}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, bundle_parts: Any, make_graph: Any) -> Iterator[Cluster]:
    bundle_dir = tmp_path_factory.mktemp("three")
    for name, scale in (("a", 1.0), ("b", 1.25), ("c", 1.5)):
        write_bundle(bundle_dir / name, avatar_id=name, **bundle_parts | {"repose_onnx": make_graph(scale)})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Ray's sockets bear no long names, and it keeps a token in the home folder.
    temporary = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)
    with temporary as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", folder)
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # As where the dashboard is not installed: its agents take longer to start than all the rest.
        patch.setitem(sys.modules, "ray.dashboard.optional_deps", None)
        settings = RaySettings(
            bundle_dir=bundle_dir,
            jobs_dir=Path(folder) / "jobs",
            open_access=True,
            # The front refuses nothing: whoever is refused, Serve had no room for.
            queue_ms=1e9,
            live_queue_ms=1e9,
            parallel_inferences=64,
            min_engines=2,
            max_engines=2,
            avatars_per_engine=1,
            engine_cpus=0.5,
            engine_calls=4,
            queued_calls=6,
            call_timeout_s=4 * TIMEOUT_S,
        )
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        # Replicas cannot import the tests.
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(application(settings, partial(Noting, folder)), name="reposer")
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as http:
                yield Cluster(Path(folder), bundle_dir, http)
            serve.shutdown()
        finally:
            ray.shutdown()


@pytest.fixture
def asking(cluster: Cluster) -> Iterator[ThreadPoolExecutor]:
    """Threads that ask; at the end the gate is open."""
    with ThreadPoolExecutor(MANY) as pool:
        try:
            yield pool
        finally:
            cluster.open()


def test_an_avatar_stays_with_its_replica_until_others_need_the_room(cluster: Cluster) -> None:
    def rounds() -> int:
        """How many loads ten rounds cost."""
        before = len(cluster.notes("loaded"))
        for _ in range(10):
            cluster.ask("a")
            cluster.ask("b")
        return len(cluster.notes("loaded")) - before

    until(lambda: rounds() == 0)
    settled = len(cluster.notes("began"))
    assert rounds() == 0
    (of_a,), (of_b,) = ({pid for name, pid in cluster.notes("began")[settled:] if name == one} for one in "ab")
    assert of_a != of_b
    # The third one takes the place of another, which comes back when it is asked for.
    loaded = len(cluster.notes("loaded"))
    for name in "cab":
        cluster.ask(name)
    since = [name for name, _ in cluster.notes("loaded")[loaded:]]
    assert since[0] == "c"
    assert len(since) > 1
    until(lambda: len(cluster.notes("loaded")) - len(cluster.notes("left")) == 2)


def test_a_stream_passes_through_ray(cluster: Cluster) -> None:
    poses = np.random.default_rng(3).normal(0, 0.3, (5, 72)).astype(np.float32)
    with Client(cluster.url) as client, client.stream("b", "complete", codec="f32", lod="preview") as stream:
        frames = list(stream.repose(poses))
        assert [frame.frame for frame in frames] == [0, 1, 2, 3, 4]
        whole = list(client.repose("b", poses, codec="f32", lod="preview"))
    for frame, expected in zip(frames, whole, strict=True):
        np.testing.assert_allclose(frame.vertices, expected.vertices, rtol=0, atol=1e-5)


def test_overload_is_refused_with_a_time_to_come_back_and_harms_nobody(
    cluster: Cluster, asking: ThreadPoolExecutor
) -> None:
    cluster.shut()
    asked: list[Future[httpx.Response]] = []
    while len(asked) < MANY and not any(one.done() for one in asked):
        asked.append(asking.submit(cluster.post, "a"))
        # One after the other, so that the front does not make one call of several.
        until(lambda: cluster.in_flight() == len(asked) or any(one.done() for one in asked))
    assert wait(asked, timeout=TIMEOUT_S, return_when=FIRST_COMPLETED).done, "nobody was refused"
    cluster.open()
    answers = [one.result() for one in asked]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused
    assert len(answers) - len(refused) >= 8  # four calls in each replica
    for answer in refused:
        assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
        assert int(answer.headers["Retry-After"]) >= 1
    cluster.ask("a")


def test_a_call_in_a_replica_that_is_killed_is_made_again(cluster: Cluster, asking: ThreadPoolExecutor) -> None:
    killing = asking.submit(cluster.kill_one_with_a_call)
    until(cluster.is_shut)
    cluster.ask("a")
    killing.result()


def test_under_load_no_request_notices_that_a_replica_was_killed(cluster: Cluster, asking: ThreadPoolExecutor) -> None:
    answered, enough = [0, 0, 0], threading.Event()

    def client(number: int, name: str) -> None:
        while not enough.is_set():
            cluster.ask(name)
            answered[number] += 1

    clients = [asking.submit(client, number, name) for number, name in enumerate("aab")]

    def ten_more() -> None:
        before = list(answered)
        until(
            lambda: (
                any(one.done() for one in clients)
                or all(now - then >= 10 for now, then in zip(answered, before, strict=True))
            )
        )

    try:
        until(cluster.whole)  # the one that was killed before has been replaced
        ten_more()
        cluster.kill_one_with_a_call()
        ten_more()
    finally:
        enough.set()
    for one in clients:
        one.result()


def test_what_a_replica_raises_is_raised_here(cluster: Cluster) -> None:
    engines = serve.get_deployment_handle("Engines", app_name="reposer")
    with pytest.raises(AvatarUnavailable, match="cannot be loaded"):
        RemoteEngine(engines, b"not a graph", timeout_s=TIMEOUT_S)
