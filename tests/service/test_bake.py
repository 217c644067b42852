"""A baked file gives the surface of the engine it was fitted to, on poses it has not seen, from itself alone."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service import bake
from service.bake_command import errors_mm
from service.bundle.glb import Mesh, read_chunks
from service.bundle.skeleton import Skeleton
from service.poses import PoseSequence
from tests.service.formats.player import Player

ROOT = Path(__file__).parents[2]


class Bulging:
    """Skinning whose canonical surface swells with the pose, as a PIN's does: what a baked file must learn."""

    device, provider = "cpu", "numpy"

    def __init__(self, engine: Any, mesh: Mesh) -> None:
        self._engine, self._mesh = engine, mesh
        self._shapes = np.random.default_rng(4).normal(0, 0.01, (6, *mesh.vertices.shape))

    def repose(self, canonical_vertices: Any, bones: NDArray[np.float32], roots: Any) -> NDArray[np.float32]:
        mesh, result = self._mesh, []
        for bone, root in zip(bones, roots, strict=True):
            turned = bone[[0, 0, 13, 14, 16, 3], :3, :3].swapaxes(1, 2) @ bone[[1, 2, 16, 17, 18, 6], :3, :3]
            bend = turned.reshape(6, 9)[:, [1, 5, 3, 3, 2, 1]].diagonal()
            points = mesh.vertices + np.tensordot(bend, self._shapes, 1)
            matrices = np.einsum("vk,vkab->vab", mesh.skin_weights, bone[mesh.skin_joints])
            posed = np.einsum("vab,vb->va", matrices[:, :3, :3], points) + matrices[:, :3, 3]
            result.append(posed @ root[:3, :3].T + root[:3, 3])
        return np.array(result, np.float32)


@pytest.fixture(scope="module")
def mesh(bundle_parts: Any) -> Mesh:
    return bundle_parts["meshes"]["preview"]


@pytest.fixture
def bulging(engine: Any, mesh: Mesh) -> Bulging:
    return Bulging(engine, mesh)


@pytest.fixture
def unseen() -> PoseSequence:
    rotations = bake.plausible_poses(20, None, seed=99)
    moved = np.random.default_rng(1).normal(0, 1, (20, 3))
    return PoseSequence(rotations.astype(np.float32), moved.astype(np.float32), 30.0, "y", "m", "matrix")


@pytest.fixture
def data(bulging: Bulging, skeleton: Skeleton, mesh: Mesh, unseen: PoseSequence) -> bytes:
    baked = bake.fit(bulging, skeleton, mesh, bake.plausible_poses(300, None))
    return bake.write(baked, skeleton, "tiny", unseen)


def test_unseen_poses_are_reproduced(
    data: bytes, bulging: Bulging, skeleton: Skeleton, mesh: Mesh, unseen: PoseSequence
) -> None:
    mean, p99, _ = errors_mm(data, bulging, skeleton, mesh, unseen)
    assert mean < 1.5
    assert p99 < 6
    bare = bake.write(
        bake.Baked(mesh, np.zeros((1, *mesh.vertices.shape), np.float32), no_network(data)), skeleton, "tiny"
    )
    assert errors_mm(bare, bulging, skeleton, mesh, unseen)[0] > 4 * mean  # what plain skinning is off


def no_network(data: bytes) -> bake.Network:
    network = bake.Network.from_json(read_chunks(data)[0]["meshes"][0]["extras"]["network"])
    return replace(
        network, linear=0 * network.linear[:, :1], output=0 * network.output[:, :1], constant=0 * network.constant[:1]
    )


def test_the_clip_plays_what_the_evaluator_gives(data: bytes, skeleton: Skeleton, unseen: PoseSequence) -> None:
    player = Player(data)
    for n, vertices in enumerate(bake.evaluate(data, skeleton, unseen)):
        np.testing.assert_allclose(player.vertices(n), vertices, rtol=0, atol=5e-5)


def test_features_are_those_of_relative_bones(data: bytes, skeleton: Skeleton, unseen: PoseSequence) -> None:
    """The field PIN's own features: R_parent^T R_j - 1 of the bone transforms."""
    network = bake.Network.from_json(read_chunks(data)[0]["meshes"][0]["extras"]["network"])
    bones = skeleton.bone_transforms(unseen.rotations)[..., :3, :3].astype(np.float64)
    relative = bones[:, list(skeleton.parents[1:])].swapaxes(-1, -2) @ bones[:, 1:] - np.eye(3)
    np.testing.assert_allclose(network.features(unseen.rotations), relative.reshape(20, -1), rtol=0, atol=1e-5)


def test_khronos_finds_no_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "baked.glb").write_bytes(data)
    check = ["node", ROOT / "tests/service/formats/validate.cjs", tmp_path / "baked.glb"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, timeout=60)
    report = json.loads(done.stdout)
    assert (report["numErrors"], report["numWarnings"]) == (0, 0), report["messages"]


def test_an_engine_that_only_skins_needs_no_shapes(engine: Any, skeleton: Skeleton, mesh: Mesh) -> None:
    still = Bulging(engine, mesh)
    still._shapes = 0 * still._shapes
    baked = bake.fit(still, skeleton, mesh, bake.plausible_poses(30, None))
    assert np.abs(baked.shapes).max(initial=0) < 1e-5
    np.testing.assert_allclose(baked.mesh.vertices, mesh.vertices, rtol=0, atol=1e-5)


def test_a_library_is_mixed_within_its_own_motion(skeleton: Skeleton) -> None:
    library = bake.plausible_poses(7, None, seed=3)
    mixed = bake.plausible_poses(50, library)
    away = np.linalg.norm(mixed[:, None, 4] - library[None, :, 4], axis=(2, 3)).min(axis=1)
    assert away.max() < 0.7  # the shaking of a tenth of a radian an axis
    assert len(np.unique(mixed[:, 4, 0, 0].round(9))) > 7


def test_two_fits_are_equal_bytes(bulging: Bulging, skeleton: Skeleton, mesh: Mesh) -> None:
    fits = [bake.fit(bulging, skeleton, mesh, bake.plausible_poses(40, None)) for _ in range(2)]
    assert len({bake.write(baked, skeleton, "tiny") for baked in fits}) == 1
