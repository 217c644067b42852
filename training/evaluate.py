"""Evaluation on held-out sequences: IoU near the surface and in the box (app. A.3), and distances in millimetres.

Two ways to ask the avatar what is inside: `mesh` reposes the canonical mesh and takes winding numbers, which measures
what the service sends; `field` searches canonical roots and asks the occupancy network, which is the paper's way.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from model.ins import INS
from service.bundle.glb import Mesh
from training.correspondence import Correspondence, find_correspondence
from training.data.sampling import surface_points
from training.data.winding import occupancy
from training.frames import Frames
from training.metrics import intersection_over_union, surface_errors

SURFACE_POINTS, BOX_POINTS = 20_000, 20_000
SCAN_POINTS = 20_000
"""Points on the scan from which the distance to the model is taken."""
Through = Literal["mesh", "field"]
Inside = Callable[[NDArray[np.float32]], NDArray[np.bool_]]


@dataclass(frozen=True)
class FrameScore:
    """One frame's figures, or means of many; `metrics.surface_errors` defines the distances.

    Through the field there are no distances: it has no vertices.
    """

    sequence: str
    frame: int
    iou_surface: float
    """Percent."""
    iou_bbox: float
    """Percent."""
    point_to_surface_mm: float | None = None
    """Mean over predicted vertices."""
    point_to_surface_p95_mm: float | None = None
    point_to_surface_p99_mm: float | None = None
    scan_to_model_mm: float | None = None
    """Mean over points of the scan, uniform by area."""
    scan_to_model_p95_mm: float | None = None
    scan_to_model_p99_mm: float | None = None
    chamfer_mm: float | None = None
    normal_consistency: float | None = None
    correspondence_mm: float | None = None
    """Mean over the predicted vertices that have a material point (`training.correspondence`); None where none has."""


FIGURES = tuple(field.name for field in fields(FrameScore))[2:]


def evaluate(ins: INS, mesh: Mesh, frames: Frames, through: Through = "mesh", seed: int = 0) -> list[FrameScore]:
    """Score every frame.

    Args:
        mesh: the canonical mesh; not looked at through the field.
        frames: a split that was not trained on.
    """
    matter = find_correspondence(ins, mesh, frames.subject) if through == "mesh" else None
    numbers = tqdm(range(len(frames)), desc=f"evaluate {through}", unit="frame")
    return [score_frame(ins, mesh, frames, number, through, matter, seed) for number in numbers]


def score_frame(
    ins: INS,
    mesh: Mesh,
    frames: Frames,
    frame: int,
    through: Through = "mesh",
    matter: Correspondence | None = None,
    seed: int = 0,
) -> FrameScore:
    """Score one frame of a split, given by its place there.

    All points depend on the seed and on that place only, so figures compare across runs.
    """
    samples = frames.samples(frame, np.random.default_rng([seed, frame]), SURFACE_POINTS, BOX_POINTS)
    distances: dict[str, float | None] = {}
    if through == "mesh":
        posed = posed_vertices(ins, mesh, frames, frame)
        inside = _through_mesh(posed, mesh.faces)
        distances |= _distances(posed, mesh.faces, frames, frame, matter, np.random.default_rng([seed, frame, 1]))
    else:
        inside = _through_field(ins, frames.bone_transforms[frame : frame + 1])
    # One question for both kinds of points: the mesh's tree of winding numbers is built once.
    found = inside(np.concatenate([samples.surface_points, samples.box_points]))
    surface, box = found[: len(samples.surface_points)], found[len(samples.surface_points) :]
    return FrameScore(
        *frames.names[frame],
        100 * intersection_over_union(surface, samples.surface_occupancy),
        100 * intersection_over_union(box, samples.box_occupancy),
        **distances,
    )


def posed_vertices(ins: INS, mesh: Mesh, frames: Frames, frame: int) -> NDArray[np.float32]:
    """(V, 3): the canonical mesh in the pose of a frame, root frame."""
    bones = frames.bone_transforms[frame : frame + 1]
    with torch.no_grad():
        return ins.to_deformed(torch.from_numpy(mesh.vertices), bones)[0].numpy()


def summary(scores: list[FrameScore]) -> dict[str, Any]:
    """Means over all frames and per sequence, of percentiles too; None where a figure is not known of every frame."""
    sequences = dict.fromkeys(score.sequence for score in scores)
    return {
        **_means(scores),
        "sequences": {name: _means([score for score in scores if score.sequence == name]) for name in sequences},
    }


def _distances(
    posed: NDArray[np.float32],
    faces: NDArray[np.int32],
    frames: Frames,
    frame: int,
    matter: Correspondence | None,
    rng: np.random.Generator,
) -> dict[str, float | None]:
    scan = frames.scan(frame)
    points = surface_points(scan.vertices, scan.faces, SCAN_POINTS, rng)
    found: dict[str, float | None] = {**surface_errors(posed, faces, scan.vertices, scan.faces, points)}
    if matter is not None:
        found["correspondence_mm"] = matter.error_mm(posed, frames, frame)
    return found


def _through_mesh(vertices: NDArray[np.float32], faces: NDArray[np.int32]) -> Inside:
    return lambda points: occupancy(vertices, faces, points)


def _through_field(ins: INS, bones: torch.Tensor) -> Inside:
    def inside(points: NDArray[np.float32]) -> NDArray[np.bool_]:
        with torch.no_grad():
            x_d = torch.from_numpy(points)[None]
            return (ins.occupancy_at(x_d, bones, soft=False, tolerance=1e-4)[0] > 0).numpy()

    return inside


def _means(scores: list[FrameScore]) -> dict[str, Any]:
    means: dict[str, Any] = {"frames": len(scores)}
    for name in FIGURES:
        values = [value for value in (getattr(score, name) for score in scores) if value is not None]
        means[name] = float(np.mean(values)) if len(values) == len(scores) else None
    return means
