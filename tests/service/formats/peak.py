"""`python -m tests.service.formats.peak MEDIA_TYPE FRAMES MORE_FRAMES`: exports to nowhere, some frames, then more.

Prints by how many bytes the second raised the peak of this process, and what one frame weighs.
"""

import os
import sys

from service import answers
from service.bench_exports import peak_bytes
from service.formats.clip import Clip
from tests.service.formats.test_memory import moving, wide_mesh

VERTICES_A_SIDE = 140


def main() -> None:
    media_type, *counts = sys.argv[1:]
    mesh = wide_mesh(VERTICES_A_SIDE)
    peaks = []
    for count in map(int, counts):
        clip = Clip("wide", mesh, count, 30.0)
        for _ in answers.encode(media_type, moving(clip), clip):
            pass
        peaks.append(peak_bytes(os.getpid()))
    print(peaks[1] - peaks[0], mesh.vertices.nbytes)


if __name__ == "__main__":
    main()
