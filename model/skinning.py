"""Linear blend skinning and the canonical skinning-weight field.

Reference: Kant et al., "Invertible Neural Skinning", CVPR 2023, eqs. 2-3; Chen et al., "SNARF", ICCV 2021, section 3.1.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


@runtime_checkable
class WeightField(Protocol):
    """What root finding needs of a skinning-weight field."""

    def __call__(self, x_c: Tensor, /) -> Tensor:
        """Weights (..., J) of canonical points (..., 3), metres."""
        ...

    def with_derivatives(self, x_c: Tensor, /) -> Tensor:
        """(..., 4, J): the weights and their derivatives along x, y and z (1/m)."""
        ...


class SkinningField(nn.Module):
    """w_lbs: canonical point -> skinning weights, >= 0 and summing to 1 (eq. 2).

    SiLU between the layers: smooth, as root finding needs derivatives everywhere, and 15 times cheaper on a CPU than
    the softplus(beta = 100) of SNARF, which cost more than all the products.

    Args:
        bone_count: J.
        width: of the four hidden layers; 128 gives the 53 K parameters of table 4.
        sharpness: factor on the logits.  Near a joint the weights change within centimetres; the factor lets the
            network follow without large parameters.
    """

    def __init__(self, bone_count: int = 24, width: int = 128, sharpness: float = 20.0) -> None:
        super().__init__()
        self.sharpness = sharpness
        sizes = [3, width, width, width, width, bone_count]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))

    def forward(self, x_c: Float[Tensor, "*S 3"]) -> Float[Tensor, "*S J"]:
        """Skinning weights of canonical points, metres."""
        return torch.softmax(self.logits(x_c), -1)

    def logits(self, x_c: Float[Tensor, "*S 3"]) -> Float[Tensor, "*S J"]:
        """The weights before softmax."""
        *hidden_layers, last = cast(list[nn.Linear], list(self.layers))
        hidden = x_c
        for layer in hidden_layers:
            hidden = functional.silu(layer(hidden))
        return self.sharpness * last(hidden)

    def with_derivatives(self, x_c: Float[Tensor, "*S 3"]) -> Float[Tensor, "*S 4 J"]:
        """Weights and their derivatives along x, y and z (1/m), by forward-mode differentiation in one pass."""
        identity = torch.eye(3, dtype=x_c.dtype, device=x_c.device)
        hidden = torch.cat([x_c[..., None, :], identity.expand(*x_c.shape[:-1], 3, 3)], -2)  # (..., 4, 3)
        *hidden_layers, last = cast(list[nn.Linear], list(self.layers))
        for layer in hidden_layers:
            linear = hidden @ layer.weight.T
            value = linear[..., :1, :] + layer.bias
            gate = torch.sigmoid(value)
            slope = gate * (1 + value * (1 - gate))
            hidden = torch.cat([value * gate, slope * linear[..., 1:, :]], -2)
        linear = self.sharpness * (hidden @ last.weight.T)
        return _softmax_with_derivatives(linear[..., :1, :] + self.sharpness * last.bias, linear[..., 1:, :])


class VoxelSkinningField(nn.Module):
    """w_lbs on a grid: the weights of a point are the softmax of trilinear logits, ten times cheaper than the MLP's.

    Beyond its box the field goes on as at the border.  It is continuous everywhere; its derivatives jump from cell to
    cell, which costs Newton's method a step now and then and no root.
    Reference: Chen et al., "Fast-SNARF", TPAMI 2023, section 3.2, which tabulates the MLP; here the table is trained.

    Args:
        bone_count: J.
        low, high: (3,), the box, metres, canonical frame; the last node of an axis may lie up to one step beyond.
        spacing: of the nodes, metres.
    """

    low: Tensor
    last: Tensor
    corners: Tensor

    def __init__(
        self, bone_count: int, low: Float[Tensor, "3"], high: Float[Tensor, "3"], spacing: float = 0.03
    ) -> None:
        super().__init__()
        shape = (((high - low) / spacing).ceil().int() + 1).clamp(min=3).tolist()
        self.spacing = spacing
        self.register_buffer("low", low.detach().clone(), persistent=False)
        self.register_buffer("last", torch.tensor(shape) - 1, persistent=False)
        _, y, z = shape
        corners = [(i * y + j) * z + k for i in (0, 1) for j in (0, 1) for k in (0, 1)]
        self.register_buffer("corners", torch.tensor(corners), persistent=False)
        self.grid = nn.Parameter(torch.zeros(*shape, bone_count))
        """(X, Y, Z, J), logits of the nodes."""

    def forward(self, x_c: Float[Tensor, "*S 3"]) -> Float[Tensor, "*S J"]:
        """Skinning weights of canonical points, metres."""
        return torch.softmax(self.logits(x_c), -1)

    def logits(self, x_c: Float[Tensor, "*S 3"]) -> Float[Tensor, "*S J"]:
        """The weights before softmax."""
        corners, share, _ = self._cells(x_c.reshape(-1, 3))
        shares = _corner_products(torch.stack([1 - share, share], -1))
        # `embedding_bag` would be a quarter faster here, and 200 times slower in ONNX Runtime, where it becomes a loop.
        rows = functional.embedding(corners, self.grid.flatten(0, 2))  # (N, 8, J)
        return (rows * shares[..., None]).sum(1).view(*x_c.shape[:-1], -1)

    def with_derivatives(self, x_c: Float[Tensor, "*S 3"]) -> Float[Tensor, "*S 4 J"]:
        """Weights and their derivatives along x, y and z (1/m); within a cell, and zero along a clamped axis."""
        corners, share, within = self._cells(x_c.reshape(-1, 3))
        pairs = torch.stack([1 - share, share], -1)  # (N, 3, 2)
        slope = torch.stack([-within, within], -1) / self.spacing
        # Row 0: the value.  Row a + 1: the factor of axis a is replaced by its derivative.
        own = torch.eye(3, dtype=torch.bool, device=share.device)[:, :, None]
        derived = torch.where(own, slope[:, None], pairs[:, None])  # (N, 3, 3, 2)
        products = _corner_products(torch.cat([pairs[:, None], derived], 1))
        rows = products @ functional.embedding(corners, self.grid.flatten(0, 2))  # (N, 4, J)
        return _softmax_with_derivatives(rows[:, :1], rows[:, 1:]).view(*x_c.shape[:-1], 4, -1)

    @torch.no_grad()
    def set_from(self, logits: Callable[[Tensor], Tensor], floor: float = -12.0) -> None:
        """Sample a field, such as another's `logits`, at the nodes.

        Logits are stored as the logarithm of the weights, so the ones that matter are small numbers and survive half
        precision; below the `floor` they carry nothing and would need a long training to come back.
        """
        axes = [torch.arange(n, dtype=self.low.dtype, device=self.low.device) for n in self.grid.shape[:3]]
        nodes = self.low + self.spacing * torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
        values = torch.cat([logits(part) for part in nodes.split(2**16)])
        self.grid.copy_(torch.log_softmax(values, -1).clamp(min=floor).view(self.grid.shape))

    def _cells(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The cells of points (N, 3), outer ones drawn to the border.

        Returns (N, 8) rows of the flat grid, (N, 3) places within the cell in [0, 1], and (N, 3) 1 where the axis is
        not clamped, else 0.
        """
        unit = (points - self.low) / self.spacing
        drawn = torch.minimum(unit.clamp(min=0), self.last.to(unit))
        # The second clamp is for NaN, which becomes some integer.
        cell = torch.minimum(drawn.detach().long().clamp(min=0), self.last - 1)
        x, y, z = cell.split(1, -1)
        first = (x * self.grid.shape[1] + y) * self.grid.shape[2] + z
        return first + self.corners, drawn - cell, (unit == drawn).to(unit)


