"""How far a prediction is from a scan: overlap, distances in millimetres, normals."""

from dataclasses import dataclass

import igl
import numpy as np
from numpy.typing import NDArray

from service.picture import vertex_normals

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class OnSurface:
    """N points of a triangle mesh, given by their faces: they go where the mesh goes."""

    corners: NDArray[np.integer]
    """(N, 3): the vertices of the face that a point lies on."""
    weights: NDArray[np.floating]
    """(N, 3): its barycentric coordinates there, >= 0, rows sum to 1."""

    def interpolate(self, values: NDArray[np.floating]) -> Floats:
        """(N, C): what values (V, C) of the mesh's vertices are at the points."""
        return np.einsum("nk,nkc->nc", self.weights, np.asarray(values, np.float64)[self.corners])


def closest(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], points: NDArray[np.floating]
) -> tuple[Floats, OnSurface]:
    """Distances (N,) from points (N, 3) to a surface, and where on it the closest points lie."""
    surface, triangles = np.ascontiguousarray(vertices, np.float64), np.ascontiguousarray(faces, np.int64)
    squared, face, there = igl.point_mesh_squared_distance(np.ascontiguousarray(points, np.float64), surface, triangles)
    corners = triangles[np.asarray(face)]
    weights = _barycentric(surface[corners], np.asarray(there))
    return np.sqrt(np.asarray(squared)), OnSurface(corners, weights)


def intersection_over_union(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """IoU of two occupancies at the same points (eq. 20), in [0, 1]; 1 where both are empty."""
    union = np.count_nonzero(predicted | truth)
    return float(np.count_nonzero(predicted & truth) / union) if union else 1.0


def surface_errors(
    vertices: NDArray[np.floating],
    faces: NDArray[np.integer],
    scan_vertices: NDArray[np.floating],
    scan_faces: NDArray[np.integer],
    scan_points: NDArray[np.floating],
) -> dict[str, float]:
    """Distances between a predicted surface and a scan, both in metres and in one frame.

    `point_to_surface` goes from the predicted vertices to the scan, `scan_to_model` from points of the scan to the
    prediction: the one sees what is too much, the other what is missing.  Their means, their 95th and 99th
    percentiles, and `chamfer`, the mean of the two means, are in millimetres.  `normal_consistency` is the mean cosine
    (with its sign: an inside-out surface scores -1) between the smooth normals at both ends of those distances, taken
    each way and averaged; 1 is perfect.

    Args:
        scan_points: (N, 3) on the scan, uniform by area, so that the scan's own meshing does not weigh.
    """
    predicted, scanned = np.asarray(vertices, np.float64), np.asarray(scan_vertices, np.float64)
    normals = vertex_normals(predicted, np.asarray(faces, np.int64))
    scan_normals = vertex_normals(scanned, np.asarray(scan_faces, np.int64))
    to_scan, on_scan = closest(scanned, scan_faces, predicted)
    to_model, on_model = closest(predicted, faces, scan_points)
    _, own = closest(scanned, scan_faces, scan_points)
    forward = cosines(normals, on_scan.interpolate(scan_normals))
    backward = cosines(own.interpolate(scan_normals), on_model.interpolate(normals))
    errors: dict[str, float] = {}
    for name, distance in (("point_to_surface", to_scan), ("scan_to_model", to_model)):
        millimetres = 1000 * distance
        errors[f"{name}_mm"] = float(millimetres.mean())
        p95, p99 = np.percentile(millimetres, (95, 99))
        errors |= {f"{name}_p95_mm": float(p95), f"{name}_p99_mm": float(p99)}
    errors["chamfer_mm"] = (errors["point_to_surface_mm"] + errors["scan_to_model_mm"]) / 2
    errors["normal_consistency"] = float((forward.mean() + backward.mean()) / 2)
    return errors


def cosines(a: Floats, b: Floats) -> Floats:
    """(N,): of the angles between vectors (N, 3); 0 where one has no length."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.einsum("nc,nc->n", a, b) / np.maximum(lengths, 1e-12)


def _barycentric(corners: Floats, points: Floats) -> Floats:
    """(N, 3): of points in the planes of triangles (N, 3, 3); of a face without area, its nearest corner."""
    a, b, c = np.moveaxis(corners, 1, 0)
    normal = np.cross(b - a, c - a)
    squared = np.einsum("nc,nc->n", normal, normal)
    parts = [np.einsum("nc,nc->n", np.cross(q - p, points - p), normal) for p, q in ((b, c), (c, a), (a, b))]
    weights = np.stack(parts, axis=1).clip(min=0)
    flat = (squared <= 0) | ~(weights.sum(axis=1) > 0)
    nearest = np.linalg.norm(corners - points[:, None], axis=2).argmin(axis=1)
    weights[flat] = np.eye(3)[nearest[flat]]
    return weights / weights.sum(axis=1, keepdims=True)
