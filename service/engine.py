"""Poses in, vertices out: the one place that runs a network."""

import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.bundle.manifest import INPUTS, OUTPUTS, TensorRecord
from service.bundle.skeleton import Skeleton
from service.errors import AvatarUnavailable, EngineFailed, OutputInvalid
from service.poses import PoseSequence

log = logging.getLogger(__name__)


class Engine(Protocol):
    """Reposes one avatar.  Called from worker threads, several at a time."""

    device: str
    """`cuda` or `cpu`: where it really runs."""
    provider: str

    def repose(
        self,
        canonical_vertices: NDArray[np.float32],
        bone_transforms: NDArray[np.float32],
        root_transforms: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """(V, 3), (F, 24, 4, 4), (F, 4, 4) -> (F, V, 3), metres."""
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


class OnnxEngine:
    """A graph in ONNX Runtime, on CUDA where that is there and works, else on the CPU."""

    def __init__(self, graph: bytes, *, threads: int = 0, cpu_only: bool = False) -> None:
        """Load a graph from memory: files beside it (external data) are out of its reach.

        Raises:
            AvatarUnavailable: no valid graph, or not one with the inputs and outputs of a bundle.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Without this the threads spin between batches, on the cores that encode and send.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
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
        if self.device == "cpu" and len(wanted) > 1:
            log.warning("CUDA is offered by onnxruntime but does not start: running on the CPU")

    def repose(
        self,
        canonical_vertices: NDArray[np.float32],
        bone_transforms: NDArray[np.float32],
        root_transforms: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        inputs = {
            "canonical_vertices": canonical_vertices,
            "bone_transforms": bone_transforms,
            "root_transforms": root_transforms,
        }
        try:
            (vertices,) = self._session.run(["vertices"], inputs)
        except Exception as error:  # as above
            raise EngineFailed("ONNX Runtime failed") from error
        return np.asarray(vertices)


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
