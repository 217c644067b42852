"""The subject format: what is written is read back, and what is not a subject is refused with a reason."""

import json
from pathlib import Path

import numpy as np
import pytest

from service.bundle.skeleton import Skeleton
from training.data.body import open_body
from training.data.subject import Scan, Subject, SubjectError, SubjectWriter

FACES = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]], np.int32)


def tetrahedron(rng: np.random.Generator) -> Scan:
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    return Scan((corners + rng.normal(0, 0.05, (4, 3))).astype(np.float32), FACES)


def write(path: Path, *, colours: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    written = {}
    with SubjectWriter(
        path, name="someone", rest_joints=open_body().skeleton.rest_joints, fps=30, licence="CC0-1.0"
    ) as writer:
        for name, split, frames in (("walk", "train", 3), ("dance", "test", 2)):
            pose, translation = rng.normal(0, 0.3, (frames, 24, 3)), rng.normal(0, 1, (frames, 3))
            writer.add_sequence(name, split, pose, translation, np.arange(frames) * 3)
            written |= {f"{name}.pose": pose.astype(np.float32), f"{name}.translation": translation.astype(np.float32)}
            for frame in range(frames):
                scan = tetrahedron(rng)
                if colours:
                    scan = Scan(scan.vertices, scan.faces, rng.integers(0, 256, (4, 3), np.uint8))
                    written[f"{name}.{frame}.colours"] = scan.colours
                writer.add_scan(name, frame, scan)
                written[f"{name}.{frame}"] = scan.vertices
        writer.add_truth("walk", {"answer": np.arange(3)})
    return written


@pytest.mark.parametrize("colours", [False, True])
def test_what_is_written_is_read_back(tmp_path: Path, colours: bool) -> None:
    written = write(tmp_path / "subject", colours=colours)
    subject = Subject.open(tmp_path / "subject")

    assert (subject.name, subject.fps, subject.licence, subject.sequences) == (
        "someone", 30.0, "CC0-1.0", ("walk", "dance"),
    )  # fmt: skip
    assert subject.frames("train") == [("walk", 0), ("walk", 1), ("walk", 2)]
    assert subject.frames("test") == [("dance", 0), ("dance", 1)]
    for name in subject.sequences:
        sequence = subject.sequence(name)
        np.testing.assert_array_equal(sequence.pose, written[f"{name}.pose"])
        np.testing.assert_array_equal(sequence.translation, written[f"{name}.translation"])
        np.testing.assert_array_equal(sequence.frame_ids, 3 * np.arange(len(sequence)))
        for frame in range(len(sequence)):
            scan = subject.scan(name, frame)
            np.testing.assert_array_equal(scan.vertices, written[f"{name}.{frame}"])
            np.testing.assert_array_equal(scan.faces, FACES)
            assert (scan.vertices.dtype, scan.faces.dtype) == (np.float32, np.int32)
            if colours:
                np.testing.assert_array_equal(scan.colours, written[f"{name}.{frame}.colours"])
            else:
                assert scan.colours is None
    np.testing.assert_allclose(subject.skeleton.rest_joints, open_body().skeleton.rest_joints, atol=1e-6)
    assert isinstance(subject.skeleton, Skeleton)
    truth = subject.truth("walk")
    assert truth is not None
    np.testing.assert_array_equal(truth["answer"], np.arange(3))
    assert subject.truth("dance") is None


def write_half(path: Path, *, fail: bool) -> None:
    with SubjectWriter(path, name="a", rest_joints=open_body().skeleton.rest_joints, fps=30, licence="") as writer:
        writer.add_sequence("walk", "train", np.zeros((2, 24, 3)), np.zeros((2, 3)))
        writer.add_scan("walk", 0, tetrahedron(np.random.default_rng(0)))
        if fail:
            raise RuntimeError("stop")


@pytest.mark.parametrize(
    ("fail", "error", "message"), [(True, RuntimeError, "stop"), (False, SubjectError, "expected 2 scans, got 1")]
)
def test_half_a_subject_is_never_seen(tmp_path: Path, fail: bool, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        write_half(tmp_path / "subject", fail=fail)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "subject")
    with pytest.raises(SubjectError, match="exists already"):
        write(tmp_path / "subject")


def edit_json(change):
    def damage(path: Path) -> None:
        meta = json.loads((path / "subject.json").read_text())
        change(meta)
        (path / "subject.json").write_text(json.dumps(meta))

    return damage


def edit_arrays(file: str, **change):
    def damage(path: Path) -> None:
        arrays = dict(np.load(path / file))
        arrays |= change
        np.savez(path / file, **{key: value for key, value in arrays.items() if value is not None})

    return damage


POSE = np.zeros((3, 24, 3), np.float32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "subject.json").unlink(), "a subject.json, got none"),
        (lambda path: (path / "subject.json").write_text("{"), "expected JSON"),
        (edit_json(lambda meta: meta.update(format=2)), "expected format 1, got 2"),
        (edit_json(lambda meta: meta.update(up_axis="z")), "expected 'up_axis' 'y', got 'z'"),
        (edit_json(lambda meta: meta.update(units="cm")), "expected 'units' 'm', got 'cm'"),
        (edit_json(lambda meta: meta.update(fps=0)), "positive 'fps', got 0"),
        (edit_json(lambda meta: meta.pop("licence")), "'licence' as str, got None"),
        (edit_json(lambda meta: meta["skeleton"]["joint_names"].reverse()), "24 SMPL joint names"),
        (edit_json(lambda meta: meta["skeleton"]["rest_joints"].pop()), r"rest_joints \(24, 3\), got \(23, 3\)"),
        (edit_json(lambda meta: meta["sequences"][0].update(split="val")), "'train' or 'test', got 'val'"),
        (edit_json(lambda meta: meta["sequences"][0].update(name="../walk")), r"got '../walk'"),
        (edit_json(lambda meta: meta["sequences"][0].update(frames=4)), "expected 4 frames by subject.json, got 3"),
        (edit_json(lambda meta: meta["sequences"].append(meta["sequences"][0])), "listed twice"),
        (edit_json(lambda meta: meta["sequences"].clear()), "at least one sequence"),
        (lambda path: (path / "sequences/walk.npz").unlink(), "walk.npz, got none"),
        (lambda path: (path / "sequences/walk.npz").write_bytes(b"PK nonsense"), "npz file of plain arrays"),
        (edit_arrays("sequences/walk.npz", pose=POSE[:, :22]), r"pose \(F, 24, 3\) with F >= 1, got \(3, 22, 3\)"),
        (edit_arrays("sequences/walk.npz", pose=POSE * np.nan), "expected finite numbers, got 216"),
        (edit_arrays("sequences/walk.npz", pose=None), "expected an array 'pose', got frame_ids, translation"),
        (edit_arrays("sequences/walk.npz", translation=np.zeros((2, 3))), r"translation \(3, 3\), got \(2, 3\)"),
        (edit_arrays("sequences/walk.npz", frame_ids=np.zeros(3)), "integer frame_ids"),
        (edit_arrays("sequences/walk.npz", pose=np.array([{}], object)), "plain arrays"),  # would need unpickling
        (lambda path: (path / "scans/walk/00001.npz").unlink(), "expected 3 scans, got 2; first missing: .*00001"),
    ],
)
def test_what_is_not_a_subject_is_refused(tmp_path: Path, damage, message: str) -> None:
    write(tmp_path / "subject")
    damage(tmp_path / "subject")
    with pytest.raises(SubjectError, match=message):
        Subject.open(tmp_path / "subject")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"faces": FACES + 1}, "face indices in 0..3, got 1..4"),
        ({"faces": FACES.astype(np.float32)}, "integer faces"),
        ({"faces": FACES[:0]}, "T >= 4"),
        ({"vertices": np.zeros((4, 2), np.float32)}, r"vertices \(V, 3\) with V >= 4, got \(4, 2\)"),
        ({"vertices": np.full((4, 3), np.inf)}, "expected finite numbers, got 12"),
        ({"vertices": None}, "expected an array 'vertices'"),
        ({"colours": np.zeros((4, 3))}, "uint8 colours"),
    ],
)
def test_what_is_not_a_scan_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    write(tmp_path / "subject")
    edit_arrays("scans/walk/00001.npz", **change)(tmp_path / "subject")
    subject = Subject.open(tmp_path / "subject")
    subject.scan("walk", 0)
    with pytest.raises(SubjectError, match=message):
        subject.scan("walk", 1)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "subject")
    subject = Subject.open(tmp_path / "subject")
    with pytest.raises(SubjectError, match=r"frame in 0\.\.2, got 3"):
        subject.scan("walk", 3)
    with pytest.raises(SubjectError, match="walk, dance, got 'run'"):
        subject.sequence("run")
    with pytest.raises(SubjectError, match="'train' or 'test', got 'val'"):
        subject.frames("val")


