"""Another frame rate: which posted frames are needed, and what lies between them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.rotations import from_quaternions, quaternions


@dataclass(frozen=True)
class Selection:
    """The frames to read, and how the wanted frames come out of them."""

    frames: NDArray[np.intp]
    """(N,), ascending numbers of posted frames."""
    before: NDArray[np.intp] | None = None
    """(F,), for each wanted frame the place in `frames` of the last one that is not later; None: they are `frames`."""
    share: NDArray[np.float64] | None = None
    """(F,), in [0, 1): how far it is from there to the next one."""


def count_wanted(count: int, fps: float, target_fps: float | None, every: int) -> int:
    """How many frames `select` gives; at most a billion, which nobody can want."""
    if target_fps is None or target_fps == fps:
        return -(-count // every)
    return int(min((count - 1) / fps * target_fps + 1e-6, 1e9)) + 1


def select(count: int, fps: float, target_fps: float | None, every: int) -> Selection:
    """Each `every`-th of `count` frames, or those around the moments of a sequence at `target_fps`.

    The first moment is the first frame; none lies after the last frame, so nothing is extrapolated.
    """
    if target_fps is None or target_fps == fps:
        return Selection(np.arange(0, count, every))
    moments = np.arange(count_wanted(count, fps, target_fps, every)) * (fps / target_fps)
    # 30 of 120 frames a second must hit the frames themselves, whatever the rounding.
    whole = np.round(moments)
    moments = np.minimum(np.where(np.abs(moments - whole) < 1e-6, whole, moments), count - 1)
    before = moments.astype(np.intp)
    share: NDArray[np.float64] = moments - np.floor(moments)
    frames = np.unique(np.concatenate([before, np.minimum(before + 1, count - 1)]))
    return Selection(frames, np.searchsorted(frames, before), share)


def resample(
    rotations: NDArray[np.float64], translation: NDArray[np.float64], selection: Selection
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The wanted frames: rotations (N, J, 3, 3) the short way round, translations (N, 3) on straight lines."""
    if selection.before is None or selection.share is None:
        return rotations, translation
    after = np.minimum(selection.before + 1, len(selection.frames) - 1)
    share = selection.share[:, None]
    moved = (1 - share) * translation[selection.before] + share * translation[after]
    turned = rotations[selection.before]
    between = selection.share > 0
    start, end = quaternions(rotations[selection.before[between]]), quaternions(rotations[after[between]])
    mixed = _slerp(start, end, selection.share[between, None, None])
    turned[between] = from_quaternions(np.roll(mixed, 1, axis=-1))  # x y z w -> w x y z
    return turned, moved


def _slerp(start: NDArray[np.float64], end: NDArray[np.float64], share: NDArray[np.float64]) -> NDArray[np.float64]:
    cosine = (start * end).sum(axis=-1, keepdims=True)
    end = np.where(cosine < 0, -end, end)
    angle = np.arccos(np.clip(np.abs(cosine), 0, 1))
    # np.sinc keeps the weights finite where both are the same.
    whole = np.sinc(angle / np.pi)
    first = (1 - share) * np.sinc((1 - share) * angle / np.pi) / whole
    return first * start + share * np.sinc(share * angle / np.pi) / whole * end
