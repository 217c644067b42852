"""Colour: what the scans' vertex colours say about the canonical surface, as vertex colours and as a texture.

The canonical mesh is reposed to the training frames nearest to the canonical pose.  There each of many points of it
looks up the colour of the scan beside it; the weighted median over the frames is its colour.  Vertices and texels of
every level of detail take theirs from these points.  Colours are mixed in linear light.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import xatlas
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.spatial import KDTree

from model.ins import INS
from service.bundle.glb import Mesh, linear_light, srgb
from service.picture import rasterize, vertex_normals
from training.data.mesh import laplacian
from training.data.sampling import surface_points
from training.evaluate import posed_vertices
from training.frames import Frames
from training.metrics import closest, cosines

MAX_FRAMES = 24
FADING = 0.65
"""Of a frame's weight to that of the next nearer to the canonical pose: cloth slides over the surface as it moves, and
what many frames say of a pattern is a blur, so the nearest that sees a point well speaks for it."""
POINTS = 400_000
"""On the canonical surface, about 2 mm apart: finer than the texture's texels."""
REACH_M = 0.015
"""A scan further away says nothing."""
MIN_COSINE = 0.5
"""Nor does one that looks elsewhere: the other side of a sleeve, the arm on the hip."""
MIN_WEIGHT = 0.1
"""Of all frames together: below, a point counts as unseen and takes its neighbours' colour."""
LUMINANCE = np.array([0.2126, 0.7152, 0.0722], np.float32)
"""Of linear red, green and blue (ITU-R BT.709)."""
TEXTURE_PIXELS = {"preview": 512, "standard": 1024, "high": 1024}
MAX_TEXTURE_BYTES = 130_000
GUTTER_PIXELS = 16
ATLAS_SMOOTHING = 20
"""Steps of uniform smoothing before charts are cut."""
Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Paint:
    """The colours of points spread over the canonical surface."""

    points: Floats
    """(N, 3), metres."""
    light: Floats
    """(N, 3), linear."""

    def at(self, places: Floats, neighbours: int = 4) -> NDArray[np.float64]:
        """(M, 3), linear light: the mean of the nearest points to places (M, 3), by inverse distance."""
        distance, near = KDTree(self.points).query(places, neighbours)
        weights = 1 / (distance + 1e-4)  # metres; at 0.1 mm a point is met
        weights /= weights.sum(axis=1, keepdims=True)
        return np.einsum("mk,mkc->mc", weights, self.light[near])


def painted(meshes: Mapping[str, Mesh], ins: INS, frames: Frames) -> dict[str, Mesh]:
    """The meshes with vertex colours, UVs and textures; as they were where the scans of the frames have no colours.

    A texture needs two vertices where its charts meet: those are appended, so a mesh grows by a fifth, and its first
    vertices stay what they were.
    """
    finest = max(meshes.values(), key=lambda mesh: len(mesh.vertices))
    paint = observe(ins, finest, frames)
    if paint is None:
        return dict(meshes)
    found = {}
    for lod, mesh in meshes.items():
        unwrapped = unwrap(mesh)
        colours = srgb(paint.at(unwrapped.vertices))
        found[lod] = replace(unwrapped, colors=colours, texture=bake(unwrapped, paint, TEXTURE_PIXELS[lod]))
    return found


def observe(ins: INS, mesh: Mesh, frames: Frames) -> Paint | None:
    """Ask the scans nearest to the canonical pose for the colours of points on the mesh; None if none has any.

    Raises:
        ValueError: all scans with colours are too far away.
    """
    turns = torch.linalg.matrix_norm(frames.bone_transforms[..., :3, :3] - torch.eye(3)).square().sum(-1)
    chosen = turns.argsort(stable=True)[:MAX_FRAMES].tolist()
    points = surface_points(mesh.vertices, mesh.faces, POINTS, np.random.default_rng(0))
    _, places = closest(mesh.vertices, mesh.faces, points)
    lights, weights, seen = [], [], np.zeros(len(points))
    for rank, frame in enumerate(chosen):
        scan = frames.scan(frame)
        if scan.colours is None:
            continue
        posed = posed_vertices(ins, mesh, frames, frame).astype(np.float64)
        normals = places.interpolate(vertex_normals(posed, mesh.faces.astype(np.int64)))
        distance, there = closest(scan.vertices, scan.faces, places.interpolate(posed))
        scan_normals = vertex_normals(scan.vertices.astype(np.float64), scan.faces.astype(np.int64))
        agreement = cosines(normals, there.interpolate(scan_normals))
        closeness = np.clip(1 - distance / REACH_M, 0, 1)
        sight = closeness * np.where(agreement > MIN_COSINE, agreement, 0)
        seen += sight
        weights.append((sight * FADING**rank).astype(np.float32))
        lights.append(there.interpolate(linear_light(scan.colours)).astype(np.float32))
    if not lights:
        return None
    parts = [slice(start, start + 50_000) for start in range(0, len(points), 50_000)]  # for memory's sake
    light = np.concatenate(
        [median_colour(np.stack([x[part] for x in lights]), np.stack([x[part] for x in weights])) for part in parts]
    )
    known = seen >= MIN_WEIGHT
    if not known.any():
        raise ValueError("no scan with colours comes near the avatar's surface: train it longer before it is painted")
    if not known.all():
        light[~known] = Paint(points[known], light[known]).at(points[~known], 8)
    return Paint(points, light)


