"""BVH: joints by name or by map, units where they are clear, and rest poses that are no T-pose."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.bundle.skeleton import SMPL_JOINT_NAMES, Skeleton, axis_angle_to_matrix
from service.convert.bvh import BvhError, read_bvh, smpl_motion
from tests.service.convert.conftest import as_bvh, matrices

MIXAMO = {
    "pelvis": "Hips", "left_hip": "LeftUpLeg", "right_hip": "RightUpLeg", "spine1": "Spine", "left_knee": "LeftLeg",
    "right_knee": "RightLeg", "spine2": "Spine1", "left_ankle": "LeftFoot", "right_ankle": "RightFoot",
    "spine3": "Spine2", "left_foot": "LeftToeBase", "right_foot": "RightToeBase", "neck": "Neck",
    "left_collar": "LeftShoulder", "right_collar": "RightShoulder", "head": "Head", "left_shoulder": "LeftArm",
    "right_shoulder": "RightArm", "left_elbow": "LeftForeArm", "right_elbow": "RightForeArm",
    "left_wrist": "LeftHand", "right_wrist": "RightHand",
}  # fmt: skip


def renamed(text: str, names: dict[str, str]) -> str:
    lines = [line.split() for line in text.splitlines()]
    return "\n".join(
        " ".join([*words[:-1], names.get(words[-1], words[-1])] if words[0] in ("ROOT", "JOINT") else words)
        for words in lines
    )


@pytest.mark.parametrize("prefix", ["", "mixamorig:"])
def test_common_names_are_known(skeleton: Any, walk: Any, prefix: str) -> None:
    text = renamed(as_bvh(skeleton, walk), {name: prefix + other for name, other in MIXAMO.items()})
    rotations, translation, said = smpl_motion(read_bvh(text), None, None, False)
    np.testing.assert_allclose(rotations, matrices(walk), rtol=0, atol=1e-6)
    np.testing.assert_allclose(translation, walk["trans"], rtol=0, atol=1e-6)
    assert f"left_shoulder={prefix}LeftArm" in said[0]


def test_a_map_names_what_is_not_known(skeleton: Any, walk: Any, tmp_path: Path) -> None:
    strange = {name: f"bone_{n}" for n, name in enumerate(SMPL_JOINT_NAMES)}
    bvh = read_bvh(renamed(as_bvh(skeleton, walk), strange))
    with pytest.raises(BvhError, match=r"no joint found for pelvis, left_hip.*--joint-map"):
        smpl_motion(bvh, None, None, False)
    rotations, _, _ = smpl_motion(bvh, strange, None, False)
    np.testing.assert_allclose(rotations, matrices(walk), rtol=0, atol=1e-6)
    with pytest.raises(BvhError, match="has no joint elbow"):
        smpl_motion(bvh, strange | {"left_elbow": "elbow"}, None, False)
    from service.convert.bvh import read_joint_map

    (tmp_path / "map.json").write_text(json.dumps({"left_elbo": "x"}))
    with pytest.raises(BvhError, match="left_elbo"):
        read_joint_map(tmp_path / "map.json")


def test_units_that_are_not_clear_are_asked_for(skeleton: Any, walk: Any) -> None:
    small = Skeleton.smpl(0.2 * skeleton.rest_joints)  # legs of 15 "centimetres"
    with pytest.raises(BvhError, match="the units are not clear"):
        smpl_motion(read_bvh(as_bvh(small, walk)), None, None, False)
    _, translation, _ = smpl_motion(read_bvh(as_bvh(small, walk)), None, "cm", False)
    np.testing.assert_allclose(translation, walk["trans"], rtol=0, atol=1e-6)


def test_a_rest_pose_that_is_no_t_pose_is_turned_onto_it_when_asked(skeleton: Any, walk: Any) -> None:
    """An A-pose: the arms of the file hang by 45 degrees, and its rotations are relative to that."""
    names, rest = list(SMPL_JOINT_NAMES), skeleton.rest_joints.astype(np.float64).copy()
    straight = rest.copy()
    for side, sign in (("left", 1.0), ("right", -1.0)):
        arm = [names.index(f"{side}_{part}") for part in ("shoulder", "elbow", "wrist", "hand")]
        lengths = np.linalg.norm(np.diff(rest[arm], axis=0), axis=1)
        for n, length in enumerate(lengths):  # arms exactly along x, so that the expectation is exact
            straight[arm[n + 1]] = straight[arm[n]] + [sign * length, 0, 0]
        hip, knee, ankle, foot = (names.index(f"{side}_{part}") for part in ("hip", "knee", "ankle", "foot"))
        straight[knee] = straight[hip] + [0, -np.linalg.norm(rest[knee] - rest[hip]), 0]
        straight[ankle] = straight[knee] + [0, -np.linalg.norm(rest[ankle] - rest[knee]), 0]
        straight[foot] = straight[ankle] + rest[foot] - rest[ankle]
    lowered, turned = straight.copy(), matrices(walk)
    for side, sign in (("left", -1.0), ("right", 1.0)):
        arm = [names.index(f"{side}_{part}") for part in ("shoulder", "elbow", "wrist", "hand")]
        drop = axis_angle_to_matrix(np.array([0, 0, sign * np.pi / 4]))
        lowered[arm] = (straight[arm] - straight[arm[0]]) @ drop.T + straight[arm[0]]
        # World rotation W' = W R^T: at the shoulder the parent's is unchanged, further down both change.
        turned[:, arm[0]] = turned[:, arm[0]] @ drop.T
        for joint in arm[1:3]:
            turned[:, joint] = drop @ turned[:, joint] @ drop.T
        turned[:, arm[3]] = drop @ turned[:, arm[3]] @ drop.T
    from service.rotations import axis_angle

    text = as_bvh(Skeleton.smpl(lowered), {"poses": axis_angle(turned).reshape(-1, 72), "trans": walk["trans"]})
    with pytest.raises(BvhError, match=r"left_shoulder is 45 degrees off SMPL's T-pose: --align"):
        smpl_motion(read_bvh(text), None, None, False)
    rotations, _, _ = smpl_motion(read_bvh(text), None, None, True)
    hands = [names.index("left_hand"), names.index("right_hand")]
    body = [joint for joint in range(24) if joint not in hands]
    np.testing.assert_allclose(rotations[:, body], matrices(walk)[:, body], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "text",
    ["", "HIERARCHY\nROOT", "solid x", "HIERARCHY\nROOT a\n{\nOFFSET 0 0\n}\nMOTION\nFrames: 1\nFrame Time: 1\n"],
)
def test_what_is_no_bvh_is_refused(text: str) -> None:
    with pytest.raises(BvhError):
        read_bvh(text)


def test_too_few_numbers_are_refused(skeleton: Any, walk: Any) -> None:
    with pytest.raises(BvhError, match="expected 6 frames of 75 numbers"):
        read_bvh(as_bvh(skeleton, walk).rsplit(maxsplit=1)[0])
