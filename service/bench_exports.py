"""`python -m service.bench_exports`: memory of the service while long motion is exported; `out/bench/exports.json`.

The server is `reposer serve` on the CPU, a process of its own with its default settings; this process asks it for every
format that holds so many frames, one after the other, and keeps nothing of what comes.
"""

import argparse
import io
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from service import answers
from service.bench import add_arguments, row, write_report
from service.bench_service import Server, redis, serving
from service.bundle.files import Bundle, read_bundle
from service.bundle.manifest import DEFAULT_LOD
from service.errors import TooManyFrames
from service.formats.clip import Clip
from service.load import Motion

MOST_MB = 500.0
FPS = 30.0
SILENCE_S = 3600.0
"""What has a header in front is silent until its last frame is computed."""


def main() -> None:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(prog="python -m service.bench_exports", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--frames", type=int, default=10_000)
    parsed = parser.parse_args()
    write_report(parsed.out / "exports.json", export_rows(parsed.bundle, parsed.motion, parsed.frames))


def export_rows(bundle_path: Path, motion_path: Path, frames: int) -> list[dict[str, Any]]:
    """Three rows for each format; starts the server and its Redis, and stops them."""
    bundle, motion = read_bundle(bundle_path), Motion.read(motion_path).of_length(frames)
    body = io.BytesIO()
    np.savez(body, poses=motion.poses, trans=motion.translation, mocap_framerate=FPS)
    rows = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis_url = stack.enter_context(redis(folder))
        server = stack.enter_context(serving(bundle_path.resolve().parent, folder, redis_url))
        for form in answers.TABLE.values():
            if _holds(form.media_type, bundle, frames):
                _forget_peak(server)
                began = time.monotonic()
                size = _export(server, bundle, form.media_type, body.getvalue())
                seconds, peak = time.monotonic() - began, peak_bytes(server.process.pid)
                rows += [
                    row(f"export{form.suffix}_peak", peak / 1e6, "MB", MOST_MB, at_least=False),
                    row(f"export{form.suffix}_size", size / 1e6, "MB"),
                    row(f"export{form.suffix}_time", seconds, "s"),
                ]
    return rows


def peak_bytes(process: int) -> int:
    """The largest memory of a process since it began, or since its peak was forgotten.

    `ru_maxrss` will not do: a process begins with that of the one that started it.
    """
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _forget_peak(server: Server) -> None:
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # man 5 proc: resets the peak to what it is now


def _holds(media_type: str, bundle: Bundle, frames: int) -> bool:
    try:
        answers.check_length(media_type, Clip(bundle.manifest.id, bundle.meshes[DEFAULT_LOD], frames, FPS))
    except TooManyFrames:
        return False
    return True


def _export(server: Server, bundle: Bundle, media_type: str, body: bytes) -> int:
    """Bytes of the answer."""
    headers = {"Accept": media_type, "Content-Type": "application/x-npz"}
    options = {"lod": DEFAULT_LOD, "up_axis": "y"}
    url = f"{server.url}/avatars/{bundle.manifest.id}/repose"
    with (
        httpx.Client(trust_env=False, timeout=SILENCE_S) as client,
        client.stream("POST", url, params=options, headers=headers, content=body) as answer,
    ):
        if answer.is_error:
            raise RuntimeError(f"{media_type}: {answer.read().decode()}")
        return sum(map(len, answer.iter_raw()))


if __name__ == "__main__":
    main()
