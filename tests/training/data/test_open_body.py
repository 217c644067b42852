"""The export of the open body, on a small rig: the script itself needs Anny, which is not installed here."""

import numpy as np
import pytest

from service.bundle.skeleton import SMPL_JOINT_NAMES, SMPL_PARENTS
from training.data.body import open_body
from training.data.open_body import BUNDLES, SMPL_BONES, collapse


def test_collapsing_a_rig_straightens_limbs_and_keeps_lengths() -> None:
    stands_for = {bone: joint for joint, bone in SMPL_BONES.items()}
    stands_for |= {bone: joint for joint, bundle in BUNDLES.items() for bone in bundle}
    stands_for |= {"finger1-1.L": "left_hand", "finger1-1.R": "right_hand"}
    names = list(stands_for)
    rng = np.random.default_rng(0)
    at = open_body().skeleton.rest_joints.astype(np.float64) + rng.normal(0, 0.03, (24, 3))  # limbs are bent
    joint_of = np.array([SMPL_JOINT_NAMES.index(stands_for[name]) for name in names])
    heads = at[joint_of] @ np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]) + [3.0, 2, 1]  # z up, somewhere
    names.append("tip")  # a bone of no joint follows its parent
    heads = np.concatenate([heads, heads[:1]])
    parents = [-1] * len(joint_of) + [names.index("head")]
    bones = np.array([[bone] for bone in range(len(names))])
    vertices, joints, weights = collapse(heads, heads, names, parents, bones, np.ones((len(names), 1)))

    np.testing.assert_array_equal(weights.argmax(1), [*joint_of, SMPL_JOINT_NAMES.index("head")])
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(joints[0], 0, atol=1e-12)
    np.testing.assert_allclose(vertices[: len(joint_of)], joints[joint_of], atol=1e-12)  # heads travel with joints
    for joint, parent in enumerate(SMPL_PARENTS[1:], start=1):
        bone, before = joints[joint] - joints[parent], at[joint] - at[parent]
        assert np.linalg.norm(bone) == pytest.approx(np.linalg.norm(before))
        sign = 1 if SMPL_JOINT_NAMES[joint].startswith("left") else -1
        if SMPL_JOINT_NAMES[joint].endswith(("elbow", "wrist", "hand")):
            np.testing.assert_allclose(bone / np.linalg.norm(bone), [sign, 0, 0], atol=1e-9)
        elif SMPL_JOINT_NAMES[joint].endswith(("knee", "ankle")):
            np.testing.assert_allclose(bone / -bone[1], [sign * 0.09, -1, 0], atol=1e-9)
        else:
            np.testing.assert_allclose(bone, before, atol=1e-9)
