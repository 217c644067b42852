"""Procedural motions on the 24 SMPL joints: what the open subject performs, and a show for the demo.

A motion is a handful of named channels (angles in degrees over time) turned into joint rotations.  Arms stay off the
torso, as they would catch the cloth, and hands stay still.  The held-out sequences combine, within its range, what most
training sequences do one thing at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation

from service.bundle.skeleton import SMPL_JOINT_NAMES, Skeleton, axis_angle_to_matrix
from training.data.subject import Split

Angles = NDArray[np.float64]
Channels = dict[str, Angles]
"""Angle in degrees, (F,), of each named degree of freedom; one that is not named is at its neutral value."""

SIDE_CHANNELS = ("arm_down", "arm_front", "arm_turn", "elbow", "hip_front", "hip_side", "hip_turn", "knee", "ankle")
"""One for each side, with prefix `l_` or `r_`, positive to the same effect on either side: upper arm below the
horizontal, reach to the front, forearm turned upwards, elbow bend; thigh to the front, outwards, toes outwards, knee
bend, toes up."""
BODY_CHANNELS = ("twist", "bend_side", "bend_front", "head_turn", "head_nod", "heading", "lean")
"""Torso to the left and to the front, spread over the spine; head; `heading` and `lean` turn the root."""
NEUTRAL = {"arm_down": 60.0, "elbow": 14.0}
SECONDS_BETWEEN_FRAMES = 0.6
STEPS_BETWEEN_FRAMES = 36
"""In such steps the root is followed over the floor, or standing feet would slide."""
ARM_DOWN_LIMIT_DEG = 66.0
"""Upper arms come no lower than this below the horizontal: 24 degrees off an upright torso."""
_JOINT = {name: index for index, name in enumerate(SMPL_JOINT_NAMES)}


@dataclass(frozen=True)
class Motion:
    """Poses in order."""

    name: str
    split: Split
    pose: NDArray[np.float64]
    """(F, 24, 3), axis-angle, radians."""
    translation: NDArray[np.float64]
    """(F, 3), metres: the lower foot stands on the floor y = 0 and does not slide."""


def pose_from_channels(channels: Mapping[str, ArrayLike]) -> NDArray[np.float64]:
    """(F, 24, 3) axis-angle of named angles in degrees.

    Raises:
        ValueError: a name is not that of a channel.
    """
    known = {f"{side}_{name}" for side in "lr" for name in SIDE_CHANNELS} | set(BODY_CHANNELS)
    if unknown := sorted(set(channels) - known):
        raise ValueError(f"expected channels among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    frames = max((np.size(values) for values in channels.values()), default=1)

    def angle(name: str) -> Angles:
        neutral = NEUTRAL.get(name[2:], 0.0) if name not in BODY_CHANNELS else 0.0
        return np.deg2rad(np.broadcast_to(np.asarray(channels.get(name, neutral), np.float64), (frames,)))

    joints: dict[str, Rotation] = {}
    for prefix, side, sign in (("l_", "left", 1.0), ("r_", "right", -1.0)):
        down = np.minimum(angle(prefix + "arm_down"), np.deg2rad(ARM_DOWN_LIMIT_DEG))
        front = angle(prefix + "arm_front")
        # The collar takes a share of a raise above the horizontal and of a reach to the front.
        collar_down, collar_front = 0.3 * np.minimum(down, 0.0), 0.15 * front
        joints[f"{side}_collar"] = _about("z", -sign * collar_down) * _about("y", -sign * collar_front)
        joints[f"{side}_shoulder"] = (
            _about("z", -sign * (down - collar_down))
            * _about("y", -sign * (front - collar_front))
            * _about("x", -angle(prefix + "arm_turn"))
        )
        joints[f"{side}_elbow"] = _about("y", -sign * angle(prefix + "elbow"))
        joints[f"{side}_hip"] = (
            _about("z", sign * angle(prefix + "hip_side"))
            * _about("x", -angle(prefix + "hip_front"))
            * _about("y", sign * angle(prefix + "hip_turn"))
        )
        joints[f"{side}_knee"] = _about("x", angle(prefix + "knee"))
        joints[f"{side}_ankle"] = _about("x", -angle(prefix + "ankle"))
    for joint, share in (("spine1", 0.35), ("spine2", 0.35), ("spine3", 0.3)):
        turn = _about("y", share * angle("twist")) * _about("z", -share * angle("bend_side"))
        joints[joint] = turn * _about("x", share * angle("bend_front"))
    for joint, share in (("neck", 0.4), ("head", 0.6)):
        joints[joint] = _about("y", share * angle("head_turn")) * _about("x", share * angle("head_nod"))
    joints["pelvis"] = _about("y", angle("heading")) * _about("x", angle("lean"))

    pose = np.zeros((frames, 24, 3))
    for name, rotation in joints.items():
        pose[:, _JOINT[name]] = rotation.as_rotvec()
    return pose


def make_motions(
    skeleton: Skeleton, *, seed: int = 0, frames: int = 15, names: tuple[str, ...] | None = None
) -> list[Motion]:
    """The open subject's sequences, each of `frames` poses."""
    motions = []
    for number, (name, (split, make)) in enumerate(MOVES.items()):
        if names is not None and name not in names:
            continue
        rng = np.random.default_rng([seed, number])
        u = np.linspace(0.0, 1.0, (frames - 1) * STEPS_BETWEEN_FRAMES + 1)
        # Training sequences vary by a few per cent; the held-out ones stay below them.
        gain = rng.uniform(0.97, 1.08) if split == "train" else rng.uniform(0.88, 0.94)
        channels = make(u, gain, rng)
        stance = channels.pop("stance", None)
        pose = pose_from_channels(channels)
        translation = standing_translation(skeleton, pose, stance)
        motions.append(Motion(name, split, pose[::STEPS_BETWEEN_FRAMES], translation[::STEPS_BETWEEN_FRAMES]))
    return motions


