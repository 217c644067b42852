"""Pose-conditioned invertible network: a chain of coupling layers.

`to_canonical` is the paper's forward pass H (eq. 13), `to_deformed` its inverse (eq. 14): reposing a mesh is the
*inverse* pass.  Both have the same cost, undo each other exactly (eq. 15) and keep volumes (app. C.2).
Reference: Kant et al., "Invertible Neural Skinning", CVPR 2023, section 3.2.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.coupling import AxialCoupling, Components, PlanarCoupling


class PIN(nn.Module):
    """2D and 1D coupling layers in turn, over the three axes in turn; the identity until trained.

    In the canonical pose (pose code zero) it is one rigid motion of the whole space, whatever its weights.

    Args:
        layer_count: number of coupling layers, 18 in the paper.
        width: C, of the space embeddings and of the pose code.
        hidden: width of the operation maps.
        omega0: angular frequency of the space embeddings, rad/m; see `Siren`.
        rotation: False leaves the rotations of the 2D layers out (ablation).
    """

    def __init__(
        self,
        layer_count: int = 18,
        width: int = 120,
        hidden: int = 64,
        omega0: float = 30.0,
        rotation: bool = True,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            AxialCoupling(index // 2 % 3, width, hidden, omega0)
            if index % 2
            else PlanarCoupling(index // 2 % 3, width, hidden, omega0, rotation)
            for index in range(layer_count)
        )

    def to_canonical(self, x: Float[Tensor, "B N 3"], pose_code: Float[Tensor, "B C"]) -> Float[Tensor, "B N 3"]:
        """Carry points, metres, towards the canonical frame (eq. 13)."""
        components = _contiguous_components(x)
        for layer in self._chain():
            components = layer.move(components, pose_code)
        return torch.stack(components, -1)

    def to_deformed(self, x: Float[Tensor, "B N 3"], pose_code: Float[Tensor, "B C"]) -> Float[Tensor, "B N 3"]:
        """Undo `to_canonical` (eq. 14)."""
        components = _contiguous_components(x)
        for layer in reversed(self._chain()):
            components = layer.move_back(components, pose_code)
        return torch.stack(components, -1)

    def _chain(self) -> list[PlanarCoupling | AxialCoupling]:
        return cast(list[PlanarCoupling | AxialCoupling], list(self.layers))


def _contiguous_components(x: Tensor) -> Components:
    first, second, third = x.permute(2, 0, 1).contiguous().unbind(0)
    return first, second, third
