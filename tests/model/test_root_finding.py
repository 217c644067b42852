"""Laws of the correspondence search: honest flags, per-point convergence, implicit gradients."""

import pytest
import torch
from torch import Tensor, nn

from model.root_finding import (
    Method,
    attach_gradient,
    bone_starts,
    distinct,
    find_roots,
    inverse_3x3,
    nearest_bone_starts,
)
from model.skinning import SkinningField, VoxelSkinningField, linear_blend_skinning

METHODS: tuple[Method, ...] = ("broyden", "newton")


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(17)


@pytest.fixture(scope="module", params=["mlp", "voxel"])
def field(randomise, request) -> SkinningField | VoxelSkinningField:
    network = randomise(SkinningField().double(), torch.Generator().manual_seed(18), scale=0.02)
    if request.param == "mlp":
        return network
    voxels = VoxelSkinningField(24, torch.full((3,), -1.5), torch.full((3,), 1.5), 0.15).double()
    voxels.set_from(network.logits)
    return voxels


@pytest.fixture
def posed(field, random_bones, rng) -> tuple[Tensor, Tensor, Tensor]:
    """Canonical points, their places in two poses, and the poses."""
    bones = random_bones(rng, 2)
    x_c = 0.5 * torch.randn(2, 60, 3, generator=rng, dtype=torch.float64)
    return x_c, linear_blend_skinning(x_c, field(x_c), bones).detach(), bones


def residuals(field, roots: Tensor, x_d: Tensor, bones: Tensor) -> Tensor:
    x = roots.flatten(1, 2)
    posed = linear_blend_skinning(x, field(x), bones).view(roots.shape)
    return (posed - x_d[:, :, None]).norm(dim=-1)


class Constant(nn.Module):
    """A field with the same weights everywhere."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x_c: Tensor) -> Tensor:
        return self.weights.expand(*x_c.shape[:-1], -1)

    def with_derivatives(self, x_c: Tensor) -> Tensor:
        weights = self(x_c)[..., None, :]
        return torch.cat([weights, torch.zeros_like(weights).repeat_interleave(3, -2)], -2)


class Recorder(nn.Module):
    """Counts how many points are evaluated at each step."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field, self.counts = field, []

    def forward(self, x_c: Tensor) -> Tensor:
        self.counts.append(len(x_c))
        return self.field(x_c)

    def with_derivatives(self, x_c: Tensor) -> Tensor:
        return self.field.with_derivatives(x_c)


