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
from service.bake_network import features
from service.bundle.glb import Mesh
from service.bundle.skeleton import Skeleton, axis_angle_to_matrix
from service.poses import PoseSequence
from tests.service.formats.player import Player

ROOT = Path(__file__).parents[2]


class Bulging:
    """Skinning whose canonical surface swells with the pose, as a PIN's does: what a baked file must learn."""

    device, provider, alone_up_to = "cpu", "numpy", 0

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._shapes = np.random.default_rng(4).normal(0, 0.01, (6, *mesh.vertices.shape))
        self._row = {vertex.tobytes(): n for n, vertex in enumerate(mesh.vertices)}

    def repose(
        self,
        canonical_vertices: NDArray[np.float32],
        bone_transforms: NDArray[np.float32],
        root_transforms: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Of any vertices of the mesh, in any order."""
        mesh, result = self._mesh, []
        assert mesh.skin_joints is not None
        assert mesh.skin_weights is not None
        rows = [self._row[vertex.tobytes()] for vertex in canonical_vertices]
        for bone, root in zip(bone_transforms, root_transforms, strict=True):
            turned = bone[[0, 0, 13, 14, 16, 3], :3, :3].swapaxes(1, 2) @ bone[[1, 2, 16, 17, 18, 6], :3, :3]
            bend = turned.reshape(6, 9)[:, [1, 5, 3, 3, 2, 1]].diagonal()
            points = canonical_vertices + np.tensordot(bend, self._shapes[:, rows], 1)
            matrices = np.einsum("vk,vkab->vab", mesh.skin_weights[rows], bone[mesh.skin_joints[rows]])
            posed = np.einsum("vab,vb->va", matrices[:, :3, :3], points) + matrices[:, :3, 3]
            result.append(posed @ root[:3, :3].T + root[:3, 3])
        return np.array(result, np.float32)


@pytest.fixture(scope="module")
def mesh(bundle_parts: Any) -> Mesh:
    return bundle_parts["meshes"]["preview"]


@pytest.fixture(scope="module")
def bulging(mesh: Mesh) -> Bulging:
    return Bulging(mesh)


@pytest.fixture(scope="module")
def unseen() -> PoseSequence:
    rotations = bake.plausible_poses(20, None, seed=99)
    moved = np.random.default_rng(1).normal(0, 1, (20, 3))
    return PoseSequence(rotations.astype(np.float32), moved.astype(np.float32), 30.0, "y", "m", "matrix")


@pytest.fixture(scope="module")
def data(bulging: Bulging, skeleton: Skeleton, mesh: Mesh, unseen: PoseSequence) -> bytes:
    baked = bake.fit(bulging, skeleton, mesh, bake.plausible_poses(300, None))
    return bake.write(baked, skeleton, "tiny", unseen)


def test_unseen_poses_are_reproduced(
    data: bytes, bulging: Bulging, skeleton: Skeleton, mesh: Mesh, unseen: PoseSequence
) -> None:
    mean, p99, _ = errors_mm(data, bulging, skeleton, mesh, unseen)
    assert mean < 1.5
    assert p99 < 6
    nothing = replace(bake.read(data), mesh=mesh, shapes=np.zeros_like(bake.read(data).shapes))
    bare = bake.write(nothing, skeleton, "tiny")
    assert errors_mm(bare, bulging, skeleton, mesh, unseen)[0] > 4 * mean  # what plain skinning is off


def test_the_clip_plays_what_the_evaluator_gives(data: bytes, skeleton: Skeleton, unseen: PoseSequence) -> None:
    player = Player(data)
    for n, vertices in enumerate(bake.evaluate(data, skeleton, unseen)):
        np.testing.assert_allclose(player.vertices(n), vertices, rtol=0, atol=5e-5)


def test_features_are_those_of_relative_bones(data: bytes, skeleton: Skeleton, unseen: PoseSequence) -> None:
    """The field PIN's own features: R_parent^T R_j - 1 of the bone transforms."""
    network = bake.read(data).network
    bones = skeleton.bone_transforms(unseen.rotations)[..., :3, :3].astype(np.float64)
    relative = bones[:, list(skeleton.parents[1:])].swapaxes(-1, -2) @ bones[:, 1:] - np.eye(3)
    found = features(network.before, network.after, unseen.rotations)
    np.testing.assert_allclose(found, relative.reshape(20, -1), rtol=0, atol=1e-5)


def test_khronos_finds_no_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "baked.glb").write_bytes(data)
    check = ["node", ROOT / "tests/service/formats/validate.cjs", tmp_path / "baked.glb"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, timeout=60)
    report = json.loads(done.stdout)
    assert (report["numErrors"], report["numWarnings"]) == (0, 0), report["messages"]


