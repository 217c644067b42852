"""The open subject: body, tunic, cloth, scans, and the whole of it in small."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from scipy import sparse

from service.bundle.skeleton import axis_angle_to_matrix
from training.data.body import open_body, skin
from training.data.cloth import Cloth
from training.data.demo_subject import (
    EYES,
    HAIR,
    LEGGINGS,
    LICENCE,
    SHOES,
    SKIN,
    VEST,
    body_colours,
    make_open_subject,
)
from training.data.garment import TRIM, WEAVE, Garment, make_tunic, surface_nets, tunic_colours
from training.data.mesh import (
    boundary_loops,
    compact,
    component_count,
    directed_edges,
    distances,
    edges_of,
    is_closed,
    largest_component,
    volume,
    winding_numbers,
)
from training.data.motion import make_motions
from training.data.open_body import fill_cavities
from training.data.scan import Layer, Quality, painted, quality_of, scan_of
from training.data.subject import SubjectError

BODY = open_body()
COARSE_M = 0.016


@pytest.fixture(scope="module")
def tunic() -> Garment:
    return make_tunic(BODY, spacing=0.03)


def ball(radius: float, *, at=(0.0, 0, 0)) -> tuple[np.ndarray, np.ndarray]:
    mesh = trimesh.creation.icosphere(subdivisions=3, radius=radius)
    return np.asarray(mesh.vertices) + at, np.asarray(mesh.faces)


def test_the_body_is_one_closed_solid_with_weights() -> None:
    assert is_closed(BODY.faces)
    assert component_count(len(BODY.vertices), BODY.faces)[0] == 1
    assert 0.055 < volume(BODY.vertices, BODY.faces) < 0.075
    np.testing.assert_allclose(BODY.weights.sum(1), 1, atol=1e-9)
    joints = BODY.skeleton.rest_joints
    assert (winding_numbers(BODY.vertices, BODY.faces, joints) > 0.5).all()


def test_the_body_follows_its_skeleton() -> None:
    rng = np.random.default_rng(0)
    pose, translation = rng.normal(0, 0.3, (1, 24, 3)), rng.normal(0, 1, (1, 3))
    posed = BODY.posed(BODY.transforms(pose, translation)[0])
    rotations = axis_angle_to_matrix(pose)
    canonical = BODY.skeleton._rest_to_posed(axis_angle_to_matrix(BODY.skeleton.canonical_pose[None]))[0]
    x_c = np.einsum("nj,jab,nb->na", BODY.weights, canonical, np.c_[BODY.vertices, np.ones(len(BODY.vertices))])
    rigid = BODY.weights.max(1) > 0.999  # LBS through the canonical pose is exact where a single bone counts
    bones = BODY.skeleton.bone_transforms(rotations)[0].astype(np.float64)
    x_d = np.einsum("nj,jab,nb->na", BODY.weights, bones, x_c)
    root = BODY.skeleton.root_transforms(rotations, translation)[0].astype(np.float64)
    world = x_d[:, :3] @ root[:3, :3].T + root[:3, 3]
    np.testing.assert_allclose(posed[rigid], world[rigid], atol=1e-5)
    assert rigid.sum() > 1000


def test_filling_flattens_a_hollow_and_leaves_the_rest() -> None:
    vertices, faces = ball(1.0)
    dented = vertices.copy()
    top = vertices[:, 1] > 0.9
    dented[vertices[:, 1] > 0.95, 1] -= 1.2  # a deep, narrow pit
    filled = fill_cavities(dented, faces, np.ones(len(vertices), bool), limit=0.8)
    np.testing.assert_array_equal(filled[vertices[:, 1] < 0.5], dented[vertices[:, 1] < 0.5])
    assert dented[top][:, 1].min() < 0
    assert filled[top][:, 1].min() > 0.6
    untouched = fill_cavities(dented, faces, np.zeros(len(vertices), bool), limit=0.8)
    np.testing.assert_array_equal(untouched, dented)


def test_surface_nets_of_a_ball() -> None:
    grid = np.stack(np.meshgrid(*[np.linspace(-1.2, 1.2, 25)] * 3, indexing="ij"), -1)
    vertices, faces = surface_nets(np.linalg.norm(grid, axis=-1) - 1, np.full(3, -1.2), 0.1)
    assert is_closed(faces)
    assert volume(vertices, faces) == pytest.approx(4 / 3 * np.pi, rel=0.02)  # positive: faces look outwards
    np.testing.assert_allclose(np.linalg.norm(vertices, axis=1), 1, atol=0.02)


def test_the_tunic_is_a_sheet_with_four_openings_outside_the_body(tunic: Garment) -> None:
    edges = np.sort(directed_edges(tunic.faces), axis=1)
    assert np.unique(edges, axis=0, return_counts=True)[1].max() == 2  # manifold at edges
    directed = directed_edges(tunic.faces)
    assert len(np.unique(directed, axis=0)) == len(directed)  # and oriented
    assert len(boundary_loops(tunic.faces)) == 4
    assert component_count(len(tunic.vertices), tunic.faces)[0] == 1
    assert len(tunic.vertices) - len(edges_of(tunic.faces)) + len(tunic.faces) == -2
    assert (winding_numbers(BODY.vertices, BODY.faces, tunic.vertices) < 0.5).all()
    assert distances(BODY.vertices, BODY.faces, tunic.vertices).min() > 0.01
    ends = tunic.vertices[edges_of(tunic.faces)]
    assert np.linalg.norm(ends[:, 0] - ends[:, 1], axis=1).max() < 2.5 * 0.03
    centre = np.array([[0.0, 0.2, 0.0]])
    assert winding_numbers(tunic.vertices, tunic.faces, centre) > 0.5  # faces look outwards
    assert len(tunic.vertices) == pytest.approx(1640, rel=0.1)  # nothing is left beyond the cuts
    assert 20 < tunic.pinned.sum() < 200
    assert (np.abs(tunic.vertices[tunic.pinned, 0]) < 0.13).all()
    np.testing.assert_allclose(tunic.weights.sum(1), 1, atol=1e-9)


def test_a_tunic_too_coarse_to_cut_is_refused() -> None:
    with pytest.raises(SubjectError, match="expected a sheet with 4 openings"):
        make_tunic(BODY, spacing=0.08)


@pytest.fixture(scope="module")
def squat() -> tuple[np.ndarray, np.ndarray]:
    """A deep pose (24, 3) and its translation (3,)."""
    (motion,) = make_motions(BODY.skeleton, frames=5, names=("squat",))
    return motion.pose[3], motion.translation[3]


def posed_body(pose: np.ndarray, translation: np.ndarray) -> np.ndarray:
    return BODY.posed(BODY.transforms(pose[None], translation[None])[0])


def test_the_cloth_hangs_on_the_body(tunic: Garment, squat: tuple[np.ndarray, np.ndarray]) -> None:
    cloth = Cloth(tunic, BODY)
    worn = cloth.dress(*squat)
    stretch = cloth.stretch(worn)
    assert np.median(stretch) == pytest.approx(1, abs=0.02)
    assert np.percentile(stretch, 99) < 1.3
    assert (winding_numbers(posed_body(*squat), BODY.faces, worn) > 0.5).mean() < 0.01
    # It hangs from the shoulders: the neck is where the skeleton carries it, the hem has not slid to the floor.
    transforms = BODY.transforms(squat[0][None], squat[1][None])[0]
    neck = skin(tunic.vertices, sparse.csr_array(tunic.weights), transforms)
    assert np.linalg.norm(worn - neck, axis=1)[tunic.pinned].max() < 0.03
    assert worn[:, 1].min() > 0.3


def test_the_cloth_forgets_what_was_before(tunic: Garment, squat: tuple[np.ndarray, np.ndarray]) -> None:
    used = Cloth(tunic, BODY)
    used.dress(0.5 * squat[0], squat[1], steps=8)
    np.testing.assert_array_equal(used.dress(*squat, steps=8), Cloth(tunic, BODY).dress(*squat, steps=8))


def test_the_cloth_falls(tunic: Garment) -> None:
    worn = Cloth(tunic, BODY).dress(np.zeros((24, 3)), np.array([0.0, 1, 0]), steps=4)
    assert (worn - tunic.vertices - [0, 1, 0])[:, 1].mean() < -0.001


def test_a_scan_is_the_union_of_body_and_cloth(tunic: Garment) -> None:
    body, cloth = (BODY.vertices, BODY.faces), (tunic.vertices, tunic.faces)
    scan = scan_of(body, cloth, COARSE_M)
    quality = quality_of(scan, body, tunic.vertices, np.ones(3))
    assert quality.closed
    assert quality.components == 1
    assert volume(BODY.vertices, BODY.faces) < quality.volume_m3 < 0.13
    points = np.random.default_rng(0).uniform(BODY.vertices.min(0) - 0.05, BODY.vertices.max(0) + 0.05, (20_000, 3))
    expected = (winding_numbers(*body, points) > 0.5) | (winding_numbers(*cloth, points) > 0.5)
    got = winding_numbers(scan.vertices, scan.faces, points) > 0.5
    away = distances(scan.vertices, scan.faces, points) > COARSE_M / 2
    assert (got == expected)[away].mean() > 0.999


def test_a_scan_of_a_ball_is_a_ball() -> None:
    scan = scan_of(ball(0.2), None, 0.01)
    assert is_closed(scan.faces)
    np.testing.assert_allclose(np.linalg.norm(scan.vertices, axis=1), 0.2, atol=0.002)
    assert volume(scan.vertices, scan.faces) == pytest.approx(4 / 3 * np.pi * 0.2**3, rel=0.03)


def test_a_scan_keeps_the_largest_part() -> None:
    (big, faces), (small, small_faces) = ball(0.2), ball(0.05, at=(0.5, 0, 0))
    body = (np.concatenate([big, small]), np.concatenate([faces, small_faces + len(big)]))
    scan = scan_of(body, None, 0.01)
    assert component_count(len(scan.vertices), scan.faces)[0] == 1
    assert scan.vertices[:, 0].max() < 0.21


def test_overlapping_limbs_leave_no_surface_inside() -> None:
    (first, faces), (second, _) = ball(0.2), ball(0.2, at=(0.15, 0, 0))
    body = (np.concatenate([first, second]), np.concatenate([faces, faces + len(first)]))
    scan = scan_of(body, None, 0.01)
    deep = np.minimum(np.linalg.norm(scan.vertices, axis=1), np.linalg.norm(scan.vertices - [0.15, 0, 0], axis=1))
    assert deep.min() > 0.19


def test_a_scan_is_painted_like_what_it_lies_on() -> None:
    (first, faces), (second, _) = ball(0.2), ball(0.2, at=(0.25, 0, 0))
    scan = scan_of((np.concatenate([first, second]), np.concatenate([faces, faces + len(first)])), None, 0.01)

    def halves(points: np.ndarray) -> np.ndarray:
        return np.where(points[:, 2:] > 0, [255, 0, 0], [0, 0, 255]).astype(np.uint8)

    def green(points: np.ndarray) -> np.ndarray:
        return np.tile(np.array([0, 255, 0], np.uint8), (len(points), 1))

    turned = first @ np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])  # at rest its z is what x was when scanned
    colours = painted(scan, [Layer((first, faces), turned, halves), Layer((second, faces), second, green)]).colours
    assert colours is not None
    x = scan.vertices[:, 0]
    clear = (np.abs(x) > 0.01) & (np.abs(x - 0.125) > 0.01)
    expected = np.where(x[:, None] > 0.125, [0, 255, 0], np.where(x[:, None] > 0, [255, 0, 0], [0, 0, 255]))
    np.testing.assert_array_equal(colours[clear], expected[clear])


def test_the_tunic_shows_bands_and_checks_wide_enough_for_a_scan(tunic: Garment) -> None:
    colours = tunic_colours(tunic, BODY, tunic.vertices)
    np.testing.assert_array_equal(colours[boundary_loops(tunic.faces)[0]], [TRIM] * len(boundary_loops(tunic.faces)[0]))
    shares = [(colours == colour).all(1).mean() for colour in (TRIM, *WEAVE)]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0.05
    # A step of 8 mm seldom crosses from one colour to the next.
    step = np.random.default_rng(0).normal(size=tunic.vertices.shape)
    step *= 0.008 / np.linalg.norm(step, axis=1, keepdims=True)
    assert (tunic_colours(tunic, BODY, tunic.vertices + step) == colours).all(1).mean() > 0.8


def test_the_body_is_dressed_and_has_a_face() -> None:
    joints = BODY.skeleton.rest_joints

    def at(x: float, y: float, z: float) -> tuple[int, ...]:
        """Colour of the body vertex nearest to a place."""
        nearest = BODY.vertices[[np.linalg.norm(BODY.vertices - [x, y, z], axis=1).argmin()]]
        return tuple(int(value) for value in body_colours(joints, nearest)[0])

    head = joints[15]
    assert at(0, head[1] + 0.2, head[2]) == HAIR
    assert at(0, head[1], head[2] - 0.2) == HAIR
    assert at(0.032, head[1] + 0.037, head[2] + 0.1) == EYES
    assert at(0.06, head[1], 0.2) == at(*joints[20]) == at(*joints[12]) == SKIN
    assert at(*joints[3]) == VEST
    assert at(*joints[4]) == LEGGINGS
    assert at(*joints[10]) == SHOES


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"closed": False}, "not watertight"),
        ({"components": 2}, "2 components"),
        ({"volume_m3": 0.2}, "volume"),
        ({"volume_m3": -0.08}, "volume"),
        ({"stretch_p99": 1.5}, "stretch"),
        ({"stretch_p99": np.nan}, "stretch"),
        ({"cloth_inside_share": 0.02}, "2.0% of the cloth"),
    ],
)
def test_an_unfit_frame_is_named(change: dict, fault: str | None) -> None:
    good = {"closed": True, "components": 1, "volume_m3": 0.08, "stretch_p99": 1.1, "cloth_inside_share": 0.0}
    faults = Quality(**(good | change)).faults()
    assert len(faults) == (fault is not None)
    assert fault is None or fault in faults[0]


def test_mesh_questions() -> None:
    vertices, faces = ball(1.0)
    two = (np.concatenate([vertices, vertices[:12] + 5]), np.concatenate([faces, [[642, 643, 644]]]))
    assert component_count(len(vertices), faces)[0] == 1
    kept, kept_faces = largest_component(*two)
    np.testing.assert_array_equal(kept, vertices)
    np.testing.assert_array_equal(kept_faces, faces)
    assert is_closed(faces)
    assert not is_closed(faces[1:])
    assert not is_closed(np.concatenate([faces, faces[:1]]))
    assert boundary_loops(faces) == []
    (loop,) = boundary_loops(faces[1:])
    assert set(loop) == set(faces[0])
    used, renumbered = compact(vertices, faces[:1])
    np.testing.assert_array_equal(used[renumbered], vertices[faces[:1]])


def small(out: Path, **options):
    defaults = {"frames_per_sequence": 2, "workers": 1, "spacing": 0.03, "names": ("walk", "dance"), "progress": False}
    return make_open_subject(out, **(defaults | options))


def test_a_small_subject_without_garment(tmp_path: Path) -> None:
    subject = small(tmp_path / "open", garment="none")
    assert subject.frames("train") == [("walk", 0), ("walk", 1)]
    assert subject.frames("test") == [("dance", 0), ("dance", 1)]
    assert subject.licence == LICENCE
    assert subject.name == "open-body"
    assert subject.provenance["frames_dropped"] == 0
    # The scans are where the poses say: every vertex lies on the posed body.
    for name, frame in [*subject.frames("train"), *subject.frames("test")]:
        sequence, scan = subject.sequence(name), subject.scan(name, frame)
        assert is_closed(scan.faces)
        transforms = BODY.transforms(sequence.pose[[frame]], sequence.translation[[frame]])[0]
        assert np.percentile(distances(BODY.posed(transforms), BODY.faces, scan.vertices), 95) < 0.01
        colours = scan.colours
        assert colours is not None
        assert {SKIN, HAIR, VEST, LEGGINGS, SHOES} <= {tuple(colour) for colour in colours.tolist()}
    assert subject.truth("walk") is None


def test_a_small_subject_in_a_tunic(tmp_path: Path) -> None:
    subject = small(tmp_path / "open", names=("twist",), frames_per_sequence=1, cloth_spacing=0.03)
    sequence, scan = subject.sequence("twist"), subject.scan("twist", 0)
    assert subject.name == "open"
    assert 0.07 < volume(scan.vertices, scan.faces) < 0.1
    truth, sheet = subject.truth("twist"), subject.truth("garment")
    assert truth is not None
    assert sheet is not None
    worn = truth["garment_vertices"][0].astype(np.float64) + sequence.translation[0]
    assert worn.shape == sheet["vertices"].shape
    assert np.median(distances(scan.vertices, scan.faces, worn)) < 0.01
    assert scan.colours is not None
    on_body = distances(posed_body(sequence.pose[0], sequence.translation[0]), BODY.faces, scan.vertices) < 1e-4
    woven = (scan.colours[:, None] == np.array([TRIM, *WEAVE])).all(2).any(1)
    on_cloth = distances(worn, sheet["faces"], scan.vertices) < 1e-3  # truth is rounded to half a millimetre
    assert woven[on_cloth].mean() > 0.99
    assert woven[on_body & ~on_cloth].mean() < 0.02


def test_an_unfit_frame_is_left_out_with_its_pose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def first_is_unfit(*args: object) -> Quality:
        calls.append(args)
        return Quality(len(calls) > 1, 1, 0.06, 1.0, 0.0)

    monkeypatch.setattr("training.data.demo_subject.MAX_DROPPED_SHARE", 0.5)
    monkeypatch.setattr("training.data.demo_subject.quality_of", first_is_unfit)
    subject = small(tmp_path / "open", garment="none", names=("walk",), frames_per_sequence=3)
    (motion,) = make_motions(BODY.skeleton, frames=3, names=("walk",))
    sequence = subject.sequence("walk")
    assert subject.provenance["frames_dropped"] == 1
    assert subject.provenance["faults"] == {"walk": ["frame 0: not watertight"]}
    np.testing.assert_array_equal(sequence.frame_ids, [1, 2])
    np.testing.assert_allclose(sequence.pose, motion.pose[1:], atol=1e-6)
    for frame in range(2):
        transforms = BODY.transforms(sequence.pose[[frame]], sequence.translation[[frame]])[0]
        found = distances(BODY.posed(transforms), BODY.faces, subject.scan("walk", frame).vertices)
        assert np.percentile(found, 95) < 0.01


def test_two_processes_make_the_same_subject(tmp_path: Path) -> None:
    alone, together = (small(tmp_path / str(n), garment="none", workers=n) for n in (1, 2))
    for name, frame in [*alone.frames("train"), *alone.frames("test")]:
        np.testing.assert_array_equal(alone.scan(name, frame).vertices, together.scan(name, frame).vertices)
        np.testing.assert_array_equal(alone.sequence(name).pose, together.sequence(name).pose)


def test_too_many_unfit_frames_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.demo_subject.BODY_VOLUME_M3", (1.0, 2.0))
    with pytest.raises(SubjectError, match="at most 10% of 4 frames unfit, got 4"):
        small(tmp_path / "open", garment="none")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"garment": "kilt"}, "got 'kilt'"),
        ({"names": ("walk", "fly")}, "got fly"),
        ({"frames_per_sequence": 0}, "at least one frame a sequence, got 0"),
    ],
)
def test_wrong_wishes_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(SubjectError, match=message):
        small(tmp_path / "open", **options)


def test_the_data_half_of_training_needs_no_torch() -> None:
    modules = "demo_subject, importers, sampling, open_body"
    code = f"import sys; from training.data import {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
