"""`python -m service.bench`: what a reposed frame costs, written to `out/bench/repose.json`; needs no torch.

Every figure is a median of repeated runs.  The forms that are compared take turns, so that a busy machine slows all of
them; bare linear blend skinning in NumPy, which every avatar must pay at least, is one of them.
`training.bench_repose` writes the same file with more rows.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.bundle.files import Bundle, read_bundle
from service.bundle.glb import Mesh
from service.bundle.skeleton import axis_angle_to_matrix
from service.engine import OnnxEngine

SIZES = {"5k": 5_000, "10k": 10_000, "30k": 30_000, "100k": 100_000}
BATCHES = (1, 8, 64)
SLOW_LIMIT = 320_000
"""Vertices of all frames together up to which the slow forms are measured."""
SLOW_FORMS = ("plain_onnx", "plain_torch")
REPEATS = 5
FLOAT32 = NDArray[np.float32]
WARM_UP_S = 0.05
"""Of each form in each turn, not counted."""
Form = Callable[[FLOAT32, FLOAT32, FLOAT32], Any]
"""Canonical vertices, bone transforms and root transforms to anything."""


def main() -> None:
    """Measure one avatar and write the file."""
    parser = argparse.ArgumentParser(prog="python -m service.bench", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--probe", type=int, metavar="VERTICES", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.probe:
        print(json.dumps(_probe(parsed.bundle, parsed.probe)))
        return
    write_report(parsed.out / "repose.json", repose_rows(parsed.bundle, parsed.motion, {}))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What both benchmarks of reposing are told."""
    parser.add_argument("--bundle", type=Path, default=Path("avatars/open"))
    parser.add_argument("--motion", type=Path, default=Path("assets/demo-motion.npz"))
    parser.add_argument("--out", type=Path, default=Path("out/bench"))


def repose_rows(path: Path, motion: Path, more_forms: Mapping[str, Form]) -> list[dict[str, Any]]:
    """All rows of an avatar; `more_forms` are measured beside our own."""
    bundle = read_bundle(path)
    engine, reference = OnnxEngine(bundle.repose_onnx), OnnxEngine(bundle.repose_onnx, plain=True)
    forms = {"fast_onnx": engine.repose, "plain_onnx": reference.repose, "lbs_numpy": _lbs_form(bundle), **more_forms}
    bones, roots = motion_transforms(bundle, motion)
    seconds = {
        size: measure(forms, vertices_of_size(bundle, count), bones, roots, BATCHES) for size, count in SIZES.items()
    }
    rows = [
        row(f"{engine.device}_{size}_batch{batch}_{form}", value, "s/frame")
        for size, found in seconds.items()
        for (batch, form), value in found.items()
    ]
    for size, target in (("30k", 10.0), ("10k", 6.0)):
        ratio = {batch: seconds[size][batch, "plain_onnx"] / seconds[size][batch, "fast_onnx"] for batch in (1, 8)}
        rows.append(row(f"{engine.device}_{size}_fast_over_plain", ratio[8], "ratio", target))
        rows.append(row(f"{engine.device}_{size}_fast_over_plain_single_frame", ratio[1], "ratio", target))
        floor = seconds[size][8, "fast_onnx"] / seconds[size][8, "lbs_numpy"]
        rows.append(row(f"{engine.device}_{size}_fast_over_bare_lbs", floor, "ratio"))
    preview = measure({"fast_onnx": engine.repose}, bundle.meshes["preview"].vertices, bones, roots, (1,))
    rows.append(row(f"{engine.device}_preview_fps", 1 / preview[1, "fast_onnx"], "frames/s", 30.0))
    fast = {(size, batch): seconds[size][batch, "fast_onnx"] for size in SIZES for batch in BATCHES}
    rows.append(row("seconds_100k_over_10k", fast["100k", 8] / fast["10k", 8], "ratio", 10.0, at_least=False))
    rows.append(row("seconds_a_frame_batch64_over_1", fast["10k", 64] / fast["10k", 1], "ratio", 1.0, at_least=False))
    error = bundle.manifest.metrics.get("fast_max_error_mm")
    rows.append(row("fast_max_error_mm", error, "mm", 0.1, at_least=False))
    on_gpu = engine.device == "cuda"
    milliseconds = 1000 * fast["10k", 64] if on_gpu else None
    rows.append(row("gpu_10k_batch64_ms", milliseconds, "ms", 0.5, at_least=False))
    rows.append(row("gpu_10k_single_ms", 1000 * fast["10k", 1] if on_gpu else None, "ms", 3.0, at_least=False))
    return rows + _process_rows(path)


def row(
    name: str, value: float | None, unit: str, target: float | None = None, at_least: bool = True
) -> dict[str, Any]:
    """One figure; `met` is computed from the target, which it is to reach or, unless `at_least`, not to exceed.

    A value of None says that the figure is absent: there was nothing here to measure it on.
    """
    met = None if target is None or value is None else value >= target if at_least else value <= target
    return {"name": name, "value": value, "unit": unit, "target": target, "met": met}


