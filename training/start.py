"""Where training starts from: skinning weights by distance to the bones, and the surface the scans vote for.

Neither needs correspondences, registered weights or a body model: the fitted skeleton is enough.
"""

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage.measure import marching_cubes
from torch import Tensor
from tqdm import tqdm

from model.skinning import SkinningField, VoxelSkinningField, apply_blended, blend_rows
from service.bundle.skeleton import Skeleton
from training.config import Vote
from training.data.mesh import largest_component
from training.frames import Frames

LEAF_LENGTH_M = 0.08
"""Length given to a bone without a child: fingers and toes, along their parent's direction."""
HEAD_LENGTH_M = 0.18


def bone_segments(
    skeleton: Skeleton, leaves: bool = True
) -> tuple[NDArray[np.int64], Float[Tensor, "S 3"], Float[Tensor, "S 3"]]:
    """The canonical skeleton as segments: the bone each belongs to, and its two ends, metres.

    A bone reaches from its joint to each of its children; a leaf, where leaves are wanted, goes on as its parent did.
    """
    joints = skeleton.canonical_joints()
    owners, starts, ends = [], [], []
    for bone in range(skeleton.joint_count):
        children = [child for child, parent in enumerate(skeleton.parents) if parent == bone]
        tips = [joints[child] for child in children]
        if leaves and not children:
            tips = [joints[bone] + _leaf_direction(skeleton, joints, bone)]
        for tip in tips:
            owners.append(bone)
            starts.append(joints[bone])
            ends.append(tip)
    return np.array(owners), torch.tensor(np.array(starts)).float(), torch.tensor(np.array(ends)).float()


def canonical_box(skeleton: Skeleton) -> tuple[Float[Tensor, "3"], Float[Tensor, "3"]]:
    """Lowest and highest corner, metres, of the box that holds the canonical person, clothes and hair included."""
    _, starts, ends = bone_segments(skeleton)
    corners = torch.cat([starts, ends])
    reach = torch.tensor([0.12, 0.12, 0.22])  # the T-pose ends in fingertips, soles and the crown; skirts flare in z
    return corners.amin(0) - reach, corners.amax(0) + reach


def bone_centres(skeleton: Skeleton) -> Float[Tensor, "J 3"]:
    """The middle of each canonical bone, metres."""
    owners, starts, ends = bone_segments(skeleton)
    middle = (starts + ends) / 2
    return torch.stack([middle[torch.from_numpy(owners == bone)].mean(0) for bone in range(skeleton.joint_count)])


def squared_bone_distances(
    skeleton: Skeleton, points: Float[Tensor, "N 3"], bone_transforms: Float[Tensor, "J 4 4"] | None = None
) -> Float[Tensor, "N J"]:
    """Squared distance, square metres, of points to each bone: of the canonical pose, or of the one given."""
    nearest = torch.full((len(points), skeleton.joint_count), torch.inf)
    owners, starts, ends = bone_segments(skeleton)
    if bone_transforms is not None:
        own = bone_transforms[torch.from_numpy(owners)]
        starts, ends = ((own[:, :3, :3] @ tips[..., None])[..., 0] + own[:, :3, 3] for tips in (starts, ends))
    for owner, start, end in zip(owners, starts, ends, strict=True):
        along = end - start
        share = ((points - start) @ along / along.square().sum()).clamp(0, 1)
        squared = (points - start - share[:, None] * along).square().sum(-1)
        nearest[:, owner] = torch.minimum(nearest[:, owner], squared)
    return nearest


def skeleton_weights(skeleton: Skeleton, points: Float[Tensor, "N 3"], radius: float) -> Float[Tensor, "N J"]:
    """Skinning weights of canonical points from the bones' distances alone."""
    return torch.softmax(skeleton_logits(skeleton, points, radius), -1)


def skeleton_logits(skeleton: Skeleton, points: Float[Tensor, "N 3"], radius: float) -> Float[Tensor, "N J"]:
    """The same before softmax."""
    return -squared_bone_distances(skeleton, points) / (2 * radius**2)


def points_around_bones(
    skeleton: Skeleton, count: int, spread: float, generator: torch.Generator
) -> Float[Tensor, "N 3"]:
    """Points strewn around the canonical bones with a normal deviation of `spread`, metres."""
    _, starts, ends = bone_segments(skeleton)
    # The root of the length gives short bones (neck, feet) their share too.
    chosen = torch.multinomial((ends - starts).norm(dim=-1).sqrt(), count, replacement=True, generator=generator)
    share = torch.rand(count, 1, generator=generator)
    on_bone = starts[chosen] + share * (ends - starts)[chosen]
    return on_bone + spread * torch.randn(count, 3, generator=generator)


