"""From what people have (JSON, SMPL, SMPL-H, SMPL-X, AMASS, CAPE) to what the avatar needs.

Inside there is one form only: rotation matrices of 24 SMPL joints and a root translation, y up, metres.  The
border converts once, and says what it applied.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.bundle.skeleton import SMPL_JOINT_NAMES, axis_angle_to_matrix
from service.errors import (
    InvalidPose,
    JsonBroken,
    OptionInvalid,
    PoseEmpty,
    PoseNotFinite,
    PoseNotNumber,
    PoseNotRotation,
    PoseOutOfRange,
    PoseShapeInvalid,
    TooManyFrames,
)
from service.npz import read_npz

MAX_ANGLE_RAD = 4 * np.pi
MAX_TRANSLATION_M = 1e4
MAX_FPS = 1000.0
DEFAULT_FPS = 30.0
ROTATION_TOLERANCE = 1e-3
# Joints in a row of poses -> (number of the first one, how many we use).
_LAYOUTS = {21: (1, 21), 22: (0, 22), 23: (1, 23), 24: (0, 24), 52: (0, 22), 55: (0, 22)}
_IGNORED = {52: "the finger joints of SMPL-H", 55: "the finger and face joints of SMPL-X"}
ACCEPTED_WIDTHS = tuple(3 * joints for joints in _LAYOUTS)
_ACCEPTED = f"(F, {'|'.join(map(str, ACCEPTED_WIDTHS))}), (F, {'|'.join(map(str, _LAYOUTS))}, 3) or (F, joints, 3, 3)"
_Z_UP_TO_Y_UP = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])  # -90 degrees about x

_JSON_KEYS = ("poses", "translations", "fps", "up_axis", "units", "rotation")
_POSE_KEYS, _TRANSLATION_KEYS = ("poses", "pose"), ("trans", "transl", "translations")
_SPLIT_POSE_KEYS = (("root_orient", "pose_body"), ("global_orient", "body_pose"))
_FPS_KEYS = ("mocap_framerate", "mocap_frame_rate", "fps")
NPZ_KEYS = (*_POSE_KEYS, *chain(*_SPLIT_POSE_KEYS), *_TRANSLATION_KEYS, *_FPS_KEYS, "up_axis", "units")


@dataclass(frozen=True)
class Options:
    """What the query says; None leaves it to the body, and then to the default."""

    up_axis: str | None = None
    units: str | None = None
    rotation: str | None = None
    fps: float | None = None
    every: int = 1
    """Use each n-th frame only, and divide fps by n."""


@dataclass(frozen=True)
class PoseSequence:
    """Checked poses in the one form used inside."""

    rotations: NDArray[np.float32]
    """(F, 24, 3, 3), each joint relative to its parent."""
    translation: NDArray[np.float32]
    """(F, 3), metres."""
    fps: float
    up_axis: str
    """As posted: `y` or `z`; here it is always y."""
    units: str
    rotation: str
    warnings: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.rotations)


def parse_json(body: bytes, options: Options, pelvis: NDArray[np.float32], max_frames: int) -> PoseSequence:
    """Poses from JSON: `poses`, and optionally `translations`, `fps`, `up_axis`, `units`, `rotation`.

    Args:
        pelvis: (3,), rest position of the avatar's root joint, metres.

    Raises:
        JsonBroken: not JSON.
        InvalidPose: JSON, but not poses; the subclass says why.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        where = f" at byte {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise JsonBroken(f"the body is not valid JSON{where}") from error
    if not isinstance(document, dict):
        raise InvalidPose("expected a JSON object with the key 'poses'")
    unknown = [key for key in document if key not in _JSON_KEYS]
    if unknown:
        raise OptionInvalid(f"unknown key {unknown[0][:40]!r}; known are {', '.join(_JSON_KEYS)}")
    if "poses" not in document:
        raise InvalidPose("the key 'poses' is missing")
    poses = _numbers(document.pop("poses"), "poses")
    translations = document.pop("translations", None)
    if translations is not None:
        translations = _numbers(translations, "translations")
    return _sequence(poses, translations, document, options, pelvis, max_frames)