def write_report(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a benchmark's file and print its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": _machine(), "commit": _commit(), "rows": rows}
    path.write_text(json.dumps(report, indent=1) + "\n")
    for entry in rows:
        verdict = "" if entry["met"] is None else "met" if entry["met"] else f"missed: {entry['target']}"
        value = "absent" if entry["value"] is None else f"{entry['value']:.5f}"
        print(f"{entry['name']:48} {value:>12} {entry['unit']:10} {verdict}")


def measure(
    forms: Mapping[str, Form], vertices: FLOAT32, bones: FLOAT32, roots: FLOAT32, batches: tuple[int, ...]
) -> dict[tuple[int, str], float]:
    """Seconds a frame by batch and form: medians of runs in turns, after one each that is not counted."""
    found = {}
    for batch in batches:
        slow = batch * len(vertices) > SLOW_LIMIT
        chosen = {name: form for name, form in forms.items() if not (slow and name in SLOW_FORMS)}
        times: dict[str, list[float]] = {name: [] for name in chosen}
        for _ in range((3 if slow else REPEATS) + 1):
            for name, form in chosen.items():
                # As in service, where one form runs on and on: the caches are its own, and no other's threads spin.
                warm_at = time.perf_counter() + WARM_UP_S
                while time.perf_counter() < warm_at:
                    form(vertices, bones[:batch], roots[:batch])
                started = time.perf_counter()
                form(vertices, bones[:batch], roots[:batch])
                times[name].append(time.perf_counter() - started)
        found |= {(batch, name): median(spent[1:]) / batch for name, spent in times.items()}
    return found


def vertices_of_size(bundle: Bundle, count: int) -> FLOAT32:
    """So many points of the canonical surface, neighbours close together: every n-th of the smallest level of detail
    that has enough, or of the largest with the middles of its edges."""
    meshes = sorted(bundle.meshes.values(), key=lambda mesh: len(mesh.vertices))
    points = next((mesh.vertices for mesh in meshes if len(mesh.vertices) >= count), None)
    if points is None:
        points = _with_middles(meshes[-1])
    return np.ascontiguousarray(points[np.linspace(0, len(points) - 1, count).astype(int)])


def motion_transforms(bundle: Bundle, motion: Path) -> tuple[FLOAT32, FLOAT32]:
    """Bone and root transforms of a motion file of ours."""
    with np.load(motion, allow_pickle=False) as poses:
        rotations = axis_angle_to_matrix(poses["poses"].reshape(-1, 24, 3))
        translation = poses["trans"]
    return bundle.skeleton.bone_transforms(rotations), bundle.skeleton.root_transforms(rotations, translation)


def _with_middles(mesh: Mesh) -> FLOAT32:
    edges = np.unique(np.sort(mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1), axis=0)
    middles = mesh.vertices[edges].mean(axis=1, dtype=np.float32)
    # Beside their first end, as a mesher would have them.
    order = np.argsort(np.concatenate([np.arange(len(mesh.vertices)), edges[:, 0]]), kind="stable")
    return np.concatenate([mesh.vertices, middles])[order]


def _process_rows(path: Path) -> list[dict[str, Any]]:
    """What only a process of its own can tell: from nothing to the first frame, and its largest size."""
    cold, load, peak = [], [], {}
    for count in (*[SIZES["10k"]] * 3, SIZES["100k"]):
        started = time.perf_counter()
        command = [sys.executable, "-m", "service.bench", "--bundle", str(path), "--probe", str(count)]
        told = json.loads(subprocess.run(command, capture_output=True, check=True, text=True, timeout=300).stdout)
        cold.append(time.perf_counter() - started)
        load.append(told["load_s"])
        peak[count] = told["peak_bytes"]
    return [
        row("cold_first_frame", median(cold[:3]), "s", 3.0, at_least=False),
        row("avatar_load", median(load[:3]), "s", 0.5, at_least=False),
        row("peak_memory_100k", peak[SIZES["100k"]] / 1e9, "GB", 2.0, at_least=False),
    ]


def _probe(path: Path, count: int) -> dict[str, float]:
    """Load the avatar and repose one frame, or eight of a large mesh."""
    started = time.perf_counter()
    bundle = read_bundle(path)
    engine = OnnxEngine(bundle.repose_onnx)
    loaded = time.perf_counter()
    frames = 8 if count == SIZES["100k"] else 1
    still = np.tile(np.eye(4, dtype=np.float32), (frames, 24, 1, 1))
    engine.repose(vertices_of_size(bundle, count), still, still[:, 0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"load_s": loaded - started, "peak_bytes": peak}


def _lbs_form(bundle: Bundle) -> Form:
    """Linear blend skinning of any points with weights that are at hand, as few or many as a real mesh has."""
    mesh = bundle.meshes["standard"]
    if mesh.skin_joints is None or mesh.skin_weights is None:
        raise ValueError("the bundle's meshes carry no skinning weights")
    dense = np.zeros((len(mesh.skin_joints), 24), np.float32)
    np.add.at(dense, (np.arange(len(dense))[:, None], mesh.skin_joints), mesh.skin_weights)
    weights = {count: np.resize(dense, (count, 24)) for count in SIZES.values()}

    def lbs(vertices: FLOAT32, bones: FLOAT32, roots: FLOAT32) -> FLOAT32:
        rows = (roots[:, None] @ bones)[..., :3, :].reshape(len(bones), -1, 12)
        blended = (weights[len(vertices)] @ rows).reshape(len(bones), -1, 3, 4)
        return np.einsum("fnab,nb->fna", blended[..., :3], vertices) + blended[..., 3]

    return lbs


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