@torch.no_grad()
def voted_surface(
    field: SkinningField | VoxelSkinningField, frames: Frames, settings: Vote
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The zero level set of the weighted mean, over frames, of the scans' distances at the skinned voxels.

    A frame counts at a voxel as far as it can know about it (`_trust`).  In the plain mean a lowered arm would vote for
    flesh beside the chest of the T-pose, because that voxel, carried by the chest, lies inside the arm.

    Returns:
        vertices (V, 3), metres, and faces (T, 3), counter-clockwise seen from outside; one component.

    Raises:
        ValueError: the frames agree on no surface.
    """
    skeleton = frames.skeleton
    _, starts, ends = bone_segments(skeleton)
    corners = torch.cat([starts, ends])
    low, high = corners.amin(0) - settings.reach_m, corners.amax(0) + settings.reach_m
    axes = [torch.arange(a, b, settings.spacing_m) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    shape = [len(axis) for axis in axes]
    voxels = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
    squared = torch.cat([squared_bone_distances(skeleton, part).amin(-1) for part in voxels.split(262144)])
    places = (squared < settings.reach_m**2).nonzero()[:, 0]
    weights = torch.cat([field(part) for part in voxels[places].split(65536)])

    def posed(frame: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        blended = weights[rows] @ blend_rows(frames.bone_transforms[frame : frame + 1])[0]
        return apply_blended(blended, voxels[places[rows]]), blended

    every = -(-len(frames) // settings.max_frames)
    chosen = range(0, len(frames), every)
    # What lies outside in a few frames by the whole band is nowhere near the surface: it need not be weighed.
    lowest = torch.full((len(places),), torch.inf)
    for frame in chosen[:: max(len(chosen) // 8, 1)]:
        lowest = torch.minimum(lowest, frames.distances([frame], posed(frame, torch.arange(len(places)))[0][None])[0])
    rows = (lowest < 0.9 * lowest.max()).nonzero()[:, 0]
    total, trust = torch.zeros(len(rows)), torch.full((len(rows),), 1e-6)
    for frame in tqdm(chosen, desc="vote", unit="frame"):
        points, blended = posed(frame, rows)
        share = _trust(skeleton, settings, frames.bone_transforms[frame], points, weights[rows], blended)
        total += share * frames.distances([frame], points[None])[0]
        trust += share

    outside = float(lowest.max())
    sums, shares = np.full(shape, 1e-6 * outside, np.float32), np.full(shape, 1e-6, np.float32)
    sums.reshape(-1)[places[rows]], shares.reshape(-1)[places[rows]] = total, trust
    # Where hardly a frame knows, the neighbours decide; elsewhere their small part leaves fingers sharp.
    volume = (sums + 0.05 * gaussian_filter(sums, 1.5)) / (shares + 0.05 * gaussian_filter(shares, 1.5))
    if not (volume < 0).any():
        raise ValueError("the scans agree on no surface: do their poses belong to them?")
    vertices, faces, _, _ = marching_cubes(np.pad(volume, 1, constant_values=outside), 0.0)
    vertices = (vertices - 1) * settings.spacing_m + low.numpy()
    vertices, faces = largest_component(vertices.astype(np.float32), faces)
    return vertices, faces.astype(np.int32)


def _trust(
    skeleton: Skeleton,
    settings: Vote,
    bone_transforms: Float[Tensor, "J 4 4"],
    posed: Float[Tensor, "N 3"],
    weights: Float[Tensor, "N J"],
    blended: Float[Tensor, "N 12"],
) -> Float[Tensor, " N"]:
    """How far a frame knows about canonical voxels, in [0, 1].

    Two reasons to doubt: the posed voxel lies among other bones than those that carried it, and so shows their flesh;
    and its bones have turned against each other, so that blending them has squashed the space around it.
    """
    among = torch.softmax(
        -squared_bone_distances(skeleton, posed, bone_transforms) / (2 * settings.bone_radius_m**2), -1
    )
    agreement = (weights * among).sqrt().sum(-1)
    squashed = (3 - blended[:, :9].square().sum(-1)).clamp(min=0)  # 0 for a rotation
    return agreement**16 * torch.exp(-squashed / 0.1)


def _leaf_direction(skeleton: Skeleton, joints: NDArray[np.float64], bone: int) -> NDArray[np.float64]:
    if skeleton.joint_names[bone] == "head":
        return np.array([0.0, HEAD_LENGTH_M, 0.0])
    direction = joints[bone] - joints[skeleton.parents[bone]]
    return LEAF_LENGTH_M * direction / np.linalg.norm(direction)
