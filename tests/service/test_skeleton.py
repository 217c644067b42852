"""Forward kinematics against an independent reference, and the laws that serving relies on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.bundle.skeleton import SMPL_PARENTS, Skeleton, axis_angle_to_matrix

seeds = st.integers(0, 2**32 - 1)


def rotation_by_exponential(vector: np.ndarray) -> np.ndarray:
    """The matrix exponential as a power series: no Rodrigues, no sinc."""
    x, y, z = vector
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    term, total = np.eye(3), np.eye(3)
    for n in range(1, 60):
        term = term @ cross / n
        total = total + term
    return total


def world_frame(skeleton: Skeleton, rotations: np.ndarray, joint: int) -> np.ndarray:
    """Joint -> pelvis-rooted world, one joint at a time, from offsets between joints instead of positions."""
    parent, frame = SMPL_PARENTS[joint], np.eye(4)
    frame[:3, :3] = rotations[joint]
    frame[:3, 3] = skeleton.rest_joints[joint]
    if parent < 0:
        return frame
    frame[:3, 3] -= skeleton.rest_joints[parent]
    return world_frame(skeleton, rotations, parent) @ frame


def reference_bone(skeleton: Skeleton, pose: np.ndarray, joint: int) -> np.ndarray:
    posed, canonical = (
        world_frame(skeleton, np.array([rotation_by_exponential(v) for v in vectors]), joint)
        for vectors in (pose, skeleton.canonical_pose.astype(np.float64))
    )
    return posed @ np.linalg.inv(canonical)


@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_bone_transforms_agree_with_naive_recursion(skeleton: Skeleton, seed: int) -> None:
    pose = np.random.default_rng(seed).normal(0, 0.8, (24, 3))
    bones = skeleton.bone_transforms(axis_angle_to_matrix(pose[None]))[0]
    pose[0] = 0  # the root never reaches a bone
    expected = np.stack([reference_bone(skeleton, pose, joint) for joint in range(24)])
    np.testing.assert_allclose(bones, expected, rtol=0, atol=2e-6)


@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_root_and_bones_compose_to_the_whole_pose(skeleton: Skeleton, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pose, shift = rng.normal(0, 0.8, (24, 3)), rng.normal(0, 2, 3)
    matrices = axis_angle_to_matrix(pose[None])
    whole = skeleton.root_transforms(matrices, shift[None])[0] @ skeleton.bone_transforms(matrices)[0]
    expected = np.stack([reference_bone(skeleton, pose, joint) for joint in range(24)])
    expected[:, :3, 3] += shift
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_root_motion_commutes(skeleton: Skeleton, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pose, turn = rng.normal(0, 0.8, (24, 3)), axis_angle_to_matrix(rng.normal(0, 1, 3))
    first = axis_angle_to_matrix(pose[None])
    second = first.copy()
    second[:, 0] = turn @ first[:, 0]
    np.testing.assert_array_equal(skeleton.bone_transforms(first), skeleton.bone_transforms(second))
    pelvis, shift = skeleton.rest_joints[0].astype(np.float64), rng.normal(0, 2, 3)
    before, after = (skeleton.root_transforms(m, np.zeros((1, 3)))[0].astype(np.float64) for m in (first, second))
    moved = np.eye(4)
    moved[:3, :3], moved[:3, 3] = turn, pelvis - turn @ pelvis
    np.testing.assert_allclose(after, moved @ before, rtol=0, atol=1e-6)
    shifted = skeleton.root_transforms(first, shift[None])[0]
    np.testing.assert_allclose(shifted[:3, 3], before[:3, 3] + shift, rtol=0, atol=1e-6)


def test_canonical_pose_gives_identity_bones(skeleton: Skeleton) -> None:
    bones = skeleton.bone_transforms(axis_angle_to_matrix(skeleton.canonical_pose[None]))
    np.testing.assert_allclose(bones, np.tile(np.eye(4), (1, 24, 1, 1)), rtol=0, atol=1e-7)
    assert np.abs(skeleton.canonical_pose).max() > 0.5  # the legs are opened, so this says something


def test_canonical_joints_are_the_recursion_s(skeleton: Skeleton) -> None:
    canonical = np.array([rotation_by_exponential(v) for v in skeleton.canonical_pose.astype(np.float64)])
    expected = np.stack([world_frame(skeleton, canonical, joint)[:3, 3] for joint in range(24)])
    np.testing.assert_allclose(skeleton.canonical_joints(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-6, 1.0, np.pi, 2 * np.pi, 12.0])
def test_axis_angle_is_the_exponential(angle: float) -> None:
    vector = angle * np.array([0.6, -0.48, 0.64])
    np.testing.assert_allclose(axis_angle_to_matrix(vector), rotation_by_exponential(vector), rtol=0, atol=1e-9)


def test_of_many_vectors_each_gets_the_matrix_that_it_has_alone() -> None:
    vectors = np.random.default_rng(0).normal(0, 1, (230, 9, 3))  # more than are computed together
    matrices = axis_angle_to_matrix(vectors)
    for at in ((0, 0), (113, 8), (227, 4), (227, 5), (229, 8)):
        np.testing.assert_allclose(matrices[at], axis_angle_to_matrix(vectors[at]), rtol=0, atol=1e-15)
    np.testing.assert_allclose(
        matrices @ matrices.swapaxes(-1, -2), np.broadcast_to(np.eye(3), matrices.shape), atol=1e-14
    )
