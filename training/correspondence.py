"""Correspondence: where each vertex of the avatar should be, for data that knows the person's own points.

Each canonical vertex is assigned to a material point once, in a frame that was trained on; in the frames held out, it
should be where that point went.  Training never sees any of this.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.ins import INS
from service.bundle.glb import Mesh
from training.data.body import open_body
from training.data.sampling import to_root_frame
from training.data.subject import Scan, Subject
from training.frames import Frames
from training.metrics import OnSurface, closest

MATTER_M = 0.01
"""A scan's surface further than this from all matter is not the person's."""


@dataclass(frozen=True)
class Correspondence:
    """The material point of every canonical vertex."""

    reference: tuple[str, int]
    """The frame in which they were assigned: sequence and index."""
    material: OnSurface
    known: NDArray[np.bool_]
    """(V,): not so on what a scan adds, such as the floor of a skirt: no matter is there."""

    def error_mm(self, posed: NDArray[np.floating], frames: Frames, frame: int) -> float | None:
        """Mean distance of the posed vertices (V, 3), root frame, from their material points; None if none is known."""
        found = material_points(frames.subject, *frames.names[frame])
        if found is None or not self.known.any():
            return None
        targets = to_root_frame(self.material.interpolate(found[0]), frames.root_transforms[frame])
        return 1000 * float(np.linalg.norm(posed - targets, axis=1)[self.known].mean())


def material_points(
    subject: Subject, sequence: str, frame: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
    """Vertices (M, 3), world frame, and faces (T, 3) of a mesh that follows the person's matter through all frames.

    The open subject's is its body and its simulated garment; that of a registered capture, whose scans have one
    topology, is the scan.  None where there is neither.
    """
    if subject.provenance.get("source") == "demo-data":
        return _body_and_garment(subject, sequence, frame)
    scan, first = subject.scan(sequence, frame), _first_scan(subject)
    if len(scan.vertices) == len(first.vertices) and np.array_equal(scan.faces, first.faces):
        return scan.vertices.astype(np.float64), scan.faces.astype(np.int64)
    return None


def find_correspondence(ins: INS, mesh: Mesh, subject: Subject) -> Correspondence | None:
    """Assign every canonical vertex to the material point that its posed place is closest to.

    The frame is the training frame whose bones are turned least away from the canonical pose: there the limbs are
    apart, and the closest point is the right one.  The posed vertex is carried to the scan first, and from there to
    the matter, so that it does not find the body under the garment.
    """
    if not subject.frames("train"):
        return None
    frames = Frames(subject, "train")
    turned = frames.bone_transforms[..., :3, :3] - torch.eye(3)
    reference = int(turned.square().sum((1, 2, 3)).argmin())
    found = material_points(subject, *frames.names[reference])
    if found is None:
        return None
    with torch.no_grad():
        posed = ins.to_deformed(torch.from_numpy(mesh.vertices), frames.bone_transforms[reference : reference + 1])[0]
    scan = frames.scan(reference)
    _, on_scan = closest(scan.vertices, scan.faces, posed.numpy())
    matter = to_root_frame(found[0], frames.root_transforms[reference])
    away, material = closest(matter, found[1], on_scan.interpolate(scan.vertices))
    return Correspondence(frames.names[reference], material, away < MATTER_M)


def _first_scan(subject: Subject) -> Scan:
    return subject.scan(subject.sequences[0], 0)


def _body_and_garment(
    subject: Subject, sequence: str, frame: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
    body, poses = open_body(), subject.sequence(sequence)
    (transforms,) = body.transforms(poses.pose[frame : frame + 1], poses.translation[frame : frame + 1])
    vertices, faces = body.posed(transforms), body.faces
    if subject.provenance.get("garment") == "none":
        return vertices, faces
    garment, cloth = subject.truth("garment"), subject.truth(sequence)
    if garment is None or cloth is None:
        return None
    # Stored relative to the root translation, as half precision is finer near zero.
    moved = cloth["garment_vertices"][frame].astype(np.float64) + poses.translation[frame]
    return np.concatenate([vertices, moved]), np.concatenate([faces, len(vertices) + garment["faces"]])
