"""Engines elsewhere: a Serve deployment that runs graphs, and the `Engine` of the service that calls it.

Graphs and meshes lie in Ray's object store under the digests of their content.  A call names them, and a replica
fetches what it does not have, so it needs no folder of avatars, and a new version of an avatar is a new graph to it.
"""

import asyncio
import hashlib
import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray
from ray import ObjectRef, serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from service.avatars import EngineFactory
from service.engine import Engine, OnnxEngine
from service.errors import AvatarServiceError, EngineFailed, OutOfMemory, Overloaded
from service.ray.settings import RaySettings
from service.serve import set_up_logging

log = logging.getLogger(__name__)
PAUSES_S = (0.1, 0.5, 2.0)
"""Before a call whose replica was lost is made again, of another one."""
MOST_FAILURES = 3
"""So many failures in a row, and a replica asks to be replaced by a new process."""


class Stored(NamedTuple):
    """A graph or a mesh in the object store."""

    digest: str
    ref: list[ObjectRef]
    """One, in a list: Ray would send the content in place of a bare one."""


def store(value: bytes | NDArray[np.float32]) -> Stored:
    """Put `value` where replicas can fetch it, for as long as somebody holds what this returns."""
    content = value if isinstance(value, bytes) else value.tobytes()
    return Stored(hashlib.sha256(content).hexdigest()[:32], [ray.put(value)])


class EngineLost(Overloaded):
    """The replica, or the machine it was on, is gone."""


