"""Evaluation: a perfect avatar scores perfectly, errors of known size are found, and figures compare across runs."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

import training.__main__ as commands
from model.ins import INS
from service import picture as picture_maker
from service.bundle.glb import Mesh
from service.bundle.skeleton import SMPL_PARENTS, axis_angle_to_matrix
from training import correspondence, report
from training import evaluate as evaluation
from training.correspondence import find_correspondence, material_points
from training.data.body import open_body
from training.data.sampling import sample_frame
from training.data.subject import Scan, Subject, SubjectWriter
from training.data.winding import occupancy
from training.evaluate import FIGURES, FrameScore, evaluate, posed_vertices, score_frame, summary
from training.frames import Frames
from training.metrics import intersection_over_union
from training.report import FULL_SCALE_MM, write_plot, write_sheet, write_tables
from training.stages import State, Surface

RADIUS = 0.4
ELBOW = 18
BALL = trimesh.creation.icosphere(3, RADIUS)
GOLDEN_SURFACE = [[0.8486993, 0.0076879, 0.0142200], [0.7303641, 0.5013649, 0.0783018]]
GOLDEN_BOX = [[0.2887293, 1.7870439, 3.0255673], [0.9986873, 1.3556361, -0.0286938]]
"""First and last of the 20 000 points that the first release drew on a tetrahedron for seed 0 and frame 3."""
MESH = Mesh(np.asarray(BALL.vertices, np.float32), np.asarray(BALL.faces, np.int32))


class Ball(INS):
    """Moves the ball by the shift it was given, and turns it about y by as much as the pose bends the elbow."""

    def __init__(self, turn: float = 0.0, shift: tuple[float, float, float] = (0, 0, 0)) -> None:
        super().__init__(SMPL_PARENTS, pin_layers=2)
        self.turn, self.shift = turn, shift

    def to_deformed(self, x_c, bone_transforms):
        bend = torch.arccos(((bone_transforms[:, ELBOW, :3, :3].diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1))
        angle = self.turn * bend
        zero, one = torch.zeros_like(angle), torch.ones_like(angle)
        rows = [angle.cos(), zero, angle.sin(), zero, one, zero, -angle.sin(), zero, angle.cos()]
        return x_c @ torch.stack(rows, 1).view(-1, 3, 3).mT + torch.tensor(self.shift)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SURFACE_POINTS", "BOX_POINTS", "SCAN_POINTS"):
        monkeypatch.setattr(evaluation, name, 2000)
    monkeypatch.setattr(report, "TILE", (80, 100))
    monkeypatch.setattr(picture_maker, "SHADOW_PIXELS", 64)


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A ball with the pelvis at its centre, which walks and turns while its elbow bends."""
    skeleton = open_body().skeleton
    folder = tmp_path_factory.mktemp("subjects") / "balls"
    writer = SubjectWriter(folder, name="balls", rest_joints=skeleton.rest_joints, fps=30, licence="CC0-1.0")
    bends = {"bent": ("train", [1.0]), "straight": ("train", [0.9, 0.0]), "a": ("test", [0.5, 1.0, 0.2]),
             "b": ("test", [0.7])}  # fmt: skip
    with writer:
        for name, (split, angles) in bends.items():
            pose = np.tile(skeleton.canonical_pose, (len(angles), 1, 1)).astype(np.float32)
            pose[:, ELBOW, 1] = angles
            pose[:, 0, 1] = np.arange(len(angles))
            translation = np.arange(3 * len(angles), dtype=np.float32).reshape(-1, 3)
            writer.add_sequence(name, split, pose, translation)
            roots = skeleton.root_transforms(axis_angle_to_matrix(pose), translation)
            for frame, root in enumerate(roots):
                vertices = MESH.vertices @ root[:3, :3].T + root[:3, 3]
                writer.add_scan(name, frame, Scan(vertices.astype(np.float32), MESH.faces))
    return Subject.open(folder)


