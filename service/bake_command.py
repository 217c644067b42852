"""The command `reposer bake`."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from service import bake
from service.bundle.files import BundleError, read_bundle
from service.engine import OnnxEngine, repose_in_batches
from service.errors import AvatarServiceError
from service.poses import Options, PoseSequence, parse_npz

MAX_FRAMES, MAX_BYTES = 100_000, 1 << 30


def add_parser(commands: Any) -> None:
    """The command and its options."""
    parser = commands.add_parser("bake", help="write an avatar as one skinned .glb with corrective blend shapes")
    parser.add_argument("bundle", type=Path, help="folder of one avatar")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .glb to write")
    parser.add_argument("--lod", default="standard")
    parser.add_argument("--motion", type=Path, nargs="*", default=[], help=".npz of poses like those it will play")
    parser.add_argument("--test", type=Path, nargs="*", default=[], help=".npz of held-out poses to measure on")
    parser.add_argument("--clip", type=Path, help=".npz of a motion to put in as an animation")
    parser.add_argument("--poses", type=int, default=20_000, help="poses to fit on (default: 20000)")
    parser.add_argument("--up-axis", choices=("y", "z"), help="up axis of the poses, where their files do not say")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Fit, measure, write; returns the exit status."""
    part = parsed.output.with_name(parsed.output.name + ".part")
    try:
        bundle = read_bundle(parsed.bundle.resolve())
        if parsed.lod not in bundle.meshes:
            raise ValueError(f"expected --lod to be one of {', '.join(bundle.meshes)}, got {parsed.lod}")
        skeleton, mesh = bundle.skeleton, bundle.meshes[parsed.lod]
        engine = OnnxEngine(bundle.repose_onnx)

        def poses_of(path: Path) -> PoseSequence:
            options = Options(up_axis=parsed.up_axis)
            return parse_npz(path.read_bytes(), options, skeleton.rest_joints[0], MAX_FRAMES, MAX_BYTES)

        library = [poses_of(path).rotations for path in parsed.motion]
        rotations = bake.plausible_poses(parsed.poses, np.concatenate(library) if library else None)
        clip = poses_of(parsed.clip) if parsed.clip else None
        data = bake.write(bake.fit(engine, skeleton, mesh, rotations), skeleton, bundle.manifest.id, clip)
        print(f"{parsed.output}: {len(data) / 1e6:.1f} MB, fitted on {len(rotations)} poses")
        for path in parsed.test:
            mean, p99, worst = errors_mm(data, engine, skeleton, mesh, poses_of(path))
            print(f"{path.name}: mean {mean:.2f} mm, p99 {p99:.2f} mm, worst {worst:.1f} mm off the avatar's graph")
        part.write_bytes(data)
        os.replace(part, parsed.output)
    except (BundleError, AvatarServiceError, OSError, ValueError) as error:
        print(f"reposer: {error}", file=sys.stderr)
        return 1
    finally:
        part.unlink(missing_ok=True)
    return 0


def errors_mm(data: bytes, engine: Any, skeleton: Any, mesh: Any, poses: PoseSequence) -> tuple[float, float, float]:
    """Mean, 99th percentile and maximum of the distances between a baked file's vertices and the engine's."""
    batches = repose_in_batches(engine, skeleton, mesh.vertices, poses, 8 * len(mesh.vertices))
    frames = (vertices for batch in batches for vertices in batch.vertices)
    off = [
        np.linalg.norm(found - vertices, axis=1)
        for found, vertices in zip(bake.evaluate(data, skeleton, poses), frames, strict=True)
    ]
    distances = 1e3 * np.concatenate(off)
    return float(distances.mean()), float(np.percentile(distances, 99)), float(distances.max())