class RemoteEngine:
    """The `Engine` of one graph; who runs it is decided with each call, as a rule a replica that has it already."""

    alone_up_to = 0

    def __init__(self, engines: DeploymentHandle, graph: bytes, timeout_s: float) -> None:
        """Have the graph loaded somewhere.

        Raises:
            AvatarUnavailable: no valid graph.
            Overloaded: as `repose`.
        """
        self._graph, self._timeout_s = store(graph), timeout_s
        self._engines = engines.options(multiplexed_model_id=self._graph.digest)
        self._held: dict[int, tuple[NDArray[np.float32], Stored]] = {}
        self.device, self.provider = self._call("load")

    def repose(
        self,
        canonical_vertices: NDArray[np.float32],
        bone_transforms: NDArray[np.float32],
        root_transforms: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """As `Engine.repose`; what comes back is read-only.

        Raises:
            Overloaded: too many calls wait, no replica answers in time, or one after the other is lost.
            EngineFailed: the engine raised.
        """
        if id(canonical_vertices) not in self._held:
            # With the array itself, so that no other one gets its id.
            self._held[id(canonical_vertices)] = canonical_vertices, store(canonical_vertices)
        return self._call("repose", self._held[id(canonical_vertices)][1], bone_transforms, root_transforms)

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call a replica, and if it is lost before it answers, another one: nothing but the answer depends on it."""
        for pause_s in PAUSES_S:
            try:
                return self._call_once(method, *arguments)
            except EngineLost as lost:
                log.warning("an engine was lost with a call: %s", lost)
                time.sleep(pause_s)
        return self._call_once(method, *arguments)

    def _call_once(self, method: str, *arguments: Any) -> Any:
        response = self._engines.options(method_name=method).remote(self._graph, *arguments)
        try:
            return response.result(timeout_s=self._timeout_s)
        except TimeoutError as error:
            response.cancel()
            raise Overloaded(f"no engine has answered within {self._timeout_s:g} s", retry_after_s=5) from error
        except RayServeException as error:
            raise Overloaded(f"no engine takes the call: {error}") from error
        except RayTaskError as error:  # it answered: with an exception
            if isinstance(error.cause, AvatarServiceError):
                raise error.cause from error
            raise EngineFailed("the engine failed in an unknown way") from error
        except RayError as error:
            raise EngineLost(type(error).__name__, retry_after_s=5) from error


@dataclass(eq=False)
class _Loaded:
    """A graph that runs here, and the meshes that it was asked for."""

    engine: Engine
    meshes: dict[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(eq=False)
class _Call:
    """Frames that wait, or are computed."""

    loaded: _Loaded
    mesh: str
    bones: NDArray[np.float32]
    roots: NDArray[np.float32]
    result: NDArray[np.float32] | Exception | None = None


_graph: ContextVar[Stored] = ContextVar("graph")
"""Of the call that this task answers: Serve's loader is given the name only."""


class Engines:
    """The deployment.  One batch is computed at a time; meanwhile the calls gather that are computed next."""

    def __init__(self, settings: RaySettings, make_engine: EngineFactory | None = None) -> None:
        set_up_logging()
        assigned = ray.get_runtime_context().get_assigned_resources()
        make = make_engine or partial(
            OnnxEngine,
            threads=settings.threads or max(1, int(assigned.get("CPU", 1))),
            cpu_only=settings.cpu_only or not assigned.get("GPU"),
        )
        self._budget = settings.batch_vertex_frames
        self._waiting: list[_Call] = []
        self._turn = asyncio.Lock()
        self._failures = 0

        @serve.multiplexed(max_num_models_per_replica=settings.avatars_per_engine)
        async def load(digest: str) -> _Loaded:
            engine = await asyncio.to_thread(lambda: make(ray.get(_graph.get().ref[0])))
            log.info("graph %s runs on %s (%s)", digest, engine.device, engine.provider)
            return _Loaded(engine)

        self._load: Any = load

    async def load(self, graph: Stored) -> tuple[str, str]:
        """Have a graph ready; the device and the provider that it runs on."""
        engine = (await self._loaded(graph)).engine
        return engine.device, engine.provider

    async def repose(
        self, graph: Stored, mesh: Stored, bone_transforms: NDArray[np.float32], root_transforms: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """(F, 24, 4, 4), (F, 4, 4) -> (F, V, 3), metres."""
        loaded = await self._loaded(graph)
        if mesh.digest not in loaded.meshes:
            loaded.meshes[mesh.digest] = await asyncio.to_thread(ray.get, mesh.ref[0])
        call = _Call(loaded, mesh.digest, bone_transforms, root_transforms)
        self._waiting.append(call)
        try:
            async with self._turn:
                if call.result is None:
                    await self._compute(self._batch(call))
        finally:
            if call in self._waiting:
                self._waiting.remove(call)
        if isinstance(call.result, np.ndarray):
            return call.result
        assert call.result is not None
        raise call.result

    def check_health(self) -> None:
        """Asked by Serve, which replaces the replica if this raises."""
        if self._failures >= MOST_FAILURES:
            raise RuntimeError(f"the engine has failed {self._failures} times in a row")

    async def _loaded(self, graph: Stored) -> _Loaded:
        _graph.set(graph)
        return await self._load(graph.digest)

    def _batch(self, first: _Call) -> list[_Call]:
        """`first`, and of those that wait what can be computed with it, within the budget of vertex-frames."""
        room = self._budget // len(first.loaded.meshes[first.mesh]) - len(first.bones)
        batch = [first]
        for call in self._waiting:
            alike = call.loaded is first.loaded and call.mesh == first.mesh
            if call is not first and alike and len(call.bones) <= room:
                batch.append(call)
                room -= len(call.bones)
        self._waiting = [call for call in self._waiting if call not in batch]
        return batch

    async def _compute(self, batch: list[_Call]) -> None:
        """Give every call of a batch its result."""
        loaded, mesh = batch[0].loaded, batch[0].loaded.meshes[batch[0].mesh]
        bones = np.concatenate([call.bones for call in batch])
        roots = np.concatenate([call.roots for call in batch])
        try:
            vertices = await asyncio.to_thread(loaded.engine.repose, mesh, bones, roots)
        except Exception as error:  # whatever it is, it belongs to those who asked
            if len(batch) > 1:
                for call in batch:
                    await self._compute([call])
                return
            self._failures += not isinstance(error, OutOfMemory)
            batch[0].result = error
            return
        self._failures = 0
        ends = np.cumsum([len(call.bones) for call in batch])
        for call, part in zip(batch, np.split(vertices, ends[:-1]), strict=True):
            call.result = part
