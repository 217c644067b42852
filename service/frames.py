"""The binary frame stream: for each frame a header of 48 bytes, then its vertices.  Everything is little-endian.

     0  4s   magic `AVF1`
     4  u8   version, 1
     5  u8   codec: 0 f32, 1 q16, 2 q16d
     6  u16  flags: 1 key (the frame stands alone), 2 last, 4 frames before this one were dropped
     8  u32  sequence number; over HTTP 0, 1, 2, ... without gaps
    12  u32  number of the frame in the posted sequence
    16  u64  the client's time, microseconds; 0 where the client gave none
    24  u32  time the server took for the frame, microseconds; 0 over HTTP, where equal answers are equal bytes
    28  u32  number of vertices V
    32  4f32 position x y z of the pelvis, and half the edge h of a cube around it that holds the frame; metres, y up

The payload, padded with zeros to a multiple of four, so that JavaScript can view the next part without copying it:

f32   V x 3 float32, metres.
q16   V x 3 uint16 q: vertex = pelvis - h + q 2h / 65535.  h is 1.28 m; a frame that does not fit has twice, four times,
      ... that, so no vertex is ever cut off.  The error is half a quantum: 0.0195 mm in the usual box.
q16d  u32 length, then as many bytes of one zstd frame.  Inside are the same q, as r = q - q of the frame before (of
      zero in a key frame), d = r - r of the vertex before (of zero for the first), both modulo 65536 and for each
      coordinate by itself, zigzag z = 2d or -2d - 1 of d read as signed: 3V low bytes of z (V of x, V of y, V of z),
      then 3V high bytes.  A key frame begins the stream and every change of h.
"""

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import zstandard
from numpy.typing import NDArray

MEDIA_TYPE = "application/vnd.reposer.frames"
Codec = Literal["f32", "q16", "q16d"]
CODECS: tuple[Codec, ...] = ("f32", "q16", "q16d")
"""By the number that the header holds."""
MAGIC, VERSION = b"AVF1", 1
KEY, LAST, DROPPED = 1, 2, 4
BOX_M = float(np.float32(1.28))
"""Half the edge of the usual box, exactly as the header holds it."""
MAX_VERTICES = 1 << 24
_HEADER = struct.Struct("<4sBBHIIQII4f")
HEADER_BYTES = _HEADER.size
_ZSTD_LEVEL = 1


class FrameError(ValueError):
    """The bytes are not a whole stream of frames."""


@dataclass(frozen=True)
class Frame:
    """One decoded frame."""

    codec: Codec
    seq: int
    frame: int
    key: bool
    last: bool
    dropped: bool
    client_us: int
    server_us: int
    root: NDArray[np.float32]
    """(3,), the pelvis, metres."""
    half_extent: float
    vertices: NDArray[np.float32]
    """(V, 3), metres."""


def frame_bytes(vertex_count: int, codec: Codec = "f32") -> int:
    """Size of one frame on the wire; for q16d an upper bound that holds for all but incompressible motion."""
    return HEADER_BYTES + (12 * vertex_count if codec == "f32" else _padded(6 * vertex_count))


class FrameEncoder:
    """Writes the frames of one stream, in order: a q16d frame is the difference from the one before."""

    def __init__(self, codec: Codec) -> None:
        self.codec: Codec = codec
        self._previous: NDArray[np.uint16] | None = None
        self._half_extent = 0.0
        self._offsets = np.empty((0, 3), np.float32)
        """Written over with every frame: memory that is new to the process costs more than the arithmetic."""

    def encode(
        self,
        vertices: NDArray[np.float32],
        root: NDArray[np.floating],
        *,
        seq: int,
        frame: int,
        last: bool,
        key: bool = False,
        dropped: bool = False,
        server_us: int = 0,
        client_us: int = 0,
    ) -> bytes:
        """One frame on the wire.

        Args:
            vertices: (V, 3), metres, finite.
            root: (3,), position of the pelvis, metres.
            key: make the frame stand alone, whatever came before.
            dropped: say that frames before this one were left out.
        """
        centre = np.asarray(root, np.float32)
        if len(self._offsets) != len(vertices):
            self._offsets = np.empty((len(vertices), 3), np.float32)
        offsets = self._offsets
        _subtract(vertices, centre, offsets)
        peak = max(float(offsets.max()), -float(offsets.min()))
        if self.codec == "f32":
            key, half_extent = True, peak
            payload = np.ascontiguousarray(vertices, "<f4").tobytes()
        else:
            half_extent = BOX_M
            while half_extent < peak:
                half_extent *= 2
            quantised = _quantise(offsets, half_extent)
            if self.codec == "q16":
                key, payload = True, quantised.astype("<u2", copy=False).tobytes()
            else:
                previous = None if key else self._reference(quantised.shape, half_extent)
                key = previous is None
                payload = _pack(quantised if previous is None else quantised - previous)
                self._previous, self._half_extent = quantised, half_extent
        flags = (KEY if key else 0) | (LAST if last else 0) | (DROPPED if dropped else 0)
        number = CODECS.index(self.codec)
        head = _HEADER.pack(
            MAGIC, VERSION, number, flags, seq, frame, client_us, server_us, len(vertices), *centre, half_extent
        )
        return head + payload + bytes(-len(payload) % 4)

    def _reference(self, shape: tuple[int, ...], half_extent: float) -> NDArray[np.uint16] | None:
        """What a difference may be taken from: the frame before, if it has the same box."""
        same = self._previous is not None and self._previous.shape == shape and self._half_extent == half_extent
        return self._previous if same else None


