"""The frame stream to the last bit: other people write decoders for it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.frames import Frame, FrameError, decode_frame, decode_stream, encode_frame

# Two vertices, frame 0x01020304 as number 5, not the last; written by hand from the layout in `service/frames.py`.
GOLDEN = bytes.fromhex(
    "41564631"  # AVF1
    "01" "00" "0100"  # version, codec, flags: key
    "05000000" "04030201"  # sequence number, frame
    "0807060504030201" "40420f00"  # client's time, server's time: 1,000,000 us
    "02000000"  # vertices
    "0000803f" "00000040" "00004040" "00002041"  # root (1, 2, 3), half extent 10
    "0000803f" "00000040" "00005041"  # (1, 2, 13)
    "00000000" "000000c0" "0000003f"  # (0, -2, 0.5)
)  # fmt: skip
VERTICES = np.array([[1, 2, 13], [0, -2, 0.5]], np.float32)


def encoded(last: bool = False, seq: int = 5) -> bytes:
    return encode_frame(
        VERTICES,
        np.array([1, 2, 3]),
        seq=seq,
        frame=0x01020304,
        last=last,
        server_us=10**6,
        client_us=0x0102030405060708,
    )


def test_golden_frame() -> None:
    assert encoded() == GOLDEN
    assert encoded(last=True) == GOLDEN[:6] + b"\x03\x00" + GOLDEN[8:]


def test_golden_frame_decodes() -> None:
    frame = decode_frame(GOLDEN)
    assert (frame.seq, frame.frame, frame.last) == (5, 0x01020304, False)
    assert (frame.client_us, frame.server_us, frame.half_extent) == (0x0102030405060708, 10**6, 10.0)
    np.testing.assert_array_equal(frame.root, [1, 2, 3])
    np.testing.assert_array_equal(frame.vertices, VERTICES)


@given(st.lists(st.integers(1, 90), max_size=20))
def test_stream_decodes_from_pieces_of_any_size(sizes: list[int]) -> None:
    data = b"".join(encoded(last=n == 2, seq=n) for n in range(3))
    pieces, start = [], 0
    for size in [*sizes, len(data)]:
        pieces.append(data[start : start + size])
        start += size
    frames: list[Frame] = list(decode_stream(pieces))
    assert [(frame.seq, frame.last) for frame in frames] == [(0, False), (1, False), (2, True)]


def test_a_frame_comes_with_its_last_byte() -> None:
    data = encoded(seq=0) + encoded(seq=1, last=True)
    pieces = iter([data[:72], data[72:]])
    stream = decode_stream(pieces)
    assert next(stream).seq == 0
    assert len(list(pieces)) == 1  # the second piece was not asked for yet


@pytest.mark.parametrize(
    "data",
    [
        b"",
        encoded(seq=0),
        encoded(seq=0, last=True)[:-1],
        encoded(seq=1, last=True),
        encoded(seq=0, last=True) + b"\x00" * 48,
        b"AVF2" + encoded(seq=0, last=True)[4:],
        GOLDEN[:28] + b"\xff\xff\xff\xff" + GOLDEN[32:],
    ],
)
def test_a_damaged_stream_is_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        list(decode_stream([data]))
