"""CAPE and AMASS in their published layouts arrive as y-up, metric subjects whose scans lie where the poses say."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trimesh

from training.__main__ import main
from training.data.gated import import_amass, import_cape
from training.data.importers import Z_UP_TO_Y_UP
from training.data.subject import Subject, SubjectError

Arrays = dict[str, np.ndarray]
FRAMES = 5
MINIMAL = "minimal_body_shape/00096/00096_minimal.npy"
FIRST = "sequences/00096/shortlong_hips/shortlong_hips.000001.npz"


@pytest.fixture
def model_file(smpl_arrays: Arrays, tmp_path: Path) -> Path:
    np.savez(tmp_path / "SMPL_MALE.npz", **smpl_arrays)
    return tmp_path / "SMPL_MALE.npz"


@pytest.fixture
def smplh_file(smplh_arrays: Arrays, tmp_path: Path) -> Path:
    np.savez(tmp_path / "model.npz", **smplh_arrays)
    return tmp_path / "model.npz"


def motion(seed: int, joints: int, frames: int = FRAMES) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.3, (frames, joints, 3)), rng.normal(0, 1, (frames, 3))


def clothed(arrays: Arrays, seed: int, frame: int) -> np.ndarray:
    """The T-pose body in clothes that change from sequence to sequence and from frame to frame."""
    return minimal(arrays) * (1.01 + 0.01 * seed + 0.002 * frame)


def minimal(arrays: Arrays) -> np.ndarray:
    return arrays["v_template"] + arrays["shapedirs"][..., 0]


@pytest.fixture
def cape(smpl_arrays: Arrays, tmp_path: Path, pose_smpl: Callable[..., np.ndarray]) -> Path:
    folder = tmp_path / "cape_release"
    for seed, name in enumerate(("shortlong_hips", "shortlong_ROM_lower", "blazerlong_hips")):
        poses, translations = motion(seed, 24)
        where = folder / "sequences/00096" / name
        where.mkdir(parents=True)
        for frame in range(FRAMES):
            v_posed = pose_smpl(smpl_arrays, clothed(smpl_arrays, seed, frame), poses[frame], translations[frame])
            np.savez(
                where / f"{name}.{frame + 1:06d}.npz", v_posed=v_posed, v_cano=clothed(smpl_arrays, seed, frame),
                pose=poses[frame].ravel(), transl=translations[frame],
            )  # fmt: skip
    (folder / MINIMAL).parent.mkdir(parents=True)
    np.save(folder / MINIMAL, minimal(smpl_arrays))
    return folder


def cape_subject(cape: Path, model_file: Path, out: Path, **options) -> Subject:
    return import_cape(
        cape, out, subject="00096", smpl=model_file, **{"clothing": "shortlong", "progress": False, **options}
    )


def test_cape_arrives_as_it_was_posed(
    cape: Path, model_file: Path, smpl_arrays: Arrays, tmp_path: Path, pose_smpl: Callable[..., np.ndarray]
) -> None:
    arguments = ["prepare", "cape", str(cape), str(tmp_path / "out"), "--subject", "00096", "--clothing", "shortlong"]
    assert main([*arguments, "--smpl", str(model_file), "--test", "shortlong_hips"]) == 0
    subject = Subject.open(tmp_path / "out")
    assert (subject.name, subject.fps) == ("cape-00096-shortlong", 60)
    assert "non-commercial" in subject.licence
    assert subject.provenance["applied"] == {"up_axis": "y", "units": "m", "every": 1, "model_file": "SMPL_MALE.npz"}
    assert {name for name, _ in subject.frames("test")} == {"shortlong_hips"}
    assert {name for name, _ in subject.frames("train")} == {"shortlong_ROM_lower"}
    joints = smpl_arrays["J_regressor"] @ minimal(smpl_arrays)
    np.testing.assert_allclose(subject.skeleton.rest_joints, joints, atol=1e-5)
    for seed, name in enumerate(("shortlong_hips", "shortlong_ROM_lower")):
        poses, translations = motion(seed, 24)
        sequence = subject.sequence(name)
        np.testing.assert_allclose(sequence.pose, poses, atol=1e-6)
        np.testing.assert_allclose(sequence.translation, translations, atol=1e-6)
        np.testing.assert_array_equal(sequence.frame_ids, np.arange(1, FRAMES + 1))
        for frame in range(FRAMES):
            expected = pose_smpl(smpl_arrays, clothed(smpl_arrays, seed, frame), poses[frame], translations[frame])
            np.testing.assert_allclose(subject.scan(name, frame).vertices, expected, atol=1e-5)
            np.testing.assert_array_equal(subject.scan(name, frame).faces, smpl_arrays["f"])
    truth = subject.truth("registration")
    assert truth is not None  # for baselines: the mean of the un-posed training frames
    np.testing.assert_allclose(truth["canonical_vertices"], clothed(smpl_arrays, 1, 2), atol=1e-5)
    np.testing.assert_allclose(truth["skinning_weights"], smpl_arrays["weights"], atol=1e-6)


def test_cape_is_thinned_and_its_known_flaws_are_left_out(cape: Path, model_file: Path, tmp_path: Path) -> None:
    """Every second frame, less one that cannot be read; and a file that a writer left behind is no frame."""
    where = cape / "sequences/00096/shortlong_hips"
    for number, damage in ((3, lambda content: content[:-100]), (5, lambda content: content[:2000] + bytes(9999))):
        path = where / f"shortlong_hips.{number:06d}.npz"
        path.write_bytes(damage(path.read_bytes()))
    (where / "shortlong_hips.000002.npz5JRYHz-numpy.npy").write_bytes(b"left behind")
    subject = cape_subject(cape, model_file, tmp_path / "out", every=2)
    np.testing.assert_array_equal(subject.sequence("shortlong_hips").frame_ids, [1])
    np.testing.assert_array_equal(subject.sequence("shortlong_ROM_lower").frame_ids, [1, 3, 5])
    assert subject.fps == 30
    unreadable = [f"shortlong_hips.00000{number}.npz" for number in (3, 5)]
    assert subject.provenance["unreadable_frames"] == unreadable


def test_the_minimal_shape_may_be_a_ply_elsewhere(
    cape: Path, model_file: Path, smpl_arrays: Arrays, tmp_path: Path
) -> None:
    (cape / MINIMAL).unlink()
    trimesh.Trimesh(minimal(smpl_arrays), smpl_arrays["f"], process=False).export(tmp_path / "minimal.ply")
    subject = cape_subject(cape, model_file, tmp_path / "out", minimal_shape=tmp_path / "minimal.ply")
    joints = smpl_arrays["J_regressor"] @ minimal(smpl_arrays)
    np.testing.assert_allclose(subject.skeleton.rest_joints, joints, atol=1e-5)


def rewrite(path: Path, **change) -> None:
    with np.load(path) as archive:
        arrays = {**archive, **change}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})


def in_every_frame(**change):
    def damage(cape: Path) -> None:
        for path in (cape / "sequences/00096/shortlong_hips").glob("*.npz"):
            rewrite(path, **change)

    return damage


def in_centimetres(cape: Path) -> None:
    for path in (cape / "sequences/00096/shortlong_hips").glob("*.npz"):
        with np.load(path) as archive:
            vertices = archive["v_posed"]
        rewrite(path, v_posed=vertices * 100)


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda cape: None, {"clothing": None}, "choice of clothing among blazerlong, shortlong, got none"),
        (lambda cape: None, {"clothing": "short"}, "clothing among blazerlong, shortlong, got 'short'"),
        (lambda cape: None, {"subject": "00032"}, "minimal body shape"),
        (lambda cape: None, {"test": ["hips"]}, "test sequences among shortlong_ROM_lower, shortlong_hips, got hips"),
        (lambda cape: None, {"every": 0}, "every 1st"),
        (lambda cape: (cape / MINIMAL).write_bytes(b"no array"), {}, r"expected a minimal body shape \.npy or \.ply"),
        (lambda cape: np.save(cape / MINIMAL, np.zeros((6, 3))), {}, r"vertices, got \(6, 3\)"),
        (lambda cape: rewrite(cape / FIRST, v_posed=None), {}, "got none named v_posed"),
        (lambda cape: rewrite(cape / FIRST, v_posed=np.zeros((6, 3))), {}, r"v_posed \(\d+, 3\), got \(6, 3\)"),
        (lambda cape: rewrite(cape / FIRST, pose=np.full(72, np.nan)), {}, "finite numbers"),
        (lambda cape: rewrite(cape / FIRST, pose=np.array(["a"] * 72)), {}, "pose"),
        (in_every_frame(transl=np.zeros(3)), {}, "on the body that pose and transl give"),
        (in_centimetres, {}, "on the body that pose and transl give"),
        (
            lambda cape: [p.write_bytes(b"no zip") for p in (cape / FIRST).parent.glob("*.npz")],
            {},
            "that can be read, got none",
        ),
    ],
)
def test_other_cape_folders_are_refused(
    cape: Path, model_file: Path, tmp_path: Path, damage, options: dict, message: str
) -> None:
    damage(cape)
    with pytest.raises(SubjectError, match=message):
        import_cape(
            cape, tmp_path / "out", smpl=model_file,
            **{"subject": "00096", "clothing": "shortlong", "progress": False, **options},
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


BETAS = np.random.default_rng(7).normal(size=16)


def write_amass(folder: Path, name: str, seed: int, rate: float = 60.0, frames: int = FRAMES, **change) -> None:
    poses, translations = motion(seed, 52, frames)  # with fingers, which do not arrive
    folder.mkdir(exist_ok=True)
    arrays = {
        "poses": poses.reshape(frames, 156), "trans": translations, "betas": BETAS, "gender": np.array("male"),
        "mocap_framerate": np.array(rate), "dmpls": np.zeros((frames, 8)),
        "marker_labels": np.array(["a", None], object),  # a Python object, as in some published files
    }  # fmt: skip
    np.savez(folder / f"{name}_poses.npz", **{k: v for k, v in (arrays | change).items() if v is not None})


@pytest.fixture
def dfaust(tmp_path: Path) -> Path:
    folder = tmp_path / "50002"
    write_amass(folder, "50002_hips", 0)
    write_amass(folder, "50002_one leg jump", 1)
    np.savez(folder / "shape.npz", betas=BETAS, gender="male")
    return folder


def test_amass_arrives_as_the_body_that_smpl_h_poses(
    dfaust: Path, smplh_file: Path, smplh_arrays: Arrays, tmp_path: Path, pose_smpl: Callable[..., np.ndarray]
) -> None:
    write_amass(tmp_path / "03099", "op2", 2, rate=120, gender=np.array(b"female"), betas=BETAS * 0)
    arguments = ["prepare", "amass", str(dfaust), str(tmp_path / "out"), "--smpl", str(smplh_file), "--every", "2"]
    assert main([*arguments, "--test", "50002_hips", "--held-out", str(tmp_path / "03099")]) == 0
    subject = Subject.open(tmp_path / "out")
    assert (subject.name, subject.fps) == ("amass-50002", 30)
    assert "non-commercial" in subject.licence
    assert subject.provenance["applied"] == {
        "up_axis": "z", "units": "m", "hands": "flat", "every": 2, "model_file": "model.npz", "betas": 16,
    }  # fmt: skip
    assert {name for name, _ in subject.frames("test")} == {"50002_hips", "op2"}
    rest = smplh_arrays["v_template"] + smplh_arrays["shapedirs"] @ BETAS
    for seed, name, stride in ((0, "50002_hips", 2), (1, "50002_one_leg_jump", 2), (2, "op2", 4)):
        poses, translations = motion(seed, 52)
        poses[:, 22:] = 0
        sequence = subject.sequence(name)
        rows = np.arange(0, FRAMES, stride)
        np.testing.assert_array_equal(sequence.frame_ids, rows)
        for frame, row in enumerate(rows):
            z_up = pose_smpl(smplh_arrays, rest, poses[row], translations[row])
            scan = subject.scan(name, frame)
            np.testing.assert_allclose(scan.vertices, z_up @ Z_UP_TO_Y_UP.T, atol=1e-5)
            # The skeleton stands in the scan: its joints are those of the posed body.
            transforms = subject.skeleton._rest_to_posed(sequence.rotations())[frame]
            joints = np.einsum("jab,jb->ja", transforms[:, :3, :3], subject.skeleton.rest_joints)
            wrists = (joints + transforms[:, :3, 3] + sequence.translation[frame])[20:22]
            weights = smplh_arrays["weights"][:, 20:22]
            near = [scan.vertices[weights[:, hand] > 0.9].mean(0) for hand in (0, 1)]
            assert np.linalg.norm(wrists - near, axis=1).max() < 0.1
    truth = subject.truth("registration")
    assert truth is not None
    np.testing.assert_allclose(truth["canonical_vertices"], rest, atol=1e-5)


def test_amass_bodies_of_a_24_joint_file_have_its_shapes_only(
    dfaust: Path, model_file: Path, smpl_arrays: Arrays, tmp_path: Path
) -> None:
    subject = import_amass(dfaust, tmp_path / "out", smpl=model_file, progress=False)
    rest = smpl_arrays["v_template"] + smpl_arrays["shapedirs"] @ BETAS[:10]
    np.testing.assert_allclose(subject.skeleton.rest_joints, smpl_arrays["J_regressor"] @ rest, atol=1e-5)
    assert subject.provenance["applied"]["betas"] == 10
    assert not subject.sequence("50002_hips").pose[:, 22:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"poses": np.zeros((FRAMES, 72))}, r"SMPL-H poses \(F, 156\), got \(5, 72\)"),
        ({"trans": np.zeros((2, 3))}, r"trans \(5, 3\)"),
        ({"mocap_framerate": np.array(0.0)}, "positive frame rate"),
        ({"mocap_framerate": np.array(50.0)}, "multiple of 60 frames a second, got 50"),
        ({"mocap_framerate": None}, "got none named mocap_framerate"),
        ({"betas": BETAS + 0.1}, "one person, got other betas in 50002_walk"),
        ({"poses": np.full((FRAMES, 156), np.inf)}, "finite numbers"),
        ({"poses": np.array([None] * FRAMES)}, "npz file of AMASS"),
    ],
)
def test_other_amass_files_are_refused(
    dfaust: Path, model_file: Path, tmp_path: Path, change: dict, message: str
) -> None:
    write_amass(dfaust, "50002_walk", 3, **change)
    with pytest.raises(SubjectError, match=message):
        import_amass(dfaust, tmp_path / "out", smpl=model_file, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_poses_is_refused(model_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SubjectError, match=r"<name>_poses\.npz of AMASS, got none"):
        import_amass(tmp_path, tmp_path / "out", smpl=model_file, progress=False)


def test_a_broken_archive_is_refused(dfaust: Path, model_file: Path, tmp_path: Path) -> None:
    path = dfaust / "50002_hips_poses.npz"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(SubjectError, match=r"50002_hips_poses\.npz"):
        import_amass(dfaust, tmp_path / "out", smpl=model_file, progress=False)
