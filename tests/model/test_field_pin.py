"""Laws of the displacement-field PIN: undone exactly whatever its weights, increasing along each axis, local."""

import pytest
import torch

from model.field_pin import STEEPEST, FieldPIN, LinearCorrectives, PoseFeatures

LOW, HIGH = torch.tensor([-0.8, -1.0, -0.3]), torch.tensor([0.8, 0.7, 0.3])


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def make(rng: torch.Generator, size: float, kind: type[FieldPIN] = FieldPIN, dtype=torch.float64) -> FieldPIN:
    """Coefficients of this deviation, metres: 0.03 with a code of deviation 1 would fold every axis over and over."""
    pin = kind(6, LOW, HIGH, spacing=0.04)
    pin.cover((torch.rand(4000, 3, generator=rng) - 0.5) * torch.tensor([1.2, 1.2, 0.3]), reach=0.04)
    with torch.no_grad():
        pin.coefficients.normal_(0, size, generator=rng)
    return pin.to(dtype)


def points(rng: torch.Generator, count: int, dtype=torch.float64) -> torch.Tensor:
    """Some of them beyond the box."""
    return ((torch.rand(2, count, 3, generator=rng) - 0.5) * torch.tensor([2.0, 2.4, 0.8])).to(dtype)


@pytest.mark.parametrize("size", [0.002, 0.03])
@pytest.mark.parametrize(("dtype", "tolerance_m"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_both_directions_undo_each_other(rng, size: float, dtype: torch.dtype, tolerance_m: float) -> None:
    pin = make(rng, size, dtype=dtype)
    x, code = points(rng, 3000, dtype), torch.randn(2, 6, generator=rng).to(dtype)
    there = pin.to_deformed(x, code)
    assert (there - x).norm(dim=-1).max() > 0.01
    torch.testing.assert_close(pin.to_canonical(there, code), x, rtol=0, atol=tolerance_m)
    torch.testing.assert_close(pin.to_deformed(pin.to_canonical(x, code), code), x, rtol=0, atol=tolerance_m)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_layer_increases_along_its_axis(rng, axis: int) -> None:
    """Checked layer by layer, with weights that would fold space a hundred times without the limiter."""
    pin = make(rng, 0.05)
    with torch.no_grad():
        pin.coefficients[[a for a in range(3) if a != axis]] = 0
    code = torch.randn(1, 6, generator=rng, dtype=torch.float64)
    fields = torch.nn.functional.pad(torch.einsum("bk,cak->bca", code, pin.coefficients), (0, 1))
    assert pin.limiter(fields[:, axis], axis).median() < 0.5
    line = torch.zeros(1, 4001, 3, dtype=torch.float64) + torch.tensor([0.1, 0.05, 0.02])
    line[..., axis] = torch.linspace(-1.1, 1.1, 4001, dtype=torch.float64)
    moved = pin.to_deformed(line, code)[0, :, axis].diff() / line[0, :, axis].diff()
    assert moved.min() > 1 - STEEPEST - 1e-9
    assert moved.min() < 0.9


def test_small_displacements_are_not_limited(rng) -> None:
    pin = make(rng, 0.001)
    code = torch.randn(3, 6, generator=rng, dtype=torch.float64)
    fields = torch.nn.functional.pad(torch.einsum("bk,cak->bca", code, pin.coefficients), (0, 1))
    for axis in range(3):
        assert (pin.limiter(fields[:, axis], axis) == 1).all()
    # Without the limiter a layer is linear in the pose.
    with torch.no_grad():
        pin.coefficients[1:] = 0
    x = points(rng, 500)[:1]
    once, twice = pin.to_deformed(x, code[:1]) - x, pin.to_deformed(x, 2 * code[:1]) - x
    torch.testing.assert_close(twice, 2 * once)


def test_a_steep_place_limits_its_own_grid_line_only(rng) -> None:
    pin = make(rng, 0.0005)
    middle = int(pin.slots[pin.active[len(pin.active) // 2]])
    with torch.no_grad():
        pin.coefficients[1, middle, 0] = 0.5
    code = torch.eye(6, dtype=torch.float64)[:1]
    fields = torch.nn.functional.pad(torch.einsum("bk,cak->bca", code, pin.coefficients), (0, 1))
    limited = (pin.limiter(fields[:, 1], 1)[0] < 1).nonzero()[:, 0]
    nodes = torch.stack([pin.active // (pin.shape[1] * pin.shape[2]), pin.active % pin.shape[2]], -1)  # x, z
    assert (nodes[limited] == nodes[middle]).all()
    assert 1 < len(limited) <= pin.shape[1]


def test_fresh_and_far_away_it_is_the_identity(rng) -> None:
    x, code = points(rng, 500), torch.randn(2, 6, generator=rng, dtype=torch.float64)
    assert torch.equal(make(rng, 0.0).to_deformed(x, code), x)
    far = x + torch.tensor([0.0, 5.0, 0.0])
    assert torch.equal(make(rng, 0.03).to_deformed(far, code), far)


def test_no_point_leaves_the_cells_of_the_active_nodes(rng) -> None:
    """What the exported graph relies on: increasing, and the identity where nothing is active."""
    pin = make(rng, 0.2)  # decimetres, were they not limited
    nodes = pin.node_positions()
    x = (
        nodes[torch.randint(len(nodes), (1, 2000), generator=rng)] + 0.02 * torch.rand(1, 2000, 3, generator=rng)
    ).double()
    moved = pin.to_deformed(x, torch.randn(1, 6, generator=rng, dtype=torch.float64))
    assert (moved - x).abs().max() > 0.03
    apart = (moved[0, :, None] - nodes).abs().amax(-1).amin(1)  # along the worst axis, to the nearest node
    assert apart.max() <= pin.spacing + 1e-9


def test_front_and_back_move_freely_and_volume_may_change(rng) -> None:
    """What a coupling layer cannot do: a shift along z that depends on z."""
    pin = make(rng, 0.0)
    depth = pin.node_positions()[:, 2]
    with torch.no_grad():
        pin.coefficients[2, :, 0] = 0.1 * depth
    x = torch.tensor([[[0.0, 0.0, 0.08], [0.0, 0.0, -0.08]]], dtype=torch.float64)
    moved = pin.to_deformed(x, torch.eye(6, dtype=torch.float64)[:1]) - x
    assert moved[0, 0, 2] > 0.005 > -0.005 > moved[0, 1, 2]


def test_state_is_loaded_whichever_nodes_it_has(rng) -> None:
    pin = make(rng, 0.01)
    other = FieldPIN(6, LOW, HIGH, spacing=0.04).double()
    other.load_state_dict(pin.state_dict())
    x, code = points(rng, 200), torch.randn(2, 6, generator=rng, dtype=torch.float64)
    assert torch.equal(other.to_deformed(x, code), pin.to_deformed(x, code))


def test_linear_correctives_agree_to_first_order_and_have_no_inverse(rng) -> None:
    pin = make(rng, 1e-6)
    linear = LinearCorrectives(6, LOW, HIGH, spacing=0.04).double()
    linear.load_state_dict(pin.state_dict())
    x, code = points(rng, 400), torch.randn(2, 6, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(linear.to_deformed(x, code), pin.to_deformed(x, code), rtol=0, atol=1e-9)
    with pytest.raises(NotImplementedError, match="no inverse"):
        linear.to_canonical(x, code)


def test_features_are_the_principal_components_of_the_turns(parents, random_bones, rng) -> None:
    bones = random_bones(rng, 40)
    features = PoseFeatures(parents, 48).double()
    features.fit(bones)
    codes = features(bones)
    assert codes.mean(0).abs().max() < 1e-12
    assert codes[:, 39:].abs().max() < 1e-9, "40 poses have 39 directions"
    deviations = codes.std(0)[:39]
    assert (deviations.diff() <= 1e-12).all()
    gram = codes.T @ codes
    torch.testing.assert_close(gram, torch.diag(gram.diag()), rtol=0, atol=1e-9)
    # A turn of the whole body is not seen, nor other frames; which bits are last depends on the processor.
    turned = random_bones(rng, 1)[:, 1:2] @ bones[:3]
    assert (turned - bones[:3]).abs().max() > 0.1
    torch.testing.assert_close(features(turned), codes[:3], rtol=0, atol=1e-12)


def test_frames_do_not_see_each_other(rng) -> None:
    pin = make(rng, 0.01)
    x, code = points(rng, 100), torch.randn(2, 6, generator=rng, dtype=torch.float64)
    together = pin.to_deformed(x, code)
    alone = torch.cat([pin.to_deformed(x[i : i + 1], code[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
