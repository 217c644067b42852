"""Canonical correspondences of deformed points: roots of lbs(x_c) - x_d = 0, and their gradients.

Several canonical points may be carried to one deformed point (a hand on a hip), so the search starts from several
bones, and each start is solved on its own: by Broyden's method, as the paper does, which asks for the weights alone; or
by Newton's, which takes fewer steps and asks for their derivatives too, cheap where the weights lie on a grid.
Reference: Chen et al., "SNARF", ICCV 2021, sections 3.2 and 3.4; Kant et al., "Invertible Neural Skinning", CVPR 2023,
eqs. 4 and 26-27.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from model.skinning import (
    WeightField,
    apply_blended,
    blend_rows,
    blended_jacobian,
    linear_blend_skinning,
)

SNARF_START_BONES = (0, 1, 2, 4, 5, 16, 17, 18, 19)
"""Pelvis, hips, knees, shoulders and elbows of the SMPL skeleton: the nine starts used by SNARF."""

Method = Literal["broyden", "newton"]
MAX_STEP_M = {"broyden": 0.3, "newton": 0.1}
"""Longest step.  Newton's follows the slope of a single cell or hinge, so it must not go far on its word."""


def bone_starts(
    x_d: Float[Tensor, "B N 3"], bone_transforms: Float[Tensor, "B J 4 4"], bones: Sequence[int]
) -> Float[Tensor, "B N K 3"]:
    """x_d carried back rigidly by each of the given bones, B_j^-1 x_d (SNARF eq. 7)."""
    return _carried_back(x_d, bone_transforms[:, list(bones)])


def nearest_bone_starts(
    x_d: Float[Tensor, "B N 3"],
    bone_transforms: Float[Tensor, "B J 4 4"],
    bone_centres: Float[Tensor, "J 3"],
    count: int,
) -> Float[Tensor, "B N K 3"]:
    """B_j^-1 x_d for the `count` bones that lie nearest to each point in the deformed pose.

    Args:
        x_d: query points, metres, deformed frame.
        bone_transforms: B_j, canonical -> deformed.
        bone_centres: a point of each bone in the canonical frame, metres: its middle, or its joint.
        count: K, starts per point.
    """
    posed = (bone_transforms[..., :3, :3] @ bone_centres[..., None])[..., 0] + bone_transforms[..., :3, 3]
    # The squared distances without |x_d|^2, which is the same for all bones.
    order = posed.square().sum(-1)[:, None] - 2 * x_d @ posed.mT  # (B, N, J)
    nearest = order.topk(count, dim=-1, largest=False).indices
    starts = _carried_back(x_d, bone_transforms)
    return starts.gather(2, nearest[..., None].expand(-1, -1, -1, 3))


@torch.no_grad()
def find_roots(
    field: WeightField,
    x_d: Float[Tensor, "B N 3"],
    bone_transforms: Float[Tensor, "B J 4 4"],
    starts: Float[Tensor, "B N K 3"] | None = None,
    start_bones: Sequence[int] | None = None,
    max_steps: int = 20,
    tolerance: float = 1e-5,
    divergence: float = 1.0,
    method: Method = "broyden",
) -> tuple[Float[Tensor, "B N K 3"], Bool[Tensor, "B N K"]]:
    """Solve lbs(x_c) = x_d from every start.

    A start that has converged, or diverged, is neither moved nor evaluated again.

    Args:
        field: the skinning-weight field.
        x_d: query points, metres, deformed frame.
        bone_transforms: B_j, canonical -> deformed.
        starts: canonical points to start from, metres; such as the roots of the last visit.
        start_bones: without `starts`: start from B_j^-1 x_d of these bones; of all bones when None.
        max_steps: of either method.
        tolerance: a root has |lbs(root) - x_d| below this, metres.
        divergence: a start is given up where the residual exceeds this, metres.
        method: "broyden" is Broyden's (good) method with the true Jacobian at the start; "newton" has it at every step.

    Returns:
        (roots, converged): where `converged` is False, the root is the start and means nothing.  No gradient:
        see `attach_gradient`.
    """
    if starts is None:
        bones = range(bone_transforms.shape[1]) if start_bones is None else start_bones
        starts = bone_starts(x_d, bone_transforms, bones)
    shape = starts.shape[:3]
    roots = starts.reshape(-1, 3).clone()
    converged = torch.zeros(len(roots), dtype=torch.bool, device=roots.device)
    search = _Search.begin(field, roots, x_d[:, :, None].expand(*shape, 3).reshape(-1, 3), bone_transforms)
    for step in range(max_steps + 1):
        distance = search.residual.norm(dim=-1)
        found = distance < tolerance
        roots[search.index[found]] = search.x[found]
        converged[search.index[found]] = True
        search.keep(~found & (distance < divergence))  # NaN compares false: given up
        if step == max_steps or len(search.index) == 0:
            break
        search.advance(field, method)
    return roots.view(*shape, 3), converged.view(shape)


