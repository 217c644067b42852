"""Archives of poses that lie about themselves are refused by the service, and soon."""

import io
import struct
import zipfile
from typing import Any

import numpy as np
import pytest

from service.errors import NpzInvalid
from service.npz import read_npz

pytestmark = pytest.mark.anyio
NPZ = {"Content-Type": "application/x-npz"}


def array_of(shape: str, data: bytes = b"") -> bytes:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def hidden_directory(archive: bytes) -> bytes:
    """The end record says one member; the 64-bit record before it, which zipfile believes, says all of them."""
    end = archive.rfind(b"PK\x05\x06")
    count, directory_bytes, start = struct.unpack_from("<HII", archive, end + 10)
    record = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, directory_bytes, start)
    locator = struct.pack("<IIQI", 0x07064B50, 0, end, 1)
    return archive[:end] + record + locator + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, 46, start, 0)


BOMBS = {
    "claims 8 TiB": (zipped({"poses.npy": array_of("(1099511627775, 1)")}), 413),
    "inflates without end": (zipped({"poses.npy": array_of("(3, 72)", bytes(10**8))}), 422),
    "20,000 members": (zipped({f"{n}.npy": b"" for n in range(20_000)}), 422),
    "hidden members": (hidden_directory(zipped({f"{n}.npy": b"" for n in range(2000)})), 422),
}


@pytest.mark.parametrize("bomb", BOMBS)
async def test_fault_08_bombs_are_refused(serve: Any, bomb: str) -> None:
    body, status = BOMBS[bomb]
    async with serve() as client:
        answer = await client.post("/avatars/tiny/repose", content=body, headers=NPZ)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"


def test_fault_08_members_are_counted_before_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZipFile", None)  # it would make an object of each
    for bomb in ("20,000 members", "hidden members"):
        with pytest.raises(NpzInvalid):
            read_npz(BOMBS[bomb][0], {"poses"}, 1 << 20)


@pytest.mark.parametrize("name", ["../poses.npy", "/poses.npy", "a/../poses.npy", "..\\poses.npy", "a/poses.npy"])
async def test_fault_09_a_member_that_is_a_path_is_passed_over(serve: Any, name: str) -> None:
    good = array_of("(2, 72)", bytes(2 * 72 * 8))
    async with serve() as client:
        alone = await client.post("/avatars/tiny/repose", content=zipped({name: good}), headers=NPZ)
        beside = zipped({name: array_of("(1, 1)", bytes(8)), "poses.npy": good})
        answer = await client.post(
            "/avatars/tiny/repose", content=beside, headers=NPZ | {"Accept": "application/x-npz"}
        )
    assert alone.status_code == 422
    assert np.load(io.BytesIO(answer.content))["vertices"].shape[0] == 2
