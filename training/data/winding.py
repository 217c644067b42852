"""Which points lie inside a scan: generalised winding numbers by counting the crossings of rays.

Along a ray from a point, leaving a closed surface counts +1 and entering it -1; the sum is the winding number, exactly.
A scan with holes is closed by cones over its boundary, whose own winding number, a fraction, is then taken off again.
Scalar code throughout, as in `training.data.cloth`.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from training.data.mesh import directed_edges, winding_numbers


def occupancy(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], points: NDArray[np.floating]
) -> NDArray[np.bool_]:
    """(N,): whether points (N, 3) lie inside the surface, by winding number > 0.5.

    Right on scans with holes and self-intersections too, where parity and normals are not.
    """
    vertices, triangles = np.asarray(vertices, np.float64), np.asarray(faces, np.int64)
    points = np.asarray(points, np.float64)
    cones, centres = _cones(vertices, triangles)
    if len(cones):  # perhaps only a seam, where vertices are stored twice
        vertices, same = np.unique(vertices, axis=0, return_inverse=True)
        triangles = same.reshape(-1)[triangles]
        cones, centres = _cones(vertices, triangles)
    vertices = np.concatenate([vertices, centres])
    crossings = _crossings(vertices, np.concatenate([triangles, cones]), points)
    return crossings > 0.5 if not len(cones) else crossings - winding_numbers(vertices, cones, points) > 0.5


def _cones(
    vertices: NDArray[np.float64], triangles: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Triangles (C, 3) that close the surface, and the vertices (K, 3) to be appended: the middles of its openings.

    Every directed edge without its opposite gets a triangle to the middle of the boundary it is part of.
    """
    edges, size = directed_edges(triangles), len(vertices)
    low, high = edges.min(1), edges.max(1)
    keys, inverse = np.unique(low * size + high, return_inverse=True)
    net = np.bincount(inverse, weights=np.where(edges[:, 0] == low, 1, -1)).astype(int)
    free = np.repeat(np.flatnonzero(net), np.abs(net[net != 0]))
    start, end = keys[free] // size, keys[free] % size
    start, end = np.where(net[free] > 0, start, end), np.where(net[free] > 0, end, start)
    own = np.unique(np.concatenate([start, end]))
    graph = sparse.coo_array(
        (np.ones(len(free), bool), (np.searchsorted(own, start), np.searchsorted(own, end))), shape=(len(own),) * 2
    )
    count, part = connected_components(graph, directed=False)
    members = np.maximum(np.bincount(part, minlength=count), 1)
    sums = [np.bincount(part, weights=vertices[own, axis], minlength=count) for axis in range(3)]
    apex = size + part[np.searchsorted(own, start)].astype(np.int64)
    return np.stack([apex, end, start], 1), np.stack(sums, 1) / members[:, None]


def _crossings(
    vertices: NDArray[np.float64], triangles: NDArray[np.int64], points: NDArray[np.float64]
) -> NDArray[np.int64]:
    """(N,): the winding number of a closed surface, from rays along its shortest side."""
    low, high = vertices.min(0), vertices.max(0)
    axes = np.roll(np.arange(3), 2 - int(np.argmin(high - low)))  # the last one is the rays'
    vertices, points = np.ascontiguousarray(vertices[:, axes]), np.ascontiguousarray(points[:, axes])
    low, high = low[axes], high[axes]
    # Square bins across the rays, about one for a triangle, but no more than fit when the surface is all but a line.
    width, height = (high - low)[:2]
    size = max(np.sqrt(width * height / len(triangles)), max(width, height) / 4096, 1e-9)
    bins = (np.array([width, height]) / size).astype(np.int64) + 1
    a, b, c = np.moveaxis(vertices[triangles, :2], 1, 0)
    boxes = np.concatenate([np.minimum(np.minimum(a, b), c), np.maximum(np.maximum(a, b), c)], 1)
    starts, members = _binned(((boxes - np.tile(low[:2], 2)) / size).astype(np.int64), bins)
    return _count(vertices, triangles, boxes, points, low, high, size, bins, starts, members)


@njit(cache=True, nogil=True)
def _binned(ranges, bins):
    """Triangles of each bin, one bin after the other, and where each begins; `ranges` (T, 4): first and last bins."""
    starts = np.zeros(bins[0] * bins[1] + 1, np.int64)
    for first_i, first_j, last_i, last_j in ranges:
        for i in range(first_i, last_i + 1):
            starts[i * bins[1] + first_j + 1 : i * bins[1] + last_j + 2] += 1
    starts = np.cumsum(starts)
    filled = starts[:-1].copy()
    members = np.empty(starts[-1], np.int64)
    for t in range(len(ranges)):
        for i in range(ranges[t, 0], ranges[t, 2] + 1):
            for j in range(ranges[t, 1], ranges[t, 3] + 1):
                members[filled[i * bins[1] + j]] = t
                filled[i * bins[1] + j] += 1
    return starts, members


@njit(cache=True, nogil=True)
def _count(vertices, triangles, boxes, points, low, high, size, bins, starts, members):
    """Signed crossings of the ray from every point along the last axis."""
    total = np.zeros(len(points), np.int64)
    for n in range(len(points)):
        x, y, z = points[n, 0], points[n, 1], points[n, 2]
        if not (low[0] <= x <= high[0] and low[1] <= y <= high[1]):  # NaN too
            continue
        place = min(int((x - low[0]) / size), bins[0] - 1) * bins[1] + min(int((y - low[1]) / size), bins[1] - 1)
        for index in range(starts[place], starts[place + 1]):
            t = members[index]
            if x < boxes[t, 0] or y < boxes[t, 1] or x > boxes[t, 2] or y > boxes[t, 3]:
                continue
            a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
            ab, left_of_ab = _side(vertices, a, b, x, y)
            bc, left_of_bc = _side(vertices, b, c, x, y)
            if left_of_ab != left_of_bc:
                continue
            ca, left_of_ca = _side(vertices, c, a, x, y)
            if left_of_ab != left_of_ca:
                continue
            area = ab + bc + ca
            if area != 0 and (bc * vertices[a, 2] + ca * vertices[b, 2] + ab * vertices[c, 2]) / area > z:
                total[n] += 1 if left_of_ab else -1
    return total


@njit(cache=True, nogil=True, inline="always")
def _side(vertices, a, b, x, y):
    """Twice the area of (a, b, point) across the rays, and whether the point lies left of the edge a -> b.

    Two triangles with a common edge must agree on it to the last bit, or a ray slips through between them: the edge is
    always taken from its lower vertex, and a point exactly on it is thought a little further along x, and less along y.
    """
    first, second = (a, b) if a < b else (b, a)
    dx, dy = vertices[second, 0] - vertices[first, 0], vertices[second, 1] - vertices[first, 1]
    area = dx * (y - vertices[first, 1]) - dy * (x - vertices[first, 0])
    left = area > 0 or (area == 0 and (dy < 0 or (dy == 0 and dx > 0)))
    return (area, left) if a < b else (-area, not left)
