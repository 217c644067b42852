"""The occupancy network's form, and that its Fourier features are what they say."""

import math

import pytest
import torch

from model.occupancy import OccupancyNetwork


@pytest.mark.parametrize("frequencies", [0, 4, 6])
def test_logits_have_the_points_shape_and_depend_on_them_smoothly(randomise, frequencies: int) -> None:
    rng = torch.Generator().manual_seed(19)
    network = randomise(OccupancyNetwork(64, 4, frequencies).double(), rng)
    x_c = torch.randn(2, 5, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    logits = network(x_c)
    assert logits.shape == (2, 5)
    assert network(x_c[0, 0]).shape == ()
    torch.testing.assert_close(network(x_c[0, 0]), logits[0, 0])
    (gradient,) = torch.autograd.grad(logits.sum(), x_c)
    step = 1e-6 * torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    difference = network(x_c + step) - network(x_c - step)
    torch.testing.assert_close(2 * gradient @ step, difference, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("depth", [2, 4, 8])
def test_the_input_joins_again_in_the_middle(depth: int) -> None:
    """With everything before the middle switched off, the logits still see the point."""
    network = OccupancyNetwork(64, depth, frequencies=2)
    for layer in network.layers[: depth // 2]:
        torch.nn.init.zeros_(layer.weight)
    logits = network(torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]))
    assert logits[0] != logits[1]


def test_the_slowest_feature_has_a_wavelength_of_two_metres() -> None:
    octaves = OccupancyNetwork(frequencies=6).octaves
    torch.testing.assert_close(2 * math.pi / octaves, 2 / 2.0 ** torch.arange(6))