def test_an_engine_that_only_skins_needs_no_shapes(skeleton: Skeleton, mesh: Mesh, unseen: PoseSequence) -> None:
    still = Bulging(mesh)
    still._shapes = 0 * still._shapes
    baked = bake.fit(still, skeleton, mesh, bake.plausible_poses(30, None))
    np.testing.assert_allclose(baked.mesh.vertices, mesh.vertices, rtol=0, atol=1e-5)
    assert errors_mm(bake.write(baked, skeleton, "tiny"), still, skeleton, mesh, unseen)[2] < 0.01


def test_a_library_is_mixed_within_its_own_motion_and_its_mirror_image() -> None:
    library = np.tile(np.eye(3), (4, 24, 1, 1))
    library[:2, 4] = axis_angle_to_matrix(np.array([1.5, 0.0, 0.0]))  # the left knee, forwards
    library[:2, 18] = axis_angle_to_matrix(np.array([0.0, 1.5, 0.0]))  # the left elbow
    mixed = bake.plausible_poses(400, library)

    def turned(joint: int, vector: list[float]) -> NDArray[np.bool_]:
        expected = axis_angle_to_matrix(np.array(vector))
        return np.linalg.norm(mixed[:, joint] - expected, axis=(1, 2)) < 0.9

    for joint, bent in {4: [1.5, 0, 0], 5: [1.5, 0, 0], 18: [0, 1.5, 0], 19: [0, -1.5, 0], 16: [0, 0, 0]}.items():
        still, moved = turned(joint, [0, 0, 0]), turned(joint, bent)
        assert (still | moved).mean() > 0.98
        assert moved.mean() > 0.1
    assert (turned(4, [1.5, 0, 0]) & turned(18, [0, 0, 0])).any(), "upper and lower bodies are never mixed"
    assert (turned(4, [1.5, 0, 0]) & turned(5, [1.5, 0, 0])).any(), "legs are never mixed"
    assert len(np.unique(mixed[:, 4, 0, 0].round(9))) > 350, "poses are not shaken"


def test_poses_beyond_those_of_the_shapes_are_weighed_by_some_vertices(
    bulging: Bulging, skeleton: Skeleton, mesh: Mesh, unseen: PoseSequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bake, "SHAPE_POSES", 60)
    monkeypatch.setattr(bake, "SHAPES", 8)
    asked: list[tuple[int, int]] = []

    class Watched(Bulging):
        def repose(self, canonical_vertices: Any, bone_transforms: Any, root_transforms: Any) -> NDArray[np.float32]:
            asked.append((len(canonical_vertices), len(bone_transforms)))
            return super().repose(canonical_vertices, bone_transforms, root_transforms)

    baked = bake.fit(Watched(mesh), skeleton, mesh, bake.plausible_poses(300, None))
    frames = {vertices: sum(f for v, f in asked if v == vertices) for vertices, _ in asked}
    assert frames == {len(mesh.vertices): 60, 64: 240}
    mean, p99, _ = errors_mm(bake.write(baked, skeleton, "tiny"), bulging, skeleton, mesh, unseen)
    assert mean < 1.5
    assert p99 < 6


def test_two_fits_are_equal_bytes(bulging: Bulging, skeleton: Skeleton, mesh: Mesh) -> None:
    fits = [bake.fit(bulging, skeleton, mesh, bake.plausible_poses(40, None)) for _ in range(2)]
    assert len({bake.write(baked, skeleton, "tiny") for baked in fits}) == 1
