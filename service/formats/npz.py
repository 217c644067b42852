"""`numpy.savez(vertices, faces, fps)`, written as it is computed: the archive is never whole in memory."""

import zipfile
from collections.abc import Iterator

import numpy as np

from service.engine import Batch
from service.formats.clip import Clip, Sink, member


def encode_npz(batches: Iterator[Batch], clip: Clip) -> Iterator[bytes]:
    """`vertices` (F, V, 3) float32, `faces` (T, 3) int32, `fps`; and `uv` (V, 2), `colors` (V, 3) where there are."""
    mesh = clip.mesh
    still = {"faces": mesh.faces, "fps": np.array(clip.fps), "uv": mesh.uv, "colors": mesh.colors}
    sink = Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for name, array in still.items():
            if array is not None:
                with archive.open(member(f"{name}.npy"), "w") as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
        with archive.open(member("vertices.npy"), "w", force_zip64=True) as file:
            shape = (clip.frame_count, len(mesh.vertices), 3)
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in batches:
                file.write(np.ascontiguousarray(batch.vertices, "<f4").tobytes())
                yield sink.taken()
    yield sink.taken()
