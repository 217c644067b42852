"""The same network as `model.repose`, arranged for speed; exact but for rounding and the curves of `FastPIN`.

What it costs is memory traffic, so: coordinates lie in rows of their own with the vertices last, which makes every
step one contiguous pass; a grid's corners are read through one flat index; skinning weights are never normalised, the
sum of them travels along as a thirteenth column of the bones.  Everything that depends on weights alone is a constant
expression, which ONNX Runtime folds once at load.
Reference: Kant et al., "Invertible Neural Skinning", CVPR 2023, eqs. 5-14 and 19.
"""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from model.coupling import AxialCoupling, Components, PlanarCoupling
from model.field_pin import STEEPEST, FieldPIN
from model.ins import INS
from model.pin import PIN
from model.skinning import NearSkinningField, VoxelSkinningField

CURVE_NODES = 512
"""Places at which the motion of a 2D coupling layer is computed; between them it is interpolated."""
PIECES = 16
"""Of each of which the skinning weights are read and blended alone."""
LOWEST_LOGIT = -60.0
"""Below the largest of its node, a logit stays above this, so that the sum of the weights never vanishes."""


class FastRepose(nn.Module):
    """`model.repose.Repose`, all of whose laws it keeps.

    Args:
        ins: the network.
        near: what of its voxel skinning field is needed; all of it when None.
    """

    def __init__(self, ins: INS, near: NearSkinningField | None = None) -> None:
        super().__init__()
        self.pose_encoder = ins.pose_encoder
        self.h_c = _fast(ins.h_c)
        self.h_d = _fast(ins.h_d)
        field = ins.skinning_field
        self.weights = FastWeights(field, near) if isinstance(field, VoxelSkinningField) else field
        self.skinning_at = ins.skinning_at

    def forward(
        self,
        canonical_vertices: Float[Tensor, "V 3"],
        bone_transforms: Float[Tensor, "F J 4 4"],
        root_transforms: Float[Tensor, "F 4 4"],
        skinning_weights: Float[Tensor, "V J"] | None = None,
    ) -> Float[Tensor, "F V 3"]:
        """See `model.repose.Repose.forward`.

        Args:
            canonical_vertices, bone_transforms, root_transforms: as there.
            skinning_weights: of the vertices, where they are the same in every pose (`skinning_at` "canonical") and at
                hand; reading them from the field costs more than all the rest.
        """
        code = self.pose_encoder(bone_transforms)
        count = canonical_vertices.shape[0]
        if skinning_weights is None:  # read in pieces of one size
            over = (count + PIECES - 1) // PIECES * PIECES - count
            canonical_vertices = functional.pad(canonical_vertices, (0, 0, 0, over))
        x_c = _components(canonical_vertices.T[:, None])  # each (1, V) until a frame moves it
        q_c = x_c if self.h_c is None else self.h_c(x_c, code)
        # Without an H_d nothing lies between the bones and the root.
        bones = bone_transforms if self.h_d is not None else root_transforms[:, None] @ bone_transforms
        weights = self.weights if skinning_weights is None else skinning_weights
        posed = apply_bones(weights, x_c if self.skinning_at == "canonical" else q_c, q_c, bones)
        if self.h_d is None:
            return posed.mT[:, :count]
        x_d = torch.stack(self.h_d(_components(posed.transpose(0, 1)), code), 1)  # (F, 3, V)
        return (root_transforms[:, :3, :3] @ x_d + root_transforms[:, :3, 3:]).mT[:, :count]


