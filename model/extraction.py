"""Canonical mesh from the occupancy network: MISE and marching cubes.

Multiresolution IsoSurface Extraction evaluates a coarse grid everywhere and finer ones only around the surface, and
gives the mesh of the dense fine grid wherever the coarse grid has seen the surface.  Marching cubes is the one step
that is not torch.
Reference: Mescheder et al., "Occupancy Networks", CVPR 2019, section 3.3; Lorensen and Cline, SIGGRAPH 1987.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32
from skimage.measure import marching_cubes
from torch import Tensor
from torch.nn import functional

OccupancyLogits = Callable[[Tensor], Tensor]
"""Points (M, 3), metres -> logits (M,), positive inside."""


@torch.no_grad()
def extract_mesh(
    occupancy_logits: OccupancyLogits,
    box_min: Float[Tensor, "3"],
    box_max: Float[Tensor, "3"],
    coarse_resolution: int = 32,
    levels: int = 2,
    threshold: float = 0.0,
    refinement_steps: int = 3,
    points_per_call: int = 65536,
) -> tuple[Float[Tensor, "V 3"], Int32[Tensor, "F 3"]]:
    """The level set of the occupancy logits as a mesh.

    Args:
        occupancy_logits: the field, positive inside.
        box_min, box_max: opposite corners, metres.  The surface should lie inside: it is cut open where it leaves the
            box.  The box is grown so that its voxels are cubes.
        coarse_resolution: voxels along the longest side of the first grid.  Thinner parts may be lost.
        levels: how often the voxels near the surface are halved; 32 and 2 give the resolution of 128.
        threshold: the logit at the surface.
        refinement_steps: evaluations per vertex that move it along its grid edge onto the level set.
        points_per_call: largest M given to `occupancy_logits`.

    Returns:
        (vertices, faces): metres; counter-clockwise seen from outside.

    Raises:
        ValueError: the box holds no surface.
    """
    voxel = float((box_max - box_min).max()) / coarse_resolution
    cells = ((box_max - box_min) / voxel - 1e-4).ceil().clamp(min=1).long().tolist()
    voxel /= 2**levels

    def evaluate(lattice_points: Tensor) -> Tensor:
        points = box_min + voxel * lattice_points.to(box_min.dtype)
        return torch.cat([occupancy_logits(part) for part in points.split(points_per_call)]).to(box_min.dtype)

    values = multiresolution_values(evaluate, cells, levels, threshold)
    if not bool(_mixed_cells(values > threshold).any()):
        raise ValueError("the box holds no surface: expected logits on both sides of the threshold")
    lattice_vertices, faces, _, _ = marching_cubes(
        values.cpu().numpy(), threshold, gradient_direction="ascent", allow_degenerate=False
    )
    vertices = torch.from_numpy(lattice_vertices.astype(np.float64)).to(box_min.device, box_min.dtype)
    vertices = _onto_level_set(evaluate, vertices, values - threshold, threshold, refinement_steps)
    return box_min + voxel * vertices, torch.from_numpy(faces.astype(np.int32)).to(box_min.device)


def multiresolution_values(
    evaluate: Callable[[Tensor], Tensor], coarse_cells: list[int], levels: int, threshold: float
) -> Float[Tensor, "X Y Z"]:
    """Values at the corners of the fine grid: exact around the surface, interpolated from coarser ones elsewhere.

    Args:
        evaluate: values (M,) at fine lattice points (M, 3), integers.
        coarse_cells: number of cells of the coarsest grid along each axis.
        levels: number of halvings.
        threshold: value at the surface.
    """
    stride = 2**levels
    corners = torch.cartesian_prod(*(torch.arange(count + 1) for count in coarse_cells))
    values = evaluate(stride * corners).view([count + 1 for count in coarse_cells])
    known = torch.ones_like(values, dtype=torch.bool)
    for _ in range(levels):
        stride //= 2
        # A crossing seen in a coarse cell may pass through its neighbours unseen, so these are refined as well.
        near = _dilated(_mixed_cells(values > threshold))
        wanted = _corners_of(near.repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, 2))
        shape = [2 * size - 1 for size in values.shape]
        known, coarse_known = torch.zeros(shape, dtype=torch.bool, device=values.device), known
        known[::2, ::2, ::2] = coarse_known
        coarse_values = values
        values = functional.interpolate(values[None, None], shape, mode="trilinear", align_corners=True)[0, 0]
        values[::2, ::2, ::2] = coarse_values
        while True:
            lattice_points = (wanted & ~known).nonzero()
            if len(lattice_points) == 0:
                break
            values[tuple(lattice_points.T)] = evaluate(stride * lattice_points)
            known |= wanted
            # The surface found so far may lead on into cells that are not refined: follow it.
            wanted = _corners_of(_mixed_cells(values > threshold))
    return values


def _mixed_cells(inside: Bool[Tensor, "X Y Z"]) -> Bool[Tensor, "U V W"]:
    """Cells with corners on both sides."""
    grid = inside[None, None].float()
    highest = functional.max_pool3d(grid, 2, stride=1)[0, 0]
    lowest = -functional.max_pool3d(-grid, 2, stride=1)[0, 0]
    return highest != lowest


def _dilated(cells: Bool[Tensor, "U V W"]) -> Bool[Tensor, "U V W"]:
    """The cells and their 26 neighbours."""
    return functional.max_pool3d(cells[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0


def _corners_of(cells: Bool[Tensor, "U V W"]) -> Bool[Tensor, "X Y Z"]:
    """Grid points that are a corner of one of the cells."""
    return functional.max_pool3d(functional.pad(cells[None, None].float(), [1] * 6), 2, stride=1)[0, 0] > 0


def _onto_level_set(
    evaluate: Callable[[Tensor], Tensor], vertices: Tensor, values: Tensor, threshold: float, steps: int
) -> Tensor:
    """Move marching-cubes vertices, in lattice units, along their grid edges to the root, by the Illinois method."""
    axis = (vertices - vertices.round()).abs().argmax(1, keepdim=True)
    lower = vertices.round()
    lower.scatter_(1, axis, vertices.gather(1, axis).floor())
    direction = torch.zeros_like(vertices).scatter_(1, axis, 1.0)
    limits = torch.tensor(values.shape, device=vertices.device) - 1
    start = lower.long()
    end = torch.minimum(start + direction.long(), limits)
    value_a, value_b = values[tuple(start.T)], values[tuple(end.T)]
    a, b = torch.zeros_like(value_a), torch.ones_like(value_b)
    place = (vertices * direction).sum(1) - (lower * direction).sum(1)
    bracketed = (value_a > 0) != (value_b > 0)
    was_beyond = torch.zeros_like(bracketed)
    for step in range(steps):
        value = evaluate(lower + place[:, None] * direction) - threshold
        beyond = (value > 0) == (value_b > 0)  # the root lies between a and here
        # Illinois: an end that stays twice loses half its value, or it would stay for ever on a curved field.
        stays = torch.where((beyond == was_beyond) & (step > 0), 0.5, 1.0).to(value.dtype)
        a, value_a = torch.where(beyond, a, place), torch.where(beyond, value_a * stays, value)
        b, value_b = torch.where(beyond, place, b), torch.where(beyond, value, value_b * stays)
        was_beyond = beyond
        place = torch.where(bracketed, (a * value_b - b * value_a) / (value_b - value_a), place)
    return lower + place[:, None] * direction
