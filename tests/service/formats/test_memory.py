"""A long export is never whole in memory, and nothing of it stays on the disk."""

import itertools
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service import answers
from service.bundle.glb import Mesh
from service.engine import Batch
from service.formats import usd
from service.formats.clip import Clip

ROOT = Path(__file__).parents[3]
STREAMED = (answers.NPZ, answers.PC2, answers.PC2_ZIP, answers.MDD, answers.PLY, answers.OBJ)
WAITING = (answers.GLB, answers.GLB_ZIP, answers.USD)
"""A header in front, or an index, needs every frame: these wait in a file."""


FRAME_BYTES = 12 * 4900


def wide_mesh(side: int = 70) -> Mesh:
    """A sheet of side x side vertices: a frame outweighs its bookkeeping."""
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(side), np.arange(side)))
    corner = np.arange(side * side).reshape(side, side)[:-1, :-1].ravel()
    faces = np.concatenate([corner[:, None] + [0, 1, side], corner[:, None] + [1, side + 1, side]])
    return Mesh(np.stack([x, y, 0 * x], axis=1).astype(np.float32), faces.astype(np.int32))


def moving(clip: Clip, taken: list[int] | None = None) -> Iterator[Batch]:
    """The clip's batches, one frame each: the canonical mesh, drifting."""
    for n in range(clip.frame_count):
        if taken is not None:
            taken.append(n)
        vertices = clip.mesh.vertices[None] + np.float32(1e-3 * n)
        yield Batch(n, vertices, np.zeros((1, 3), np.float32), 0.0)


@pytest.mark.parametrize("media_type", [*STREAMED, *WAITING])
def test_memory_does_not_grow_with_the_motion(media_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame more costs bookkeeping: less than a tenth of what it weighs."""
    monkeypatch.setattr(usd, "FRAMES_A_SAVE", 4)
    peaks = []
    counts = (2, 4, 12) if media_type == answers.OBJ else (2, 10, 50)  # the first warms up what is made once
    for count in counts:
        clip = Clip("wide", wide_mesh(), count, 30.0)
        tracemalloc.start()
        size = sum(map(len, answers.encode(media_type, moving(clip), clip)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert size > count * FRAME_BYTES / (3 if media_type == answers.OBJ else 1)
    assert peaks[2] - peaks[1] < 0.1 * (counts[2] - counts[1]) * FRAME_BYTES


@pytest.mark.parametrize("media_type", [answers.FRAMES, answers.FRAMES_Q16D, *STREAMED, *WAITING[1:]])
def test_the_process_does_not_grow_with_the_motion(media_type: str) -> None:
    """Nor what tracemalloc does not see: USD's memory, zlib's, files that are mapped."""
    counts = (10, 30) if media_type == answers.OBJ else (40, 150)  # the first fills what is kept for reuse
    command = [sys.executable, "-m", "tests.service.formats.peak", media_type, *map(str, counts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    growth, frame_bytes = map(int, done.stdout.split())
    assert growth < 0.25 * (counts[1] - counts[0]) * frame_bytes


def test_usd_frames_go_to_the_disk_while_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tracemalloc does not see what USD holds; the file does."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    clip, taken = Clip("wide", wide_mesh(), 100, 30.0), []
    for _ in answers.encode(answers.USD, moving(clip, taken), clip):
        if len(taken) < 100:
            on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*.usdc"))
            assert on_disk >= (len(taken) - usd.FRAMES_A_SAVE) * FRAME_BYTES
    assert len(taken) == 100


@pytest.mark.parametrize("media_type", STREAMED)
def test_a_streamed_format_leaves_with_its_frames(media_type: str, rich_clip: Clip) -> None:
    taken: list[int] = []
    chunks = answers.encode(media_type, moving(rich_clip, taken), rich_clip)
    sent = list(itertools.takewhile(lambda _: len(taken) < 4, chunks))
    assert sum(map(len, sent)) > 2 * 4 * len(rich_clip.mesh.vertices)


@pytest.mark.parametrize("media_type", WAITING)
def test_a_waiting_format_lets_go_at_every_batch(media_type: str, rich_clip: Clip) -> None:
    """So that a caller can stop between batches, and say how far it is."""
    clip, taken = replace(rich_clip, frame_count=200), []
    chunks, steps = answers.encode(media_type, moving(clip, taken), clip), []
    for _ in chunks:
        steps.append(len(taken))
    assert max(np.diff([0, *steps])) <= 32


@pytest.mark.parametrize("media_type", [*STREAMED, *WAITING])
@pytest.mark.parametrize("stop", ["closed", "broken"])
def test_fault_30_a_stopped_export_leaves_no_file(
    media_type: str, stop: str, rich_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    clip = replace(rich_clip, frame_count=100)

    def failing() -> Iterator[Batch]:
        yield from itertools.islice(moving(clip), 50)
        raise OSError("no space left on device")

    chunks = answers.encode(media_type, failing() if stop == "broken" else moving(clip), clip)
    if stop == "broken":
        with pytest.raises(OSError, match="no space"):
            list(chunks)
    else:
        next(chunks)
        chunks.close()  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []
