"""The stages of training.  Each can be read, run and measured on its own.

`weights` -> `vote` -> `forward` -> `occupancy` -> `bce` is the `staged` recipe; `paper` alone is the paper's.
A stage is a pure function of the state at its beginning, of the scans and of its step number, so training that was
killed goes on exactly: `begin` depends only on what its own steps leave alone.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial import KDTree
from torch import Tensor, nn
from tqdm import tqdm

from model.field_pin import FieldPIN, PoseFeatures
from model.ins import INS, pack
from model.occupancy import OccupancyNetwork
from model.pin import PIN
from model.root_finding import distinct, nearest_bone_starts
from model.skinning import VoxelSkinningField
from service.bundle.skeleton import SMPL_JOINT_NAMES, axis_angle_to_matrix
from training import losses
from training.config import Recipe
from training.data.mesh import distances, laplacian
from training.data.sampling import occupancy, surface_points
from training.data.subject import Scan
from training.frames import Frames
from training.roots import find_roots
from training.start import (
    bone_centres,
    bone_segments,
    points_around_bones,
    skeleton_logits,
    skeleton_weights,
    voted_surface,
)

OTHER_SIDE = [
    SMPL_JOINT_NAMES.index(name.replace("left", "x").replace("right", "left").replace("x", "right"))
    for name in SMPL_JOINT_NAMES
]
"""The joint across the body of each SMPL joint; itself, along the spine."""
COVERED_FRAMES = 2
"""Frames of a step that are also seen from the scan's side."""
SCAN_POINTS = 5000
"""Of each scan, from which the steps draw."""
LOCAL_NODES = 2048
"""Nodes whose coefficients the locality term looks at in one step."""
Groups = list[dict[str, Any]]
"""Parameter groups as torch optimisers take them."""


class Surface(nn.Module):
    """The canonical surface while it has no occupancy network yet: voted vertices and learned offsets, metres."""

    def __init__(self, base: Tensor, faces: Tensor) -> None:
        super().__init__()
        self.register_buffer("base", base)
        self.register_buffer("faces", faces)
        self.offsets = nn.Parameter(torch.zeros_like(base))

    base: Tensor
    faces: Tensor

    def vertices(self) -> Float[Tensor, "V 3"]:
        return self.base + self.offsets


@dataclass
class State:
    """All that training changes."""

    ins: INS
    surface: Surface | None = None

    def modules(self) -> dict[str, nn.Module]:
        return {"ins": self.ins} if self.surface is None else {"ins": self.ins, "surface": self.surface}

    @property
    def device(self) -> torch.device:
        return next(self.ins.parameters()).device

    def to(self, device: torch.device) -> None:
        for module in self.modules().values():
            module.to(device)


