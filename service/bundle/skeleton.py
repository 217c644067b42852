"""The SMPL kinematic tree of one subject: from joint rotations to bone transforms.

Frames: y up, metres, right-handed, column vectors.  The *rest* pose is the SMPL T-pose in which every joint
rotation is the identity; the *canonical* pose is the one the avatar was learned in (the T-pose with opened
legs).  Root rotation and root translation never reach a network: the bone transforms are those of the pose
seen from the pelvis, and `root_transforms` carries the result into the world.
Reference: Loper et al., "SMPL", 2015, eqs. 2-4; Kant et al., CVPR 2023, section 3.1.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

SMPL_JOINT_NAMES = (
    "pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2", "left_ankle",
    "right_ankle", "spine3", "left_foot", "right_foot", "neck", "left_collar", "right_collar", "head",
    "left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist",
    "left_hand", "right_hand",
)  # fmt: skip
SMPL_PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
LEG_OPENING_RAD = np.pi / 6
"""The canonical pose opens each leg of the T-pose by this angle, as SNARF does."""
_AT_ONCE = 2048
"""Vectors whose matrices are computed together: what the caches of a core hold."""
_TINY = 1e-60
"""Keeps the angle above zero, and changes none that float64 could tell from zero."""


@dataclass(frozen=True)
class Skeleton:
    """Rest joints and tree of one subject; the whole of SMPL that serving needs."""

    joint_names: tuple[str, ...]
    parents: tuple[int, ...]
    """Index of each joint's parent, which comes before it; -1 for the root."""
    rest_joints: NDArray[np.float32]
    """(J, 3), joints of the T-pose, metres."""
    canonical_pose: NDArray[np.float32]
    """(J, 3), axis-angle, radians; the root's row is zero."""

    @classmethod
    def smpl(cls, rest_joints: NDArray[np.floating]) -> "Skeleton":
        """The SMPL tree with the given rest joints (24, 3) and the usual canonical pose."""
        canonical_pose = np.zeros((24, 3), np.float32)
        canonical_pose[1, 2], canonical_pose[2, 2] = LEG_OPENING_RAD, -LEG_OPENING_RAD
        return cls(SMPL_JOINT_NAMES, SMPL_PARENTS, np.asarray(rest_joints, np.float32), canonical_pose)

    @property
    def joint_count(self) -> int:
        return len(self.parents)

    def canonical_joints(self) -> NDArray[np.float64]:
        """(J, 3): the joints in the canonical pose, metres."""
        canonical = self._rest_to_posed(axis_angle_to_matrix(self.canonical_pose[None].astype(np.float64)))[0]
        return np.einsum("jab,jb->ja", canonical[:, :3, :3], self.rest_joints) + canonical[:, :3, 3]

    def bone_transforms(self, rotations: NDArray[np.floating]) -> NDArray[np.float32]:
        """B_j of each frame: canonical -> deformed as seen from the pelvis, identity in the canonical pose.

        Args:
            rotations: (F, J, 3, 3), rotation of each joint relative to its parent.  The root's is ignored.

        Returns:
            (F, J, 4, 4); the root's bone is the identity.
        """
        local = np.array(rotations, np.float64)
        local[:, 0] = np.eye(3)
        return (self._rest_to_posed(local) @ self._canonical_to_rest).astype(np.float32)

    @cached_property
    def _canonical_to_rest(self) -> NDArray[np.float64]:
        """(1, J, 4, 4): needed for every frame, so kept."""
        canonical = self._rest_to_posed(axis_angle_to_matrix(self.canonical_pose[None].astype(np.float64)))
        return np.asarray(np.linalg.inv(canonical), np.float64)

    def root_transforms(
        self, rotations: NDArray[np.floating], translation: NDArray[np.floating]
    ) -> NDArray[np.float32]:
        """(F, 4, 4): pelvis frame -> world.  Turns about the pelvis joint, then moves by `translation` (F, 3)."""
        pelvis = self.rest_joints[0].astype(np.float64)
        root = np.tile(np.eye(4), (len(rotations), 1, 1))
        root[:, :3, :3] = rotations[:, 0]
        root[:, :3, 3] = pelvis - root[:, :3, :3] @ pelvis + translation
        return root.astype(np.float32)

    def _rest_to_posed(self, rotations: NDArray[np.float64]) -> NDArray[np.float64]:
        """A_j (F, J, 4, 4): carries a T-pose point rigidly with joint j."""
        joints = self.rest_joints.astype(np.float64)
        local = np.zeros((len(rotations), self.joint_count, 4, 4))
        local[..., :3, :3] = rotations
        local[..., :3, 3] = joints - np.einsum("fjab,jb->fja", rotations, joints)
        local[..., 3, 3] = 1
        posed = np.empty_like(local)
        for joint, parent in enumerate(self.parents):
            posed[:, joint] = local[:, joint] if parent < 0 else posed[:, parent] @ local[:, joint]
        return posed


def axis_angle_to_matrix(axis_angle: NDArray[np.floating]) -> NDArray[np.float64]:
    """Rotation matrices (..., 3, 3) of axis-angle vectors (..., 3), radians (Rodrigues)."""
    vectors = np.asarray(axis_angle, np.float64)
    flat = vectors.reshape(-1, 3)
    matrices = np.empty((len(flat), 9))
    for start in range(0, len(flat), _AT_ONCE):
        rows = np.ascontiguousarray(flat[start : start + _AT_ONCE].T)  # NumPy is fast along long rows only
        angle = np.sqrt(np.einsum("ij,ij->j", rows, rows) + _TINY)
        half = 0.5 * angle
        half_sinc = np.sin(half) / half
        # cos(angle) 1 + [first]x + second v^T, where first = sin(angle) / angle v
        x, y, z = rows * (np.sin(angle) / angle)
        second = rows * (0.5 * half_sinc * half_sinc)
        entries = (second[:, None] * rows).reshape(9, -1)
        entries[::4] += np.cos(angle)
        entries[5] -= x
        entries[7] += x
        entries[2] += y
        entries[6] -= y
        entries[1] -= z
        entries[3] += z
        matrices[start : start + _AT_ONCE] = entries.T
    return matrices.reshape(*vectors.shape, 3)
