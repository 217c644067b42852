"""Laws of one coupling layer: inverse, kept part, volume, and the algebra of its folded first layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.coupling import AxialCoupling, OperationMaps, PlanarCoupling, Siren

WIDTH = 16
LAYERS = [(kind, axis) for kind in (PlanarCoupling, AxialCoupling) for axis in range(3)]


def random_layer(randomise, kind: type[nn.Module], axis: int, rng: torch.Generator, **options) -> nn.Module:
    return randomise(kind(axis, width=WIDTH, hidden=8, **options).double(), rng, scale=0.3)


def random_points(rng: torch.Generator, n_points: int, extent_m: float = 1.0) -> tuple[Tensor, Tensor]:
    x = extent_m * torch.randn(2, n_points, 3, generator=rng, dtype=torch.float64)
    return x, torch.randn(2, WIDTH, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize(("kind", "axis"), LAYERS)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), n_points=st.integers(1, 64), extent_m=st.floats(0.01, 3.0))
def test_inverse_undoes_forward(randomise, kind, axis: int, seed: int, n_points: int, extent_m: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    layer = random_layer(randomise, kind, axis, rng)
    x, pose_code = random_points(rng, n_points, extent_m)
    y = layer(x, pose_code)
    assert (y - x).abs().max() > 1e-3
    torch.testing.assert_close(layer.inverse(y, pose_code), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("kind", "axis"), LAYERS)
def test_only_the_moved_axes_move(randomise, kind, axis: int) -> None:
    rng = torch.Generator().manual_seed(1)
    x, pose_code = random_points(rng, 20)
    y = random_layer(randomise, kind, axis, rng)(x, pose_code)
    moved = [axis] if kind is AxialCoupling else [i for i in range(3) if i != axis]
    for i in range(3):
        assert torch.equal(y[..., i], x[..., i]) == (i not in moved)


@pytest.mark.parametrize(("kind", "axis"), LAYERS)
def test_a_fresh_layer_is_the_identity(kind, axis: int) -> None:
    x, pose_code = random_points(torch.Generator().manual_seed(2), 20)
    assert torch.equal(kind(axis, width=WIDTH).double()(x, pose_code), x)


def test_the_folded_first_layer_is_the_literal_concatenation(randomise) -> None:
    """Eq. 9 as written: every map on concat[e_pose * e_z, e_pose] of every point."""
    rng = torch.Generator().manual_seed(3)
    maps = randomise(OperationMaps(WIDTH, 8, outputs=(2, 1)).double(), rng, scale=0.3)
    space = torch.randn(2, WIDTH, 30, generator=rng, dtype=torch.float64)
    pose_code = torch.randn(2, WIDTH, generator=rng, dtype=torch.float64)
    pose = pose_code[:, None].expand(-1, 30, -1)
    conditioning = torch.cat([pose * space.mT, pose], -1)  # (B, N, 2C)
    hidden = torch.nn.functional.silu(maps.first(conditioning))
    expected = [last(hidden[..., 8 * i : 8 * i + 8]).mT for i, last in enumerate(maps.last)]
    torch.testing.assert_close(maps(space, pose_code), expected, rtol=0, atol=1e-12)


def test_planar_motion_is_equation_5(randomise) -> None:
    rng = torch.Generator().manual_seed(4)
    layer = random_layer(randomise, PlanarCoupling, 2, rng)
    x, pose_code = random_points(rng, 20)
    shift, angle = layer.maps(layer.space_embedding(x[..., 2:].mT), pose_code)
    cosine, sine = angle[:, 0].cos(), angle[:, 0].sin()
    rotation = torch.stack([torch.stack([cosine, -sine], -1), torch.stack([sine, cosine], -1)], -2)
    expected = (rotation @ x[..., :2, None])[..., 0] + shift.mT
    torch.testing.assert_close(layer(x, pose_code)[..., :2], expected, rtol=0, atol=1e-12)


def test_without_rotation_a_planar_layer_translates(randomise) -> None:
    rng = torch.Generator().manual_seed(5)
    layer = random_layer(randomise, PlanarCoupling, 0, rng, rotation=False)
    x, pose_code = random_points(rng, 20)
    aside = x + torch.tensor([0.0, 0.3, -0.2], dtype=torch.float64)
    torch.testing.assert_close(layer(aside, pose_code) - aside, layer(x, pose_code) - x, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.inverse(layer(x, pose_code), pose_code), x, rtol=0, atol=1e-12)


def test_the_embedding_is_equation_8() -> None:
    siren = Siren(2, WIDTH, omega0=7.0).double()
    z = torch.randn(3, 2, 5, dtype=torch.float64)
    expected = torch.sin(7.0 * (torch.einsum("ci,bin->bcn", siren.weight, z) + siren.bias))
    torch.testing.assert_close(siren(z), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [PlanarCoupling, AxialCoupling])
def test_gradients_reach_points_pose_and_parameters(randomise, kind) -> None:
    rng = torch.Generator().manual_seed(6)
    layer = random_layer(randomise, kind, 1, rng, omega0=3.0)
    x, pose_code = (tensor.requires_grad_() for tensor in random_points(rng, 2))
    assert torch.autograd.gradcheck(layer, (x, pose_code))
    layer(x, pose_code).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in layer.parameters())
