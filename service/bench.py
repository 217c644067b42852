"""`make bench`: what a reposed frame costs, written to `out/bench/repose.json`.

Every figure is a median of repeated runs of one process; bare linear blend skinning in NumPy, which every avatar must
pay at least, is measured beside it.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.bundle.files import read_bundle
from service.bundle.manifest import LODS
from service.bundle.skeleton import axis_angle_to_matrix
from service.engine import OnnxEngine

BATCHES = (1, 8)
REPEATS = 7


def main() -> None:
    """Measure one avatar and write the file."""
    parser = argparse.ArgumentParser(prog="python -m service.bench", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("avatars/open"))
    parser.add_argument("--motion", type=Path, default=Path("assets/demo-motion.npz"))
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parsed = parser.parse_args()

    started = time.perf_counter()
    bundle = read_bundle(parsed.bundle)
    engine = OnnxEngine(bundle.repose_onnx)
    rows = [row("avatar_load", time.perf_counter() - started, "s")]
    with np.load(parsed.motion, allow_pickle=False) as motion:  # our own file, not an upload
        rotations = axis_angle_to_matrix(motion["poses"].reshape(-1, 24, 3))
        translation = motion["trans"]
    bones = bundle.skeleton.bone_transforms(rotations)
    roots = bundle.skeleton.root_transforms(rotations, translation)
    for lod in LODS:
        mesh = bundle.meshes[lod]
        weights = _dense_weights(mesh.skin_joints, mesh.skin_weights)
        for batch in BATCHES:
            b, r = bones[:batch], roots[:batch]
            ins = _seconds(lambda mesh=mesh, b=b, r=r: engine.repose(mesh.vertices, b, r)) / batch
            lbs = _seconds(lambda mesh=mesh, w=weights, b=b, r=r: _lbs(mesh.vertices, w, b, r)) / batch
            name = f"{engine.device}_{lod}_{len(mesh.vertices)}v_batch{batch}"
            rows += [row(f"{name}_ins", ins, "s/frame"), row(f"{name}_lbs_numpy", lbs, "s/frame")]
            rows.append(row(f"{name}_ins_over_lbs", ins / lbs, "ratio"))
    write_report(parsed.out / "repose.json", rows)


def row(name: str, value: float, unit: str, target: float | None = None, at_least: bool = True) -> dict[str, Any]:
    """One figure; `met` is computed from the target, which it is to reach or, unless `at_least`, not to exceed."""
    met = None if target is None else value >= target if at_least else value <= target
    return {"name": name, "value": value, "unit": unit, "target": target, "met": met}


def write_report(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a benchmark's file and print its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": _machine(), "commit": _commit(), "rows": rows}
    path.write_text(json.dumps(report, indent=1) + "\n")
    for entry in rows:
        verdict = "" if entry["met"] is None else "met" if entry["met"] else f"missed: {entry['target']}"
        print(f"{entry['name']:48} {entry['value']:12.5f} {entry['unit']:10} {verdict}")


def _lbs(
    vertices: NDArray[np.float32],
    weights: NDArray[np.float32],
    bones: NDArray[np.float32],
    roots: NDArray[np.float32],
) -> NDArray[np.float32]:
    rows = (roots[:, None] @ bones)[..., :3, :].reshape(len(bones), -1, 12)
    blended = (weights @ rows).reshape(len(bones), -1, 3, 4)
    return np.einsum("fnab,nb->fna", blended[..., :3], vertices) + blended[..., 3]


def _dense_weights(joints: NDArray[np.uint8] | None, strongest: NDArray[np.float32] | None) -> NDArray[np.float32]:
    if joints is None or strongest is None:
        raise ValueError("the bundle's meshes carry no skinning weights")
    weights = np.zeros((len(joints), 24), np.float32)
    np.add.at(weights, (np.arange(len(joints))[:, None], joints), strongest)
    return weights


def _seconds(run: Callable[[], Any]) -> float:
    """Median over `REPEATS`, after one run that is not counted."""
    run()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return median(times)


def _machine() -> str:
    model = next(
        (line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return f"{len(os.sched_getaffinity(0))} cores, {model}, Python {platform.python_version()}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _commit() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    main()
