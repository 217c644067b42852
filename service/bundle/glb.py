"""A small glTF 2.0 binary writer, and a strict reader for the static meshes of a bundle.

Vertex and face order survive exactly: nothing is merged, sorted or dropped; every frame of an avatar relies on it.
Frames: y up, metres, right-handed, which is also glTF's own convention.
Reference: Khronos glTF 2.0 specification, sections 3.6 (data), 3.7 (geometry), 4 (GLB container).
"""

import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC, JSON_CHUNK, BINARY_CHUNK = b"glTF", 0x4E4F534A, 0x004E4942
BYTE, SHORT, INT, FLOAT = 5121, 5123, 5125, 5126  # glTF component types, unsigned unless float
SIGNED_BYTE = 5120
VERTEX_DATA, INDEX_DATA = 34962, 34963  # glTF buffer view targets
_COMPONENTS = {
    SIGNED_BYTE: np.dtype("i1"),
    BYTE: np.dtype("u1"),
    SHORT: np.dtype("<u2"),
    INT: np.dtype("<u4"),
    FLOAT: np.dtype("<f4"),
}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
OWN_COLORS = "_COLOR_SRGB"
"""Attribute with the colours of the vertices of a mesh that has a texture."""
JPEG_MAGIC = b"\xff\xd8\xff"
MAX_JSON_BYTES = 16 << 20


class GlbError(ValueError):
    """The bytes are not a mesh that `write_mesh` could have written."""


@dataclass(frozen=True)
class Mesh:
    """One level of detail of an avatar, in the canonical pose."""

    vertices: NDArray[np.float32]
    """(V, 3), metres."""
    faces: NDArray[np.int32]
    """(T, 3), counter-clockwise seen from outside."""
    normals: NDArray[np.float32] | None = None
    """(V, 3), unit length."""
    colors: NDArray[np.uint8] | None = None
    """(V, 3), sRGB.  COLOR_0 holds linear light, as glTF wants it, in 16 bits: there and back is exact."""
    skin_joints: NDArray[np.uint8] | None = None
    """(V, 4): the strongest bones of each vertex, strongest first."""
    skin_weights: NDArray[np.float32] | None = None
    """(V, 4), sums to 1."""
    uv: NDArray[np.float32] | None = None
    """(V, 2), places in the texture, (0, 0) its upper left corner.  A vertex on a seam is there once for each side."""
    texture: bytes | None = None
    """A JPEG file; its colours take the place of `colors` where a viewer can show them."""

    def __post_init__(self) -> None:
        vertices, faces = self.vertices, self.faces
        if vertices.ndim != 2 or vertices.shape[1] != 3 or len(vertices) == 0:
            raise ValueError(f"expected vertices of shape (V, 3), got {vertices.shape}")
        if faces.ndim != 2 or faces.shape[1] != 3 or len(faces) == 0:
            raise ValueError(f"expected faces of shape (T, 3), got {faces.shape}")
        if not np.isfinite(vertices).all():
            raise ValueError("a vertex is not finite")
        if faces.min() < 0 or faces.max() >= len(vertices):
            raise ValueError(f"a face names a vertex outside 0..{len(vertices) - 1}")
        for name, width in (("normals", 3), ("colors", 3), ("skin_joints", 4), ("skin_weights", 4), ("uv", 2)):
            value = getattr(self, name)
            if value is not None and value.shape != (len(vertices), width):
                raise ValueError(f"expected {name} of shape ({len(vertices)}, {width}), got {value.shape}")
        if (self.skin_joints is None) != (self.skin_weights is None):
            raise ValueError("skin_joints and skin_weights come together or not at all")
        if self.texture is not None and (self.uv is None or not self.texture.startswith(JPEG_MAGIC)):
            raise ValueError("a texture is a JPEG file and needs uv")


def welded_faces(mesh: Mesh) -> NDArray[np.int32]:
    """(T, 3): the faces, with vertices at one place named by the first of them: whole again across texture seams."""
    _, first, twin_of = np.unique(mesh.vertices, axis=0, return_index=True, return_inverse=True)
    return first[twin_of.reshape(-1)][mesh.faces].astype(np.int32)


