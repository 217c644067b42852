"""Nothing in a pickle runs unless the user says so; broken files are refused, whatever their container."""

import builtins
import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch

from service.__main__ import main
from service.convert.pickles import Refused, read_pickle


class Trap:
    """Unpickled, it would call a function with a side effect."""

    def __reduce__(self) -> Any:
        return builtins.exec, ("import sys; sys.modules['builtins'].reposer_trap = 1",)


def write(path: Path, content: Any, container: str) -> Path:
    match container:
        case "pickle":
            path.write_bytes(pickle.dumps(content))
        case "pickle protocol 2":
            path.write_bytes(pickle.dumps(content, protocol=2))
        case "joblib":
            joblib.dump(content, path, compress=3)
        case "joblib plain":
            joblib.dump(content, path)
        case "torch":
            torch.save(content, path)
        case "torch legacy":
            torch.save(content, path, _use_new_zipfile_serialization=False)
        case "npy":
            with path.open("wb") as file:
                np.save(file, np.array(content, dtype=object), allow_pickle=True)
    return path


CONTAINERS = ("pickle", "pickle protocol 2", "joblib", "joblib plain", "torch", "torch legacy", "npy")


@pytest.mark.parametrize("container", CONTAINERS)
def test_fault_07_code_in_a_pickle_never_runs(container: str, tmp_path: Path) -> None:
    path = write(tmp_path / "trap", {"pose": Trap(), "a": np.zeros(3)}, container)
    with pytest.raises(Refused, match=r"nothing was run: it asks for (builtins|__builtin__)\.exec; --trust"):
        read_pickle(path)
    assert not hasattr(builtins, "reposer_trap")
    read_pickle(path, trust=True)  # so the trap is one
    assert builtins.reposer_trap == 1  # type: ignore[attr-defined]
    del builtins.reposer_trap  # type: ignore[attr-defined]


@pytest.mark.parametrize("container", CONTAINERS)
def test_arrays_and_plain_containers_come_back(container: str, tmp_path: Path) -> None:
    numbers = np.arange(24, dtype=np.float64).reshape(2, 3, 4)
    content = {
        "f8": numbers, "fortran": np.asfortranarray(numbers), "big": numbers.astype(">f4"), "i8": np.arange(3),
        "bool": np.array([True, False]), "scalar": np.float32(0.5), "empty": np.zeros((0, 3)), "zero-d": np.array(7),
        "view": numbers[:, ::2], "text": np.array(["male"]), "tensor": torch.arange(6.0).reshape(2, 3).T,
        "window": torch.arange(10)[3:7], "nested": [(1, "two", None), OrderedDict(a=np.ones(2))], "bytes": b"x",
    }  # fmt: skip
    read = read_pickle(write(tmp_path / "file", content, container))
    assert list(read) == list(content)
    for name, value in content.items():
        if name == "nested":
            assert read[name][0] == (1, "two", None)
            np.testing.assert_array_equal(read[name][1]["a"], [1, 1])
        elif name == "bytes":
            assert read[name] == b"x"
        else:
            np.testing.assert_array_equal(read[name], np.asarray(value), err_msg=name)
            assert np.asarray(read[name]).shape == np.asarray(value).shape, name


@pytest.mark.parametrize(
    "name", ["os.system", "numpy.load", "torch.load", "builtins.getattr", "numpy.core.multiarray.fromfile"]
)
def test_no_other_name_is_found(name: str, tmp_path: Path) -> None:
    module, _, function = name.rpartition(".")
    (tmp_path / "p.pkl").write_bytes(b"\x80\x04c" + f"{module}\n{function}\n".encode() + b"(tR.")
    with pytest.raises(Refused, match="nothing was run"):
        read_pickle(tmp_path / "p.pkl")


def test_a_tensor_outside_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"t": torch.arange(6.0)}, tmp_path / "t.pt")
    # The size (6,) in the pickle becomes (66,): the tensor would reach into foreign memory.
    with zipfile.ZipFile(tmp_path / "t.pt") as whole, zipfile.ZipFile(tmp_path / "long.pt", "w") as longer:
        for name in whole.namelist():
            content = whole.read(name)
            assert name.endswith("data.pkl") == (content.count(b"K\x06\x85") == 1)
            longer.writestr(name, content.replace(b"K\x06\x85", b"KB\x85"))
    with pytest.raises(Refused, match="leaves its storage"):
        read_pickle(tmp_path / "long.pt")


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_broken_files_are_refused(cut: int, tmp_path: Path, capsys: Any) -> None:
    file = io.BytesIO()
    pickle.dump({"pred_rotmat": np.zeros((4, 24, 3, 3)), "pred_trans": np.zeros((4, 3))}, file)
    (tmp_path / "p.pkl").write_bytes(file.getvalue()[:-cut])
    assert main(["convert", str(tmp_path / "p.pkl"), "-o", str(tmp_path / "o.npz")]) == 1
    assert "cannot be read" in capsys.readouterr().err
