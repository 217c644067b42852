"""Laws of a PIN: invertible, volume preserving, rigid in the canonical pose."""

import pytest
import torch

from model.pin import PIN


@pytest.fixture(scope="module")
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture(scope="module")
def pin(randomise, rng) -> PIN:
    """Moves points of a body by decimetres: far from the identity, at the scale of what training makes of it."""
    return randomise(PIN(), rng, scale=0.02)


@pytest.mark.parametrize(("dtype", "tolerance_m"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_both_directions_undo_each_other(pin, rng, dtype: torch.dtype, tolerance_m: float) -> None:
    network = PIN().to(dtype)
    network.load_state_dict(pin.state_dict())
    x = (2 * torch.rand(2, 300, 3, generator=rng) - 1).to(dtype)  # a body fits in two metres
    pose_code = torch.randn(2, 120, generator=rng).to(dtype)
    there = network.to_canonical(x, pose_code)
    assert (there - x).norm(dim=-1).mean() > 0.1
    torch.testing.assert_close(network.to_deformed(there, pose_code), x, rtol=0, atol=tolerance_m)
    torch.testing.assert_close(
        network.to_canonical(network.to_deformed(x, pose_code), pose_code), x, rtol=0, atol=tolerance_m
    )


def test_volume_is_preserved(pin, rng) -> None:
    network = PIN().double()
    network.load_state_dict(pin.state_dict())
    pose_code = torch.randn(1, 120, generator=rng, dtype=torch.float64)
    for x in torch.randn(5, 1, 1, 3, generator=rng, dtype=torch.float64):
        jacobian = torch.autograd.functional.jacobian(lambda p: network.to_canonical(p, pose_code), x)
        matrix = jacobian.reshape(3, 3)
        assert (matrix - torch.eye(3)).abs().max() > 0.1
        assert matrix.det().item() == pytest.approx(1, abs=1e-9)


def test_in_the_canonical_pose_nothing_varies_over_space(pin, rng) -> None:
    """With the pose code at zero, a PIN with any weights is one rigid motion: it keeps all distances."""
    x = torch.randn(1, 40, 3, generator=rng, dtype=torch.float64)
    network = PIN().double()
    network.load_state_dict(pin.state_dict())
    moved = network.to_canonical(x, torch.zeros(1, 120, dtype=torch.float64))
    assert (moved - x).abs().max() > 1e-3
    between, expected = (points[:, :, None] - points[:, None] for points in (moved, x))
    torch.testing.assert_close(between.norm(dim=-1), expected.norm(dim=-1), rtol=0, atol=1e-9)


def test_a_fresh_pin_is_the_identity(rng) -> None:
    x, pose_code = torch.randn(2, 40, 3, generator=rng), torch.randn(2, 120, generator=rng)
    assert torch.equal(PIN().to_canonical(x, pose_code), x)
    assert torch.equal(PIN().to_deformed(x, pose_code), x)


def test_frames_do_not_see_each_other(pin, rng) -> None:
    network = PIN().double()
    network.load_state_dict(pin.state_dict())
    x, pose_code = torch.randn(3, 20, 3, generator=rng).double(), torch.randn(3, 120, generator=rng).double()
    together = network.to_canonical(x, pose_code)
    alone = torch.cat([network.to_canonical(x[i : i + 1], pose_code[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


def test_every_axis_is_moved_by_both_kinds_of_layer() -> None:
    kinds = [(type(layer).__name__, getattr(layer, "kept", None), layer.moved) for layer in PIN(6).layers]
    assert [name for name, _, _ in kinds] == ["PlanarCoupling", "AxialCoupling"] * 3
    assert [moved for name, _, moved in kinds if name == "AxialCoupling"] == [0, 1, 2]
    assert [kept for name, kept, _ in kinds if name == "PlanarCoupling"] == [0, 1, 2]