def demo_motion(skeleton: Skeleton, frames: int = 150) -> dict[str, NDArray[np.float64]]:
    """A show at 30 fps as AMASS-like arrays: steps, arms raised, squat, lunge, twists and a kick."""
    time = np.linspace(0.0, 1.0, frames)
    walking = _envelope(time, 0.0, 0.26)
    channels = {name: walking * values for name, values in _walk(time / 0.26 * 0.9, 0.95).items()}
    channels["l_arm_down"] = channels["r_arm_down"] = np.full(frames, NEUTRAL["arm_down"])
    for side in "lr":
        channels[f"{side}_elbow"] = NEUTRAL["elbow"] + walking * (channels[f"{side}_elbow"] - NEUTRAL["elbow"])
    keys = [
        (0.34, _key(arms=-48, elbow=10)),
        (0.47, _squat_key(0.95)),
        (0.60, _lunge_key(0.95) | {"twist": 0.0}),
        (0.70, _key(arms=15, elbow=25) | {"twist": 36.0, "head_turn": 24.0}),
        (0.79, _key(arms=12, elbow=25) | {"twist": -36.0, "head_turn": -24.0, "bend_side": 0.0}),
        (0.90, _key(arms=30, elbow=25) | {"r_hip_front": 70.0, "r_knee": 12.0, "l_knee": 8.0, "l_hip_front": 5.0}),
        (1.00, _key(arms=NEUTRAL["arm_down"], elbow=NEUTRAL["elbow"])),
    ]
    times = np.array([0.0, 0.26, *(at for at, _ in keys)])
    for name in {name for _, key in keys for name in key}:
        rest = NEUTRAL.get(name[2:], 0.0)
        values = [0.0, 0.0, *(key.get(name, rest) - rest for _, key in keys)]
        channels[name] = channels.get(name, np.full(frames, rest)) + PchipInterpolator(times, values)(time)
    smooth = {name: gaussian_filter1d(values, 2.0, mode="nearest") for name, values in channels.items()}
    pose = pose_from_channels(smooth)
    translation = standing_translation(skeleton, pose)
    return {"poses": pose.reshape(frames, 72), "trans": translation, "mocap_framerate": np.array(30.0)}