def attach_gradient(
    field: WeightField,
    roots: Float[Tensor, "B N K 3"],
    x_d: Float[Tensor, "B N 3"],
    bone_transforms: Float[Tensor, "B J 4 4"],
) -> Float[Tensor, "B N K 3"]:
    """The same roots, differentiable in the field's parameters, the query points and the bone transforms.

    From lbs(x_c) - x_d = 0 follows d x_c = J^-1 (d x_d - d lbs), with J = d lbs / d x_c at the root: eq. 26, and eq. 27
    with the sign it must have, d x_c / d x_d = +J^-1 (the paper adds the identity where it should subtract it).
    First derivatives only.  At points that are no root the gradient is finite and means nothing.
    """
    count = roots.shape[2]
    fixed = roots.detach().flatten(1, 2)  # (B, N * K, 3)
    target = x_d.repeat_interleave(count, 1) if count > 1 else x_d
    with torch.no_grad():
        derivatives = _in_parts(field.with_derivatives, fixed.flatten(0, 1)).unflatten(0, fixed.shape[:2])
        blended = derivatives @ blend_rows(bone_transforms)[:, None]
        inverse = inverse_3x3(blended_jacobian(blended, fixed))
    change = target - linear_blend_skinning(fixed, field(fixed), bone_transforms)
    # Zero in value, so that the root stays what the solver found; only its derivative counts.
    change = change - change.detach()
    return (fixed + (inverse @ change[..., None])[..., 0]).view(roots.shape)


def distinct(
    roots: Float[Tensor, "B N K 3"], converged: Bool[Tensor, "B N K"], tolerance: float = 1e-3
) -> Bool[Tensor, "B N K"]:
    """True for the first of every group of converged roots of a point that lie within `tolerance`, metres."""
    count = roots.shape[2]
    keep = converged.clone()
    for later in range(1, count):
        near = (roots[:, :, :later] - roots[:, :, later : later + 1]).square().sum(-1) < tolerance**2
        keep[:, :, later] &= ~(near & keep[:, :, :later]).any(-1)
    return keep


def inverse_3x3(matrix: Float[Tensor, "*S 3 3"]) -> Float[Tensor, "*S 3 3"]:
    """Inverse by cofactors: many times faster than `torch.linalg.inv` here, and finite at singular matrices."""
    a, b, c = matrix.unbind(-2)
    columns = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], -1)
    determinant = (a * columns[..., 0]).sum(-1)
    return columns / _away_from_zero(determinant)[..., None, None]


def _carried_back(x_d: Tensor, bone_transforms: Tensor) -> Tensor:
    """B_j^-1 x_d for all given bones, (B, N, J, 3)."""
    rotations, translations = bone_transforms[..., :3, :3], bone_transforms[..., :3, 3]
    # R^T (x - t) as one product: all columns of all R_j side by side.
    turned = x_d @ rotations.permute(0, 2, 1, 3).flatten(-2)  # (B, N, J * 3)
    offset = (rotations * translations[..., None]).sum(-2)  # R_j^T t_j, (B, J, 3)
    return turned.unflatten(-1, offset.shape[1:]) - offset[:, None]


