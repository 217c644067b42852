"""Sequences of meshes, one file a frame, in a zip: OBJ and binary PLY.

Vertices and faces keep their order and number in every frame; colours are sRGB, as readers of both expect.
"""

import zipfile
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from service.bundle.glb import Mesh
from service.engine import Batch
from service.formats.clip import Clip, Sink, VertexNormals, frames_of, member

OBJ_MEDIA_TYPE, PLY_MEDIA_TYPE = "application/vnd.reposer.obj+zip", "application/vnd.reposer.ply+zip"
TEXTURE = "texture.jpg"


def encode_obj(batches: Iterator[Batch], clip: Clip) -> Iterator[bytes]:
    """`frame_000000.obj`, ..., with one material and the texture beside them."""
    still = mesh_files(clip.mesh, "avatar")
    del still["avatar.obj"]
    writer, normals = _ObjWriter(clip.mesh, "avatar.mtl"), VertexNormals(clip.mesh)
    sink = Sink()
    with zipfile.ZipFile(sink, "w", compresslevel=1) as archive:
        for name, content in still.items():
            archive.writestr(member(name), content)
        for n, vertices in enumerate(frames_of(batches)):
            # Text shrinks to a third; level 1 costs no more than writing the text does.
            text = writer.text(vertices, normals(vertices))
            archive.writestr(member(f"frame_{n:06}.obj", zipfile.ZIP_DEFLATED), text, compresslevel=1)
            yield sink.taken()
    yield sink.taken()


def encode_ply(batches: Iterator[Batch], clip: Clip) -> Iterator[bytes]:
    """`frame_000000.ply`, ..., little-endian, with the texture beside them."""
    mesh, normals = clip.mesh, VertexNormals(clip.mesh)
    fields = [(name, "<f4") for name in ("x", "y", "z", "nx", "ny", "nz")]
    if mesh.colors is not None:
        fields += [(name, "u1") for name in ("red", "green", "blue")]
    if mesh.uv is not None:
        fields += [("s", "<f4"), ("t", "<f4")]
    rows = np.zeros(len(mesh.vertices), fields)
    if mesh.colors is not None:
        for channel, name in enumerate(("red", "green", "blue")):
            rows[name] = mesh.colors[:, channel]
    if mesh.uv is not None:
        rows["s"], rows["t"] = mesh.uv[:, 0], 1 - mesh.uv[:, 1]
    corners = np.zeros(len(mesh.faces), [("count", "u1"), ("corners", "<i4", 3)])
    corners["count"], corners["corners"] = 3, mesh.faces
    kinds = {"<f4": "float", "u1": "uchar"}
    head = ["ply", "format binary_little_endian 1.0", "comment metres, y up"]
    if mesh.texture is not None:
        head.append(f"comment TextureFile {TEXTURE}")
    head += [f"element vertex {len(rows)}", *(f"property {kinds[kind]} {name}" for name, kind in fields)]
    head += [f"element face {len(corners)}", "property list uchar int vertex_indices", "end_header", ""]
    start, end = "\n".join(head).encode(), corners.tobytes()
    sink = Sink()
    with zipfile.ZipFile(sink, "w") as archive:
        if mesh.texture is not None:
            archive.writestr(member(TEXTURE), mesh.texture)
        for n, vertices in enumerate(frames_of(batches)):
            for values, names in ((vertices, ("x", "y", "z")), (normals(vertices), ("nx", "ny", "nz"))):
                for axis, name in enumerate(names):
                    rows[name] = values[:, axis]
            archive.writestr(member(f"frame_{n:06}.ply"), start + rows.tobytes() + end)
            yield sink.taken()
    yield sink.taken()


def mesh_files(mesh: Mesh, name: str) -> dict[str, bytes]:
    """A still mesh as files: `name`.obj, `name`.mtl and, where it has one, its texture."""
    image = f"map_Kd {TEXTURE}\n" if mesh.texture is not None else ""
    files = {
        f"{name}.obj": _ObjWriter(mesh, f"{name}.mtl").text(mesh.vertices, VertexNormals(mesh)(mesh.vertices)),
        f"{name}.mtl": f"newmtl clothed\nKd 1 1 1\nKs 0 0 0\n{image}".encode(),
    }
    return files | ({TEXTURE: mesh.texture} if mesh.texture is not None else {})


class _ObjWriter:
    """Formats what moves for each frame anew, and what does not only once."""

    def __init__(self, mesh: Mesh, material_file: str) -> None:
        self._count = len(mesh.vertices)
        self._head = f"# metres, y up\nmtllib {material_file}\n"
        self._vertex, self._colors = "v %.6f %.6f %.6f\n", None
        if mesh.colors is not None:
            # Not of the standard, yet what most readers look for behind the coordinates.
            self._vertex, self._colors = "v %.6f %.6f %.6f %.4f %.4f %.4f\n", mesh.colors / 255
        places = ""
        if mesh.uv is not None:
            flipped = np.stack([mesh.uv[:, 0], 1 - mesh.uv[:, 1]], axis=1)  # OBJ counts from the lower left corner
            places = ("vt %.6f %.6f\n" * len(flipped)) % tuple(flipped.ravel().tolist())
        corner = "%d/%d/%d" if mesh.uv is not None else "%d//%d"
        numbers = np.repeat(mesh.faces.ravel() + 1, 3 if mesh.uv is not None else 2)
        faces = (f"f {corner} {corner} {corner}\n" * len(mesh.faces)) % tuple(numbers.tolist())
        self._tail = f"{places}usemtl clothed\n{faces}"

    def text(self, vertices: NDArray[np.float32], normals: NDArray[np.float32]) -> bytes:
        """The file of one frame, (V, 3) each."""
        values = vertices if self._colors is None else np.concatenate([vertices, self._colors], axis=1)
        lines = (self._vertex * self._count) % tuple(values.ravel().tolist())
        directions = ("vn %.4f %.4f %.4f\n" * self._count) % tuple(normals.ravel().tolist())
        return f"{self._head}{lines}{directions}{self._tail}".encode()
