"""The compiled search on voxels against the model's own, and against the network that the voxels were made from."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from model import root_finding
from model.root_finding import distinct, nearest_bone_starts
from model.skinning import (
    SkinningField,
    VoxelSkinningField,
    apply_blended,
    blend_rows,
    blended_jacobian,
    linear_blend_skinning,
)
from service.bundle.skeleton import Skeleton, axis_angle_to_matrix
from training.data.body import open_body
from training.roots import _interpolate, _pose, find_roots
from training.start import bone_centres, bone_segments, points_around_bones, skeleton_logits


@pytest.fixture(scope="module")
def skeleton() -> Skeleton:
    return open_body().skeleton


def box(skeleton: Skeleton) -> tuple[Tensor, Tensor]:
    _, starts, ends = bone_segments(skeleton)
    corners = torch.cat([starts, ends])
    return corners.amin(0) - 0.15, corners.amax(0) + 0.15


@pytest.fixture(scope="module")
def field(skeleton) -> VoxelSkinningField:
    field = VoxelSkinningField(24, *box(skeleton), 0.04)
    field.set_from(lambda points: skeleton_logits(skeleton, points, 0.06))
    return field


@pytest.fixture(scope="module")
def bones(skeleton) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    turns = 0.4 * torch.randn(3, 24, 3, generator=rng)
    turns[:, 0] = 0  # the root's motion is taken out
    return torch.from_numpy(skeleton.bone_transforms(axis_angle_to_matrix(turns.numpy())))


@pytest.fixture(scope="module")
def posed(skeleton, field, bones) -> tuple[Tensor, Tensor, Tensor]:
    """Canonical points, their places in three poses, and four starts each."""
    rng = torch.Generator().manual_seed(6)
    x_c = torch.stack([points_around_bones(skeleton, 700, 0.06, rng) for _ in bones])
    x_d = linear_blend_skinning(x_c, field(x_c), bones).detach()
    return x_c, x_d, nearest_bone_starts(x_d, bones, bone_centres(skeleton), 4)


def test_the_compiled_search_finds_what_the_models_does(field, bones, posed) -> None:
    x_c, x_d, starts = posed
    exact = copy.deepcopy(field).double()
    found, converged = find_roots(field, x_d, bones, starts, tolerance=1e-6)
    expected, also = root_finding.find_roots(
        exact, x_d.double(), bones.double(), starts.double(), max_steps=10, tolerance=1e-6, method="newton"
    )
    assert found.dtype == torch.float32
    assert (converged == also).double().mean() > 0.99
    both = converged & also
    assert both.double().mean() > 0.8
    assert ((found - expected)[both].norm(dim=-1) < 1e-5).double().mean() > 0.99
    counts = [distinct(*roots).sum(-1) for roots in ((found, converged), (expected, also))]
    assert counts[0].double().mean() > 1.1  # several roots are common, and none is lost to another
    assert (counts[0] == counts[1]).double().mean() > 0.99
    near = ((found - x_c[:, :, None]).norm(dim=-1) < 1e-4) & converged
    assert near.any(-1).double().mean() > 0.97
    # A flag is a promise, also where a search was cut short beside a root that was known.
    x = found.double().flatten(1, 2)
    residual = linear_blend_skinning(x, exact(x), bones.double()).view(found.shape) - x_d[:, :, None]
    assert residual.norm(dim=-1)[converged].max() < 1e-5
    assert torch.equal(found[~converged], starts[~converged])


def test_threads_change_nothing(field, bones, posed, monkeypatch) -> None:
    _, x_d, starts = posed
    alone = find_roots(field, x_d, bones, starts)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(torch.equal(a, b) for a, b in zip(find_roots(field, x_d, bones, starts), alone, strict=True))


def test_the_compiled_derivatives_are_the_fields(field, bones) -> None:
    """At points in the box, in its outermost cells and beyond it."""
    rng = torch.Generator().manual_seed(7)
    low, high = field.low, field.low + field.spacing * field.last
    x_c = (low + (high - low) * (1.6 * torch.rand(60, 3, generator=rng) - 0.3)).double()
    exact = copy.deepcopy(field).double()
    blended = exact.with_derivatives(x_c) @ blend_rows(bones[:1].double())
    jacobian = blended_jacobian(blended, x_c).detach().numpy()
    posed = apply_blended(blended[:, 0], x_c).detach().numpy()
    logits, pose = np.empty((4, 24), np.float32), np.empty((4, 3))
    for n, x in enumerate(x_c.numpy()):
        _interpolate(field.grid.detach().numpy(), exact.low.numpy(), field.spacing, x, logits)
        _pose(logits, blend_rows(bones[:1].double())[0].contiguous().numpy(), x, pose)
        np.testing.assert_allclose(pose[0], posed[n], rtol=0, atol=1e-5)
        np.testing.assert_allclose(pose[1:].T, jacobian[n], rtol=0, atol=1e-3)


def test_roots_side_by_side_are_told_apart() -> None:
    """A fold: the second bone pulls back by 5 cm within 2 cm, so three points 2.5 cm apart are carried to one."""
    field = VoxelSkinningField(2, torch.tensor([-0.1, -0.02, -0.02]), torch.tensor([0.1, 0.02, 0.02]), 0.005)
    field.set_from(lambda x_c: torch.stack([torch.zeros(len(x_c)), 200 * x_c[:, 0]], -1))
    bones = torch.eye(4).repeat(1, 2, 1, 1)
    bones[0, 1, 0, 3] = -0.05
    starts = torch.tensor([[-0.05, 0, 0], [0.001, 0, 0], [0.05, 0, 0]])[None, None]
    roots, converged = find_roots(field, torch.tensor([[[-0.025, 0.0, 0.0]]]), bones, starts)
    assert converged.all()
    torch.testing.assert_close(roots[0, 0, :, 0], torch.tensor([-0.0246, 0, 0.0246]), rtol=0, atol=2e-4)


def test_points_without_a_root_are_flagged(field, bones) -> None:
    x_d = torch.tensor([[[torch.nan, 0, 0], [torch.inf, 0, 0], [1e30, 0, 0], [0.0, 0.1, 0.0]]]).expand(3, -1, -1)
    starts = torch.where(x_d.isfinite(), x_d, torch.nan)[:, :, None].repeat(1, 1, 2, 1)
    roots, converged = find_roots(field, x_d, bones, starts)
    assert converged.any(-1).tolist() == [[False, False, False, True]] * 3
    starts[:] = torch.tensor([0.0, 0.1, 0.0])
    assert find_roots(field, x_d, bones, starts)[1].any(-1).tolist() == [[False, False, False, True]] * 3
    roots, converged = find_roots(field, x_d[:, :0], bones, starts[:, :0])
    assert roots.shape == (3, 0, 2, 3)
    assert converged.shape == (3, 0, 2)


def test_roots_on_voxels_approach_those_of_the_network(skeleton, bones) -> None:
    """Within what the weights differ by, which falls with the square of the spacing."""
    torch.manual_seed(3)
    network = SkinningField()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.03 * torch.randn(parameter.shape)
    x_c = points_around_bones(skeleton, 500, 0.06, torch.Generator().manual_seed(4)).expand(3, -1, -1)
    x_d = linear_blend_skinning(x_c, network(x_c), bones).detach()
    starts = x_c[:, :, None] + 0.02
    expected, converged = find_roots(network, x_d, bones, starts, tolerance=1e-6, max_steps=20)
    assert converged.double().mean() > 0.95
    errors = []
    for spacing in (0.08, 0.04):
        voxels = VoxelSkinningField(24, *box(skeleton), spacing)
        voxels.set_from(network.logits, floor=-40.0)
        roots, also = find_roots(voxels, x_d, bones, starts, tolerance=1e-6)
        both = (converged & also)[..., 0]
        assert both.double().mean() > 0.95
        apart = (roots - expected)[..., 0, :].norm(dim=-1)[both]
        weights = (voxels(expected[..., 0, :]) - network(expected[..., 0, :])).abs().sum(-1)[both]
        assert apart.mean() < 2.0 * weights.mean()  # two metres: more than any two bones carry a point apart
        errors.append(apart.median())
    assert 3 < errors[0] / errors[1] < 5