class NearSkinningField(nn.Module):
    """A voxel field that holds only the nodes of cells in which points are known to lie, for the exported graph.

    Args:
        whole: the field.
        points: (N, 3), metres; weights are right in every cell within `reach`, along each axis, of one of them.
        reach: metres.
    """

    slots: Tensor
    rows: Tensor

    def __init__(self, whole: VoxelSkinningField, points: Float[Tensor, "N 3"], reach: float) -> None:
        super().__init__()
        self._cells = whole._cells
        steps = torch.linspace(-reach, reach, math.ceil(2 * reach / whole.spacing) + 1)
        around = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), -1).view(-1, 1, 3).to(points)
        needed = whole._cells((points + around).view(-1, 3))[0].unique()
        slots = torch.zeros(whole.grid.flatten(0, 2).shape[0], dtype=torch.long, device=points.device)
        slots[needed] = torch.arange(len(needed), device=points.device)
        self.register_buffer("slots", slots)
        self.register_buffer("rows", whole.grid.detach().flatten(0, 2)[needed])

    def forward(self, x_c: Float[Tensor, "*S 3"]) -> Float[Tensor, "*S J"]:
        """Skinning weights of canonical points, metres."""
        corners, share, _ = self._cells(x_c.reshape(-1, 3))
        shares = _corner_products(torch.stack([1 - share, share], -1))
        rows = functional.embedding(self.slots[corners], self.rows)
        return torch.softmax((rows * shares[..., None]).sum(1), -1).view(*x_c.shape[:-1], -1)