def standing_translation(
    skeleton: Skeleton, pose: NDArray[np.float64], stance: Angles | None = None
) -> NDArray[np.float64]:
    """(F, 3): root translation that keeps the standing foot on the floor y = 0 without sliding.

    The standing foot is the lower one, or by `stance` (F,): 1 the left, 0 the right.
    """
    joints = skeleton.rest_joints.astype(np.float64)
    posed = skeleton._rest_to_posed(axis_angle_to_matrix(pose))
    soles = []  # (F, 3) each: heel and toes of either foot
    sole_y = joints[[_JOINT["left_foot"], _JOINT["right_foot"]], 1].min() - 0.027
    for side in ("left", "right"):
        ankle, foot = joints[_JOINT[f"{side}_ankle"]], joints[_JOINT[f"{side}_foot"]]
        transform = posed[:, _JOINT[f"{side}_ankle"]]
        for x, z in ((ankle[0], ankle[2] - 0.05), (foot[0], foot[2] + 0.05)):
            soles.append(transform[:, :3, :3] @ [x, sole_y, z] + transform[:, :3, 3])
    points = np.stack(soles, 1)  # (F, 4, 3)
    height = points[..., 1] - points[..., 1].min(1, keepdims=True)
    if stance is not None:  # 10 cm of handicap decides
        height = height + 0.1 * np.stack([1 - stance, 1 - stance, stance, stance], 1)
        height -= height.min(1, keepdims=True)
    weights = np.exp(-height / 0.006)
    weights /= weights.sum(1, keepdims=True)
    steps = np.einsum("fp,fpx->fx", (weights[1:] + weights[:-1]) / 2, points[1:] - points[:-1])
    translation = np.zeros((len(pose), 3))
    translation[1:] = -np.cumsum(steps, axis=0)
    translation[:, 1] = -np.einsum("fp,fp->f", weights, points[..., 1])
    return translation


def _about(axis: str, angle: Angles) -> Rotation:
    return Rotation.from_euler(axis.upper(), np.asarray(angle)[:, None])


def _sine(u: Angles, cycles: float, phase: float = 0.0) -> Angles:
    return np.sin(2 * np.pi * (cycles * u + phase))


def _bump(u: Angles, start: float, end: float) -> Angles:
    """0 at `start`, 1 half way, 0 at `end` and outside."""
    t = np.clip((u - start) / (end - start), 0.0, 1.0)
    return 0.5 - 0.5 * np.cos(2 * np.pi * t)


def _envelope(u: Angles, start: float, end: float) -> Angles:
    """1 inside, falling smoothly to 0 over the last third before `end`."""
    t = np.clip((end - u) / ((end - start) / 3), 0.0, 1.0)
    return t * t * (3 - 2 * t)


def _flat_feet(channels: Channels, sides: str = "lr") -> Channels:
    """Turn the ankles so that the soles stay level, as far as ankles go."""
    for side in sides:
        pitch = channels.get(f"{side}_knee", 0.0) - channels.get(f"{side}_hip_front", 0.0)
        channels[f"{side}_ankle"] = np.clip(pitch + channels.get("lean", 0.0), -25.0, 25.0)
    return channels


def _step(phase: Angles, peak: float, width: float) -> Angles:
    """1 where the phase passes `peak` (rad), 0 elsewhere, periodic."""
    return np.exp((np.cos(phase - peak) - 1) / width**2)


def _walk(u: Angles, gain: float, rng: np.random.Generator | None = None) -> Channels:
    channels: Channels = {}
    for side, offset in (("l", 0.0), ("r", np.pi)):
        p = 2 * np.pi * 1.5 * u + offset
        channels[f"{side}_hip_front"] = gain * (6 + 23 * np.sin(p))
        channels[f"{side}_knee"] = 6 + gain * (48 * _step(p, -0.7, 0.75) + 7 * _step(p, 2.3, 0.6))
        channels[f"{side}_ankle"] = gain * (8 * _step(p, 0.9, 0.8) - 16 * _step(p, -1.6, 0.55))
        channels[f"{side}_arm_front"] = gain * (4 - 24 * np.sin(p))
        channels[f"{side}_arm_down"] = np.full_like(u, 62.0)
        channels[f"{side}_elbow"] = 24 - gain * 12 * np.sin(p)
    channels["twist"] = gain * 7 * _sine(u, 1.5)
    channels["bend_front"] = np.full_like(u, 3.0)
    return channels


