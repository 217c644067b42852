"""Helpers of the model's tests: networks far from the identity they start as, poses, a body-like skeleton."""

from collections.abc import Callable, Iterator

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

SMPL_PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and the tests may share their machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def _seed_of_module() -> None:
    """For the fresh networks of module fixtures; each test has a seed of its own."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed(_seed_of_module: None) -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def parents() -> tuple[int, ...]:
    return SMPL_PARENTS


@pytest.fixture(scope="session")
def randomise() -> Callable[..., nn.Module]:
    """randomise(module, rng, scale): adds noise to every parameter, zero-initialised last layers included."""

    def add_noise(module: nn.Module, rng: torch.Generator, scale: float = 0.05) -> nn.Module:
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
                parameter += scale * noise.to(parameter.dtype)
        return module

    return add_noise


@pytest.fixture(scope="session")
def random_bones() -> Callable[..., Float[Tensor, "B 24 4 4"]]:
    """random_bones(rng, count, angle): rigid transforms of chained joints, the root's the identity; float64."""
    joints = torch.randn(24, 3, generator=torch.Generator().manual_seed(24), dtype=torch.float64) * 0.4

    def pose(rng: torch.Generator, count: int, angle: float = 0.3) -> Float[Tensor, "B 24 4 4"]:
        turns = rotation_matrices(angle * torch.randn(count, 24, 3, generator=rng, dtype=torch.float64))
        bones = [torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)]
        for joint in range(1, 24):
            local = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
            local[:, :3, :3] = turns[:, joint]
            local[:, :3, 3] = joints[joint] - turns[:, joint] @ joints[joint]
            bones.append(bones[SMPL_PARENTS[joint]] @ local)
        return torch.stack(bones, 1)

    return pose


def rotation_matrices(axis_angle: Float[Tensor, "*S 3"]) -> Float[Tensor, "*S 3 3"]:
    """Rotations by axis-angle vectors, radians."""
    x, y, z = axis_angle.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.matrix_exp(torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3)))
