"""A tunic with short sleeves, cut automatically for a body in the T-pose.

The body is grown by the ease of the cloth, its armpits are closed and below the hips it becomes one flaring skirt;
the surface of that solid is meshed evenly, cut open at neck, sleeves and hem and relaxed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.spatial import ConvexHull, KDTree

from training.data.body import Body
from training.data.mesh import boundary_loops, compact, distances, edges_of, largest_component, winding_numbers
from training.data.subject import SubjectError

CLOTH_SPACING_M = 0.016
EASE_M = 0.023
CLOSING_M = 0.05
FLARE = 0.28
SLEEVE_SHARE = 0.85  # of the upper arm
HEM_SHARE = 0.47  # of the thigh
NECK_HALF_WIDTH_M = 0.085
NECK_TILT = 0.35  # the neckline falls by this much for each metre to the front
PINNED_M = 0.03
TRIM_M = 0.025
TRIM, WEAVE = (214, 160, 48), ((40, 66, 116), (96, 138, 184), (226, 216, 186))
"""sRGB of the bands at the openings, and of the checks: ground, one stripe, two stripes crossing."""


@dataclass(frozen=True)
class Garment:
    """A piece of cloth around the T-pose body, open at neck, sleeves and hem."""

    vertices: NDArray[np.float64]
    """(N, 3), metres, T-pose."""
    faces: NDArray[np.int64]
    """(T, 3)"""
    weights: NDArray[np.float64]
    """(N, 24), those of the nearest body vertex; used to pin the neck and to start the cloth."""
    pinned: NDArray[np.bool_]
    """(N,), the vertices near the neck ring."""


def make_tunic(body: Body, spacing: float = CLOTH_SPACING_M) -> Garment:
    """Cut a tunic for the body; `spacing` is about the length of an edge of the cloth.

    Raises:
        SubjectError: the result is not a sheet with four openings, as when spacing is far too coarse.
    """
    joints = body.skeleton.rest_joints.astype(np.float64)
    sleeve_x = joints[16, 0] + SLEEVE_SHARE * (joints[18, 0] - joints[16, 0])
    hem_y = joints[1, 1] + HEM_SHARE * (joints[4, 1] - joints[1, 1])
    low = np.array([-sleeve_x - 0.06, hem_y - 0.06, body.vertices[:, 2].min() - 0.16])
    high = np.array([sleeve_x + 0.06, joints[15, 1] + 0.02, body.vertices[:, 2].max() + 0.16])
    shape = np.ceil((high - low) / spacing).astype(int) + 1
    field = _solid(body, low, shape, spacing)
    neck_y = _neck_height(field, low, spacing, joints)

    cuts = (
        lambda p: p[:, 0] - sleeve_x,
        lambda p: -p[:, 0] - sleeve_x,
        lambda p: hem_y - p[:, 1],
        lambda p: p[:, 1] - neck_y + NECK_TILT * p[:, 2],
    )
    normals = np.array([[1.0, 0, 0], [-1, 0, 0], [0, -1, 0], [0, 1, NECK_TILT]])
    vertices, faces = surface_nets(field, low, spacing)
    beyond = np.any([cut(vertices) > 0 for cut in cuts], axis=0)
    faces = _without_ears(faces[~beyond[faces].any(1)])
    vertices, faces = largest_component(*compact(vertices, faces))
    vertices = _relaxed(vertices, faces, field, low, spacing, cuts, normals)

    loops = boundary_loops(faces)
    euler = len(vertices) - len(edges_of(faces)) + len(faces)
    if len(loops) != 4 or euler != -2:
        raise SubjectError(f"tunic: expected a sheet with 4 openings, got {len(loops)} and Euler number {euler}")
    weights = body.weights[KDTree(body.vertices).query(vertices)[1]]
    ring = vertices[max(loops, key=lambda loop: vertices[loop, 1].mean())]
    pinned = KDTree(ring).query(vertices)[0] < PINNED_M
    return Garment(vertices, faces, weights, np.asarray(pinned))


def tunic_colours(tunic: Garment, body: Body, points: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(N, 3) sRGB of points (N, 3) on the tunic in the T-pose: checks, and bands along the openings.

    Stripes are about 6 cm wide: scans are coarse where they are flat, and still show a texture that slides.
    """
    shoulder = body.skeleton.rest_joints[16].astype(np.float64)
    x, y, z = points.T
    sleeve = np.abs(x) > shoulder[0]
    along = np.where(sleeve, np.abs(x), y)
    around = np.where(sleeve, 4 * np.arctan2(z - shoulder[2], y - shoulder[1]), 8 * np.arctan2(x, z))
    stripes = (np.sin(2 * np.pi * along / 0.12) > 0).astype(int) + (np.sin(around) > 0)
    edge = tunic.vertices[np.concatenate(boundary_loops(tunic.faces))]
    trim = np.asarray(KDTree(edge).query(points)[0]) < TRIM_M
    return np.where(trim[:, None], TRIM, np.array(WEAVE)[stripes]).astype(np.uint8)


