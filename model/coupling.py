"""Pose-conditioned coupling layers, the building block of a PIN.

A layer keeps some coordinates of a point and moves the others by a rigid motion that depends on the kept
ones and on the pose.  The kept part is unchanged, so the motion can be recomputed and undone exactly.
Reference: Kant et al., "Invertible Neural Skinning", CVPR 2023, eqs. 5-12; volume preservation, app. C.2;
Sitzmann et al., "Implicit Neural Representations with Periodic Activation Functions", NeurIPS 2020, for the embedding.

Inside, a batch of points is three tensors (B, N), one per coordinate, and features come before points, (B, C, N):
a coordinate is then read and replaced without copying the other two.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

Components = tuple[Tensor, Tensor, Tensor]
"""x, y and z of a batch of points, each (B, N), metres."""


class Siren(nn.Module):
    """Space embedding e_z = sin(omega0 (W z + b)) (eq. 8), one layer.

    W starts uniform in +-1 / in_features, so with coordinates in metres the shortest wavelength at the start is
    2 pi / omega0 for one coordinate: 21 cm with omega0 = 30.  Training may shorten it; a larger omega0 starts finer.
    """

    def __init__(self, in_features: int, out_features: int, omega0: float = 30.0) -> None:
        super().__init__()
        self.omega0 = omega0
        bound = 1 / in_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features).uniform_(-bound, bound))
        bound = 1 / math.sqrt(in_features)
        self.bias = nn.Parameter(torch.empty(out_features, 1).uniform_(-bound, bound))

    def forward(self, coordinates: Float[Tensor, "B I N"]) -> Float[Tensor, "B C N"]:
        """Embed one or two coordinates, metres, of every point."""
        weight = (self.omega0 * self.weight).expand(coordinates.shape[0], -1, -1)
        return torch.sin(torch.baddbmm(self.omega0 * self.bias, weight, coordinates))


class OperationMaps(nn.Module):
    """The maps m_t and m_r (eqs. 10-12), each 2C -> hidden -> out with SiLU, evaluated side by side.

    The last layers start at zero, so that a fresh layer is the identity (app. C.1).
    """

    def __init__(self, width: int, hidden: int, outputs: Sequence[int]) -> None:
        super().__init__()
        self.hidden = hidden
        self.first = nn.Linear(2 * width, hidden * len(outputs))
        self.last = nn.ModuleList(nn.Linear(hidden, out_features) for out_features in outputs)
        for layer in self.last.parameters():
            nn.init.zeros_(layer)

    def forward(self, space: Float[Tensor, "B C N"], pose_code: Float[Tensor, "B C"]) -> list[Float[Tensor, "B O N"]]:
        """One tensor per map, for the conditioning concat[e_pose * e_z, e_pose] (eq. 9).

        The concatenation is never built: W [e_pose * e_z ; e_pose] + b = (W_1 diag(e_pose)) e_z + (W_2 e_pose + b).
        That is the same number, and as the pose is constant over a frame both brackets are computed once a frame,
        which halves the multiply-adds of a point.
        """
        batch, width = pose_code.shape
        weight_space, weight_pose = self.first.weight.split(width, 1)
        folded_weight = weight_space * pose_code[:, None]  # (B, maps * hidden, C)
        folded_bias = functional.linear(pose_code, weight_pose, self.first.bias)[..., None]
        hidden = functional.silu(torch.baddbmm(folded_bias, folded_weight, space))
        last = cast(list[nn.Linear], list(self.last))
        return [
            torch.baddbmm(layer.bias[:, None], layer.weight.expand(batch, -1, -1), part)
            for layer, part in zip(last, hidden.split(self.hidden, 1), strict=True)
        ]


class PlanarCoupling(nn.Module):
    """2D coupling (eq. 5): rotates and translates two axes, conditioned on the third and on the pose.

    Args:
        kept_axis: 0, 1 or 2, the axis that stays.
        width: C, of the space embedding and of the pose code.
        hidden: width of the operation maps.
        omega0: see `Siren`.
        rotation: False leaves the rotation out (ablation of the paper's table 3, row 4).
    """

    def __init__(
        self, kept_axis: int, width: int = 120, hidden: int = 64, omega0: float = 30.0, rotation: bool = True
    ) -> None:
        super().__init__()
        self.kept = kept_axis
        self.moved = [axis for axis in range(3) if axis != kept_axis]
        self.space_embedding = Siren(1, width, omega0)
        self.maps = OperationMaps(width, hidden, outputs=(2, 1) if rotation else (2,))

    def forward(self, x: Float[Tensor, "B N 3"], pose_code: Float[Tensor, "B C"]) -> Float[Tensor, "B N 3"]:
        """Move the points, metres."""
        return torch.stack(self.move(_components(x), pose_code), -1)

    def inverse(self, y: Float[Tensor, "B N 3"], pose_code: Float[Tensor, "B C"]) -> Float[Tensor, "B N 3"]:
        """Undo `forward` (eq. 6)."""
        return torch.stack(self.move_back(_components(y), pose_code), -1)

    def move(self, x: Components, pose_code: Tensor) -> Components:
        """`forward` on components."""
        angle, shift_u, shift_v = self._motion(x[self.kept], pose_code)
        u, v = x[self.moved[0]], x[self.moved[1]]
        if angle is not None:
            cosine, sine = angle.cos(), angle.sin()
            u, v = cosine * u - sine * v, sine * u + cosine * v
        return self._replace(x, u + shift_u, v + shift_v)

    def move_back(self, y: Components, pose_code: Tensor) -> Components:
        """`inverse` on components."""
        angle, shift_u, shift_v = self._motion(y[self.kept], pose_code)
        u, v = y[self.moved[0]] - shift_u, y[self.moved[1]] - shift_v
        if angle is not None:
            cosine, sine = angle.cos(), angle.sin()
            u, v = cosine * u + sine * v, cosine * v - sine * u
        return self._replace(y, u, v)

    def _motion(self, kept: Tensor, pose_code: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Angle (radians) and the two shifts (metres), each (B, N)."""
        translation, *rotation = self.maps(self.space_embedding(kept[:, None]), pose_code)
        shift_u, shift_v = translation.unbind(1)
        return (rotation[0][:, 0] if rotation else None), shift_u, shift_v

    def _replace(self, x: Components, u: Tensor, v: Tensor) -> Components:
        return ((x[0], u, v), (u, x[1], v), (u, v, x[2]))[self.kept]


class AxialCoupling(nn.Module):
    """1D coupling (eq. 12): translates one axis, conditioned on the other two and on the pose.

    Args:
        moved_axis: 0, 1 or 2, the axis that moves.
        width, hidden, omega0: as in `PlanarCoupling`.
    """

    def __init__(self, moved_axis: int, width: int = 120, hidden: int = 64, omega0: float = 30.0) -> None:
        super().__init__()
        self.moved = moved_axis
        self.kept = [axis for axis in range(3) if axis != moved_axis]
        self.space_embedding = Siren(2, width, omega0)
        self.maps = OperationMaps(width, hidden, outputs=(1,))

    def forward(self, x: Float[Tensor, "B N 3"], pose_code: Float[Tensor, "B C"]) -> Float[Tensor, "B N 3"]:
        """Move the points, metres."""
        return torch.stack(self.move(_components(x), pose_code), -1)

    def inverse(self, y: Float[Tensor, "B N 3"], pose_code: Float[Tensor, "B C"]) -> Float[Tensor, "B N 3"]:
        """Undo `forward`."""
        return torch.stack(self.move_back(_components(y), pose_code), -1)

    def move(self, x: Components, pose_code: Tensor) -> Components:
        """`forward` on components."""
        return self._replace(x, x[self.moved] + self._shift(x, pose_code))

    def move_back(self, y: Components, pose_code: Tensor) -> Components:
        """`inverse` on components."""
        return self._replace(y, y[self.moved] - self._shift(y, pose_code))

    def _shift(self, x: Components, pose_code: Tensor) -> Tensor:
        """Shift along the moved axis, metres, (B, N)."""
        kept = torch.stack([x[self.kept[0]], x[self.kept[1]]], 1)
        (translation,) = self.maps(self.space_embedding(kept), pose_code)
        return translation[:, 0]

    def _replace(self, x: Components, value: Tensor) -> Components:
        return ((value, x[1], x[2]), (x[0], value, x[2]), (x[0], x[1], value))[self.moved]


def _components(x: Tensor) -> Components:
    first, second, third = x.unbind(-1)
    return first, second, third
