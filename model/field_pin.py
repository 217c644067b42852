"""A pose-conditioned invertible network of displacement fields: the form of a PIN that carries over to unseen poses.

Each of three layers moves one axis by a field that is linear in the pose and free in space, the moved axis included:

    x_a <- x_a + s * sum_k e_k(theta) H_ak(x),        a = x, y, z in turn,

with H on a grid, trilinear between its nodes, and zero beyond them.  Along the moved axis that is piecewise linear; the
limiter s <= 1, one number for each grid line and pose, keeps every slope above -1, so the map is strictly increasing
there, for all weights and all poses, and is undone in closed form: find the segment, divide.

What it lifts of the paper's coupling layers (Kant et al., "Invertible Neural Skinning", CVPR 2023, eqs. 5-12): a shift
may depend on the coordinate it moves, so that front and back, left and right sleeve are free of each other; volumes may
change; and being linear in the pose it does not overfit a hundred of them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

STEEPEST = 0.9
"""Largest contraction along an axis: slopes of a displacement stay above minus this."""


class PoseFeatures(nn.Module):
    """What the fields know of the pose: the joints' own turns, centred on the training poses and projected.

    The features are the nine entries of R_parent^T R_j - I of every joint but the root: cloth and flesh are closer to
    linear in them than in angles.  The projection keeps the directions in which the training poses vary most; what they
    never did moves nothing.
    """

    parent_indices: Tensor
    mean: Tensor
    basis: Tensor

    def __init__(self, parents: Sequence[int], count: int) -> None:
        super().__init__()
        width = 9 * (len(parents) - 1)
        self.register_buffer("parent_indices", torch.tensor(list(parents[1:])), persistent=False)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("basis", torch.zeros(width, count))

    def forward(self, bone_transforms: Float[Tensor, "B J 4 4"]) -> Float[Tensor, "B K"]:
        """The pose code of each frame.

        Args:
            bone_transforms: B_j, canonical -> deformed.
        """
        return (self._turns(bone_transforms) - self.mean) @ self.basis

    @torch.no_grad()
    def fit(self, bone_transforms: Float[Tensor, "F J 4 4"]) -> None:
        """Centre on these poses and keep their principal components, as many as there are or the code holds."""
        turns = self._turns(bone_transforms)
        self.mean.copy_(turns.mean(0))
        directions = torch.linalg.svd(turns.double() - turns.double().mean(0), full_matrices=False).Vh
        kept = min(len(directions), self.basis.shape[1])
        self.basis.zero_()
        self.basis[:, :kept] = directions[:kept].T.to(self.basis)

    def _turns(self, bone_transforms: Tensor) -> Float[Tensor, "B I"]:
        rotations = bone_transforms[..., :3, :3]
        relative = rotations[:, self.parent_indices].mT @ rotations[:, 1:]
        identity = torch.eye(3, dtype=rotations.dtype, device=rotations.device)
        return (relative - identity).flatten(1)


class FieldPIN(nn.Module):
    """Three layers of displacement fields; the identity until trained.

    `to_deformed` is the explicit direction, `to_canonical` undoes it.

    Args:
        code_width: K, of the pose code.
        low, high: (3,), a box around the canonical surface, metres; nothing moves outside of it.
        spacing: of the nodes, metres.
    """

    low: Tensor
    active: Tensor
    slots: Tensor

    def __init__(
        self, code_width: int, low: Float[Tensor, "3"], high: Float[Tensor, "3"], spacing: float = 0.03
    ) -> None:
        super().__init__()
        self.spacing = spacing
        self.shape: tuple[int, int, int] = tuple((((high - low) / spacing).ceil().int() + 1).clamp(min=4).tolist())
        self.strides = (self.shape[1] * self.shape[2], self.shape[2], 1)
        self.register_buffer("low", low.detach().clone(), persistent=False)
        self.register_buffer("active", torch.zeros(0, dtype=torch.long))
        self.register_buffer("slots", torch.zeros(math.prod(self.shape), dtype=torch.long), persistent=False)
        self.coefficients = nn.Parameter(torch.zeros(3, 0, code_width))
        """(3, A, K): H at the active nodes; metres per unit of the code, along each axis."""

    def cover(self, points: Float[Tensor, "N 3"], reach: float) -> None:
        """Give every node within about `reach` metres of the points coefficients, zero at first."""
        cells = ((points.detach() - self.low) / self.spacing).round().long()
        near = torch.zeros(self.shape)
        inside = ((cells >= 0) & (cells < torch.tensor(self.shape))).all(-1)
        x, y, z = cells[inside].unbind(-1)
        near[x, y, z] = 1.0
        steps = math.ceil(reach / self.spacing)
        near = functional.max_pool3d(near[None, None], 2 * steps + 1, stride=1, padding=steps)[0, 0]
        inner = torch.zeros(self.shape, dtype=torch.bool)
        inner[1:-1, 1:-1, 1:-1] = True  # the border stays where it is, so the field ends in zero
        self._set_active(((near > 0) & inner).flatten().nonzero()[:, 0])
        self.coefficients = nn.Parameter(self.coefficients.new_zeros(3, len(self.active), self.coefficients.shape[2]))

    def node_positions(self) -> Float[Tensor, "A 3"]:
        """The active nodes, metres."""
        x, y, _ = self.strides
        places = torch.stack([self.active // x, self.active % x // y, self.active % y], -1)
        return self.low + self.spacing * places

    def to_deformed(self, x: Float[Tensor, "B N 3"], pose_code: Float[Tensor, "B K"]) -> Float[Tensor, "B N 3"]:
        """Move canonical points, metres, to where LBS finds them."""
        fields = self.displacements(pose_code)
        components = list(x.unbind(-1))
        for axis in range(3):
            components[axis] = components[axis] + self._sample(fields[:, axis], torch.stack(components, -1))
        return torch.stack(components, -1)

    def to_canonical(self, x: Float[Tensor, "B N 3"], pose_code: Float[Tensor, "B K"]) -> Float[Tensor, "B N 3"]:
        """Undo `to_deformed`."""
        fields = self.displacements(pose_code)
        components = list(x.unbind(-1))
        for axis in (2, 1, 0):
            components[axis] = self._unmoved(fields[:, axis], torch.stack(components, -1), axis)
        return torch.stack(components, -1)

    def displacements(self, pose_code: Float[Tensor, "B K"]) -> Float[Tensor, "B 3 A1"]:
        """Displacement of each node along each axis, metres, after the limiter; the last of the A + 1 is the zero of
        all nodes without coefficients."""
        raw = functional.pad(torch.einsum("bk,cak->bca", pose_code, self.coefficients), (0, 1))
        limited = [functional.pad(raw[:, axis, :-1] * self.limiter(raw[:, axis], axis), (0, 1)) for axis in range(3)]
        return torch.stack(limited, 1)

    def limiter(self, displacements: Float[Tensor, "B A1"], axis: int) -> Float[Tensor, "B A"]:
        """s of each node: 1, or less where a slope along the axis would fall below -0.9.

        One number for each grid line along the axis, from its steepest slope: between lines space is a mean of theirs,
        and a mean of increasing maps increases.
        """
        stride, here = self.strides[axis], displacements[:, :-1]
        above = displacements[:, self.slots[self.active + stride]]
        below = displacements[:, self.slots[self.active - stride]]
        fall = torch.maximum(here - above, below - here) / self.spacing
        line = self._line(axis).expand(fall.shape[0], -1)
        lines = math.prod(self.shape) // self.shape[axis]
        steepest = fall.new_full((fall.shape[0], lines), STEEPEST).scatter_reduce(1, line, fall, "amax")
        return STEEPEST / steepest.gather(1, line)

    def _line(self, axis: int) -> Tensor:
        """(A,): which of the grid lines along the axis each active node lies on."""
        stride = self.strides[axis]
        if axis == 0:
            return self.active % stride
        if axis == 1:
            return self.active // self.strides[0] * self.shape[2] + self.active % stride
        return self.active // self.shape[2]

    def _sample(self, field: Float[Tensor, "B A1"], points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N"]:
        """Trilinear displacement at the points."""
        slots, shares = self._corners(points)
        values = field.gather(1, slots.flatten(1)).view(shares.shape)
        return (values * shares).sum(-1)

    def _corners(self, points: Float[Tensor, "B N 3"]) -> tuple[Tensor, Float[Tensor, "B N 8"]]:
        """Slots and shares of the eight nodes around each point; beyond the box, of nodes at its border."""
        unit = (points - self.low) / self.spacing
        last = torch.tensor(self.shape, dtype=unit.dtype, device=unit.device) - 1
        drawn = torch.minimum(unit.clamp(min=0), last)
        cell = torch.minimum(drawn.detach().floor(), last - 1)
        x, y, z = torch.stack([1 - (drawn - cell), drawn - cell], -1).unbind(-2)
        shares = (x[..., :, None, None] * y[..., None, :, None] * z[..., None, None, :]).flatten(-3)
        i, j, k = cell.long().unbind(-1)
        first = i * self.strides[0] + j * self.strides[1] + k
        sx, sy, _ = self.strides
        offsets = torch.tensor([0, 1, sy, sy + 1, sx, sx + 1, sx + sy, sx + sy + 1], device=points.device)
        return self.slots[first[..., None] + offsets], shares

    def _unmoved(self, field: Float[Tensor, "B A1"], points: Float[Tensor, "B N 3"], axis: int) -> Float[Tensor, "B N"]:
        """The coordinate that `field` moved to where the points are, along one axis.

        Along the axis nodes lie at u_i = i + d_i, increasing in i: the segment that holds the point is found by
        counting the u_i at or below it, among the nodes that a displacement of this size can reach.
        """
        stride, last = self.strides[axis], self.shape[axis] - 1
        unit = (points - self.low) / self.spacing
        target = unit[..., axis]
        reach = math.ceil(float(field.detach().abs().max()) / self.spacing) + 1
        # Corners on the lower face of the point's cell along the axis, and their shares in the other two axes.
        kept = points.clone()
        kept[..., axis] = self.low[axis]
        base, shares = self._flat_corners(kept, axis)
        steps = torch.arange(-reach, reach + 2, device=points.device)
        nodes = target.detach().floor().long()[..., None] + steps  # (B, N, M), may lie outside the box
        inside = nodes.clamp(0, last)
        slots = self.slots[base[..., None, :] + stride * inside[..., None]]  # (B, N, M, 4)
        values = field.gather(1, slots.flatten(1)).view(slots.shape)
        moved = nodes + (values * shares[..., None, :]).sum(-1) / self.spacing
        segment = ((moved <= target[..., None]).sum(-1, keepdim=True) - 1).clamp(0, len(steps) - 2)
        start, end = moved.gather(-1, segment)[..., 0], moved.gather(-1, segment + 1)[..., 0]
        node = nodes.gather(-1, segment)[..., 0]
        return self.low[axis] + self.spacing * (node + (target - start) / (end - start))

    def _flat_corners(self, points: Float[Tensor, "B N 3"], axis: int) -> tuple[Tensor, Float[Tensor, "B N 4"]]:
        """Flat indices, at the axis's first node, and shares of the four grid lines around each point."""
        others = [a for a in range(3) if a != axis]
        unit = (points[..., others] - self.low[others]) / self.spacing
        last = torch.tensor([self.shape[a] for a in others], dtype=unit.dtype, device=unit.device) - 1
        drawn = torch.minimum(unit.clamp(min=0), last)
        cell = torch.minimum(drawn.detach().floor(), last - 1)
        u, v = torch.stack([1 - (drawn - cell), drawn - cell], -1).unbind(-2)
        shares = (u[..., :, None] * v[..., None, :]).flatten(-2)
        first, second = (self.strides[a] for a in others)
        i, j = cell.long().unbind(-1)
        offsets = torch.tensor([0, second, first, first + second], device=points.device)
        return (i * first + j * second)[..., None] + offsets, shares

    def _set_active(self, active: Tensor) -> None:
        self.active = active
        self.slots.fill_(len(active))
        self.slots[active] = torch.arange(len(active), device=active.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take on as many nodes as the state has: which ones depends on the subject."""
        active = state_dict.get(f"{prefix}active")
        if active is not None:
            self._set_active(active.long().to(self.active.device))
            self.coefficients = nn.Parameter(self.coefficients.new_zeros(3, len(active), self.coefficients.shape[2]))
        super()._load_from_state_dict(state_dict, prefix, *args)


class LinearCorrectives(FieldPIN):
    """Linear pose correctives on the same grid, the baseline: all three axes at once, so without an exact inverse."""

    def to_deformed(self, x: Float[Tensor, "B N 3"], pose_code: Float[Tensor, "B K"]) -> Float[Tensor, "B N 3"]:
        """Move canonical points, metres, to where LBS finds them."""
        fields = functional.pad(torch.einsum("bk,cak->bca", pose_code, self.coefficients), (0, 1))
        slots, shares = self._corners(x)
        flat = slots.flatten(1)
        moves = [(field.gather(1, flat).view(shares.shape) * shares).sum(-1) for field in fields.unbind(1)]
        return x + torch.stack(moves, -1)

    def to_canonical(self, x: Float[Tensor, "B N 3"], pose_code: Float[Tensor, "B K"]) -> Float[Tensor, "B N 3"]:
        """Not there: a sum of displacements has no inverse that always exists.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("linear correctives have no inverse: evaluate them through the mesh")
