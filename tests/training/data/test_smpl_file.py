"""Model files: every published form arrives as the same body, SMPL-H is SMPL with flat hands, and nothing is run."""

import os
import pickle
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
from scipy import sparse

from training.data.smpl_file import KEYS, KNUCKLES, SmplModel, read_smpl_file
from training.data.subject import SubjectError


class Ch:
    """As chumpy keeps a variable."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x
        self._dirty_vars = {"x"}


class Select:
    """As chumpy keeps a selection of a variable's entries."""

    def __init__(self, a: Ch, idxs: np.ndarray, preferred_shape: tuple[int, ...]) -> None:
        self.a, self.idxs, self.preferred_shape = a, idxs, preferred_shape


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2, numpy and scipy of 2015 wrote: byte strings, and modules by their names of then."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value: bytes | str) -> None:
        content = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string

    def save_global(self, obj, name=None) -> None:
        module = {
            "numpy._core.multiarray": "numpy.core.multiarray", "scipy.sparse._csc": "scipy.sparse.csc",
            "builtins": "__builtin__", "copyreg": "copy_reg",
        }.get(obj.__module__, obj.__module__)  # fmt: skip
        self.write(pickle.GLOBAL + f"{module}\n{name or obj.__name__}\n".encode())
        self.memoize(obj)

    for kind in (type(len), type(lambda: 0), type):
        dispatch[kind] = save_global


def with_chumpy(arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The official file's contents: chumpy objects, a sparse regressor and words beside the arrays."""
    monkeypatch.setitem(sys.modules, "chumpy", ModuleType("chumpy"))
    for name, cls in (("chumpy.ch", Ch), ("chumpy.reordering", Select)):
        monkeypatch.setattr(cls, "__module__", name)
        module = ModuleType(name)
        setattr(module, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, name, module)
    order = np.random.default_rng(0).permutation(arrays["posedirs"].size)
    shuffled = np.empty(arrays["posedirs"].size)
    shuffled[order] = arrays["posedirs"].ravel()
    return {
        **arrays,
        "J_regressor": sparse.csc_matrix(arrays["J_regressor"]),
        "shapedirs": Ch(arrays["shapedirs"]),
        "posedirs": Select(Ch(shuffled), order, arrays["posedirs"].shape),
        "v_template": np.asfortranarray(arrays["v_template"]),
        "weights": arrays["weights"].astype(">f8"),
        "bs_style": "lbs",
        "pose_training_info": {"subjects": ["a", "b"]},
        "J": Ch(np.zeros((24, 3))),
    }


def assert_same(model: SmplModel, arrays: dict[str, np.ndarray]) -> None:
    for field, key in (("template", "v_template"), ("shape_blend", "shapedirs"), ("pose_blend", "posedirs"),
                       ("joint_regressor", "J_regressor"), ("weights", "weights"), ("faces", "f")):  # fmt: skip
        np.testing.assert_allclose(getattr(model, field), arrays[key], atol=1e-12, err_msg=field)


@pytest.mark.parametrize("form", ["npz", "python 2", 0, 2, 4, 5])
def test_every_form_of_the_file_is_the_same_body(
    smpl_arrays: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str | int
) -> None:
    path = tmp_path / ("model.npz" if form == "npz" else "model.pkl")
    if form == "npz":
        extra = np.array([{"a": "Python object"}], object)  # published files hold such things under other names
        np.savez(path, **smpl_arrays, pose_training_info=extra)
    else:
        with monkeypatch.context() as patch, path.open("wb") as stream:
            pickler = Python2Pickler(stream, 2) if form == "python 2" else pickle.Pickler(stream, int(form))
            pickler.dump(with_chumpy(smpl_arrays, patch))
        assert "chumpy.ch" not in sys.modules
    assert_same(read_smpl_file(path), smpl_arrays)


def test_a_body_is_posed_by_smpls_equations(smpl_arrays: dict[str, np.ndarray], tmp_path: Path, pose_smpl) -> None:
    np.savez(tmp_path / "model.npz", **smpl_arrays)
    model = read_smpl_file(tmp_path / "model.npz")
    rng = np.random.default_rng(2)
    betas, pose, translation = rng.normal(size=16), rng.normal(0, 0.5, (24, 3)), rng.normal(size=3)
    shaped = smpl_arrays["v_template"] + np.einsum("vcs,s->vc", smpl_arrays["shapedirs"], betas[:10])
    np.testing.assert_allclose(model.shaped(betas), shaped, atol=1e-12)
    expected = pose_smpl(smpl_arrays, shaped, pose, translation)
    np.testing.assert_allclose(model.posed(shaped, pose, translation), expected, atol=1e-6)


def test_smpl_h_is_reduced_to_smpl_with_flat_hands(
    smplh_arrays: dict[str, np.ndarray], tmp_path: Path, pose_smpl
) -> None:
    np.savez(tmp_path / "model.npz", **smplh_arrays)
    model = read_smpl_file(tmp_path / "model.npz")
    assert model.weights.shape[1] == 24
    assert model.shape_blend.shape[2] == 16
    rest, joints = smplh_arrays["v_template"], smplh_arrays["J_regressor"] @ smplh_arrays["v_template"]
    for hand, knuckles in zip((22, 23), KNUCKLES, strict=True):
        np.testing.assert_allclose(model.rest_joints(rest)[hand], joints[knuckles].mean(0), atol=1e-12)
    pose, translation = np.zeros((52, 3)), np.array([0.1, 0.2, 0.3])
    pose[:22] = np.random.default_rng(3).normal(0, 0.5, (22, 3))
    expected = pose_smpl(smplh_arrays, rest, pose, translation)
    np.testing.assert_allclose(model.posed(rest, pose[:24], translation), expected, atol=1e-6)


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["beside", "as an array", "in an array", "in chumpy"])
@pytest.mark.parametrize("function", [os.mkdir, eval, getattr])
def test_a_file_that_would_run_something_is_refused_and_runs_nothing(
    smpl_arrays: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, function
) -> None:
    marker = tmp_path / "ran"
    arguments = {os.mkdir: (str(marker),), eval: (f"__import__('os').mkdir({str(marker)!r})",), getattr: (os, "mkdir")}
    evil = Evil(function, *arguments[function]) if function is not getattr else Evil(function, "text", "upper")
    with monkeypatch.context() as patch, (tmp_path / "model.pkl").open("wb") as stream:
        content = with_chumpy(smpl_arrays, patch)
        hidden = {
            "beside": {"bs_type": evil}, "as an array": {"weights": evil},
            "in an array": {"weights": np.array([evil], object)}, "in chumpy": {"shapedirs": Ch(evil)},  # pyright: ignore[reportArgumentType]
        }[where]  # fmt: skip
        pickle.dump(content | hidden, stream)
    with pytest.raises(SubjectError, match=rf"refused, nothing was run: it asks for \w+\.{function.__name__}"):
        read_smpl_file(tmp_path / "model.pkl")
    assert not marker.exists()


