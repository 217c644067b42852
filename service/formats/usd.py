"""USD point cache in a `.usdz`: one mesh whose points and normals have a sample for each frame.

Metres, y up, one time code a frame, vertex order that of the mesh.  Needs usd-core (`pip install 'reposer[usd]'`).
Reference: Pixar, OpenUSD, schemas UsdGeomMesh, UsdPreviewSurface and the usdz file format.
"""

import struct
import tempfile
import zlib
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from service.bundle.glb import Mesh, linear_light
from service.engine import Batch
from service.errors import NotAcceptable, TooManyFrames
from service.formats.clip import Clip, VertexNormals, frames_of, pieces

USD_MEDIA_TYPE = "model/vnd.usdz+zip"
FRAMES_A_SAVE = 32
MAX_USDZ_BYTES = 4 * 10**9
"""A usdz is a zip of the old kind, which counts to 4 GiB."""
PADDING_FIELD = 0x1986
"""Kind of the extra field of a zip that only fills up, as OpenUSD writes it."""


def encode_usd(batches: Iterator[Batch], clip: Clip) -> Iterator[bytes]:
    """One `.usdz`; leaves when the last frame is in it.

    Raises:
        NotAcceptable: usd-core is not installed.
        TooManyFrames: the file would be larger than a usdz can be.
    """
    try:
        Usd = import_module("pxr.Usd")
    except ImportError as error:
        raise NotAcceptable("this service runs without usd-core, so it cannot write USD") from error
    frame_bytes = 24 * len(clip.mesh.vertices)
    if frame_bytes * clip.frame_count > MAX_USDZ_BYTES:
        most = MAX_USDZ_BYTES // frame_bytes
        raise TooManyFrames(
            f"a .usdz of this mesh holds at most {most} frames, got {clip.frame_count}: ask for "
            f"every={-(-clip.frame_count // most)} or a smaller lod",
            limit_frames=most,
        )
    with tempfile.TemporaryDirectory(prefix="reposer-usd-") as folder:
        path = Path(folder, "avatar.usdc")
        stage = Usd.Stage.CreateNew(str(path))
        points, normals, extent = _describe(stage, clip, Path(folder))
        normals_of, frames = VertexNormals(clip.mesh), enumerate(frames_of(batches))
        while some := list(islice(frames, FRAMES_A_SAVE)):
            for n, vertices in some:
                points.Set(np.ascontiguousarray(vertices), n)
                normals.Set(normals_of(vertices), n)
                extent.Set(np.stack([vertices.min(0), vertices.max(0)]), n)
            # What is saved leaves the memory, and the file only grows at its end.
            stage.GetRootLayer().Save()
            yield b""
        del stage, points, normals, extent
        yield from _package([path, *Path(folder).glob("*.jpg")])


def _package(paths: list[Path]) -> Iterator[bytes]:
    """A usdz of files: a zip without compression in which each file's data begins at a multiple of 64 bytes.

    Sdf.ZipFileWriter has the whole of a file in memory; zipfile turns to Zip64, which USD does not read, at 2 GiB.
    """
    directory, at = b"", 0
    for path in paths:
        name, size, checksum = path.name.encode(), path.stat().st_size, 0
        with path.open("rb") as file:
            for piece in pieces(file):
                checksum = zlib.crc32(piece, checksum)
                yield b""
            padding = bytes(-(at + 30 + len(name) + 4) % 64)
            extra = struct.pack("<HH", PADDING_FIELD, len(padding)) + padding
            # Version 1.0, no flags, stored, midnight of 1 January 1980.
            record = struct.pack("<HHHHHIIIHH", 10, 0, 0, 0, 33, checksum, size, size, len(name), len(extra))
            place = struct.pack("<HHHII", 0, 0, 0, 0, at)
            directory += b"PK\1\2" + struct.pack("<H", 10) + record + place + name + extra
            head = b"PK\3\4" + record + name + extra
            yield head
            yield from pieces(file)
        at += len(head) + size
    yield directory + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, len(paths), len(paths), len(directory), at, 0)


