"""Makes the golden baked avatar of the JavaScript evaluator: `.venv/bin/python tests/golden/baked/make.py`.

Every 200th vertex of the bundled avatar, baked with few shapes and a small network, and its surface in three poses as
`service/bake.py: evaluate` gives it.
"""

import json
from pathlib import Path

import numpy as np

from service import bake
from service.bundle.files import read_bundle
from service.bundle.glb import Mesh
from service.bundle.skeleton import axis_angle_to_matrix
from service.engine import OnnxEngine
from service.poses import PoseSequence

HERE = Path(__file__).parent
bake.SHAPES, bake.HIDDEN = 5, (8, 6)


def main() -> None:
    bundle = read_bundle(HERE.parents[2] / "avatars/open")
    whole, some = bundle.meshes["preview"], slice(None, None, 200)
    assert whole.skin_joints is not None
    assert whole.skin_weights is not None
    mesh = Mesh(
        whole.vertices[some],
        np.array([[0, 1, 2]], np.int32),
        skin_joints=whole.skin_joints[some],
        skin_weights=whole.skin_weights[some],
    )
    baked = bake.fit(OnnxEngine(bundle.repose_onnx), bundle.skeleton, mesh, bake.plausible_poses(40, None))
    data = bake.write(baked, bundle.skeleton, "golden")
    rng = np.random.default_rng(3)
    poses, translations = rng.normal(0, 0.4, (3, 24, 3)), rng.normal(0, 1, (3, 3))
    rotations = axis_angle_to_matrix(poses)
    sequence = PoseSequence(rotations, translations, 30.0, "y", "m", "axis_angle")  # type: ignore[arg-type]
    golden = {
        "poses": poses.reshape(3, 72).tolist(),
        "translations": translations.tolist(),
        "weights": baked.network(rotations).tolist(),
        "vertices": [frame.tolist() for frame in bake.evaluate(data, bundle.skeleton, sequence)],
    }
    (HERE / "small.glb").write_bytes(data)
    (HERE / "expected.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
