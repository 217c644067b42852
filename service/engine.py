"""Poses in, vertices out: the one place that runs a network."""

import itertools
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.bundle.manifest import INPUTS, OUTPUTS, PLAIN, SKINNING_WEIGHTS, TensorRecord
from service.bundle.skeleton import Skeleton
from service.errors import AvatarUnavailable, EngineFailed, OutOfMemory, OutputInvalid
from service.poses import PoseSequence
from service.scheduling import give_way

log = logging.getLogger(__name__)
_SIGNS_OF_TOO_LITTLE_MEMORY = ("Failed to allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")
"""In the messages of ONNX Runtime's allocators, of CUDA, of its libraries, and of C++."""


class Engine(Protocol):
    """Reposes one avatar.  Called from worker threads, several at a time, and see `alone_up_to`."""

    device: str
    """`cuda` or `cpu`: where it really runs."""
    provider: str
    alone_up_to: int
    """A single frame of so many vertices is computed by the thread that calls, which waits for nothing meanwhile; 0 if
    that is never so."""

    def repose(
        self,
        canonical_vertices: NDArray[np.float32],
        bone_transforms: NDArray[np.float32],
        root_transforms: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """(V, 3), (F, 24, 4, 4), (F, 4, 4) -> (F, V, 3), metres.

        Engines keep what they derive from an array of canonical vertices: nobody may write to it afterwards.
        """
        ...


@dataclass(frozen=True)
class Batch:
    """Consecutive reposed frames."""

    start: int
    vertices: NDArray[np.float32]
    """(F, V, 3), metres."""
    pelvis: NDArray[np.float32]
    """(F, 3), metres."""
    seconds: float
    queue_s: float = 0.0
    """How long these frames waited for the engine."""


AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 20}
"""Vertices of all frames together in one run: on a CPU what its caches hold, on CUDA what fits beside others."""
WORTH_A_THREAD = 1 << 13
"""Vertices of a single frame for each thread that has a part in it: what is done once a frame, each does again."""
HELD_MESHES = 8
"""Canonical meshes that are kept, with what belongs to them, where the graph runs."""


