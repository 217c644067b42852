"""Laws of the pose code: zero in the canonical pose, finite everywhere, local where it says so."""

import pytest
import torch

from model.pose_encoder import PoseEncoder, euler_angles


@pytest.fixture(scope="module")
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def euler_matrix(angles: torch.Tensor) -> torch.Tensor:
    """R_z(c) R_y(b) R_x(a)."""
    generators = torch.zeros(3, 3, 3, dtype=angles.dtype)
    for axis in range(3):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        generators[axis, i, j], generators[axis, j, i] = -1, 1
    turn_x, turn_y, turn_z = (torch.matrix_exp(angles[..., axis, None, None] * generators[axis]) for axis in range(3))
    return turn_z @ turn_y @ turn_x


@pytest.mark.parametrize("inputs", ["bone", "joint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_code_is_exactly_zero_in_the_canonical_pose(randomise, parents, rng, inputs, dtype) -> None:
    encoder = randomise(PoseEncoder(parents, inputs).to(dtype), rng, scale=0.3)
    canonical = torch.eye(4, dtype=dtype).repeat(5, 24, 1, 1)
    code = encoder(canonical)
    assert code.shape == (5, 120)
    assert torch.equal(code, torch.zeros_like(code))


@pytest.mark.parametrize("inputs", ["bone", "joint"])
def test_the_code_is_each_bones_network_minus_its_value_at_rest(randomise, random_bones, parents, rng, inputs) -> None:
    encoder = randomise(PoseEncoder(parents, inputs).double(), rng, scale=0.3)
    bones = random_bones(rng, 3)

    def network(bone: int, features: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.silu(features @ encoder.weight_1[bone] + encoder.bias_1[bone])
        hidden = torch.nn.functional.silu(hidden @ encoder.weight_2[bone] + encoder.bias_2[bone])
        return hidden @ encoder.weight_3[bone]

    codes = []
    for bone, parent in enumerate(parents):
        if inputs == "bone":
            features = torch.cat([euler_angles(bones[:, bone, :3, :3]), bones[:, bone, :3, 3]], -1)
        else:
            above = bones[:, max(parent, 0), :3, :3]
            features = (above.mT @ bones[:, bone, :3, :3] - torch.eye(3)).flatten(1)
        codes.append(network(bone, features) - network(bone, torch.zeros_like(features)))
    expected = torch.cat(codes, -1)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(encoder(bones), expected, rtol=0, atol=1e-10)


def test_relative_inputs_are_local(randomise, random_bones, parents, rng) -> None:
    """Turning one joint carries its whole limb along, yet changes only its own five numbers."""
    encoder = randomise(PoseEncoder(parents, "joint").double(), rng)
    bones = random_bones(rng, 1)
    shoulder, turn = 16, random_bones(rng, 1)[0, 5]
    moved = bones.clone()
    for bone in (16, 18, 20, 22):
        moved[0, bone] = turn @ bones[0, bone]
    changed = (encoder(moved) - encoder(bones)).abs().view(24, 5).amax(1) > 1e-12
    assert changed.nonzero().flatten().tolist() == [shoulder]


def test_euler_angles_give_their_rotation_back(random_bones, rng) -> None:
    rotations = random_bones(rng, 20, angle=1.0)[..., :3, :3]
    torch.testing.assert_close(euler_matrix(euler_angles(rotations)), rotations, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gimbal_lock_is_finite_in_value_and_gradient(randomise, parents, rng, sign: int, dtype) -> None:
    quarter = torch.zeros(3, dtype=dtype)
    quarter[1] = sign * torch.pi / 2
    bones = torch.eye(4, dtype=dtype).repeat(1, 24, 1, 1)
    bones[:, 3, :3, :3] = euler_matrix(quarter)
    # Beside it, rounding would choose the angles.
    bones[:, 5, :3, :3] = euler_matrix(quarter + torch.tensor([0.3, 1e-6, 0.2], dtype=dtype))
    bones[:, 4, :3, :3] = torch.tensor([[0, 0, sign], [0, 1, 0], [-sign, 0, 0]], dtype=dtype)  # exactly there
    bones.requires_grad_()
    angles = euler_angles(bones[..., :3, :3])
    torch.testing.assert_close(angles[0, 3:6], quarter.expand(3, 3), rtol=0, atol=1e-4)
    randomise(PoseEncoder(parents).to(dtype), rng)(bones).square().sum().backward()
    assert bones.grad is not None
    assert bones.grad.abs().max() < 1e6


def test_unfit_arguments_are_refused(parents) -> None:
    with pytest.raises(ValueError, match="multiple of 24 bones, got 100"):
        PoseEncoder(parents, code_width=100)
    with pytest.raises(Exception, match="quaternion"):  # a TypeCheckError where shapes are checked
        PoseEncoder(parents, "quaternion")  # type: ignore[arg-type]
