"""Motion capture in BVH: the hierarchy with its channels, then a row of numbers a frame.

The rotations of a BVH are relative to its rest pose.  They are SMPL's where that is a T-pose; where it is not, `align`
turns each limb of the rest pose onto SMPL's T-pose by the shortest arc, and the rotations with it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.bundle.skeleton import SMPL_JOINT_NAMES, SMPL_PARENTS, axis_angle_to_matrix

T_POSE_TOLERANCE_DEG = 20.0
LEG_M = (0.5, 1.3)
"""A leg from hip to ankle; what else it may be, in which unit, is told from this."""
_UNIT_M = {"m": 1.0, "cm": 0.01, "mm": 0.001, "in": 0.0254}
# Where the bone that begins at a joint points in SMPL's T-pose, and at which joint it ends.
_BONES = {
    "left_hip": ("left_knee", (0, -1, 0)), "right_hip": ("right_knee", (0, -1, 0)),
    "left_knee": ("left_ankle", (0, -1, 0)), "right_knee": ("right_ankle", (0, -1, 0)),
    "left_shoulder": ("left_elbow", (1, 0, 0)), "right_shoulder": ("right_elbow", (-1, 0, 0)),
    "left_elbow": ("left_wrist", (1, 0, 0)), "right_elbow": ("right_wrist", (-1, 0, 0)),
}  # fmt: skip
# Names of the joints in common hierarchies, without prefix, lower case: SMPL's own, Mixamo's, CMU's and Blender's.
_NAMES = {
    "pelvis": "hips hip root", "left_hip": "leftupleg lhip lefthip lthigh",
    "right_hip": "rightupleg rhip righthip rthigh", "spine1": "spine lowerback",
    "left_knee": "leftleg lknee leftknee lshin", "right_knee": "rightleg rknee rightknee rshin",
    "spine2": "spine1 spine", "left_ankle": "leftfoot lankle leftankle lfoot",
    "right_ankle": "rightfoot rankle rightankle rfoot", "spine3": "spine2 spine1 chest",
    "left_foot": "lefttoebase ltoe lefttoe lfoot", "right_foot": "righttoebase rtoe righttoe rfoot",
    "neck": "neck neck1", "left_collar": "leftcollar lcollar leftshoulder",
    "right_collar": "rightcollar rcollar rightshoulder", "head": "head",
    "left_shoulder": "leftarm leftuparm lshoulder leftshoulder",
    "right_shoulder": "rightarm rightuparm rshoulder rightshoulder",
    "left_elbow": "leftforearm lelbow leftelbow leftlowarm",
    "right_elbow": "rightforearm relbow rightelbow rightlowarm",
    "left_wrist": "lefthand lwrist leftwrist", "right_wrist": "righthand rwrist rightwrist",
    "left_hand": "lhand", "right_hand": "rhand",
}  # fmt: skip


class BvhError(ValueError):
    """Not a BVH, or one whose joints, units or rest pose must be said."""


@dataclass
class Joint:
    """One joint of the hierarchy."""

    name: str
    parent: int
    offset: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    channels: list[str] = field(default_factory=list)
    first_channel: int = 0


@dataclass(frozen=True)
class Bvh:
    """A file as it is written: degrees, its own units and axes."""

    joints: list[Joint]
    values: NDArray[np.float64]
    """(F, channels)"""
    fps: float


def read_bvh(text: str) -> Bvh:
    """Parse a file.

    Raises:
        BvhError: it is not a BVH.
    """
    head, found, motion = text.partition("MOTION")
    if not found or not head.lstrip().startswith("HIERARCHY"):
        raise BvhError("expected HIERARCHY and MOTION, which every .bvh has")
    joints, open_joints, width = [], [], 0
    words = iter(head.split()[1:])
    try:
        for word in words:
            if word in ("ROOT", "JOINT", "End"):
                name = next(words)
                joints.append(Joint(name if word != "End" else "", open_joints[-1] if open_joints else -1))
                open_joints.append(len(joints) - 1)
            elif word == "OFFSET":
                joints[open_joints[-1]].offset = [float(next(words)) for _ in range(3)]
            elif word == "CHANNELS":
                joint = joints[open_joints[-1]]
                joint.first_channel, joint.channels = width, [next(words) for _ in range(int(next(words)))]
                width += len(joint.channels)
            elif word == "}":
                open_joints.pop()
        lines = motion.split()
        count, seconds = int(lines[lines.index("Frames:") + 1]), float(lines[lines.index("Time:") + 1])
        values = np.array(lines[lines.index("Time:") + 2 :], np.float64)
    except (ValueError, IndexError, StopIteration) as error:
        raise BvhError(f"cannot be read as a .bvh: {error}") from error
    if len(values) != count * width or seconds <= 0 or not joints:
        raise BvhError(f"expected {count} frames of {width} numbers, got {len(values)} numbers")
    return Bvh(joints, values.reshape(count, width), 1 / seconds)


def rotations_of(bvh: Bvh, joint: Joint) -> NDArray[np.float64]:
    """(F, 3, 3): a joint's channels multiplied in the order they are written."""
    result = np.tile(np.eye(3), (len(bvh.values), 1, 1))
    for n, channel in enumerate(joint.channels):
        if channel.endswith("rotation"):
            vector = np.zeros((len(bvh.values), 3))
            vector[:, "XYZ".index(channel[0])] = np.deg2rad(bvh.values[:, joint.first_channel + n])
            result = result @ axis_angle_to_matrix(vector)
    return result