class FrameDecoder:
    """Reads the frames of one stream, in order."""

    def __init__(self) -> None:
        self._previous: NDArray[np.uint16] | None = None
        self._half_extent = 0.0

    def size(self, data: bytes | bytearray) -> int | None:
        """Bytes of the frame that `data` starts with; None while too few are there to say.

        Raises:
            FrameError: no frame starts here.
        """
        if len(data) < HEADER_BYTES:
            return None
        magic, version, number = struct.unpack_from("<4sBB", data)
        if (magic, version) != (MAGIC, VERSION) or number >= len(CODECS):
            raise FrameError(f"expected {MAGIC!r}, version 1, codec 0 to 2, got {magic!r}, {version}, {number}")
        count = struct.unpack_from("<I", data, 28)[0]
        if not 0 < count <= MAX_VERTICES:
            raise FrameError(f"expected 1 to {MAX_VERTICES} vertices, got {count}")
        if CODECS[number] != "q16d":
            return frame_bytes(count, CODECS[number])
        if len(data) < HEADER_BYTES + 4:
            return None
        packed = struct.unpack_from("<I", data, HEADER_BYTES)[0]
        if packed > 6 * count + 1024:  # zstd adds a few bytes to what it cannot shorten
            raise FrameError(f"expected about {6 * count} bytes at most, got {packed}")
        return HEADER_BYTES + _padded(4 + packed)

    def decode(self, data: bytes) -> Frame:
        """The opposite of `FrameEncoder.encode`.

        Raises:
            FrameError: not one whole frame, or a difference from a frame that is not there.
        """
        size = self.size(data)
        if size != len(data):
            raise FrameError(f"expected one frame of {size or f'{HEADER_BYTES} or more'} bytes, got {len(data)}")
        _, _, number, flags, seq, frame, client_us, server_us, count, *box = _HEADER.unpack_from(data)
        codec, root, half_extent = CODECS[number], np.array(box[:3], np.float32), box[3]
        if not all(map(math.isfinite, box)) or half_extent < 0:
            raise FrameError("the box around the frame is not finite")
        if codec == "f32":
            vertices = np.frombuffer(data, "<f4", 3 * count, HEADER_BYTES).reshape(count, 3).astype(np.float32)
        else:
            if codec == "q16":
                quantised = np.frombuffer(data, "<u2", 3 * count, HEADER_BYTES).reshape(count, 3)
            else:
                quantised = self._undo_difference(data, count, half_extent, key=bool(flags & KEY))
            vertices = quantised.astype(np.float32)
            vertices *= np.float32(2 * half_extent / 65535)
            vertices -= np.float32(half_extent)
            _subtract(vertices, -root, vertices)
        return Frame(
            codec=codec,
            seq=seq,
            frame=frame,
            key=bool(flags & KEY),
            last=bool(flags & LAST),
            dropped=bool(flags & DROPPED),
            client_us=client_us,
            server_us=server_us,
            root=root,
            half_extent=half_extent,
            vertices=vertices,
        )

    def _undo_difference(self, data: bytes, count: int, half_extent: float, key: bool) -> NDArray[np.uint16]:
        packed = struct.unpack_from("<I", data, HEADER_BYTES)[0]
        quantised = _unpack(data[HEADER_BYTES + 4 : HEADER_BYTES + 4 + packed], count)
        if not key:
            if self._previous is None or self._previous.shape != quantised.shape or half_extent != self._half_extent:
                raise FrameError("the difference from a frame that is not there")
            quantised += self._previous
        self._previous, self._half_extent = quantised, half_extent
        return quantised