def _march(u: Angles, gain: float, rng: np.random.Generator) -> Channels:
    channels: Channels = {}
    for side, offset in (("l", 0.0), ("r", 0.5)):
        lift = np.clip(_sine(u, 2.0, offset), 0, None) ** 1.5
        channels[f"{side}_hip_front"] = gain * 78 * lift
        channels[f"{side}_knee"] = 5 + gain * 88 * lift
        channels[f"{side}_ankle"] = -gain * 12 * lift
        channels[f"{side}_arm_front"] = gain * (5 - 38 * _sine(u, 2.0, offset))
        channels[f"{side}_arm_down"] = np.full_like(u, 56.0)
        channels[f"{side}_elbow"] = 45 - gain * 25 * _sine(u, 2.0, offset)
        channels[f"{side}_hip_turn"] = gain * 8 * lift
    channels["twist"] = gain * 8 * _sine(u, 2.0)
    return channels


def _arm_raise(u: Angles, gain: float, rng: np.random.Generator) -> Channels:
    sideways = _bump(u, 0.0, 0.45)
    channels: Channels = {"head_nod": -gain * 15 * sideways}
    for side, start in (("l", 0.38), ("r", 0.5)):
        forward = _bump(u, start, start + 0.5)
        channels[f"{side}_arm_down"] = 62 - gain * (115 * sideways + 50 * forward)
        channels[f"{side}_arm_front"] = gain * 78 * forward
        channels[f"{side}_elbow"] = 12 + gain * 20 * forward
        channels[f"{side}_arm_turn"] = gain * 25 * sideways
    return channels


def _arm_circles(u: Angles, gain: float, rng: np.random.Generator) -> Channels:
    channels: Channels = {}
    for side, phase in (("l", 0.0), ("r", 0.18 + rng.uniform(-0.04, 0.04))):
        channels[f"{side}_arm_down"] = 12 + gain * 46 * _sine(u, 1.5, phase + 0.25)
        channels[f"{side}_arm_front"] = gain * (14 + 40 * _sine(u, 1.5, phase))
        channels[f"{side}_arm_turn"] = gain * 35 * _sine(u, 1.0, phase)
        channels[f"{side}_elbow"] = 30 - gain * 20 * _sine(u, 1.0, phase + 0.25)
    return channels


def _twist(u: Angles, gain: float, rng: np.random.Generator) -> Channels:
    turn = _sine(u, 1.25)
    channels: Channels = {"twist": gain * 40 * turn, "head_turn": gain * 28 * _sine(u, 1.25, -0.05)}
    channels["heading"] = gain * 10 * turn
    for side, sign in (("l", 1.0), ("r", -1.0)):
        channels[f"{side}_arm_down"] = 44 - gain * 12 * _sine(u, 2.0)
        channels[f"{side}_arm_front"] = gain * (20 - sign * 22 * turn)
        channels[f"{side}_elbow"] = 40 + gain * 25 * _sine(u, 2.0, 0.3)
        channels[f"{side}_arm_turn"] = -gain * 25 * _bump(u, 0.1, 0.9)
        channels[f"{side}_hip_side"] = np.full_like(u, 8.0)
        channels[f"{side}_hip_turn"] = gain * (8 - sign * 8 * turn)
    return channels


def _side_bend(u: Angles, gain: float, rng: np.random.Generator) -> Channels:
    side_to_side = np.where(u < 0.6, _sine(u, 1 / 0.6), 0.0)
    channels: Channels = {"bend_side": gain * 28 * side_to_side, "head_turn": gain * 10 * side_to_side}
    forward = _bump(u, 0.6, 1.05)
    channels["bend_front"] = gain * (36 * forward - 12 * _bump(u, 0.45, 0.65))
    channels["head_nod"] = gain * 20 * forward
    for side, sign in (("l", -1.0), ("r", 1.0)):
        lifted = np.clip(sign * side_to_side, 0, None)
        channels[f"{side}_arm_down"] = 58 - gain * 105 * lifted - gain * 20 * forward
        channels[f"{side}_arm_front"] = gain * 25 * forward
        channels[f"{side}_elbow"] = 14 + gain * 25 * lifted
        channels[f"{side}_hip_side"] = np.full_like(u, 9.0)
    return channels


def _squat_key(depth: float) -> dict[str, float]:
    key = {"lean": 24 * depth, "bend_front": 12 * depth}
    for side in "lr":
        key |= {
            f"{side}_hip_front": 98 * depth, f"{side}_knee": 98 * depth, f"{side}_ankle": 24 * depth,
            f"{side}_hip_side": 8 + 14 * depth, f"{side}_hip_turn": 12 * depth, f"{side}_arm_front": 62 * depth,
            f"{side}_arm_down": NEUTRAL["arm_down"] - 42 * depth, f"{side}_elbow": NEUTRAL["elbow"] + 18 * depth,
        }  # fmt: skip
    return key


