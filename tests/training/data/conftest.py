"""Model files in SMPL's and SMPL-H's layout, made from the open body, and an independent posing of them."""

from collections.abc import Callable

import manifold3d
import numpy as np
import pytest
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation

from training.data.body import open_body
from training.data.smpl_file import FINGERS, KNUCKLES, SMPL_H_PARENTS

Arrays = dict[str, np.ndarray]
OFFSET = np.array([0.02, 0.3, 0.1])
"""Moves the template, so that the pelvis is not at the origin, as in SMPL."""


@pytest.fixture(scope="session")
def smpl_arrays() -> Arrays:
    """What `basicModel_*.pkl` holds, 24 joints, with the open body's surface, joints and weights."""
    body = open_body()
    solid = manifold3d.Manifold(manifold3d.Mesh(body.vertices.astype(np.float32), body.faces.astype(np.uint32)))
    mesh = solid.simplify(0.01).to_mesh()
    vertices = np.array(mesh.vert_properties[:, :3], np.float64)
    weights = body.weights[KDTree(body.vertices).query(vertices)[1]]
    return _arrays(vertices, np.array(mesh.tri_verts), body.skeleton.rest_joints, weights, body.skeleton.parents)


@pytest.fixture(scope="session")
def smplh_arrays(smpl_arrays: Arrays) -> Arrays:
    """What `smplh/<gender>/model.npz` holds, 52 joints: the same body, its hands divided among fingers."""
    rng = np.random.default_rng(1)
    joints = smpl_arrays["J_regressor"] @ smpl_arrays["v_template"] - OFFSET
    weights = np.zeros((len(smpl_arrays["weights"]), 52))
    weights[:, :22] = smpl_arrays["weights"][:, :22]
    fingers = []
    for hand, (joint, wrist) in enumerate(((22, 20), (23, 21))):
        share = rng.dirichlet(np.ones(15), len(weights))
        weights[:, FINGERS[hand]] = smpl_arrays["weights"][:, [joint]] * share
        spread = rng.normal(0, 0.01, (15, 3))
        knuckles = np.array(KNUCKLES[hand]) - FINGERS[hand].start
        spread[knuckles] -= spread[knuckles].mean(0)  # so that the hand's joint is where the body has it
        fingers.append(joints[joint] + spread)
        assert SMPL_H_PARENTS[FINGERS[hand].start] == wrist
    joints = np.concatenate([joints[:22], *fingers])
    return _arrays(smpl_arrays["v_template"] - OFFSET, smpl_arrays["f"], joints, weights, SMPL_H_PARENTS, shapes=16)


@pytest.fixture(scope="session")
def pose_smpl() -> Callable[..., np.ndarray]:
    return _pose


def _arrays(vertices, faces, joints, weights, parents, shapes: int = 10) -> Arrays:
    rng = np.random.default_rng(0)
    count = len(parents)
    regressor = np.zeros((count, len(vertices)))
    for joint, near in enumerate(KDTree(vertices).query(joints, k=40)[1]):
        # The smallest weights that sum to 1 and give the joint.
        conditions = np.concatenate([vertices[near].T, np.ones((1, len(near)))])
        regressor[joint, near] = np.linalg.lstsq(conditions, [*joints[joint], 1.0])[0]
    tree = np.stack([np.array(parents) % 2**32, np.arange(count)]).astype(
        np.uint32
    )  # the root's parent is -1, unsigned
    return {
        "v_template": vertices + OFFSET, "f": faces.astype(np.uint32), "J_regressor": regressor, "weights": weights,
        "shapedirs": rng.normal(0, 0.005, (len(vertices), 3, shapes)),
        "posedirs": rng.normal(0, 0.002, (len(vertices), 3, 9 * (count - 1))), "kintree_table": tree,
    }  # fmt: skip


def _pose(arrays: Arrays, rest: np.ndarray, pose: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """SMPL's equations, joint by joint: rest (V, 3), pose (J, 3) axis-angle, translation (3,) -> (V, 3)."""
    parents = arrays["kintree_table"][0].astype(np.int32)
    joints = arrays["J_regressor"] @ rest
    rotations = Rotation.from_rotvec(pose).as_matrix()
    moved = rest + np.einsum("vck,k->vc", arrays["posedirs"], (rotations[1:] - np.eye(3)).ravel())
    turned, placed = [rotations[0]], [joints[0]]  # of each joint, in the world
    for joint in range(1, len(parents)):
        parent = parents[joint]
        turned.append(turned[parent] @ rotations[joint])
        placed.append(placed[parent] + turned[parent] @ (joints[joint] - joints[parent]))
    each = np.stack([placed[j] + (moved - joints[j]) @ turned[j].T for j in range(len(parents))])
    return np.einsum("vj,jvc->vc", arrays["weights"], each) + translation