@pytest.mark.parametrize("max_steps", [0, 3, 20])
@pytest.mark.parametrize("tolerance", [1e-5, 1e-10])
@pytest.mark.parametrize("method", METHODS)
def test_converged_means_a_residual_below_the_tolerance(
    field, posed, max_steps: int, tolerance: float, method: Method
) -> None:
    _, x_d, bones = posed
    roots, converged = find_roots(field, x_d, bones, max_steps=max_steps, tolerance=tolerance, method=method)
    assert roots.shape == (2, 60, 24, 3)
    assert roots.isfinite().all()
    distance = residuals(field, roots, x_d, bones)
    assert (distance[converged] < 1.0001 * tolerance).all()
    if max_steps == 20:
        assert converged.any(-1).all()
    else:
        assert not converged.all()
    if max_steps == 0:
        assert torch.equal(converged, distance < tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_the_point_that_was_posed_is_among_the_roots(field, posed, method: Method) -> None:
    x_c, x_d, bones = posed
    roots, converged = find_roots(field, x_d, bones, max_steps=50, tolerance=1e-10, method=method)
    found = ((roots - x_c[:, :, None]).norm(dim=-1) < 1e-6) & converged
    assert found.any(-1).float().mean() > 0.95


def test_newton_and_broyden_find_the_same_roots(field, posed) -> None:
    x_c, x_d, bones = posed
    starts = x_c[:, :, None] + 0.1 * torch.tensor([[0, 0, 0], [1, 0, 0], [0, -1, 0], [0.5, 0, 1]]).double()
    (broyden, by_broyden), (newton, by_newton) = (
        find_roots(field, x_d, bones, starts, max_steps=50, tolerance=1e-9, method=method) for method in METHODS
    )
    assert (by_broyden == by_newton).double().mean() > 0.99
    both = by_broyden & by_newton
    assert both.double().mean() > 0.9
    same = (broyden - newton)[both].norm(dim=-1) < 1e-5
    assert same.double().mean() > 0.97  # a start between two roots may end in either


@pytest.mark.parametrize("method", METHODS)
def test_unreachable_points_are_flagged(method: Method) -> None:
    """Half a turn and none, in equal parts, fold all space onto the z axis: nothing reaches a point beside it."""
    bones = torch.eye(4).repeat(1, 2, 1, 1)
    bones[0, 1, 0, 0] = bones[0, 1, 1, 1] = -1
    x_d = torch.tensor([[[0.2, 0.1, 0.3], [0.0, 0.0, 0.3], [float("nan"), 0.0, 0.0], [50.0, 0.0, 0.0]]])
    roots, converged = find_roots(Constant(torch.tensor([0.5, 0.5])), x_d, bones, method=method)
    assert converged.tolist() == [[[False] * 2, [True] * 2, [False] * 2, [False] * 2]]
    torch.testing.assert_close(roots[0, 1, :, 2], torch.full((2,), 0.3))


def test_converged_starts_are_not_evaluated_again(field, posed) -> None:
    x_c, x_d, bones = posed
    starts = x_c[:, :, None].clone()
    # Only ten have anything to search for, and some of these less than others.
    starts[0, :10, 0] += torch.logspace(-7, -1, 10, dtype=torch.float64)[:, None]
    recorder = Recorder(field)
    _, converged = find_roots(recorder, x_d, bones, starts, tolerance=1e-8, max_steps=50)
    assert converged.all()
    assert recorder.counts[0] == 10
    assert recorder.counts == sorted(recorder.counts, reverse=True)
    assert recorder.counts[-1] < 10


class Hinge(nn.Module):
    """Two bones whose weights swap within centimetres of the plane x = 0."""

    def forward(self, x_c: Tensor) -> Tensor:
        share = torch.sigmoid(40 * x_c[..., :1])
        return torch.cat([share, 1 - share], -1)

    def with_derivatives(self, x_c: Tensor) -> Tensor:
        weights = self(x_c)
        slope = 40 * weights[..., :1] * weights[..., 1:]
        derivatives = torch.zeros(*x_c.shape[:-1], 4, 2, dtype=x_c.dtype)
        derivatives[..., 0, :], derivatives[..., 1, :] = weights, torch.cat([slope, -slope], -1)
        return derivatives


@pytest.mark.parametrize(("method", "max_steps"), [("broyden", 10), ("newton", 5)])
def test_the_jacobian_is_corrected_on_the_way(rng, method: Method, max_steps: int) -> None:
    """Where the weights change fast, a search with the Jacobian of the start is done in 83 % of the cases, not 98."""
    bones = torch.eye(4, dtype=torch.float64).repeat(1, 2, 1, 1)
    turn = torch.tensor([[0, -0.4, 0], [0.4, 0, 0], [0, 0, 0]], dtype=torch.float64)
    bones[0, 0, :3, :3] = torch.matrix_exp(turn)
    bones[0, :, 0, 3] = torch.tensor([0.02, -0.02])
    x_c = 0.3 * torch.randn(1, 200, 3, generator=rng, dtype=torch.float64)
    x_d = linear_blend_skinning(x_c, Hinge()(x_c), bones)
    _, converged = find_roots(Hinge(), x_d, bones, max_steps=max_steps, tolerance=1e-10, method=method)
    assert converged.double().mean() > 0.95


def test_a_point_does_not_depend_on_its_company(field, posed) -> None:
    _, x_d, bones = posed
    together, _ = find_roots(field, x_d, bones, start_bones=[0, 4])
    alone, _ = find_roots(field, x_d[:, 7:8], bones, start_bones=[0, 4])
    torch.testing.assert_close(together[:, 7:8], alone, rtol=0, atol=1e-9)


def test_starts_are_carried_back_rigidly(random_bones, rng) -> None:
    bones = random_bones(rng, 2, angle=1.0)
    x_d = torch.randn(2, 9, 3, generator=rng, dtype=torch.float64)
    homogeneous = torch.cat([x_d, torch.ones_like(x_d[..., :1])], -1)
    every = torch.einsum("bjac,bnc->bnja", bones.inverse(), homogeneous)[..., :3]
    torch.testing.assert_close(bone_starts(x_d, bones, [3, 0, 20]), every[:, :, [3, 0, 20]], rtol=0, atol=1e-12)
    centres = torch.randn(24, 3, generator=rng, dtype=torch.float64)
    posed_centres = (bones @ torch.cat([centres, torch.ones(24, 1)], -1)[..., None])[..., :3, 0]
    order = torch.cdist(x_d, posed_centres).argsort(-1)[..., :4]
    expected = torch.gather(every, 2, order[..., None].expand(-1, -1, -1, 3))
    torch.testing.assert_close(nearest_bone_starts(x_d, bones, centres, 4), expected, rtol=0, atol=1e-12)


def test_distinct_keeps_one_of_each_root() -> None:
    a, b = [0.0, 0.0, 0.0], [0.1, 0.0, 0.0]
    roots = torch.tensor([[[a, a, b, a, b]]]) + 1e-5 * torch.arange(5)[:, None]
    converged = torch.tensor([[[False, True, True, True, True]]])
    assert distinct(roots, converged, 1e-3).tolist() == [[[False, True, True, False, False]]]
    assert distinct(roots, converged, 1e-7).tolist() == converged.tolist()


def test_inverse_3x3(rng) -> None:
    matrices = torch.randn(50, 3, 3, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(inverse_3x3(matrices), torch.linalg.inv(matrices), rtol=1e-8, atol=1e-8)
    assert inverse_3x3(torch.zeros(3, 3)).isfinite().all()


@pytest.fixture
def at_root(field, posed):
    """Two points per frame with a tight root each, and the search repeated from there for changed inputs."""
    x_c, x_d, bones = (tensor[:, :2].clone() if tensor.ndim == 3 else tensor for tensor in posed)
    roots, converged = find_roots(field, x_d, bones, x_c[:, :, None] + 1e-3, max_steps=50, tolerance=1e-13)
    assert converged.all()

    def solve(query: Tensor) -> Tensor:
        found, all_found = find_roots(field, query, bones, roots, max_steps=50, tolerance=1e-13)
        assert all_found.all()
        return found

    return roots, x_d, bones, solve


def test_gradient_with_respect_to_query_points(field, at_root) -> None:
    """Eq. 27 with its sign put right: moving the query by d moves the root by +J^-1 d."""
    roots, x_d, bones, solve = at_root
    x_d = x_d.clone().requires_grad_()
    differentiable = attach_gradient(field, roots, x_d, bones)
    assert torch.equal(differentiable, roots)
    for axis in range(3):
        (gradient,) = torch.autograd.grad(differentiable[..., axis].sum(), x_d, retain_graph=True)
        for along in range(3):
            step = torch.zeros(3, dtype=torch.float64)
            step[along] = 1e-6
            difference = (solve(x_d.detach() + step) - solve(x_d.detach() - step))[..., 0, axis] / 2e-6
            torch.testing.assert_close(gradient[..., along], difference, rtol=1e-4, atol=1e-6)


def test_gradient_with_respect_to_the_field(field, at_root, rng) -> None:
    """Eq. 26, along random directions of each parameter."""
    roots, x_d, bones, solve = at_root
    readout = torch.randn(roots.shape, generator=rng, dtype=torch.float64)
    loss = (attach_gradient(field, roots, x_d, bones) * readout).sum()
    gradients = torch.autograd.grad(loss, list(field.parameters()))
    for parameter, gradient in zip(field.parameters(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        original, values = parameter.detach().clone(), []
        for sign in (1, -1):
            parameter.data.copy_(original + sign * 1e-7 * direction)
            values.append((solve(x_d) * readout).sum())
        parameter.data.copy_(original)
        difference = (values[0] - values[1]) / 2e-7
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-4, atol=1e-6)
