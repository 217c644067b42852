"""MISE gives the mesh of the dense grid, facing outwards, on the level set."""

import pytest
import torch
from torch import Tensor

from model.extraction import extract_mesh

BOX_MIN, BOX_MAX = torch.tensor([-0.8, -1.0, -0.4]), torch.tensor([0.8, 1.0, 0.4])
LIMBS = torch.tensor(
    [  # from, to, radius
        [0.0, -0.1, 0.0, 0.0, 0.4, 0.0, 0.16],
        [0.0, 0.55, 0.0, 0.0, 0.7, 0.02, 0.1],
        [0.1, 0.4, 0.0, 0.68, 0.35, -0.05, 0.045],
        [-0.1, 0.4, 0.0, -0.5, 0.0, 0.2, 0.045],
        [0.08, -0.1, 0.0, 0.25, -0.85, 0.0, 0.06],
        [-0.08, -0.1, 0.0, -0.2, -0.85, 0.1, 0.06],
    ]
)


def body_logits(x: Tensor) -> Tensor:
    """A body of capsules, smoothly joined and wrinkled; positive inside."""
    start, end, radius = LIMBS[:, :3], LIMBS[:, 3:6], LIMBS[:, 6]
    along = end - start
    offset = x[:, None] - start
    place = ((offset * along).sum(-1) / along.square().sum(-1)).clamp(0, 1)
    distance = (offset - place[..., None] * along).norm(dim=-1) - radius
    wrinkles = 0.004 * torch.sin(60 * x).sum(-1)
    return 20 * (torch.logsumexp(-60 * distance, -1) / 60 + wrinkles)


class Counted:
    def __init__(self) -> None:
        self.points = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.points += len(x)
        return body_logits(x)


def signed_volume(vertices: Tensor, faces: Tensor) -> float:
    a, b, c = vertices.double()[faces.long()].unbind(1)
    return ((torch.linalg.cross(a, b) * c).sum() / 6).item()


def test_refining_gives_the_mesh_of_the_dense_grid() -> None:
    counted, dense = Counted(), Counted()
    vertices, faces = extract_mesh(counted, BOX_MIN, BOX_MAX, coarse_resolution=32, levels=2)
    dense_vertices, dense_faces = extract_mesh(dense, BOX_MIN, BOX_MAX, coarse_resolution=128, levels=0)
    assert torch.equal(faces, dense_faces)
    torch.testing.assert_close(vertices, dense_vertices, rtol=0, atol=1e-6)
    assert counted.points < 0.4 * dense.points


def test_the_surface_is_followed_out_of_the_refined_cells() -> None:
    """A thin ring that the coarse grid sees in a few cells only is still found whole."""

    def ring(x: Tensor) -> Tensor:
        from_circle = torch.stack([x[:, :2].norm(dim=-1) - 0.5, x[:, 2] - 0.03], -1)
        bulge = 0.12 * torch.exp(-((x[:, 0] - 0.5) ** 2 + x[:, 1] ** 2) / 0.02)
        return 0.022 + bulge - from_circle.norm(dim=-1)

    box = torch.tensor([-0.8, -0.8, -0.4]), torch.tensor([0.8, 0.8, 0.4])
    vertices, faces = extract_mesh(ring, *box, coarse_resolution=16, levels=3)
    dense_vertices, dense_faces = extract_mesh(ring, *box, coarse_resolution=128, levels=0)
    assert torch.equal(faces, dense_faces)
    torch.testing.assert_close(vertices, dense_vertices, rtol=0, atol=1e-6)


def test_small_parts_beside_the_surface_are_found() -> None:
    """A button that lies between the corners of the coarse grid, in the cell next to one that holds the surface."""

    def ball_and_button(x: Tensor) -> Tensor:
        button = 0.018 - (x - torch.tensor([0.575, 0.025, 0.025])).norm(dim=-1)
        return torch.maximum(0.51 - x.norm(dim=-1), button)

    box = torch.full((3,), -0.8), torch.full((3,), 0.8)
    _, faces = extract_mesh(ball_and_button, *box, coarse_resolution=32, levels=2)
    _, dense_faces = extract_mesh(ball_and_button, *box, coarse_resolution=128, levels=0)
    assert torch.equal(faces, dense_faces)


def test_the_mesh_is_closed_and_faces_outwards() -> None:
    vertices, faces = extract_mesh(body_logits, BOX_MIN, BOX_MAX)
    assert faces.dtype == torch.int32
    assert vertices.dtype == torch.float32
    assert torch.equal(faces.unique().long(), torch.arange(len(vertices)))
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).long()
    keys = set((edges[:, 0] * len(vertices) + edges[:, 1]).tolist())
    assert len(keys) == len(edges)  # every directed edge once ...
    assert keys == set((edges[:, 1] * len(vertices) + edges[:, 0]).tolist())  # ... and its opposite
    # Inside the shape by sampling, in cubic metres.
    grid = BOX_MIN + (BOX_MAX - BOX_MIN) * torch.rand(100_000, 3, generator=torch.Generator().manual_seed(0))
    expected = (body_logits(grid) > 0).float().mean() * (BOX_MAX - BOX_MIN).prod()
    assert signed_volume(vertices, faces) == pytest.approx(expected.item(), rel=0.03)


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_vertices_lie_on_the_level_set(threshold: float) -> None:
    def distances(steps: int) -> Tensor:
        vertices, _ = extract_mesh(body_logits, BOX_MIN, BOX_MAX, threshold=threshold, refinement_steps=steps)
        return (body_logits(vertices) - threshold).abs() / 20  # 20 logits a metre

    assert distances(0).mean() > 1e-4
    # Where the surface only touches a grid edge, three steps are not enough for the last hundredth.
    assert distances(3).quantile(0.99) < 1e-5
    assert distances(3).max() < 5e-4


def test_a_box_without_surface_is_refused() -> None:
    with pytest.raises(ValueError, match="the box holds no surface"):
        extract_mesh(lambda x: -torch.ones(len(x)), BOX_MIN, BOX_MAX)
