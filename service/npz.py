"""Reads the arrays we ask for out of an untrusted .npz, and nothing else.

`numpy.load` must not see such bytes: a file of 193 bytes can claim 8 TiB, one of a megabyte can inflate to
gigabytes, and object arrays are pickles.  Here the zip directory is looked at first, only members of the
names asked for are opened, their header is parsed before memory is taken, and inflating stops at the size
that the header promised.
"""

import ast
import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import BodyTooLarge, NpzInvalid, NpzUnsafe

MAX_MEMBERS = 32
MAX_HEADER_BYTES = 4096
# What stands before the first member, its name, the beginning of its header; DOTALL, as all but the text is any byte.
_BEGIN = re.compile(rb"PK\x03\x04.{26}(\w{1,32})\.npy.{0,64}?\x93NUMPY.{1,128}?'shape': \((\d{1,15}), \d", re.DOTALL)
# Little-endian numbers, and text of at most 64 letters; what only a pickle could fill is not there.
_TYPE = re.compile(r"<f[248]|<i[48]|<U([1-9]|[1-5][0-9]|6[0-4])")


def read_npz(data: bytes, names: Collection[str], max_bytes: int) -> dict[str, NDArray[Any]]:
    """The arrays of `names` that the archive holds; members of other names are not opened.

    Args:
        data: the archive.
        max_bytes: the arrays together may not be larger.

    Raises:
        NpzUnsafe: an array asked for is pickled, or of a type that is not plain numbers or short text.
        NpzInvalid: not a zip archive, too many members, a damaged member, an odd header.
        BodyTooLarge: the arrays say, or turn out, to be larger than `max_bytes`.
    """
    if data[:1] == b"\x80":
        raise NpzUnsafe("the body is a pickle; save plain arrays with numpy.savez")
    # The end record, before zipfile builds objects: 20,000 members cost seconds.
    end = data.rfind(b"PK\x05\x06", max(0, len(data) - 65_557))
    if end < 0 or end + 22 > len(data):
        raise NpzInvalid("the body is not a zip archive, which every .npz is")
    # A 64-bit locator before it would let zipfile believe other numbers than these.
    if data[max(0, end - 20) : end].startswith(b"PK\x06\x07"):
        raise NpzInvalid("the archive is of the 64-bit form, which no .npz within the limits needs")
    count = struct.unpack_from("<H", data, end + 10)[0]
    directory_bytes = struct.unpack_from("<I", data, end + 12)[0]
    if count > MAX_MEMBERS or directory_bytes > MAX_MEMBERS * 512:
        raise NpzInvalid(f"expected at most {MAX_MEMBERS} arrays, got {count}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS:
                raise NpzInvalid(f"expected at most {MAX_MEMBERS} arrays, got {len(members)}")
            arrays: dict[str, NDArray[Any]] = {}
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name == member.filename or name not in names:
                    continue
                if name in arrays:
                    raise NpzInvalid(f"the array {name!r} is there twice")
                room = max_bytes - sum(array.nbytes for array in arrays.values())
                arrays[name] = _read_member(archive, member, name, room)
            return arrays
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, struct.error, NotImplementedError) as error:
        raise NpzInvalid("the archive is damaged") from error
    except (ValueError, RuntimeError, OverflowError, IndexError, UnicodeError) as error:
        # zipfile on crafted directories; an encrypted member is a RuntimeError.
        raise NpzInvalid("the archive is damaged or encrypted") from error


def first_rows(data: bytes, names: Collection[str]) -> int | None:
    """How many rows the first array claims to have, if it has one of `names` and more axes than one, and is not
    compressed.  Nothing is checked."""
    begin = _BEGIN.match(data)
    return int(begin[2]) if begin and begin[1].decode() in names else None


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, room: int) -> NDArray[Any]:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise NpzInvalid(f"the array {name!r} is compressed in a way that is not read")
    with archive.open(member) as file:
        dtype, shape, fortran = _read_header(file, name)
        size = math.prod(shape) * dtype.itemsize
        if size > room:
            raise BodyTooLarge(f"the array {name!r} claims {size} bytes, above the limit", limit_bytes=room)
        content = file.read(size + 1)
    if len(content) != size:
        raise NpzInvalid(f"the array {name!r} has {len(content)} bytes or more where its header says {size}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _read_header(file: Any, name: str) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    start = file.read(8)
    if start[:6] != b"\x93NUMPY":
        if start[:1] == b"\x80" or start[:2] in (b"(d", b"(l", b"cb", b"co"):
            raise NpzUnsafe(f"the array {name!r} is a pickle; save plain arrays")
        raise NpzInvalid(f"the member {name!r} is not an array")
    if start[6:] == b"\x01\x00":
        size = struct.unpack("<H", file.read(2))[0]
    elif start[6:] in (b"\x02\x00", b"\x03\x00"):
        size = struct.unpack("<I", file.read(4))[0]
    else:
        raise NpzInvalid(f"the array {name!r} is of an unknown version of the format")
    if size > MAX_HEADER_BYTES:
        raise NpzInvalid(f"the array {name!r} has a header of {size} bytes")
    try:
        header = ast.literal_eval(file.read(size).decode("latin-1").strip())
        kind, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    except (SyntaxError, ValueError, KeyError, TypeError, MemoryError, RecursionError) as error:
        raise NpzInvalid(f"the array {name!r} has a header that cannot be read") from error
    if not isinstance(kind, str) or "O" in kind:
        raise NpzUnsafe(f"the array {name!r} holds pickled objects or records; save plain arrays")
    if not _TYPE.fullmatch(kind):
        raise NpzInvalid(f"the array {name!r} is of type {kind[:40]!r}; expected f2, f4, f8, i4, i8 or short text")
    plain = isinstance(shape, tuple) and len(shape) <= 4 and all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
    if not plain or not isinstance(fortran, bool):
        raise NpzInvalid(f"the array {name!r} has an odd shape")
    return np.dtype(kind), shape, fortran
