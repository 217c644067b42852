"""The parsers alone: layouts, axes, units, and no input that gets through unchecked."""

import contextlib
import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import errors
from service.bundle.skeleton import axis_angle_to_matrix
from service.npz import read_npz
from service.poses import ACCEPTED_WIDTHS, Options, PoseSequence, parse_json, parse_npz
from service.rotations import quaternions

PELVIS = np.array([0.01, -0.23, 0.03], np.float32)
RNG = np.random.default_rng(2)
POSES, TRANS = RNG.normal(0, 0.5, (3, 72)), RNG.normal(0, 1, (3, 3))


def from_json(document: Any, **options: Any) -> PoseSequence:
    return parse_json(json.dumps(document).encode(), Options(**options), PELVIS, max_frames=100)


def from_npz(options: dict[str, Any] | None = None, **arrays: Any) -> PoseSequence:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return parse_npz(file.getvalue(), Options(**options or {}), PELVIS, max_frames=100, max_bytes=1 << 20)


@pytest.mark.parametrize("width", ACCEPTED_WIDTHS)
def test_every_width_places_its_joints(width: int) -> None:
    first, used = {63: (1, 21), 66: (0, 22), 69: (1, 23), 72: (0, 24), 156: (0, 22), 165: (0, 22)}[width]
    poses = RNG.normal(0, 0.5, (3, width))
    for given_poses in (poses, poses.reshape(3, -1, 3)):
        sequence = from_json({"poses": given_poses.tolist()})
        expected = np.tile(np.eye(3), (3, 24, 1, 1))
        expected[:, first : first + used] = axis_angle_to_matrix(poses.reshape(3, -1, 3)[:, :used])
        np.testing.assert_allclose(sequence.rotations, expected, rtol=0, atol=1e-6)
        assert bool(sequence.warnings) == (width > 72)


def test_npz_layouts_agree() -> None:
    amass = from_npz(poses=POSES, trans=TRANS, mocap_framerate=np.array(60.0), betas=np.zeros(16), gender="male")
    cape = [from_npz(pose=POSES[n].astype(np.float32), transl=TRANS[n], v_cano=np.zeros((9, 3))) for n in range(3)]
    stageii = from_npz(root_orient=POSES[:, :3], pose_body=POSES[:, 3:66], trans=TRANS, mocap_frame_rate=60)
    gvhmr = from_npz(global_orient=POSES[:, :3], body_pose=POSES[:, 3:], transl=TRANS, fps=np.array([60]))
    assert (amass.fps, cape[0].fps, stageii.fps, gvhmr.fps) == (60, 30, 60, 60)
    np.testing.assert_array_equal(amass.rotations, gvhmr.rotations)
    np.testing.assert_array_equal(amass.rotations[:, :22], stageii.rotations[:, :22])
    np.testing.assert_allclose(amass.rotations, np.concatenate([c.rotations for c in cape]), rtol=0, atol=1e-6)
    for other in (stageii, gvhmr):
        np.testing.assert_array_equal(amass.translation, other.translation)


