"""One motion as its source would write it; the writers here are those of the sources, or say what they imitate."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.bundle.skeleton import SMPL_JOINT_NAMES, SMPL_PARENTS, Skeleton, axis_angle_to_matrix
from service.rotations import axis_angle

FRAMES = 6


@pytest.fixture(scope="session")
def walk() -> dict[str, NDArray[np.float64]]:
    """Six frames of a body that turns and moves: poses (6, 72), hands at rest; trans (6, 3); y up, metres."""
    rng = np.random.default_rng(8)
    poses = rng.normal(0, 0.4, (FRAMES, 72))
    poses[:, 66:] = 0
    return {"poses": poses, "trans": rng.normal(0, 1, (FRAMES, 3))}


def matrices(walk: Any) -> NDArray[np.float64]:
    return axis_angle_to_matrix(walk["poses"].reshape(-1, 24, 3))


def turned(walk: Any, turn: NDArray[np.float64], pelvis: NDArray[np.floating]) -> dict[str, NDArray[np.float64]]:
    """The walk in another frame: the world, with the body in it, turns about the origin."""
    poses = walk["poses"].copy()
    poses[:, :3] = axis_angle(turn @ axis_angle_to_matrix(poses[:, :3]))
    return {"poses": poses, "trans": (walk["trans"] + pelvis) @ turn.T - pelvis}


def as_bvh(skeleton: Skeleton, walk: Any, order: str = "ZXY", prefix: str = "") -> str:
    """Degrees and centimetres; the hierarchy is the skeleton's own."""
    children = {joint: [c for c, p in enumerate(SMPL_PARENTS) if p == joint] for joint in range(24)}
    rest, lines, visited = 100 * skeleton.rest_joints.astype(np.float64), ["HIERARCHY"], []

    def write(joint: int, indent: str) -> None:
        visited.append(joint)
        parent = SMPL_PARENTS[joint]
        place = rest[joint] - (rest[parent] if parent >= 0 else 0)
        lines.append(f"{indent}{'ROOT' if parent < 0 else 'JOINT'} {prefix}{SMPL_JOINT_NAMES[joint]}")
        lines.extend([f"{indent}{{", f"{indent}  OFFSET {place[0]:.9f} {place[1]:.9f} {place[2]:.9f}"])
        turns = " ".join(f"{axis}rotation" for axis in order)
        moves = "Xposition Yposition Zposition " if parent < 0 else ""
        lines.append(f"{indent}  CHANNELS {6 if parent < 0 else 3} {moves}{turns}")
        for child in children[joint]:
            write(child, indent + "  ")
        if not children[joint]:
            lines.extend([f"{indent}  End Site", f"{indent}  {{", f"{indent}    OFFSET 0 1 0", f"{indent}  }}"])
        lines.append(f"{indent}}}")

    write(0, "")
    lines.extend(["MOTION", f"Frames: {len(walk['poses'])}", "Frame Time: 0.04"])
    for turns, moved in zip(matrices(walk), walk["trans"], strict=True):
        numbers = list(rest[0] + 100 * moved)
        for joint in visited:
            numbers += euler_degrees(turns[joint], order)
        lines.append(" ".join(f"{number:.9f}" for number in numbers))
    return "\n".join(lines) + "\n"


def euler_degrees(matrix: NDArray[np.float64], order: str) -> list[float]:
    from scipy.spatial.transform import Rotation

    return Rotation.from_matrix(matrix).as_euler(order, degrees=True).tolist()
