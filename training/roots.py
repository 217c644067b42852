"""Canonical correspondences on a CPU: Newton's method on the voxelised skinning field, compiled.

The same search as `model.root_finding.find_roots`, one point after the other: a step needs the eight nodes of one cell
and the few bones that count there, so nothing leaves the cache.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from model import root_finding
from model.skinning import VoxelSkinningField, WeightField, blend_rows

SAME_ROOT_M = 1e-3
"""A search this near to a root that the point already has ends with that root: `distinct` would not tell them apart."""
LEAST_LOGIT = -17.0
"""Relative to the largest: bones below it weigh less than float32 tells from nothing."""

_compiled = njit(cache=True, nogil=True, error_model="numpy")  # a division by zero is one start's NaN, not an error


def find_roots(
    field: WeightField,
    x_d: Float[Tensor, "B N 3"],
    bone_transforms: Float[Tensor, "B J 4 4"],
    starts: Float[Tensor, "B N K 3"],
    max_steps: int = 10,
    tolerance: float = 1e-5,
    divergence: float = 1.0,
) -> tuple[Float[Tensor, "B N K 3"], Bool[Tensor, "B N K"]]:
    """`model.root_finding.find_roots` by whatever is fastest for this field on this device.

    The compiled search for a voxelised field on a CPU; Newton's method for one on a GPU, where steps cost more than
    derivatives; Broyden's for an MLP, whose derivatives cost six times its weights.
    """
    if not isinstance(field, VoxelSkinningField) or x_d.is_cuda:
        method = "newton" if isinstance(field, VoxelSkinningField) else "broyden"
        return root_finding.find_roots(
            field, x_d, bone_transforms, starts, None, max_steps, tolerance, divergence, method
        )
    count, points = starts.shape[2], x_d.shape[0] * x_d.shape[1]
    targets = x_d.detach().double().reshape(-1, 3).numpy()
    roots = starts.detach().double().reshape(-1, count, 3).numpy().copy()
    converged = np.zeros((points, count), bool)
    frame = np.arange(len(x_d)).repeat(x_d.shape[1])
    grid, low = field.grid.detach().numpy(), field.low.double().numpy()
    bones = blend_rows(bone_transforms.detach().double()).contiguous().numpy()

    def solve(part: slice) -> None:
        _solve(grid, low, field.spacing, bones, frame[part], targets[part], roots[part], converged[part],
               max_steps, tolerance, divergence, root_finding.MAX_STEP_M["newton"])  # fmt: skip

    threads = torch.get_num_threads()
    edges = np.linspace(0, points, threads + 1).astype(int)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(solve, [slice(a, b) for a, b in pairwise(edges)]))
    return torch.from_numpy(roots).to(x_d).view(starts.shape), torch.from_numpy(converged).view(starts.shape[:3])


@_compiled
def _solve(
    grid: NDArray[np.floating],
    low: NDArray[np.float64],
    spacing: float,
    bones: NDArray[np.float64],
    frame: NDArray[np.int64],
    targets: NDArray[np.float64],
    roots: NDArray[np.float64],
    converged: NDArray[np.bool_],
    max_steps: int,
    tolerance: float,
    divergence: float,
    max_step: float,
) -> None:
    """Search from every start in `roots` (N, K, 3); those that converge are replaced by their root."""
    logits = np.empty((4, grid.shape[3]), grid.dtype)
    pose = np.empty((4, 3))  # row 0: lbs(x); row 1 + b: its derivative along b
    x = np.empty(3)
    for n in range(len(targets)):
        for k in range(roots.shape[1]):
            x[:] = roots[n, k]
            for step in range(max_steps + 1):
                known = _known_root(roots[n], converged[n], k, x)
                if known >= 0:
                    roots[n, k], converged[n, k] = roots[n, known], True
                    break
                _interpolate(grid, low, spacing, x, logits)
                _pose(logits, bones[frame[n]], x, pose)
                fx, fy, fz = pose[0, 0] - targets[n, 0], pose[0, 1] - targets[n, 1], pose[0, 2] - targets[n, 2]
                distance = math.sqrt(fx * fx + fy * fy + fz * fz)
                if distance < tolerance:
                    roots[n, k], converged[n, k] = x, True
                    break
                if not distance < divergence or step == max_steps:  # NaN compares false
                    break
                _newton_step(pose, fx, fy, fz, max_step, x)


@_compiled
def _known_root(roots, converged, before, x):
    """Which of the first roots lies at x; -1 where none does."""
    for k in range(before):
        if converged[k]:
            dx, dy, dz = x[0] - roots[k, 0], x[1] - roots[k, 1], x[2] - roots[k, 2]
            if dx * dx + dy * dy + dz * dz < SAME_ROOT_M * SAME_ROOT_M:
                return k
    return -1


@_compiled
def _cell(value, low, spacing, nodes):
    """Along one axis: the cell, the place in it, and the derivative of that; as `VoxelSkinningField` draws them in."""
    unit = (value - low) / spacing
    drawn = min(max(unit, 0.0), nodes - 1.0)
    cell = min(int(drawn), nodes - 2) if drawn == drawn else 0  # NaN: the residual will tell
    return cell, drawn - cell, 1 / spacing if drawn == unit else 0.0


@_compiled
def _interpolate(grid, low, spacing, x, logits):
    """Logits and their derivatives at x, in the rows of `logits` (4, J)."""
    real = grid.dtype.type  # in float64 the loop below would take twice as long
    i, u, slope_u = _cell(x[0], low[0], spacing, grid.shape[0])
    j, v, slope_v = _cell(x[1], low[1], spacing, grid.shape[1])
    k, w, slope_w = _cell(x[2], low[2], spacing, grid.shape[2])
    u, v, w = real(u), real(v), real(w)
    slope_u, slope_v, slope_w = real(slope_u), real(slope_v), real(slope_w)
    n000, n001, n010, n011 = grid[i, j, k], grid[i, j, k + 1], grid[i, j + 1, k], grid[i, j + 1, k + 1]
    beyond = grid[i + 1]
    n100, n101, n110, n111 = beyond[j, k], beyond[j, k + 1], beyond[j + 1, k], beyond[j + 1, k + 1]
    value, along_x, along_y, along_z = logits[0], logits[1], logits[2], logits[3]
    for bone in range(grid.shape[3]):
        z00, z01 = n001[bone] - n000[bone], n011[bone] - n010[bone]
        z10, z11 = n101[bone] - n100[bone], n111[bone] - n110[bone]
        first, y0 = n000[bone] + w * z00, n010[bone] + w * z01 - (n000[bone] + w * z00)
        second, y1 = n100[bone] + w * z10, n110[bone] + w * z11 - (n100[bone] + w * z10)
        z0, z1 = z00 + v * (z01 - z00), z10 + v * (z11 - z10)
        first += v * y0
        second += v * y1
        value[bone] = first + u * (second - first)
        along_x[bone] = slope_u * (second - first)
        along_y[bone] = slope_v * (y0 + u * (y1 - y0))
        along_z[bone] = slope_w * (z0 + u * (z1 - z0))


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _pose(logits, bones, x, pose):
    """lbs(x) and its derivatives, from logits (4, J) and bones (J, 12), see `blend_rows`."""
    pose[:] = 0.0
    largest = logits[0].max()
    total, along_x, along_y, along_z = 0.0, 0.0, 0.0, 0.0
    for j in range(len(bones)):
        if logits[0, j] - largest > LEAST_LOGIT:
            weight = math.exp(logits[0, j] - largest)
            total += weight
            sx, sy, sz = weight * logits[1, j], weight * logits[2, j], weight * logits[3, j]
            along_x += sx
            along_y += sy
            along_z += sz
            for a in range(3):
                place = bones[j, a] * x[0] + bones[j, 3 + a] * x[1] + bones[j, 6 + a] * x[2] + bones[j, 9 + a]
                pose[0, a] += weight * place
                pose[1, a] += weight * bones[j, a] + sx * place
                pose[2, a] += weight * bones[j, 3 + a] + sy * place
                pose[3, a] += weight * bones[j, 6 + a] + sz * place
    for a in range(3):
        pose[0, a] /= total
        # The derivative of softmax takes the mean slope off.
        pose[1, a] = (pose[1, a] - along_x * pose[0, a]) / total
        pose[2, a] = (pose[2, a] - along_y * pose[0, a]) / total
        pose[3, a] = (pose[3, a] - along_z * pose[0, a]) / total


@_compiled
def _newton_step(pose, fx, fy, fz, max_step, x):
    """x moves by -J^-1 f, at most by `max_step`; the columns of J are the rows 1 to 3 of `pose`."""
    ax, ay, az = pose[1, 0], pose[1, 1], pose[1, 2]
    bx, by, bz = pose[2, 0], pose[2, 1], pose[2, 2]
    cx, cy, cz = pose[3, 0], pose[3, 1], pose[3, 2]
    bcx, bcy, bcz = by * cz - bz * cy, bz * cx - bx * cz, bx * cy - by * cx  # b x c
    determinant = ax * bcx + ay * bcy + az * bcz
    if abs(determinant) < 1e-12:
        determinant = -1e-12 if determinant < 0 else 1e-12
    # Cramer's rule.
    dx = -(fx * bcx + fy * bcy + fz * bcz) / determinant
    dy = -(ax * (fy * cz - fz * cy) + ay * (fz * cx - fx * cz) + az * (fx * cy - fy * cx)) / determinant
    dz = -(ax * (by * fz - bz * fy) + ay * (bz * fx - bx * fz) + az * (bx * fy - by * fx)) / determinant
    scale = min(1.0, max_step / max(math.sqrt(dx * dx + dy * dy + dz * dz), 1e-30))
    x[0] += scale * dx
    x[1] += scale * dy
    x[2] += scale * dz
