"""Distances between surfaces: zero for the same one, known for spheres, and no figure blind to what it should see."""

import numpy as np
import pytest
import trimesh

from training.data.sampling import surface_points
from training.metrics import closest, surface_errors

RADIUS = 0.5


def sphere(radius: float = RADIUS, subdivisions: int = 4) -> tuple[np.ndarray, np.ndarray]:
    mesh = trimesh.creation.icosphere(subdivisions, radius)
    return np.asarray(mesh.vertices), np.asarray(mesh.faces)


def errors(vertices: np.ndarray, faces: np.ndarray, scan: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    points = surface_points(*scan, 4000, np.random.default_rng(0))
    return surface_errors(vertices, faces, *scan, points)


def test_a_scan_is_no_distance_from_itself() -> None:
    vertices, faces = sphere()
    # Numbered otherwise, it is the same surface.
    order = np.random.default_rng(1).permutation(len(vertices))
    found = errors(vertices[order], np.argsort(order)[faces][::-1], (vertices, faces))
    assert found.pop("normal_consistency") == pytest.approx(1, abs=1e-9)
    assert len(found) == 7
    assert max(found.values()) < 1e-6


def test_a_larger_sphere_is_as_far_as_its_radius_says() -> None:
    found = errors(*sphere(RADIUS + 0.01), sphere())
    assert found.pop("normal_consistency") == pytest.approx(1, abs=1e-3)
    for name, value in found.items():
        assert value == pytest.approx(10, abs=0.7), name  # flat triangles lie up to 0.6 mm inside the sphere


def test_a_shifted_sphere_is_half_the_shift_away_on_average() -> None:
    """A shift t leaves |t cos(angle)|, and cosines are uniform on a sphere: mean t/2, 95th percentile 0.95 t."""
    vertices, faces = sphere()
    shift = 0.02 * np.array([1, 2, 2]) / 3
    found = errors(vertices + shift, faces, (vertices, faces))
    for way in ("point_to_surface", "scan_to_model"):
        assert found[f"{way}_mm"] == pytest.approx(10, rel=0.05)
        assert found[f"{way}_p95_mm"] == pytest.approx(19, rel=0.03)
        assert found[f"{way}_p99_mm"] == pytest.approx(19.8, rel=0.03)
    assert found["chamfer_mm"] == pytest.approx((found["point_to_surface_mm"] + found["scan_to_model_mm"]) / 2)


def test_what_is_missing_is_seen_from_the_scan_and_what_is_too_much_from_the_model() -> None:
    vertices, faces = sphere()
    upper = faces[(vertices[faces][..., 1] > 0).all(axis=1)]
    half = vertices[np.unique(upper)], np.searchsorted(np.unique(upper), upper)
    missing, too_much = errors(*half, (vertices, faces)), errors(vertices, faces, half)
    assert missing["point_to_surface_mm"] < 1e-6 < 100 < missing["scan_to_model_mm"]
    assert too_much["scan_to_model_mm"] < 1e-6 < 100 < too_much["point_to_surface_mm"]


def test_an_inside_out_surface_has_the_opposite_normals() -> None:
    vertices, faces = sphere()
    assert errors(vertices, faces[:, ::-1], (vertices, faces))["normal_consistency"] == pytest.approx(-1, abs=1e-9)


def test_the_scan_s_own_meshing_does_not_weigh() -> None:
    """One half of the scan is cut finer: the mean over it stays."""
    vertices, faces = sphere(subdivisions=3)
    shifted = vertices + np.array([0.0, 0.01, 0.0])
    # The halves differ: the prediction is right in front and wrong behind.
    wrong = np.where(vertices[:, 2:] < 0, shifted, vertices)
    finer = trimesh.Trimesh(vertices, faces, process=False)
    finer = finer.subdivide(np.flatnonzero(finer.triangles_center[:, 2] < 0))
    even, uneven = (
        errors(wrong, faces, scan)["scan_to_model_mm"]
        for scan in ((vertices, faces), (np.asarray(finer.vertices), np.asarray(finer.faces)))
    )
    assert uneven == pytest.approx(even, rel=0.03)


def test_closest_points_carry_what_the_vertices_carry() -> None:
    vertices, faces = sphere(subdivisions=2)
    rng = np.random.default_rng(2)
    at = surface_points(vertices, faces, 500, rng)
    _, found = closest(vertices, faces, at)
    np.testing.assert_allclose(found.interpolate(vertices), at, atol=1e-9)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1)
    assert found.weights.min() >= 0
    # Outside a sphere of flat faces the closest point is nearer than any vertex.
    outside = 1.3 * at
    to_vertex = np.linalg.norm(outside[:, None] - vertices, axis=2).min(axis=1)
    distance, found = closest(vertices, faces, outside)
    assert (distance <= to_vertex + 1e-12).all()
    np.testing.assert_allclose(np.linalg.norm(found.interpolate(vertices) - outside, axis=1), distance, atol=1e-9)


def test_a_face_without_area_gives_its_nearest_corner() -> None:
    vertices = np.array([[0.0, 0, 0], [1, 0, 0], [1, 0, 0]])
    _, found = closest(vertices, np.array([[0, 1, 2]]), np.array([[2.0, 0, 0], [-1, 0, 0]]))
    np.testing.assert_allclose(found.interpolate(vertices), [[1, 0, 0], [0, 0, 0]])
