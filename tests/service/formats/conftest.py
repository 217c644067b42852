"""A clip of the tiny avatar, reposed by the engine in numpy, and a mesh with everything a format can carry."""

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.bundle.glb import Mesh
from service.bundle.skeleton import axis_angle_to_matrix
from service.engine import Batch, repose_in_batches
from service.formats.clip import Clip
from service.poses import PoseSequence

FRAMES, FPS = 9, 24.0


@pytest.fixture(scope="session")
def rich_mesh(bundle_parts: Any) -> Mesh:
    """The boxes with colours, UVs and a texture; the last vertices lie where the first do, as on a texture seam."""
    mesh: Mesh = bundle_parts["meshes"]["standard"]
    twin = np.arange(len(mesh.vertices))
    last = len(mesh.vertices)
    faces = mesh.faces.copy()
    faces[0, 0] = last  # one corner of the first face is now the vertex's twin across a seam
    rows = np.append(twin, mesh.faces[0, 0])
    image = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), (200, 120, 40), np.uint8)).save(image, "JPEG")
    assert mesh.colors is not None
    assert mesh.skin_joints is not None
    assert mesh.skin_weights is not None
    uv = np.random.default_rng(3).random((last + 1, 2)).astype(np.float32)
    return Mesh(
        mesh.vertices[rows], faces, None, mesh.colors[rows], mesh.skin_joints[rows], mesh.skin_weights[rows], uv,
        image.getvalue(),
    )  # fmt: skip


def pose_sequence(motion: Any) -> PoseSequence:
    rng = np.random.default_rng(11)
    turns = axis_angle_to_matrix(rng.normal(0, 0.4, (FRAMES, 24, 3)))
    return PoseSequence(
        turns.astype(np.float32), rng.normal(0, 1, (FRAMES, 3)).astype(np.float32), FPS, "y", "m", "matrix"
    )


@pytest.fixture(scope="session")
def rich_clip(rich_mesh: Mesh, skeleton: Any, motion: Any) -> Clip:
    return Clip("tiny", rich_mesh, FRAMES, FPS, skeleton, pose_sequence(motion))


@pytest.fixture(scope="session")
def plain_clip(rich_clip: Clip) -> Clip:
    """The same without UVs and texture."""
    return replace(rich_clip, mesh=replace(rich_clip.mesh, uv=None, texture=None))


class Reposed:
    """Batches of a clip, as often as a test wants them, and their vertices in one array."""

    def __init__(self, engine: Any, clip: Clip) -> None:
        self._engine, self.clip = engine, clip
        self.vertices: NDArray[np.float32] = np.concatenate([batch.vertices for batch in self.batches()])

    def batches(self) -> Iterator[Batch]:
        clip = self.clip
        assert clip.skeleton is not None
        assert clip.poses is not None
        return repose_in_batches(
            self._engine, clip.skeleton, clip.mesh.vertices, clip.poses, 4 * len(clip.mesh.vertices)
        )


@pytest.fixture
def rich(engine: Any, rich_clip: Clip) -> Reposed:
    return Reposed(engine, rich_clip)


@pytest.fixture
def plain(engine: Any, plain_clip: Clip) -> Reposed:
    return Reposed(engine, plain_clip)
