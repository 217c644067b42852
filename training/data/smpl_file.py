"""Read the SMPL or SMPL-H model file that a user has, `.npz` or `.pkl`, without running anything that is in it.

A `.pkl` is read by an unpickler that builds nothing: every object in the file becomes an inert stand-in that keeps
what the file says of it, and arrays are made from those words afterwards.  A name that no SMPL file needs is refused.
Reference: Loper et al., "SMPL", 2015, eqs. 1-8; Romero et al., "Embodied Hands" (SMPL-H), 2017.
"""

import pickle
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from service.bundle.skeleton import SMPL_PARENTS, Skeleton, axis_angle_to_matrix
from training.data.body import skin
from training.data.subject import SubjectError

KEYS = ("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "f", "kintree_table")
BODY_JOINTS = 22
"""Joints 0 to 21 are the same in SMPL and SMPL-H; then SMPL has two hands, SMPL-H twice fifteen finger joints."""
FINGERS = (slice(22, 37), slice(37, 52))
"""SMPL-H: index, middle, pinky, ring and thumb of the left hand, then of the right; three joints each."""
KNUCKLES = ([22, 25, 28, 31], [37, 40, 43, 46])
"""SMPL-H: the first joints of the four fingers; SMPL's hand joint lies between them."""
KNOWN_NAMES = (
    r"(numpy|scipy\.sparse|chumpy)\.|_codecs\.encode$"
    r"|(__builtin__|builtins)\.(set|object)$|(copy_reg|copyreg)\._reconstructor$"  # Python 2's and 3's names
)
"""What the published pickles speak of; a stand-in takes the place of each."""
SMPL_H_PARENTS = (
    *SMPL_PARENTS[:BODY_JOINTS],
    *(parent for wrist, fingers in zip((20, 21), FINGERS, strict=True)
      for first in range(fingers.start, fingers.stop, 3) for parent in (wrist, first, first + 1)),
)  # fmt: skip


@dataclass(frozen=True)
class SmplModel:
    """A body model with SMPL's 24 joints; metres, y up, T-pose."""

    template: NDArray[np.float64]
    """(V, 3)"""
    shape_blend: NDArray[np.float64]
    """(V, 3, S): displacement by each shape number."""
    pose_blend: NDArray[np.float64]
    """(V, 3, 207): displacement by the entries of R_j - 1 of joints 1 to 23, row by row."""
    joint_regressor: NDArray[np.float64]
    """(24, V)"""
    weights: NDArray[np.float64]
    """(V, 24), rows sum to 1."""
    faces: NDArray[np.int32]
    """(T, 3)"""

    def shaped(self, betas: NDArray[np.floating]) -> NDArray[np.float64]:
        """(V, 3): the T-pose body of these shape numbers; those that the file has no displacement for are left out."""
        count = min(len(betas), self.shape_blend.shape[2])
        return self.template + self.shape_blend[..., :count] @ betas[:count]

    def rest_joints(self, shaped: NDArray[np.floating]) -> NDArray[np.float64]:
        """(24, 3): the joints of a T-pose body (V, 3)."""
        return self.joint_regressor @ shaped

    def posed(
        self, shaped: NDArray[np.floating], pose: NDArray[np.floating], translation: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """(V, 3): a T-pose body (V, 3) under one pose (24, 3), axis-angle, and a root translation (3,)."""
        rotations = axis_angle_to_matrix(pose)
        transforms = Skeleton.smpl(self.rest_joints(shaped))._rest_to_posed(rotations[None])[0]
        points = shaped + self.pose_blend @ (rotations[1:] - np.eye(3)).ravel()
        return skin(points, self._sparse_weights, transforms) + translation

    @cached_property
    def _sparse_weights(self) -> sparse.csr_array:
        return sparse.csr_array(self.weights)


def read_smpl_file(path: str | Path) -> SmplModel:
    """Read an SMPL (24 joints) or SMPL-H (52 joints) model file as its authors publish it.

    SMPL-H is reduced to SMPL's joints: the fingers become one rigid, flat hand that hangs on the wrist, its joint
    between the knuckles.  With the fingers at rest this is SMPL-H exactly.

    Raises:
        SubjectError: the file holds something else, or asks for code that no such file needs.
    """
    path = Path(path)
    if not path.is_file():
        raise SubjectError(f"expected a model file {path}, got none")
    readers = {".npz": _read_npz, ".pkl": _read_pickle}
    if path.suffix.lower() not in readers:
        raise SubjectError(f"{path}: expected a model file .npz or .pkl, got {path.suffix or 'no suffix'}")
    try:
        return _model(readers[path.suffix.lower()](path))
    except SubjectError as error:
        raise SubjectError(f"{path}: {error}") from error
    except Exception as error:  # a broken zip, pickle or array raises whatever its parser met
        raise SubjectError(f"{path}: expected an SMPL or SMPL-H model file: {type(error).__name__} {error}") from error


def _model(arrays: dict[str, NDArray[Any]]) -> SmplModel:
    template, shape_blend, pose_blend, regressor, weights = (
        _finite(arrays[key], key) for key in ("v_template", "shapedirs", "posedirs", "J_regressor", "weights")
    )
    vertices, joints = len(template), weights.shape[-1]
    parents = {24: SMPL_PARENTS, 52: SMPL_H_PARENTS}.get(joints)
    if parents is None:
        raise SubjectError(f"expected a model with 24 (SMPL) or 52 (SMPL-H) joints, got {joints}")
    expected = {
        "v_template": (vertices, 3), "shapedirs": (vertices, 3, shape_blend.shape[-1]),
        "posedirs": (vertices, 3, 9 * (joints - 1)), "J_regressor": (joints, vertices), "weights": (vertices, joints),
        "kintree_table": (2, joints), "f": (len(arrays["f"]), 3),
    }  # fmt: skip
    for key, shape in expected.items():
        if arrays[key].shape != shape:
            raise SubjectError(f"expected {key} {shape}, got {arrays[key].shape}")
    if tuple(arrays["kintree_table"][0, 1:].tolist()) != parents[1:]:  # the root's parent is a number out of range
        raise SubjectError(f"expected the tree of joints of SMPL or SMPL-H, got {arrays['kintree_table'][0].tolist()}")
    faces = arrays["f"].astype(np.int64)
    if faces.size == 0 or faces.min() < 0 or faces.max() >= vertices:
        raise SubjectError(f"expected faces of vertices 0..{vertices - 1}, got others")
    if weights.min() < 0 or np.abs(weights.sum(1) - 1).max() > 1e-3:
        raise SubjectError("expected skinning weights that are positive and sum to 1, got others")
    if joints == len(SMPL_H_PARENTS):
        regressor = np.concatenate([regressor[:BODY_JOINTS], [regressor[rows].mean(0) for rows in KNUCKLES]])
        hands = [weights[:, fingers].sum(1, keepdims=True) for fingers in FINGERS]
        weights = np.concatenate([weights[:, :BODY_JOINTS], *hands], 1)
        bent = 9 * (BODY_JOINTS - 1)  # flat hands bend nothing
        pose_blend = np.concatenate([pose_blend[..., :bent], np.zeros((vertices, 3, 18))], 2)
    weights = weights / weights.sum(1, keepdims=True)
    return SmplModel(template, shape_blend, pose_blend, regressor, weights, faces.astype(np.int32))


def _finite(array: NDArray[Any], key: str) -> NDArray[np.float64]:
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise SubjectError(f"expected finite numbers in {key}, got others")
    return array.astype(np.float64)


def _required(names: Any) -> None:
    missing = [key for key in KEYS if key not in names]
    if missing:
        raise SubjectError(f"expected the arrays {', '.join(KEYS)}, got none named {', '.join(missing)}")


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    # Only what is needed: some published files hold Python objects under other names.
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        _required(archive)
        return {key: archive[key] for key in KEYS}


class _Inert:
    """Stands in for an object of a pickle: keeps how it was to be made, and its state, and does nothing."""

    args: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *args: Any) -> "_Inert":
        kept = object.__new__(cls)
        kept.args = args
        return kept

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def kind(self) -> str:
        """The name of the class or function in the file."""
        if type(self).__name__ == "_reconstructor":  # how the oldest protocol says "an object of this class"
            return self.args[0].__name__
        return type(self).__name__


class _InertUnpickler(pickle.Unpickler):
    """Turns every class and function of a pickle into a stand-in, so that nothing in the file is ever called."""

    def find_class(self, module: str, name: str) -> Any:
        if not re.match(KNOWN_NAMES, f"{module}.{name}"):
            raise SubjectError(f"refused, nothing was run: it asks for {module}.{name}, which no SMPL file needs")
        return type(name, (_Inert,), {})


def _read_pickle(path: Path) -> dict[str, NDArray[Any]]:
    with path.open("rb") as stream:
        content = _InertUnpickler(stream, encoding="latin1").load()
    if not isinstance(content, dict):
        raise SubjectError(f"expected a dictionary of arrays, got {type(content).__name__}")
    _required(content)
    return {key: _array(content[key]) for key in KEYS}


def _array(value: Any) -> NDArray[Any]:
    """The array that a stand-in describes: numpy's, a sparse matrix, or a chumpy node that only holds one."""
    if not isinstance(value, _Inert):
        raise SubjectError(f"expected an array, got {type(value).__name__}")
    kind, state = value.kind(), value.state
    if kind == "_reconstruct":  # numpy before protocol 5: (version, shape, dtype, column by column, bytes)
        shape, dtype, by_column, content = state[-4:]
        return _from_bytes(content, dtype, shape, "F" if by_column else "C")
    if kind == "_frombuffer":
        return _from_bytes(*value.args)
    if kind in ("csc_matrix", "csr_matrix", "csc_array", "csr_array"):
        build = sparse.csc_array if kind.startswith("csc") else sparse.csr_array
        matrix = build(tuple(_array(state[key]) for key in ("data", "indices", "indptr")), shape=state["_shape"])
        matrix.check_format(full_check=True)  # an index out of range would write beyond the array
        return matrix.toarray()
    if kind == "Ch":
        return _array(state["x"])
    if kind == "Select":
        return _array(state["a"]).ravel()[_array(state["idxs"])].reshape(state["preferred_shape"])
    raise SubjectError(f"expected an array, got an object of {kind}")


def _from_bytes(content: Any, dtype: _Inert, shape: tuple[int, ...], order: Any) -> NDArray[Any]:
    if isinstance(content, _Inert):  # Python 3 writes bytes for Python 2 as _codecs.encode(text, "latin1")
        content = content.args[0]
    if isinstance(content, str):
        content = content.encode("latin1")
    code = dtype.args[0]
    if not re.fullmatch(r"[fiu][1248]", code):
        raise SubjectError(f"expected arrays of numbers, got {code!r}")
    return np.frombuffer(content, np.dtype(code).newbyteorder(dtype.state[1])).reshape(shape, order=order)