def _squat(u: Angles, gain: float, rng: np.random.Generator) -> Channels:
    depth = gain * (_bump(u, 0.0, 0.5) * 0.65 + _bump(u, 0.45, 1.0))
    channels: Channels = {}
    for name, deep in _squat_key(1.0).items():
        stand = _squat_key(0.0)[name]
        channels[name] = stand + (deep - stand) * depth
    return channels


def _kick(u: Angles, gain: float, rng: np.random.Generator) -> Channels:
    channels: Channels = {"lean": np.zeros_like(u), "stance": np.clip((u - 0.48) / 0.04, 0.0, 1.0)}
    for side, start in (("l", 0.0), ("r", 0.5)):
        back, front = _bump(u, start, start + 0.26), _bump(u, start + 0.12, start + 0.5)
        swinging = _bump(u, start + 0.05, start + 0.30)  # the knee bends, or the foot would scrape the floor
        channels[f"{side}_hip_front"] = gain * (80 * front - 28 * back)
        channels[f"{side}_knee"] = gain * (np.minimum(62 * back + 50 * swinging, 80) + 12 * front)
        channels[f"{side}_ankle"] = gain * (14 * swinging - 20 * front)
        channels["lean"] = channels["lean"] + gain * (8 * back - 5 * front)
    for side, sign in (("l", 1.0), ("r", -1.0)):
        channels[f"{side}_arm_down"] = 36 - gain * 8 * _sine(u, 1.5)
        channels[f"{side}_arm_front"] = gain * (8 + sign * 20 * _sine(u, 1.5))
        channels[f"{side}_elbow"] = np.full_like(u, 32.0)
    return channels


def _sway(u: Angles, gain: float, rng: np.random.Generator) -> Channels:
    """A mixture that is trained on, so that the held-out ones are not the first the network sees."""
    phase = rng.uniform(0, 1, 6)
    bend = _bump(u, 0.1, 0.6) + 0.6 * _bump(u, 0.55, 1.0)
    channels: Channels = {
        "twist": gain * 24 * _sine(u, 1.5, phase[0]), "bend_side": gain * 18 * _sine(u, 2.0, phase[1]),
        "bend_front": gain * (8 + 14 * _sine(u, 1.0, phase[2])), "head_turn": gain * 20 * _sine(u, 1.0, phase[3]),
        "lean": gain * 8 * bend,
    }  # fmt: skip
    for side, offset in (("l", 0.0), ("r", 0.37)):
        channels[f"{side}_arm_down"] = 18 + gain * 40 * _sine(u, 1.5, phase[4] + offset)
        channels[f"{side}_arm_front"] = gain * (18 + 34 * _sine(u, 1.0, phase[5] + offset))
        channels[f"{side}_elbow"] = 40 + gain * 28 * _sine(u, 1.5, phase[0] + offset)
        channels[f"{side}_arm_turn"] = gain * 30 * _sine(u, 1.0, phase[2] + offset)
        channels[f"{side}_hip_front"] = gain * bend * (38 + 14 * (1 if side == "l" else -1))
        channels[f"{side}_knee"] = 5 + gain * bend * 52
        channels[f"{side}_hip_side"] = 6 + gain * 8 * bend
        channels[f"{side}_hip_turn"] = gain * 8 * bend
    return _flat_feet(channels)


def _roam(u: Angles, gain: float, rng: np.random.Generator) -> Channels:
    """Everything at once, each joint at a pace of its own, through the range of the other training sequences."""

    def wave(low: float, high: float) -> Angles:
        return gain * (low + (high - low) * (0.5 + 0.5 * _sine(u, rng.uniform(0.7, 1.8), rng.uniform(0, 1))))

    channels: Channels = {
        "twist": wave(-34, 34), "bend_side": wave(-24, 24), "bend_front": wave(-8, 28), "lean": wave(0, 9),
        "head_turn": wave(-24, 24),
    }  # fmt: skip
    for side in "lr":
        channels[f"{side}_arm_down"], channels[f"{side}_arm_front"] = wave(-44, 60), wave(-12, 56)
        channels[f"{side}_elbow"], channels[f"{side}_arm_turn"] = wave(10, 66), wave(-26, 26)
        lift = channels[f"{side}_hip_front"] = wave(-20, 74)
        channels[f"{side}_knee"] = 4 + 0.9 * np.maximum(lift, 0) + wave(0, 22)
        channels[f"{side}_hip_side"], channels[f"{side}_hip_turn"] = wave(0, 18), wave(0, 12)
    return _flat_feet(channels)