def _describe(stage: Any, clip: Clip, folder: Path) -> tuple[Any, Any, Any]:
    """All that does not move; returns the attributes that do: points, normals, extent."""
    Sdf, UsdGeom, mesh = import_module("pxr.Sdf"), import_module("pxr.UsdGeom"), clip.mesh
    UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.y)
    UsdGeom.SetStageMetersPerUnit(stage, 1.0)
    stage.SetTimeCodesPerSecond(clip.fps)
    stage.SetFramesPerSecond(clip.fps)
    stage.SetStartTimeCode(0)
    stage.SetEndTimeCode(clip.frame_count - 1)
    root = UsdGeom.Xform.Define(stage, "/Avatar")
    stage.SetDefaultPrim(root.GetPrim())
    surface = UsdGeom.Mesh.Define(stage, "/Avatar/Surface")
    surface.GetPrim().SetDisplayName(clip.name)
    surface.CreateSubdivisionSchemeAttr(UsdGeom.Tokens.none)
    surface.CreateDoubleSidedAttr(True)
    surface.CreateFaceVertexCountsAttr(np.full(len(mesh.faces), 3, np.int32))
    surface.CreateFaceVertexIndicesAttr(np.ascontiguousarray(mesh.faces.reshape(-1), np.int32))
    surface.SetNormalsInterpolation(UsdGeom.Tokens.vertex)
    variables = UsdGeom.PrimvarsAPI(surface)
    if mesh.colors is not None:
        light = linear_light(mesh.colors).astype(np.float32)
        variables.CreatePrimvar("displayColor", Sdf.ValueTypeNames.Color3fArray, UsdGeom.Tokens.vertex).Set(light)
    if mesh.uv is not None:
        lower_left = np.stack([mesh.uv[:, 0], 1 - mesh.uv[:, 1]], axis=1).astype(np.float32)  # USD's origin
        variables.CreatePrimvar("st", Sdf.ValueTypeNames.TexCoord2fArray, UsdGeom.Tokens.vertex).Set(lower_left)
    _add_material(stage, surface, mesh, folder)
    return surface.CreatePointsAttr(), surface.CreateNormalsAttr(), surface.CreateExtentAttr()


def _add_material(stage: Any, surface: Any, mesh: Mesh, folder: Path) -> None:
    """Rough cloth with the mesh's texture, or with its colours."""
    types, UsdShade = import_module("pxr.Sdf").ValueTypeNames, import_module("pxr.UsdShade")
    material = UsdShade.Material.Define(stage, "/Avatar/Clothed")
    shader = UsdShade.Shader.Define(stage, "/Avatar/Clothed/Surface")
    shader.CreateIdAttr("UsdPreviewSurface")
    shader.CreateInput("roughness", types.Float).Set(0.85)
    shader.CreateInput("metallic", types.Float).Set(0.0)
    material.CreateSurfaceOutput().ConnectToSource(shader.ConnectableAPI(), "surface")
    reader = UsdShade.Shader.Define(stage, "/Avatar/Clothed/Reader")
    color = shader.CreateInput("diffuseColor", types.Color3f)
    if mesh.texture is not None:
        (folder / "texture.jpg").write_bytes(mesh.texture)
        reader.CreateIdAttr("UsdPrimvarReader_float2")
        reader.CreateInput("varname", types.String).Set("st")
        image = UsdShade.Shader.Define(stage, "/Avatar/Clothed/Image")
        image.CreateIdAttr("UsdUVTexture")
        image.CreateInput("file", types.Asset).Set("texture.jpg")
        image.CreateInput("st", types.Float2).ConnectToSource(reader.ConnectableAPI(), "result")
        reader.CreateOutput("result", types.Float2)
        color.ConnectToSource(image.ConnectableAPI(), "rgb")
        image.CreateOutput("rgb", types.Float3)
    elif mesh.colors is not None:
        reader.CreateIdAttr("UsdPrimvarReader_float3")
        reader.CreateInput("varname", types.String).Set("displayColor")
        reader.CreateOutput("result", types.Float3)
        color.ConnectToSource(reader.ConnectableAPI(), "result")
    UsdShade.MaterialBindingAPI.Apply(surface.GetPrim()).Bind(material)
