"""`reposer convert`: one motion in, the `.npz` that the service, aitviewer and AMASS's readers take."""

import argparse
import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.convert.sources import MAX_BYTES, SOURCES, Asked, ConvertError, Motion, read_motion
from service.errors import AvatarServiceError
from service.pose_values import LAYOUTS, by_joint, check_finite, to_matrices
from service.poses import DEFAULT_FPS, ROTATIONS, Options, parse_npz
from service.rotations import axis_angle

UNITS_M = {"m": 1.0, "cm": 0.01, "mm": 0.001, "in": 0.0254}


def add_parser(commands: Any) -> None:
    """The command and its options."""
    parser = commands.add_parser(
        "convert",
        help="turn poses of an estimator, of mocap or of AMASS into a plain .npz",
        description="Reads AMASS, CAPE (a folder), .smpl, BVH, .npy, and what 4DHumans, HMR2, WHAM, GVHMR, TRAM and "
        "PromptHMR write; says what it applied.",
    )
    parser.add_argument("input", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .npz to write")
    parser.add_argument(
        "--from", dest="source", choices=tuple(SOURCES), help="what wrote a pickle; told from it if clear"
    )
    parser.add_argument("--up-axis", choices=("y", "z"), help="up axis of the numbers; AMASS has z")
    parser.add_argument("--units", choices=tuple(UNITS_M), help="units of the translations")
    parser.add_argument("--frame", choices=("world", "camera"), help="camera: y down, z away, as the camera saw it")
    parser.add_argument("--rotation", choices=ROTATIONS, help="what the numbers of a plain array are")
    parser.add_argument("--fps", type=float, help="frames a second, where the file does not say")
    parser.add_argument("--person", help="whose motion, where a file has several")
    parser.add_argument("--joint-map", type=Path, help="BVH: JSON from SMPL's joint names to the file's")
    parser.add_argument("--align", action="store_true", help="BVH: turn a rest pose that is no T-pose onto one")
    parser.add_argument(
        "--trust", action="store_true", help="run code that a pickle asks for; only if you trust its maker"
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Convert, write, and say what was applied; returns the exit status."""
    part = parsed.output.with_name(parsed.output.name + ".part")
    try:
        asked = Asked(parsed.person, parsed.frame, parsed.units, parsed.joint_map, parsed.align, parsed.trust)
        motion = read_motion(parsed.input, parsed.source, asked)
        content, said = convert(motion, parsed.up_axis, parsed.units, parsed.frame, parsed.rotation, parsed.fps)
        part.write_bytes(content)
        os.replace(part, parsed.output)
    except (ConvertError, OSError) as error:
        print(f"reposer: {error}", file=sys.stderr)
        return 1
    finally:
        part.unlink(missing_ok=True)
    for line in said:
        print(line)
    print(f"wrote {parsed.output}")
    return 0


def convert(
    motion: Motion,
    up_axis: str | None = None,
    units: str | None = None,
    frame: str | None = None,
    rotation: str | None = None,
    fps: float | None = None,
) -> tuple[bytes, list[str]]:
    """An .npz of `poses` (F, 72) axis-angle, `trans` (F, 3) in metres, and what its numbers mean; and that in words.

    Axes are not turned here: where the root's rest position goes with them, only an avatar knows.

    Raises:
        ConvertError: the poses are none, or what was said contradicts the source.
    """
    said = [f"source: {motion.source}", *motion.said]
    up_axis = _settled("--up-axis", up_axis, motion.up_axis, "y" if motion.frame == "world" else None, said)
    frame = _settled("--frame", frame, motion.frame, "world", said)
    # A BVH's are applied already.
    unit = "m" if motion.source == "BVH" else str(_settled("--units", units, motion.units, "m", said))
    fps_used = float(_settled("--fps", fps, motion.fps, DEFAULT_FPS, said))
    try:
        poses = _axis_angle(motion.poses, rotation)
        moved = np.zeros((len(poses), 3)) if motion.translation is None else np.asarray(motion.translation, np.float64)
        arrays: dict[str, Any] = {
            "poses": poses.astype(np.float32),
            "trans": (moved * UNITS_M[unit]).astype(np.float32),
            "betas": np.zeros(10) if motion.betas is None else motion.betas.astype(np.float64),
            "gender": np.array("neutral"),
            "mocap_framerate": np.array(fps_used),
            "up_axis": np.array(up_axis or "y"),
            "units": np.array("m"),
            "frame": np.array(frame),
        }
        file = io.BytesIO()
        np.savez(file, **arrays)
        # What is written is what the service will read; so it is read once here.
        parse_npz(file.getvalue(), Options(), np.zeros(3, np.float32), len(poses), MAX_BYTES)
    except AvatarServiceError as error:
        raise ConvertError(str(error)) from error
    if motion.frame_numbers is not None and (np.diff(motion.frame_numbers) > 1).any():
        gaps = int((np.diff(motion.frame_numbers) > 1).sum())
        said.append(f"warning: the person is not seen all the time: {gaps} gaps are closed up")
    said.append(f"frames: {len(poses)}, {len(poses) / fps_used:.2f} s")
    return file.getvalue(), said


def _settled(option: str, asked: Any, known: Any, default: Any, said: list[str]) -> Any:
    """What holds, and one line that says why."""
    if asked is not None and known is not None and asked != known and option != "--fps":
        raise ConvertError(f"{option} says {asked}, the source has {known}")
    value = next((value for value in (asked, known, default) if value is not None), None)
    why = (
        "as told"
        if asked is not None
        else "from the source"
        if known is not None
        else f"taken; {option} says otherwise"
    )
    if value is not None:
        said.append(f"{option.removeprefix('--').replace('-', ' ')}: {value} ({why})")
    return value


def _axis_angle(poses: NDArray[Any], rotation: str | None) -> NDArray[np.float64]:
    """(F, 72) from every accepted shape; hands beyond SMPL's and faces are left out."""
    joints, kind = by_joint(np.asarray(poses), rotation)
    first, used = LAYOUTS[joints.shape[1]]
    joints, frames = joints[:, :used].astype(np.float64), np.arange(len(joints))
    check_finite(joints, first, frames)
    result = np.zeros((len(joints), 24, 3))
    result[:, first : first + used] = (
        joints if kind == "axis_angle" else axis_angle(to_matrices(joints, kind, kind == "matrix", frames))
    )
    return result.reshape(-1, 72)
