"""The binary frame stream: for each frame a header of 48 bytes, then its vertices.  Everything is little-endian.

     0  4s   magic `AVF1`
     4  u8   version, 1
     5  u8   codec, 0: float32 x y z of each vertex, metres, y up
     6  u16  flags: 1 key (the frame stands alone), 2 last
     8  u32  sequence number, 0, 1, 2, ... without gaps
    12  u32  number of the frame in the posted sequence
    16  u64  the client's time, microseconds; 0 where the client gave none
    24  u32  time the server computed on the frame, microseconds; in a cached answer that of the first time
    28  u32  number of vertices
    32  4f32 position x y z of the pelvis, and half the edge of the smallest cube around it that holds the frame

Every part starts at a multiple of four, so that JavaScript can view the payload without copying it.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MEDIA_TYPE = "application/vnd.reposer.frames"
MAGIC, VERSION, CODEC_F32 = b"AVF1", 1, 0
KEY, LAST = 1, 2
_HEADER = struct.Struct("<4sBBHIIQII4f")
HEADER_BYTES = _HEADER.size
MAX_VERTICES = 1 << 24


class FrameError(ValueError):
    """The bytes are not a whole stream of frames."""


@dataclass(frozen=True)
class Frame:
    """One decoded frame."""

    seq: int
    frame: int
    last: bool
    client_us: int
    server_us: int
    root: NDArray[np.float32]
    """(3,), the pelvis, metres."""
    half_extent: float
    vertices: NDArray[np.float32]
    """(V, 3), metres."""


def frame_bytes(vertex_count: int) -> int:
    """Size of one frame on the wire."""
    return HEADER_BYTES + 12 * vertex_count


def encode_frame(
    vertices: NDArray[np.float32],
    root: NDArray[np.floating],
    *,
    seq: int,
    frame: int,
    last: bool,
    server_us: int = 0,
    client_us: int = 0,
) -> bytes:
    """One frame on the wire: vertices (V, 3) and the position of the pelvis (3,), metres."""
    centre = np.asarray(root, np.float32)
    half_extent = float(np.abs(vertices - centre).max())
    flags = KEY | (LAST if last else 0)
    head = _HEADER.pack(
        MAGIC, VERSION, CODEC_F32, flags, seq, frame, client_us, server_us, len(vertices), *centre, half_extent
    )
    return head + np.ascontiguousarray(vertices, "<f4").tobytes()


def decode_frame(data: bytes) -> Frame:
    """The opposite of `encode_frame`.

    Raises:
        FrameError: not one whole frame of a version and codec we know.
    """
    if len(data) < HEADER_BYTES:
        raise FrameError(f"expected at least {HEADER_BYTES} bytes, got {len(data)}")
    magic, version, codec, flags, seq, frame, client_us, server_us, count, *box = _HEADER.unpack_from(data)
    if (magic, version, codec) != (MAGIC, VERSION, CODEC_F32):
        raise FrameError(f"expected {MAGIC!r}, version 1, codec 0, got {magic!r}, {version}, {codec}")
    if len(data) != frame_bytes(count):
        raise FrameError(f"expected {frame_bytes(count)} bytes for {count} vertices, got {len(data)}")
    vertices = np.frombuffer(data, "<f4", 3 * count, HEADER_BYTES).reshape(count, 3).astype(np.float32)
    last = bool(flags & LAST)
    return Frame(seq, frame, last, client_us, server_us, np.array(box[:3], np.float32), box[3], vertices)


def decode_stream(chunks: Iterable[bytes]) -> Iterator[Frame]:
    """Frames from pieces of any size, each as soon as its last byte is there.

    Raises:
        FrameError: the stream is damaged, or ends before the frame that says it is the last.
    """
    buffer, last, expected = bytearray(), False, 0
    for chunk in chunks:
        buffer += chunk
        while len(buffer) >= HEADER_BYTES:
            if last:
                raise FrameError("bytes after the last frame")
            count = struct.unpack_from("<I", buffer, 28)[0]
            if buffer[:4] != MAGIC or count > MAX_VERTICES:
                raise FrameError("not a frame header")
            size = frame_bytes(count)
            if len(buffer) < size:
                break
            frame = decode_frame(bytes(buffer[:size]))
            del buffer[:size]
            if frame.seq != expected:
                raise FrameError(f"expected frame {expected}, got {frame.seq}")
            last, expected = frame.last, expected + 1
            yield frame
    if buffer or not last:
        raise FrameError("the stream ends before its last frame")
