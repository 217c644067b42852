"""Laws of single stages, on a trained state."""

import copy

import numpy as np
import pytest
import torch

from model.field_pin import FieldPIN
from model.ins import pack
from model.skinning import linear_blend_skinning
from service.bundle.skeleton import SMPL_JOINT_NAMES, Skeleton, axis_angle_to_matrix
from training import losses
from training.config import Recipe
from training.data.body import open_body
from training.data.subject import Subject
from training.frames import Frames
from training.loop import make_ins
from training.stages import (
    OTHER_SIDE,
    BceStage,
    ForwardStage,
    OccupancyStage,
    State,
    Surface,
    SurfacePool,
    WeightsStage,
    mirrored,
    turned_at_random,
)
from training.start import points_around_bones, skeleton_weights


@pytest.fixture(scope="module")
def state(tiny_subject: Subject, coupling_recipe: Recipe) -> State:
    """Networks far from the identity they start as, and a scan in place of the canonical surface."""
    torch.manual_seed(3)
    ins = make_ins(coupling_recipe.network, tiny_subject.skeleton)
    with torch.no_grad():
        for pin in (ins.h_c, ins.h_d):
            for layer in pin.layers:
                for last in layer.maps.last:
                    last.weight.normal_(0, 0.02)
    scan = Frames(tiny_subject, "train").scan(0)
    return State(ins, Surface(torch.from_numpy(scan.vertices), torch.from_numpy(scan.faces)))


def test_cached_roots_give_the_occupancy_that_a_search_gives(
    state: State, tiny_subject: Subject, coupling_recipe: Recipe
) -> None:
    """Stage `bce` caches what eq. 16 would find, so without pose noise its logits are those of INS itself."""
    frames = Frames(tiny_subject, "train")
    stage = BceStage(state, frames, coupling_recipe.with_settings(["bce.start_bones=4"]))
    stage.begin()
    bones = frames.bone_transforms[1:2]
    roots, valid = stage.roots[1][None], stage.valid[1][None]
    q_c, places = pack(roots, valid)
    code = state.ins.pose_encoder(bones)
    cached = state.ins.merged_occupancy(state.ins.h_c.to_canonical(q_c, code), places, valid, soft=True)
    with torch.no_grad():
        # The points those roots came from: back through LBS and H_d.
        first = valid[0].to(torch.uint8).argmax(-1)
        q = roots[0][torch.arange(len(first)), first][None]
        q_d = linear_blend_skinning(q, state.ins.skinning_field(q), bones)
        x_d = state.ins.h_d.to_deformed(q_d, code)
        searched = state.ins.occupancy_at(x_d, bones, soft=True, tolerance=1e-4)
    agree = (cached - searched).abs() < 1e-2
    assert agree.float().mean() > 0.97  # a start may converge to another root of the same point


def test_bce_leaves_the_roots_where_they_are(state: State, tiny_subject: Subject, coupling_recipe: Recipe) -> None:
    """No gradient reaches what the cached roots depend on: H_d, the skinning field and the pose encoder."""
    trained = State(copy.deepcopy(state.ins), state.surface)
    stage = BceStage(trained, Frames(tiny_subject, "train"), coupling_recipe)
    stage.begin()
    sum(stage.loss(0, torch.Generator().manual_seed(0)).values()).backward()
    ins = trained.ins
    for part in (ins.h_d, ins.skinning_field, ins.pose_encoder):
        assert all(weight.grad is None for weight in part.parameters())
    for part in (ins.h_c, ins.occupancy):
        assert any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in part.parameters())


def test_pool_knows_inside_from_outside(state: State, tiny_recipe: Recipe) -> None:
    pool = SurfacePool(state, tiny_recipe)
    assert 0.3 < (pool.distance[:20_000] < 0).float().mean() < 0.6
    far = pool.points[20_000:]
    outside = (far[:, 1] > state.surface.base[:, 1].max()) | (far[:, 1] < state.surface.base[:, 1].min())
    assert (pool.distance[20_000:][outside] > 0).all()
    assert losses.field_loss(-pool.distance / 0.005, pool.distance, 0.005) == 0