def smpl_motion(
    bvh: Bvh, joint_map: dict[str, str] | None, units: str | None, align: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str]]:
    """Rotations (F, 24, 3, 3), translation (F, 3) in metres, and what was found out, to be said aloud.

    The translation is the root's way from its OFFSET: the file's own rest position takes the place of SMPL's.

    Raises:
        BvhError: a joint is not found, the units are not clear, or the rest pose is no T-pose.
    """
    index, said = _mapped(bvh, joint_map)
    up = _rest(bvh)
    if units is None:
        leg = float(np.linalg.norm(up[index["left_ankle"]] - up[index["left_hip"]]))
        fitting = [name for name, metres in _UNIT_M.items() if LEG_M[0] <= leg * metres <= LEG_M[1]]
        if len(fitting) != 1:
            raise BvhError(f"a leg is {leg:g} long: the units are not clear; say --units")
        units = fitting[0]
        said.append(f"units: {units}, as a leg is {leg:g} long")
    turns = {name: np.eye(3) for name in index}
    for name, (end, direction) in _BONES.items():
        bone = up[index[end]] - up[index[name]]
        turns[name] = _shortest_arc(np.array(direction, float), bone)
        angle = np.degrees(np.arccos(np.clip((np.trace(turns[name]) - 1) / 2, -1, 1)))
        if angle > T_POSE_TOLERANCE_DEG and not align:
            raise BvhError(
                f"in the rest pose the bone at {bvh.joints[index[name]].name} is {angle:.0f} degrees off SMPL's "
                "T-pose: --align turns it there"
            )
    if not align:
        turns = {name: np.eye(3) for name in index}
    for end, start in (("left_wrist", "left_elbow"), ("right_wrist", "right_elbow"), ("left_ankle", "left_knee"),
                       ("right_ankle", "right_knee")):  # fmt: skip
        turns[end] = turns[start]  # hands and feet have no bone that SMPL's T-pose gives a direction to
    world = _world_rotations(bvh)
    aligned = np.tile(np.eye(3), (len(bvh.values), 24, 1, 1))
    for joint, name in enumerate(SMPL_JOINT_NAMES):
        parent = SMPL_PARENTS[joint]
        # A joint that the file lacks moves with its parent.
        aligned[:, joint] = world[index[name]] @ turns[name] if name in index else aligned[:, parent]
    local = aligned.copy()
    for joint, parent in enumerate(SMPL_PARENTS):
        if parent >= 0:
            local[:, joint] = aligned[:, parent].swapaxes(-1, -2) @ aligned[:, joint]
    root = bvh.joints[index["pelvis"]]
    moved = np.tile(np.array(root.offset), (len(bvh.values), 1))
    for n, channel in enumerate(root.channels):
        if channel.endswith("position"):
            moved[:, "XYZ".index(channel[0])] = bvh.values[:, root.first_channel + n]
    return local, (moved - root.offset) * _UNIT_M[units], said