def test_z_up_turns_the_world_about_its_origin(skeleton: Any) -> None:
    pelvis = skeleton.rest_joints[0]
    y, z = (
        parse_json(json.dumps({"poses": POSES.tolist(), "translations": TRANS.tolist(), "up_axis": up}).encode(),
                   Options(), pelvis, 100)
        for up in "yz"
    )  # fmt: skip
    as_posted, applied = (skeleton.root_transforms(s.rotations, s.translation) for s in (y, z))
    turn = np.eye(4)
    turn[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]  # z becomes y, y becomes -z
    np.testing.assert_allclose(applied, turn @ as_posted, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(y.rotations[:, 1:], z.rotations[:, 1:])


def test_options_come_from_the_query_or_the_body_and_must_agree() -> None:
    poses = POSES.tolist()
    assert from_json({"poses": poses}, up_axis="z").up_axis == "z"
    assert from_json({"poses": poses, "up_axis": "z"}, up_axis="z").up_axis == "z"
    assert from_npz(poses=POSES, up_axis="z", units="cm").units == "cm"
    for document, query in (
        ({"up_axis": "y"}, {"up_axis": "z"}),
        ({"units": "m"}, {"units": "cm"}),
        ({"fps": 30}, {"fps": 60.0}),
    ):
        with pytest.raises(errors.OptionInvalid, match="the query says"):
            from_json({"poses": poses} | document, **query)


def test_every_nth_frame() -> None:
    whole, third = (
        from_json({"poses": np.tile(POSES, (2, 1)).tolist()}),
        from_json({"poses": POSES.tolist() * 2}, every=2),
    )
    np.testing.assert_array_equal(third.rotations, whole.rotations[::2])
    assert third.fps == 15


def test_a_matrix_that_was_rounded_is_made_a_rotation_again() -> None:
    exact = axis_angle_to_matrix(POSES.reshape(3, 24, 3))
    sequence = from_json({"poses": exact.round(4).tolist()})
    gram = sequence.rotations.astype(np.float64) @ sequence.rotations.swapaxes(-1, -2)
    np.testing.assert_allclose(gram, np.tile(np.eye(3), (3, 24, 1, 1)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(sequence.rotations, exact, rtol=0, atol=2e-4)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["poses", "fps", "x"]), inner, max_size=3)
    ),
    max_leaves=20,
)
odd = st.sampled_from([float("nan"), 1e300, True, "1", None, 10**400])
rows = st.sampled_from([0, 3, 63, 71, 72]).flatmap(
    lambda n: st.lists(st.floats(-1, 1) | odd, min_size=n, max_size=n) | st.just([0.25] * n)
)
documents = st.fixed_dictionaries(
    {"poses": anything | st.lists(rows, max_size=3)},
    optional={"translations": anything, "fps": anything, "up_axis": anything, "units": anything, "rotation": anything},
)


@contextlib.contextmanager
def refused_or_not() -> Iterator[None]:
    """Lets the errors through that a client may see as its own fault, with a message; nothing else."""
    try:
        yield
    except errors.AvatarServiceError as error:
        if not (400 <= error.status < 500 and str(error)):
            raise


@settings(deadline=None, max_examples=150)
@given(document=anything | documents)
def test_json_is_poses_or_a_clear_refusal(document: Any) -> None:
    with refused_or_not():
        sequence = from_json(document)
        assert np.isfinite(sequence.rotations).all()
        assert np.isfinite(sequence.translation).all()
        np.testing.assert_allclose(np.linalg.det(sequence.rotations.astype(np.float64)), 1, atol=1e-4)


@settings(deadline=None, max_examples=150)
@given(at=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.integers(0, 10**6))
def test_a_damaged_npz_is_read_or_refused(at: int, byte: int, cut: int) -> None:
    file = io.BytesIO()
    np.savez_compressed(file, poses=POSES, trans=TRANS, fps=30.0)
    data = bytearray(file.getvalue())
    data[at % len(data)] = byte
    for damaged in (bytes(data), bytes(data[: cut % len(data)])):
        with refused_or_not():
            parse_npz(damaged, Options(), PELVIS, 100, 1 << 20)


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, data in members.items():
            made.writestr(name, data)
    return file.getvalue()


def array_bytes(array: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=True)
    return file.getvalue()