def test_a_prediction_equal_to_the_scan_is_perfect(balls: Subject) -> None:
    for score in evaluate(Ball(), MESH, Frames(balls, "test")):
        assert score.iou_surface > 99.9  # the scan was rounded on its way through the world
        assert score.iou_bbox == 100
        assert score.normal_consistency == pytest.approx(1, abs=1e-4)
        for name in FIGURES:
            if name.endswith("_mm"):
                assert getattr(score, name) < 2e-3, name


def test_a_shift_is_found_in_every_distance(balls: Subject) -> None:
    found = summary(evaluate(Ball(shift=(0.008, 0, 0)), MESH, Frames(balls, "test")))
    assert found["point_to_surface_mm"] == pytest.approx(4, rel=0.05)
    assert found["scan_to_model_mm"] == pytest.approx(4, rel=0.05)
    assert found["chamfer_mm"] == pytest.approx(4, rel=0.05)
    # Assigned in a frame that was shifted as well, so what slides is not the shift.
    assert found["correspondence_mm"] < 4.5
    assert 65 < found["iou_surface"] < 80


def test_sliding_along_the_surface_is_seen_by_correspondence_alone(balls: Subject) -> None:
    """Turned by an angle about y, a point at distance r from the axis is 2 r sin(angle / 2) away."""
    frames, turn = Frames(balls, "test"), 0.2
    from_axis = 1000 * np.linalg.norm(MESH.vertices[:, [0, 2]], axis=1).mean()
    for score, bend in zip(evaluate(Ball(turn), MESH, frames), (0.5, 1.0, 0.2, 0.7), strict=True):
        assert score.correspondence_mm == pytest.approx(2 * from_axis * np.sin(turn * bend / 2), rel=0.01)
        assert score.chamfer_mm is not None
        assert score.chamfer_mm < 1.5


def test_vertices_are_assigned_in_the_training_frame_nearest_to_the_canonical_pose(balls: Subject) -> None:
    found = find_correspondence(Ball(0.3), MESH, balls)
    assert found is not None
    assert found.reference == ("straight", 1)


def test_what_is_no_matter_has_no_correspondence(balls: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the ball's lower half nothing is known, so a model that throws it away is not blamed for it here."""

    def upper_half(subject: Subject, sequence: str, frame: int):
        scan = subject.scan(sequence, frame)
        return scan.vertices.astype(float), MESH.faces[(MESH.vertices[MESH.faces][..., 1] >= -1e-6).all(axis=1)]

    class Thrown(Ball):
        def to_deformed(self, x_c, bone_transforms):
            return super().to_deformed(torch.where(x_c[:, 1:2] < -0.02, x_c - 1, x_c), bone_transforms)

    monkeypatch.setattr(correspondence, "material_points", upper_half)
    found = find_correspondence(Ball(), MESH, balls)
    assert found is not None
    np.testing.assert_array_equal(found.known, MESH.vertices[:, 1] > -0.01)
    assert score_frame(Thrown(), MESH, Frames(balls, "test"), 0, matter=found).correspondence_mm < 1e-2


def test_figures_do_not_depend_on_the_order_of_the_frames(balls: Subject) -> None:
    frames, ins = Frames(balls, "test"), Ball(0.3, (0.003, 0.001, 0))
    matter = find_correspondence(ins, MESH, balls)
    backwards = [score_frame(ins, MESH, frames, place, "mesh", matter) for place in reversed(range(len(frames)))]
    assert backwards[::-1] == evaluate(ins, MESH, frames)


def test_iou_is_asked_at_the_protocol_s_points(balls: Subject) -> None:
    frames, ins = Frames(balls, "test"), Ball(shift=(0.01, 0, 0))
    for place in (0, 2):
        samples = frames.samples(place, np.random.default_rng([5, place]), 2000, 2000)
        score, posed = score_frame(ins, MESH, frames, place, seed=5), posed_vertices(ins, MESH, frames, place)
        for points, truth, found in (
            (samples.surface_points, samples.surface_occupancy, score.iou_surface),
            (samples.box_points, samples.box_occupancy, score.iou_bbox),
        ):
            assert found == 100 * intersection_over_union(occupancy(posed, MESH.faces, points), truth)


def test_the_protocol_s_points_are_those_of_the_first_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert (evaluation.SURFACE_POINTS, evaluation.BOX_POINTS) == (20_000, 20_000)
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]], np.float32)
    faces = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]], np.int32)
    samples = sample_frame(Scan(vertices, faces), np.random.default_rng([0, 3]), 20_000, 20_000)
    np.testing.assert_allclose(samples.surface_points[[0, -1]], GOLDEN_SURFACE, atol=1e-6)
    np.testing.assert_allclose(samples.box_points[[0, -1]], GOLDEN_BOX, atol=1e-6)


