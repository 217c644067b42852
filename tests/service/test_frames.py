"""The frame stream to the last bit: other people write decoders for it."""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.frames import (
    BOX_M,
    CODECS,
    HEADER_BYTES,
    Codec,
    Frame,
    FrameDecoder,
    FrameEncoder,
    FrameError,
    decode_frame,
    decode_stream,
    encode_frame,
    frame_bytes,
)

GOLDEN_DIR = Path(__file__).parent.parent / "golden" / "frames"
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
# The same as q16: half extent 1.28 * 8, quantum 20.48 / 65535, root in the middle at 32767.5, which rounds up.
GOLDEN_Q16 = GOLDEN[:5] + bytes.fromhex("01" "0100") + GOLDEN[8:44] + bytes.fromhex(
    "0ad72341"  # 10.24
    "0080" "0080" "fffc"  # 32768, 32768, 64767 = (10 + 10.24) / quantum
    "8073" "004e" "c060"  # 29568, 19968, 24768
)  # fmt: skip
VERTICES = np.array([[1, 2, 13], [0, -2, 0.5]], np.float32)


def encoded(last: bool = False, seq: int = 5, codec: Codec = "f32") -> bytes:
    return encode_frame(
        VERTICES,
        np.array([1, 2, 3]),
        seq=seq,
        frame=0x01020304,
        last=last,
        codec=codec,
        server_us=10**6,
        client_us=0x0102030405060708,
    )


def test_golden_frame() -> None:
    assert encoded() == GOLDEN
    assert encoded(last=True) == GOLDEN[:6] + b"\x03\x00" + GOLDEN[8:]


def test_golden_quantised_frame() -> None:
    assert encoded(codec="q16") == GOLDEN_Q16


def test_golden_frame_decodes() -> None:
    frame = decode_frame(GOLDEN)
    assert (frame.seq, frame.frame, frame.key, frame.last, frame.dropped) == (5, 0x01020304, True, False, False)
    assert (frame.client_us, frame.server_us, frame.half_extent) == (0x0102030405060708, 10**6, 10.0)
    np.testing.assert_array_equal(frame.root, [1, 2, 3])
    np.testing.assert_array_equal(frame.vertices, VERTICES)


