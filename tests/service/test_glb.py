"""Meshes and motions as .glb: exact, readable by others, and strict when read back."""

import dataclasses
import io
import json
import struct

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st

from service.bundle.glb import (
    SHORT,
    GlbError,
    Mesh,
    linear_light,
    read_array,
    read_chunks,
    read_mesh,
    strongest_bones,
    welded_faces,
    write_mesh,
)
from service.formats.clip import Clip
from service.formats.morph import animated_glb, read_animated_glb

JPEG = b"\xff\xd8\xff as much of a picture as a reader of meshes looks at"


def example(seed: int = 0, count: int = 50) -> Mesh:
    rng = np.random.default_rng(seed)
    vertices = rng.normal(0, 1, (count, 3)).astype(np.float32)
    vertices[7] = vertices[3]  # twins, which a careless writer or reader would merge
    faces = np.stack([rng.permutation(count)[:3] for _ in range(80)]).astype(np.int32)
    normals = (vertices / np.linalg.norm(vertices, axis=1, keepdims=True)).astype(np.float32)
    joints, weights = strongest_bones(rng.dirichlet(np.ones(24), count))
    return Mesh(vertices, faces, normals, rng.integers(0, 256, (count, 3)).astype(np.uint8), joints, weights)


def test_mesh_round_trip_is_exact() -> None:
    mesh = example()
    read = read_mesh(write_mesh(mesh))
    for name in ("vertices", "faces", "normals", "colors", "skin_joints", "skin_weights"):
        np.testing.assert_array_equal(getattr(read, name), getattr(mesh, name))
    bare = read_mesh(write_mesh(Mesh(mesh.vertices, mesh.faces)))
    assert bare.normals is bare.colors is bare.skin_joints is None


@pytest.mark.parametrize(("count", "bytes_each"), [(65535, 2), (65536, 4)])
def test_the_last_vertex_is_named_in_as_few_bytes_as_may_be(count: int, bytes_each: int) -> None:
    faces = np.array([[0, 1, count - 1]], np.int32)
    data = write_mesh(Mesh(np.zeros((count, 3), np.float32), faces))
    np.testing.assert_array_equal(read_mesh(data).faces, faces)
    document, _ = read_chunks(data)
    view = document["accessors"][document["meshes"][0]["primitives"][0]["indices"]]["bufferView"]
    assert document["bufferViews"][view]["byteLength"] == 3 * bytes_each


def textured(seed: int = 0) -> Mesh:
    mesh = example(seed)
    uv = np.random.default_rng(seed).random((len(mesh.vertices), 2)).astype(np.float32)
    return dataclasses.replace(mesh, uv=uv, texture=JPEG)


def test_texture_round_trip_is_exact() -> None:
    mesh = textured()
    read = read_mesh(write_mesh(mesh))
    np.testing.assert_array_equal(read.uv, mesh.uv)
    np.testing.assert_array_equal(read.colors, mesh.colors)
    assert read.texture == JPEG


def test_the_file_holds_linear_light_of_every_shade() -> None:
    shades = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    vertices = np.random.default_rng(0).normal(size=(256, 3)).astype(np.float32)
    data = write_mesh(Mesh(vertices, np.array([[0, 1, 2]], np.int32), colors=shades))
    np.testing.assert_array_equal(read_mesh(data).colors, shades)
    document, binary = read_chunks(data)
    accessor = document["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"]
    stored = read_array(document, binary, accessor, SHORT, "VEC4")
    np.testing.assert_allclose(stored[:, :3] / 65535, linear_light(shades), atol=1e-5)
    assert document["accessors"][accessor]["normalized"] is True
    assert (stored[:, 3] == 65535).all()


def test_a_texture_is_not_multiplied_with_the_colours_of_the_vertices() -> None:
    for mesh, name, other in ((example(), "COLOR_0", "_COLOR_SRGB"), (textured(), "_COLOR_SRGB", "COLOR_0")):
        document, _ = read_chunks(write_mesh(mesh))
        attributes = document["meshes"][0]["primitives"][0]["attributes"]
        assert name in attributes
        assert other not in attributes


def test_a_texture_needs_a_place_and_a_kind() -> None:
    mesh = example()
    with pytest.raises(ValueError, match="needs uv"):
        dataclasses.replace(mesh, texture=JPEG)
    with pytest.raises(ValueError, match="JPEG"):
        dataclasses.replace(textured(), texture=b"\x89PNG")
    with pytest.raises(ValueError, match="uv of shape"):
        dataclasses.replace(mesh, uv=np.zeros((3, 2), np.float32))


