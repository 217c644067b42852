"""Makes the golden poses of the JavaScript skeleton: `.venv/bin/python tests/golden/skeleton/make.py`.

The bundled avatar's bones in three poses, and its skin on them, as `service/bundle/skeleton.py` computes them.
"""

import json
from pathlib import Path

import numpy as np

from service.bundle.glb import read_mesh
from service.bundle.manifest import Manifest
from service.bundle.skeleton import axis_angle_to_matrix

HERE = Path(__file__).parent
AVATAR = HERE.parents[2] / "avatars/open"
SKINNED = slice(None, None, 500)
"""Vertices of the preview mesh that are kept."""


def main() -> None:
    manifest = Manifest.model_validate_json((AVATAR / "avatar.json").read_bytes())
    skeleton, mesh = manifest.skeleton.skeleton(), read_mesh((AVATAR / "mesh.preview.glb").read_bytes())
    assert mesh.skin_joints is not None
    assert mesh.skin_weights is not None
    rng = np.random.default_rng(7)
    poses = np.stack([np.zeros((24, 3)), rng.normal(0, 0.5, (24, 3)), rng.normal(0, 2.0, (24, 3))])
    translations = rng.normal(0, 1.0, (3, 3))
    rotations = axis_angle_to_matrix(poses)
    roots = skeleton.root_transforms(rotations, translations).astype(np.float64)
    bones = roots[:, None] @ skeleton.bone_transforms(rotations)
    vertices, joints, weights = (a[SKINNED] for a in (mesh.vertices, mesh.skin_joints, mesh.skin_weights))
    points = np.concatenate([vertices, np.ones((len(vertices), 1))], axis=1)
    skinned = np.einsum("vk,fvkab,vb->fva", weights, bones[:, joints], points)[..., :3]
    golden = {
        "skeleton": {name: getattr(skeleton, name).tolist() for name in ("rest_joints", "canonical_pose")}
        | {"parents": list(skeleton.parents)},
        "canonical": vertices.tolist(),
        "joints": joints.tolist(),
        "weights": weights.tolist(),
        "poses": poses.reshape(3, 72).tolist(),
        "translations": translations.tolist(),
        "bones": bones[:, :, :3].reshape(3, -1).tolist(),
        "skinned": skinned.tolist(),
    }
    (HERE / "expected.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
