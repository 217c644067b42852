"""Point caches of fixed vertex order: PC2 and MDD, and PC2 beside the mesh it moves.

PC2 (little-endian): `POINTCACHE2\\0`, version 1, points, first frame, frames a sample, samples, then float32 x y z.
MDD (big-endian): frames, points, the time of each frame in seconds, then float32 x y z.
Both hold what the mesh's own vertices do: metres, y up.  `clients/blender/import_reposer.py` sets them up in Blender.
"""

import struct
import zipfile
from collections.abc import Iterator

import numpy as np

from service.engine import Batch
from service.formats.clip import Clip, Sink, member
from service.formats.meshes import mesh_files

PC2_MEDIA_TYPE, MDD_MEDIA_TYPE = "application/x-pc2", "application/x-mdd"
PC2_ZIP_MEDIA_TYPE = "application/vnd.reposer.pc2+zip"


def encode_pc2(batches: Iterator[Batch], clip: Clip) -> Iterator[bytes]:
    """A PC2 file; sample n is frame n."""
    yield struct.pack("<12siiffi", b"POINTCACHE2\0", 1, len(clip.mesh.vertices), 0.0, 1.0, clip.frame_count)
    for batch in batches:
        yield np.ascontiguousarray(batch.vertices, "<f4").tobytes()


def encode_mdd(batches: Iterator[Batch], clip: Clip) -> Iterator[bytes]:
    """An MDD file."""
    times = np.arange(clip.frame_count) / clip.fps
    yield struct.pack(">ii", clip.frame_count, len(clip.mesh.vertices)) + times.astype(">f4").tobytes()
    for batch in batches:
        yield batch.vertices.astype(">f4").tobytes()


def encode_pc2_zip(batches: Iterator[Batch], clip: Clip) -> Iterator[bytes]:
    """A zip with the canonical mesh as `avatar.obj` (material, texture) and its motion as `motion.pc2`."""
    sink = Sink()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, content in mesh_files(clip.mesh, "avatar").items():
            archive.writestr(member(name, zipfile.ZIP_DEFLATED), content)
        archive.writestr(member("fps.txt"), f"{clip.fps:.9g}\n")
        with archive.open(member("motion.pc2"), "w", force_zip64=True) as file:
            for piece in encode_pc2(batches, clip):
                file.write(piece)
                yield sink.taken()
    yield sink.taken()
