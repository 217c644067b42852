"""From arrays in any accepted form to rotation matrices of 24 joints, and every check on the way."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.bundle.skeleton import SMPL_JOINT_NAMES, axis_angle_to_matrix
from service.errors import (
    InvalidPose,
    PoseNotFinite,
    PoseNotNumber,
    PoseNotRotation,
    PoseOutOfRange,
    PoseShapeInvalid,
)
from service.rotations import from_quaternions

MAX_ANGLE_RAD = 4 * np.pi
MAX_ANGLE_TO_NORMALISE_RAD = 1e6
MAX_TRANSLATION_M = 1e4
ROTATION_TOLERANCE = 1e-3
DEGENERATE = 1e-3
"""Below this length, or singular value, there is no telling which rotation was meant."""

# Joints in a row of poses -> (number of the first one, how many we use).
LAYOUTS = {21: (1, 21), 22: (0, 22), 23: (1, 23), 24: (0, 24), 52: (0, 22), 55: (0, 22)}
IGNORED = {52: "the finger joints of SMPL-H", 55: "the finger and face joints of SMPL-X"}
ACCEPTED_WIDTHS = tuple(3 * joints for joints in LAYOUTS)
# What one joint's rotation looks like.
SHAPES: dict[str, tuple[int, ...]] = {"axis_angle": (3,), "matrix": (3, 3), "quat_wxyz": (4,), "6d": (6,)}
ACCEPTED = (
    f"(F, {'|'.join(map(str, ACCEPTED_WIDTHS))}) in axis-angle, or (F, joints, 3), (F, joints, 3, 3), (F, joints, 4) "
    f"or (F, joints, 6), joints one of {'|'.join(map(str, LAYOUTS))}"
)


def by_joint(poses: NDArray[Any], said: str | None) -> tuple[NDArray[Any], str]:
    """(F, J, *SHAPES[rotation]) and the rotation, from every accepted shape.

    Args:
        said: the rotation that was named.  Without it the shape decides; rows of width 63 to 165 are axis-angle.

    Raises:
        PoseShapeInvalid: a shape that is not accepted, or not that of the rotation that was named.
    """
    flat = said or "axis_angle"
    size = math.prod(SHAPES[flat])
    if poses.ndim == 2 and poses.shape[1] % size == 0 and poses.shape[1] // size in LAYOUTS:
        return poses.reshape(len(poses), -1, *SHAPES[flat]), flat
    found = next((name for name, shape in SHAPES.items() if poses.shape[2:] == shape), None)
    if found is None or poses.shape[1] not in LAYOUTS:
        raise PoseShapeInvalid(f"expected poses of shape {ACCEPTED}, got {poses.shape}")
    if said not in (None, found):
        raise PoseShapeInvalid(f"poses of shape {poses.shape} are not given as rotation={said}")
    return poses, found


def to_matrices(
    joints: NDArray[np.float64], rotation: str, normalize: bool, frames: NDArray[np.intp]
) -> NDArray[np.float64]:
    """(F, J, *SHAPES[rotation]), finite -> (F, J, 3, 3).

    Args:
        normalize: take the nearest rotation where the numbers are none, instead of refusing them.
        frames: (F,), the number of each frame as posted, for messages.

    Raises:
        PoseNotRotation: not a rotation, nor near enough to one; the frame is said.
        PoseOutOfRange: an angle above 4 pi.
    """
    if rotation == "axis_angle":
        limit = MAX_ANGLE_TO_NORMALISE_RAD if normalize else MAX_ANGLE_RAD
        wild = ~(np.einsum("...i,...i->...", joints, joints) <= limit * limit)
        _refuse(wild, PoseOutOfRange, "an angle above 4 pi", frames)
        return axis_angle_to_matrix(joints)
    # Far from a rotation the products may overflow; what they give is refused all the same.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if rotation == "quat_wxyz":
            length = np.linalg.norm(joints, axis=-1)
            off = ~(length > DEGENERATE) if normalize else ~(np.abs(length - 1) < ROTATION_TOLERANCE)
            _refuse(off | np.isinf(length), PoseNotRotation, "a quaternion not of length 1", frames)
            return from_quaternions(joints)
        if rotation == "6d":
            return _from_6d(joints, normalize, frames)
        if normalize:
            return _nearest_rotations(joints, frames)
        gram = joints @ joints.swapaxes(-1, -2)
        off = ~(np.abs(gram - np.eye(3)).max(axis=(-1, -2)) < ROTATION_TOLERANCE) | ~(np.linalg.det(joints) > 0)
        _refuse(off, PoseNotRotation, "a matrix that is not a rotation", frames)
        return 1.5 * joints - 0.5 * gram @ joints  # a Newton step towards the nearest rotation: rounding goes


def _from_6d(joints: NDArray[np.float64], normalize: bool, frames: NDArray[np.intp]) -> NDArray[np.float64]:
    """The first two columns of the matrix, one after the other (Zhou et al., CVPR 2019, eq. 11: Gram-Schmidt)."""
    first, second = joints[..., :3], joints[..., 3:]
    if not normalize:
        products = [(first * first).sum(-1) - 1, (second * second).sum(-1) - 1, (first * second).sum(-1)]
        off = ~(np.abs(products).max(axis=0) < ROTATION_TOLERANCE)
        _refuse(off, PoseNotRotation, "two columns that are not those of a rotation", frames)
    x_length = np.linalg.norm(first, axis=-1, keepdims=True)
    x = first / x_length
    upright = second - (x * second).sum(-1, keepdims=True) * x
    y_length = np.linalg.norm(upright, axis=-1, keepdims=True)
    degenerate = ~(np.minimum(x_length, y_length)[..., 0] > DEGENERATE) | np.isinf(x_length + y_length)[..., 0]
    _refuse(degenerate, PoseNotRotation, "two columns that span no plane", frames)
    y = upright / y_length
    return np.stack([x, y, np.cross(x, y)], axis=-1)


def _nearest_rotations(joints: NDArray[np.float64], frames: NDArray[np.intp]) -> NDArray[np.float64]:
    wild = ~(np.abs(joints).max(axis=(-1, -2)) < 1e6)
    _refuse(wild, PoseNotRotation, "a matrix far from any rotation", frames)
    u, singular, v = np.linalg.svd(joints)
    off = ~(singular[..., 2] > DEGENERATE) | ~(np.linalg.det(joints) > 0)
    _refuse(off, PoseNotRotation, "a matrix without a nearest rotation", frames)
    return u @ v


def check_finite(values: NDArray[np.float64], first_joint: int | None, frames: NDArray[np.intp]) -> None:
    """Refuse NaN and infinities in poses (F, J, ...), or in translations (F, 3) where `first_joint` is None."""
    finite = np.isfinite(values)
    if finite.all():
        return
    if first_joint is None:
        frame = int(frames[np.argmin(finite.all(axis=1))])
        raise PoseNotFinite(f"the translation in frame {frame} is not a finite number", frame=frame)
    row, joint = (int(n) for n in np.argwhere(~finite.reshape(*values.shape[:2], -1).all(axis=-1))[0])
    frame, joint = int(frames[row]), joint + first_joint
    where = f"joint {joint} ({SMPL_JOINT_NAMES[joint]}) in frame {frame}"
    raise PoseNotFinite(f"the pose of {where} is not a finite number", frame=frame, joint=joint)


def check_translations(moved: NDArray[np.float64], frames: NDArray[np.intp]) -> None:
    """Refuse translations (F, 3), metres, above 10 km."""
    _refuse(np.abs(moved) > MAX_TRANSLATION_M, PoseOutOfRange, "a translation above 10 km", frames)


def _refuse(bad: NDArray[np.bool_], error: type[InvalidPose], what: str, frames: NDArray[np.intp]) -> None:
    if bad.any():
        frame = int(frames[np.argmax(bad.any(axis=1))])
        raise error(f"{what} in frame {frame}", frame=frame)


def numbers(value: Any, name: str) -> NDArray[np.float64]:
    """An array from nested lists that hold numbers only: no text, no booleans, no ragged rows.

    Raises:
        PoseShapeInvalid, PoseNotNumber, PoseNotFinite: they hold something else.
    """
    level, shape = [value], []
    while level and set(map(type, level)) == {list}:
        lengths = set(map(len, level))
        if len(lengths) > 1 or len(shape) == 4:
            raise PoseShapeInvalid(f"the {name} are ragged or nested too deeply; expected {ACCEPTED}")
        shape.append(lengths.pop())
        level = list(chain.from_iterable(level))
    kinds = set(map(type, level))
    if list in kinds:
        raise PoseShapeInvalid(f"the {name} are ragged: numbers and lists side by side")
    if not kinds <= {int, float}:
        names = sorted(kind.__name__ for kind in kinds - {int, float})
        raise PoseNotNumber(f"the {name} hold {', '.join(names)} where numbers belong")
    if not shape:
        raise PoseShapeInvalid(f"the {name} are no list")
    try:
        return np.array(level, np.float64).reshape(shape)
    except OverflowError as error:
        raise PoseNotFinite(f"the {name} hold a number too large for a float") from error


def joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Root and body given apart, as SMPL-X and its estimators do, along the second axis.

    Raises:
        PoseNotNumber, PoseShapeInvalid: they do not go together.
    """
    if any(part.dtype.kind == "U" for part in parts):
        raise PoseNotNumber("the poses are text")
    root, rest = (part[None] if part.ndim == 1 else part for part in parts)
    if root.ndim != rest.ndim or root.ndim > 4 or len(root) != len(rest) or root.shape[2:] != rest.shape[2:]:
        raise PoseShapeInvalid(f"the root's shape {root.shape} does not fit the body's {rest.shape}")
    return np.concatenate([root, rest], axis=1)