def claims(shape: str, descr: str = "'<f8'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


GOOD = array_bytes(POSES)
NPZ_FAULTS: dict[str, tuple[bytes, type[errors.AvatarServiceError]]] = {
    "not a zip": (b"poses", errors.NpzInvalid),
    "a bare array": (GOOD, errors.NpzInvalid),
    "a bare pickle": (b"\x80\x04.", errors.NpzUnsafe),
    "a pickled member": (archive({"poses.npy": b"\x80\x04N."}), errors.NpzUnsafe),
    "an array of objects": (archive({"poses.npy": array_bytes(np.array([{}, None]))}), errors.NpzUnsafe),
    "records with objects": (archive({"poses.npy": claims("(1,)", "[('a', '|O')]")}), errors.NpzUnsafe),
    "complex numbers": (archive({"poses.npy": claims("(1,)", "'<c16'")}), errors.NpzInvalid),
    "claims 8 TiB": (archive({"poses.npy": claims("(1099511627775, 1)")}), errors.BodyTooLarge),
    "overflowing shape": (archive({"poses.npy": claims("(1099511627776, 1099511627776)")}), errors.NpzInvalid),
    "negative shape": (archive({"poses.npy": claims("(-1, 72)")}), errors.NpzInvalid),
    "shape of truth": (archive({"poses.npy": claims("(True, 72)")}), errors.NpzInvalid),
    "claims more than it has": (archive({"poses.npy": claims("(3, 72)")}), errors.NpzInvalid),
    "has more than it claims": (archive({"poses.npy": GOOD + b"x"}), errors.NpzInvalid),
    "bomb": (archive({"poses.npy": claims("(3, 72)") + bytes(10**8)}, zipfile.ZIP_DEFLATED), errors.NpzInvalid),
    "large and honest": (archive({"poses.npy": claims("(1000, 1000)") + bytes(8 * 10**6)}), errors.BodyTooLarge),
    "header of nothing": (archive({"poses.npy": b"\x93NUMPY\x01\x00\x02\x00{}"}), errors.NpzInvalid),
    "header is code": (archive({"poses.npy": claims("__import__('os').getpid()")}), errors.NpzInvalid),
    "33 members": (archive({f"{n}.npy": GOOD for n in range(33)}), errors.NpzInvalid),
    "20,000 members": (archive({f"{n}.npy": b"" for n in range(20_000)}), errors.NpzInvalid),
    "strange compression": (archive({"poses.npy": GOOD}, zipfile.ZIP_LZMA), errors.NpzInvalid),
    "no poses": (archive({"trans.npy": GOOD}), errors.InvalidPose),
    "poses outside": (archive({"../poses.npy": GOOD}), errors.InvalidPose),
    "text": (archive({"poses.npy": array_bytes(["a", "b"])}), errors.PoseNotNumber),
    "text as rate": (archive({"poses.npy": GOOD, "fps.npy": array_bytes("30")}), errors.OptionInvalid),
    "rate at NaN": (archive({"poses.npy": GOOD, "fps.npy": array_bytes(np.nan)}), errors.OptionInvalid),
    "no frames": (archive({"poses.npy": array_bytes(POSES[:0])}), errors.PoseEmpty),
    "a single number": (archive({"poses.npy": array_bytes(1.0)}), errors.PoseShapeInvalid),
}


@pytest.mark.parametrize("fault", NPZ_FAULTS)
def test_npz_faults_have_their_own_error(fault: str) -> None:
    data, expected = NPZ_FAULTS[fault]
    with pytest.raises(errors.AvatarServiceError) as caught:
        parse_npz(data, Options(), PELVIS, 100, 1 << 20)
    assert type(caught.value) is expected, repr(caught.value)


def test_members_that_were_not_asked_for_are_not_opened() -> None:
    data = archive({"poses.npy": GOOD, "dmpls.npy": b"\x80\x04N.", "readme.txt": b"text"})
    arrays = read_npz(data, {"poses"}, 1 << 20)
    np.testing.assert_array_equal(arrays["poses"], POSES)
    assert set(arrays) == {"poses"}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", "<i4", "<i8"])
def test_arrays_are_those_that_numpy_wrote(dtype: str, order: Any) -> None:
    array = np.array(np.arange(12).reshape(3, 4), dtype, order=order)
    read = read_npz(archive({"poses.npy": array_bytes(array)}, zipfile.ZIP_DEFLATED), {"poses"}, 1 << 20)["poses"]
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype


MATRICES = axis_angle_to_matrix(POSES.reshape(3, 24, 3))
WXYZ = np.roll(quaternions(MATRICES), 1, axis=-1)
SIX = np.concatenate([MATRICES[..., 0], MATRICES[..., 1]], axis=-1)


@pytest.mark.parametrize(
    ("poses", "rotation"), [(MATRICES, "matrix"), (WXYZ, "quat_wxyz"), (-WXYZ, "quat_wxyz"), (SIX, "6d")]
)
def test_all_forms_of_a_rotation_are_the_same_pose(poses: Any, rotation: str) -> None:
    for given_poses, said in ((poses, None), (poses, rotation), (poses.reshape(3, -1), rotation)):
        sequence = from_npz({"rotation": said}, poses=given_poses, trans=TRANS)
        np.testing.assert_allclose(sequence.rotations, MATRICES, rtol=0, atol=1e-6)
        assert sequence.rotation == rotation


@pytest.mark.parametrize("rotation", ["matrix", "quat_wxyz", "6d"])
def test_normalize_takes_the_nearest_rotation(rotation: str) -> None:
    spoilt = {"matrix": 1.1 * MATRICES, "quat_wxyz": 3 * WXYZ, "6d": 0.5 * SIX}[rotation]
    with pytest.raises(errors.PoseNotRotation):
        from_npz(poses=spoilt)
    np.testing.assert_allclose(from_npz({"normalize": True}, poses=spoilt).rotations, MATRICES, rtol=0, atol=1e-6)
    for worse in (
        0 * spoilt,
        1e200 * spoilt,
        np.where(np.arange(3)[:, None].reshape(3, *[1] * (spoilt.ndim - 1)) == 1, 0, spoilt),
    ):
        with pytest.raises(errors.PoseNotRotation) as caught:
            from_npz({"normalize": True}, poses=worse)
    assert caught.value.extra["frame"] == 1


def test_normalize_makes_a_rotation_of_a_noisy_matrix_and_takes_wide_angles() -> None:
    noisy = MATRICES + RNG.normal(0, 0.05, MATRICES.shape)
    rotations = from_npz({"normalize": True}, poses=noisy).rotations.astype(np.float64)
    np.testing.assert_allclose(rotations @ rotations.swapaxes(-1, -2), np.tile(np.eye(3), (3, 24, 1, 1)), atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(rotations), 1, atol=1e-6)
    assert np.abs(rotations - MATRICES).max() < 0.3
    turns = POSES.copy()
    turns[:, :3] = [0, 20 * np.pi + 0.25, 0]
    same = POSES.copy()
    same[:, :3] = [0, 0.25, 0]
    wide = from_npz({"normalize": True}, poses=turns)
    np.testing.assert_allclose(wide.rotations, from_npz(poses=same).rotations, rtol=0, atol=1e-6)


def test_camera_frame_turns_about_the_x_axis(skeleton: Any) -> None:
    pelvis = skeleton.rest_joints[0]
    file = io.BytesIO()
    np.savez(file, poses=POSES, trans=TRANS)
    world, camera = (parse_npz(file.getvalue(), Options(frame=f), pelvis, 100, 1 << 20) for f in ("world", "camera"))
    as_posted, applied = (skeleton.root_transforms(s.rotations, s.translation) for s in (world, camera))
    np.testing.assert_allclose(applied, np.diag([1, -1, -1, 1]) @ as_posted, rtol=0, atol=1e-6)
    assert (world.frame, camera.frame) == ("world", "camera")
    with pytest.raises(errors.OptionInvalid):
        from_npz({"frame": "camera", "up_axis": "z"}, poses=POSES)


def motion_at(fps: float, count: int, target_fps: float | None, seed: int = 0) -> PoseSequence:
    rng = np.random.default_rng(seed)
    poses, trans = rng.normal(0, 1.0, (count, 72)), rng.normal(0, 1, (count, 3))
    return from_npz({"target_fps": target_fps}, poses=poses, trans=trans, fps=fps)


@settings(deadline=None, max_examples=40)
@given(fps=st.floats(0.5, 240), target=st.floats(0.5, 240), count=st.integers(1, 40), seed=st.integers(0, 1000))
def test_resampling_gives_rotations_between_the_posted_ones(fps: float, target: float, count: int, seed: int) -> None:
    try:
        sequence = motion_at(fps, count, target, seed)
    except errors.TooManyFrames:
        assert (count - 1) / fps * target > 99
        return
    posted = motion_at(fps, count, None, seed)
    duration = (count - 1) / fps
    assert (len(sequence) - 1) / target <= duration + 1e-6
    assert len(sequence) / target > duration - 1e-6
    rotations = sequence.rotations.astype(np.float64)
    gram = rotations @ rotations.swapaxes(-1, -2)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(3), gram.shape), rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(rotations), 1, rtol=0, atol=1e-5)
    np.testing.assert_allclose(sequence.rotations[0], posted.rotations[0], rtol=0, atol=1e-6)
    for n in range(len(sequence)):
        place = min(n / target * fps, count - 1)
        near = min(round(place), count - 1) if abs(place - round(place)) < 1e-5 else int(place)
        step, after = place - near, min(near + 1, count - 1)
        expected = posted.translation[near] + step * (posted.translation[after] - posted.translation[near])
        np.testing.assert_allclose(sequence.translation[n], expected, rtol=0, atol=1e-3)