class FastFields(nn.Module):
    """`FieldPIN.to_deformed`: trilinear displacements of one axis after the other."""

    around: Tensor
    lines: Tensor
    slots: Tensor

    def __init__(self, pin: FieldPIN) -> None:
        super().__init__()
        self.grid = Grid(pin.low, pin.spacing, pin.shape)
        self.coefficients = pin.coefficients
        around, lines = [], []
        for axis, stride in enumerate(pin.strides):
            around.append(torch.stack([pin.slots[pin.active + stride], pin.slots[pin.active - stride]]))
            lines.append(pin._line(axis).unique(return_inverse=True)[1])
        self.register_buffer("around", torch.stack(around))  # (3, 2, A): slots of the nodes above and below
        self.register_buffer("lines", torch.stack(lines))  # (3, A)
        self.line_counts = [int(line.max()) + 1 if len(line) else 1 for line in lines]
        self.register_buffer("slots", pin.slots)

    def forward(self, x: Components, pose_code: Float[Tensor, "F K"]) -> Components:
        """Components, metres, each (1, V), to (F, V)."""
        fields = self._fields(pose_code)
        moved = [self.grid.unit(component, axis) for axis, component in enumerate(x)]
        cells = [self.grid.cell(component, axis) for axis, component in enumerate(moved)]
        for axis, field in enumerate(fields):
            values = self.grid.corners(field, cells)
            for _, share in cells:
                middle = len(values) // 2
                halves = zip(values[:middle], values[middle:], strict=True)
                values = [low + share * (high - low) for low, high in halves]
            moved[axis] = moved[axis] + values[0]
            cells[axis] = self.grid.cell(moved[axis], axis)
        first, second, third = (self.grid.metres(component, axis) for axis, component in enumerate(moved))
        return first, second, third

    def _fields(self, pose_code: Tensor) -> list[Float[Tensor, "F X"]]:
        """For each axis the displacement of every node of the grid, in cells, after the limiter."""
        frames = pose_code.shape[0]
        _, active, _ = self.coefficients.shape
        # The weights come first: in this order their product with one pose reads them once, as they lie.
        raw = (self.coefficients.flatten(0, 1) @ (pose_code / self.grid.spacing).T).T  # (F, 3 A)
        fields = []
        for axis, here in enumerate(raw.unflatten(1, (3, active)).unbind(1)):
            padded = functional.pad(here, (0, 1))
            above, below = (padded.gather(1, slots.expand(frames, -1)) for slots in self.around[axis].unbind(0))
            fall = torch.maximum(here - above, below - here)
            line = self.lines[axis].expand(frames, -1)
            steepest = fall.new_full((frames, self.line_counts[axis]), STEEPEST).scatter_reduce(1, line, fall, "amax")
            limited = functional.pad(here * (STEEPEST / steepest.gather(1, line)), (0, 1))
            fields.append(limited.gather(1, self.slots.expand(frames, -1)))
        return fields


