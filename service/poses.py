"""From what people have (JSON, SMPL, SMPL-H, SMPL-X, AMASS, CAPE, `.smpl`) to what the avatar needs.

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

from service.errors import (
    InvalidPose,
    JsonBroken,
    OptionInvalid,
    PoseEmpty,
    PoseNotNumber,
    PoseShapeInvalid,
    TooManyFrames,
)
from service.npz import first_rows, read_npz
from service.pose_values import (
    ACCEPTED_WIDTHS as ACCEPTED_WIDTHS,
)
from service.pose_values import (
    IGNORED,
    LAYOUTS,
    SHAPES,
    by_joint,
    check_finite,
    check_translations,
    joined,
    numbers,
    to_matrices,
)
from service.resampling import count_wanted, resample, select

MAX_FPS = 1000.0
DEFAULT_FPS = 30.0
UP_AXES, UNITS, FRAMES, ROTATIONS = ("y", "z"), ("m", "cm"), ("world", "camera"), tuple(SHAPES)
_Z_UP_TO_Y_UP = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])  # -90 degrees about x
_CAMERA_TO_WORLD = np.diag([1.0, -1.0, -1.0])  # OpenCV's cameras have y down and z away

_SAID_KEYS = ("up_axis", "units", "rotation", "frame")
_JSON_KEYS = ("poses", "translations", "fps", *_SAID_KEYS)
_POSE_KEYS, _TRANSLATION_KEYS = ("poses", "pose"), ("trans", "transl", "translations")
_SPLIT_POSE_KEYS = (("root_orient", "pose_body"), ("global_orient", "body_pose"))
_FPS_KEYS = ("mocap_framerate", "mocap_frame_rate", "fps")
_SMPL_BODIES = {0: "SMPL", 1: "SMPL-H", 2: "SMPL-X"}
_SMPL_IGNORED = {"headPose": "the face", "leftHandPose": "the left hand", "rightHandPose": "the right hand"}
_SMPL_KEYS = ("bodyPose", "bodyTranslation", "frameRate", "smplVersion", "codecVersion", *_SMPL_IGNORED)
NPZ_KEYS = (*_POSE_KEYS, *chain(*_SPLIT_POSE_KEYS), *_TRANSLATION_KEYS, *_FPS_KEYS, *_SAID_KEYS, *_SMPL_KEYS)


@dataclass(frozen=True)
class Options:
    """What the query says; None leaves it to the body, and then to the default."""

    up_axis: str | None = None
    units: str | None = None
    rotation: str | None = None
    fps: float | None = None
    every: int = 1
    """Use each n-th frame only, and divide fps by n."""
    frame: str | None = None
    """`world`, or `camera`: x right, y down, z away, as OpenCV and most estimators have it."""
    target_fps: float | None = None
    """Resample to this rate; not together with `every`."""
    normalize: bool = False
    """Take the nearest rotation where the numbers are none."""


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
    frame: str = "world"
    """As posted: `world` or `camera`."""
    posted_fps: float | None = None
    """Of the posted frames, where `fps` is another rate."""

    def __len__(self) -> int:
        return len(self.rotations)


def parse_json(body: bytes, options: Options, pelvis: NDArray[np.float32], max_frames: int) -> PoseSequence:
    """Poses from JSON: `poses`, and optionally `translations`, `fps`, `up_axis`, `units`, `rotation`, `frame`.

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
    poses = numbers(document.pop("poses"), "poses")
    translations = document.pop("translations", None)
    if translations is not None:
        translations = numbers(translations, "translations")
    return _sequence(poses, translations, document, options, pelvis, max_frames)


def parse_npz(
    body: bytes, options: Options, pelvis: NDArray[np.float32], max_frames: int, max_bytes: int
) -> PoseSequence:
    """Poses from an .npz in the layout of AMASS, CAPE or SMPL, or from a `.smpl`; other arrays are not looked at.

    Raises:
        InvalidPose: no safe archive of poses; the subclass says why.
        BodyTooLarge: the arrays are larger than `max_bytes`.
    """
    arrays = read_npz(body, NPZ_KEYS, max_bytes)
    said: dict[str, Any] = {
        name: str(arrays[name].reshape(())) for name in _SAID_KEYS if name in arrays and arrays[name].size == 1
    }
    warnings: tuple[str, ...] = ()
    if "bodyPose" in arrays:
        warnings = _smpl_warnings(arrays)
        poses, translations = arrays["bodyPose"], arrays.get("bodyTranslation")
        poses = poses[None] if poses.ndim == 2 else poses
        fps = arrays.get("frameRate")
    else:
        poses, translations = _first(arrays, _POSE_KEYS), _first(arrays, _TRANSLATION_KEYS)
        for root, rest in _SPLIT_POSE_KEYS:
            if poses is None and root in arrays and rest in arrays:
                poses = joined([arrays[root], arrays[rest]])
        if poses is None:
            raise InvalidPose(f"the .npz has no array {' or '.join(map(repr, _POSE_KEYS))}")
        # CAPE keeps one frame to a file, without the axis of the frames.
        poses = poses[None] if poses.ndim == 1 else poses
        fps = _first(arrays, _FPS_KEYS)
    if fps is not None:
        if fps.size != 1 or fps.dtype.kind == "U":
            raise OptionInvalid("the frame rate in the .npz is not one number")
        said["fps"] = float(fps.reshape(()))
    for name, array in (("poses", poses), ("translations", translations)):
        if array is not None and array.dtype.kind == "U":
            raise PoseNotNumber(f"the {name} are text")
    if translations is not None and translations.ndim == 1:
        translations = translations[None]
    return _sequence(poses, translations, said, options, pelvis, max_frames, warnings)