def parse_npz(
    body: bytes, options: Options, pelvis: NDArray[np.float32], max_frames: int, max_bytes: int
) -> PoseSequence:
    """Poses from an .npz in the layout of AMASS, CAPE or SMPL; other arrays in it are not looked at.

    Raises:
        InvalidPose: no safe archive of poses; the subclass says why.
        BodyTooLarge: the arrays are larger than `max_bytes`.
    """
    arrays = read_npz(body, NPZ_KEYS, max_bytes)
    poses = _first(arrays, _POSE_KEYS)
    for root, rest in _SPLIT_POSE_KEYS:
        if poses is None and root in arrays and rest in arrays:
            poses = _joined(arrays[root], arrays[rest])
    if poses is None:
        raise InvalidPose(f"the .npz has no array {' or '.join(map(repr, _POSE_KEYS))}")
    said: dict[str, Any] = {}
    fps = _first(arrays, _FPS_KEYS)
    if fps is not None:
        if fps.size != 1 or fps.dtype.kind == "U":
            raise OptionInvalid("the frame rate in the .npz is not one number")
        said["fps"] = float(fps.reshape(()))
    for name in ("up_axis", "units"):
        if name in arrays and arrays[name].size == 1:
            said[name] = str(arrays[name].reshape(()))
    translations = _first(arrays, _TRANSLATION_KEYS)
    for name, array in (("poses", poses), ("translations", translations)):
        if array is not None and array.dtype.kind == "U":
            raise PoseNotNumber(f"the {name} are text")
    # CAPE keeps one frame to a file, without the axis of the frames.
    poses = poses[None] if poses.ndim == 1 else poses
    if translations is not None and translations.ndim == 1:
        translations = translations[None]
    return _sequence(poses, translations, said, options, pelvis, max_frames)


def _sequence(
    poses: NDArray[Any],
    translations: NDArray[Any] | None,
    said: Mapping[str, Any],
    options: Options,
    pelvis: NDArray[np.float32],
    max_frames: int,
) -> PoseSequence:
    up_axis = _settle("up_axis", options.up_axis, said.get("up_axis"), "y", ("y", "z"))
    units = _settle("units", options.units, said.get("units"), "m", ("m", "cm"))
    found = "matrix" if poses.ndim == 4 else "axis_angle"
    rotation = _settle("rotation", options.rotation, said.get("rotation"), found, ("axis_angle", "matrix"))
    if rotation != found:
        raise PoseShapeInvalid(f"poses of shape {poses.shape} are not given as rotation={rotation}")
    fps = _settle_fps(options.fps, said.get("fps"))

    if poses.shape[:1] == (0,):
        raise PoseEmpty("expected at least one frame, got none")
    joints = _by_joint(poses)
    if translations is None:
        translations = np.zeros((len(joints), 3))
    if translations.shape != (len(joints), 3):
        raise PoseShapeInvalid(f"expected translations of shape ({len(joints)}, 3), got {translations.shape}")
    joints, translations = joints[:: options.every], translations[:: options.every]
    if len(joints) > max_frames:
        raise TooManyFrames(f"expected at most {max_frames} frames, got {len(joints)}", limit_frames=max_frames)

    first, used = _LAYOUTS[joints.shape[1]]
    ignored = _IGNORED.get(joints.shape[1])
    joints = joints[:, :used].astype(np.float64)
    moved = translations.astype(np.float64) * (0.01 if units == "cm" else 1.0)
    _check_finite(joints, first, "pose", options.every)
    _check_finite(moved[:, None], 0, "translation", options.every)
    _refuse(np.abs(moved).max(axis=1) > MAX_TRANSLATION_M, PoseOutOfRange, "a translation above 10 km", options.every)

    rotations = np.tile(np.eye(3), (len(joints), 24, 1, 1))
    rotations[:, first : first + used] = _matrices(joints, options.every)
    if up_axis == "z":
        # The whole world turns, about its origin: the root joint's rest position turns with it.
        rotations[:, 0] = _Z_UP_TO_Y_UP @ rotations[:, 0]
        moved = (moved + pelvis) @ _Z_UP_TO_Y_UP.T - pelvis
    return PoseSequence(
        rotations=rotations.astype(np.float32),
        translation=moved.astype(np.float32),
        fps=fps / options.every,
        up_axis=up_axis,
        units=units,
        rotation=rotation,
        warnings=(f"{ignored} are not used",) if ignored else (),
    )