def test_noise_turns_bones_and_moves_none() -> None:
    generator = torch.Generator().manual_seed(0)
    bones = torch.eye(4).repeat(200, 24, 1, 1)
    bones[..., :3, 3] = torch.randn(200, 24, 3, generator=generator)
    turned = turned_at_random(bones, 0.1, generator)
    rotations = turned[..., :3, :3]
    torch.testing.assert_close(turned[..., 3], bones[..., 3])
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).expand_as(rotations), atol=1e-5, rtol=0)
    angle = torch.arccos(((rotations.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1))
    assert angle.square().mean().sqrt() == pytest.approx(0.1 * 3**0.5, rel=0.05)
    assert turned_at_random(bones, 0.0, generator) is bones


def test_in_the_mirror_left_is_right() -> None:
    """Of a symmetric skeleton, the mirrored transforms are those of the mirrored pose, and mirrored twice the same."""
    skeleton = open_body().skeleton
    joints = skeleton.rest_joints.copy()
    joints[OTHER_SIDE] = (joints[OTHER_SIDE] + joints * np.array([-1, 1, 1], np.float32)) / 2
    symmetric = Skeleton.smpl(joints)
    pose = np.random.default_rng(0).normal(0, 0.5, (5, 24, 3))
    in_the_mirror = pose[:, OTHER_SIDE] * np.array([1, -1, -1])
    bones, expected = (
        torch.from_numpy(symmetric.bone_transforms(axis_angle_to_matrix(angles))) for angles in (pose, in_the_mirror)
    )
    torch.testing.assert_close(mirrored(bones), expected, rtol=0, atol=1e-5)
    assert (mirrored(bones) - bones).abs().max() > 0.1
    torch.testing.assert_close(mirrored(mirrored(bones)), bones)


def test_voxels_take_on_the_weights_of_the_skeleton(tiny_subject: Subject, tiny_recipe: Recipe) -> None:
    frames = Frames(tiny_subject, "train")
    state = State(make_ins(tiny_recipe.network, tiny_subject.skeleton))
    stage = WeightsStage(state, frames, tiny_recipe)
    assert stage.steps == 0
    stage.finish()
    points = points_around_bones(tiny_subject.skeleton, 500, 0.05, torch.Generator().manual_seed(0))
    wanted = skeleton_weights(tiny_subject.skeleton, points, tiny_recipe.weights.bone_radius_m)
    assert (state.ins.skinning_field(points) - wanted).abs().mean() < 0.02


def test_forward_moves_fields_weights_and_surface(state: State, tiny_subject: Subject, tiny_recipe: Recipe) -> None:
    frames = Frames(tiny_subject, "train")
    ours = State(make_ins(tiny_recipe.network, tiny_subject.skeleton), copy.deepcopy(state.surface))
    ours.ins.h_c.cover(ours.surface.base, 0.1)
    ours.ins.pose_encoder.fit(frames.bone_transforms)
    stage = ForwardStage(ours, frames, tiny_recipe)
    stage.begin()
    named = stage.loss(0, torch.Generator().manual_seed(0))
    assert set(named) == {"distance", "displacement", "laplacian", "ridge", "coverage"}
    sum(named.values()).backward()
    for weight in (ours.ins.h_c.coefficients, ours.ins.skinning_field.grid, ours.surface.offsets):
        assert weight.grad.abs().max() > 0


def test_coverage_misses_what_the_distance_does_not(state: State, tiny_subject: Subject, tiny_recipe: Recipe) -> None:
    """A surface that ends at the knees lies on the scan everywhere; the scan does not lie on it."""
    frames = Frames(tiny_subject, "train")
    frames.load_fields(tiny_recipe.field_spacing_m)
    scan = frames.scan(0)
    frames.bone_transforms = torch.eye(4).expand_as(frames.bone_transforms)  # nothing moves the surface
    whole = torch.from_numpy(scan.vertices)
    legs = whole[:, 1] < whole[:, 1].min() + 0.4
    short = torch.where(legs[:, None], whole[~legs][0], whole)
    costs = []
    for vertices in (whole, short):
        assert frames.distances([0], vertices[None]).abs().mean() < 4e-3  # fields of 2 cm
        for mirror in (False, True):
            seen = vertices * torch.tensor([-1.0, 1, 1]) if mirror else vertices
            ours = State(
                make_ins(tiny_recipe.network, tiny_subject.skeleton), Surface(seen, torch.from_numpy(scan.faces))
            )
            stage = ForwardStage(ours, frames, tiny_recipe)
            stage.begin()
            generator = torch.Generator().manual_seed(0)
            cost = stage._coverage(torch.tensor([0]), frames.bone_transforms[:1], torch.tensor([mirror]), generator)
            costs.append(cost.item())
    assert costs[0] == costs[1] < costs[2] / 10
    assert costs[2] == costs[3]


def test_every_tensor_of_a_step_is_where_the_state_is(
    state: State, tiny_subject: Subject, tiny_recipe: Recipe, coupling_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device without memory stands in for a GPU: whatever stayed on the CPU cannot meet what went there."""
    elsewhere = torch.device("meta")
    for recipe in (tiny_recipe, coupling_recipe):
        recipe = recipe.with_settings(["forward.coverage=0"])  # searches for neighbours on the CPU, in real numbers
        ours = State(make_ins(recipe.network, tiny_subject.skeleton), copy.deepcopy(state.surface))
        if isinstance(ours.ins.h_c, FieldPIN):
            ours.ins.h_c.cover(ours.surface.base, 0.1)
        frames = Frames(tiny_subject, "train")
        forward, occupancy = ForwardStage(ours, frames, recipe), OccupancyStage(ours, frames, recipe)
        for stage in (forward, occupancy):
            stage.begin()
        ours.to(elsewhere)
        frames.to(elsewhere)
        forward.joints = forward.joints.to(elsewhere)
        # It has no sparse matrices.
        dense = forward.laplacian.to_dense().to(elsewhere)
        monkeypatch.setattr(torch.sparse, "mm", lambda _, offsets, dense=dense: dense @ offsets)
        for stage in (forward, occupancy):
            named = stage.loss(0, torch.Generator().manual_seed(0))
            assert {value.device for value in named.values()} == {elsewhere}
            sum(named.values()).backward()


def test_the_ridge_weighs_far_joints_more(state: State, tiny_subject: Subject, tiny_recipe: Recipe) -> None:
    """Without a reach it is the plain mean square; with one, the same turn costs more at a node further away."""
    frames = Frames(tiny_subject, "train")
    ours = State(make_ins(tiny_recipe.network, tiny_subject.skeleton), copy.deepcopy(state.surface))
    pin, encoder = ours.ins.h_c, ours.ins.pose_encoder
    pin.cover(ours.surface.base, 0.1)
    encoder.fit(frames.bone_transforms)

    def ridge(node: int, locality: float) -> float:
        with torch.no_grad():
            pin.coefficients.zero_()
            pin.coefficients[:, node] = encoder.basis.unflatten(0, (-1, 9))[elbow].sum(0)
        stage = ForwardStage(ours, frames, tiny_recipe.with_settings([f"forward.locality_m={locality}"]))
        stage.begin()
        named = stage.loss(0, torch.Generator().manual_seed(0))
        return named["ridge"].item() / tiny_recipe.forward.ridge

    elbow = SMPL_JOINT_NAMES.index("left_elbow") - 1  # the root turns nothing
    joint = torch.from_numpy(tiny_subject.skeleton.canonical_joints()).float()[elbow + 1]
    order = (pin.node_positions() - joint).norm(dim=-1).argsort().tolist()
    near, far = order[0], order[-1]
    assert ridge(near, 0.0) == ridge(far, 0.0) == pytest.approx(pin.coefficients.square().mean().item())
    assert ridge(far, 1000.0) == pytest.approx(ridge(far, 0.0), rel=1e-3)
    assert ridge(far, 0.3) > 2 * ridge(near, 0.3)


def test_an_uncertain_surface_settles_at_its_level() -> None:
    """Of scans that disagree by metres beyond the Huber width, the best place has `level` of them outside of it."""
    offsets = torch.linspace(-1, 1, 2001)
    for level in (0.5, 0.4):
        costs = torch.stack([losses.distance_loss(place - offsets, 1e-4, level) for place in offsets])
        place = offsets[costs.argmin()]
        assert (offsets > place).float().mean().item() == pytest.approx(level, abs=2e-3)
