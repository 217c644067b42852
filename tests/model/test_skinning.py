"""Linear blend skinning against NumPy; the weight fields: derivatives against autograd, the grid against its source."""

import warnings
from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from model.skinning import SkinningField, VoxelSkinningField, linear_blend_skinning, skinning_jacobian

LOW, HIGH = torch.tensor([-1.0, -0.7, -0.4]), torch.tensor([1.0, 0.8, 0.5])


@pytest.fixture(scope="module")
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(13)


@pytest.fixture(scope="module")
def network(randomise, rng) -> SkinningField:
    return randomise(SkinningField().double(), rng, scale=0.02)


def voxels(logits: Callable[[Tensor], Tensor], spacing: float) -> VoxelSkinningField:
    field = VoxelSkinningField(24, LOW, HIGH, spacing).double()
    field.set_from(logits, floor=-1000.0)
    return field


@pytest.fixture(scope="module", params=["mlp", "voxel"])
def field(request, network) -> SkinningField | VoxelSkinningField:
    return network if request.param == "mlp" else voxels(network.logits, 0.1)


def within(rng: torch.Generator, count: int) -> Tensor:
    """Points in the box."""
    return LOW + (HIGH - LOW) * torch.rand(count, 3, generator=rng, dtype=torch.float64)


def test_skinning_agrees_with_numpy(random_bones, rng) -> None:
    bones = random_bones(rng, 2, angle=1.0)
    x_c = torch.randn(2, 7, 3, generator=rng, dtype=torch.float64)
    weights = torch.rand(2, 7, 24, generator=rng, dtype=torch.float64)
    weights /= weights.sum(-1, keepdim=True)
    expected = np.zeros((2, 7, 3))
    for frame, point, bone in np.ndindex(2, 7, 24):
        homogeneous = np.append(x_c[frame, point].numpy(), 1)
        expected[frame, point] += weights[frame, point, bone].item() * (bones[frame, bone].numpy() @ homogeneous)[:3]
    np.testing.assert_allclose(linear_blend_skinning(x_c, weights, bones).numpy(), expected, rtol=0, atol=1e-12)


def test_weights_are_convex(field, rng) -> None:
    weights = field(3 * torch.randn(500, 3, generator=rng, dtype=torch.float64))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(500, dtype=torch.float64))
    assert weights.std(0).max() > 0.005  # they do vary over space


def test_derivatives_of_the_weights_agree_with_autograd(field, rng) -> None:
    x_c = torch.randn(2, 6, 3, generator=rng, dtype=torch.float64)  # some outside the box
    derivatives = field.with_derivatives(x_c)
    torch.testing.assert_close(derivatives[..., 0, :], field(x_c), rtol=0, atol=1e-12)
    for point, expected in zip(x_c.flatten(0, 1), derivatives[..., 1:, :].flatten(0, 1), strict=True):
        jacobian = torch.autograd.functional.jacobian(field, point)  # (J, 3)
        torch.testing.assert_close(expected, jacobian.mT, rtol=0, atol=1e-10)


def test_the_jacobian_agrees_with_autograd(field, random_bones, rng) -> None:
    bones = random_bones(rng, 2, angle=1.0)
    x_c = torch.randn(2, 3, 3, generator=rng, dtype=torch.float64)
    jacobian = skinning_jacobian(field, x_c, bones)
    for frame, point in np.ndindex(2, 3):

        def pose(x: torch.Tensor, frame: int = frame) -> torch.Tensor:
            return linear_blend_skinning(x[None, None], field(x)[None, None], bones[frame : frame + 1])[0, 0]

        expected = torch.autograd.functional.jacobian(pose, x_c[frame, point])
        torch.testing.assert_close(jacobian[frame, point], expected, rtol=0, atol=1e-9)


def test_voxels_hold_logits_that_are_linear_in_each_axis(rng) -> None:
    """Trilinear interpolation is exact for them, which no mistaken corner or border would be."""
    factors = torch.randn(8, 24, generator=rng, dtype=torch.float64)

    def logits(x_c: Tensor) -> Tensor:
        x, y, z = x_c.double().unbind(-1)
        return torch.stack([torch.ones_like(x), x, y, z, x * y, y * z, z * x, x * y * z], -1) @ factors

    field = VoxelSkinningField(24, LOW, HIGH, 0.3).double()
    axes = [torch.arange(n) for n in field.grid.shape[:3]]
    nodes = LOW.double() + 0.3 * torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).double()
    field.grid.data.copy_(logits(nodes))
    points = within(rng, 300)
    torch.testing.assert_close(field.logits(points), logits(points), rtol=0, atol=1e-12)
    torch.testing.assert_close(field.logits(nodes), logits(nodes), rtol=0, atol=1e-12)
    field.set_from(logits)
    torch.testing.assert_close(field(nodes), torch.softmax(logits(nodes), -1), rtol=0, atol=1e-4)  # but for the floor


def test_voxels_approach_their_source_with_the_square_of_the_spacing(network, rng) -> None:
    points = within(rng, 2000)
    coarse, fine = ((voxels(network.logits, h)(points) - network(points)).abs().mean() for h in (0.1, 0.05))
    assert coarse < 2e-4
    assert 3.5 < coarse / fine < 4.5


def test_voxels_go_on_beyond_their_box_as_at_its_border(network, rng) -> None:
    field = voxels(network.logits, 0.1)
    points = 3 * torch.randn(300, 3, generator=rng, dtype=torch.float64)
    high = field.low + 0.1 * (torch.tensor(field.grid.shape[:3]) - 1)
    assert (high >= HIGH - 1e-6).all()
    drawn = torch.minimum(torch.maximum(points, field.low), high)
    torch.testing.assert_close(field(points), field(drawn), rtol=0, atol=1e-12)
    assert (field.with_derivatives(points)[:, 1:][points != drawn] == 0).all()
    assert field(torch.full((1, 3), torch.nan, dtype=torch.float64)).isnan().all()


def test_voxels_export_without_a_loop(network, rng) -> None:
    """ONNX Runtime agrees with torch, and gathers: a loop over the points would take 200 times as long."""
    field = voxels(network.logits, 0.2).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(
            field.eval(),
            (torch.zeros(2, 5, 3),),
            dynamic_shapes=({0: torch.export.Dim("B"), 1: torch.export.Dim("N")},),
            opset_version=18,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    assert "Loop" not in {node.op_type for node in graph.graph.node}
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    x_c = torch.randn(3, 70, 3, generator=rng)
    (weights,) = session.run(None, {session.get_inputs()[0].name: x_c.numpy()})
    np.testing.assert_allclose(np.asarray(weights), field(x_c).detach().numpy(), rtol=0, atol=1e-6)