def frames_at_a_glance(body: bytes) -> int | None:
    """How many frames a posted .npz says it has, if it begins with them uncompressed.  Nothing of it is checked."""
    return first_rows(body, _POSE_KEYS)


def _smpl_warnings(arrays: Mapping[str, NDArray[Any]]) -> tuple[str, ...]:
    """What a `.smpl` has and an avatar has not; Meshcapade's smplcodec describes the file.

    Raises:
        InvalidPose: a version or a body that is not known.
    """
    codec, body = (_whole(arrays, name, default) for name, default in (("codecVersion", 1), ("smplVersion", 2)))
    if codec not in (1, 2):
        raise InvalidPose(f"expected a .smpl of codecVersion 1 or 2, got {codec}")
    if body not in _SMPL_BODIES:
        known = ", ".join(f"{number} ({name})" for number, name in _SMPL_BODIES.items())
        raise InvalidPose(f"expected a .smpl of smplVersion {known}, got {body}")
    return tuple(f"{what} of the .smpl is not used" for name, what in _SMPL_IGNORED.items() if name in arrays)


def _whole(arrays: Mapping[str, NDArray[Any]], name: str, default: int) -> int:
    array = arrays.get(name, np.array(default))
    if array.size != 1 or array.dtype.kind != "i":
        raise InvalidPose(f"expected {name} to be one whole number")
    return int(array.reshape(()))


def parse_one(pose: Any, translation: Any, options: Options, pelvis: NDArray[np.float32]) -> PoseSequence:
    """The single pose of a stream's message: nested lists from JSON, or arrays; any form accepted for one frame.

    Raises:
        InvalidPose: not a pose; the subclass says why.
    """
    rows, moves = (
        value[None] if isinstance(value, np.ndarray) else numbers([value], name)
        for value, name in ((pose, "pose"), (translation, "translation"))
    )
    return _sequence(rows, moves, {}, options, pelvis, max_frames=1)


def _sequence(
    poses: NDArray[Any],
    translations: NDArray[Any] | None,
    said: Mapping[str, Any],
    options: Options,
    pelvis: NDArray[np.float32],
    max_frames: int,
    warnings: tuple[str, ...] = (),
) -> PoseSequence:
    up_axis = _settle("up_axis", options.up_axis, said.get("up_axis"), "y", UP_AXES)
    units = _settle("units", options.units, said.get("units"), "m", UNITS)
    frame = _settle("frame", options.frame, said.get("frame"), "world", FRAMES)
    check_axes(frame, up_axis)
    named = _settle("rotation", options.rotation, said.get("rotation"), None, ROTATIONS)
    posted_fps = _settle_fps(options.fps, said.get("fps"))
    if options.target_fps and options.every != 1:
        raise OptionInvalid("expected every or target_fps, got both")

    if poses.shape[:1] == (0,):
        raise PoseEmpty("expected at least one frame, got none")
    joints, rotation = by_joint(poses, named)
    if translations is None:
        translations = np.zeros((len(joints), 3))
    if translations.shape != (len(joints), 3):
        raise PoseShapeInvalid(f"expected translations of shape ({len(joints)}, 3), got {translations.shape}")
    # From here on, only frames that are needed cost anything.
    wanted = count_wanted(len(joints), posted_fps, options.target_fps, options.every)
    if wanted > max_frames:
        raise TooManyFrames(f"expected at most {max_frames} frames, got {wanted}", limit_frames=max_frames)
    selection = select(len(joints), posted_fps, options.target_fps, options.every)
    frames = selection.frames
    first, used = LAYOUTS[joints.shape[1]]
    if joints.shape[1] in IGNORED:
        warnings += (f"{IGNORED[joints.shape[1]]} are not used",)
    joints = joints[frames, :used].astype(np.float64)
    moved = translations[frames].astype(np.float64) * (0.01 if units == "cm" else 1.0)
    check_finite(joints, first, frames)
    check_finite(moved, None, frames)
    check_translations(moved, frames)

    rotations = to_matrices(joints, rotation, options.normalize, frames)
    if used < 24:
        rotations, some = np.tile(np.eye(3), (len(joints), 24, 1, 1)), rotations
        rotations[:, first : first + used] = some
    rotations, moved = resample(rotations, moved, selection)
    turn = _CAMERA_TO_WORLD if frame == "camera" else _Z_UP_TO_Y_UP if up_axis == "z" else None
    if turn is not None:
        # The whole world turns, about its origin: the root joint's rest position turns with it.
        rotations[:, 0] = turn @ rotations[:, 0]
        moved = (moved + pelvis) @ turn.T - pelvis
    fps = options.target_fps or posted_fps / options.every
    return PoseSequence(
        rotations=rotations.astype(np.float32),
        translation=moved.astype(np.float32),
        fps=fps,
        up_axis=up_axis,
        units=units,
        rotation=rotation,
        warnings=warnings,
        frame=frame,
        posted_fps=posted_fps if posted_fps != fps else None,
    )


def check_axes(frame: str, up_axis: str) -> None:
    """Refuse a frame and an up axis that contradict each other.

    Raises:
        OptionInvalid: they do.
    """
    if frame == "camera" and up_axis != "y":
        raise OptionInvalid("frame=camera has y down; it does not go with up_axis=z")


def _settle(name: str, query: Any, body: Any, default: Any, allowed: tuple[str, ...]) -> Any:
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


def _first(arrays: Mapping[str, NDArray[Any]], names: tuple[str, ...]) -> NDArray[Any] | None:
    return next((arrays[name] for name in names if name in arrays), None)
