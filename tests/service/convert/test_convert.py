"""`reposer convert`: whatever the source and its axes, the same motion is the same surface; nothing is guessed."""

from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from service.__main__ import main
from service.bundle.skeleton import Skeleton
from service.engine import repose_in_batches
from service.poses import Options, PoseSequence, parse_npz
from tests.service.convert.conftest import FRAMES, as_bvh, matrices, turned

Z_UP = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # y up -> z up
CAMERA = np.diag([1.0, -1, -1])


@pytest.fixture
def surface(skeleton: Skeleton, engine: Any, bundle_parts: Any) -> Any:
    """Vertices (F, V, 3) of the tiny avatar under the poses of an .npz or `.smpl`, as the service reads it."""
    mesh = bundle_parts["meshes"]["preview"]

    def of(path: Path, **options: Any) -> NDArray[np.float32]:
        poses = read(path, skeleton.rest_joints[0], **options)
        return np.concatenate([b.vertices for b in repose_in_batches(engine, skeleton, mesh.vertices, poses, 1 << 16)])

    return of


def read(path: Path, pelvis: NDArray[np.float32], **options: Any) -> PoseSequence:
    return parse_npz(path.read_bytes(), Options(**options), pelvis, 10_000, 1 << 26)


@pytest.fixture
def expected(surface: Any, walk: Any, tmp_path: Path) -> NDArray[np.float32]:
    np.savez(tmp_path / "plain.npz", **walk)
    return surface(tmp_path / "plain.npz")


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command; returns the file and what was said."""

    def run(path: Path, *options: str) -> tuple[Path, str]:
        output = tmp_path / "converted.npz"
        assert main(["convert", str(path), "-o", str(output), *options]) == 0, capsys.readouterr().err
        return output, capsys.readouterr().out

    return run


def write_amass(path: Path, walk: Any, pelvis: Any) -> tuple[str, ...]:
    z_up = turned(walk, Z_UP, pelvis)
    wide = np.concatenate([z_up["poses"][:, :66], np.full((FRAMES, 90), 0.3)], axis=1)
    np.savez(
        path, poses=wide, trans=z_up["trans"], betas=np.ones(16), gender="female", mocap_framerate=120.0,
        dmpls=np.zeros((FRAMES, 8)),
    )  # fmt: skip
    return ("--up-axis", "z")


def write_amass_x(path: Path, walk: Any, pelvis: Any) -> tuple[str, ...]:
    z_up = turned(walk, Z_UP, pelvis)
    np.savez(
        path, poses=np.concatenate([z_up["poses"][:, :66], np.zeros((FRAMES, 99))], axis=1), trans=z_up["trans"],
        surface_model_type="smplx", mocap_frame_rate=30.0, betas=np.zeros(16),
    )  # fmt: skip
    return ("--up-axis", "z")


def write_smplx_names(path: Path, walk: Any, pelvis: Any) -> tuple[str, ...]:
    np.savez(path, global_orient=walk["poses"][:, :3], body_pose=walk["poses"][:, 3:66], transl=walk["trans"])
    return ()


def write_smpl(path: Path, walk: Any, pelvis: Any) -> tuple[str, ...]:
    from smplcodec import SMPLCodec, SMPLVersion

    codec = SMPLCodec(
        smpl_version=SMPLVersion.SMPLX, frame_count=FRAMES, frame_rate=30.0, shape_parameters=np.zeros(10, np.float32),
        body_translation=walk["trans"].astype(np.float32),
        body_pose=walk["poses"][:, :66].reshape(-1, 22, 3).astype(np.float32),
    )  # fmt: skip
    codec.write(str(path))
    return ()


def write_matrices(path: Path, walk: Any, pelvis: Any) -> tuple[str, ...]:
    np.savez(path, poses=matrices(walk), trans=100 * walk["trans"])
    return ("--units", "cm")


def write_cape(path: Path, walk: Any, pelvis: Any) -> tuple[str, ...]:
    path.mkdir()
    for n, (pose, transl) in enumerate(zip(walk["poses"], walk["trans"], strict=True)):
        np.savez(path / f"shortlong_hips.{n + 8:06}.npz", pose=pose, transl=transl, v_cano=np.zeros((4, 3)))
    return ()


def write_gvhmr(path: Path, walk: Any, pelvis: Any) -> tuple[str, ...]:
    poses, trans = torch.tensor(walk["poses"]), torch.tensor(walk["trans"])
    world = {
        "body_pose": poses[:, 3:66],
        "global_orient": poses[:, :3],
        "transl": trans,
        "betas": torch.ones(FRAMES, 10),
    }
    incam = {key: torch.zeros_like(value) for key, value in world.items()}
    torch.save({"smpl_params_global": world, "smpl_params_incam": incam, "K_fullimg": torch.eye(3)}, path)
    return ()


def write_wham(path: Path, walk: Any, pelvis: Any) -> tuple[str, ...]:
    from collections import defaultdict

    people: Any = defaultdict(dict)
    for name, scale in ((0, 0.0), (3, 1.0)):
        people[name]["pose_world"], people[name]["trans_world"] = scale * walk["poses"], scale * walk["trans"]
        people[name]["pose"], people[name]["trans"] = np.zeros((FRAMES, 72)), np.zeros((FRAMES, 3))
        people[name]["betas"], people[name]["frame_ids"] = np.zeros((FRAMES, 10)), np.array([0, 1, 2, 5, 6, 7])
    joblib.dump(people, path, compress=3)
    return ("--person", "3")


def write_tram(path: Path, walk: Any, pelvis: Any) -> tuple[str, ...]:
    camera = turned(walk, CAMERA, pelvis)
    content: Any = {
        "pred_rotmat": torch.tensor(matrices(camera), dtype=torch.float32),
        "pred_trans": torch.tensor(camera["trans"], dtype=torch.float32)[:, None],
        "pred_shape": torch.zeros(FRAMES, 10), "frame": torch.arange(FRAMES),
    }  # fmt: skip
    np.save(path, content, allow_pickle=True)
    return ()


def write_hmr2(path: Path, walk: Any, pelvis: Any) -> tuple[str, ...]:
    camera = turned(walk, CAMERA, pelvis)
    turns = matrices(camera)
    body = {"global_orient": turns[:, :1], "body_pose": turns[:, 1:], "betas": np.zeros((FRAMES, 10))}
    joblib.dump({"pred_smpl_params": body, "pred_cam_t": camera["trans"]}, path)
    return ()


def write_phalp(path: Path, walk: Any, pelvis: Any) -> tuple[str, ...]:
    camera = turned(walk, CAMERA, pelvis)
    pictures = {}
    for n, (turns, moved) in enumerate(zip(matrices(camera).astype(np.float32), camera["trans"], strict=True)):
        body = {"global_orient": turns[None, 0], "body_pose": turns[1:], "betas": np.zeros(10, np.float32)}
        other = {key: np.zeros_like(value) for key, value in body.items()}
        pictures[f"{n:06}.jpg"] = {"time": n, "tid": [2, 1], "smpl": [other, body], "camera": [np.zeros(3), moved]}
    joblib.dump(pictures, path, compress=3)
    return ("--person", "1")


def write_prompt_hmr(path: Path, walk: Any, pelvis: Any) -> tuple[str, ...]:
    pose = torch.tensor(np.concatenate([walk["poses"][:, :66], np.ones((FRAMES, 99))], axis=1))
    world = {"pose": pose, "trans": torch.tensor(walk["trans"]), "shape": torch.zeros(FRAMES, 10)}
    joblib.dump({"people": {1: {"smplx_world": world, "frames": np.arange(FRAMES)}}, "camera": {}}, path)
    return ()


def write_array(path: Path, walk: Any, pelvis: Any) -> tuple[str, ...]:
    still = {"poses": walk["poses"], "trans": 0 * walk["trans"]}
    np.save(path, turned(still, Z_UP, 0 * pelvis)["poses"])
    return ("--up-axis", "z", "--fps", "25")


WRITERS: dict[str, Any] = {
    "amass.npz": write_amass, "amass-x.npz": write_amass_x, "smplx.npz": write_smplx_names, "motion.smpl": write_smpl,
    "matrices.npz": write_matrices, "cape": write_cape, "hmr4d_results.pt": write_gvhmr, "wham_output.pkl": write_wham,
    "hps_track_0.npy": write_tram, "hmr2.pkl": write_hmr2, "demo_video.pkl": write_phalp,
    "results.pkl": write_prompt_hmr,
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_every_source_gives_the_same_surface(
    name: str, skeleton: Any, walk: Any, surface: Any, expected: Any, convert: Any, tmp_path: Path
) -> None:
    options = WRITERS[name](tmp_path / name, walk, skeleton.rest_joints[0].astype(np.float64))
    output, said = convert(tmp_path / name, *options)
    np.testing.assert_allclose(surface(output), expected, rtol=0, atol=1e-3 if name == "hmr2.pkl" else 1e-4)
    assert "up axis: " in said or "frame: camera" in said
    assert "fps: " in said


@pytest.mark.parametrize("order", ["ZXY", "XYZ", "ZYX"])
def test_bvh_gives_the_same_surface(
    order: str, skeleton: Any, walk: Any, surface: Any, expected: Any, convert: Any, tmp_path: Path
) -> None:
    (tmp_path / "walk.bvh").write_text(as_bvh(skeleton, walk, order))
    output, said = convert(tmp_path / "walk.bvh")
    np.testing.assert_allclose(surface(output), expected, rtol=0, atol=1e-4)
    assert "units: cm, as a leg is " in said
    assert "fps: 25" in said


def test_a_plain_array_needs_its_axis_said(
    skeleton: Any, walk: Any, surface: Any, convert: Any, tmp_path: Path
) -> None:
    options = write_array(tmp_path / "poses.npy", walk, skeleton.rest_joints[0].astype(np.float64))
    output, said = convert(tmp_path / "poses.npy", *options)
    assert "up axis: z (as told)" in said
    np.savez(tmp_path / "plain.npz", poses=walk["poses"])
    centred = surface(output) - surface(tmp_path / "plain.npz")
    # The root's place turns with the world; the body must not.
    np.testing.assert_allclose(centred - centred[:, :1], 0, rtol=0, atol=1e-4)


def test_the_service_reads_directly_what_is_safe_to_read(
    skeleton: Any, walk: Any, surface: Any, expected: Any, tmp_path: Path
) -> None:
    pelvis = skeleton.rest_joints[0].astype(np.float64)
    for name in ("amass.npz", "amass-x.npz", "smplx.npz", "motion.smpl", "matrices.npz"):
        options = WRITERS[name](tmp_path / name, walk, pelvis)
        query = {
            option.removeprefix("--").replace("-", "_"): value
            for option, value in zip(options[::2], options[1::2], strict=True)
        }
        np.testing.assert_allclose(surface(tmp_path / name, **query), expected, rtol=0, atol=1e-4, err_msg=name)


def test_the_file_has_the_keys_of_amass_and_aitviewer(walk: Any, skeleton: Any, convert: Any, tmp_path: Path) -> None:
    write_gvhmr(tmp_path / "hmr4d_results.pt", walk, skeleton.rest_joints[0])
    output, _ = convert(tmp_path / "hmr4d_results.pt", "--fps", "24")
    with np.load(output, allow_pickle=False) as arrays:
        assert arrays["poses"].shape == (FRAMES, 72)
        assert arrays["trans"].shape == (FRAMES, 3)
        np.testing.assert_array_equal(arrays["betas"], np.ones(10))
        assert (str(arrays["gender"]), float(arrays["mocap_framerate"])) == ("neutral", 24)


def test_what_was_applied_is_said(walk: Any, skeleton: Any, convert: Any, tmp_path: Path) -> None:
    write_wham(tmp_path / "w.pkl", walk, skeleton.rest_joints[0])
    _, said = convert(tmp_path / "w.pkl", "--person", "3")
    for line in ("source: WHAM, person 3", "up axis: y (from the source)", "fps: 30.0 (taken; --fps says otherwise)"):
        assert line in said.splitlines()
    assert "1 gaps are closed up" in said
    _, said = convert(tmp_path / "w.pkl", "--person", "3", "--frame", "camera")
    assert "frame: camera" in said
    with np.load(tmp_path / "converted.npz") as arrays:
        assert not arrays["poses"].any()  # the camera's motion of the test file is still


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wham_output.pkl", (), "has the persons 0, 3; say --person"),
        ("wham_output.pkl", ("--person", "7"), "has the persons 0, 3"),
        ("hmr4d_results.pt", ("--up-axis", "z"), "--up-axis says z, the source has y"),
        ("hps_track_0.npy", ("--up-axis", "z"), "does not go with up_axis=z"),
        ("hmr4d_results.pt", ("--from", "wham"), "expected what wham writes, got the keys smpl_params_global"),
    ],
)
def test_what_is_not_clear_is_refused(
    name: str, options: Any, message: str, walk: Any, skeleton: Any, tmp_path: Path, capsys: Any
) -> None:
    WRITERS[name](tmp_path / name, walk, skeleton.rest_joints[0].astype(np.float64))
    assert main(["convert", str(tmp_path / name), "-o", str(tmp_path / "out.npz"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()