def _by_joint(poses: NDArray[Any]) -> NDArray[Any]:
    """(F, J, 3) or (F, J, 3, 3) from every accepted shape."""
    if poses.ndim == 2 and poses.shape[1] in ACCEPTED_WIDTHS:
        return poses.reshape(len(poses), -1, 3)
    by_joint = poses.ndim in (3, 4) and poses.shape[1] in _LAYOUTS and set(poses.shape[2:]) == {3}
    if not by_joint:
        raise PoseShapeInvalid(f"expected poses of shape {_ACCEPTED}, got {poses.shape}")
    return poses


def _matrices(joints: NDArray[np.float64], every: int) -> NDArray[np.float64]:
    if joints.ndim == 3:
        with np.errstate(over="ignore"):
            wild = np.linalg.norm(joints, axis=-1) > MAX_ANGLE_RAD
        _refuse(wild.any(axis=1), PoseOutOfRange, "an angle above 4 pi", every)
        return axis_angle_to_matrix(joints)
    # Far from a rotation the product may overflow; what it gives is refused all the same.
    with np.errstate(over="ignore", invalid="ignore"):
        gram = joints @ joints.swapaxes(-1, -2)
        off = ~(np.abs(gram - np.eye(3)).max(axis=(-1, -2)) < ROTATION_TOLERANCE) | ~(np.linalg.det(joints) > 0)
    _refuse(off.any(axis=1), PoseNotRotation, "a matrix that is not a rotation", every)
    return 1.5 * joints - 0.5 * gram @ joints  # a Newton step towards the nearest rotation: rounding goes


def _check_finite(values: NDArray[np.float64], first_joint: int, what: str, every: int) -> None:
    bad = ~np.isfinite(values).reshape(*values.shape[:2], -1).all(axis=-1)
    if bad.any():
        frame, joint = (int(n) for n in np.argwhere(bad)[0])
        name = SMPL_JOINT_NAMES[joint + first_joint]
        where = f" of joint {joint + first_joint} ({name})" if what == "pose" else ""
        extra = {"joint": joint + first_joint} if what == "pose" else {}
        raise PoseNotFinite(
            f"the {what}{where} in frame {frame * every} is not a finite number", frame=frame * every, **extra
        )


def _refuse(bad: NDArray[np.bool_], error: type[InvalidPose], what: str, every: int) -> None:
    if bad.any():
        frame = int(np.argmax(bad)) * every
        raise error(f"{what} in frame {frame}", frame=frame)


def _settle(name: str, query: Any, body: Any, default: str, allowed: tuple[str, ...]) -> str:
    for value in (query, body):
        if value is not None and value not in allowed:
            raise OptionInvalid(f"expected {name} to be one of {', '.join(allowed)}, got {str(value)[:40]!r}")
    if query is not None and body is not None and query != body:
        raise OptionInvalid(f"the query says {name}={query}, the body says {body}")
    return query or body or default


def _settle_fps(query: float | None, body: Any) -> float:
    for value in (query, body):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_FPS:
            raise OptionInvalid(f"expected fps above 0 and at most {MAX_FPS:g}")
    if query is not None and body is not None and abs(query - body) > 0.01 * body:
        raise OptionInvalid(f"the query says fps={query:g}, the body says {body:g}")
    return float(query or body or DEFAULT_FPS)


def _numbers(value: Any, name: str) -> NDArray[np.float64]:
    """An array from nested lists that hold numbers only: no text, no booleans, no ragged rows."""
    level, shape = [value], []
    while level and set(map(type, level)) == {list}:
        lengths = set(map(len, level))
        if len(lengths) > 1 or len(shape) == 4:
            raise PoseShapeInvalid(f"the {name} are ragged or nested too deeply; expected {_ACCEPTED}")
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


def _first(arrays: Mapping[str, NDArray[Any]], names: tuple[str, ...]) -> NDArray[Any] | None:
    return next((arrays[name] for name in names if name in arrays), None)


def _joined(root: NDArray[Any], rest: NDArray[Any]) -> NDArray[Any]:
    """Root and body given apart, as SMPL-X and its estimators do."""
    if root.dtype.kind == "U" or rest.dtype.kind == "U":
        raise PoseNotNumber("the poses are text")
    root, rest = (array[None] if array.ndim == 1 else array for array in (root, rest))
    if root.ndim != rest.ndim or root.ndim > 4 or len(root) != len(rest) or root.shape[2:] != rest.shape[2:]:
        raise PoseShapeInvalid(f"the root's shape {root.shape} does not fit the body's {rest.shape}")
    return np.concatenate([root, rest], axis=1)
