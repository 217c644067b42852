"""Per-bone pose code: what a PIN knows about the pose.

Every bone has a small network of its own, and the pose code is their outputs side by side (eq. 7).  The code is
m_b(input) - m_b(0): exactly zero in the canonical pose, whatever the weights.  Eq. 9 multiplies the space embedding
by the code so that no space-varying change happens in the canonical pose; that holds only where the code is zero there.
Reference: Kant et al., "Invertible Neural Skinning", CVPR 2023, eqs. 7 and 9; sizes, table 4.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

PoseInputs = Literal["bone", "joint"]


class PoseEncoder(nn.Module):
    """Bone transforms to pose code, one network per bone (eq. 7).

    Args:
        parents: index of each bone's parent, -1 for the root; a parent comes before its children.
        inputs: what a bone's network sees.  "bone": the paper's six numbers, Euler angles (radians) and translation
            (metres) of B_j.  "joint": the nine entries of R_parent^T R_j - I, the bone's turn relative to its parent:
            no Euler singularity, and a moved shoulder does not change what the wrist's network sees.
        code_width: C, a multiple of the number of bones.
        hidden: width of the two hidden layers; 132 gives the 0.46 M parameters of table 4.
    """

    parent_indices: Tensor

    def __init__(
        self, parents: Sequence[int], inputs: PoseInputs = "bone", code_width: int = 120, hidden: int = 132
    ) -> None:
        super().__init__()
        bone_count = len(parents)
        if code_width % bone_count:
            raise ValueError(f"expected a code width that is a multiple of {bone_count} bones, got {code_width}")
        if inputs not in ("bone", "joint"):
            raise ValueError(f"expected pose inputs 'bone' or 'joint', got {inputs!r}")
        self.inputs: PoseInputs = inputs
        # The root stands in as its own parent; its relative rotation is then the identity, which is what it has.
        indices = torch.tensor([max(parent, 0) for parent in parents])
        self.register_buffer("parent_indices", indices, persistent=False)
        in_features, out_features = (6 if inputs == "bone" else 9), code_width // bone_count
        self.weight_1, self.bias_1 = _bone_layer(bone_count, in_features, hidden)
        self.weight_2, self.bias_2 = _bone_layer(bone_count, hidden, hidden)
        self.weight_3, _ = _bone_layer(bone_count, hidden, out_features)  # a last bias would cancel in m(x) - m(0)

    def forward(self, bone_transforms: Float[Tensor, "B J 4 4"]) -> Float[Tensor, "B C"]:
        """The pose code e_theta of each frame.

        Args:
            bone_transforms: B_j, canonical -> deformed, metres; identity for every bone in the canonical pose.
        """
        features = self._features(bone_transforms).transpose(0, 1)  # (J, B, 6 or 9)
        # m(x) - m(0) layer by layer: `change` is the hidden layer minus what it is in the canonical pose, so that
        # it is an exact zero there and not the difference of two sums rounded differently.
        change = functional.silu(torch.baddbmm(self.bias_1, features, self.weight_1)) - functional.silu(self.bias_1)
        at_rest = torch.baddbmm(self.bias_2, functional.silu(self.bias_1), self.weight_2)
        change = functional.silu(torch.baddbmm(at_rest, change, self.weight_2)) - functional.silu(at_rest)
        return (change @ self.weight_3).transpose(0, 1).flatten(1)

    def _features(self, bone_transforms: Float[Tensor, "B J 4 4"]) -> Float[Tensor, "B J I"]:
        rotations = bone_transforms[..., :3, :3]
        if self.inputs == "bone":
            return torch.cat([euler_angles(rotations), bone_transforms[..., :3, 3]], -1)
        relative = rotations[:, self.parent_indices].mT @ rotations
        identity = torch.eye(3, dtype=rotations.dtype, device=rotations.device)
        return (relative - identity).flatten(-2)


def euler_angles(rotations: Float[Tensor, "*S 3 3"]) -> Float[Tensor, "*S 3"]:
    """Angles (a, b, c), radians, with R = R_z(c) R_y(b) R_x(a).

    Where b = +-90 degrees only a combination of a and c is defined: there a = c = 0, and all gradients are finite.
    """
    squared_cosine = rotations[..., 0, 0] ** 2 + rotations[..., 1, 0] ** 2
    # Both sides of atan2 vanish together at the singularity, where its gradient is 0 / 0.
    regular = squared_cosine > 1e-10
    one, zero = torch.ones_like(squared_cosine), torch.zeros_like(squared_cosine)
    a = torch.atan2(torch.where(regular, rotations[..., 2, 1], zero), torch.where(regular, rotations[..., 2, 2], one))
    b = torch.atan2(-rotations[..., 2, 0], torch.where(regular, squared_cosine, 1e-10 * one).sqrt())
    c = torch.atan2(torch.where(regular, rotations[..., 1, 0], zero), torch.where(regular, rotations[..., 0, 0], one))
    return torch.stack([a, b, c], -1)


def _bone_layer(bone_count: int, in_features: int, out_features: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weights (J, in, out) and biases (J, 1, out) of one linear layer per bone, drawn as `nn.Linear` draws them."""
    bound = 1 / math.sqrt(in_features)
    weight = torch.empty(bone_count, in_features, out_features).uniform_(-bound, bound)
    bias = torch.empty(bone_count, 1, out_features).uniform_(-bound, bound)
    return nn.Parameter(weight), nn.Parameter(bias)