class OnnxEngine:
    """A graph in ONNX Runtime, on CUDA where that is there and works, else on the CPU.

    CUDA graphs are not captured: the branch between the two forms of the network (see `PLAIN`) rules them out, and
    the some hundred launches that they would save are a tenth of what a single frame may take.
    """

    def __init__(self, graph: bytes, *, threads: int = 0, cpu_only: bool = False, plain: bool = False) -> None:
        """Load a graph from memory: files beside it (external data) are out of its reach.

        Args:
            graph: contents of `repose.onnx`.
            threads: on a CPU, 0 for as many as there are cores.
            cpu_only: do not look for CUDA.
            plain: run the reference form of the network as ONNX Runtime does by itself, for comparison; graphs without
                a choice have one form.

        Raises:
            AvatarUnavailable: no valid graph, or not one with the inputs and outputs of a bundle.
        """
        threads = threads or len(os.sched_getaffinity(0))
        options = ort.SessionOptions()
        # The operators of the fast form are short: threads that meet after each of them would mostly wait for each
        # other.  Here each computes frames, or a part of a frame, from end to end.
        options.intra_op_num_threads = threads if plain else 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        available = ort.get_available_providers()
        wanted: list[Any] = ["CPUExecutionProvider"]
        if "CUDAExecutionProvider" in available and not cpu_only:
            # Same size as requested: the default doubles the arena and never gives it back.
            wanted.insert(0, ("CUDAExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"}))
        try:
            self._session = ort.InferenceSession(graph, options, providers=wanted)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise AvatarUnavailable("the graph cannot be loaded") from error
        _check_tensors("input", self._session.get_inputs(), INPUTS)
        _check_tensors("output", self._session.get_outputs(), OUTPUTS)
        # ONNX Runtime falls back without an error, so what was asked for proves nothing.
        self.provider: str = self._session.get_providers()[0]
        self.device = "cuda" if self.provider == "CUDAExecutionProvider" else "cpu"
        optional = [tensor.name for tensor in self._session.get_overridable_initializers()]
        self._plain = plain and PLAIN in optional
        self._feeds_weights = not plain and SKINNING_WEIGHTS in optional
        own_threads = self.device == "cpu" and not plain
        self._pool = ThreadPoolExecutor(threads, "repose", initializer=give_way) if own_threads else None
        self._threads = threads if own_threads else 1
        self.alone_up_to = 2 * WORTH_A_THREAD - 1 if own_threads else 0
        self._held: dict[int, _Held] = {}
        self._lock = threading.Lock()
        if self.device == "cpu" and len(wanted) > 1:
            log.warning("CUDA is offered by onnxruntime but does not start: running on the CPU")

    def repose(
        self,
        canonical_vertices: NDArray[np.float32],
        bone_transforms: NDArray[np.float32],
        root_transforms: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        try:
            return self._repose(self._hold(canonical_vertices), bone_transforms, root_transforms)
        except Exception as error:  # as above
            if any(sign in str(error) for sign in _SIGNS_OF_TOO_LITTLE_MEMORY):
                raise OutOfMemory("the device has no memory left") from error
            raise EngineFailed("ONNX Runtime failed") from error

    def _repose(
        self, held: "_Held", bone_transforms: NDArray[np.float32], root_transforms: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        vertices = np.empty((len(bone_transforms), len(held.vertices), 3), np.float32)
        parts = self._parts(*vertices.shape[:2])

        def run(part: tuple[slice, slice]) -> None:
            frames, points = part
            self._run(held.part(points), bone_transforms[frames], root_transforms[frames], vertices[frames, points])

        # A single frame is somebody's who waits for it, and worth neither a thread nor giving way.
        alone = len(vertices) == 1 and len(parts) == 1
        for _ in map(run, parts) if self._pool is None or alone else self._pool.map(run, parts):
            pass
        return vertices

    def _parts(self, frames: int, vertices: int) -> list[tuple[slice, slice]]:
        """Which frames and which vertices each run computes; the answer of each lies in one piece."""
        if frames == 1:
            count = max(1, min(self._threads, vertices // WORTH_A_THREAD))
            cuts = [vertices * n // count for n in range(count + 1)]
            return [(slice(0, 1), slice(*cut)) for cut in pairwise(cuts)]
        most = max(1, AT_ONCE[self.device] // max(1, vertices))
        # As many runs for each thread as it takes, all of one size.
        count = self._threads * -(-frames // (self._threads * most))
        size = max(1, -(-frames // max(1, count)))
        return [(slice(start, start + size), slice(None)) for start in range(0, frames, size)]

    def _run(
        self,
        mesh: dict[str, ort.OrtValue],
        bone_transforms: NDArray[np.float32],
        root_transforms: NDArray[np.float32],
        vertices: NDArray[np.float32],
    ) -> None:
        """Repose into `vertices`, to which ONNX Runtime writes without a copy in between."""
        binding = self._session.io_binding()
        for name, value in mesh.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in (("bone_transforms", bone_transforms), ("root_transforms", root_transforms)):
            binding.bind_cpu_input(name, np.ascontiguousarray(value, np.float32))
        binding.bind_output("vertices", "cpu", 0, np.float32, vertices.shape, vertices.ctypes.data)
        self._session.run_with_iobinding(binding)

    def _hold(self, canonical_vertices: NDArray[np.float32]) -> "_Held":
        """What belongs to a mesh, made once, as long as the caller passes the same array."""
        with self._lock:
            held = self._held.get(id(canonical_vertices))
        if held is not None:
            return held
        held = _Held(canonical_vertices, self.device, {PLAIN: np.array(True)} if self._plain else {})
        if self._feeds_weights:
            held = _Held(canonical_vertices, self.device, {SKINNING_WEIGHTS: self._weights(held)})
        with self._lock:
            if len(self._held) >= HELD_MESHES:
                self._held.clear()
            self._held[id(canonical_vertices)] = held
        return held

    def _weights(self, held: "_Held") -> NDArray[np.float32]:
        """The graph's own skinning weights, (V, 24), read off its answers: in a graph with the input for them vertices
        are linear in the bones' translations, so three bones a frame are moved by a metre, each along an axis."""
        bones = np.tile(np.eye(4, dtype=np.float32), (1 + 24 // 3, 24, 1, 1))
        bone = np.arange(24)
        bones[1 + bone // 3, bone, bone % 3, 3] = 1.0
        answers = self._repose(held, bones, np.tile(np.eye(4, dtype=np.float32), (len(bones), 1, 1)))
        return np.ascontiguousarray((answers[1:] - answers[0]).transpose(1, 0, 2).reshape(-1, 24))


class _Held:
    """A mesh, and what is fed with it, where the graph runs.

    Args:
        vertices: (V, 3), metres; held itself too, so that no other array gets its id.
        device: see `Engine.device`.
        more: further inputs; of arrays with a row for each vertex a part of the mesh gets its rows.
    """

    def __init__(self, vertices: NDArray[np.float32], device: str, more: dict[str, NDArray[Any]]) -> None:
        self.vertices = vertices
        self._arrays = {"canonical_vertices": np.ascontiguousarray(vertices, np.float32), **more}
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(array, device) for name, array in self._arrays.items()}

    def part(self, points: slice) -> dict[str, ort.OrtValue]:
        """The inputs for some of the vertices; views, on a CPU."""
        if points == slice(None):
            return self._values
        arrays = {name: array[points] if array.ndim else array for name, array in self._arrays.items()}
        return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}


def repose_in_batches(
    engine: Engine,
    skeleton: Skeleton,
    canonical_vertices: NDArray[np.float32],
    poses: PoseSequence,
    batch_vertex_frames: int,
) -> Iterator[Batch]:
    """Repose a sequence of any length in bounded memory.

    The first batch is one frame, so that it can leave at once; the next ones double up to the budget.

    Raises:
        OutputInvalid: the engine's answer has the wrong shape or is not finite.
        EngineFailed: it raised.
    """
    largest = max(1, batch_vertex_frames // len(canonical_vertices))
    start = 0
    for doubling in itertools.count():
        if start >= len(poses):
            return
        size = min(2 ** min(doubling, 30), largest, len(poses) - start)
        part = slice(start, start + size)
        began = time.perf_counter()
        rotations, translation = poses.rotations[part], poses.translation[part]
        bones = skeleton.bone_transforms(rotations)
        roots = skeleton.root_transforms(rotations, translation)
        vertices = engine.repose(canonical_vertices, bones, roots)
        expected = (size, len(canonical_vertices), 3)
        if vertices.shape != expected or vertices.dtype != np.float32:
            raise OutputInvalid(f"expected float32 {expected}, got {vertices.dtype} {vertices.shape}")
        if not np.isfinite(vertices).all():
            raise OutputInvalid("the graph gave vertices that are not finite")
        pelvis = skeleton.rest_joints[0] + translation
        yield Batch(start, vertices, pelvis, time.perf_counter() - began)
        start += size


def _check_tensors(what: str, found: Sequence[Any], expected: tuple[TensorRecord, ...]) -> None:
    """Names, types and ranks are fixed; a size that the record names must be free, a number must agree."""
    if [tensor.name for tensor in found] != [record.name for record in expected]:
        raise AvatarUnavailable(f"the graph's {what}s are {[t.name for t in found]}, not {[r.name for r in expected]}")
    for tensor, record in zip(found, expected, strict=True):
        fits = len(tensor.shape) == len(record.shape) and all(
            # A free size is a name or None; outputs may leave open what inputs fix.
            size == wanted if isinstance(wanted, int) and isinstance(size, int) else not isinstance(size, int)
            for size, wanted in zip(tensor.shape, record.shape, strict=True)
        )
        if tensor.type != "tensor(float)" or not fits:
            raise AvatarUnavailable(f"the {what} {tensor.name} is {tensor.type} {tensor.shape}, not {record.shape}")
