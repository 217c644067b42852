"""docs/protocol.md byte for byte: the golden files, read here by offsets alone, and by the code."""

import json
import re
import runpy
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.frames import FrameDecoder
from service.security import Guard, add_key
from service.streaming.streams import StreamQuery
from service.streaming.wire import (
    POSE_BYTES,
    WireError,
    bearer_subprotocol,
    choose_subprotocol,
    decode_pose,
    encode_pose,
)

DOCUMENT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
GOLDEN = Path(__file__).parents[1] / "golden" / "protocol"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
FRAME_FILES = [name for name in EXPECTED if name != "pose.bin"]


def test_the_files_are_what_their_command_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = runpy.run_path(str(GOLDEN / "make.py"))
    made["main"].__globals__["HERE"] = tmp_path
    made["main"]()
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (GOLDEN / path.name).read_bytes(), path.name
    assert {path.name for path in GOLDEN.iterdir() if path.suffix == ".bin"} == set(EXPECTED)


def test_pose() -> None:
    data, expected = (GOLDEN / "pose.bin").read_bytes(), EXPECTED["pose.bin"]
    assert (len(data), data[:4]) == (316, b"AVP1")
    assert struct.unpack_from("<IQ", data, 4) == (expected["seq"], int(expected["t"]))
    assert list(struct.unpack_from("<72f", data, 16)) == expected["pose"]
    assert list(struct.unpack_from("<3f", data, 304)) == expected["trans"]
    decoded = decode_pose(data)
    assert (decoded.seq, decoded.client_us) == (expected["seq"], int(expected["t"]))
    assert decoded.pose.tolist() == expected["pose"]
    assert decoded.translation.tolist() == expected["trans"]


@pytest.mark.parametrize("name", FRAME_FILES)
def test_frame_headers(name: str) -> None:
    data, expected = (GOLDEN / name).read_bytes(), EXPECTED[name]
    codec = {"f32": 0, "q16": 1, "q16d": 2}[expected["codec"]]
    flags = 1 * expected["key"] + 2 * expected["last"] + 4 * expected["dropped"]
    assert struct.unpack_from("<4sBBHII", data) == (b"AVF1", 1, codec, flags, expected["seq"], expected["frame"])
    assert struct.unpack_from("<QII", data, 16) == (int(expected["t"]), expected["server_us"], 37)
    assert list(struct.unpack_from("<3f", data, 32)) == expected["pelvis"]
    assert len(data) % 4 == 0


@pytest.mark.parametrize("name", [name for name in FRAME_FILES if name.startswith(("f32", "q16-"))])
def test_payloads_that_stand_alone(name: str) -> None:
    data, expected = (GOLDEN / name).read_bytes(), EXPECTED[name]
    pelvis, (half,) = np.array(expected["pelvis"]), struct.unpack_from("<f", data, 44)
    if expected["codec"] == "f32":
        vertices = np.array(struct.unpack_from("<111f", data, 48)).reshape(37, 3)
    else:
        q = np.array(struct.unpack_from("<111H", data, 48)).reshape(37, 3)
        vertices = pelvis - half + q * (2 * half / 65535)
    np.testing.assert_allclose(vertices, expected["vertices"], rtol=0, atol=expected["tolerance_m"])


@pytest.mark.parametrize("codec", ["f32", "q16", "q16d"])
def test_the_decoder_reads_the_files_in_order(codec: str) -> None:
    decoder = FrameDecoder()
    for name in sorted(name for name in FRAME_FILES if name.startswith(f"{codec}-")):
        frame, expected = decoder.decode((GOLDEN / name).read_bytes()), EXPECTED[name]
        read: dict[str, Any] = {"t": str(frame.client_us)}
        read |= {key: getattr(frame, key) for key in ("codec", "key", "last", "dropped", "seq", "frame", "server_us")}
        assert read == {key: expected[key] for key in read}
        np.testing.assert_allclose(frame.vertices, expected["vertices"], rtol=0, atol=expected["tolerance_m"])


def test_what_is_no_pose() -> None:
    good = encode_pose(1, np.zeros((24, 3)))
    assert len(good) == POSE_BYTES
    for bad in (b"", good[:-1], good + b"\0", b"AVP2" + good[4:]):
        with pytest.raises(WireError):
            decode_pose(bad)
    with pytest.raises(WireError):
        encode_pose(1, np.zeros(71))


def test_every_parameter_of_the_query_is_in_the_document() -> None:
    table = DOCUMENT.split("**Query.**")[1].split("**Denial.**")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(StreamQuery.model_fields)


def test_the_subprotocol_carries_any_key(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.json", "me", ("data",))
    guard = Guard(tmp_path / "keys.json")
    offered = ["reposer.v1.f32", bearer_subprotocol(key)]
    assert guard.principal({"sec-websocket-protocol": ", ".join(offered)}).name == "me"
    assert choose_subprotocol(offered) == "reposer.v1.f32"
    assert choose_subprotocol(offered[1:]) is None
    assert set(bearer_subprotocol("å/+" * 9)) <= set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
    )