class Stage(Protocol):
    """One stage; made anew when training resumes."""

    steps: int
    on_gpu: bool
    """Whether its steps run on a GPU where one is."""

    def begin(self) -> None:
        """Prepare what every step needs."""

    def parameter_groups(self) -> Groups:
        """What this stage trains, with learning rates."""
        ...

    def loss(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Named losses of one step; their sum is minimised.  All randomness comes from the generator."""
        ...

    def finish(self) -> None:
        """Leave behind what the next stage builds on."""


def make_stage(name: str, state: State, frames: Frames, recipe: Recipe) -> Stage:
    """The stage of this name, over this state."""
    kinds = {
        "weights": WeightsStage,
        "vote": VoteStage,
        "forward": ForwardStage,
        "occupancy": OccupancyStage,
        "bce": BceStage,
        "paper": PaperStage,
    }
    return kinds[name](state, frames, recipe)


class _Base:
    on_gpu = False

    def __init__(self, state: State, frames: Frames, recipe: Recipe) -> None:
        self.state, self.frames, self.recipe = state, frames, recipe

    def begin(self) -> None:
        pass

    def parameter_groups(self) -> Groups:
        return []

    def loss(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        raise NotImplementedError

    def finish(self) -> None:
        pass


class WeightsStage(_Base):
    """The skinning field takes on, or learns, the weights that distances to the bones suggest."""

    def __init__(self, state: State, frames: Frames, recipe: Recipe) -> None:
        super().__init__(state, frames, recipe)
        self.settings = recipe.weights
        self.steps = 0 if isinstance(state.ins.skinning_field, VoxelSkinningField) else self.settings.steps

    def parameter_groups(self) -> Groups:
        return [{"params": list(self.state.ins.skinning_field.parameters()), "lr": self.settings.learning_rate}]

    def loss(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        skeleton, half = self.frames.skeleton, self.settings.points // 2
        points = torch.cat([points_around_bones(skeleton, half, spread, generator) for spread in (0.05, 0.15)])
        wanted = skeleton_weights(skeleton, points, self.settings.bone_radius_m)
        found = torch.log_softmax(self.state.ins.skinning_field.logits(points), -1)
        return {"weights": -(wanted * found).sum(-1).mean()}

    def finish(self) -> None:
        field = self.state.ins.skinning_field
        if isinstance(field, VoxelSkinningField):
            radius = self.settings.bone_radius_m
            field.set_from(lambda points: skeleton_logits(self.frames.skeleton, points, radius))


class VoteStage(_Base):
    """The scans vote for the canonical surface, around which fields are laid; nothing is trained."""

    steps = 0

    def finish(self) -> None:
        self.frames.load_fields(self.recipe.field_spacing_m)
        vertices, faces = voted_surface(self.state.ins.skinning_field, self.frames, self.recipe.vote)
        self.state.surface = Surface(torch.from_numpy(vertices), torch.from_numpy(faces))
        ins, network = self.state.ins, self.recipe.network
        if isinstance(ins.h_c, FieldPIN):
            ins.h_c.cover(self.state.surface.base, network.field_reach_m)
        if isinstance(ins.pose_encoder, PoseFeatures):
            poses = self.frames.bone_transforms
            ins.pose_encoder.fit(torch.cat([poses, mirrored(poses)]) if self.recipe.forward.mirrored_share else poses)


class ForwardStage(_Base):
    """Surface points are reposed (eq. 19) and should lie on the scan."""

    on_gpu = True

    def __init__(self, state: State, frames: Frames, recipe: Recipe) -> None:
        super().__init__(state, frames, recipe)
        self.settings = recipe.forward
        self.steps = self.settings.steps

    def begin(self) -> None:
        self.frames.load_fields(self.recipe.field_spacing_m)
        self.joints = torch.from_numpy(self.frames.skeleton.canonical_joints()).to(self._surface.base)[1:]
        self.scan_points, self.scan_normals = [], []
        for frame in range(len(self.frames) if self.settings.coverage else 0):
            rng = np.random.default_rng([self.recipe.seed, 8, frame])
            points, normals = _oriented_points(self.frames.scan(frame), SCAN_POINTS, rng)
            self.scan_points.append(points)
            self.scan_normals.append(normals)
        matrix = laplacian(self._surface.faces.cpu().numpy(), len(self._surface.base))
        indices = torch.from_numpy(np.stack(matrix.coords).astype(np.int64))
        self.laplacian = torch.sparse_coo_tensor(
            indices, torch.from_numpy(matrix.data), matrix.shape, check_invariants=True
        ).coalesce()
        self.laplacian = self.laplacian.to(self.state.device)

    def parameter_groups(self) -> Groups:
        ins, settings = self.state.ins, self.settings
        voxel = isinstance(ins.skinning_field, VoxelSkinningField)
        rates = settings.voxel_learning_rate if voxel else settings.skinning_learning_rate
        groups = [
            {"params": _coupling_parameters(ins), "lr": settings.pin_learning_rate},
            {"params": _field_parameters(ins), "lr": settings.field_learning_rate},
            {"params": list(ins.skinning_field.parameters()), "lr": rates},
            {"params": [self._surface.offsets], "lr": settings.surface_learning_rate},
        ]
        return [group for group in groups if group["params"]]

    def loss(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        settings, surface = self.settings, self._surface
        frames = _draw(len(self.frames), settings.frames, generator)
        chosen = _draw(len(surface.base), settings.points, generator).to(surface.base.device)
        x_c = surface.vertices()[chosen]
        bones = self.frames.bone_transforms[frames]
        flipped = (torch.rand(len(frames), generator=generator) < settings.mirrored_share).to(bones.device)
        bones = torch.where(flipped[:, None, None, None], mirrored(bones), bones)
        noisy = turned_at_random(bones, settings.pose_noise_rad, generator)
        q_c, q_d, x_d = self.state.ins.trace(x_c, bones, self.state.ins.pose_encoder(noisy))
        displacement = (q_c - x_c).square().sum(-1).mean() + (x_d - q_d).square().sum(-1).mean()
        seen = x_d * torch.where(flipped[:, None, None], x_d.new_tensor([-1.0, 1.0, 1.0]), 1.0)
        distances = self.frames.distances(frames.tolist(), seen)
        roughness = torch.sparse.mm(self.laplacian, surface.offsets)
        named = {
            "distance": losses.distance_loss(distances, settings.huber_m, settings.level),
            "displacement": settings.displacement_penalty * displacement,
            "laplacian": settings.laplacian_penalty * roughness.square().sum(-1).mean(),
        }
        if isinstance(self.state.ins.h_c, FieldPIN):
            named["ridge"] = settings.ridge * self._ridge(self.state.ins.h_c, generator)
        if settings.coverage:
            few = slice(0, COVERED_FRAMES)
            named["coverage"] = settings.coverage * self._coverage(frames[few], bones[few], flipped[few], generator)
        return named

    def _coverage(self, frames: Tensor, bones: Tensor, flipped: Tensor, generator: torch.Generator) -> Tensor:
        """How far the surface is from points of the scan, along the scan's normals.

        Without it a hem that is too short may rest on the legs: every point of it lies on the scan.
        """
        settings, vertices = self.settings, self._surface.vertices()
        side = torch.where(flipped[:, None, None], vertices.new_tensor([-1.0, 1.0, 1.0]), 1.0)
        among = _draw(len(vertices), settings.coverage_vertices, generator).to(vertices.device)
        with torch.no_grad():
            posed = (side * self.state.ins.to_deformed(vertices[among], bones)).cpu().numpy()
        points, normals, nearest = [], [], []
        for frame, there in zip(frames.tolist(), posed, strict=True):
            row = _draw(len(self.scan_points[frame]), settings.coverage_points, generator)
            points.append(self.scan_points[frame][row])
            normals.append(self.scan_normals[frame][row])
            nearest.append(torch.from_numpy(KDTree(there).query(points[-1].numpy())[1]))
        chosen = among[torch.stack(nearest).to(among.device)]
        x_d = side * self.state.ins.to_deformed(vertices[chosen], bones)
        along = ((x_d - torch.stack(points).to(x_d)) * torch.stack(normals).to(x_d)).sum(-1)
        return losses.distance_loss(along, settings.huber_m, settings.level)

    def _ridge(self, pin: FieldPIN, generator: torch.Generator) -> Tensor:
        """Mean squared coefficient, those of far joints' turns weighing more."""
        encoder = self.state.ins.pose_encoder
        if not self.settings.locality_m or not isinstance(encoder, PoseFeatures):
            return pin.coefficients.square().mean()
        # A share of the nodes in every step: in terms of the turns there are three times as many coefficients.
        nodes = _draw(pin.coefficients.shape[1], LOCAL_NODES, generator).to(pin.coefficients.device)
        by_turn = (pin.coefficients[:, nodes] @ encoder.basis.T).unflatten(-1, (-1, 9)).square().sum(-1)
        weights = 1 + torch.cdist(pin.node_positions()[nodes], self.joints).square() / self.settings.locality_m**2
        return (by_turn * weights).sum(-1).mean() / encoder.basis.shape[1]

    @property
    def _surface(self) -> Surface:
        if self.state.surface is None:
            raise ValueError("stage 'forward' needs the surface of stage 'vote'")
        return self.state.surface


class OccupancyStage(_Base):
    """The occupancy network learns the signed distance to the canonical surface, as logits."""

    on_gpu = True

    def __init__(self, state: State, frames: Frames, recipe: Recipe) -> None:
        super().__init__(state, frames, recipe)
        self.settings = recipe.occupancy
        self.steps = self.settings.steps

    def begin(self) -> None:
        self.pool = SurfacePool(self.state, self.recipe)

    def parameter_groups(self) -> Groups:
        return [{"params": list(self.state.ins.occupancy.parameters()), "lr": self.settings.learning_rate}]

    def loss(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"field": self.pool.loss(self.state.ins.occupancy, self.settings.points, generator)}


class BceStage(_Base):
    """The paper's loss (eqs. 16-18) with roots found once, for the occupancy network and H_c."""

    def __init__(self, state: State, frames: Frames, recipe: Recipe) -> None:
        super().__init__(state, frames, recipe)
        self.settings = recipe.bce
        self.steps = self.settings.steps

    def begin(self) -> None:
        self.pool = SurfacePool(self.state, self.recipe)
        self.roots, self.valid, self.inside = [], [], []
        lost, all_inside = 0, 0
        centres = bone_centres(self.frames.skeleton)
        for frame in tqdm(range(len(self.frames)), desc="roots", unit="frame"):
            rng = np.random.default_rng([self.recipe.seed, 5, frame])
            counts = self.settings.surface_points_per_frame, self.settings.box_points_per_frame
            points, inside = _labelled_points(self.frames, frame, rng, *counts)
            roots, valid = self._find(frame, points, centres)
            # A point without a root reaches no network and has nothing to teach.
            kept = valid.any(-1)
            lost, all_inside = lost + int((inside & ~kept).sum()), all_inside + int(inside.sum())
            self.roots.append(roots[kept])
            self.valid.append(valid[kept])
            self.inside.append(inside[kept])
        print(f"points inside a scan without a canonical correspondence: {100 * lost / max(all_inside, 1):.2f} %")

    def parameter_groups(self) -> Groups:
        ins, settings = self.state.ins, self.settings
        # H_d and the pose code it reads rest, or the roots would move: only H_c and the occupancy network learn.
        pin = list(ins.h_c.parameters()) if ins.h_c is not None else []
        return [
            {"params": pin, "lr": settings.pin_learning_rate},
            {"params": list(ins.occupancy.parameters()), "lr": settings.learning_rate},
        ]

    def loss(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        settings, ins = self.settings, self.state.ins
        frames = _draw(len(self.frames), settings.frames, generator)
        rows = [torch.randint(len(self.roots[f]), (settings.points,), generator=generator) for f in frames.tolist()]
        roots = torch.stack([self.roots[f][row] for f, row in zip(frames.tolist(), rows, strict=True)])
        valid = torch.stack([self.valid[f][row] for f, row in zip(frames.tolist(), rows, strict=True)])
        inside = torch.stack([self.inside[f][row] for f, row in zip(frames.tolist(), rows, strict=True)])
        bones = turned_at_random(self.frames.bone_transforms[frames], settings.pose_noise_rad, generator)
        with torch.no_grad():
            pose_code = ins.pose_encoder(bones)
        q_c, places = pack(roots, valid)
        x_c = q_c if ins.h_c is None else ins.h_c.to_canonical(q_c, pose_code)
        logits = ins.merged_occupancy(x_c, places, valid, soft=True)
        anchor = self.pool.loss(ins.occupancy, settings.points, generator)
        return {"bce": losses.occupancy_bce(logits, inside), "anchor": settings.anchor_weight * anchor}

    @torch.no_grad()
    def _find(self, frame: int, points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        ins = self.state.ins
        bones = self.frames.bone_transforms[frame : frame + 1]
        q_d = points[None]
        if ins.h_d is not None:
            q_d = ins.h_d.to_canonical(q_d, ins.pose_encoder(bones))
        starts = nearest_bone_starts(q_d, bones, centres, self.settings.start_bones)
        roots, converged = find_roots(ins.skinning_field, q_d, bones, starts=starts, tolerance=1e-4)
        return roots[0], distinct(roots, converged)[0]


class PaperStage(_Base):
    """The paper's training: every step searches for roots and differentiates through them (eqs. 16-18, 22-27)."""

    on_gpu = True

    def __init__(self, state: State, frames: Frames, recipe: Recipe) -> None:
        super().__init__(state, frames, recipe)
        self.settings = recipe.paper
        self.steps_per_epoch = max(len(frames) // self.settings.frames, 1)
        self.steps = self.settings.epochs * self.steps_per_epoch

    def begin(self) -> None:
        counts = self.settings.surface_points_per_frame, self.settings.box_points_per_frame
        self.samples = [
            _labelled_points(self.frames, frame, np.random.default_rng([self.recipe.seed, 6, frame]), *counts)
            for frame in tqdm(range(len(self.frames)), desc="sampling", unit="frame")
        ]

    def parameter_groups(self) -> Groups:
        ins = self.state.ins
        # Table 4, row 14: the slow rate is for the INNs, the fast one for the rest, bone encoder included.
        pins = [p for pin in (ins.h_c, ins.h_d) if pin is not None for p in pin.parameters()]
        rest = [*ins.pose_encoder.parameters(), *ins.skinning_field.parameters(), *ins.occupancy.parameters()]
        return [
            {"params": pins, "lr": self.settings.pin_learning_rate},
            {"params": rest, "lr": self.settings.learning_rate},
        ]

    def loss(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        # Every epoch goes through the frames once, in an order of its own.
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.recipe.seed, 7, epoch]).permutation(len(self.frames)).tolist()
        frames = order[batch * self.settings.frames : (batch + 1) * self.settings.frames]
        points, inside = [], []
        for frame in frames:
            all_points, all_inside = self.samples[frame]
            row = _draw(len(all_points), self.settings.points, generator)
            points.append(all_points[row])
            inside.append(all_inside[row])
        bones = self.frames.bone_transforms[frames]
        logits = self.state.ins.occupancy_at(torch.stack(points).to(bones.device), bones, soft=True)
        named = {"bce": losses.occupancy_bce(logits, torch.stack(inside).to(bones.device))}
        if step < self.steps_per_epoch:
            named.update(self._auxiliary(generator))
        return named

    def _auxiliary(self, generator: torch.Generator) -> dict[str, Tensor]:
        """First epoch: bones are inside, and joints are shared equally by their two bones."""
        skeleton, ins = self.frames.skeleton, self.state.ins
        _, starts, ends = bone_segments(skeleton, leaves=False)
        segment = torch.randint(len(starts), (self.settings.bone_points,), generator=generator)
        share = torch.rand(self.settings.bone_points, 1, generator=generator)
        on_bones = (starts[segment] + share * (ends - starts)[segment]).to(self.state.device)
        joints = torch.from_numpy(skeleton.canonical_joints()).to(on_bones)
        return {
            "bone occupancy": losses.occupancy_bce(
                ins.occupancy(on_bones), torch.ones(len(on_bones), dtype=torch.bool, device=on_bones.device)
            ),
            "joint weights": losses.equal_joint_weights(ins.skinning_field(joints), skeleton.parents),
        }


class SurfacePool:
    """Points around the canonical surface with their signed distances, drawn once."""

    def __init__(self, state: State, recipe: Recipe) -> None:
        if state.surface is None:
            raise ValueError("stages 'occupancy' and 'bce' need the surface of stages 'vote' and 'forward'")
        self.settings = recipe.occupancy
        near, far = self.settings.near_points, self.settings.far_points
        rng = np.random.default_rng([recipe.seed, 4])
        vertices = state.surface.vertices().detach().cpu().double().numpy()
        faces = state.surface.faces.cpu().numpy().astype(np.int64)
        low, high = vertices.min(0) - 0.1, vertices.max(0) + 0.1
        spread = rng.choice([0.003, 0.012], (near, 1))
        points = np.concatenate(
            [
                surface_points(vertices, faces, near, rng) + spread * rng.standard_normal((near, 3)),
                rng.uniform(low, high, (far, 3)),
            ]
        )
        sign = np.where(occupancy(vertices, faces, points), -1, 1)
        distance = sign * np.minimum(distances(vertices, faces, points), self.settings.band_m)
        self.points = torch.from_numpy(points.astype(np.float32))
        self.distance = torch.from_numpy(distance.astype(np.float32))

    def loss(self, network: OccupancyNetwork, count: int, generator: torch.Generator) -> Tensor:
        row = _draw(len(self.points), count, generator)
        device = next(network.parameters()).device
        points, distance = self.points[row].to(device), self.distance[row].to(device)
        return losses.field_loss(network(points), distance, self.settings.metres_per_logit)


def turned_at_random(
    bone_transforms: Float[Tensor, "B J 4 4"], deviation: float, generator: torch.Generator
) -> Float[Tensor, "B J 4 4"]:
    """Bone transforms with every rotation turned by a random small rotation vector of this deviation, radians."""
    if deviation == 0:
        return bone_transforms
    vectors = deviation * torch.randn(*bone_transforms.shape[:2], 3, generator=generator)
    turns = torch.from_numpy(axis_angle_to_matrix(vectors.numpy())).to(bone_transforms)
    turned = bone_transforms.clone()
    turned[..., :3, :3] = bone_transforms[..., :3, :3] @ turns
    return turned


def mirrored(bone_transforms: Float[Tensor, "B 24 4 4"]) -> Float[Tensor, "B 24 4 4"]:
    """The same pose in the mirror x -> -x, with left and right exchanged."""
    flip = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0])).to(bone_transforms)
    return flip @ bone_transforms[:, OTHER_SIDE] @ flip