def test_resampling_to_the_same_rate_is_the_identity() -> None:
    posted, again = motion_at(29.97, 20, None), motion_at(29.97, 20, 29.97)
    np.testing.assert_array_equal(posted.rotations, again.rotations)
    np.testing.assert_array_equal(posted.translation, again.translation)
    assert (again.fps, again.posted_fps) == (29.97, None)


def test_resampling_hits_posted_frames_and_halves_angles() -> None:
    posted, fewer = motion_at(120, 97, None), motion_at(120, 97, 30)
    np.testing.assert_allclose(fewer.rotations, posted.rotations[::4], rtol=0, atol=1e-6)
    assert (fewer.fps, fewer.posted_fps, len(fewer)) == (30, 120, 25)
    turn = np.zeros((2, 72))
    turn[:, 4] = [3.0, -3.0]  # 6 rad apart one way, 0.28 the other
    more = from_npz({"target_fps": 60}, poses=turn, fps=30)
    half = np.zeros((1, 24, 3))
    half[0, 1, 1] = np.pi
    np.testing.assert_allclose(more.rotations[1:2], axis_angle_to_matrix(half), rtol=0, atol=1e-6)


def test_half_way_in_time_is_half_way_in_angle() -> None:
    def angle(one: Any, other: Any) -> Any:
        trace = np.einsum("fjab,fjab->fj", one.astype(np.float64), other.astype(np.float64))
        return np.arccos(np.clip((trace - 1) / 2, -1, 1))

    posted, twice = motion_at(30, 30, None), motion_at(30, 30, 60)
    whole = angle(posted.rotations[:-1], posted.rotations[1:])
    np.testing.assert_allclose(angle(posted.rotations[:-1], twice.rotations[1::2]), whole / 2, rtol=0, atol=2e-3)
    np.testing.assert_allclose(angle(twice.rotations[1::2], posted.rotations[1:]), whole / 2, rtol=0, atol=2e-3)


