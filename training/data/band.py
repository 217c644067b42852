"""Distances to a scan at the nodes of a grid, near the scan only.

Every triangle visits the nodes within reach, and bounds from below spare nearly all of them the exact distance.
Scalar code throughout, as in `training.data.cloth`.
"""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray


def banded_distances(
    vertices: NDArray[np.floating],
    faces: NDArray[np.integer],
    origin: NDArray[np.floating],
    spacing: float,
    shape: tuple[int, int, int],
    band: float,
) -> NDArray[np.float32]:
    """(X, Y, Z): distance of the nodes `origin + spacing * (i, j, k)` to the surface, metres; at most the band."""
    corners = (np.asarray(vertices, np.float64)[faces] - np.asarray(origin, np.float64)).reshape(-1, 9)
    distance = np.full(shape, band, np.float32)
    _spread(corners, spacing, band, distance)
    return distance


@njit(cache=True, nogil=True)
def _spread(corners, spacing, band, distance):
    """Lower the distances of all nodes within the band of a triangle to that triangle's."""
    for ax, ay, az, bx, by, bz, cx, cy, cz in corners:
        mx, my, mz = (ax + bx + cx) / 3, (ay + by + cy) / 3, (az + bz + cz) / 3
        radius = max(_length(ax - mx, ay - my, az - mz), _length(bx - mx, by - my, bz - mz))
        radius = max(radius, _length(cx - mx, cy - my, cz - mz))
        ux, uy, uz, vx, vy, vz = bx - ax, by - ay, bz - az, cx - ax, cy - ay, cz - az
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        length = max(_length(nx, ny, nz), 1e-30)
        nx, ny, nz = nx / length, ny / length, nz / length
        reach = band + radius
        i0, i1 = _range(mx, reach, spacing, distance.shape[0])
        for i in range(i0, i1):
            x = i * spacing - mx
            j0, j1 = _range(my, math.sqrt(max(reach * reach - x * x, 0.0)), spacing, distance.shape[1])
            for j in range(j0, j1):
                y = j * spacing - my
                k0, k1 = _range(mz, math.sqrt(max(reach * reach - x * x - y * y, 0.0)), spacing, distance.shape[2])
                for k in range(k0, k1):
                    z = k * spacing - mz
                    squared = x * x + y * y + z * z  # to the middle
                    bound = distance[i, j, k]
                    if squared >= (bound + radius) * (bound + radius):
                        continue
                    above = nx * x + ny * y + nz * z
                    beside = max(math.sqrt(max(squared - above * above, 0.0)) - radius, 0.0)
                    if above * above + beside * beside >= bound * bound:
                        continue
                    px, py, pz = x + mx - ax, y + my - ay, z + mz - az
                    squared = _squared_distance(px, py, pz, ux, uy, uz, vx, vy, vz)
                    if squared < bound * bound:
                        distance[i, j, k] = math.sqrt(squared)


@njit(cache=True, nogil=True, inline="always")
def _length(x, y, z):
    return math.sqrt(x * x + y * y + z * z)


@njit(cache=True, nogil=True, inline="always")
def _range(middle, reach, spacing, nodes):
    """The nodes along an axis that lie within reach of its middle."""
    return max(math.ceil((middle - reach) / spacing), 0), min(math.floor((middle + reach) / spacing) + 1, nodes)


@njit(cache=True, nogil=True)
def _squared_distance(px, py, pz, ux, uy, uz, vx, vy, vz):
    """Squared distance of p to the triangle (0, u, v): over its inside that to the plane, else to the nearest edge."""
    uu, uv, vv = ux * ux + uy * uy + uz * uz, ux * vx + uy * vy + uz * vz, vx * vx + vy * vy + vz * vz
    pu, pv = px * ux + py * uy + pz * uz, px * vx + py * vy + pz * vz
    area = uu * vv - uv * uv
    s, t = vv * pu - uv * pv, uu * pv - uv * pu  # barycentric, times the area
    if s >= 0 and t >= 0 and s + t <= area and area > 0:
        s, t = s / area, t / area
        dx, dy, dz = px - s * ux - t * vx, py - s * uy - t * vy, pz - s * uz - t * vz
        return dx * dx + dy * dy + dz * dz
    wx, wy, wz = vx - ux, vy - uy, vz - uz
    return min(
        _squared_to_edge(px, py, pz, ux, uy, uz),
        _squared_to_edge(px, py, pz, vx, vy, vz),
        _squared_to_edge(px - ux, py - uy, pz - uz, wx, wy, wz),
    )


@njit(cache=True, nogil=True, inline="always")
def _squared_to_edge(px, py, pz, ex, ey, ez):
    """Squared distance of a point to the edge from the origin to e."""
    along = px * ex + py * ey + pz * ez
    share = min(max(along / max(ex * ex + ey * ey + ez * ez, 1e-30), 0.0), 1.0)
    dx, dy, dz = px - share * ex, py - share * ey, pz - share * ez
    return dx * dx + dy * dy + dz * dz
