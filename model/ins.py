"""Invertible Neural Skinning: PIN -> LBS -> PIN around a pose-free canonical occupancy.

Deformed to canonical (training) is a search with several answers (eqs. 16-17); canonical to deformed (reposing) is
explicit, one point in, one point out (eq. 19).  Root motion stays outside: the root's bone is the identity here.
Reference: Kant et al., "Invertible Neural Skinning", CVPR 2023, section 3.3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from model.field_pin import FieldPIN, LinearCorrectives, PoseFeatures
from model.occupancy import OccupancyNetwork
from model.pin import PIN
from model.pose_encoder import PoseEncoder, PoseInputs
from model.root_finding import (
    SNARF_START_BONES,
    attach_gradient,
    bone_starts,
    distinct,
    find_roots,
    inverse_3x3,
    nearest_bone_starts,
)
from model.skinning import SkinningField, VoxelSkinningField, WeightField, linear_blend_skinning

OUTSIDE_LOGIT = -20.0
"""Occupancy logit of a point without a canonical correspondence: outside, and still a finite loss when wrong."""

NEAREST_STARTS = 4
"""Starts of a search where the bone centres are known."""


Correctives = Literal["coupling", "field", "linear"]
SkinningAt = Literal["moved", "canonical"]


@dataclass(frozen=True)
class Grids:
    """The box that grids of the canonical frame fill, and their spacings, metres."""

    low: Float[Tensor, "3"]
    high: Float[Tensor, "3"]
    field_spacing: float = 0.03
    skinning_spacing: float = 0.03


class INS(nn.Module):
    """The whole pipeline of one subject.

    Args:
        parents: index of each bone's parent, -1 for the root.
        occupancy: the canonical occupancy network; the default one when None.
        pose_inputs: see `PoseEncoder`.
        correctives: what H_c is.  "coupling": the paper's PIN.  "field": `FieldPIN`, whose pose code, `PoseFeatures`,
            H_d then reads too.  "linear": linear pose correctives, the baseline, without an inverse.
        code_width: of the pose code of fields.
        skinning: "mlp" or "voxel", see `SkinningField` and `VoxelSkinningField`.
        skinning_at: where a point's weights are read.  "moved": where H_c has carried it, the paper's (eq. 14).
            "canonical": where it lies in the canonical frame, so that they are the point's own in every pose, as they
            are in SMPL.
        grids: box and spacings of what lies on a grid: fields, voxel skinning.
        pin_layers: coupling layers of each PIN.
        omega0: angular frequency of the PINs' space embeddings, rad/m.
        use_h_c, use_h_d: False leaves that PIN out (ablations of the paper's table 3).
        rotation: False leaves the rotations of the coupling layers out (ablation).
        bone_centres: (J, 3), a point of each bone in the canonical frame, metres; searches then start from the four
            bones nearest to a point, which misses the point that was posed less often than SNARF's nine fixed ones
            do, at a third of the cost.
    """

    bone_centres: Tensor | None

    def __init__(
        self,
        parents: Sequence[int],
        occupancy: OccupancyNetwork | None = None,
        pose_inputs: PoseInputs = "bone",
        pin_layers: int = 18,
        omega0: float = 30.0,
        use_h_c: bool = True,
        use_h_d: bool = True,
        rotation: bool = True,
        bone_centres: Float[Tensor, "J 3"] | None = None,
        correctives: Correctives = "coupling",
        code_width: int = 48,
        skinning: Literal["mlp", "voxel"] = "mlp",
        grids: Grids | None = None,
        skinning_at: SkinningAt = "moved",
    ) -> None:
        super().__init__()
        self.bone_count = len(parents)
        # Both PINs read one pose code: table 4 counts one bone encoder.
        self.pose_encoder: PoseEncoder | PoseFeatures
        self.h_c: PIN | FieldPIN | None = None
        if correctives == "coupling":
            code_width = 120
            self.pose_encoder = PoseEncoder(parents, pose_inputs, code_width)
            self.h_c = PIN(pin_layers, omega0=omega0, rotation=rotation) if use_h_c else None
        else:
            kind, box = {"field": FieldPIN, "linear": LinearCorrectives}[correctives], _needed(grids)
            self.pose_encoder = PoseFeatures(parents, code_width)
            self.h_c = kind(code_width, box.low, box.high, box.field_spacing) if use_h_c else None
        self.h_d = PIN(pin_layers, code_width, omega0=omega0, rotation=rotation) if use_h_d else None
        self.skinning_field: SkinningField | VoxelSkinningField
        if skinning == "mlp":
            self.skinning_field = SkinningField(len(parents))
        else:
            box = _needed(grids)
            self.skinning_field = VoxelSkinningField(len(parents), box.low, box.high, box.skinning_spacing)
        self.skinning_at = skinning_at
        self.occupancy = OccupancyNetwork() if occupancy is None else occupancy
        self.register_buffer("bone_centres", bone_centres, persistent=False)
        self.search: Callable[..., tuple[Tensor, Tensor]] = find_roots
        """Finds roots from starts; a caller may put a faster one here."""

    def to_deformed(
        self, x_c: Float[Tensor, "B N 3"] | Float[Tensor, "N 3"], bone_transforms: Float[Tensor, "B J 4 4"]
    ) -> Float[Tensor, "B N 3"]:
        """Repose canonical points (eq. 19): h_c backwards, LBS, h_d backwards.

        Args:
            x_c: points of every frame, or one set of points for all frames; metres, canonical frame.
            bone_transforms: B_j, canonical -> deformed, the root's the identity.

        Returns:
            points in the deformed frame as seen from the root, metres.
        """
        return self.trace(x_c, bone_transforms)[-1]

    def trace(
        self,
        x_c: Float[Tensor, "B N 3"] | Float[Tensor, "N 3"],
        bone_transforms: Float[Tensor, "B J 4 4"],
        pose_code: Float[Tensor, "B C"] | None = None,
    ) -> tuple[Float[Tensor, "B N 3"], Float[Tensor, "B N 3"], Float[Tensor, "B N 3"]]:
        """Reposing with its way stations (eq. 19): q_c before LBS, q_d after it, and x_d, all in metres.

        Args:
            x_c, bone_transforms: see `to_deformed`.
            pose_code: what both PINs see instead of the code of `bone_transforms`.
        """
        points = x_c if x_c.ndim == 3 else x_c.expand(bone_transforms.shape[0], -1, -1)
        code: Tensor = self.pose_encoder(bone_transforms) if pose_code is None else pose_code
        q_c = points if self.h_c is None else self.h_c.to_deformed(points, code)
        weights = self.skinning_field(q_c if self.skinning_at == "moved" else x_c)
        q_d = linear_blend_skinning(q_c, weights, bone_transforms)
        return q_c, q_d, q_d if self.h_d is None else self.h_d.to_deformed(q_d, code)

    def to_canonical(
        self,
        x_d: Float[Tensor, "B N 3"],
        bone_transforms: Float[Tensor, "B J 4 4"],
        starts: Float[Tensor, "B N K 3"] | None = None,
        start_bones: Sequence[int] | None = None,
        max_steps: int = 20,
        tolerance: float = 1e-5,
    ) -> tuple[Float[Tensor, "B N K 3"], Bool[Tensor, "B N K"]]:
        """All canonical correspondences of deformed points (eq. 16), differentiable where gradients are enabled.

        Args:
            x_d: query points, metres, deformed frame as seen from the root.
            bone_transforms: B_j, canonical -> deformed.
            starts: where to start the search, in the frame between h_c and LBS, metres.
            start_bones: without `starts`: the bones to start from; by default the four nearest, or SNARF's nine where
                the bone centres are not known.
            max_steps, tolerance: see `find_roots`.

        Returns:
            (candidates, valid): `valid` is True for one of each distinct converged root; candidates are meaningless
            elsewhere, and not differentiable.
        """
        packed, places, valid = self._candidates(x_d, bone_transforms, starts, start_bones, max_steps, tolerance)
        candidates = x_d.new_zeros(valid.shape[0], valid[0].numel(), 3).scatter(1, _for_points(places), packed)
        return candidates.view(*valid.shape, 3), valid

    def occupancy_at(
        self,
        x_d: Float[Tensor, "B N 3"],
        bone_transforms: Float[Tensor, "B J 4 4"],
        soft: bool,
        starts: Float[Tensor, "B N K 3"] | None = None,
        start_bones: Sequence[int] | None = None,
        max_steps: int = 20,
        tolerance: float = 1e-5,
        softness: float = 5.0,
    ) -> Float[Tensor, "B N"]:
        """Occupancy logits of deformed points (eq. 17); points without a correspondence are outside.

        Args:
            soft: False takes the largest logit among the candidates; True their mean weighted by
                softmax(softness * logits), which lets gradients reach all of them, as in SNARF's training.
            x_d, bone_transforms, starts, start_bones, max_steps, tolerance: see `to_canonical`.
            softness: large values approach the maximum.
        """
        packed, places, valid = self._candidates(x_d, bone_transforms, starts, start_bones, max_steps, tolerance)
        return self.merged_occupancy(packed, places, valid, soft, softness)

    def merged_occupancy(
        self,
        packed: Float[Tensor, "B M 3"],
        places: Int[Tensor, "B M"],
        valid: Bool[Tensor, "B N K"],
        soft: bool,
        softness: float = 5.0,
    ) -> Float[Tensor, "B N"]:
        """Occupancy logits of points from their canonical candidates (eq. 17), packed as `pack` does."""
        logits = packed.new_zeros(valid.shape[0], valid[0].numel()).scatter(1, places, self.occupancy(packed))
        logits = logits.view(valid.shape)
        lowest = torch.finfo(logits.dtype).min
        if soft:
            shares = torch.softmax((softness * logits).masked_fill(~valid, lowest), -1)
            merged = (shares * logits.masked_fill(~valid, 0.0)).sum(-1)
        else:
            merged = logits.masked_fill(~valid, lowest).amax(-1)
        return merged.masked_fill(~valid.any(-1), OUTSIDE_LOGIT)

    @property
    def weights_are_fixed(self) -> bool:
        """Whether vertices come out linear in the bones' translations, with weights that no pose changes."""
        return self.skinning_at == "canonical" and self.h_d is None and isinstance(self.pose_encoder, PoseFeatures)

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters by the rows of the paper's table 4."""
        parts = {
            "ins": self,
            "pin": self.h_c or self.h_d,
            "occupancy": self.occupancy,
            "skinning_field": self.skinning_field,
            "pose_encoder": self.pose_encoder,
        }
        return {
            name: sum(weight.numel() for weight in part.parameters()) if part is not None else 0
            for name, part in parts.items()
        }

    def _candidates(
        self,
        x_d: Tensor,
        bone_transforms: Tensor,
        starts: Tensor | None,
        start_bones: Sequence[int] | None,
        max_steps: int,
        tolerance: float,
    ) -> tuple[Float[Tensor, "B M 3"], Int[Tensor, "B M"], Bool[Tensor, "B N K"]]:
        """Canonical candidates, packed: most starts end in the same root, so the networks see M << N K points.

        Returns the packed points, their places among the N K starts of the frame, and which starts are valid.  Frames
        with fewer than M valid candidates are filled up with invalid ones.
        """
        pose_code = self.pose_encoder(bone_transforms)
        q_d = x_d if self.h_d is None else self.h_d.to_canonical(x_d, pose_code)
        if starts is None:
            starts = self._starts(q_d.detach(), bone_transforms, start_bones)
        limits = {"max_steps": max_steps, "tolerance": tolerance}
        found = [
            search(field, q_d[part].detach(), bone_transforms[part], starts[part], **limits)
            for part, field, search in self._fields(pose_code)
        ]
        roots, converged = (torch.cat(parts) for parts in zip(*found, strict=True))
        valid = distinct(roots, converged)
        q_c, places = pack(roots, valid)
        if torch.is_grad_enabled():
            targets = q_d.gather(1, _for_points(places // roots.shape[2]))
            q_c = torch.cat(
                [
                    attach_gradient(field, q_c[part, :, None], targets[part], bone_transforms[part])[:, :, 0]
                    for part, field, _ in self._fields(pose_code)
                ]
            )
        x_c = q_c if self.h_c is None else self.h_c.to_canonical(q_c, pose_code)
        return x_c, places, valid

    def _fields(self, pose_code: Tensor) -> list[tuple[slice, WeightField, Callable[..., tuple[Tensor, Tensor]]]]:
        """The weights as functions of q_c, with the frames for which each holds and the search that can use it."""
        if self.skinning_at == "moved" or self.h_c is None:
            return [(slice(None), self.skinning_field, self.search)]
        # A root moves through H_c as it is searched, which depends on the pose: frame by frame.
        fields: list[tuple[slice, WeightField, Callable[..., tuple[Tensor, Tensor]]]] = []
        for frame in range(len(pose_code)):
            part = slice(frame, frame + 1)
            fields.append((part, CarriedWeights(self.skinning_field, self.h_c, pose_code[part]), find_roots))
        return fields

    def _starts(self, q_d: Tensor, bone_transforms: Tensor, start_bones: Sequence[int] | None) -> Tensor:
        """Where a search starts, (B, N, K, 3)."""
        if start_bones is None and self.bone_centres is not None:
            count = min(NEAREST_STARTS, len(self.bone_centres))
            return nearest_bone_starts(q_d, bone_transforms, self.bone_centres, count)
        if start_bones is None:
            bone_count = bone_transforms.shape[1]
            start_bones = SNARF_START_BONES if bone_count == 24 else range(bone_count)
        return bone_starts(q_d, bone_transforms, start_bones)


class CarriedWeights:
    """Weights of canonical points as a function of where H_c carries them in one pose: w(H_c^-1(q_c)).

    Args:
        field: the weights of canonical points.
        h_c: with an inverse.
        pose_code: of one frame.
    """

    def __init__(self, field: WeightField, h_c: PIN | FieldPIN, pose_code: Float[Tensor, "1 C"]) -> None:
        self.field, self.h_c, self.pose_code = field, h_c, pose_code

    def __call__(self, q_c: Float[Tensor, "*S 3"]) -> Float[Tensor, "*S J"]:
        """Weights, each row summing to 1, of points in metres."""
        return self.field(self._back(q_c))

    def with_derivatives(self, q_c: Float[Tensor, "*S 3"]) -> Float[Tensor, "*S 4 J"]:
        """The weights and their derivatives along x, y and z of q_c (1/m)."""
        x_c = self._back(q_c)
        rows = self.field.with_derivatives(x_c)
        with torch.enable_grad():
            points = x_c.detach().reshape(1, -1, 3).requires_grad_()
            moved = self.h_c.to_deformed(points, self.pose_code.detach())
            gradients = [torch.autograd.grad(one.sum(), points, retain_graph=True)[0] for one in moved.unbind(-1)]
        slopes = inverse_3x3(torch.stack(gradients, -2)).view(*x_c.shape, 3)  # d x_c / d q_c
        return torch.cat([rows[..., :1, :], slopes.mT @ rows[..., 1:, :]], -2)

    def _back(self, q_c: Tensor) -> Tensor:
        return self.h_c.to_canonical(q_c.reshape(1, -1, 3), self.pose_code).view(q_c.shape)


def _needed(grids: Grids | None) -> Grids:
    if grids is None:
        raise ValueError("fields and voxel skinning need the box of their grids")
    return grids


def pack(
    roots: Float[Tensor, "B N K 3"], valid: Bool[Tensor, "B N K"]
) -> tuple[Float[Tensor, "B M 3"], Int[Tensor, "B M"]]:
    """The valid roots of each frame side by side, and their places among its N K starts.

    M is the largest number in a frame; frames with fewer are filled up with invalid ones.
    """
    flat = valid.flatten(1)
    most = max(int(flat.sum(1).max()), 1)
    places = flat.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return roots.flatten(1, 2).gather(1, _for_points(places)), places


def _for_points(places: Tensor) -> Tensor:
    """Indices (B, M) as gather and scatter want them for points (B, M, 3)."""
    return places[..., None].expand(-1, -1, 3)
