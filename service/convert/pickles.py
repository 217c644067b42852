"""Reads pickles, joblib dumps, torch files and pickled `.npy` without running anything that is in them, without torch.

The unpickler builds plain containers and arrays of numbers, nothing else: every class or function in the file must be
one of those that say "an array" or "a tensor", and a description of ours takes its place.  With `trust`, names that
are not known are imported and called, as `pickle.load` does: whoever wrote the file then runs code on this machine.
"""

import bz2
import gzip
import io
import lzma
import math
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPE = re.compile(r"[fiu][1248]|b1|O8?|[SU]\d{1,6}")
_STORAGES = {
    "FloatStorage": "f4", "DoubleStorage": "f8", "HalfStorage": "f2", "LongStorage": "i8", "IntStorage": "i4",
    "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?",
}  # fmt: skip


class Refused(ValueError):  # noqa: N818 - what went wrong is the name
    """The file asks for code, or is not one of the kinds that are read."""


def read_pickle(path: Path, trust: bool = False) -> Any:
    """What the file holds: dicts, lists, tuples, text, numbers and numpy arrays.

    Raises:
        Refused: it needs more than that, and `trust` was not given; or it is broken.
    """
    data = path.read_bytes()
    try:
        return _finished(_read(data, trust))
    except Refused:
        raise
    except Exception as error:  # a broken pickle raises whatever its opcodes met
        raise Refused(f"cannot be read: {type(error).__name__} {error}") from error


def _read(data: bytes, trust: bool) -> Any:
    if data[:4] == b"PK\x03\x04":
        return _read_torch_zip(data, trust)
    if data[:6] == b"\x93NUMPY":
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        if not dtype.hasobject:
            return np.load(io.BytesIO(data), allow_pickle=False)
        content = _finished(_Unpickler(file, trust).load())
        return content[0] if shape == () and isinstance(content, list) else content
    data = _inflated(data)
    file = io.BytesIO(data)
    content = _Unpickler(file, trust).load()
    return _read_torch_legacy(file, trust) if content == TORCH_MAGIC else content


def _inflated(data: bytes) -> bytes:
    """joblib compresses whole files."""
    for start, inflate in (
        (b"\x1f\x8b", gzip.decompress), (b"BZh", bz2.decompress), (b"\xfd7zXZ", lzma.decompress),
        (b"x\x01", zlib.decompress), (b"x\x5e", zlib.decompress), (b"x\x9c", zlib.decompress),
        (b"x\xda", zlib.decompress),
    ):  # fmt: skip
        if data.startswith(start):
            return inflate(data)
    return data


class _Later:
    """Stands for a value that is known when the whole file is read."""

    def value(self) -> Any:
        raise NotImplementedError


class _Dtype:
    """`numpy.dtype(code)`; its state holds the byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(code, str) or not _DTYPE.fullmatch(code.lstrip("<>|=")):
            raise Refused(f"holds an array of type {str(code)[:40]!r}; only numbers and text are read")
        self._code, self._order = code.lstrip("<>|="), code[0] if code[0] in "<>" else "<"

    def set_state(self, state: Any) -> None:
        self._order = ">" if state[1] == ">" else "<"

    @property
    def objects(self) -> bool:
        return self._code.startswith("O")

    def dtype(self) -> np.dtype[Any]:
        dtype = np.dtype(self._code)
        return dtype.newbyteorder(">") if self._order == ">" else dtype


class _Array(_Later):
    """`numpy._reconstruct(...)`, filled by its state; or `_frombuffer(...)`."""

    def __init__(self, *_: Any) -> None:
        self._content: Any = None

    @classmethod
    def from_buffer(cls, content: Any, dtype: _Dtype, shape: Any, order: str) -> "_Array":
        made = cls()
        made.set_state((shape, dtype, order == "F", content))
        return made

    @classmethod
    def scalar(cls, dtype: _Dtype, content: Any = None) -> "_Array":
        return cls.from_buffer(content, dtype, (), "C")

    def set_state(self, state: Any) -> None:
        shape, dtype, by_column, content = state[-4:]
        if dtype.objects:
            self._content = content  # a list of what the array holds
            return
        content = content.encode("latin1") if isinstance(content, str) else content
        self._content = np.frombuffer(content, dtype.dtype()).reshape(shape, order="F" if by_column else "C")

    def value(self) -> Any:
        return _finished(self._content)


class _JoblibArray(_Later):
    """joblib writes an array's numbers behind the words that describe it."""

    content: NDArray[Any]

    def read(self, state: dict[str, Any], file: IO[bytes]) -> None:
        if state["dtype"].objects:
            raise Refused("holds an array of objects in a joblib file")
        if state.get("numpy_array_alignment_bytes") is not None:
            file.read(file.read(1)[0])
        dtype, shape = state["dtype"].dtype(), state["shape"]
        size = math.prod(shape) * dtype.itemsize
        numbers = file.read(size)
        if len(numbers) != size:
            raise Refused("ends in the middle of an array")
        self.content = np.frombuffer(numbers, dtype).reshape(shape, order=state["order"])

    def value(self) -> Any:
        return self.content


