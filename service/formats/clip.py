"""What every format is given, and the small tools they share."""

import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from service.bundle.glb import Mesh
from service.bundle.skeleton import Skeleton
from service.engine import Batch
from service.poses import PoseSequence

PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Clip:
    """What is the same in every frame of an answer."""

    name: str
    mesh: Mesh
    frame_count: int
    fps: float
    skeleton: Skeleton | None = None
    """Needed by the formats that move bones."""
    poses: PoseSequence | None = None
    """The same."""


@dataclass(frozen=True)
class Format:
    """One row of the table of formats."""

    media_type: str
    suffix: str
    """Of a file, with its dot; the only suffix that means this format."""
    encode: Callable[[Iterator[Batch], Clip], Iterator[bytes]]
    """The file in pieces.  A piece may be empty: a batch was taken in, and nothing can leave yet."""
    needs_batches: bool = True
    """False: made from the poses alone, no batch is taken."""


class Sink(io.RawIOBase):
    """A file that only grows at its end and gives away what was written."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(self._parts[-1])

    def taken(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)


def member(name: str, compression: int = zipfile.ZIP_STORED) -> zipfile.ZipInfo:
    """A zip member with a fixed date: equal answers are equal bytes."""
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.compress_type = compression
    return info


def pieces(file: IO[bytes]) -> Iterator[bytes]:
    """A file from its beginning."""
    file.seek(0)
    while piece := file.read(PIECE_BYTES):
        yield piece


def frames_of(batches: Iterator[Batch]) -> Iterator[NDArray[np.float32]]:
    """The frames one by one, (V, 3)."""
    for batch in batches:
        yield from batch.vertices


class VertexNormals:
    """Normals of a moving surface; smooth across texture seams, where a place has several vertices."""

    def __init__(self, mesh: Mesh) -> None:
        _, first, twin = np.unique(mesh.vertices, axis=0, return_index=True, return_inverse=True)
        self._twin = first[twin.reshape(-1)]
        self._corners = self._twin[mesh.faces].T.reshape(-1)
        self._faces = mesh.faces

    def __call__(self, vertices: NDArray[np.float32]) -> NDArray[np.float32]:
        """(V, 3) -> (V, 3), unit length: the mean over a vertex's faces, weighted by area."""
        a, b, c = (vertices[self._faces[:, corner]].astype(np.float64) for corner in range(3))
        of_face = np.tile(np.cross(b - a, c - a), (3, 1))
        total = np.stack([np.bincount(self._corners, of_face[:, axis], len(vertices)) for axis in range(3)], axis=1)[
            self._twin
        ]
        length = np.linalg.norm(total, axis=1, keepdims=True)
        # A vertex of no face, or of flat ones only, has no normal; any will do.
        up = np.array([0.0, 1.0, 0.0])
        return np.where(length > 1e-12, total / np.maximum(length, 1e-12), up).astype(np.float32)
