"""Names and binary layouts of the streaming protocol (`docs/protocol.md`); numpy only, the client reads them too."""

import base64
import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from service.frames import Codec

SUBPROTOCOLS: dict[str, Codec] = {"reposer.v1.q16": "q16", "reposer.v1.q16d": "q16d", "reposer.v1.f32": "f32"}
"""Subprotocol -> codec of its frames."""
BEARER = "bearer."
PROTOCOL_VERSION = 1
MAX_SEQ, MAX_TIME = (1 << 32) - 1, (1 << 64) - 1
POSE_MAGIC = b"AVP1"
_POSE_HEADER = struct.Struct("<4sIQ")
POSE_NUMBERS = 75
POSE_BYTES = _POSE_HEADER.size + 4 * POSE_NUMBERS


class Close(IntEnum):
    """Why a WebSocket is closed."""

    DONE = 1000
    WRONG_TYPE = 1003
    NOT_JSON = 1007
    POLICY = 1008
    TOO_BIG = 1009
    ENGINE_FAILED = 1011
    RESTART = 1012
    OVERLOADED = 1013
    KEY_EXPIRED = 4401
    AVATAR_REMOVED = 4404
    BAD_MESSAGES = 4422
    TOO_FAST = 4429


class WireError(ValueError):
    """Bytes that are not what they should be."""


@dataclass(frozen=True)
class BinaryPose:
    """One pose as 316 bytes carry it; its numbers are not yet checked."""

    seq: int
    client_us: int
    pose: NDArray[np.float32]
    """(72,), axis-angle, radians."""
    translation: NDArray[np.float32]
    """(3,)"""


def encode_pose(
    seq: int, pose: NDArray[np.floating], translation: NDArray[np.floating] | None = None, client_us: int = 0
) -> bytes:
    """A pose (72,) or (24, 3), and a translation (3,), as a binary message.

    Raises:
        WireError: the pose or the translation has another number of numbers.
    """
    numbers = np.concatenate([np.ravel(pose), np.zeros(3) if translation is None else np.ravel(translation)])
    if len(numbers) != POSE_NUMBERS:
        raise WireError(f"expected {POSE_NUMBERS} numbers, got {len(numbers)}")
    return _POSE_HEADER.pack(POSE_MAGIC, seq, client_us) + numbers.astype("<f4").tobytes()


def decode_pose(data: bytes) -> BinaryPose:
    """The opposite of `encode_pose`.

    Raises:
        WireError: not a pose.
    """
    if len(data) != POSE_BYTES or data[:4] != POSE_MAGIC:
        raise WireError(f"expected {POSE_BYTES} bytes that begin with {POSE_MAGIC.decode()}")
    _, seq, client_us = _POSE_HEADER.unpack_from(data)
    numbers = np.frombuffer(data, "<f4", POSE_NUMBERS, _POSE_HEADER.size).astype(np.float32)
    return BinaryPose(seq, client_us, numbers[:72], numbers[72:])


def bearer_subprotocol(key: str) -> str:
    """The subprotocol that carries a key where no header can."""
    return BEARER + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


def choose_subprotocol(offered: list[str]) -> str | None:
    """The first of the offered subprotocols that is ours."""
    return next((name for name in offered if name in SUBPROTOCOLS), None)