@pytest.mark.parametrize("codec", CODECS)
def test_golden_streams_decode_to_what_stands_beside_them(codec: Codec) -> None:
    expected = json.loads((GOLDEN_DIR / f"{codec}.json").read_text())
    frames = list(decode_stream([(GOLDEN_DIR / f"{codec}.bin").read_bytes()]))
    assert len(frames) == len(expected)
    for frame, said in zip(frames, expected, strict=True):
        assert frame.codec == codec
        for name in ("seq", "frame", "key", "last", "dropped", "server_us"):
            assert getattr(frame, name) == said[name]
        assert frame.client_us == int(said["client_us"])
        for name in ("root", "half_extent", "vertices"):
            np.testing.assert_allclose(getattr(frame, name), said[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("codec", ["f32", "q16"])
def test_golden_streams_are_still_written_the_same(codec: Codec, tmp_path: Path) -> None:
    source = tmp_path / "make.py"
    source.write_text((GOLDEN_DIR / "make.py").read_text())
    runpy.run_path(str(source), run_name="__main__")
    assert (tmp_path / f"{codec}.bin").read_bytes() == (GOLDEN_DIR / f"{codec}.bin").read_bytes()


def walk(seed: int, count: int, frames: int, extent_m: float, step_m: float) -> tuple[Any, Any]:
    """A body around a pelvis that wanders up to kilometres away: (F, V, 3), (F, 3)."""
    rng = np.random.default_rng(seed)
    roots = rng.normal(0, 300, 3) + np.cumsum(rng.normal(0, 0.2, (frames, 3)), axis=0)
    body = rng.uniform(-extent_m, extent_m, (count, 3)) + rng.normal(0, step_m, (frames, count, 3))
    return (body + roots[:, None]).astype(np.float32), roots.astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(
    codec=st.sampled_from(CODECS),
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 200),
    extent_m=st.floats(0, 8),
    step_m=st.sampled_from([0.0, 0.01, 0.5]),
    key_at=st.integers(0, 5),
)
def test_decoding_gives_the_vertices_back_within_half_a_quantum(
    codec: Codec, seed: int, count: int, extent_m: float, step_m: float, key_at: int
) -> None:
    vertices, roots = walk(seed, count, 6, extent_m, step_m)
    encoder, decoder = FrameEncoder(codec), FrameDecoder()
    for n, (posed, root) in enumerate(zip(vertices, roots, strict=True)):
        data = encoder.encode(posed, root, seq=n, frame=n, last=n == 5, key=n == key_at)
        assert len(data) % 4 == 0
        frame = decoder.decode(data)
        assert frame.key or (codec == "q16d" and n not in (0, key_at))
        if codec == "f32":
            np.testing.assert_array_equal(frame.vertices, posed)
            continue
        assert frame.half_extent / BOX_M in (1, 2, 4, 8, 16)
        # 1 % for the float32 in which the encoder works, and the last digit of a vertex far from the origin.
        allowed = 1.01 * frame.half_extent / 65535 + 2 * np.spacing(np.abs(posed).max())
        np.testing.assert_allclose(frame.vertices, posed, rtol=0, atol=allowed)


def test_in_the_usual_box_the_error_is_a_fiftieth_of_a_millimetre() -> None:
    vertices = np.random.default_rng(0).uniform(-1.28, 1.28, (20_000, 3)).astype(np.float32)
    frame = decode_frame(encode_frame(vertices, np.zeros(3), seq=0, frame=0, last=True, codec="q16"))
    assert frame.half_extent == BOX_M
    assert np.abs(frame.vertices - vertices).max() < 0.02e-3


def test_a_vertex_beyond_the_box_widens_it_for_that_frame() -> None:
    encoder, decoder = FrameEncoder("q16d"), FrameDecoder()
    seen = []
    for n, reach in enumerate([1.0, 1.0, 1.3, 1.3, 6.0, 1.0]):
        vertices = np.array([[reach, 0, 0], [0, -0.5, 0]], np.float32)
        frame = decoder.decode(encoder.encode(vertices, np.zeros(3), seq=n, frame=n, last=n == 5))
        assert frame.vertices[0, 0] == pytest.approx(reach, abs=1e-4)
        seen.append((frame.half_extent / BOX_M, frame.key))
    assert seen == [(1, True), (1, False), (2, True), (2, False), (8, True), (1, True)]


def test_a_difference_needs_the_frame_before() -> None:
    vertices, roots = walk(1, 50, 3, 1.0, 0.01)
    encoder = FrameEncoder("q16d")
    first, second, third = (
        encoder.encode(v, r, seq=n, frame=n, last=n == 2, key=n == 2)
        for n, (v, r) in enumerate(zip(vertices, roots, strict=True))
    )
    with pytest.raises(FrameError):
        decode_frame(second)
    decoder = FrameDecoder()
    decoder.decode(first)
    decoder.decode(second)
    alone, in_turn = decode_frame(third), decoder.decode(third)
    np.testing.assert_array_equal(alone.vertices, in_turn.vertices)


def test_slow_motion_is_smaller_as_differences() -> None:
    vertices, roots = walk(2, 2000, 2, 1.0, 0.0)
    encoder = FrameEncoder("q16d")
    key, difference = (
        encoder.encode(v, r, seq=n, frame=n, last=n == 1) for n, (v, r) in enumerate(zip(vertices, roots, strict=True))
    )
    assert len(difference) < len(key) / 4
    assert len(key) <= frame_bytes(2000, "q16") + 64


@pytest.mark.parametrize("codec", CODECS)
@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 90), max_size=20))
def test_stream_decodes_from_pieces_of_any_size(codec: Codec, sizes: list[int]) -> None:
    encoder = FrameEncoder(codec)
    data = b"".join(encoder.encode(VERTICES + n, np.zeros(3), seq=n, frame=n, last=n == 2) for n in range(3))
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


PACKED = encoded(seq=0, last=True, codec="q16d")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        encoded(seq=0),
        encoded(seq=0, last=True)[:-1],
        encoded(seq=1, last=True),
        encoded(seq=0, last=True) + b"\x00" * 48,
        b"AVF2" + encoded(seq=0, last=True)[4:],
        GOLDEN[:5] + b"\x03" + GOLDEN[6:],
        GOLDEN[:28] + b"\xff\xff\xff\xff" + GOLDEN[32:],
        GOLDEN[:28] + b"\x00\x00\x00\x00" + GOLDEN[32:],
        GOLDEN[:44] + b"\x00\x00\xc0\x7f" + GOLDEN[48:],
        PACKED[:6] + b"\x02\x00" + PACKED[8:],
        PACKED[:28] + b"\x03\x00\x00\x00" + PACKED[32:],
        PACKED[:HEADER_BYTES] + b"\xff\xff\xff\xff" + PACKED[52:],
        PACKED[:52] + bytes(len(PACKED) - 52),
    ],
)
def test_a_damaged_stream_is_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        list(decode_stream([data]))


@settings(deadline=None, max_examples=100)
@given(codec=st.sampled_from(CODECS), at=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.integers(0, 10**6))
def test_damage_is_an_error_of_ours_or_another_frame(codec: Codec, at: int, byte: int, cut: int) -> None:
    data = bytearray(encoded(seq=0, last=True, codec=codec))
    data[at % len(data)] = byte
    for damaged in (bytes(data), bytes(data[: cut % len(data)])):
        try:
            frames = list(decode_stream([damaged]))
        except FrameError:
            continue
        assert frames[0].vertices.shape == (2, 3)
