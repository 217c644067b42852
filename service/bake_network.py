"""The small network of a baked avatar, from a pose to the weights of its shapes, and how it is fitted in NumPy."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

FLOAT32 = NDArray[np.float32]
RIDGE = 10.0
RATE, BATCH, WARM_UP_STEPS = 2e-3, 128, 200
FIRST_DECAY, SECOND_DECAY = 0.9, 0.999
LEAST_SPREAD = 0.03
"""A feature that hardly moves in the poses to fit on counts for little in others."""
LEAST_WEIGHT = 0.1
"""Of a feature beside the others', in the first layer before it is trained."""


@dataclass(frozen=True)
class Network:
    """weights = constant + f linear + h output, with f the features of a pose and h of the last hidden layer."""

    before: FLOAT32
    """(23, 3, 3): world rotation of each joint's parent in the canonical pose; feature j is before R_j after - 1."""
    after: FLOAT32
    """(23, 3, 3): that of the joint itself, transposed."""
    hidden: tuple[tuple[FLOAT32, FLOAT32], ...]
    """Matrix and bias of each hidden layer: h = tanh(h matrix + bias), beginning with f."""
    linear: FLOAT32
    """(207, K)"""
    output: FLOAT32
    """(H, K)"""
    constant: FLOAT32

    def __call__(self, rotations: NDArray[np.floating]) -> FLOAT32:
        """(F, 24, 3, 3), each joint relative to its parent -> (F, K), the weights of the shapes."""
        f = features(self.before, self.after, rotations)
        *_, last = _layers(f, self.hidden)
        return np.asarray(self.constant + f @ self.linear + last @ self.output, np.float32)

    def scaled(self, factors: FLOAT32) -> "Network":
        """The same for weights that are `factors` (K,) times as large."""
        return replace(
            self, linear=factors * self.linear, output=factors * self.output, constant=factors * self.constant
        )


def features(before: FLOAT32, after: FLOAT32, rotations: NDArray[np.floating]) -> FLOAT32:
    """(F, 207)"""
    turns = before @ np.asarray(rotations, np.float64)[:, 1:] @ after
    return (turns - np.eye(3)).reshape(len(turns), -1).astype(np.float32)


def fit_network(
    before: FLOAT32, after: FLOAT32, rotations: NDArray[np.floating], weights: FLOAT32, sizes: tuple[int, ...],
    epochs: int, seed: int,
) -> Network:  # fmt: skip
    """Ridge regression, then Adam on all of it (Kingma and Ba, 2015), the rate falling to zero as a cosine.

    Args:
        weights: (F, K); an error counts by its square, so they are to be coordinates along shapes of unit length.
        sizes: of the hidden layers.
    """
    f = features(before, after, rotations)
    middle, spread = f.mean(axis=0), f.std(axis=0) + np.float32(LEAST_SPREAD)
    inputs, rng = (f - middle) / spread, np.random.default_rng(seed)
    unit = np.sqrt(weights.var(axis=0).mean()) + np.float32(1e-9)
    constant = weights.mean(axis=0)
    targets = (weights - constant) / unit
    linear = _ridge(inputs, targets)
    # What matters is seen sharper: the hips, for a skirt.
    weight = np.sqrt((linear**2).sum(axis=1))
    spread = spread / np.maximum(weight / (np.sqrt((weight**2).mean()) + 1e-9), LEAST_WEIGHT)
    inputs = (f - middle) / spread
    linear = _ridge(inputs, targets)
    parameters = [linear, np.zeros(len(constant), np.float32), np.zeros((sizes[-1], len(constant)), np.float32)]
    for rows, columns in zip((inputs.shape[1], *sizes), sizes, strict=False):
        matrix = rng.normal(size=(rows, columns)) / np.sqrt(rows)
        parameters += [matrix.astype(np.float32), np.zeros(columns, np.float32)]
    _descend(parameters, inputs, targets, epochs, rng)
    linear, shift, output, *rest = parameters
    hidden = list(zip(rest[::2], rest[1::2], strict=True))
    # The scaling of the inputs goes into what they are multiplied by.
    first = hidden[0][0] / spread[:, None]
    hidden[0] = first, hidden[0][1] - middle @ first
    linear = linear / spread[:, None] * unit
    return Network(before, after, tuple(hidden), linear, output * unit, constant + shift * unit - middle @ linear)


def _ridge(inputs: FLOAT32, targets: FLOAT32) -> FLOAT32:
    square = inputs.T @ inputs + RIDGE * np.eye(inputs.shape[1])
    return np.linalg.solve(square, inputs.T @ targets).astype(np.float32)


def _descend(
    parameters: list[FLOAT32], inputs: FLOAT32, targets: FLOAT32, epochs: int, rng: np.random.Generator
) -> None:
    """Adam in place."""
    batches = max(1, len(inputs) // BATCH)
    steps, step = epochs * batches, 0
    first, second = ([np.zeros_like(value) for value in parameters] for _ in range(2))
    for _ in tqdm(range(epochs), desc="network", leave=False, disable=None):
        for rows in np.array_split(rng.permutation(len(inputs)), batches):
            step += 1
            unbiased = np.sqrt(1 - SECOND_DECAY**step) / (1 - FIRST_DECAY**step)
            rate = RATE * (0.5 + 0.5 * np.cos(np.pi * step / steps)) * min(1.0, step / WARM_UP_STEPS) * unbiased
            slopes = _slopes(parameters, inputs[rows], targets[rows])
            for value, slope, mean, square in zip(parameters, slopes, first, second, strict=True):
                mean += (1 - FIRST_DECAY) * (slope - mean)
                square += (1 - SECOND_DECAY) * (slope * slope - square)
                value -= np.float32(rate) * mean / (np.sqrt(square) + 1e-8)


def _slopes(parameters: list[FLOAT32], inputs: FLOAT32, targets: FLOAT32) -> list[Any]:
    """Derivatives of half the mean squared error by `linear`, the constant, `output`, and each layer's two."""
    linear, shift, output, *rest = parameters
    hidden = tuple(zip(rest[::2], rest[1::2], strict=True))
    h = list(_layers(inputs, hidden))
    off = (inputs @ linear + shift + h[-1] @ output - targets) / len(inputs)
    slopes: list[Any] = []
    back = off @ output.T
    for n in reversed(range(len(hidden))):
        back = back * (1 - h[n + 1] ** 2)
        slopes = [h[n].T @ back, back.sum(axis=0), *slopes]
        back = back @ hidden[n][0].T
    return [inputs.T @ off, off.sum(axis=0), h[-1].T @ off, *slopes]


def _layers(f: FLOAT32, hidden: tuple[tuple[FLOAT32, FLOAT32], ...]) -> Iterator[FLOAT32]:
    """f, and what each hidden layer makes of it."""
    yield f
    for matrix, bias in hidden:
        f = np.tanh(f @ matrix + bias)
        yield f