class FastWeights(nn.Module):
    """A voxel field's bones: one read of a cell's eight corners, one small product."""

    rows: Tensor
    slots: Tensor
    needed: Tensor

    def __init__(self, field: VoxelSkinningField, near: NearSkinningField | None) -> None:
        super().__init__()
        x, y, z, _ = field.grid.shape
        self.grid = Grid(field.low, field.spacing, (x, y, z))
        nodes = torch.arange(x * y * z)
        if near is None:
            needed, slots, rows = nodes, nodes, field.grid.detach().flatten(0, 2)
        else:
            slots, rows = near.slots, near.rows
            needed = torch.zeros(len(rows), dtype=torch.long).scatter(0, slots, nodes)
            # Slot 0 is also that of all other nodes.  The first one needed begins a cell, so the second is beside it.
            needed[0] = needed[1] - 1
        self.register_buffer("rows", rows)
        self.register_buffer("slots", slots)
        self.register_buffer("needed", needed)
        self.last = x * y * z - 1

    def forward(self, x: Components, columns: Float[Tensor, "F J C"]) -> Float[Tensor, "F C V"]:
        """Numbers of each bone blended with positive numbers in the ratios of the weights.

        Args:
            x: a multiple of `PIECES` points.
        """
        cells = [self.grid.cell(self.grid.unit(component, axis), axis) for axis, component in enumerate(x)]
        shares = cells[0][1].new_ones(1, 1, 1)
        for _, share in cells:  # (F, 8, V), corners as in `Grid.offsets`
            shares = (shares[:, :, None] * torch.stack([1 - share, share], 1)[:, None]).flatten(1, 2)
        places, table = self.grid.flat(cells), self._table()
        rows = self.slots.gather(0, places.flatten()).view(places.shape)
        frames = rows.shape[0]
        blended = []
        # In pieces, so that the corners of one, 8 J numbers a vertex, are still in the cache when they are blended.
        for row, share in zip(
            rows.view(frames, PIECES, -1).unbind(1),
            shares.mT.reshape(frames, PIECES, -1, 1, 8).unbind(1),
            strict=True,
        ):
            logits = share @ functional.embedding(row, table).unflatten(-1, (8, -1))
            blended.append(columns.mT @ logits.squeeze(-2).exp().mT)
        return torch.cat(blended, -1)

    def _table(self) -> Float[Tensor, "C 8*J"]:
        """Logits of the corners of the cell that begins at each node; a constant."""
        rows = (self.rows - self.rows.amax(-1, keepdim=True)).clamp(min=LOWEST_LOGIT)
        corners = (self.needed[:, None] + self.grid.offsets).clamp(max=self.last)
        return rows[self.slots[corners]].flatten(1)


class FastPIN(nn.Module):
    """`PIN.to_deformed` with the motions of its 2D layers read from curves.

    A 2D layer depends on one coordinate of a vertex: for each frame its angle and shifts are computed at a few hundred
    places between the smallest and the largest of them, and interpolated by cubics.  1D layers depend on two; an
    image fine enough for them has as many pixels as a mesh has vertices, so they are computed as they are.
    """

    def __init__(self, pin: PIN) -> None:
        super().__init__()
        backwards = reversed(list(pin.layers))
        self.layers = nn.ModuleList(
            CurvedCoupling(layer) if isinstance(layer, PlanarCoupling) else layer for layer in backwards
        )

    def forward(self, x: Components, pose_code: Float[Tensor, "F C"]) -> Components:
        """Components, metres, each (F, V) or (1, V), to (F, V)."""
        first, second, third = (component.expand(pose_code.shape[0], -1) for component in x)
        x = first, second, third
        for layer in self.layers:
            x = cast(PlanarCoupling | AxialCoupling, layer).move_back(x, pose_code)
        return x