def test_the_field_has_occupancy_but_no_distances(balls: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def ball(self, x_d, bone_transforms, soft, tolerance):
        return RADIUS - x_d.norm(dim=-1)

    monkeypatch.setattr(Ball, "occupancy_at", ball)
    found = summary(evaluate(Ball(), MESH, Frames(balls, "test"), "field"))
    assert found["iou_bbox"] > 97
    assert found["chamfer_mm"] is found["correspondence_mm"] is None


def test_means_are_of_frames_and_of_sequences(balls: Subject) -> None:
    scores = evaluate(Ball(0.3), MESH, Frames(balls, "test"))
    found = summary(scores)
    assert (found["frames"], found["sequences"]["a"]["frames"], found["sequences"]["b"]["frames"]) == (4, 3, 1)
    for name in FIGURES:
        rows = [getattr(score, name) for score in scores]
        assert found[name] == pytest.approx(np.mean(rows))
        assert found["sequences"]["a"][name] == pytest.approx(np.mean(rows[:3]))
        assert found["sequences"]["b"][name] == rows[3]


def test_a_mean_that_lacks_a_frame_is_not_given() -> None:
    scores = [FrameScore("a", 0, 50, 60, correspondence_mm=3.0), FrameScore("a", 1, 70, 80)]
    assert summary(scores)["iou_surface"] == 60
    assert summary(scores)["correspondence_mm"] is None


@pytest.fixture(scope="module")
def dressed(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The open body in a skin-tight garment 2 cm thick: the scan is the garment."""
    body = open_body()
    folder = tmp_path_factory.mktemp("subjects") / "dressed"
    writer = SubjectWriter(
        folder, name="dressed", rest_joints=body.skeleton.rest_joints, fps=30, licence="CC0-1.0",
        provenance={"source": "demo-data", "garment": "tunic"},
    )  # fmt: skip
    rng = np.random.default_rng(0)
    with writer:
        for name, split in (("still", "train"), ("moved", "test")):
            pose = body.skeleton.canonical_pose[None].astype(np.float32)
            pose = pose + np.float32(0.1) * rng.normal(size=pose.shape).astype(np.float32) * (split == "test")
            translation = np.float32([[1, 2, 3]])
            cloth = garment(body.posed(body.transforms(pose, translation)[0]), body.faces)
            writer.add_sequence(name, split, pose, translation)
            order = rng.permutation(len(cloth))  # scans share no topology
            writer.add_scan(name, 0, Scan(cloth[order].astype(np.float32), np.argsort(order)[body.faces].astype("i4")))
            writer.add_truth(name, {"garment_vertices": (cloth - translation)[None].astype(np.float16)})
        writer.add_truth("garment", {"vertices": body.vertices, "faces": body.faces})
    return Subject.open(folder)


def garment(vertices: np.ndarray, faces: np.ndarray, thickness: float = 0.02) -> np.ndarray:
    return vertices + thickness * trimesh.Trimesh(vertices, faces, process=False).vertex_normals


def test_the_open_subject_s_matter_is_its_body_and_its_garment(dressed: Subject) -> None:
    found = material_points(dressed, "moved", 0)
    assert found is not None
    body, scan = open_body(), dressed.scan("moved", 0)
    poses = dressed.sequence("moved")
    naked = body.posed(body.transforms(poses.pose, poses.translation)[0])
    np.testing.assert_allclose(found[0][: len(naked)], naked)
    # Half precision on a metre: half a millimetre.
    np.testing.assert_allclose(np.sort(found[0][len(naked) :], 0), np.sort(scan.vertices, 0), atol=1e-3)
    np.testing.assert_array_equal(found[1], np.concatenate([body.faces, body.faces + len(naked)]))


def test_a_vertex_under_the_garment_belongs_to_the_garment(dressed: Subject) -> None:
    """A canonical mesh nearer to the body than to the cloth: what was scanned is the cloth."""
    body = open_body()
    canonical = body.posed(body.transforms(body.skeleton.canonical_pose[None], np.zeros((1, 3)))[0])
    chest = np.flatnonzero(body.weights[:, 9] > 0.9)  # where nothing folds over
    mesh = Mesh(garment(canonical, body.faces, 0.005).astype(np.float32), body.faces.astype(np.int32))
    found = find_correspondence(Ball(), mesh, dressed)
    assert found is not None
    strongest = found.material.corners[np.arange(len(canonical)), found.material.weights.argmax(1)]
    assert (strongest[chest] == len(canonical) + chest).mean() > 0.9


def test_scans_of_different_topology_tell_no_correspondence(
    tiny_subject: Subject, dressed: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert material_points(tiny_subject, "walk", 1) is None
    monkeypatch.setitem(dressed.provenance, "source", "scans")  # as many vertices, numbered otherwise
    assert material_points(dressed, "moved", 0) is None


def test_tables_hold_every_frame(balls: Subject, tmp_path: Path) -> None:
    scores = evaluate(Ball(0.3), MESH, Frames(balls, "test"))
    write_tables(tmp_path, {"subject": "balls"}, {"mesh": scores})
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["mesh"]["per_frame"] == [asdict(score) for score in scores]
    assert {key: written["mesh"][key] for key in summary(scores)} == summary(scores)
    with (tmp_path / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["through"], row["sequence"], int(row["frame"])) for row in rows] == [
        ("mesh", "a", 0), ("mesh", "a", 1), ("mesh", "a", 2), ("mesh", "b", 0)
    ]  # fmt: skip
    assert [float(row["correspondence_mm"]) for row in rows] == [score.correspondence_mm for score in scores]


def test_the_sheet_shows_the_error_in_its_colours(balls: Subject, tmp_path: Path) -> None:
    frames = Frames(balls, "test")
    reddish = []
    for shift in (0.0, 3 * FULL_SCALE_MM / 1000):
        ins = Ball(shift=(shift, 0, 0))
        scores = evaluate(ins, MESH, frames)
        write_sheet(tmp_path, ins, MESH, frames, scores)
        write_plot(tmp_path, {"mesh": scores})
        with Image.open(tmp_path / "evaluation-sheet.png") as file:
            picture = np.asarray(file).astype(int)
        reddish.append((picture[..., 0] > picture[..., 2] + 60)[:-60].mean())
    assert reddish[0] == 0
    assert reddish[1] > 0.02
    with Image.open(tmp_path / "evaluation.png") as file:
        assert file.size[0] > 300


@pytest.mark.parametrize("kind", ["run", "bundle"])
def test_evaluate_writes_into_a_run_and_leaves_a_bundle_as_it_is(
    kind: str, balls: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = State(Ball(), Surface(torch.from_numpy(MESH.vertices), torch.from_numpy(MESH.faces)))
    monkeypatch.setattr(commands, "_trained", lambda run, subject: (state, balls, {"seconds": 1.0}))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "me"
    folder.mkdir()
    if kind == "bundle":
        (folder / "avatar.json").touch()
    assert commands.main(["evaluate", str(folder), "--lod", "preview"]) == 0
    written = {path.name for path in (folder if kind == "run" else Path("out/evaluation/me")).iterdir()}
    assert written == {"evaluation.json", "evaluation.csv", "evaluation.png", "evaluation-sheet.png"}
    assert kind == "run" or [path.name for path in folder.iterdir()] == ["avatar.json"]
