"""Labels and distances of scans, against shapes whose inside is known and against exact distances."""

import igl
import numpy as np
import pytest
import trimesh

from service.bundle.skeleton import axis_angle_to_matrix
from training.data.band import banded_distances
from training.data.body import open_body
from training.data.sampling import (
    BOX_SCALE,
    SURFACE_NOISE_M,
    build_distance_field,
    occupancy,
    sample_frame,
    surface_points,
    to_root_frame,
)
from training.data.subject import Scan

RADIUS_M = 0.3


def sphere(*, opening: bool = False, centre=(0.0, 0.0, 0.0)) -> Scan:
    mesh = trimesh.creation.icosphere(subdivisions=4, radius=RADIUS_M)
    faces = np.asarray(mesh.faces)
    if opening:  # a cap of 20 degrees around +y is missing
        top = np.asarray(mesh.triangles_center)[:, 1] > RADIUS_M * np.cos(np.radians(20))
        faces = faces[~top]
    return Scan((np.asarray(mesh.vertices) + centre).astype(np.float32), faces.astype(np.int32))


def test_labels_of_a_closed_scan_are_its_inside() -> None:
    scan = sphere()
    points = np.random.default_rng(0).uniform(-0.4, 0.4, (5000, 3))
    distance = np.linalg.norm(points, axis=1) - RADIUS_M
    sure = np.abs(distance) > 0.002  # the facets lie a millimetre inside the sphere
    np.testing.assert_array_equal(occupancy(scan.vertices, scan.faces, points)[sure], distance[sure] < 0)


def test_labels_of_a_scan_with_a_hole_are_those_of_the_whole() -> None:
    scan = sphere(opening=True)
    points = np.random.default_rng(0).uniform(-0.4, 0.4, (5000, 3))
    distance = np.linalg.norm(points, axis=1) - RADIUS_M
    away_from_hole = points[:, 1] < RADIUS_M * np.cos(np.radians(35))
    sure = (np.abs(distance) > 0.003) & away_from_hole
    labels = occupancy(scan.vertices, scan.faces, points)
    np.testing.assert_array_equal(labels[sure], distance[sure] < 0)
    # Under the opening the inside goes on, and it ends near the missing cap.
    axis = np.array([[0.0, height * RADIUS_M, 0.0] for height in (0.0, 0.5, 0.8, 1.2)])
    np.testing.assert_array_equal(occupancy(scan.vertices, scan.faces, axis), [True, True, True, False])


def test_labels_of_overlapping_parts_are_those_of_their_union() -> None:
    first, second = sphere(), sphere(centre=(0.2, 0, 0))
    vertices = np.concatenate([first.vertices, second.vertices])
    faces = np.concatenate([first.faces, second.faces + len(first.vertices)])
    assert occupancy(vertices, faces, np.array([[0.1, 0, 0], [-0.25, 0, 0], [0.45, 0, 0]])).all()


def test_surface_points_are_uniform_by_area() -> None:
    vertices = np.array([[0, 0, 0], [3, 0, 0], [0, 1, 0], [0, 0, 1.0]])
    faces = np.array([[0, 1, 2], [0, 2, 3]])  # areas 1.5 and 0.5
    points = surface_points(vertices, faces, 40_000, np.random.default_rng(1))
    on_first = points[:, 2] < 1e-12
    assert on_first.mean() == pytest.approx(0.75, abs=0.001)
    np.testing.assert_allclose(points[on_first].mean(0), [1, 1 / 3, 0], atol=0.02)  # the triangle's centroid
    assert (points[on_first][:, 0] / 3 + points[on_first][:, 1] <= 1 + 1e-12).all()


def test_samples_are_what_the_paper_draws() -> None:
    scan = sphere(centre=(1.0, 2.0, 3.0))
    samples = sample_frame(scan, np.random.default_rng(0), 20_000, 10_000)
    assert samples.surface_points.shape == (20_000, 3)
    assert samples.box_points.shape == (10_000, 3)
    off = np.linalg.norm(samples.surface_points - [1, 2, 3], axis=1) - RADIUS_M
    assert off.std() == pytest.approx(SURFACE_NOISE_M, rel=0.05)
    half = BOX_SCALE * RADIUS_M
    assert np.abs(samples.box_points - [1, 2, 3]).max() <= half + 1e-6
    np.testing.assert_allclose(samples.box_points.std(0), half / np.sqrt(3), rtol=0.03)
    for points, labels in (
        (samples.surface_points, samples.surface_occupancy), (samples.box_points, samples.box_occupancy),
    ):  # fmt: skip
        np.testing.assert_array_equal(labels, occupancy(scan.vertices, scan.faces, points))
    again = sample_frame(scan, np.random.default_rng(0), 20_000, 10_000)
    np.testing.assert_array_equal(again.surface_points, samples.surface_points)


def test_surface_points_take_turns_with_the_deviations() -> None:
    scan = sphere()
    deviations = (0.002, 0.01, 0.0)
    samples = sample_frame(scan, np.random.default_rng(0), 30_000, 0, deviations)
    off = np.linalg.norm(samples.surface_points, axis=1) - RADIUS_M
    for turn, deviation in enumerate(deviations):
        assert off[turn::3].std() == pytest.approx(deviation, rel=0.1, abs=0.001)
        heights = samples.surface_points[turn::3, 1] / RADIUS_M
        assert heights.std() == pytest.approx(1 / np.sqrt(3), rel=0.03)  # each spread over the whole sphere