def _away_from_zero(value: Tensor) -> Tensor:
    """The value, or 1e-12 with its sign where it is smaller than that."""
    return torch.where(value.abs() < 1e-12, torch.where(value < 0, -1e-12, 1e-12).to(value.dtype), value)


def _in_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), without gradients, in parts that fit the cache of a CPU (three times faster) or a GPU's memory."""
    return torch.cat([function(part) for part in x.split(2**18 if x.is_cuda else 1024)])


@dataclass
class _Search:
    """State of the starts still under way, M of them, sorted by frame."""

    bones: Tensor  # (B, J, 12), see blend_rows
    index: Tensor  # (M,), place among all B * N * K starts
    frame: Tensor  # (M,)
    x: Tensor  # (M, 3)
    target: Tensor  # (M, 3), x_d
    residual: Tensor = dataclasses.field(init=False)  # (M, 3), lbs(x) - x_d
    inverse: Tensor = dataclasses.field(init=False)  # (M, 3, 3), inverse Jacobian, or Broyden's estimate of it

    @classmethod
    def begin(cls, field: WeightField, x: Tensor, target: Tensor, bone_transforms: Tensor) -> "_Search":
        bones = blend_rows(bone_transforms)
        index = torch.arange(len(x), device=x.device)
        frame = index // max(len(x) // len(bones), 1)
        search = cls(bones, index, frame, x.clone(), target)
        search._linearise(field)
        return search

    def keep(self, mask: Tensor) -> None:
        """Drop every start where the mask is False."""
        kept = mask.nonzero()[:, 0]
        self.index, self.frame, self.x, self.target, self.residual, self.inverse = (
            state[kept] for state in (self.index, self.frame, self.x, self.target, self.residual, self.inverse)
        )

    def advance(self, field: WeightField, method: Method) -> None:
        """One step: x moves by -J^-1 f, then f and J^-1 follow."""
        step = -(self.inverse @ self.residual[..., None])[..., 0]
        length = step.norm(dim=-1, keepdim=True)
        step = step * (MAX_STEP_M[method] / length.clamp(min=MAX_STEP_M[method]))
        self.x = self.x + step
        if method == "newton":
            self._linearise(field)
        else:
            self._correct(field, step)

    def _linearise(self, field: WeightField) -> None:
        """Residual and inverse Jacobian at x."""
        blended = self._blend(_in_parts(field.with_derivatives, self.x))  # (M, 4, 12)
        self.residual = apply_blended(blended[:, 0], self.x) - self.target
        self.inverse = inverse_3x3(blended_jacobian(blended, self.x))

    def _correct(self, field: WeightField, step: Tensor) -> None:
        """Residual at x; J^-1 is corrected so that it explains what f did (rank one)."""
        residual = apply_blended(self._blend(_in_parts(field, self.x)), self.x) - self.target
        moved = (self.inverse @ (residual - self.residual)[..., None])[..., 0]  # J^-1 df
        row = (step[:, None] @ self.inverse)[:, 0]  # step^T J^-1
        scale = _away_from_zero((step * moved).sum(-1))
        self.inverse = self.inverse + ((step - moved) / scale[:, None])[..., None] * row[:, None]
        self.residual = residual

    def _blend(self, weights: Tensor) -> Tensor:
        """The bones blended with weights (M, J), or with weights and their derivatives (M, 4, J)."""
        counts = torch.bincount(self.frame, minlength=len(self.bones)).tolist()
        # Frame by frame, as copying the bones to every point would cost more than the products.
        return torch.cat([part @ bones for part, bones in zip(weights.split(counts), self.bones, strict=True)])