@pytest.mark.parametrize("change", [{"byteLength": 10**6}, {"byteLength": -4}, {"byteOffset": -1}])
def test_a_texture_that_leaves_the_file_is_refused(change: dict[str, int]) -> None:
    document, binary = read_chunks(write_mesh(textured()))
    document["bufferViews"][document["images"][0]["bufferView"]] |= change
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<II", len(text), 0x4E4F534A) + text + struct.pack("<II", len(binary), 0x004E4942) + binary
    with pytest.raises(GlbError, match="leaves the file"):
        read_mesh(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)


def test_welding_names_every_place_once() -> None:
    ball = trimesh.creation.icosphere(2)
    soup = Mesh(np.asarray(ball.triangles, np.float32).reshape(-1, 3), np.arange(3 * len(ball.faces), dtype=np.int32)
                .reshape(-1, 3))  # fmt: skip
    welded = welded_faces(soup)
    assert len(np.unique(welded)) == len(ball.vertices)
    np.testing.assert_array_equal(soup.vertices[welded], soup.vertices[soup.faces])


def test_trimesh_sees_the_same_vertices_in_the_same_order() -> None:
    mesh = example()
    scene = trimesh.load_scene(io.BytesIO(write_mesh(mesh)), file_type="glb", process=False)
    (seen,) = scene.geometry.values()
    np.testing.assert_array_equal(seen.vertices.astype(np.float32), mesh.vertices)
    np.testing.assert_array_equal(seen.faces, mesh.faces)


def test_strongest_bones_are_the_four_largest() -> None:
    weights = np.zeros((2, 24))
    weights[0, [3, 5, 7, 9, 11]] = [0.3, 0.1, 0.4, 0.15, 0.05]
    weights[1, 23] = 1.0
    joints, values = strongest_bones(weights)
    np.testing.assert_array_equal(joints, [[7, 3, 9, 5], [23, 0, 0, 0]])
    np.testing.assert_allclose(values, [np.array([0.4, 0.3, 0.15, 0.1]) / 0.95, [1, 0, 0, 0]], atol=1e-7)


@settings(deadline=None, max_examples=200)
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.integers(0, 10**6))
def test_a_damaged_mesh_is_read_or_refused_but_never_worse(at: int, bit: int, cut: int) -> None:
    data = bytearray(write_mesh(textured()))
    data[at % len(data)] ^= 1 << bit
    for damaged in (bytes(data), bytes(data[: cut % len(data)])):
        try:
            mesh = read_mesh(damaged)
        except GlbError:
            continue
        assert mesh.faces.max() < len(mesh.vertices)


def test_animated_glb_holds_every_frame() -> None:
    mesh = example()
    frames = np.random.default_rng(1).normal(0, 2, (5, 50, 3)).astype(np.float32)
    still, vertices, times = read_animated_glb(animated_glb(Clip("tiny", mesh, 5, 24.0), frames))
    np.testing.assert_array_equal(still.vertices, mesh.vertices)
    np.testing.assert_array_equal(still.faces, mesh.faces)
    np.testing.assert_allclose(vertices, frames, rtol=0, atol=1e-6)
    np.testing.assert_allclose(times, np.arange(5) / 24, atol=1e-7)


def test_animated_glb_is_coloured_and_textured_like_the_mesh() -> None:
    frames = np.random.default_rng(1).normal(0, 2, (2, 50, 3)).astype(np.float32)
    for mesh in (example(), textured()):
        still, vertices, _ = read_animated_glb(animated_glb(Clip("tiny", mesh, 2, 24.0), frames))
        np.testing.assert_array_equal(still.colors, mesh.colors)
        np.testing.assert_array_equal(still.uv, mesh.uv)
        assert still.texture == mesh.texture
        assert vertices.shape == frames.shape


def test_animated_glb_says_true_bounds_and_plays_all_frames() -> None:
    mesh = example()
    frames = np.random.default_rng(1).normal(0, 2, (3, 50, 3)).astype(np.float32)
    data = animated_glb(Clip("tiny", mesh, 3, 30.0), frames)
    document = json.loads(data[20 : 20 + struct.unpack_from("<I", data, 12)[0]])
    primitive = document["meshes"][0]["primitives"][0]
    for target, frame in zip(primitive["targets"], frames, strict=True):
        accessor = document["accessors"][target["POSITION"]]
        assert accessor["min"] == (frame - mesh.vertices).min(axis=0).tolist()
        assert accessor["max"] == (frame - mesh.vertices).max(axis=0).tolist()
        assert accessor["count"] == 50
    assert document["meshes"][0]["weights"] == [1, 0, 0]
    assert document["animations"][0]["channels"] == [{"sampler": 0, "target": {"node": 0, "path": "weights"}}]


@pytest.mark.parametrize("data", [b"", b"glTF", b"\x00" * 64, b"glTF" + bytes(100)])
def test_what_is_no_glb_is_refused(data: bytes) -> None:
    with pytest.raises(GlbError):
        read_mesh(data)
