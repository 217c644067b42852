"""The start of training and the losses: what they promise, on the open body."""

import numpy as np
import torch

from model.skinning import SkinningField
from service.bundle.skeleton import Skeleton
from training import losses
from training.config import Vote
from training.data.body import open_body
from training.data.mesh import is_closed
from training.data.sampling import build_distance_field, occupancy
from training.data.subject import Subject
from training.frames import Frames
from training.start import bone_centres, points_around_bones, skeleton_weights, voted_surface


def test_skeleton_weights_are_weights_and_belong_to_the_nearest_bone() -> None:
    skeleton = open_body().skeleton
    points = points_around_bones(skeleton, 500, 0.1, torch.Generator().manual_seed(0))
    weights = skeleton_weights(skeleton, points, 0.045)
    torch.testing.assert_close(weights.sum(-1), torch.ones(500))
    assert (weights >= 0).all()
    at_centres = skeleton_weights(skeleton, bone_centres(skeleton), 0.02)
    # The pelvis, spine3 and the wrists lie beside several short bones: the middle of the others is their own.
    own = at_centres.argmax(-1) == torch.arange(24)
    assert own[[1, 2, 4, 5, 7, 8, 16, 17, 18, 19]].all()


def test_frames_take_root_motion_out(tiny_subject: Subject) -> None:
    """The same pose in another place, turned another way, is the same frame to training."""
    frames = Frames(tiny_subject, "train")
    scan = frames.scan(0)
    world = tiny_subject.scan(*frames.names[0]).vertices.astype(np.float64)
    root = frames.root_transforms[0].astype(np.float64)
    np.testing.assert_allclose(scan.vertices @ root[:3, :3].T + root[:3, 3], world, atol=1e-5)
    torch.testing.assert_close(frames.bone_transforms[:, 0], torch.eye(4).expand(len(frames), 4, 4))


def test_distances_of_points_to_their_own_scan(tiny_subject: Subject) -> None:
    frames = Frames(tiny_subject, "train")
    frames.load_fields(0.01)
    points = torch.stack([torch.from_numpy(frames.scan(f).vertices[:200]) for f in (0, 2)]).requires_grad_()
    distances = frames.distances([0, 2], points)
    assert distances.abs().mean() < 0.001, "vertices lie on the surface"
    distances.sum().backward()
    assert points.grad is not None
    slope = points.grad.norm(dim=-1)
    assert 0.7 < slope.median() < 1.1, "a distance grows by one metre a metre"
    again = Frames(tiny_subject, "train")
    again.load_fields(0.01)  # from the cache
    torch.testing.assert_close(again.distances([0, 2], points), distances)


def test_the_scans_vote_for_a_closed_body(tiny_subject: Subject) -> None:
    frames = Frames(tiny_subject, "train")
    frames.load_fields(0.02)
    field = _field_of_the_skeleton(frames.skeleton)
    vertices, faces = voted_surface(field, frames, Vote(spacing_m=0.02))
    assert is_closed(faces)
    joints = frames.skeleton.canonical_joints()
    inside = occupancy(vertices, faces, joints[[0, 3, 6, 9, 12, 1, 2, 4, 5]])
    assert inside.all(), "the trunk and the thighs hold their joints"
    assert build_distance_field(vertices, faces, 0.02).sample(np.array([[0.0, 3.0, 0.0]])) > 0


def test_joint_weights_loss_is_zero_for_equal_shares_only() -> None:
    parents = open_body().skeleton.parents
    weights = torch.zeros(24, 24)
    for child, parent in enumerate(parents):
        weights[child, child] = 0.5
        weights[child, max(parent, 0)] += 0.5
    assert losses.equal_joint_weights(weights, parents) == 0
    assert losses.equal_joint_weights(torch.eye(24), parents) > 0.4


def test_distance_loss_is_quadratic_then_linear() -> None:
    def at(d: float) -> float:
        return float(losses.distance_loss(torch.tensor([d]), huber=0.02))

    assert np.isclose(at(0.01) / at(0.005), 4)
    assert np.isclose(at(0.05) - at(0.04), at(0.04) - at(0.03))
    assert at(-0.01) == at(0.01)


def _field_of_the_skeleton(skeleton: Skeleton) -> SkinningField:
    class FromBones(SkinningField):
        def forward(self, x_c: torch.Tensor) -> torch.Tensor:
            return skeleton_weights(skeleton, x_c, 0.045)

    return FromBones()
