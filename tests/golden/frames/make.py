"""Writes the golden frame streams: `.venv/bin/python tests/golden/frames/make.py`."""

import json
from pathlib import Path

import numpy as np

from service.frames import CODECS, FrameEncoder, decode_stream

HERE = Path(__file__).parent
VERTEX_COUNT, FRAME_COUNT, FAR_FRAMES = 7, 5, (2, 3)


def main() -> None:
    rng = np.random.default_rng(20)
    body = rng.uniform(-1, 1, (VERTEX_COUNT, 3))
    for codec in CODECS:
        encoder, stream = FrameEncoder(codec), b""
        motion = np.random.default_rng(21)
        for n in range(FRAME_COUNT):
            root = np.array([0.25 * n, 1.0, -0.5 * n], np.float32)
            vertices = (body + root + motion.normal(0, 0.01, body.shape)).astype(np.float32)
            if n in FAR_FRAMES:
                vertices[3, 1] = root[1] + 2.0  # beyond the usual box of 1.28 m
            stream += encoder.encode(
                vertices,
                root,
                seq=n,
                frame=2 * n,
                last=n == FRAME_COUNT - 1,
                dropped=n == 1,
                client_us=0x0102030405060708 + n,
                server_us=1000 + n,
            )
        (HERE / f"{codec}.bin").write_bytes(stream)
        frames = [
            {
                "seq": frame.seq,
                "frame": frame.frame,
                "key": frame.key,
                "last": frame.last,
                "dropped": frame.dropped,
                "client_us": str(frame.client_us),
                "server_us": frame.server_us,
                "root": frame.root.tolist(),
                "half_extent": frame.half_extent,
                "vertices": frame.vertices.tolist(),
            }
            for frame in decode_stream([stream])
        ]
        (HERE / f"{codec}.json").write_text(json.dumps(frames, indent=1) + "\n")


if __name__ == "__main__":
    main()