def test_a_writer_refuses_what_a_reader_would(tmp_path: Path) -> None:
    joints = open_body().skeleton.rest_joints
    with pytest.raises(SubjectError, match="positive 'fps'"):
        SubjectWriter(tmp_path / "a", name="a", rest_joints=joints, fps=-1, licence="")
    with pytest.raises(SubjectError, match=r"rest_joints \(24, 3\), got \(22, 3\)"):
        SubjectWriter(tmp_path / "a", name="a", rest_joints=joints[:22], fps=30, licence="")
    with SubjectWriter(tmp_path / "a", name="a", rest_joints=joints, fps=30, licence="") as writer:
        scan = tetrahedron(np.random.default_rng(0))
        with pytest.raises(SubjectError, match="got 'val'"):
            writer.add_sequence("walk", "val", POSE, np.zeros((3, 3)))
        with pytest.raises(SubjectError, match=r"got '\.\./walk'"):
            writer.add_scan("../walk", 0, scan)
        with pytest.raises(SubjectError, match="face indices"):
            writer.add_scan("walk", 0, Scan(scan.vertices, scan.faces + 4))
        writer.add_sequence("walk", "train", POSE[:1], np.zeros((1, 3)))
        with pytest.raises(SubjectError, match="added twice"):
            writer.add_sequence("walk", "train", POSE[:1], np.zeros((1, 3)))
        writer.add_scan("walk", 0, scan)
    assert Subject.open(tmp_path / "a").frames("train") == [("walk", 0)]