def test_even_a_known_name_is_never_called(smpl_arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    """`numpy.savetxt` is numpy's, and would write where the file says."""
    marker = tmp_path / "ran"
    content = {**smpl_arrays, "note": Evil(np.savetxt, str(marker), [1.0])}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content))
    assert_same(read_smpl_file(tmp_path / "model.pkl"), smpl_arrays)
    assert not marker.exists()


def beyond(arrays: dict[str, np.ndarray]) -> dict[str, object]:
    """A sparse matrix with an index out of range, which scipy would write beyond the array."""
    matrix = sparse.csc_matrix(arrays["J_regressor"])
    matrix.indices = matrix.indices + 10**6
    return {"J_regressor": matrix}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"weights": a["weights"][:, :22]}, r"24 \(SMPL\) or 52 \(SMPL-H\) joints, got 22"),
        (lambda a: {"weights": a["weights"] * 2}, "sum to 1"),
        (lambda a: {"v_template": a["v_template"][:-1]}, "expected"),
        (lambda a: {"posedirs": a["posedirs"][..., :9]}, "expected posedirs"),
        (lambda a: {"v_template": a["v_template"] * np.nan}, "finite numbers in v_template"),
        (lambda a: {"f": a["f"] + 10**6}, "faces of vertices"),
        (lambda a: {"kintree_table": a["kintree_table"][:, ::-1]}, "tree of joints"),
        (lambda a: {"weights": np.array([["a"]])}, "arrays of numbers, got 'U1'"),
        (lambda a: {"weights": np.array([None])}, "arrays of numbers, got 'O8'"),
        (lambda a: {"weights": [1.0]}, "expected an array, got list"),
        (lambda a: {"weights": {1}}, "expected an array, got set"),
        (beyond, "expected an SMPL or SMPL-H model file"),
        (lambda a: {"weights": None, "f": None, "new": 1}, "expected an array, got NoneType"),
    ],
)
def test_other_contents_are_refused(smpl_arrays: dict[str, np.ndarray], tmp_path: Path, change, message: str) -> None:
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({**smpl_arrays, **change(smpl_arrays)}))
    with pytest.raises(SubjectError, match=message):
        read_smpl_file(tmp_path / "model.pkl")


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_array_is_named(smpl_arrays: dict[str, np.ndarray], tmp_path: Path, key: str) -> None:
    rest = {name: array for name, array in smpl_arrays.items() if name != key}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(rest))
    np.savez(tmp_path / "model.npz", **rest)
    for suffix in ("pkl", "npz"):
        with pytest.raises(SubjectError, match=f"got none named {key}"):
            read_smpl_file(tmp_path / f"model.{suffix}")


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps([1]), pickle.dumps({})[:-1], b"PK\x03\x04 broken"])
@pytest.mark.parametrize("suffix", ["pkl", "npz", "txt"])
def test_other_files_are_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    with pytest.raises(SubjectError, match=rf"model\.{suffix}: expected"):
        read_smpl_file(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SubjectError, match="got none"):
        read_smpl_file(tmp_path / "model.pkl")
