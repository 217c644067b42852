"""Reposed batches as bytes: the table of formats, and which of them an Accept header asks for."""

import json
from collections.abc import Callable, Iterator

import numpy as np

from service import frames
from service.engine import Batch
from service.errors import NotAcceptable, TooManyFrames
from service.formats.caches import MDD_MEDIA_TYPE as MDD
from service.formats.caches import PC2_MEDIA_TYPE as PC2
from service.formats.caches import PC2_ZIP_MEDIA_TYPE as PC2_ZIP
from service.formats.caches import encode_mdd, encode_pc2, encode_pc2_zip
from service.formats.clip import Clip, Format
from service.formats.meshes import OBJ_MEDIA_TYPE as OBJ
from service.formats.meshes import PLY_MEDIA_TYPE as PLY
from service.formats.meshes import encode_obj, encode_ply
from service.formats.morph import GLB_MEDIA_TYPE as GLB
from service.formats.morph import GLB_ZIP_MEDIA_TYPE as GLB_ZIP
from service.formats.morph import MAX_GLB_FRAMES, encode_glb, encode_glb_zip
from service.formats.npz import encode_npz
from service.formats.skinned import SKINNED_MEDIA_TYPE as SKINNED
from service.formats.skinned import encode_skinned
from service.formats.usd import USD_MEDIA_TYPE as USD
from service.formats.usd import encode_usd

FRAMES, NPZ, NDJSON = frames.MEDIA_TYPE, "application/x-npz", "application/x-ndjson"
FRAMES_Q16, FRAMES_Q16D = f"{FRAMES};codec=q16", f"{FRAMES};codec=q16d"
FRAME_STREAMS = (FRAMES, FRAMES_Q16, FRAMES_Q16D)
MAX_NDJSON_VERTEX_FRAMES = 200_000
"""About 8 MB of text; numbers as text cost ten times what they cost as bytes, in time too."""


def negotiate(accept: str | None) -> str:
    """The media type to answer with: the highest q wins, the order of `FORMATS` decides between equals.

    The frame stream without a codec, or with `codec=f32`, is that of float32.

    Raises:
        NotAcceptable: none of ours is accepted.
    """
    quality: dict[str, tuple[int, float]] = dict.fromkeys(FORMATS, (0, 0.0))  # (how exact the range is, q)
    for item in (accept or "*/*").split(","):
        media_range, *parameters = (part.strip().lower().replace(" ", "") for part in item.split(";"))
        q = 1.0
        for name, _, value in (parameter.partition("=") for parameter in parameters):
            if name == "q":
                try:
                    q = min(1.0, max(0.0, float(value)))
                except ValueError:
                    q = 0.0
            elif name == "codec" and media_range == FRAMES and value != "f32":
                media_range += f";codec={value}"
        for kind in FORMATS:
            ranges = ("", "*/*", kind.split("/")[0] + "/*", kind.split(";")[0], kind)
            exactness = ranges.index(media_range) if media_range in ranges[1:] else 0
            if exactness > quality[kind][0]:
                quality[kind] = (exactness, q)
    best = max(FORMATS, key=lambda kind: quality[kind][1])
    if not quality[best][1] > 0:
        raise NotAcceptable(f"expected one of {', '.join(FORMATS)}", accepted=list(FORMATS))
    return best


def check_length(media_type: str, clip: Clip) -> None:
    """Refuse, before anything is computed, what the format cannot hold.

    Raises:
        TooManyFrames: an animated .glb of more than 255 frames, or more text than anybody should send.
    """
    if media_type == GLB and clip.frame_count > MAX_GLB_FRAMES:
        fitting = -(-clip.frame_count // MAX_GLB_FRAMES)
        raise TooManyFrames(
            f"an animated .glb holds at most {MAX_GLB_FRAMES} frames, got {clip.frame_count}: ask for "
            f"every={fitting}, or accept {GLB_ZIP}, several clips in a zip",
            limit_frames=MAX_GLB_FRAMES,
        )
    largest = MAX_NDJSON_VERTEX_FRAMES // len(clip.mesh.vertices)
    if media_type == NDJSON and clip.frame_count > largest:
        raise TooManyFrames(
            f"as text, at most {largest} frames of this mesh are given, got {clip.frame_count}: accept {FRAMES}",
            limit_frames=largest,
        )


def exact_bytes(media_type: str, clip: Clip) -> int | None:
    """Size of the answer where it is known before it is computed."""
    if media_type in (FRAMES, FRAMES_Q16):
        codec = "f32" if media_type == FRAMES else "q16"
        return clip.frame_count * frames.frame_bytes(len(clip.mesh.vertices), codec)
    return None


def encode(media_type: str, batches: Iterator[Batch], clip: Clip) -> Iterator[bytes]:
    """The answer in pieces, each as soon as its batch is computed; a piece may be empty."""
    return TABLE[media_type].encode(batches, clip)


def _frames(codec: frames.Codec) -> Callable[[Iterator[Batch], Clip], Iterator[bytes]]:
    def encode_stream(batches: Iterator[Batch], clip: Clip) -> Iterator[bytes]:
        encoder = frames.FrameEncoder(codec)
        for batch in batches:
            numbers = range(batch.start, batch.start + len(batch.vertices))
            yield b"".join(
                encoder.encode(vertices, root, seq=n, frame=n, last=n == clip.frame_count - 1)
                for n, vertices, root in zip(numbers, batch.vertices, batch.pelvis, strict=True)
            )

    return encode_stream


def _encode_ndjson(batches: Iterator[Batch], clip: Clip) -> Iterator[bytes]:
    """A line for each frame: its number, its time in seconds, pelvis and vertices in metres, to a micrometre."""
    for batch in batches:
        lines = []
        for n, (vertices, pelvis) in enumerate(zip(batch.vertices, batch.pelvis, strict=True), batch.start):
            rounded = {name: np.round(array.astype(np.float64), 6).tolist()
                       for name, array in (("pelvis", pelvis), ("vertices", vertices))}  # fmt: skip
            lines.append(json.dumps({"frame": n, "time": n / clip.fps, **rounded}, separators=(",", ":")))
        yield "".join(f"{line}\n" for line in lines).encode()


TABLE = {
    row.media_type: row
    for row in (
        Format(FRAMES, ".frames", _frames("f32")),
        Format(FRAMES_Q16, ".q16.frames", _frames("q16")),
        Format(FRAMES_Q16D, ".q16d.frames", _frames("q16d")),
        Format(NPZ, ".npz", encode_npz),
        Format(GLB, ".glb", encode_glb),
        Format(GLB_ZIP, ".glb.zip", encode_glb_zip),
        Format(SKINNED, ".skinned.glb", encode_skinned, needs_batches=False),
        Format(USD, ".usdz", encode_usd),
        Format(PC2_ZIP, ".pc2.zip", encode_pc2_zip),
        Format(PC2, ".pc2", encode_pc2),
        Format(MDD, ".mdd", encode_mdd),
        Format(PLY, ".ply.zip", encode_ply),
        Format(OBJ, ".obj.zip", encode_obj),
        Format(NDJSON, ".ndjson", _encode_ndjson),
    )
}
"""Every format of an answer by its media type."""
FORMATS = tuple(TABLE)
"""The first is given to those who accept anything."""