class CurvedCoupling(PlanarCoupling):
    """A 2D coupling with the weights of another, whose motion is read from a curve."""

    def __init__(self, layer: PlanarCoupling) -> None:
        nn.Module.__init__(self)
        self.kept, self.moved = layer.kept, layer.moved
        self.space_embedding, self.maps = layer.space_embedding, layer.maps

    def _motion(self, kept: Tensor, pose_code: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        low, high = kept.amin(1, keepdim=True), kept.amax(1, keepdim=True)
        # One node beyond either end, for the cubics of the outermost segments; a point or a plane has some width too.
        step = (high - low).clamp(min=1e-3) / (CURVE_NODES - 3)
        nodes = low + step * torch.arange(-1, CURVE_NODES - 1, dtype=kept.dtype, device=kept.device)
        angle, *shifts = super()._motion(nodes, pose_code)
        unit = (kept - low) / step
        segment = unit.floor().clamp(max=CURVE_NODES - 4)
        shares = _cubic(unit - segment)
        places = segment.long()[:, None] + torch.arange(4, device=kept.device)[:, None]  # (F, 4, V)

        def read(curve: Tensor) -> Tensor:
            return (curve.gather(1, places.flatten(1)).view(places.shape) * shares).sum(1)

        return (None if angle is None else read(angle)), read(shifts[0]), read(shifts[1])


class Grid(nn.Module):
    """Nodes at `low + spacing * (i, j, k)`; a component of points in cells is 0 at the first node of its axis."""

    offsets: Tensor

    def __init__(self, low: Float[Tensor, "3"], spacing: float, shape: Sequence[int]) -> None:
        super().__init__()
        self.low, self.spacing, self.last = low.tolist(), spacing, [count - 1 for count in shape]
        self.strides = (shape[1] * shape[2], shape[2], 1)
        self.register_buffer("offsets", torch.tensor([i * self.strides[0] + j * self.strides[1] + k
                                                      for i in (0, 1) for j in (0, 1) for k in (0, 1)]))  # fmt: skip

    def unit(self, metres: Tensor, axis: int) -> Tensor:
        return (metres - self.low[axis]) / self.spacing

    def metres(self, unit: Tensor, axis: int) -> Tensor:
        return unit * self.spacing + self.low[axis]

    def cell(self, unit: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """The cell along an axis, a whole number, and the place within it in [0, 1]; outer points at the border."""
        drawn = unit.clamp(0, self.last[axis])
        cell = drawn.floor().clamp(max=self.last[axis] - 1)
        return cell, drawn - cell

    def flat(self, cells: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The node where each cell begins.  Whole numbers below 2**24 are exact in float32, and faster there."""
        (i, _), (j, _), (k, _) = cells
        return (i * self.strides[0] + j * self.strides[1] + k).long()

    def corners(self, field: Float[Tensor, "F X"], cells: list[tuple[Tensor, Tensor]]) -> list[Float[Tensor, "F V"]]:
        """Values of a field at the eight corners, each an array of its own, which stay in the cache."""
        places = self.flat(cells).expand(field.shape[0], -1)
        return [field.gather(1, places + offset) for offset in self.offsets.tolist()]


def apply_bones(
    weights: nn.Module | Float[Tensor, "V J"], x: Components, q_c: Components, bones: Float[Tensor, "F J 4 4"]
) -> Float[Tensor, "F 3 V"]:
    """Linear blend skinning of q_c with weights up to a factor, the sum of which travels along.

    Args:
        weights: of each vertex, or the field that has them at x.
    """
    columns = functional.pad(bones[..., :3, :].mT.flatten(-2), (0, 1), value=1.0)  # (F, J, 13)
    if isinstance(weights, FastWeights):
        blended = weights(x, columns)
    else:
        blended = columns.mT @ (weights if isinstance(weights, Tensor) else weights(torch.stack(x, -1))).mT
    first, second, third = (component[:, None] for component in q_c)
    moved = first * blended[:, 0:3] + second * blended[:, 3:6] + third * blended[:, 6:9] + blended[:, 9:12]
    return moved / blended[:, 12:]


def _cubic(t: Float[Tensor, "F V"]) -> Float[Tensor, "F 4 V"]:
    """Lagrange's shares of the values at -1, 0, 1 and 2 for places in [0, 1]."""
    below, above, beyond = t + 1, t - 1, t - 2
    inner, outer = above * beyond, below * t
    return torch.stack([t * inner / -6, below * inner / 2, outer * beyond / -2, outer * above / 6], 1)


def _fast(pin: nn.Module | None) -> nn.Module | None:
    if type(pin) is FieldPIN:
        return FastFields(pin)
    if isinstance(pin, PIN):
        return FastPIN(pin)
    return None if pin is None else _AsItIs(pin)


class _AsItIs(nn.Module):
    """A network without a faster form."""

    def __init__(self, pin: nn.Module) -> None:
        super().__init__()
        self.pin = pin

    def forward(self, x: Components, pose_code: Tensor) -> Components:
        points = torch.stack(x, -1).expand(pose_code.shape[0], -1, -1)
        return _components(self.pin.to_deformed(points, pose_code).movedim(-1, 0))  # pyright: ignore[reportCallIssue]


def _components(x: Tensor) -> Components:
    first, second, third = x.unbind(0)
    return first, second, third
