"""What each source's files hold, and which axes, units and frame its numbers are in.

Nothing is guessed: what a source is known to write is applied and said; what its files leave open must be told.
Layouts are those of the sources' own programs (4DHumans/PHALP, WHAM, GVHMR, TRAM, PromptHMR) in 2025.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.convert.bvh import BvhError, read_bvh, read_joint_map, smpl_motion
from service.convert.pickles import Refused, read_pickle
from service.errors import AvatarServiceError
from service.npz import read_npz
from service.pose_values import joined
from service.poses import NPZ_KEYS

MAX_BYTES = 4 << 30


class ConvertError(ValueError):
    """The input is not what it was said to be, or something must be said about it."""


@dataclass(frozen=True)
class Asked:
    """What the user said; None where nothing was."""

    person: str | None = None
    frame: str | None = None
    """`camera` takes the motion as the camera saw it, where a source has both."""
    units: str | None = None
    joint_map: Path | None = None
    align: bool = False
    trust: bool = False


@dataclass(frozen=True)
class Motion:
    """Poses as the source has them."""

    source: str
    poses: NDArray[Any]
    """Any shape that the service accepts."""
    translation: NDArray[Any] | None
    fps: float | None = None
    up_axis: str | None = None
    """`y` or `z`; None: the source leaves it open."""
    units: str | None = "m"
    frame: str = "world"
    betas: NDArray[Any] | None = None
    frame_numbers: NDArray[Any] | None = None
    """Of the video; gaps are said."""
    said: tuple[str, ...] = field(default=())


def read_motion(path: Path, source: str | None, asked: Asked) -> Motion:
    """Read a file, or a folder of CAPE.

    Args:
        source: one of `SOURCES`; None tells it from the file, where only one fits.

    Raises:
        ConvertError: it cannot be read, or something must be said first.
    """
    try:
        content = _open(path, asked)
        if isinstance(content, Motion):
            return content
        fitting = [name for name, (fits, _) in SOURCES.items() if fits(content) and source in (None, name)]
        if len(fitting) != 1:
            what = (
                f"the keys {', '.join(map(str, list(content)[:8]))}"
                if isinstance(content, Mapping)
                else str(type(content))
            )
            raise ConvertError(f"expected what {source or ', '.join(SOURCES)} writes, got {what}")
        return SOURCES[fitting[0]][1](content, asked)
    except (Refused, BvhError, AvatarServiceError, OSError) as error:
        raise ConvertError(f"{path}: {error}") from error
    except ConvertError as error:
        raise ConvertError(f"{path}: {error}") from error
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise ConvertError(f"{path}: not laid out as expected: {type(error).__name__} {error}") from error


def _open(path: Path, asked: Asked) -> Any:
    """The content of a pickle of any kind, or the motion where the file itself says what it is."""
    if path.is_dir():
        return _cape(path)
    if path.suffix == ".bvh":
        given = read_joint_map(asked.joint_map) if asked.joint_map else None
        bvh = read_bvh(path.read_text())
        rotations, translation, said = smpl_motion(bvh, given, asked.units, asked.align)
        return Motion("BVH", rotations, translation, bvh.fps, said=tuple(said))
    data = path.read_bytes()
    if path.suffix in (".npz", ".smpl"):
        return _arrays(read_npz(data, (*NPZ_KEYS, "betas"), MAX_BYTES))
    content = read_pickle(path, asked.trust)
    if isinstance(content, np.ndarray):
        return Motion("array", content, None, units=None)
    return content


def _arrays(arrays: dict[str, NDArray[Any]]) -> Motion:
    """AMASS, SMPL, SMPL-X, CAPE's single frames, `.smpl`, and what `reposer convert` writes."""
    said = {key: str(arrays[key].reshape(())) for key in ("up_axis", "units", "frame") if key in arrays}
    fps = next(
        (arrays[key] for key in ("mocap_framerate", "mocap_frame_rate", "fps", "frameRate") if key in arrays), None
    )
    translation = next(
        (arrays[key] for key in ("trans", "transl", "translations", "bodyTranslation") if key in arrays), None
    )
    poses = next((arrays[key] for key in ("poses", "pose", "bodyPose") if key in arrays), None)
    for root, rest in (("root_orient", "pose_body"), ("global_orient", "body_pose")):
        if poses is None and root in arrays and rest in arrays:
            poses = joined([arrays[root], arrays[rest]])
    if poses is None:
        raise ConvertError("the archive has no poses, pose, bodyPose, or root and body given apart")
    single = poses.ndim == 1 or ("bodyPose" in arrays and poses.ndim == 2)
    return Motion(
        ".smpl" if "bodyPose" in arrays else "npz",
        poses[None] if single else poses,
        translation[None] if translation is not None and translation.ndim == 1 else translation,
        None if fps is None else float(fps.reshape(())),
        said.get("up_axis"),
        said.get("units"),
        said.get("frame", "world"),
        arrays.get("betas"),
    )


def _cape(folder: Path) -> Motion:
    """A folder with one .npz a frame, numbered at the end of their names."""
    files = sorted(folder.glob("*.npz"), key=lambda file: [int(part) for part in re.findall(r"\d+", file.stem)][-1:])
    if not files:
        raise ConvertError("the folder has no .npz; CAPE has one a frame")
    frames = [_arrays(read_npz(file.read_bytes(), NPZ_KEYS, MAX_BYTES)) for file in files]
    moved = [frame.translation for frame in frames if frame.translation is not None]
    translation = np.concatenate(moved) if len(moved) == len(frames) else None
    return Motion("CAPE", np.concatenate([frame.poses for frame in frames]), translation, up_axis="y")


