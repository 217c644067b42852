"""Rays that count crossings, against the solid angles of every triangle."""

import igl
import numpy as np
import pytest
import trimesh
from numpy.typing import NDArray

from training.data.body import open_body
from training.data.mesh import distances, is_closed
from training.data.sampling import surface_points
from training.data.winding import occupancy

Surface = tuple[NDArray[np.float64], NDArray[np.int64]]


def sphere(centre=(0.0, 0.0, 0.0), subdivisions: int = 3) -> Surface:
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions, radius=0.3)
    return np.asarray(mesh.vertices) + centre, np.asarray(mesh.faces, np.int64)


def both(first: Surface, second: Surface) -> Surface:
    return np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1] + len(first[0])])


def without(surface: Surface, centre: tuple[float, float, float], radius: float) -> Surface:
    vertices, faces = surface
    return vertices, faces[np.linalg.norm(vertices[faces].mean(1) - centre, axis=1) > radius]


def body() -> Surface:
    mesh = open_body()
    return mesh.vertices.astype(np.float64), mesh.faces.astype(np.int64)


def open_body_with_holes() -> Surface:
    vertices, faces = body()
    rng = np.random.default_rng(1)
    surface = vertices, faces
    for centre in vertices[rng.integers(0, len(vertices), 6)]:
        surface = without(surface, tuple(centre), rng.uniform(0.02, 0.08))
    return surface


def soup() -> Surface:
    """Every triangle with vertices of its own, as across a texture's seams."""
    vertices, faces = sphere()
    return vertices[faces].reshape(-1, 3), np.arange(3 * len(faces)).reshape(-1, 3)


SURFACES = {
    "body": body,
    "overlapping": lambda: both(sphere(), sphere((0.2, 0.1, 0.0))),
    "touching": lambda: both(sphere(), sphere()),
    "inside out within": lambda: both(sphere(subdivisions=4), (0.5 * sphere()[0], sphere()[1][:, ::-1])),
    "holes": open_body_with_holes,
    "half": lambda: without(sphere(), (0.0, 0.3, 0.0), 0.4),
    "half twice": lambda: both(without(sphere(), (0.0, 0.3, 0.0), 0.4), without(sphere(), (0.0, 0.3, 0.0), 0.4)),
    "one triangle": lambda: (np.eye(3), np.array([[0, 1, 2]])),
    "soup": soup,
}


@pytest.mark.parametrize("name", SURFACES)
def test_labels_are_those_of_the_solid_angles(name: str) -> None:
    vertices, faces = SURFACES[name]()
    assert is_closed(faces) == (name not in ("holes", "half", "half twice", "one triangle", "soup"))
    rng = np.random.default_rng(0)
    near = surface_points(vertices, faces, 800, rng)
    near += rng.choice([1e-4, 2e-3, 0.03], (len(near), 1)) * rng.standard_normal(near.shape)
    low, high = vertices.min(0), vertices.max(0)
    points = np.concatenate([near, rng.uniform(1.3 * low - 0.3 * high, 1.3 * high - 0.3 * low, (200, 3))])
    winding = igl.winding_number(vertices, faces, points)
    sure = np.abs(winding - 0.5) > 0.01  # over holes ours asks the cones about a few parts in a thousand
    assert sure.mean() > 0.7
    np.testing.assert_array_equal(occupancy(vertices, faces, points)[sure], winding[sure] > 0.5)


@pytest.mark.parametrize("rows", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_rays_through_edges_and_vertices_count_once(rows: tuple[int, int, int]) -> None:
    """A box whose diagonals and corners lie on the same lattice as the points, along each axis."""
    mesh = trimesh.creation.box((1.0, 0.75, 0.5)).subdivide()
    vertices, faces = np.asarray(mesh.vertices)[:, rows], np.asarray(mesh.faces, np.int64)
    lattice = np.arange(-5, 6) / 8 + 1 / 64
    points = np.stack(np.meshgrid(np.arange(-5, 6) / 8, np.arange(-4, 5) / 8, lattice, indexing="ij"), -1).reshape(
        -1, 3
    )
    half = np.abs(vertices).max(0)
    points = points[:, rows]
    off = (np.abs(np.abs(points) - half) > 1e-12).all(1)  # not on a side's plane
    np.testing.assert_array_equal(occupancy(vertices, faces, points)[off], (np.abs(points) < half).all(1)[off])


def test_a_lattice_of_degenerate_triangles_is_no_trouble() -> None:
    """Vertices rounded to a coarse lattice: triangles without area, edges on edges, rays through all of them."""
    vertices, faces = sphere(subdivisions=3)
    vertices = np.round(vertices * 40) / 40
    points = np.stack(np.meshgrid(*[np.arange(-14, 15) / 40] * 3, indexing="ij"), -1).reshape(-1, 3)
    points = points[np.random.default_rng(0).permutation(len(points))[:4000]] + [1 / 160, 0, 0]
    points = points[distances(vertices, faces, points) > 1e-9]
    assert len(points) > 3500
    np.testing.assert_array_equal(occupancy(vertices, faces, points), igl.winding_number(vertices, faces, points) > 0.5)


def test_points_nowhere_are_outside() -> None:
    points = np.array([[np.nan, 0, 0], [0, np.nan, 0], [0, 0, np.nan], [np.inf, 0, 0], [0, 0, 1e30], [0, 0, 0]])
    assert occupancy(*sphere(), points).tolist() == [False, False, False, False, False, True]
    assert occupancy(*sphere(), np.zeros((0, 3))).shape == (0,)
