"""Laws of the engines on Ray that need no cluster: what is tried again, what is refused, what is computed together."""

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError
from ray.serve.exceptions import BackPressureError

from service.errors import AvatarUnavailable, EngineFailed, OutOfMemory, Overloaded
from service.ray import engines as module
from service.ray.engines import MOST_FAILURES, PAUSES_S, Engines, RemoteEngine, Stored, store
from service.ray.settings import RaySettings

MESH = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object store of this process, no pauses, and an avatar for each graph."""
    monkeypatch.setattr(module.ray, "put", lambda value: value)
    monkeypatch.setattr(module.ray, "get", lambda ref: ref)
    context = SimpleNamespace(get_assigned_resources=lambda: {"CPU": 1.0})
    monkeypatch.setattr(module.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(module.serve, "multiplexed", lambda max_num_models_per_replica: _once_each)
    monkeypatch.setattr(module, "set_up_logging", lambda: None)
    monkeypatch.setattr(module, "PAUSES_S", [0.0] * len(PAUSES_S))


def _once_each(load: Callable[[str], Any]) -> Callable[[str], Any]:
    loaded: dict[str, Any] = {}

    async def get(digest: str) -> Any:
        if digest not in loaded:
            loaded[digest] = await load(digest)
        return loaded[digest]

    return get


class Handle:
    """A deployment's handle whose calls end as `outcomes` say, one after the other."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = [("cpu", "numpy"), *outcomes]
        self.calls: list[tuple[str, Any]] = []
        self.model, self.cancelled = "", 0

    def options(self, *, method_name: str = "", multiplexed_model_id: str = "") -> "Handle":
        self.method, self.model = method_name, multiplexed_model_id or self.model
        return self

    def remote(self, *arguments: Any) -> "Handle":
        self.calls.append((self.method, arguments))
        return self

    def result(self, timeout_s: float) -> Any:
        outcome = self.outcomes[len(self.calls) - 1]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def cancel(self) -> None:
        self.cancelled += 1


def remote(handle: Handle) -> RemoteEngine:
    return RemoteEngine(handle, b"graph", timeout_s=9.0)  # type: ignore[arg-type]


def frames(count: int, x: float = 0.0) -> tuple[Any, Any]:
    """Transforms of so many frames, all moved along x."""
    roots = np.tile(np.eye(4, dtype=np.float32), (count, 1, 1))
    roots[:, 0, 3] = x
    return np.zeros((count, 24, 4, 4), np.float32), roots


def task_error(cause: Exception) -> RayTaskError:
    """As Ray delivers what a replica raised."""
    return RayTaskError("repose", "Traceback", cause)


LOST = [ActorDiedError(), ActorUnavailableError("gone", None), ObjectLostError("ab", None, "")]


def test_a_call_that_was_lost_is_made_again() -> None:
    handle = Handle(*LOST, "vertices")
    assert len(LOST) == len(PAUSES_S)
    assert remote(handle).repose(MESH, *frames(1)) == "vertices"
    assert [method for method, _ in handle.calls] == ["load"] + 4 * ["repose"]


def test_but_not_for_ever() -> None:
    handle = Handle(*LOST, LOST[0])
    with pytest.raises(Overloaded) as caught:
        remote(handle).repose(MESH, *frames(1))
    assert caught.value.headers == {"Retry-After": "5"}
    assert len(handle.calls) == 1 + 1 + len(PAUSES_S)


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (BackPressureError(32, 32), Overloaded),
        (TimeoutError(), Overloaded),
        (task_error(OutOfMemory("no memory")), OutOfMemory),
        (task_error(AvatarUnavailable("not a graph")), AvatarUnavailable),
        (task_error(ZeroDivisionError()), EngineFailed),
    ],
)
def test_an_answer_of_any_kind_is_not_asked_for_again(outcome: Exception, expected: type[Exception]) -> None:
    handle = Handle(outcome)
    with pytest.raises(expected) as caught:
        remote(handle).repose(MESH, *frames(1))
    assert type(caught.value) is expected
    assert len(handle.calls) == 2
    assert handle.cancelled == isinstance(outcome, TimeoutError)


def test_graphs_and_meshes_are_stored_once_and_go_by_their_content() -> None:
    handle = Handle("a", "b", "c")
    engine = remote(handle)
    for mesh in (MESH, MESH, MESH.copy()):
        engine.repose(mesh, *frames(1))
    graphs, meshes = ([arguments[n] for _, arguments in handle.calls[1:]] for n in (0, 1))
    assert {graph.digest for graph in graphs} == {handle.model} == {store(b"graph").digest}
    assert len({mesh.digest for mesh in meshes}) == 1
    assert meshes[0] is meshes[1]
    assert meshes[0] is not meshes[2]
    assert store(MESH + 1).digest != meshes[0].digest


