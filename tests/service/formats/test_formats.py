"""Every format gives back the reposed vertices in the order of the mesh, to the library its users read it with."""

import io
import json
import struct
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

from service import answers
from service.bundle.glb import linear_light
from service.engine import Batch
from service.formats.clip import VertexNormals

ROOT = Path(__file__).parents[3]
GLBS = (answers.GLB, answers.SKINNED)


def encoded(reposed: Any, media_type: str) -> bytes:
    return b"".join(answers.encode(media_type, reposed.batches(), reposed.clip))


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def test_pc2_is_blenders_layout_byte_for_byte(rich: Any) -> None:
    count = len(rich.clip.mesh.vertices)
    expected = b"POINTCACHE2\0" + struct.pack("<iiffi", 1, count, 0, 1, len(rich.vertices))
    expected += rich.vertices.astype("<f4").tobytes()
    assert encoded(rich, answers.PC2) == expected


def test_mdd_is_lightwaves_layout_byte_for_byte(rich: Any) -> None:
    times = np.arange(len(rich.vertices)) / 24
    expected = struct.pack(">ii", len(rich.vertices), len(rich.clip.mesh.vertices)) + times.astype(">f4").tobytes()
    assert encoded(rich, answers.MDD) == expected + rich.vertices.astype(">f4").tobytes()


def test_pc2_zip_has_the_mesh_in_the_order_of_its_cache(rich: Any) -> None:
    files = members(encoded(rich, answers.PC2_ZIP))
    assert set(files) == {"avatar.obj", "avatar.mtl", "texture.jpg", "motion.pc2", "fps.txt"}
    assert files["motion.pc2"] == encoded(rich, answers.PC2)
    lines = [line.split() for line in files["avatar.obj"].decode().splitlines()]
    points = np.array([line[1:4] for line in lines if line[0] == "v"], np.float64)
    faces = np.array([[corner.split("/")[0] for corner in line[1:]] for line in lines if line[0] == "f"], int) - 1
    np.testing.assert_allclose(points, rich.clip.mesh.vertices, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(faces, rich.clip.mesh.faces)
    assert b"map_Kd texture.jpg" in files["avatar.mtl"]
    assert float(files["fps.txt"]) == 24


@pytest.mark.parametrize("kind", ["rich", "plain"])
@pytest.mark.parametrize("media_type", [answers.PLY, answers.OBJ])
def test_mesh_sequences_reach_trimesh(request: Any, kind: str, media_type: str) -> None:
    reposed = request.getfixturevalue(kind)
    files, mesh = members(encoded(reposed, media_type)), reposed.clip.mesh
    suffix = "ply" if media_type == answers.PLY else "obj"
    names = sorted(name for name in files if name.endswith(suffix))
    assert names == [f"frame_{n:06}.{suffix}" for n in range(len(reposed.vertices))]
    assert ("texture.jpg" in files) == (kind == "rich")
    for name, vertices in zip(names, reposed.vertices, strict=True):
        read: Any = trimesh.load(
            io.BytesIO(files[name]), file_type=suffix, process=False, maintain_order=True, skip_materials=True
        )
        np.testing.assert_array_equal(read.faces, mesh.faces)
        # A text of six decimals; the binary floats are the very numbers.
        np.testing.assert_allclose(read.vertices, vertices, rtol=0, atol=6e-7 if suffix == "obj" else 0)
        np.testing.assert_allclose(read.vertex_normals, VertexNormals(mesh)(vertices), rtol=0, atol=2e-3)
        if kind == "plain":
            np.testing.assert_array_equal(read.visual.vertex_colors[:, :3], mesh.colors)
        else:
            flipped = np.stack([mesh.uv[:, 0], 1 - mesh.uv[:, 1]], axis=1)
            np.testing.assert_allclose(read.visual.uv, flipped, rtol=0, atol=1e-6)


def test_ply_has_colours_and_places_in_the_texture(rich: Any) -> None:
    files, mesh = members(encoded(rich, answers.PLY)), rich.clip.mesh
    head, body = files["frame_000003.ply"].split(b"end_header\n", 1)
    assert b"comment TextureFile texture.jpg" in head
    row = np.dtype([("place", "<f4", 6), ("color", "u1", 3), ("st", "<f4", 2)])
    rows = np.frombuffer(body, row, len(mesh.vertices))
    np.testing.assert_allclose(rows["st"], np.stack([mesh.uv[:, 0], 1 - mesh.uv[:, 1]], axis=1), rtol=0, atol=1e-7)
    np.testing.assert_array_equal(rows["color"], mesh.colors)


@pytest.mark.parametrize("kind", ["rich", "plain"])
def test_usd_comes_back_through_usd_core(request: Any, tmp_path: Path, kind: str) -> None:
    from pxr import Usd, UsdGeom, UsdShade, UsdUtils

    reposed = request.getfixturevalue(kind)
    path, mesh = tmp_path / "motion.usdz", reposed.clip.mesh
    path.write_bytes(encoded(reposed, answers.USD))
    stage = Usd.Stage.Open(str(path))
    assert UsdGeom.GetStageUpAxis(stage) == "Y"
    assert UsdGeom.GetStageMetersPerUnit(stage) == 1
    assert (stage.GetTimeCodesPerSecond(), stage.GetFramesPerSecond()) == (24, 24)
    assert (stage.GetStartTimeCode(), stage.GetEndTimeCode()) == (0, len(reposed.vertices) - 1)
    assert stage.GetDefaultPrim().GetPath() == "/Avatar"
    surface = UsdGeom.Mesh(stage.GetPrimAtPath("/Avatar/Surface"))
    assert surface.GetSubdivisionSchemeAttr().Get() == "none"
    np.testing.assert_array_equal(np.array(surface.GetFaceVertexIndicesAttr().Get()), mesh.faces.reshape(-1))
    assert surface.GetPointsAttr().GetTimeSamples() == list(range(len(reposed.vertices)))
    for n, vertices in enumerate(reposed.vertices):
        np.testing.assert_array_equal(np.array(surface.GetPointsAttr().Get(n)), vertices)
        np.testing.assert_array_equal(np.array(surface.GetExtentAttr().Get(n)), [vertices.min(0), vertices.max(0)])
        np.testing.assert_array_equal(np.array(surface.GetNormalsAttr().Get(n)), VertexNormals(mesh)(vertices))
    variables = UsdGeom.PrimvarsAPI(surface)
    light = np.array(variables.GetPrimvar("displayColor").Get())
    np.testing.assert_allclose(light, linear_light(mesh.colors), rtol=0, atol=1e-6)
    material, _ = UsdShade.MaterialBindingAPI(surface.GetPrim()).ComputeBoundMaterial()
    assert material.GetPath() == "/Avatar/Clothed"
    if kind == "rich":
        st = np.array(variables.GetPrimvar("st").Get())
        np.testing.assert_allclose(st, np.stack([mesh.uv[:, 0], 1 - mesh.uv[:, 1]], axis=1), rtol=0, atol=1e-7)
        _, assets, missing = UsdUtils.ComputeAllDependencies(str(path))
        assert [asset.endswith("[texture.jpg]") for asset in assets] == [True]
        assert missing == []
        texture = UsdShade.Shader(stage.GetPrimAtPath("/Avatar/Clothed/Image")).GetInput("file").Get()
        assert texture.resolvedPath.endswith("[texture.jpg]")


def test_npz_has_what_the_mesh_has(rich: Any) -> None:
    with np.load(io.BytesIO(encoded(rich, answers.NPZ)), allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["vertices"], rich.vertices)
        for name in ("faces", "uv", "colors"):
            np.testing.assert_array_equal(arrays[name], getattr(rich.clip.mesh, name))
        assert arrays["fps"] == 24


def test_normals_are_smooth_across_seams_and_point_outwards(rich: Any) -> None:
    mesh = rich.clip.mesh
    normals = VertexNormals(mesh)(rich.vertices[0])
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, rtol=0, atol=1e-6)
    twin = np.flatnonzero((mesh.vertices[:-1] == mesh.vertices[-1]).all(axis=1))[0]
    np.testing.assert_array_equal(normals[-1], normals[twin])
    # Along its normal a closed surface grows.
    grown = trimesh.Trimesh(rich.vertices[0] + 1e-4 * normals, mesh.faces, process=False)
    assert grown.volume > trimesh.Trimesh(rich.vertices[0], mesh.faces, process=False).volume > 0