def strongest_bones(weights: NDArray[np.floating]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The four strongest bones of each vertex: (V, J) weights -> (V, 4) joints and (V, 4) weights summing to 1."""
    joints = np.argsort(-weights, axis=1, kind="stable")[:, :4]
    strongest = np.take_along_axis(weights, joints, axis=1).astype(np.float64)
    strongest /= strongest.sum(axis=1, keepdims=True)
    strongest = strongest.astype(np.float32)
    # glTF: a bone without weight is joint 0.
    joints = np.where(strongest > 0, joints, 0)
    return joints.astype(np.uint8), strongest


def linear_light(colors: NDArray[np.uint8]) -> NDArray[np.float64]:
    """sRGB in 0..255 to linear light in [0, 1] (IEC 61966-2-1)."""
    value = np.asarray(colors, np.float64) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def srgb(light: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Linear light in [0, 1] to the nearest sRGB in 0..255."""
    value = np.clip(np.asarray(light, np.float64), 0, 1)
    encoded = np.where(value <= 0.0031308, 12.92 * value, 1.055 * value ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)


class GlbBuilder:
    """Collects arrays into one binary chunk; `document` is the glTF JSON under construction."""

    def __init__(self) -> None:
        self.document: dict[str, Any] = {
            "asset": {"version": "2.0", "generator": "reposer"},
            "scene": 0,
            "bufferViews": [],
            "accessors": [],
        }
        self._parts: list[bytes] = []
        self._size = 0
        self._reserved = 0

    def add_array(self, array: NDArray[Any], component: int, target: int | None = None, **extra: Any) -> int:
        """Add one array in a buffer view of its own and return the number of its accessor."""
        view = self.add_view(array, component, target)
        return self.add_accessor(view, 0, array, component, **extra)

    def add_view(
        self, array: NDArray[Any], component: int, target: int | None = None, stride: int | None = None
    ) -> int:
        """Append the bytes of an array, padded to four; returns the number of the buffer view."""
        data = np.ascontiguousarray(array, _COMPONENTS[component])
        view: dict[str, Any] = {"buffer": 0, "byteOffset": self._size, "byteLength": data.nbytes}
        if target is not None:
            view["target"] = target
        if stride is not None:
            view["byteStride"] = stride
        self.document["bufferViews"].append(view)
        padding = -data.nbytes % 4
        self._parts += [data.tobytes(), bytes(padding)]
        self._size += data.nbytes + padding
        return len(self.document["bufferViews"]) - 1

    def reserve_view(self, size: int, target: int, stride: int) -> int:
        """Announce a last view of `size` bytes, a multiple of four, that the caller writes behind `finish()`."""
        view = {"buffer": 0, "byteOffset": self._size, "byteLength": size, "target": target, "byteStride": stride}
        self.document["bufferViews"].append(view)
        self._reserved = size
        return len(self.document["bufferViews"]) - 1

    def add_accessor(
        self,
        view: int,
        offset: int,
        array: NDArray[Any],
        component: int,
        bounds: bool = False,
        normalized: bool = False,
        kind: str = "",
    ) -> int:
        """Describe `array`, which lies in `view` at byte `offset`; returns the number of the accessor."""
        kind = kind or ("SCALAR" if array.ndim == 1 else f"VEC{array.shape[1]}")
        accessor: dict[str, Any] = {
            "bufferView": view,
            "byteOffset": offset,
            "componentType": component,
            "count": len(array),
            "type": kind,
        }
        if bounds:
            values = array.astype(_COMPONENTS[component]).reshape(len(array), -1)
            # float() of a float32 is exact, so the bounds are those of the stored numbers to the last bit.
            accessor["min"] = [float(x) for x in values.min(axis=0)]
            accessor["max"] = [float(x) for x in values.max(axis=0)]
        if normalized:
            accessor["normalized"] = True
        self.document["accessors"].append(accessor)
        return len(self.document["accessors"]) - 1

    def add_mesh_arrays(self, mesh: Mesh) -> tuple[dict[str, int], int]:
        """Add the arrays of a mesh: (attributes of the primitive, accessor of the indices)."""
        # The largest short means "begin anew" and names no vertex.
        size = SHORT if len(mesh.vertices) <= 65535 else INT
        indices = self.add_array(mesh.faces.reshape(-1), size, INDEX_DATA)
        attributes = {"POSITION": self.add_array(mesh.vertices, FLOAT, VERTEX_DATA, bounds=True)}
        if mesh.normals is not None:
            attributes["NORMAL"] = self.add_array(mesh.normals, FLOAT, VERTEX_DATA)
        if mesh.colors is not None and mesh.texture is None:
            opaque = np.concatenate([linear_light(mesh.colors), np.ones((len(mesh.colors), 1))], axis=1)
            attributes["COLOR_0"] = self.add_array(np.rint(65535 * opaque), SHORT, VERTEX_DATA, normalized=True)
        elif mesh.colors is not None:
            # Viewers multiply COLOR_0 with the texture; under a name of our own they leave it alone.
            opaque = np.concatenate([mesh.colors, np.full((len(mesh.colors), 1), 255)], axis=1)
            attributes[OWN_COLORS] = self.add_array(opaque, BYTE, VERTEX_DATA, normalized=True)
        if mesh.uv is not None:
            attributes["TEXCOORD_0"] = self.add_array(mesh.uv, FLOAT, VERTEX_DATA)
        if mesh.skin_joints is not None and mesh.skin_weights is not None:
            attributes["JOINTS_0"] = self.add_array(mesh.skin_joints, BYTE, VERTEX_DATA)
            attributes["WEIGHTS_0"] = self.add_array(mesh.skin_weights, FLOAT, VERTEX_DATA)
        return attributes, indices

    def add_material(self, mesh: Mesh) -> None:
        """Make the one material: rough cloth, lit from both sides (garments have openings), with the mesh's texture."""
        surface: dict[str, Any] = {"metallicFactor": 0.0, "roughnessFactor": 0.85}
        if mesh.texture is not None:
            view = self.add_view(np.frombuffer(mesh.texture, np.uint8), BYTE)
            surface["baseColorTexture"] = {"index": 0}
            self.document |= {
                "images": [{"bufferView": view, "mimeType": "image/jpeg"}],
                "textures": [{"source": 0}],
            }
        self.document["materials"] = [{"name": "clothed", "doubleSided": True, "pbrMetallicRoughness": surface}]

    def finish(self) -> bytes:
        """The whole file, up to a reserved view."""
        size = self._size + self._reserved
        self.document["buffers"] = [{"byteLength": size}]
        text = json.dumps(self.document, separators=(",", ":"), allow_nan=False).encode()
        text += b" " * (-len(text) % 4)
        total = 12 + 8 + len(text) + 8 + size
        head = struct.pack("<4sIIII", MAGIC, 2, total, len(text), JSON_CHUNK) + text
        return b"".join([head, struct.pack("<II", size, BINARY_CHUNK), *self._parts])


def write_mesh(mesh: Mesh, name: str = "avatar") -> bytes:
    """A static GLB of one mesh."""
    builder = GlbBuilder()
    attributes, indices = builder.add_mesh_arrays(mesh)
    builder.add_material(mesh)
    builder.document |= {
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": name}],
        "meshes": [{"name": name, "primitives": [{"attributes": attributes, "indices": indices, "material": 0}]}],
    }
    return builder.finish()


def read_mesh(data: bytes) -> Mesh:
    """Read what `write_mesh` wrote; anything else is refused.

    Raises:
        GlbError: not a GLB of one mesh with float32 positions and indices inside its own bytes.
    """
    try:
        document, binary = read_chunks(data)
        primitive = document["meshes"][0]["primitives"][0]
        if len(document["meshes"]) != 1 or len(document["meshes"][0]["primitives"]) != 1:
            raise GlbError("expected one mesh with one primitive")
        attributes = primitive["attributes"]

        def array(number: int, component: int, kind: str) -> NDArray[Any]:
            return read_array(document, binary, number, component, kind)

        def optional(name: str, component: int, kind: str) -> NDArray[Any] | None:
            return array(attributes[name], component, kind) if name in attributes else None

        size = SHORT if document["accessors"][primitive["indices"]]["componentType"] == SHORT else INT
        linear, own = optional("COLOR_0", SHORT, "VEC4"), optional(OWN_COLORS, BYTE, "VEC4")
        colors = None if own is None else own[:, :3].copy()
        return Mesh(
            vertices=array(attributes["POSITION"], FLOAT, "VEC3"),
            faces=array(primitive["indices"], size, "SCALAR").reshape(-1, 3).astype(np.int32),
            normals=optional("NORMAL", FLOAT, "VEC3"),
            colors=colors if linear is None else srgb(linear[:, :3] / 65535),
            skin_joints=optional("JOINTS_0", BYTE, "VEC4"),
            skin_weights=optional("WEIGHTS_0", FLOAT, "VEC4"),
            uv=optional("TEXCOORD_0", FLOAT, "VEC2"),
            texture=read_view(document, binary, document["images"][0]["bufferView"]) if "images" in document else None,
        )
    except GlbError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise GlbError(f"not a mesh of ours: {error}") from error


def read_chunks(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """The JSON and the binary chunk of a GLB; `GlbError` or `ValueError` where they are not whole."""
    if len(data) < 28:
        raise GlbError(f"expected a GLB, got {len(data)} bytes")
    magic, version, total, text_size, text_kind = struct.unpack_from("<4sIIII", data)
    if magic != MAGIC or version != 2 or total != len(data) or text_kind != JSON_CHUNK:
        raise GlbError("not a whole GLB of version 2")
    if text_size > MAX_JSON_BYTES or 20 + text_size + 8 > len(data):
        raise GlbError(f"the JSON chunk claims {text_size} bytes")
    binary_size, binary_kind = struct.unpack_from("<II", data, 20 + text_size)
    if binary_kind != BINARY_CHUNK or 28 + text_size + binary_size != len(data):
        raise GlbError("expected one binary chunk after the JSON, up to the end")
    document = json.loads(data[20 : 20 + text_size])
    if document["buffers"] != [{"byteLength": binary_size}]:
        raise GlbError("the buffer is not the binary chunk")
    return document, memoryview(data)[28 + text_size :]


def read_view(document: dict[str, Any], binary: memoryview, number: int) -> bytes:
    """A copy of the bytes of a buffer view, never read outside the file."""
    if not isinstance(number, int) or number < 0:
        raise GlbError(f"bad buffer view number {number!r}")
    view = document["bufferViews"][number]
    start, size = view["byteOffset"], view["byteLength"]
    if start < 0 or size < 0 or start + size > len(binary):
        raise GlbError(f"buffer view {number} leaves the file")
    return bytes(binary[start : start + size])


def read_array(document: dict[str, Any], binary: memoryview, number: int, component: int, kind: str) -> NDArray[Any]:
    """A copy of one accessor's numbers, (count,) or (count, width), never read outside its buffer view."""
    if not isinstance(number, int) or number < 0:
        raise GlbError(f"bad accessor number {number!r}")
    accessor = document["accessors"][number]
    if accessor["componentType"] != component or accessor["type"] != kind:
        raise GlbError(f"accessor {number}: expected {kind} of {component}")
    view = document["bufferViews"][accessor["bufferView"]]
    count, width, dtype = accessor["count"], _WIDTHS[kind], _COMPONENTS[component]
    start, size = view["byteOffset"] + accessor["byteOffset"], count * width * dtype.itemsize
    packed = view.get("byteStride", width * dtype.itemsize) == width * dtype.itemsize
    if not packed or count < 0 or start < 0 or accessor["byteOffset"] + size > view["byteLength"]:
        raise GlbError(f"accessor {number} leaves its buffer view")
    if start + size > len(binary):
        raise GlbError(f"accessor {number} leaves the file")
    array = np.frombuffer(binary, dtype, count * width, start).copy()
    return array if width == 1 else array.reshape(count, width)