def surface_nets(
    field: NDArray[np.float64], origin: NDArray[np.float64], spacing: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Even mesh of the zero level of a field (X, Y, Z), negative inside: one vertex a crossed cell, one quad a
    crossed edge, cut along its shorter diagonal."""
    inside = field < 0
    total = np.zeros((*(np.array(field.shape) - 1), 3))
    count = np.zeros(total.shape[:3])
    crossings = []
    for axis in range(3):
        head = [slice(None)] * 3
        tail = [slice(None)] * 3
        head[axis], tail[axis] = slice(1, None), slice(None, -1)
        edges = np.argwhere(inside[tuple(tail)] != inside[tuple(head)])
        start = field[tuple(edges.T)]
        end = field[tuple((edges + np.eye(3, dtype=int)[axis]).T)]
        point = edges.astype(np.float64)
        point[:, axis] += start / (start - end)
        first, second = [other for other in range(3) if other != axis]
        cells = []
        for a, b in ((-1, -1), (0, -1), (0, 0), (-1, 0)):
            cell = edges.copy()
            cell[:, first] += a
            cell[:, second] += b
            cells.append(cell)
        cells = np.stack(cells, 1)  # (E, 4, 3)
        valid: NDArray[np.bool_] = np.all((cells >= 0) & (cells < count.shape), axis=2)
        for corner in range(4):
            chosen = tuple(cells[valid[:, corner], corner].T)
            np.add.at(total, chosen, point[valid[:, corner]])
            np.add.at(count, chosen, 1)
        # Around axis 0 and 2 the four cells turn the same way, around axis 1 the other way.
        turned = (start < 0) == (axis == 1)
        cells[turned] = cells[turned][:, ::-1]
        crossings.append(cells[np.all(valid, axis=1)])
    used = count > 0
    index = np.full(count.shape, -1)
    index[used] = np.arange(used.sum())
    vertices = origin + spacing * total[used] / count[used][:, None]
    quads = np.concatenate([index[tuple(np.moveaxis(cells, -1, 0))] for cells in crossings])
    a, b, c, d = (vertices[quads[:, corner]] for corner in range(4))
    short = (np.linalg.norm(a - c, axis=1) <= np.linalg.norm(b - d, axis=1))[:, None, None]
    faces = np.where(short, quads[:, [[0, 1, 2], [0, 2, 3]]], quads[:, [[0, 1, 3], [1, 2, 3]]]).reshape(-1, 3)
    return vertices, faces


def _solid(body: Body, low: NDArray[np.float64], shape: NDArray[np.int64], spacing: float) -> NDArray[np.float64]:
    """The grown, closed and skirted body as a field on a grid, negative inside."""
    axes = [low[k] + spacing * np.arange(shape[k]) for k in range(3)]
    nodes = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    distance = distances(body.vertices, body.faces, nodes)
    inside = winding_numbers(body.vertices, body.faces, nodes) > 0.5
    field = np.where(inside, -distance, distance).reshape(shape) - EASE_M
    grown = field < CLOSING_M
    # Distances between nodes are half a step longer than those to the surface between them.
    closed = CLOSING_M - (np.asarray(ndimage.distance_transform_edt(grown)) - 0.5) * spacing
    field = np.minimum(field, np.maximum(closed, -CLOSING_M))

    hips_y = body.skeleton.rest_joints[1, 1] + 0.03
    torso = np.abs(body.vertices[:, 0]) < 0.3
    for k in np.flatnonzero(axes[1] < hips_y):
        y = axes[1][k]
        slab = body.vertices[torso & (body.vertices[:, 1] > y - 0.015) & (body.vertices[:, 1] < hips_y + 0.015)]
        planes = ConvexHull(slab[:, [0, 2]]).equations  # n . p + d <= 0 inside
        x, z = np.meshgrid(axes[0], axes[2], indexing="ij")
        distance = (planes[:, 0, None, None] * x + planes[:, 1, None, None] * z + planes[:, 2, None, None]).max(0)
        field[:, k] = np.minimum(field[:, k], distance - EASE_M - FLARE * (hips_y - y))
    return ndimage.gaussian_filter(field, 0.9, mode="nearest")


def _neck_height(
    field: NDArray[np.float64], low: NDArray[np.float64], spacing: float, joints: NDArray[np.float64]
) -> float:
    """Greatest height below the chin at which the solid is as wide as the neck opening."""
    x = np.abs(low[0] + spacing * np.arange(field.shape[0]))
    half_width = np.where((field < 0).any(2), x[:, None], 0.0).max(0)
    heights = low[1] + spacing * np.arange(field.shape[1])
    wide = heights[(half_width > NECK_HALF_WIDTH_M) & (heights < joints[12, 1])]
    return float(wide.max() + spacing / 2)


def _without_ears(faces: NDArray[np.int64]) -> NDArray[np.int64]:
    """Faces without those that hang on a single edge."""
    while True:
        edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
        _, inverse, count = np.unique(edges, axis=0, return_inverse=True, return_counts=True)
        free = (count[inverse.ravel()] == 1).reshape(3, -1).sum(0)
        if not (free >= 2).any():
            return faces
        faces = faces[free < 2]


def _relaxed(vertices, faces, field, low, spacing, cuts, normals, rounds: int = 30) -> NDArray[np.float64]:
    """Even out the edges: smooth, then return to the zero level and, at the openings, to their planes."""
    count = len(vertices)
    edges = edges_of(faces)
    both = np.concatenate([edges, edges[:, ::-1]])
    on_loop = np.zeros(count, bool)
    loops = boundary_loops(faces)
    loop_edges = []
    plane_of = np.full(count, -1)
    for loop in loops:
        on_loop[loop] = True
        loop_edges.append(np.stack([loop, np.roll(loop, 1)], 1))
        plane_of[loop] = np.argmin([np.abs(cut(vertices[loop])).mean() for cut in cuts])
    inner = both[~on_loop[both[:, 0]]]
    ring = np.concatenate(loop_edges)
    rows = np.concatenate([inner, ring, ring[:, ::-1]])
    average = sparse.csr_array((np.ones(len(rows)), (rows[:, 0], rows[:, 1])), shape=(count, count))
    average = sparse.diags_array(1 / average.sum(1)) @ average
    gradient = np.gradient(field, spacing)

    for _ in range(rounds):
        vertices = vertices + 0.5 * (average @ vertices - vertices)
        for _ in range(2):
            at = ((vertices - low) / spacing).T
            value = ndimage.map_coordinates(field, at, order=1, mode="nearest")
            slope = np.stack([ndimage.map_coordinates(part, at, order=1, mode="nearest") for part in gradient], 1)
            vertices = vertices - (value / np.maximum((slope**2).sum(1), 0.1))[:, None] * slope
            for index, (cut, normal) in enumerate(zip(cuts, normals, strict=True)):
                chosen = plane_of == index
                vertices[chosen] -= (cut(vertices[chosen]) / (normal @ normal))[:, None] * normal
    return vertices