def test_only_frames_that_are_used_are_looked_at() -> None:
    spoilt = np.tile(POSES, (3, 1))
    spoilt[[1, 2, 3, 5]] = np.nan
    assert len(from_npz({"every": 4}, poses=spoilt)) == 3
    with pytest.raises(errors.PoseNotFinite) as caught:
        from_npz({"every": 5}, poses=spoilt)
    assert caught.value.extra["frame"] == 5
    with pytest.raises(errors.OptionInvalid):
        from_npz({"every": 2, "target_fps": 15.0}, poses=POSES)


@pytest.mark.parametrize(("fps", "target"), [(1e-300, 1000.0), (1e-9, 1000.0), (1.0, 1000.0)])
def test_fault_37_a_rate_that_would_make_billions_of_frames(fps: float, target: float) -> None:
    with pytest.raises(errors.TooManyFrames):
        from_npz({"target_fps": target}, poses=POSES, fps=fps)


SMPL = {
    "codecVersion": np.int32(2), "smplVersion": np.int32(2), "gender": np.int32(0), "frameCount": np.int32(3),
    "frameRate": np.float32(60), "shapeParameters": np.zeros(10, np.float32),
    "bodyPose": POSES[:, :66].reshape(3, 22, 3).astype(np.float32), "bodyTranslation": TRANS.astype(np.float32),
}  # fmt: skip


def test_smpl_files() -> None:
    sequence, amass = from_npz(**SMPL), from_npz(poses=POSES[:, :66], trans=TRANS)
    np.testing.assert_allclose(sequence.rotations, amass.rotations, rtol=0, atol=1e-6)
    np.testing.assert_allclose(sequence.translation, amass.translation, rtol=0, atol=1e-6)
    assert (sequence.fps, sequence.warnings) == (60, ())
    first = SMPL | {"bodyPose": POSES.reshape(3, 24, 3).astype(np.float32), "smplVersion": np.int32(0)}
    del first["codecVersion"], first["frameRate"]  # as version 1 wrote it
    np.testing.assert_allclose(from_npz(**first).rotations, MATRICES, rtol=0, atol=1e-6)
    hands = from_npz(**SMPL, leftHandPose=np.zeros((3, 15, 3), np.float32), headPose=np.zeros((3, 3, 3), np.float32))
    assert len(hands.warnings) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"smplVersion": np.int32(5)},
        {"codecVersion": np.int32(3)},
        {"codecVersion": np.float32(1)},
        {"smplVersion": np.zeros(2, np.int32)},
        {"bodyPose": np.zeros((3, 20, 3), np.float32)},
        {"bodyTranslation": np.zeros((2, 3), np.float32)},
        {"frameRate": np.float32(np.nan)},
    ],
)
def test_smpl_files_that_are_not_poses(wrong: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidPose):
        from_npz(**SMPL | wrong)