def _oriented_points(
    scan: Scan, count: int, rng: np.random.Generator
) -> tuple[Float[Tensor, "N 3"], Float[Tensor, "N 3"]]:
    """Points spread evenly over a scan, metres, and its outward normals there."""
    corners = scan.vertices[scan.faces].astype(np.float64)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    areas = np.linalg.norm(normals, axis=1)
    chosen = rng.choice(len(areas), count, p=areas / areas.sum())
    shares = rng.dirichlet(np.ones(3), count)
    points = np.einsum("nk,nkc->nc", shares, corners[chosen])
    return torch.from_numpy(points).float(), torch.from_numpy(normals[chosen] / areas[chosen, None]).float()


def _labelled_points(
    frames: Frames, frame: int, rng: np.random.Generator, surface_count: int, box_count: int
) -> tuple[Float[Tensor, "N 3"], Tensor]:
    """Points in the root frame and whether they are inside the scan."""
    samples = frames.samples(frame, rng, surface_count, box_count)
    points = np.concatenate([samples.surface_points, samples.box_points])
    inside = np.concatenate([samples.surface_occupancy, samples.box_occupancy])
    return torch.from_numpy(points), torch.from_numpy(inside)


def _coupling_parameters(ins: INS) -> list[nn.Parameter]:
    """Of the paper's PINs and of the pose encoder that they train."""
    pins = [pin for pin in (ins.h_c, ins.h_d) if isinstance(pin, PIN)]
    return [p for part in (ins.pose_encoder, *pins) for p in part.parameters()]


def _field_parameters(ins: INS) -> list[nn.Parameter]:
    return [ins.h_c.coefficients] if isinstance(ins.h_c, FieldPIN) else []


def _draw(population: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different numbers below `population`; all of them where there are no more."""
    return torch.randperm(population, generator=generator)[:count]