def encode_frame(
    vertices: NDArray[np.float32],
    root: NDArray[np.floating],
    *,
    seq: int,
    frame: int,
    last: bool,
    codec: Codec = "f32",
    dropped: bool = False,
    server_us: int = 0,
    client_us: int = 0,
) -> bytes:
    """One frame that stands alone; see `FrameEncoder.encode`."""
    return FrameEncoder(codec).encode(
        vertices,
        root,
        seq=seq,
        frame=frame,
        last=last,
        dropped=dropped,
        server_us=server_us,
        client_us=client_us,
    )


def decode_frame(data: bytes) -> Frame:
    """One frame that stands alone.

    Raises:
        FrameError: not one whole frame of a version and codec we know, or not a key frame.
    """
    return FrameDecoder().decode(data)


def decode_stream(chunks: Iterable[bytes]) -> Iterator[Frame]:
    """Frames from pieces of any size, each as soon as its last byte is there.

    Raises:
        FrameError: the stream is damaged, or ends before the frame that says it is the last.
    """
    reader = StreamReader()
    for chunk in chunks:
        yield from reader.feed(chunk)
    reader.end()


class StreamReader:
    """Frames from pieces of any size, for those who cannot hand over an iterator; see `decode_stream`."""

    def __init__(self) -> None:
        self._buffer, self._decoder = bytearray(), FrameDecoder()
        self._expected, self._last = 0, False

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        """The frames that are whole with this piece."""
        self._buffer += chunk
        while self._buffer:
            if self._last:
                raise FrameError("bytes after the last frame")
            size = self._decoder.size(self._buffer)
            if size is None or len(self._buffer) < size:
                return
            frame = self._decoder.decode(bytes(self._buffer[:size]))
            del self._buffer[:size]
            if frame.seq != self._expected:
                raise FrameError(f"expected frame {self._expected}, got {frame.seq}")
            self._last, self._expected = frame.last, self._expected + 1
            yield frame

    def end(self) -> None:
        """No more pieces.  Raises `FrameError` where there should be."""
        if self._buffer or not self._last:
            raise FrameError("the stream ends before its last frame")


def _padded(size: int) -> int:
    return size + -size % 4


def _subtract(vertices: NDArray[np.float32], centre: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """out = vertices - centre, in long rows: NumPy takes ten times as long over rows of three."""
    row = np.tile(centre, 128)
    flat, moved = np.ascontiguousarray(vertices, np.float32).reshape(-1), out.reshape(-1)
    whole = len(flat) // len(row) * len(row)
    np.subtract(flat[:whole].reshape(-1, len(row)), row, out=moved[:whole].reshape(-1, len(row)))
    np.subtract(flat[whole:], row[: len(flat) - whole], out=moved[whole:])


def _quantise(offsets: NDArray[np.float32], half_extent: float) -> NDArray[np.uint16]:
    """(V, 3), from -half_extent..half_extent to 0..65535; writes over `offsets`."""
    offsets += np.float32(half_extent)
    offsets *= np.float32(65535 / (2 * half_extent))
    offsets += np.float32(0.5)  # astype cuts off what is behind the point
    return np.clip(offsets, 0, 65535, out=offsets).astype(np.uint16)


def _pack(residual: NDArray[np.uint16]) -> bytes:
    """(V, 3) modulo 65536 -> the payload of a q16d frame."""
    columns = residual.T  # (3, V)
    step = np.empty(columns.shape, np.uint16)
    step[:, 0] = columns[:, 0]
    np.subtract(columns[:, 1:], columns[:, :-1], out=step[:, 1:])
    signed = step.view(np.int16)
    zigzag = ((signed << 1) ^ (signed >> 15)).view(np.uint16).reshape(-1)
    planes = np.concatenate([(zigzag & 0xFF).astype(np.uint8), (zigzag >> 8).astype(np.uint8)])
    packed = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(planes.data)
    return struct.pack("<I", len(packed)) + packed


def _unpack(packed: bytes, count: int) -> NDArray[np.uint16]:
    """The opposite of `_pack`: (V, 3) residuals modulo 65536.

    Raises:
        FrameError: not exactly the planes of `count` vertices.
    """
    try:
        if zstandard.get_frame_parameters(packed).content_size != 6 * count:
            raise FrameError(f"the compressed planes are not those of {count} vertices")
        raw = zstandard.ZstdDecompressor().decompress(packed)
    except zstandard.ZstdError as error:
        raise FrameError("the compressed planes are damaged") from error
    if len(raw) != 6 * count:
        raise FrameError(f"the compressed planes are not those of {count} vertices")
    planes = np.frombuffer(raw, np.uint8).reshape(2, 3, count).astype(np.uint16)
    zigzag = planes[0] | (planes[1] << 8)
    step = (zigzag >> 1) ^ (0 - (zigzag & 1))
    return np.cumsum(step, axis=1, dtype=np.uint16).T.copy()