def _softmax_with_derivatives(logits: Float[Tensor, "*S 1 J"], slopes: Float[Tensor, "*S 3 J"]) -> Tensor:
    """(..., 4, J): the softmax and its derivatives, from the logits and theirs."""
    weights = torch.softmax(logits, -1)
    return torch.cat([weights, weights * (slopes - (weights * slopes).sum(-1, keepdim=True))], -2)


def _corner_products(pairs: Float[Tensor, "*S 3 2"]) -> Float[Tensor, "*S 8"]:
    """Products of one factor of each axis, in the order of the cell's corners."""
    x, y, z = pairs.unbind(-2)
    return (x[..., :, None, None] * y[..., None, :, None] * z[..., None, None, :]).flatten(-3)


def linear_blend_skinning(
    x_c: Float[Tensor, "B N 3"], weights: Float[Tensor, "B N J"], bone_transforms: Float[Tensor, "B J 4 4"]
) -> Float[Tensor, "B N 3"]:
    r"""Pose canonical points with the skeleton: x_d = (sum_j w_j B_j) x_c  (eq. 3).

    Args:
        x_c: points in the canonical frame, metres.
        weights: each row >= 0 and summing to 1.  Trusted, not checked.
        bone_transforms: B_j, rigid, canonical -> deformed, acting on column vectors; identity for every bone when
            the target pose is the canonical pose.
    """
    return apply_blended(weights @ blend_rows(bone_transforms), x_c)


def skinning_jacobian(
    field: WeightField, x_c: Float[Tensor, "B N 3"], bone_transforms: Float[Tensor, "B J 4 4"]
) -> Float[Tensor, "B N 3 3"]:
    """d lbs / d x_c, the change of the weights included; entry [a, b] is d x_d[a] / d x_c[b]."""
    blended = field.with_derivatives(x_c) @ blend_rows(bone_transforms)[:, None]  # (B, N, 4, 12)
    return blended_jacobian(blended, x_c)


def blend_rows(bone_transforms: Float[Tensor, "B J 4 4"]) -> Float[Tensor, "B J 12"]:
    """The four columns of [R_j | t_j], one after the other: skinning weights times this are the blended bones."""
    return bone_transforms[..., :3, :].mT.flatten(-2)


def apply_blended(blended: Float[Tensor, "*#S 12"], x_c: Float[Tensor, "*#S 3"]) -> Float[Tensor, "... 3"]:
    """Apply blended bones to their points."""
    x, y, z = x_c.split(1, -1)
    return x * blended[..., 0:3] + y * blended[..., 3:6] + z * blended[..., 6:9] + blended[..., 9:12]


def blended_jacobian(blended: Float[Tensor, "*S 4 12"], x_c: Float[Tensor, "*S 3"]) -> Float[Tensor, "*S 3 3"]:
    """d lbs / d x_c from the bones blended with the weights and with the three derivatives of the weights."""
    through_weights = apply_blended(blended[..., 1:, :], x_c[..., None, :])  # (..., 3, 3), row b: along axis b
    rotation_rows = blended[..., 0, :9].unflatten(-1, (3, 3))  # row b: column b of the blended rotation
    return (rotation_rows + through_weights).mT
