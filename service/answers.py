"""Reposed batches as bytes: the frame stream, .npz, animated .glb; and which of them an Accept header asks for."""

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import frames
from service.bundle.glb import (
    FLOAT,
    VERTEX_DATA,
    GlbBuilder,
    Mesh,
    read_array,
    read_chunks,
    read_mesh,
)
from service.engine import Batch
from service.errors import NotAcceptable, OutputInvalid, TooManyFrames

FRAMES, NPZ, GLB = frames.MEDIA_TYPE, "application/x-npz", "model/gltf-binary"
FORMATS = (FRAMES, NPZ, GLB)
"""The first is given to those who accept anything."""
MAX_GLB_FRAMES = 255
"""three.js keeps each morph target in a layer of one texture, of which WebGL 2 promises 256."""


@dataclass(frozen=True)
class Clip:
    """What is the same in every frame of an answer."""

    name: str
    mesh: Mesh
    frame_count: int
    fps: float


def negotiate(accept: str | None) -> str:
    """The media type to answer with: the highest q wins, the order of `FORMATS` decides between equals.

    Raises:
        NotAcceptable: none of ours is accepted.
    """
    quality: dict[str, tuple[int, float]] = dict.fromkeys(FORMATS, (0, 0.0))  # (how exact the range is, q)
    for item in (accept or "*/*").split(","):
        media_range, *parameters = (part.strip().lower() for part in item.split(";"))
        q = 1.0
        for name, _, value in (parameter.partition("=") for parameter in parameters):
            if name.strip() == "q":
                try:
                    q = min(1.0, max(0.0, float(value)))
                except ValueError:
                    q = 0.0
        for kind in FORMATS:
            ranges = ("", "*/*", kind.split("/")[0] + "/*", kind)
            exactness = ranges.index(media_range) if media_range in ranges[1:] else 0
            if exactness > quality[kind][0]:
                quality[kind] = (exactness, q)
    best = max(FORMATS, key=lambda kind: quality[kind][1])
    if not quality[best][1] > 0:
        raise NotAcceptable(f"expected one of {', '.join(FORMATS)}", accepted=list(FORMATS))
    return best


