"""What training asks of a scan: points with occupancy labels, and a grid of signed distances.

Reference: Kant et al., CVPR 2023, app. A.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from training.data.band import banded_distances
from training.data.mesh import connected_regions, is_closed
from training.data.subject import Scan
from training.data.winding import occupancy

SURFACE_NOISE_M = 0.01
"""Standard deviation of the isotropic noise on surface points (app. A.1)."""
BOX_SCALE = 1.1
"""Uniform points fill the bounding box scaled by this (app. A.1)."""


@dataclass(frozen=True)
class Samples:
    """Labelled points of one frame, near the surface and in the box."""

    surface_points: NDArray[np.float32]
    """(S, 3), near the surface."""
    surface_occupancy: NDArray[np.bool_]
    box_points: NDArray[np.float32]
    """(B, 3), uniform in the scaled bounding box."""
    box_occupancy: NDArray[np.bool_]


@dataclass(frozen=True)
class DistanceField:
    """Signed distances on a grid, metres, negative inside; true within the band and clamped to +-band outside it."""

    origin: NDArray[np.float32]
    """(3,), position of node (0, 0, 0)."""
    spacing: float
    values: NDArray[np.float16]
    """(X, Y, Z)"""
    band: float

    def sample(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """(N,): trilinear distances at points (N, 3); outside the grid, +band."""
        nodes = (np.asarray(points, np.float64) - self.origin) / self.spacing
        values = self.values.astype(np.float32)  # map_coordinates does not read float16
        return ndimage.map_coordinates(values, nodes.T, np.float64, order=1, mode="constant", cval=self.band)


def surface_points(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(count, 3): points on the surface, uniform by area."""
    a, b, c = np.moveaxis(np.asarray(vertices, np.float64)[faces], 1, 0)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    # Systematic sampling: evenly spaced quantiles spread the points over the surface better than independent draws.
    quantiles = (np.arange(count) + rng.random(count)) / max(count, 1)
    chosen = np.searchsorted(np.cumsum(area) / area.sum(), quantiles).clip(max=len(faces) - 1)
    u, v = rng.random((2, count, 1))
    over = u + v > 1  # fold the parallelogram's other half back into the triangle
    u, v = np.where(over, 1 - u, u), np.where(over, 1 - v, v)
    a, b, c = a[chosen], b[chosen], c[chosen]
    return a + u * (b - a) + v * (c - a)


def sample_frame(
    scan: Scan,
    rng: np.random.Generator,
    surface_count: int,
    box_count: int,
    noise_m: Sequence[float] = (SURFACE_NOISE_M,),
) -> Samples:
    """Labelled points of one scan as app. A.1 draws them (there 100 000 of either kind), in the scan's frame.

    Args:
        noise_m: deviations of the noise on surface points, each on as many of them; small ones put the points where
            the surface is decided.
    """
    near = surface_points(scan.vertices, scan.faces, surface_count, rng)
    # Surface points come triangle by triangle, so taking turns spreads every deviation over the whole surface.
    near += np.resize(noise_m, len(near))[:, None] * rng.standard_normal(near.shape)
    low, high = scan.vertices.min(0).astype(np.float64), scan.vertices.max(0).astype(np.float64)
    centre, half = (low + high) / 2, BOX_SCALE * (high - low) / 2
    box = centre + half * rng.uniform(-1, 1, (box_count, 3))
    # Labels belong to the points as stored, so they are rounded before they are asked about.
    near, box = near.astype(np.float32), box.astype(np.float32)
    labels = occupancy(scan.vertices, scan.faces, np.concatenate([near, box]))
    return Samples(near, labels[:surface_count], box, labels[surface_count:])


def to_root_frame(vertices: NDArray[np.floating], root_transform: NDArray[np.floating]) -> NDArray[np.float64]:
    """World points (N, 3) as seen from the pelvis; `root_transform` (4, 4) is rigid, pelvis frame -> world."""
    transform = np.asarray(root_transform, np.float64)
    return (np.asarray(vertices, np.float64) - transform[:3, 3]) @ transform[:3, :3]


def build_distance_field(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], spacing: float = 0.01, band: float = 0.04
) -> DistanceField:
    """The distance field of a scan, in the frame of `vertices` (training: the root frame).

    Distances are exact at the nodes within the band.  On a scan with holes the sign follows the winding
    number, which closes them, while the distance is to the surface that is there.
    """
    vertices = np.ascontiguousarray(vertices, np.float64)
    faces = np.ascontiguousarray(faces, np.int64)
    margin = band + 2 * spacing
    origin = (vertices.min(0) - margin).astype(np.float32)
    shape = np.ceil((vertices.max(0) + margin - origin) / spacing).astype(int) + 1

    distance = banded_distances(vertices, faces, origin, spacing, (int(shape[0]), int(shape[1]), int(shape[2])), band)
    inside = _inside_nodes(vertices, faces, origin, spacing, distance)
    values = np.where(inside, -distance, distance).astype(np.float16)
    return DistanceField(origin, float(spacing), values, float(band))


def _inside_nodes(
    vertices: NDArray[np.float64],
    faces: NDArray[np.int64],
    origin: NDArray[np.float32],
    spacing: float,
    distance: NDArray[np.float32],
) -> NDArray[np.bool_]:
    """(X, Y, Z): whether each node is inside, asking about as few as the mesh allows."""
    if not is_closed(faces):
        nodes = origin.astype(np.float64) + spacing * np.argwhere(np.ones(distance.shape, bool))
        return occupancy(vertices, faces, nodes).reshape(distance.shape)
    # Neighbours that are both further than half a step from the surface have no surface between them, so a
    # connected region of such nodes has one sign, and any one of them decides it.
    flat = connected_regions(distance > 0.501 * spacing).ravel()
    close = np.flatnonzero(flat == 0)
    one_of = np.zeros(flat.max() + 1, np.int64)
    one_of[flat] = np.arange(len(flat))
    asked = np.concatenate([one_of, close])
    nodes = origin.astype(np.float64) + spacing * np.stack(np.unravel_index(asked, distance.shape), 1)
    answers = occupancy(vertices, faces, nodes)
    inside = answers[: len(one_of)][flat]
    inside[close] = answers[len(one_of) :]
    return inside.reshape(distance.shape)