def test_khronos_finds_no_error_in_any_glb(rich: Any, plain: Any, tmp_path: Path) -> None:
    files = []
    for name, reposed in (("rich", rich), ("plain", plain)):
        for media_type in GLBS:
            files.append(tmp_path / f"{name}{answers.TABLE[media_type].suffix}")
            files[-1].write_bytes(encoded(reposed, media_type))
        for member, content in members(encoded(reposed, answers.GLB_ZIP)).items():
            if member.endswith(".glb"):
                files.append(tmp_path / f"{name}-{member}")
                files[-1].write_bytes(content)
    check = ["node", Path(__file__).with_name("validate.cjs"), *files]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{done.stderr}\n(the validator comes with `npm ci`)"
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == len(files)
    for file, report in zip(files, reports, strict=True):
        assert (report["numErrors"], report["numWarnings"]) == (0, 0), (file.name, report["messages"])


def test_each_format_has_its_own_name() -> None:
    assert len({row.suffix for row in answers.TABLE.values()}) == len(answers.TABLE)
    assert list(answers.TABLE) == [row.media_type for row in answers.TABLE.values()]


def test_usd_longer_than_a_usdz_can_be_is_refused_before_anything_is_computed(rich: Any, monkeypatch: Any) -> None:
    from service.errors import TooManyFrames
    from service.formats import usd

    def never() -> Iterator[Batch]:
        raise AssertionError("computed")
        yield

    monkeypatch.setattr(usd, "MAX_USDZ_BYTES", 24 * len(rich.clip.mesh.vertices) * 8)
    with pytest.raises(TooManyFrames, match="at most 8 frames, got 9: ask for every=2"):
        next(answers.encode(answers.USD, never(), rich.clip))


def test_a_usdz_is_a_zip_without_compression_whose_data_begin_at_multiples_of_64_bytes(rich: Any) -> None:
    """What USD asks of one, to read it in place; whether the rest is a zip, `testzip` sees."""
    data = encoded(rich, answers.USD)
    assert list(members(data)) == ["avatar.usdc", "texture.jpg"]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            name_size, extra_size = struct.unpack_from("<HH", data, info.header_offset + 26)
            start = info.header_offset + 30 + name_size + extra_size
            assert start % 64 == 0
            assert data[start : start + info.file_size] == archive.read(info)
