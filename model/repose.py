"""The graph that is exported: canonical vertices and bone transforms in, vertices out.

Reference: Kant et al., "Invertible Neural Skinning", CVPR 2023, eq. 19.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.ins import INS


class Repose(nn.Module):
    """INS.to_deformed, then the root motion.

    The root transform is applied after the networks, which never see it, so reposing commutes with root motion exactly.
    """

    def __init__(self, ins: INS) -> None:
        super().__init__()
        self.ins = ins

    def forward(
        self,
        canonical_vertices: Float[Tensor, "V 3"],
        bone_transforms: Float[Tensor, "F J 4 4"],
        root_transforms: Float[Tensor, "F 4 4"],
    ) -> Float[Tensor, "F V 3"]:
        """Vertices of each frame, metres, world frame.

        Args:
            canonical_vertices: metres, canonical frame.
            bone_transforms: B_j, canonical -> deformed as seen from the root, the root's the identity.
            root_transforms: rigid, root frame -> world.
        """
        x_d = self.ins.to_deformed(canonical_vertices, bone_transforms)
        translation = root_transforms[:, None, :3, 3]
        return torch.baddbmm(translation, x_d, root_transforms[:, :3, :3].mT)