@pytest.mark.parametrize(("surface", "box"), [(0, 5), (5, 0)])
def test_either_kind_of_samples_may_be_left_out(surface: int, box: int) -> None:
    samples = sample_frame(sphere(), np.random.default_rng(0), surface, box)
    assert (len(samples.surface_points), len(samples.box_occupancy)) == (surface, box)


def test_distances_agree_with_the_exact_ones() -> None:
    body = open_body()
    field = build_distance_field(body.vertices, body.faces)
    rng = np.random.default_rng(0)
    points = surface_points(body.vertices, body.faces, 20_000, rng) + 0.015 * rng.standard_normal((20_000, 3))
    exact = np.sqrt(igl.point_mesh_squared_distance(points, body.vertices, body.faces)[0])
    exact = np.where(occupancy(body.vertices, body.faces, points), -exact, exact)
    inside_band = np.abs(exact) < field.band - field.spacing * np.sqrt(3)
    assert inside_band.mean() > 0.8
    error = np.abs(field.sample(points) - exact)[inside_band]
    assert error.mean() < 5e-4
    assert field.values.dtype == np.float16

    # At the nodes themselves there is nothing to interpolate: all of them, in the band and outside.
    index = np.argwhere(np.ones(field.values.shape, bool))[::37]
    nodes = field.origin + field.spacing * index
    exact = np.sqrt(igl.point_mesh_squared_distance(nodes, body.vertices, body.faces)[0])
    exact = np.where(occupancy(body.vertices, body.faces, nodes), -exact, exact).clip(-field.band, field.band)
    np.testing.assert_allclose(field.values[tuple(index.T)].astype(float), exact, rtol=0, atol=3e-5)  # float16


def test_distances_far_from_the_surface_are_clamped_with_their_sign() -> None:
    scan = sphere()
    field = build_distance_field(scan.vertices, scan.faces, spacing=0.02, band=0.05)
    np.testing.assert_allclose(
        field.sample(np.array([[0.0, 0, 0], [0.34, 0.34, 0], [5, 5, 5]])), [-0.05, 0.05, 0.05], atol=1e-4
    )
    assert np.abs(field.values.astype(float)).max() <= 0.05 + 1e-4


def test_distances_of_a_scan_with_a_hole_keep_their_sign() -> None:
    scan = sphere(opening=True)
    field = build_distance_field(scan.vertices, scan.faces, spacing=0.02)
    points = np.array([[0, 0, 0], [0, -0.28, 0], [0, -0.32, 0], [0.32, 0, 0], [0, 0.2, 0], [0, 0.36, 0]])
    np.testing.assert_array_equal(field.sample(points) < 0, [True, True, False, False, True, False])


@pytest.mark.parametrize("triangles_per_side", [1, 40])
def test_large_faces_are_not_overlooked(triangles_per_side: int) -> None:
    box = trimesh.creation.box((1.0, 0.6, 0.4))
    for _ in range(0 if triangles_per_side == 1 else 3):
        box = box.subdivide()
    field = build_distance_field(np.asarray(box.vertices), np.asarray(box.faces), spacing=0.02)
    points = np.array([[0.03, 0.02, 0.19], [0.03, 0.02, 0.21], [0.48, 0.1, 0.0], [0.2, 0.3, 0.1]])
    np.testing.assert_allclose(field.sample(points), [-0.01, 0.01, -0.02, 0.0], atol=1e-4)


def test_distances_to_triangles_without_area_are_those_to_their_edges() -> None:
    vertices = np.array([[0, 0, 0], [0.1, 0, 0], [0.2, 0, 0], [0.05, 0.05, 0.05]])
    distance = banded_distances(vertices, np.array([[0, 1, 2], [3, 3, 3]]), np.zeros(3), 0.05, (5, 2, 2), 0.08)
    nodes = 0.05 * np.stack(np.meshgrid(np.arange(5), np.arange(2), np.arange(2), indexing="ij"), -1)
    to_edge = np.linalg.norm(nodes - nodes * [1, 0, 0], axis=-1)
    to_point = np.linalg.norm(nodes - 0.05, axis=-1)
    np.testing.assert_allclose(distance, np.minimum(np.minimum(to_edge, to_point), 0.08), atol=1e-7)


def test_the_root_frame_undoes_root_motion() -> None:
    body = open_body()
    rng = np.random.default_rng(3)
    pose, translation = rng.normal(0, 0.4, (2, 24, 3)), rng.normal(0, 1, (2, 3))
    pose[1, 1:], pose[0, 0], translation[0] = pose[0, 1:], 0, 0  # the same pose with and without root motion
    plain, moved = (body.posed(transforms) for transforms in body.transforms(pose, translation))
    root = body.skeleton.root_transforms(axis_angle_to_matrix(pose), translation)
    np.testing.assert_allclose(to_root_frame(moved, root[1]), plain, atol=1e-6)
