"""Importers: every accepted layout arrives as the same y-up, metric subject; others are refused with a reason."""

from pathlib import Path

import numpy as np
import pytest
import trimesh
from scipy.spatial.transform import Rotation

from service.bundle.skeleton import axis_angle_to_matrix
from training.data.body import open_body
from training.data.importers import CAPTURE_SEQUENCES, Z_UP_TO_Y_UP, import_capture, import_scans
from training.data.subject import SubjectError

BODY = open_body()
OFFSET = np.array([0.0, 0.3, 0.1])
"""Moves everything, so that the pelvis is not at the origin."""
FRAMES = 3


def poses(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    pose = rng.normal(0, 0.2, (FRAMES, 24, 3))
    pose[:, 22:] = 0
    return pose, rng.normal(0, 1, (FRAMES, 3))


def posed_joints(pose: np.ndarray, translation: np.ndarray) -> np.ndarray:
    transforms = BODY.transforms(pose, translation)
    joints = BODY.skeleton.rest_joints
    return np.einsum("fjab,jb->fja", transforms[..., :3, :3], joints) + transforms[..., :3, 3]


def scan_around(points: np.ndarray) -> trimesh.Trimesh:
    """A mesh whose vertices are the joints themselves, so that any mistake in frame or units shows."""
    faces = np.array([[i, (i + 1) % 24, (i + 2) % 24] for i in range(24)])
    return trimesh.Trimesh(points, faces, process=False)


def write_folder(
    folder: Path, *, keys=("poses", "trans", "mocap_framerate"), suffix=".ply", up_axis="y", units="m", width=72
) -> None:
    folder.mkdir()
    scale = {"m": 1.0, "cm": 100.0}[units]
    world = Z_UP_TO_Y_UP.T if up_axis == "z" else np.eye(3)  # from the y-up world into the file's
    rest = BODY.skeleton.rest_joints.astype(np.float64) + OFFSET
    np.save(folder / "rest_joints.npy", rest * scale)
    for seed, name in enumerate(("walk", "dance")):
        pose, translation = poses(seed)
        joints = posed_joints(pose, translation) + OFFSET
        root = Rotation.from_matrix(world @ axis_angle_to_matrix(pose[:, 0])).as_rotvec()
        file_pose = np.concatenate([root[:, None], pose[:, 1:]], 1).reshape(FRAMES, 72)
        file_translation = (rest[0] + translation) @ world.T - rest[0]
        wide = np.zeros((FRAMES, width))
        wide[:, :72] = file_pose
        if width > 72:
            wide[:, 66:] = 0.5  # fingers, which must not arrive as hands
        np.savez(
            folder / f"{name}.npz",
            **{keys[0]: wide, keys[1]: file_translation * scale, keys[2]: np.array(30.0), "gender": np.array("male")},
        )
        (folder / name).mkdir()
        for frame in range(FRAMES):
            scan_around(joints[frame] @ world.T * scale).export(folder / name / f"{name}_{frame:04d}{suffix}")


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"keys": ("pose", "transl", "fps"), "suffix": ".obj"},
        {"up_axis": "z"},
        {"up_axis": "z", "units": "cm", "suffix": ".obj"},
        {"width": 156},
    ],
)
def test_every_layout_arrives_as_the_same_subject(tmp_path: Path, layout: dict) -> None:
    write_folder(tmp_path / "scans", **layout)
    units = {key: layout[key] for key in ("up_axis", "units") if key in layout}
    subject = import_scans(tmp_path / "scans", tmp_path / "out", test=["dance"], progress=False, **units)

    assert subject.frames("train") == [("walk", frame) for frame in range(FRAMES)]
    assert subject.frames("test") == [("dance", frame) for frame in range(FRAMES)]
    assert subject.fps == 30
    assert subject.provenance["applied"] == {"up_axis": "y", "units": "m"} | units
    np.testing.assert_allclose(subject.skeleton.rest_joints, BODY.skeleton.rest_joints + OFFSET, atol=1e-5)
    for seed, name in enumerate(("walk", "dance")):
        pose, translation = poses(seed)
        sequence = subject.sequence(name)
        np.testing.assert_allclose(sequence.translation, translation, atol=1e-5)
        np.testing.assert_allclose(sequence.rotations(), axis_angle_to_matrix(pose), atol=1e-5)
        joints = posed_joints(pose, translation) + OFFSET
        for frame in range(FRAMES):
            np.testing.assert_allclose(subject.scan(name, frame).vertices, joints[frame], atol=2e-5)
        # What was imported fits together: the scans are where the poses put the skeleton.
        rest_to_posed = subject.skeleton._rest_to_posed(sequence.rotations())
        own = np.einsum("fjab,jb->fja", rest_to_posed[..., :3, :3], subject.skeleton.rest_joints)
        own = own + rest_to_posed[..., :3, 3] + sequence.translation[:, None]
        np.testing.assert_allclose(own[0], subject.scan(name, 0).vertices, atol=5e-5)


def test_a_sequence_may_have_scans_for_some_frames_only(tmp_path: Path) -> None:
    write_folder(tmp_path / "scans")
    (tmp_path / "scans/walk/walk_0001.ply").unlink()
    subject = import_scans(tmp_path / "scans", tmp_path / "out", progress=False)
    sequence = subject.sequence("walk")
    np.testing.assert_array_equal(sequence.frame_ids, [0, 2])
    np.testing.assert_allclose(sequence.pose, poses(0)[0][[0, 2]], atol=1e-6)