def _lunge_key(depth: float) -> dict[str, float]:
    """Left foot in front."""
    key = {"lean": 6 * depth, "twist": 18 * depth, "bend_front": 4 * depth}
    key |= {"l_hip_front": 74 * depth, "l_knee": 76 * depth, "l_ankle": 8 * depth, "l_hip_turn": 6 * depth}
    key |= {"r_hip_front": -20 * depth, "r_knee": 57 * depth, "r_ankle": 12 * depth}
    for side, front in (("l", -14.0), ("r", 36.0)):
        key |= {f"{side}_arm_front": front * depth, f"{side}_arm_down": NEUTRAL["arm_down"] - 26 * depth}
        key |= {f"{side}_elbow": NEUTRAL["elbow"] + 36 * depth}
    return key


def _lunge(u: Angles, gain: float, rng: np.random.Generator) -> Channels:
    left, right = gain * _bump(u, 0.0, 0.55), gain * _bump(u, 0.45, 1.0)
    deepest, standing = _lunge_key(1.0), _lunge_key(0.0)
    channels: Channels = {}
    for name, deep in deepest.items():
        mirrored = {"l_": "r_", "r_": "l_"}.get(name[:2], name[:2]) + name[2:]
        for target, amount in ((name, left), (mirrored, -right if name == "twist" else right)):
            channels.setdefault(target, np.full_like(u, standing.get(target, 0.0)))
            channels[target] = channels[target] + (deep - standing[name]) * amount
    return channels


def _dance(u: Angles, gain: float, rng: np.random.Generator) -> Channels:
    phase = rng.uniform(0, 1, 3)
    channels: Channels = {
        "twist": gain * 28 * _sine(u, 2.0, phase[0]), "bend_side": gain * 20 * _sine(u, 1.5, phase[1]),
        "bend_front": gain * (6 + 12 * _sine(u, 1.5, phase[2])), "head_turn": gain * 20 * _sine(u, 2.0, phase[0]),
    }  # fmt: skip
    dip = _bump(u, 0.55, 1.0)
    channels["lean"] = gain * 10 * dip
    for side, offset, lift in (("l", 0.0, _bump(u, 0.0, 0.35)), ("r", 0.5, _bump(u, 0.28, 0.62))):
        channels[f"{side}_arm_down"] = 10 + gain * 46 * _sine(u, 2.0, phase[1] + offset)
        channels[f"{side}_arm_front"] = gain * (20 + 36 * _sine(u, 1.5, phase[2] + offset))
        channels[f"{side}_elbow"] = 40 + gain * 26 * _sine(u, 2.0, phase[0] + offset)
        channels[f"{side}_arm_turn"] = gain * 24 * _sine(u, 1.0, phase[1] + offset)
        channels[f"{side}_hip_front"] = gain * (58 * lift + 46 * dip)
        channels[f"{side}_knee"] = 5 + gain * (62 * lift + 55 * dip)
        channels[f"{side}_hip_side"] = 4 + gain * (12 * lift + 6 * dip)
        channels[f"{side}_hip_turn"] = gain * 8 * (lift + dip)
    return _flat_feet(channels)


def _key(*, arms: float, elbow: float) -> dict[str, float]:
    return {f"{side}_{name}": value for side in "lr" for name, value in (("arm_down", arms), ("elbow", elbow))}


MOVES: dict[str, tuple[Split, Callable[[Angles, float, np.random.Generator], Channels]]] = {
    "walk": ("train", _walk), "march": ("train", _march), "arm_raise": ("train", _arm_raise),
    "arm_circles": ("train", _arm_circles), "twist": ("train", _twist), "side_bend": ("train", _side_bend),
    "squat": ("train", _squat), "kick": ("train", _kick), "sway": ("train", _sway),
    "lunge": ("test", _lunge), "dance": ("test", _dance),
    "roam_1": ("train", _roam), "roam_2": ("train", _roam), "roam_3": ("train", _roam),
}  # fmt: skip
"""Name to split and channels; held-out moves are `lunge` and `dance`.  The order is part of each one's seed."""
