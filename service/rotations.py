"""Rotation matrices as quaternions and as axis-angle vectors."""

import numpy as np
from numpy.typing import NDArray


def quaternions(matrices: NDArray[np.floating]) -> NDArray[np.float64]:
    """(..., 3, 3) -> (..., 4): x y z w, unit length, of either sign."""
    m = np.asarray(matrices, np.float64)
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    x, y, z = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    xy, xz, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    # 4 q q^T: every row is the quaternion times one of its entries; the row of the largest loses no digits.
    rows = np.stack(
        [
            np.stack([1 + xx - yy - zz, xy, xz, x], -1),
            np.stack([xy, 1 - xx + yy - zz, yz, y], -1),
            np.stack([xz, yz, 1 - xx - yy + zz, z], -1),
            np.stack([x, y, z, 1 + xx + yy + zz], -1),
        ],
        -2,
    )
    best = np.diagonal(rows, axis1=-2, axis2=-1).argmax(-1)
    row = np.take_along_axis(rows, best[..., None, None], -2)[..., 0, :]
    return row / np.linalg.norm(row, axis=-1, keepdims=True)


def axis_angle(matrices: NDArray[np.floating]) -> NDArray[np.float64]:
    """(..., 3, 3) -> (..., 3), radians, at most pi long."""
    q = quaternions(matrices)
    q = np.where(q[..., 3:] < 0, -q, q)
    sine = np.linalg.norm(q[..., :3], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, q[..., 3:])
    return q[..., :3] * np.where(sine > 1e-12, angle / np.maximum(sine, 1e-12), 2.0)


def from_quaternions(wxyz: NDArray[np.floating]) -> NDArray[np.float64]:
    """(..., 4), w first, of any length above zero -> (..., 3, 3)."""
    w, x, y, z = np.moveaxis(wxyz / np.linalg.norm(wxyz, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)