class Runner:
    """The engine in a replica: adds the root's place to the mesh while the gate is open."""

    device, provider, alone_up_to = "cpu", "numpy", 0

    def __init__(self) -> None:
        self.gate, self.began = threading.Event(), threading.Event()
        self.batches: list[int] = []
        self.fault: Exception | None = None
        self.gate.set()

    def repose(self, mesh: Any, bones: Any, roots: Any) -> Any:
        self.batches.append(len(bones))
        self.began.set()
        assert self.gate.wait(30)
        if self.fault is not None and (roots[:, 0, 3] == 13).any():
            raise self.fault
        return mesh + roots[:, None, :3, 3]


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
def replica(runner: Runner, tmp_path: Any) -> Engines:
    # Room for two frames more than one of these meshes.
    return Engines(RaySettings(bundle_dir=tmp_path, batch_vertex_frames=4 * len(MESH)), lambda graph: runner)


async def _held_up(replica: Engines, runner: Runner, calls: list[Any]) -> list[Any]:
    """One call in the engine, the others waiting behind it; then the gate opens.  What became of them."""
    for mesh in {call[0].digest: call[0] for call in calls}.values():
        await replica.repose(store(b"graph"), mesh, *frames(1))  # so that none has to be fetched later
    runner.batches.clear()
    runner.began.clear()
    runner.gate.clear()
    tasks = [asyncio.create_task(replica.repose(store(b"graph"), *calls[0]))]
    await asyncio.to_thread(runner.began.wait, 30)
    tasks += [asyncio.create_task(replica.repose(store(b"graph"), *call)) for call in calls[1:]]
    while len(replica._waiting) < len(calls) - 1:
        await asyncio.sleep(0.001)
    runner.gate.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.anyio
async def test_calls_that_wait_are_computed_together_within_the_budget(replica: Engines, runner: Runner) -> None:
    mesh, other = store(MESH), store(MESH + 100)
    calls = [(mesh, *frames(1, 1)), (mesh, *frames(2, 2)), (other, *frames(1, 3)), (mesh, *frames(1, 4))]
    calls += [(mesh, *frames(2, 5)), (mesh, *frames(1, 6))]
    found = await _held_up(replica, runner, calls)
    assert runner.batches == [1, 4, 1, 2]
    for call, vertices in zip(calls, found, strict=True):
        np.testing.assert_array_equal(vertices, call[0].ref[0] + call[2][:, None, :3, 3])


@pytest.mark.anyio
async def test_a_call_that_fails_takes_no_other_with_it(replica: Engines, runner: Runner) -> None:
    runner.fault = EngineFailed("raised")
    mesh = store(MESH)
    found = await _held_up(replica, runner, [(mesh, *frames(1, x)) for x in (1, 12, 13, 14)])
    assert isinstance(found[2], EngineFailed)
    for x, vertices in ((1, found[0]), (12, found[1]), (14, found[3])):
        np.testing.assert_array_equal(vertices, (MESH + np.array([x, 0, 0], np.float32))[None])
    assert runner.batches == [1, 3, 1, 1, 1]


@pytest.mark.anyio
@pytest.mark.parametrize(("fault", "healthy"), [(EngineFailed("raised"), False), (OutOfMemory("no memory"), True)])
async def test_a_replica_that_only_fails_asks_to_be_replaced(
    replica: Engines, runner: Runner, fault: Exception, healthy: bool
) -> None:
    runner.fault = fault

    async def fail() -> None:
        with pytest.raises(type(fault)):
            await replica.repose(store(b"graph"), store(MESH), *frames(1, 13))

    for _ in range(MOST_FAILURES - 1):
        await fail()
    replica.check_health()
    await replica.repose(store(b"graph"), store(MESH), *frames(1, 1))  # one success, and all is well
    for _ in range(MOST_FAILURES):
        await fail()
    if healthy:
        replica.check_health()
    else:
        with pytest.raises(RuntimeError, match="3 times in a row"):
            replica.check_health()


@pytest.mark.anyio
async def test_who_has_gone_is_forgotten(replica: Engines, runner: Runner) -> None:
    runner.gate.clear()
    graph, mesh = store(b"graph"), store(MESH)
    first = asyncio.create_task(replica.repose(graph, mesh, *frames(1, 1)))
    await asyncio.to_thread(runner.began.wait, 30)
    gone, second = (asyncio.create_task(replica.repose(graph, mesh, *frames(1, x))) for x in (2, 3))
    while len(replica._waiting) < 2:
        await asyncio.sleep(0.001)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    runner.gate.set()
    await asyncio.gather(first, second)
    assert runner.batches == [1, 1]
    assert not replica._waiting


def test_what_is_stored_travels_by_reference() -> None:
    """Ray sends the content of a bare reference, not of one inside something."""
    stored = store(b"graph")
    assert isinstance(stored, Stored)
    assert isinstance(stored.ref, list)
