"""Animated GLB: the canonical mesh, one morph target for each frame, linear weights between them.

A clip has at most 255 frames; longer motion becomes several files in a zip.
Reference: Khronos glTF 2.0 specification, sections 3.7.2.2 (morph targets) and 3.11 (animations).
"""

import json
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

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
from service.errors import OutputInvalid
from service.formats.clip import Clip, Sink, VertexNormals, frames_of, member, pieces

GLB_MEDIA_TYPE, GLB_ZIP_MEDIA_TYPE = "model/gltf-binary", "application/vnd.reposer.glb+zip"
MAX_GLB_FRAMES = 255
"""three.js keeps each morph target in a layer of one texture, of which WebGL 2 promises 256."""


def encode_glb(batches: Iterator[Batch], clip: Clip) -> Iterator[bytes]:
    """One animated GLB; the caller has seen to it that 255 frames are enough."""
    return _glb(frames_of(batches), clip, 0)


def encode_glb_zip(batches: Iterator[Batch], clip: Clip) -> Iterator[bytes]:
    """`clip_000000.glb`, `clip_000255.glb`, ... named after their first frame, and `clips.json`, which lists them."""
    starts = range(0, clip.frame_count, MAX_GLB_FRAMES)
    parts = [
        {"file": f"clip_{n:06}.glb", "first_frame": n, "frames": min(MAX_GLB_FRAMES, clip.frame_count - n)}
        for n in starts
    ]
    frames, sink = frames_of(batches), Sink()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(member("clips.json"), json.dumps({"fps": clip.fps, "clips": parts}, indent=1))
        for part in parts:
            count = part["frames"]
            with archive.open(member(part["file"]), "w") as file:
                part_clip = replace(clip, frame_count=count)
                for piece in _glb(islice(frames, count), part_clip, part["first_frame"]):
                    file.write(piece)
                    yield sink.taken()
    yield sink.taken()


def animated_glb(clip: Clip, vertices: NDArray[np.float32]) -> bytes:
    """`encode_glb` of frames that are all there, (F, V, 3), metres."""
    return b"".join(_glb(iter(vertices), clip, 0))


def _glb(frames: Iterator[NDArray[np.float32]], clip: Clip, first_frame: int) -> Iterator[bytes]:
    """The pieces of one file; an empty piece for each frame taken in.

    The JSON comes first and holds the bounds of every frame, so the frames wait in a temporary file.
    """
    mesh, normals_of = clip.mesh, VertexNormals(clip.mesh)
    base_normals = normals_of(mesh.vertices)
    still = replace(mesh, normals=base_normals, skin_joints=None, skin_weights=None)
    frame_bytes = 24 * len(mesh.vertices)
    with tempfile.TemporaryFile() as waiting:
        builder = GlbBuilder()
        attributes, indices = builder.add_mesh_arrays(still)
        builder.add_material(still)
        times = builder.add_array((np.arange(clip.frame_count) / clip.fps).astype(np.float32), FLOAT, bounds=True)
        weights = builder.add_array(np.eye(clip.frame_count, dtype=np.float32).reshape(-1), FLOAT)
        view = builder.reserve_view(frame_bytes * clip.frame_count, VERTEX_DATA, stride=12)
        targets = []
        for n, vertices in enumerate(frames):
            with np.errstate(over="ignore"):
                moved = vertices - mesh.vertices
            if not np.isfinite(moved).all():
                raise OutputInvalid("the vertices are too far away for float32")
            turned = normals_of(vertices) - base_normals
            waiting.write(moved.tobytes() + turned.tobytes())
            start = frame_bytes * n
            position = builder.add_accessor(view, start, moved, FLOAT, bounds=True)
            normal = builder.add_accessor(view, start + frame_bytes // 2, turned, FLOAT)
            targets.append({"POSITION": position, "NORMAL": normal})
            yield b""
        mesh_record = {
            "name": clip.name,
            "primitives": [{"attributes": attributes, "indices": indices, "material": 0, "targets": targets}],
            # A viewer that does not play the clip shows its first frame.
            "weights": [1.0] + [0.0] * (clip.frame_count - 1),
            "extras": {
                "targetNames": [f"frame {first_frame + n}" for n in range(clip.frame_count)],
                "fps": clip.fps,
                "first_frame": first_frame,
            },
        }
        builder.document |= {
            "scenes": [{"nodes": [0]}],
            "nodes": [{"mesh": 0, "name": clip.name}],
            "meshes": [mesh_record],
            "animations": [
                {
                    "name": "motion",
                    "samplers": [{"input": times, "output": weights, "interpolation": "LINEAR"}],
                    "channels": [{"sampler": 0, "target": {"node": 0, "path": "weights"}}],
                }
            ],
        }
        yield builder.finish()
        yield from pieces(waiting)


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