class _Storage:
    """The numbers behind torch tensors; legacy files bring them after all else."""

    def __init__(self, kind: str) -> None:
        self.dtype, self.numbers = np.dtype(kind), np.zeros(0)

    def fill(self, content: bytes) -> None:
        self.numbers = np.frombuffer(content, self.dtype)


class _Tensor(_Later):
    """`torch._utils._rebuild_tensor_v2(...)`: a window on a storage."""

    def __init__(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> None:
        self._parts = storage, offset, tuple(size), tuple(stride)

    def value(self) -> NDArray[Any]:
        storage, offset, size, stride = self._parts
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if math.prod(size) == 0:
            return np.zeros(size, storage.dtype)
        if offset < 0 or min(stride, default=0) < 0 or last >= len(storage.numbers):
            raise Refused("holds a tensor that leaves its storage")
        steps = [step * storage.dtype.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage.numbers[offset:], size, steps).copy()


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise Refused(f"encodes bytes as {encoding}")
    return text.encode("latin1")


def _bytes_of_torch(data: bytes) -> Any:
    """A storage inside an ordinary pickle, as torch writes it: a file in the file."""
    return _read(data, trust=False)


def _known(module: str, name: str) -> Any:
    """What takes the place of a name in the file; None for a name that is not known."""
    if re.fullmatch(r"numpy\.(_)?core\.(multiarray|numeric)", module):
        return {"_reconstruct": _Array, "scalar": _Array.scalar, "_frombuffer": _Array.from_buffer}.get(name)
    if module == "torch" and name in _STORAGES:
        return _STORAGES[name]
    names: dict[str, Any] = {
        "numpy.dtype": _Dtype, "numpy.ndarray": "ndarray",
        "joblib.numpy_pickle.NumpyArrayWrapper": _JoblibArray,
        "torch._utils._rebuild_tensor_v2": _Tensor,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch.storage._load_from_bytes": _bytes_of_torch,
        "torch.Size": tuple,
        "collections.OrderedDict": lambda pairs=(): dict(pairs), "collections.defaultdict": lambda *_: {},
        "builtins.dict": dict, "builtins.list": list, "builtins.tuple": tuple, "builtins.set": set,
        "builtins.bytes": lambda: b"",
        "_codecs.encode": _encoded,
    }  # fmt: skip
    return names.get(f"{module.replace('__builtin__', 'builtins')}.{name}")


# The one in Python, not in C: joblib's files need its `load_build`.
_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _Unpickler(_PythonUnpickler):
    """Builds what `_known` knows."""

    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, file: IO[bytes], trust: bool, storage: Callable[[Any], _Storage] | None = None) -> None:
        super().__init__(file, encoding="latin1")
        self._file, self._trust, self._storage_of = file, trust, storage

    def find_class(self, module: str, name: str) -> Any:
        known = _known(module, name)
        if known is not None:
            return known
        if self._trust:
            return super().find_class(module, name)
        raise Refused(f"refused, nothing was run: it asks for {module}.{name}; --trust runs that, for makers you trust")

    def persistent_load(self, pid: Any) -> Any:
        if self._storage_of is None or pid[0] != "storage":
            raise Refused("points to something outside of itself")
        return self._storage_of(pid)

    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, _JoblibArray):
            made.read(state, self._file)
        elif isinstance(made, _Array | _Dtype):
            made.set_state(state)
        elif self._trust:
            self.stack.append(state)
            super().load_build()
        elif not isinstance(made, dict):  # torch keeps attributes of its OrderedDicts: not needed
            raise Refused(f"sets the state of a {type(made).__name__}")

    dispatch[pickle.BUILD[0]] = load_build


def _read_torch_zip(data: bytes, trust: bool) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if len(names) != 1:
            raise Refused("is a zip archive, but not one that torch wrote")
        root, storages = names[0].removesuffix("data.pkl"), {}
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise Refused("was written on a big-endian machine")

        def storage_of(pid: Any) -> _Storage:
            _, kind, key, *_ = pid
            if key not in storages:
                storages[key] = _Storage(kind)
                storages[key].fill(archive.read(f"{root}data/{key}"))
            return storages[key]

        return _finished(_Unpickler(io.BytesIO(archive.read(names[0])), trust, storage_of).load())


def _read_torch_legacy(file: IO[bytes], trust: bool) -> Any:
    """Before version 1.6, and inside ordinary pickles still: four more pickles, then every storage."""
    storages: dict[str, _Storage] = {}

    def storage_of(pid: Any) -> _Storage:
        _, kind, key, *_ = pid
        return storages.setdefault(key, _Storage(kind))

    for _ in range(2):  # protocol version, machine
        _Unpickler(file, trust).load()
    content = _Unpickler(file, trust, storage_of).load()
    for key in _Unpickler(file, trust).load():
        (count,) = struct.unpack("<q", file.read(8))
        storages[key].fill(file.read(count * storages[key].dtype.itemsize))
    return _finished(content)


def _finished(value: Any) -> Any:
    """The same with every description replaced by what it describes."""
    if isinstance(value, _Later):
        return value.value()
    if isinstance(value, dict):
        return {_finished(key): _finished(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_finished, value)) if type(value) in (list, tuple) else list(map(_finished, value))
    return value
