"""Makes the golden vectors of docs/protocol.md: `python tests/golden/protocol/make.py`.

Every binary layout once, and in `expected.json` what each file decodes to.  Run it only to add a layout: bytes that
change are a protocol that changes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from service.frames import CODECS, FrameEncoder
from service.streaming.wire import encode_pose

HERE = Path(__file__).parent
VERTICES = 37  # odd, so that padding shows
TIME_US = 0x0102030405060708


FRAMES = {
    "f32": [(0, 1.0)],
    "q16": [(0, 1.0), (1, 2.0)],
    "q16d": [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)],
}
"""(step, scale) of each frame of a stream; twice the size needs twice the box, and so a key frame."""


def figure(step: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (37, 3) and pelvis (3,) that move with `step`, metres."""
    n = np.arange(3 * VERTICES, dtype=np.float64).reshape(VERTICES, 3)
    pelvis = np.array([0.25 + 0.01 * step, 0.875, -1.5], np.float32)
    return (pelvis + 0.9 * scale * np.sin(n + 0.05 * step)).astype(np.float32), pelvis


def main() -> None:
    expected: dict[str, Any] = {}
    pose = np.linspace(-1.5, 1.5, 72, dtype=np.float32)
    translation = np.array([0.5, -0.25, 8.0], np.float32)
    (HERE / "pose.bin").write_bytes(encode_pose(17, pose, translation, TIME_US))
    expected["pose.bin"] = {
        "seq": 17, "t": str(TIME_US), "pose": pose.tolist(), "trans": translation.tolist(),
    }  # fmt: skip

    for codec in CODECS:
        encoder = FrameEncoder(codec)
        for n, (step, scale) in enumerate(FRAMES[codec]):
            vertices, pelvis = figure(step, scale)
            data = encoder.encode(
                vertices, pelvis, seq=17 + 2 * n, frame=n, last=False, dropped=n > 0, server_us=4321, client_us=TIME_US
            )
            name = f"{codec}-{n}.bin"
            (HERE / name).write_bytes(data)
            key = codec != "q16d" or n in (0, 2)
            expected[name] = {
                "codec": codec, "key": key, "last": False, "dropped": n > 0, "seq": 17 + 2 * n, "frame": n,
                "t": str(TIME_US), "server_us": 4321, "pelvis": pelvis.tolist(), "vertices": vertices.tolist(),
                "tolerance_m": 0.0 if codec == "f32" else 2e-5 * scale,
            }  # fmt: skip
    # `t` is text: JavaScript's numbers end at 2^53.
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
