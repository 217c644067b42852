"""Motions: seeded, slow, on the floor, arms off the torso, and nothing held out that was not trained on."""

import numpy as np
import pytest

from service.bundle.skeleton import SMPL_JOINT_NAMES, axis_angle_to_matrix
from training.data.body import open_body
from training.data.motion import MOVES, SECONDS_BETWEEN_FRAMES, Motion, demo_motion, make_motions, pose_from_channels

SKELETON = open_body().skeleton
FINE = 6
"""Frames in which the laws of a motion are looked for, from one of the 15 of the open subject's to the next."""
JOINT = {name: index for index, name in enumerate(SMPL_JOINT_NAMES)}


@pytest.fixture(scope="module")
def motions() -> list[Motion]:
    demo = demo_motion(SKELETON)
    show = Motion("demo", "test", demo["poses"].reshape(-1, 24, 3), demo["trans"])
    return [*make_motions(SKELETON, frames=14 * FINE + 1), show]


def posed_joints(motion: Motion) -> np.ndarray:
    transforms = open_body().transforms(motion.pose, motion.translation)
    joints = SKELETON.rest_joints
    return np.einsum("fjab,jb->fja", transforms[..., :3, :3], joints) + transforms[..., :3, 3]


def test_there_is_something_to_train_on_and_something_held_out(motions: list[Motion]) -> None:
    splits = {motion.name: motion.split for motion in motions}
    assert len(splits) == len(MOVES) + 1 >= 11
    assert {name for name, split in splits.items() if split == "test"} == {"lunge", "dance", "demo"}
    for motion in motions:
        assert np.isfinite(motion.pose).all()
        assert np.isfinite(motion.translation).all()
        assert len(motion.pose) == (150 if motion.name == "demo" else 14 * FINE + 1)


def test_the_seed_decides() -> None:
    first, again, other = (make_motions(SKELETON, seed=seed, frames=5) for seed in (4, 4, 5))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a.pose, b.pose)
        np.testing.assert_array_equal(a.translation, b.translation)
        assert np.abs(a.pose - c.pose).max() > 1e-5


def test_few_frames_stand_where_many_do() -> None:
    for few, many in zip(make_motions(SKELETON, frames=5), make_motions(SKELETON, frames=17), strict=True):
        np.testing.assert_allclose(few.pose, many.pose[::4], atol=1e-12)
        np.testing.assert_allclose(few.translation, many.translation[::4], atol=0.005)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_held_out_is_a_new_combination_and_not_a_new_range(motions: list[Motion], seed: int) -> None:
    made = make_motions(SKELETON, seed=seed, frames=14 * FINE + 1)
    trained = np.concatenate([motion.pose for motion in made if motion.split == "train"])
    low, high = trained.min(0), trained.max(0)
    tolerance = np.radians(4)
    for motion in [*(motion for motion in made if motion.split == "test"), motions[-1]]:
        assert (motion.pose > low - tolerance).all(), motion.name
        assert (motion.pose < high + tolerance).all(), motion.name
        moving = np.ptp(motion.pose, axis=0) > np.radians(2)
        assert (np.ptp(trained, axis=0)[moving] > np.radians(2)).all()


def test_hands_and_toes_stay_still(motions: list[Motion]) -> None:
    still = [JOINT[f"{side}_{part}"] for side in ("left", "right") for part in ("wrist", "hand", "foot")]
    assert all((motion.pose[:, still] == 0).all() for motion in motions)


def test_elbows_stay_off_the_torso(motions: list[Motion]) -> None:
    pressed = pose_from_channels({"l_arm_down": [90.0], "r_arm_down": [90.0]})  # a wish that is not granted
    for motion in [*motions, Motion("pressed", "train", pressed, np.zeros((1, 3)))]:
        joints = posed_joints(motion)
        transforms = open_body().transforms(motion.pose, motion.translation)
        downwards = -transforms[:, JOINT["spine3"], :3, 1]
        for side in ("left", "right"):
            arm = joints[:, JOINT[f"{side}_elbow"]] - joints[:, JOINT[f"{side}_shoulder"]]
            cosine = np.einsum("fa,fa->f", arm, downwards) / np.linalg.norm(arm, axis=1)
            assert np.degrees(np.arccos(cosine)).min() > 20, motion.name


def test_everyone_stands_on_the_floor_without_sliding(motions: list[Motion]) -> None:
    body = open_body()
    for motion in motions:
        transforms = body.transforms(motion.pose, motion.translation)
        lowest = np.array([body.posed(transforms[frame])[:, 1].min() for frame in range(0, len(motion.pose), 14)])
        assert lowest.min() > -0.05, motion.name
        assert lowest.max() < 0.02, motion.name


def test_a_walk_goes_forward_with_arms_against_the_legs(motions: list[Motion]) -> None:
    walk = motions[0]
    assert walk.name == "walk"
    assert walk.translation[-1, 2] - walk.translation[0, 2] > 1.0
    joints = posed_joints(walk) - posed_joints(walk)[:, :1]
    hand, foot = joints[:, JOINT["left_wrist"], 2], joints[:, JOINT["left_ankle"], 2]
    assert np.corrcoef(hand, foot)[0, 1] < -0.7
    assert np.corrcoef(joints[:, JOINT["right_ankle"], 2], foot)[0, 1] < -0.7


def test_nothing_moves_fast(motions: list[Motion]) -> None:
    for motion in motions[:-1]:
        step_s = SECONDS_BETWEEN_FRAMES / FINE
        speed = np.linalg.norm(np.diff(posed_joints(motion), axis=0), axis=2) / step_s
        assert speed.max() < 3.0, motion.name
        assert np.linalg.norm(np.diff(motion.translation, axis=0), axis=1).max() / step_s < 1.0, motion.name


def test_the_show_has_different_poses_and_no_jumps(motions: list[Motion]) -> None:
    show = motions[-1]
    rotations = axis_angle_to_matrix(show.pose)
    relative = np.einsum("fjab,fjac->fjbc", rotations[:-1], rotations[1:])
    angle = np.arccos(((np.trace(relative, axis1=2, axis2=3) - 1) / 2).clip(-1, 1))
    assert np.degrees(angle).max() < 15
    chosen: list[np.ndarray] = []
    for pose in show.pose[:, 1:]:
        if all(np.abs(pose - other).max() > np.radians(30) for other in chosen):
            chosen.append(pose)
    assert len(chosen) >= 6


def test_sides_mirror_each_other() -> None:
    mirror = np.array([1.0, -1, -1])  # axis-angle seen in a mirror at x = 0
    for channel, value in {"arm_down": 20, "arm_front": 30, "arm_turn": 25, "elbow": 40, "hip_front": 50,
                           "hip_side": 20, "hip_turn": 15, "knee": 60, "ankle": 10}.items():  # fmt: skip
        left, right = (pose_from_channels({f"{side}_{channel}": [value]})[0] for side in "lr")
        for name, index in JOINT.items():
            other = name.replace("left", "?").replace("right", "left").replace("?", "right")
            np.testing.assert_allclose(left[index], right[JOINT[other]] * mirror, atol=1e-12, err_msg=channel)


def test_an_unknown_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="got l_wing"):
        pose_from_channels({"l_wing": [1.0]})
