"""The frames of one split, as training sees them: from the pelvis, with the scan's distance field around the body."""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from training.checkpoint import write_file
from training.data.sampling import (
    SURFACE_NOISE_M,
    DistanceField,
    Samples,
    build_distance_field,
    sample_frame,
    to_root_frame,
)
from training.data.subject import Scan, Subject, SubjectError


class Frames:
    """Poses of one split and, once asked for, the distance fields of its scans.

    Everything is in the root frame: root motion is taken out of scans and poses alike.
    """

    def __init__(self, subject: Subject, split: str) -> None:
        self.subject = subject
        self.skeleton = subject.skeleton
        self.names = subject.frames(split)
        if not self.names:
            raise SubjectError(f"subject {subject.name!r} has no {split!r} sequence")
        bones, roots = [], []
        for sequence in (subject.sequence(name) for name in dict.fromkeys(name for name, _ in self.names)):
            rotations = sequence.rotations()
            bones.append(self.skeleton.bone_transforms(rotations))
            roots.append(self.skeleton.root_transforms(rotations, sequence.translation))
        self.bone_transforms = torch.from_numpy(np.concatenate(bones))
        """(F, J, 4, 4), canonical -> deformed as seen from the root."""
        self.root_transforms: NDArray[np.float32] = np.concatenate(roots)
        """(F, 4, 4), root frame -> world."""
        self._fields: list[DistanceField] = []
        self._grids: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.names)

    def scan(self, frame: int) -> Scan:
        """A scan in the root frame."""
        scan = self.subject.scan(*self.names[frame])
        vertices = to_root_frame(scan.vertices, self.root_transforms[frame])
        return Scan(vertices.astype(np.float32), scan.faces, scan.colours)

    def samples(
        self,
        frame: int,
        rng: np.random.Generator,
        surface_count: int,
        box_count: int,
        noise_m: Sequence[float] = (SURFACE_NOISE_M,),
    ) -> Samples:
        """Labelled points (app. A.1) in the root frame; the box they fill is the world's, as in the paper."""
        samples = sample_frame(self.subject.scan(*self.names[frame]), rng, surface_count, box_count, noise_m)
        root = self.root_transforms[frame]
        return Samples(
            to_root_frame(samples.surface_points, root).astype(np.float32),
            samples.surface_occupancy,
            to_root_frame(samples.box_points, root).astype(np.float32),
            samples.box_occupancy,
        )

    def load_fields(self, spacing: float) -> None:
        """Build the distance fields, or read those that an earlier run left in the subject's cache."""
        if self._fields:
            return
        folder = self.subject.path / "cache" / f"fields-v1-{spacing * 1000:g}mm"
        folder.mkdir(parents=True, exist_ok=True)

        def load(frame: int) -> DistanceField:
            name, index = self.names[frame]
            path = folder / f"{name}-{index:05d}.npz"
            if not path.exists():
                scan = self.scan(frame)
                _write_field(path, build_distance_field(scan.vertices, scan.faces, spacing))
            return _read_field(path)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            fields = tqdm(pool.map(load, range(len(self))), "distance fields", len(self), unit="frame")
            self._fields = list(fields)
        self.to(self.bone_transforms.device)

    def to(self, device: torch.device) -> None:
        """Move poses and distance fields."""
        self.bone_transforms = self.bone_transforms.to(device)
        self._grids = [torch.from_numpy(field.values).to(device) for field in self._fields]

    def distances(self, frames: list[int], points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N"]:
        """Signed distance, metres, of points (one row per frame, root frame) to the frame's scan; negative inside.

        Trilinear and differentiable in the points; constant beyond the fields' band.
        """
        rows = zip(frames, points, strict=True)
        return torch.stack([_interpolate(self._fields[frame], self._grids[frame], row) for frame, row in rows])


def _interpolate(field: DistanceField, values: Tensor, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
    """Trilinear.  Eight corners are gathered before they become float32: a frame's grid is never converted whole."""
    _, y, z = values.shape
    last = torch.tensor(values.shape, device=points.device) - 1
    origin = torch.from_numpy(field.origin).to(points)
    unit = torch.minimum(((points - origin) / field.spacing).clamp(min=0), last.to(points))
    cell = torch.minimum(unit.detach().long().clamp(min=0), last - 1)  # clamped twice: NaN becomes some integer
    corners = torch.tensor([(i * y + j) * z + k for i in (0, 1) for j in (0, 1) for k in (0, 1)], device=points.device)
    first = (cell * torch.tensor([y * z, z, 1], device=points.device)).sum(-1, keepdim=True)
    shares = unit - cell
    u, v, w = torch.stack([1 - shares, shares], -1).unbind(-2)
    products = (u[:, :, None, None] * v[:, None, :, None] * w[:, None, None, :]).flatten(1)
    return (values.flatten()[first + corners].to(points) * products).sum(-1)


def _write_field(path: Path, field: DistanceField) -> None:
    stream = io.BytesIO()
    np.savez(stream, origin=field.origin, values=field.values, spacing=field.spacing, band=field.band)
    write_file(path, stream.getvalue())


def _read_field(path: Path) -> DistanceField:
    with np.load(path, allow_pickle=False) as arrays:
        return DistanceField(arrays["origin"], float(arrays["spacing"]), arrays["values"], float(arrays["band"]))