def check_length(media_type: str, frame_count: int) -> None:
    """Refuse, before anything is computed, what the format cannot hold.

    Raises:
        TooManyFrames: an animated .glb of more than 255 frames.
    """
    if media_type == GLB and frame_count > MAX_GLB_FRAMES:
        fitting = -(-frame_count // MAX_GLB_FRAMES)
        raise TooManyFrames(
            f"an animated .glb holds at most {MAX_GLB_FRAMES} frames, got {frame_count}: ask for every={fitting}, "
            f"post parts of the sequence, or accept {FRAMES} or {NPZ}",
            limit_frames=MAX_GLB_FRAMES,
        )


def expected_bytes(media_type: str, clip: Clip) -> int:
    """About the size of the answer; exact for the frame stream."""
    return clip.frame_count * frames.frame_bytes(len(clip.mesh.vertices))


def encode(media_type: str, batches: Iterator[Batch], clip: Clip) -> Iterator[bytes]:
    """The answer in pieces, each as soon as its batch is computed."""
    return {FRAMES: _encode_frames, NPZ: _encode_npz, GLB: _encode_glb}[media_type](batches, clip)


def _encode_frames(batches: Iterator[Batch], clip: Clip) -> Iterator[bytes]:
    for batch in batches:
        server_us = min(int(1e6 * batch.seconds / len(batch.vertices)), 0xFFFFFFFF)
        numbers = range(batch.start, batch.start + len(batch.vertices))
        yield b"".join(
            frames.encode_frame(vertices, root, seq=n, frame=n, last=n == clip.frame_count - 1, server_us=server_us)
            for n, vertices, root in zip(numbers, batch.vertices, batch.pelvis, strict=True)
        )


def _encode_npz(batches: Iterator[Batch], clip: Clip) -> Iterator[bytes]:
    """`numpy.savez(vertices, faces, fps)`, written as it is computed: the archive is never whole in memory."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for name, array in (("faces", clip.mesh.faces), ("fps", np.array(clip.fps))):
            with archive.open(_member(name), "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        with archive.open(_member("vertices"), "w", force_zip64=True) as file:
            shape = (clip.frame_count, len(clip.mesh.vertices), 3)
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in batches:
                file.write(np.ascontiguousarray(batch.vertices, "<f4").tobytes())
                yield sink.taken()
    yield sink.taken()


def _member(name: str) -> zipfile.ZipInfo:
    # A fixed date: equal answers are equal bytes.
    return zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))


class _Sink(io.RawIOBase):
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


def _encode_glb(batches: Iterator[Batch], clip: Clip) -> Iterator[bytes]:
    # The JSON comes first and holds the bounds of every frame, so all of them must be known.
    yield animated_glb(clip, np.concatenate([batch.vertices for batch in batches]))


def animated_glb(clip: Clip, vertices: NDArray[np.float32]) -> bytes:
    """An animated GLB: the canonical mesh, one morph target for each frame, linear weights between them.

    Args:
        vertices: (F, V, 3), metres, F at most 255.
    """
    base, frame_count = clip.mesh.vertices, len(vertices)
    # Normals of the canonical pose would light the other poses wrongly; without any, the viewer makes its own.
    still = replace(clip.mesh, normals=None, skin_joints=None, skin_weights=None)
    with np.errstate(over="ignore"):
        deltas = vertices - base
    if not np.isfinite(deltas).all():
        raise OutputInvalid("the vertices are too far away for float32")
    builder = GlbBuilder()
    attributes, indices = builder.add_mesh_arrays(still)
    builder.add_material(still)
    view = builder.add_view(deltas.reshape(-1, 3), FLOAT, VERTEX_DATA, stride=12)
    targets = [
        {"POSITION": builder.add_accessor(view, 12 * len(base) * n, delta, FLOAT, bounds=True)}
        for n, delta in enumerate(deltas)
    ]
    times = builder.add_array((np.arange(frame_count) / clip.fps).astype(np.float32), FLOAT, bounds=True)
    weights = builder.add_array(np.eye(frame_count, dtype=np.float32).reshape(-1), FLOAT)
    builder.document |= {
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": clip.name}],
        "meshes": [
            {
                "name": clip.name,
                "primitives": [{"attributes": attributes, "indices": indices, "material": 0, "targets": targets}],
                # A viewer that does not play the clip shows its first frame.
                "weights": [1.0] + [0.0] * (frame_count - 1),
                "extras": {"targetNames": [f"frame {n}" for n in range(frame_count)], "fps": clip.fps},
            }
        ],
        "animations": [
            {
                "name": "motion",
                "samplers": [{"input": times, "output": weights, "interpolation": "LINEAR"}],
                "channels": [{"sampler": 0, "target": {"node": 0, "path": "weights"}}],
            }
        ],
    }
    return builder.finish()


def read_animated_glb(data: bytes) -> tuple[Mesh, NDArray[np.float32], NDArray[np.float32]]:
    """What `animated_glb` wrote: the canonical mesh, the vertices (F, V, 3), the time of each frame in seconds.

    Raises:
        ValueError: it was not written by us.
    """
    mesh = read_mesh(data)
    document, binary = read_chunks(data)
    targets = document["meshes"][0]["primitives"][0]["targets"]
    sampler = document["animations"][0]["samplers"][0]
    deltas = np.stack([read_array(document, binary, target["POSITION"], FLOAT, "VEC3") for target in targets])
    times = read_array(document, binary, sampler["input"], FLOAT, "SCALAR")
    weights = read_array(document, binary, sampler["output"], FLOAT, "SCALAR").reshape(len(times), len(targets))
    return mesh, mesh.vertices + np.einsum("ft,tvc->fvc", weights, deltas, optimize=True), times