def _gvhmr(content: Any, asked: Asked) -> Motion:
    part = content["smpl_params_incam" if asked.frame == "camera" else "smpl_params_global"]
    poses = joined([np.asarray(part["global_orient"]), np.asarray(part["body_pose"])])
    motion = Motion("GVHMR", poses, np.asarray(part["transl"]), up_axis="y", betas=_mean_shape(part.get("betas")))
    return _as_seen(motion, asked)


def _wham(content: Any, asked: Asked) -> Motion:
    person, part = _person(content, asked)
    names = ("pose", "trans") if asked.frame == "camera" else ("pose_world", "trans_world")
    motion = Motion(
        f"WHAM, person {person}",
        np.asarray(part[names[0]]),
        np.asarray(part[names[1]]),
        up_axis="y",
        betas=_mean_shape(part.get("betas")),
        frame_numbers=_optional(part, "frame_ids"),
    )
    return _as_seen(motion, asked)


def _prompt_hmr(content: Any, asked: Asked) -> Motion:
    person, track = _person(content["people"], asked)
    part = track["smplx_cam" if asked.frame == "camera" else "smplx_world"]
    motion = Motion(
        f"PromptHMR, person {person}",
        np.asarray(part["pose"])[:, :66],
        np.asarray(part["trans"]),
        up_axis="y",
        betas=_mean_shape(part.get("shape")),
        frame_numbers=_optional(track, "frames"),
    )
    return _as_seen(motion, asked)


def _tram(content: Any, asked: Asked) -> Motion:
    translation = np.asarray(content["pred_trans"]).reshape(-1, 3)
    shape, numbers = _mean_shape(content.get("pred_shape")), _optional(content, "frame")
    poses = np.asarray(content["pred_rotmat"])
    return Motion("TRAM", poses, translation, frame="camera", betas=shape, frame_numbers=numbers)


def _hmr2(content: Any, asked: Asked) -> Motion:
    """A network's own output: one body a row."""
    part = content["pred_smpl_params"]
    poses = joined([np.asarray(part["global_orient"]).reshape(-1, 1, 3, 3), np.asarray(part["body_pose"])])
    shift = content.get("pred_cam_t_full", content.get("pred_cam_t"))
    translation = None if shift is None else np.asarray(shift)
    return Motion("HMR2", poses, translation, frame="camera", betas=_mean_shape(part.get("betas")))


def _phalp(content: Any, asked: Asked) -> Motion:
    """4DHumans' tracks: a record for each picture, in it a list for each person seen."""
    tracks: dict[Any, list[tuple[int, Any, Any]]] = {}
    for number, picture in enumerate(content.values()):
        ids = picture["tid"] if len(picture.get("tid", ())) else picture.get("tracked_ids", ())
        for place, identity in enumerate(ids[: len(picture["smpl"])]):
            body, camera = picture["smpl"][place], picture["camera"][place]
            tracks.setdefault(int(identity), []).append((picture.get("time", number), body, camera))
    person, seen = _person(tracks, asked)
    roots = [np.asarray(body["global_orient"]).reshape(1, 3, 3) for _, body, _ in seen]
    bodies = [np.asarray(body["body_pose"]).reshape(-1, 3, 3) for _, body, _ in seen]
    poses = np.concatenate([np.stack(roots), np.stack(bodies)], axis=1)
    return Motion(
        f"4DHumans, person {person}",
        poses,
        np.stack([np.asarray(camera).reshape(-1)[:3] for *_, camera in seen]),
        frame="camera",
        betas=_mean_shape([np.asarray(body["betas"]).reshape(-1) for _, body, _ in seen if "betas" in body]),
        frame_numbers=np.array([time for time, *_ in seen]),
    )


def _as_seen(motion: Motion, asked: Asked) -> Motion:
    return replace(motion, frame="camera", up_axis=None) if asked.frame == "camera" else motion


def _person(people: Mapping[Any, Any], asked: Asked) -> tuple[Any, Any]:
    names = {str(name): name for name in people}
    if asked.person is None and len(names) == 1:
        return next(iter(people.items()))
    if asked.person not in names:
        raise ConvertError(f"has the persons {', '.join(names)}; say --person")
    return names[asked.person], people[names[asked.person]]


def _mean_shape(betas: Any) -> NDArray[Any] | None:
    if betas is None or not len(betas):
        return None
    array = np.asarray(betas, np.float64)
    return array.reshape(-1, array.shape[-1]).mean(axis=0)


def _optional(part: Mapping[str, Any], key: str) -> NDArray[Any] | None:
    return np.asarray(part[key]).reshape(-1) if key in part else None


def _has(*keys: str) -> Callable[[Any], bool]:
    return lambda content: isinstance(content, Mapping) and all(key in content for key in keys)


def _each_has(*keys: str) -> Callable[[Any], bool]:
    return lambda content: isinstance(content, Mapping) and bool(content) and all(map(_has(*keys), content.values()))


SOURCES: dict[str, tuple[Callable[[Any], bool], Callable[[Any, Asked], Motion]]] = {
    "gvhmr": (_has("smpl_params_global"), _gvhmr),
    "wham": (_each_has("pose_world", "trans_world"), _wham),
    "prompthmr": (_has("people"), _prompt_hmr),
    "tram": (_has("pred_rotmat", "pred_trans"), _tram),
    "hmr2": (_has("pred_smpl_params"), _hmr2),
    "4dhumans": (_each_has("smpl", "camera"), _phalp),
}
"""Pickled sources: whether a content is theirs, and how to read it."""
