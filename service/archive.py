"""Takes a bundle out of an untrusted zip or tar: plain files of the names a bundle has, and nothing else.

Names are compared, never followed, so no archive can write anywhere else; links, devices, names that differ in case
only and files within folders are all just unknown names or kinds.  Bytes are counted while they are inflated.
"""

import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import IO, Literal

from service.errors import BodyTooLarge, BundleInvalid

ArchiveKind = Literal["zip", "tar"]
MAX_MEMBERS = 16
_NAME = re.compile(r"avatar\.json|checkpoint\.safetensors|repose(\.[a-z]{1,16})?\.onnx|mesh\.[a-z]{1,16}\.glb")
"""The manifest says which of them there must be; `read_bundle` compares."""
_CHUNK = 1 << 20
_MAX_TAR_EXTENSION_BYTES = 1 << 16


def unpack(archive: IO[bytes], kind: ArchiveKind, folder: Path, max_bytes: int) -> None:
    """Write the files of a bundle into the empty folder `folder`.

    Args:
        archive: the archive as a seekable file.
        folder: named after the avatar; in the archive, files may lie in a folder of that name.
        max_bytes: of all files together.

    Raises:
        BundleInvalid: not such an archive, or one that holds anything but plain files of a bundle, each once.
        BodyTooLarge: the files are larger than `max_bytes` together.
        OSError: they cannot be written.
    """
    writer = _Writer(folder, max_bytes)
    try:
        (_unpack_zip if kind == "zip" else _unpack_tar)(archive, writer)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, struct.error, NotImplementedError) as error:
        raise BundleInvalid(f"the {kind} is damaged") from error
    except (ValueError, RuntimeError, OverflowError, IndexError) as error:
        # zipfile on crafted directories; an encrypted member is a RuntimeError.
        raise BundleInvalid(f"the {kind} is damaged or encrypted") from error


class _Writer:
    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes, self._room = folder, max_bytes, max_bytes
        self._members = 0
        self._names: set[str] = set()

    def name_of(self, path: str, *, is_folder: bool) -> str | None:
        """The file's name; None for the folder that may hold them all."""
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise BundleInvalid(f"expected at most {MAX_MEMBERS} files")
        path = path.removeprefix("./")
        if is_folder and path.rstrip("/") in ("", ".", self._folder.name):
            return None
        name = path.removeprefix(f"{self._folder.name}/")
        if is_folder or not _NAME.fullmatch(name):
            raise BundleInvalid(f"expected the files of a bundle, got {path[:80]!r}")
        if name in self._names:
            raise BundleInvalid(f"{name} is there twice")
        self._names.add(name)
        return name

    def write(self, name: str, source: IO[bytes], size: int | None = None) -> None:
        """Copy `size` bytes, or all there are."""
        with open(self._folder / name, "xb") as file:
            left = self._room + 1 if size is None else size
            while left and (chunk := source.read(min(_CHUNK, left))):
                left -= len(chunk)
                self._room -= len(chunk)
                if self._room < 0:
                    raise BodyTooLarge(f"the files have more than {self._max_bytes} bytes", limit_bytes=self._max_bytes)
                file.write(chunk)
            if size is not None and left:
                raise BundleInvalid(f"{name} is cut off")
            file.flush()
            os.fsync(file.fileno())


def _unpack_zip(archive: IO[bytes], writer: _Writer) -> None:
    _check_directory(archive)
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            mode = member.external_attr >> 16
            name = writer.name_of(member.filename, is_folder=member.is_dir())
            if stat.S_IFMT(mode) not in (0, stat.S_IFDIR if member.is_dir() else stat.S_IFREG):
                raise BundleInvalid(f"{member.filename[:80]!r} is not a plain file")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BundleInvalid(f"{member.filename[:80]!r} is compressed in a way that is not read")
            if name is not None:
                with opened.open(member) as source:
                    writer.write(name, source)


def _check_directory(archive: IO[bytes]) -> None:
    """Look at the end record before zipfile makes an object of each of a million members."""
    size = archive.seek(0, 2)
    archive.seek(max(0, size - 65_557))
    tail = archive.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or end + 22 > len(tail):
        raise BundleInvalid("the body is not a zip archive")
    count, directory_bytes = struct.unpack_from("<HI", tail, end + 10)
    # A 64-bit locator before it would let zipfile believe other numbers than these.
    if tail[max(0, end - 20) : end].startswith(b"PK\x06\x07"):
        raise BundleInvalid("the zip archive is of the 64-bit form, which no bundle needs")
    if count > MAX_MEMBERS or directory_bytes > MAX_MEMBERS * 1024:
        raise BundleInvalid(f"expected at most {MAX_MEMBERS} files, got {count}")
    archive.seek(0)


def _unpack_tar(archive: IO[bytes], writer: _Writer) -> None:
    # Header by header: tarfile would take extended headers of any size into memory, and follow them.
    archive.seek(0)
    while True:
        block = archive.read(tarfile.BLOCKSIZE)
        if block == bytes(tarfile.BLOCKSIZE):
            return
        member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        padding = -member.size % tarfile.BLOCKSIZE
        if member.size < 0:
            raise BundleInvalid("a file of the tar has a negative size")
        if member.type in (tarfile.XHDTYPE, tarfile.XGLTYPE):
            # Times and owners with many digits, as common tools write them; names of ours need none.
            if member.size > _MAX_TAR_EXTENSION_BYTES:
                raise BundleInvalid("the tar has extended headers that no bundle needs")
            archive.seek(member.size + padding, 1)
            continue
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
            raise BundleInvalid(f"{member.name[:80]!r} is not a plain file")
        name = writer.name_of(member.name, is_folder=member.isdir())
        if name is not None:
            writer.write(name, archive, member.size)
            archive.seek(padding, 1)