def test_colours_are_kept(tmp_path: Path) -> None:
    write_folder(tmp_path / "scans")
    mesh = trimesh.load_mesh(tmp_path / "scans/walk/walk_0000.ply", process=False)
    colours = np.random.default_rng(0).integers(0, 256, (24, 4), np.uint8)
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=colours)
    mesh.export(tmp_path / "scans/walk/walk_0000.ply")
    subject = import_scans(tmp_path / "scans", tmp_path / "out", progress=False)
    np.testing.assert_array_equal(subject.scan("walk", 0).colours, colours[:, :3])
    assert subject.scan("walk", 1).colours is None


def remove(name: str):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (remove("rest_joints.npy"), {}, "rest_joints.npy with the T-pose joints"),
        (lambda folder: np.save(folder / "rest_joints.npy", np.zeros((22, 3))), {}, r"\(24, 3\), got \(22, 3\)"),
        (lambda folder: [remove(f"{n}.npz")(folder) for n in ("walk", "dance")], {}, "expected pose files"),
        (
            lambda folder: np.savez(folder / "walk.npz", poses=np.zeros((3, 72))),
            {},
            "expected an array trans or transl",
        ),
        (
            lambda folder: np.savez(folder / "walk.npz", poses=np.zeros((3, 63)), trans=np.zeros((3, 3)), fps=30),
            {},
            r"poses \(F, 72\), got \(3, 63\)",
        ),
        (
            lambda folder: np.savez(folder / "walk.npz", poses=np.zeros((3, 72)), trans=np.zeros((3, 3)), fps=60),
            {},
            "one frame rate",
        ),
        (
            lambda folder: np.savez(folder / "walk.npz", poses=np.zeros((2, 72)), trans=np.zeros((2, 3)), fps=30),
            {},
            r"expected a frame in 0\.\.1",
        ),
        (lambda folder: [p.unlink() for p in (folder / "walk").iterdir()], {}, "expected scans <frame>"),
        (lambda folder: (folder / "walk/walk_0001.ply").write_bytes(b"ply\nnonsense"), {}, "expected a triangle mesh"),
        (lambda folder: (folder / "walk/0001.obj").write_text(""), {}, "frame 1 has two scans"),
        (lambda folder: None, {"test": ["run"]}, "test sequences among dance, walk, got run"),
        (lambda folder: None, {"up_axis": "x"}, "'y' or 'z'"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, damage, options: dict, message: str) -> None:
    write_folder(tmp_path / "scans")
    damage(tmp_path / "scans")
    with pytest.raises(SubjectError, match=message):
        import_scans(tmp_path / "scans", tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


def write_capture(path: Path, **change) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    frames = 175
    arrays = {
        "vertices": rng.integers(0, 65536, (frames, 24, 3)).astype(np.uint16),
        "box_min": np.array([-1.0, 0, -1]), "box_max": np.array([1.0, 2, 1]),
        "faces": scan_around(np.zeros((24, 3))).faces.astype(np.int32),
        "pose": rng.normal(0, 1, (frames, 72)).astype(np.float32), "transl": rng.normal(0, 1, (frames, 3)),
        "rest_joints": BODY.skeleton.rest_joints, "fps": np.float32(30), "source": np.array("a laboratory"),
        "licence_note": np.array("research use"), "canonical_vertices": rng.normal(0, 1, (24, 3)),
        "skinning_weights": rng.dirichlet(np.ones(24), 24).astype(np.float16),
    }  # fmt: skip
    arrays |= change
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return arrays


def test_a_capture_keeps_its_split_and_its_frames(tmp_path: Path) -> None:
    arrays = write_capture(tmp_path / "crane.npz")
    subject = import_capture(tmp_path / "crane.npz", tmp_path / "out")
    assert (subject.name, subject.licence) == ("crane", "research use")
    assert len(subject.frames("train")) == 140
    assert len(subject.frames("test")) == 35
    seen = []
    for name, split, first, last in CAPTURE_SEQUENCES:
        sequence = subject.sequence(name)
        assert sequence.split == split
        assert sequence.frame_ids is not None
        np.testing.assert_array_equal(sequence.frame_ids, np.arange(first, last + 1))
        seen.extend(sequence.frame_ids)
        expected = arrays["vertices"][first] / 65535 * 2 + [-1, 0, -1]
        np.testing.assert_allclose(subject.scan(name, 0).vertices, expected, atol=1e-6)
        np.testing.assert_array_equal(sequence.pose.reshape(-1, 72), arrays["pose"][first : last + 1])
    assert seen == list(range(175))
    # Registration is for baselines; the scans that training reads do not carry it.
    truth = subject.truth("registration")
    assert truth is not None
    np.testing.assert_allclose(truth["skinning_weights"].sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(truth["canonical_vertices"], arrays["canonical_vertices"])
    with np.load(tmp_path / "out/scans/train_0/00000.npz") as scan:
        assert sorted(scan.files) == ["faces", "vertices"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"faces": None}, "got none named faces"), ({"pose": np.zeros((170, 72))}, "expected 175 frames, got 170")],
)
def test_other_captures_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    write_capture(tmp_path / "crane.npz", **change)
    with pytest.raises(SubjectError, match=message):
        import_capture(tmp_path / "crane.npz", tmp_path / "out")
