"""Out of an archive come plain files of the names a bundle has, or a refusal; never anything beside the folder."""

import contextlib
import io
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.archive import MAX_MEMBERS, ArchiveKind, unpack
from service.errors import BodyTooLarge, BundleInvalid

FILES = {"avatar.json": b"{}", "repose.onnx": b"graph" * 100, "mesh.standard.glb": b"", "checkpoint.safetensors": b"c"}
LIMIT = 10_000


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1.5  # type: ignore[assignment]  # a fraction: extended headers
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


PACK: dict[ArchiveKind, Callable[[dict[str, bytes]], bytes]] = {"zip": zipped, "tar": tarred}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder `tiny`, with a neighbour that nobody may touch."""
    (tmp_path / "other").write_text("untouched")
    (tmp_path / "tiny").mkdir()
    return tmp_path / "tiny"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(folder: Path, data: bytes, kind: ArchiveKind, error: type[Exception] = BundleInvalid) -> None:
    with pytest.raises(error):
        unpack(io.BytesIO(data), kind, folder, LIMIT)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["other", "tiny"]
    assert (folder.parent / "other").read_text() == "untouched"
    assert len(contents(folder)) <= MAX_MEMBERS


@pytest.mark.parametrize("prefix", ["", "./", "tiny/", "./tiny/"])
@pytest.mark.parametrize("kind", PACK)
def test_bundles_come_out_as_they_went_in(folder: Path, kind: ArchiveKind, prefix: str) -> None:
    unpack(io.BytesIO(PACK[kind]({prefix + name: data for name, data in FILES.items()})), kind, folder, LIMIT)
    assert contents(folder) == FILES


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_common_form_are_read(folder: Path, form: int) -> None:
    unpack(io.BytesIO(tarred(FILES, form)), "tar", folder, LIMIT)
    assert contents(folder) == FILES


def test_folders_made_by_common_tools_are_passed_over(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source" / "tiny"
    source.mkdir(parents=True)
    for name, data in FILES.items():
        (source / name).write_bytes(data)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(source, arcname="tiny")
    unpack(buffer, "tar", folder, LIMIT)
    assert contents(folder) == FILES


BAD_NAMES = [
    "../other",
    "/etc/passwd",
    "tiny/../../other",
    "..\\other",
    "C:\\other",
    "other/avatar.json",
    "tiny/tiny/avatar.json",
    "Avatar.json",
    "REPOSE.ONNX",
    "avatar.json\n",
    "repose.onnx ",
    "mesh.Standard.glb",
    "mesh.ä.glb",
    "evil.py",
    ".avatar.json",
    "tiny",
    "a" * 90,
]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("kind", PACK)
def test_fault_12_other_names_are_refused(folder: Path, kind: ArchiveKind, name: str) -> None:
    refused(folder, PACK[kind](FILES | {name: b"evil"}), kind)


@pytest.mark.parametrize("kind", PACK)
def test_fault_12_folders_within_are_refused(folder: Path, kind: ArchiveKind) -> None:
    refused(folder, PACK[kind]({"sub/": b""}), kind)


KINDS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE]


@pytest.mark.parametrize("kind", KINDS)
def test_fault_12_links_and_devices_in_a_tar_are_refused(folder: Path, kind: bytes) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("repose.onnx")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    refused(folder, buffer.getvalue(), "tar")


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFDIR])
def test_fault_12_links_and_devices_in_a_zip_are_refused(folder: Path, mode: int) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        member = zipfile.ZipInfo("repose.onnx")
        member.external_attr = (mode | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    refused(folder, buffer.getvalue(), "zip")


@pytest.mark.parametrize("kind", PACK)
def test_fault_12_a_name_twice_is_refused(folder: Path, kind: ArchiveKind) -> None:
    refused(folder, PACK[kind]({"avatar.json": b"1", "./avatar.json": b"2"}), kind)


def test_fault_12_bombs_stop_at_the_limit(folder: Path) -> None:
    bomb = zipped({"repose.onnx": bytes(50_000_000)})
    assert len(bomb) < 60_000
    refused(folder, bomb, "zip", BodyTooLarge)
    assert sum(map(len, contents(folder).values())) <= LIMIT
    refused(folder, tarred({"avatar.json": bytes(LIMIT), "checkpoint.safetensors": b"1"}), "tar", BodyTooLarge)


def test_fault_12_a_tar_that_claims_terabytes_is_refused(folder: Path) -> None:
    member = tarfile.TarInfo("repose.onnx")
    member.size = 8 << 40
    refused(folder, member.tobuf(tarfile.GNU_FORMAT) + b"few", "tar")
    member.type = tarfile.XHDTYPE
    refused(folder, member.tobuf(tarfile.GNU_FORMAT) + b"few", "tar")


@pytest.mark.parametrize("kind", PACK)
def test_fault_12_many_members_are_refused_before_they_cost(folder: Path, kind: ArchiveKind) -> None:
    refused(folder, PACK[kind]({f"mesh.{chr(97 + n // 26)}{chr(97 + n % 26)}.glb": b"" for n in range(400)}), kind)


def test_fault_12_a_directory_cannot_hide_behind_a_64_bit_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = zipped({f"{n}": b"" for n in range(400)})
    end = many.rfind(b"PK\x05\x06")
    directory_bytes, start = struct.unpack_from("<II", many, end + 12)
    record = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, 400, 400, directory_bytes, start)
    locator = struct.pack("<IIQI", 0x07064B50, 0, end, 1)
    lie = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, 46, start, 0)
    disguised = many[:end] + record + locator + lie
    assert len(zipfile.ZipFile(io.BytesIO(disguised)).namelist()) == 400  # it would have been believed
    monkeypatch.setattr(zipfile, "ZipFile", None)  # it would make an object of each
    refused(folder, disguised, "zip")


def test_encrypted_and_odd_compression_are_refused(folder: Path) -> None:
    encrypted = bytearray(zipped(FILES))
    encrypted[6] |= 1
    encrypted[encrypted.find(b"PK\x01\x02") + 8] |= 1
    refused(folder, bytes(encrypted), "zip")
    refused(folder, zipped(FILES, zipfile.ZIP_LZMA), "zip")


@pytest.mark.parametrize("kind", PACK)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_archives_are_refused_or_harmless(kind: ArchiveKind, data: st.DataObject, folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    archive = bytearray(PACK[kind](FILES))
    for _ in range(data.draw(st.integers(1, 4))):
        archive[data.draw(st.integers(0, len(archive) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(archive)) | st.just(len(archive)))
    with contextlib.suppress(BundleInvalid, BodyTooLarge):
        unpack(io.BytesIO(bytes(archive[:cut])), kind, folder, LIMIT)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["other", "tiny"]