def median_colour(light: Floats, weights: Floats) -> Floats:
    """(N, 3): of the colours (K, N, 3) of N points, which weigh (K, N), the one in the middle by brightness.

    It is a colour that was seen: medians of red, green and blue taken apart would make others where two colours meet.
    """
    order = np.argsort(light @ LUMINANCE, axis=0)
    mass = np.cumsum(np.take_along_axis(weights, order, axis=0), axis=0, dtype=np.float64)
    middle = (mass >= mass[-1] / 2).argmax(axis=0)
    points = np.arange(light.shape[1])
    return light[order[middle, points], points]


def unwrap(mesh: Mesh) -> Mesh:
    """The mesh with UVs.  Vertices on seams are doubled, the doubles appended; the faces keep their order.

    Charts are cut on a smoothed surface: wrinkles and needle-like triangles would cut it into thousands.
    """
    smooth = mesh.vertices.astype(np.float64)
    matrix = laplacian(mesh.faces, len(smooth)).tocsr()
    for _ in range(ATLAS_SMOOTHING):
        smooth += 0.5 * (matrix @ smooth)
    atlas = xatlas.Atlas()
    atlas.add_mesh(smooth.astype(np.float32), mesh.faces.astype(np.uint32))
    charts, pack = xatlas.ChartOptions(), xatlas.PackOptions()
    charts.max_cost = 8.0  # of a chart's growth: higher makes fewer, larger and more distorted charts
    pack.resolution, pack.padding, pack.bilinear = 1024, 4, True
    atlas.generate(charts, pack)
    source, faces, uv = atlas[0]
    if not np.array_equal(source[faces], mesh.faces):
        raise ValueError("the atlas has lost or turned faces")
    # First the vertices as they were, then the doubles.
    _, first = np.unique(source, return_index=True)
    order = np.concatenate([first, np.setdiff1d(np.arange(len(source)), first)])
    if len(first) != len(mesh.vertices):
        raise ValueError(f"expected {len(mesh.vertices)} vertices in the atlas, got {len(first)}")
    source = source[order].astype(np.int64)
    arrays = {
        name: None if (value := getattr(mesh, name)) is None else value[source]
        for name in ("vertices", "normals", "colors", "skin_joints", "skin_weights")
    }
    return replace(mesh, **arrays, faces=np.argsort(order)[faces].astype(np.int32), uv=uv[order].astype(np.float32))


def bake(mesh: Mesh, paint: Paint, size: int) -> bytes:
    """The texture of a mesh with UVs, as JPEG: each texel the paint's colour at its place on the canonical surface."""
    if mesh.uv is None:
        raise ValueError("a mesh without UVs has no place for a texture")
    screen = np.concatenate([size * mesh.uv.astype(np.float64), np.ones((len(mesh.uv), 1))], axis=1)
    hits = rasterize(screen, mesh.faces.astype(np.int64), size, size)
    inside = hits.face >= 0
    corners, weights = mesh.vertices[mesh.faces[hits.face[inside]]], hits.weights[inside]
    image = np.zeros((size, size, 3), np.uint8)
    image[inside] = srgb(paint.at(np.einsum("nk,nkc->nc", weights, corners)))
    # Around the charts the nearest colour goes on, so that neither filtering nor compression draws the gaps in.
    distance, nearest = ndimage.distance_transform_edt(~inside, return_indices=True)  # pyright: ignore[reportGeneralTypeIssues]  # a stub
    image[~inside] = image[inside].mean(axis=0)
    around = ~inside & (distance <= GUTTER_PIXELS)
    image[around] = image[tuple(nearest[:, around])]
    return _jpeg(image)


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    """The best quality that stays below the limit, or the least that is worth having."""
    content = b""
    for quality in (92, 85, 75, 60):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, format="JPEG", quality=quality, subsampling=0, optimize=True)
        content = stream.getvalue()
        if len(content) <= MAX_TEXTURE_BYTES:
            break
    return content