def read_joint_map(path: Path) -> dict[str, str]:
    """A JSON object from SMPL joint names to names in the file.

    Raises:
        BvhError: it is something else.
    """
    try:
        given = json.loads(path.read_text())
        unknown = sorted(set(given) - set(SMPL_JOINT_NAMES))
        if unknown or not all(isinstance(name, str) for name in given.values()):
            raise BvhError(f"expected SMPL joint names and names of the .bvh, got {', '.join(unknown) or 'others'}")
    except (ValueError, AttributeError, TypeError) as error:
        raise BvhError(f"{path}: {error}") from error
    return given


def _mapped(bvh: Bvh, joint_map: dict[str, str] | None) -> tuple[dict[str, int], list[str]]:
    """Joint of the file for each SMPL joint that it has."""
    exact = {joint.name: n for n, joint in enumerate(bvh.joints) if joint.name}
    if joint_map is not None:
        absent = sorted(name for name in joint_map.values() if name not in exact)
        if absent:
            raise BvhError(f"the .bvh has no joint {', '.join(absent)}; it has {', '.join(exact)}")
        index = {name: exact[joint_map[name]] for name in SMPL_JOINT_NAMES if name in joint_map}
    else:
        plain = {_plain(name): n for name, n in reversed(exact.items())}
        index, used = {}, set()
        own = all(_plain(name) in plain for name in SMPL_JOINT_NAMES[:22])
        for name in SMPL_JOINT_NAMES:
            candidates = [_plain(name)] if own else _NAMES[name].split()
            found = next((plain[word] for word in candidates if word in plain and plain[word] not in used), None)
            if found is not None:
                index[name] = found
                used.add(found)
    needed = [name for name in ("pelvis", *_BONES, *(end for end, _ in _BONES.values())) if name not in index]
    if needed:
        raise BvhError(
            f"no joint found for {', '.join(dict.fromkeys(needed))}; say --joint-map; it has {', '.join(exact)}"
        )
    pairs = ", ".join(f"{name}={bvh.joints[n].name}" for name, n in index.items())
    lacking = [name for name in SMPL_JOINT_NAMES if name not in index]
    said = [f"joints: {pairs}"] + (
        [f"without a joint, moved with their parents: {', '.join(lacking)}"] if lacking else []
    )
    return index, said


def _plain(name: str) -> str:
    return "".join(letter for letter in name.rpartition(":")[2].lower() if letter.isalnum())


def _rest(bvh: Bvh) -> NDArray[np.float64]:
    """(J, 3): the joints when every rotation is zero."""
    places = np.zeros((len(bvh.joints), 3))
    for n, joint in enumerate(bvh.joints):
        places[n] = np.array(joint.offset) + (places[joint.parent] if joint.parent >= 0 else 0)
    return places


def _world_rotations(bvh: Bvh) -> list[NDArray[np.float64]]:
    """(F, 3, 3) of each joint."""
    world: list[NDArray[np.float64]] = []
    for joint in bvh.joints:
        local = rotations_of(bvh, joint)
        world.append(world[joint.parent] @ local if joint.parent >= 0 else local)
    return world


def _shortest_arc(start: NDArray[np.float64], end: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rotation that turns one direction onto another."""
    start, end = start / np.linalg.norm(start), end / max(float(np.linalg.norm(end)), 1e-12)
    axis, cosine = np.cross(start, end), float(start @ end)
    sine = float(np.linalg.norm(axis))
    if sine < 1e-9:
        return np.eye(3) if cosine > 0 else axis_angle_to_matrix(np.pi * np.cross(start, [0, 0, 1.0]))
    return axis_angle_to_matrix(axis / sine * np.arctan2(sine, cosine))
