"""One streaming session as a state machine: messages and the clock in, messages and work out.  No network, no threads.

`docs/protocol.md` is its specification.  Times are `time.monotonic()` seconds and always passed in.
"""

import json
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from service.errors import AvatarServiceError, InvalidPose, PoseNotFinite
from service.streaming.wire import MAX_SEQ, MAX_TIME, Close, WireError, decode_pose

Mode = Literal["live", "complete"]
Placed = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Rotations (24, 3, 3) and root translation (3,), metres, y up."""
CheckPose = Callable[[Any, Any], Placed]
"""From what a message holds as pose and translation; raises `InvalidPose`."""


@dataclass(frozen=True)
class Limits:
    """What the server grants a connection."""

    message_bytes: int = 65_536
    messages_per_s: int = 240
    bad_messages: int = 3
    max_fps: float = 120.0
    max_window: int = 8
    credits: int = 32
    heartbeat_s: float = 5.0
    silence_s: float = 10.0
    overload_s: float = 3.0


@dataclass(frozen=True)
class Pose:
    """One accepted pose."""

    seq: int
    client_us: int
    rotations: NDArray[np.float32]
    """(24, 3, 3)"""
    translation: NDArray[np.float32]
    """(3,), metres."""
    arrived_s: float


@dataclass(frozen=True)
class FrameNumbers:
    """What the header of a frame says besides its vertices."""

    seq: int
    frame: int
    client_us: int
    dropped_before: bool


@dataclass(frozen=True)
class Closing:
    """The connection ends with this code."""

    code: Close
    reason: str


Out = dict[str, Any] | Closing
"""A text message to send, or the end; nothing follows a `Closing`."""


@dataclass
class Stats:
    """Counted since the start of the connection."""

    poses: int = 0
    frames: int = 0
    dropped: int = 0
    refused: int = 0


class StreamMessageInvalid(InvalidPose):
    """A message that is not one of the protocol, or not now."""

    code, title = "message-invalid", "The message is not accepted"


class SeqInvalid(StreamMessageInvalid):
    """`seq` does not rise."""

    code, title = "seq-invalid", "The sequence number is not accepted"


class AckInvalid(StreamMessageInvalid):
    """An ack of a frame that was not sent."""

    code, title = "ack-invalid", "No such frame was sent"


class CreditsExceeded(StreamMessageInvalid):
    """More unanswered poses than granted."""

    code, title = "credits-exceeded", "Too many poses are unanswered"


class Session:
    """One connection after its hello."""

    def __init__(
        self,
        mode: Mode,
        check_pose: CheckPose,
        now: float,
        *,
        limits: Limits = Limits(),
        max_fps: float | None = None,
        window: int = 2,
        last_seq: int = -1,
    ) -> None:
        self.mode, self.limits, self.stats = mode, limits, Stats()
        self.max_fps, self.window = max_fps or limits.max_fps, window
        self._check_pose = check_pose
        self._last_seq, self._last_sent_seq = last_seq, -1
        self._waiting: deque[Pose] = deque()
        self._computing = 0
        self._unacked: deque[tuple[int, float]] = deque()  # (seq, when it was sent)
        self._dropped = False  # since the last pose was taken
        self._dropped_before = False  # the one being computed
        self._bad_in_a_row = 0
        self._ended = False
        self._due_s = self._heard_s = self._pinged_s = now
        self._tokens, self._tokens_s = float(limits.messages_per_s), now
        self._overloaded_s: float | None = None

    # Messages

    def receive(self, message: str | bytes, now: float) -> list[Out]:
        """One message of the client; what to send back."""
        self._heard_s = now
        if not self._spend_token(now):
            return [_error("too-many-messages", "Too many messages", 429), Closing(Close.TOO_FAST, "too-many-messages")]
        if len(message) > self.limits.message_bytes:
            return [Closing(Close.TOO_BIG, "message-too-big")]
        seq = None
        try:
            if isinstance(message, bytes):
                pose = decode_pose(message)
                seq = pose.seq
                return self._pose(seq, pose.client_us, pose.pose, pose.translation, now)
            document = json.loads(message)
            if not isinstance(document, dict):
                raise ValueError("no object")
            seq = document.get("seq")
            return self._dispatch(document, now)
        except WireError:
            return [Closing(Close.WRONG_TYPE, "not-a-pose")]
        except (ValueError, RecursionError):
            return [Closing(Close.NOT_JSON, "json-broken")]
        except InvalidPose as error:
            return self._refuse(error, seq)

    def _dispatch(self, document: dict[str, Any], now: float) -> list[Out]:
        match document.get("type"):
            case "pose":
                seq = _whole(document, "seq", MAX_SEQ)
                client_us = _whole(document, "t", MAX_TIME, default=0)
                if "pose" not in document:
                    raise StreamMessageInvalid("a pose message needs the member pose")
                return self._pose(seq, client_us, document["pose"], document.get("trans", [0.0, 0.0, 0.0]), now)
            case "ack":
                return self._ack(_whole(document, "seq", MAX_SEQ))
            case "config":
                return self._configure(document)
            case "ping":
                t = _whole(document, "t", MAX_TIME, default=0)
                return [{"type": "pong", "t": t, "stats": asdict(self.stats)}]
            case "pong":
                return []
            case "end":
                self._ended = True
                return []
            case _:
                raise StreamMessageInvalid("expected type to be one of pose, ack, config, ping, pong, end")

    def _pose(self, seq: int, client_us: int, pose: Any, translation: Any, now: float) -> list[Out]:
        if self._ended:
            raise StreamMessageInvalid("no pose is expected after end")
        if seq <= self._last_seq:
            raise SeqInvalid(f"expected seq above {self._last_seq}, got {seq}")
        if self.mode == "complete" and len(self._waiting) + self._computing >= self.limits.credits:
            raise CreditsExceeded(f"expected at most {self.limits.credits} unanswered poses")
        rotations, moved = self._check_pose(pose, translation)
        self._last_seq, self._bad_in_a_row = seq, 0
        self.stats.poses += 1
        if self.mode == "live" and self._waiting:
            self._waiting.clear()
            self._drop(1)
        self._waiting.append(Pose(seq, client_us, rotations, moved, now))
        return []

    def _ack(self, seq: int) -> list[Out]:
        if seq > self._last_sent_seq:
            raise AckInvalid(f"the last frame sent is {self._last_sent_seq}, got an ack of {seq}")
        while self._unacked and self._unacked[0][0] <= seq:
            self._unacked.popleft()
        return []

    def _configure(self, document: dict[str, Any]) -> list[Out]:
        max_fps, window = document.get("max_fps", self.max_fps), document.get("window", self.window)
        if type(max_fps) not in (int, float) or not 0 < max_fps <= self.limits.max_fps:
            raise StreamMessageInvalid(f"expected max_fps above 0 and at most {self.limits.max_fps:g}")
        if type(window) is not int or not 1 <= window <= self.limits.max_window:
            raise StreamMessageInvalid(f"expected window to be a whole number from 1 to {self.limits.max_window}")
        self.max_fps, self.window = float(max_fps), window
        return [{"type": "config", "max_fps": self.max_fps, "window": self.window}]

    def _refuse(self, error: InvalidPose, seq: Any) -> list[Out]:
        self.stats.refused += 1
        self._bad_in_a_row += 1
        out: list[Out] = [error_message(error, seq if type(seq) is int and 0 <= seq <= MAX_SEQ else None)]
        if isinstance(error, CreditsExceeded):
            out.append(Closing(Close.POLICY, error.code))
        elif self._bad_in_a_row >= self.limits.bad_messages:
            code = Close.NOT_JSON if isinstance(error, PoseNotFinite) else Close.BAD_MESSAGES
            out.append(Closing(code, error.code))
        return out

    def _spend_token(self, now: float) -> bool:
        rate = self.limits.messages_per_s
        self._tokens = min(rate, self._tokens + rate * (now - self._tokens_s))
        self._tokens_s = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    # Work

    def take(self, now: float) -> list[Pose]:
        """The poses to compute now, as many as may be sent; each ends in `frame_sent` or `not_computed`."""
        room = self.window - len(self._unacked)
        if self._computing or room < 1 or not self._waiting or self.wait_s(now) > 0:
            return []
        if self.mode == "live":
            # Late by a little is no reason to fall behind for good, so up to one interval is made up for.
            interval_s = 1 / self.max_fps
            self._due_s = max(self._due_s, now - interval_s) + interval_s
        poses = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        self._computing = len(poses)
        self._dropped_before, self._dropped = self._dropped_before or self._dropped, False
        return poses

    def wait_s(self, now: float) -> float:
        """Time until the rate allows another frame."""
        return max(0.0, self._due_s - now) if self.mode == "live" else 0.0

    def frame_sent(self, pose: Pose, now: float) -> FrameNumbers:
        """The next frame is that of `pose`."""
        numbers = FrameNumbers(pose.seq, self.stats.frames, pose.client_us, self._dropped_before)
        self.stats.frames += 1
        self._computing -= 1
        self._dropped_before, self._overloaded_s = False, None
        self._last_sent_seq = pose.seq
        self._unacked.append((pose.seq, now))
        return numbers

    def not_computed(self, poses: list[Pose], now: float, why: AvatarServiceError) -> list[Out]:
        """The machine had no time for what was taken.  Live streams live with that, for a while."""
        self._computing -= len(poses)
        self._drop(len(poses))
        self._overloaded_s = now if self._overloaded_s is None else self._overloaded_s
        if self.mode == "live" and now - self._overloaded_s < self.limits.overload_s:
            return []
        return [error_message(why), Closing(Close.OVERLOADED, why.code)]

    def _drop(self, count: int) -> None:
        self.stats.dropped += count
        self._dropped = True

    # Time and the end

    def tick(self, now: float) -> list[Out]:
        """To be called about every second."""
        if now - self._heard_s > self.limits.silence_s:
            return [Closing(Close.POLICY, "silent")]
        if self._unacked and now - self._unacked[0][1] > self.limits.silence_s:
            return [Closing(Close.POLICY, "unacknowledged")]
        if now - max(self._heard_s, self._pinged_s) > self.limits.heartbeat_s:
            self._pinged_s = now
            return [{"type": "ping", "t": int(1e6 * now)}]
        return []

    def finish(self) -> list[Out]:
        """What remains to be said when the client has ended and has used every frame; empty before."""
        if not self._ended or self._waiting or self._computing or self._unacked:
            return []
        return [{"type": "end", "stats": asdict(self.stats)}, Closing(Close.DONE, "end")]


def error_message(error: AvatarServiceError, seq: int | None = None) -> dict[str, Any]:
    """An error of ours as a text message, with the members of the REST problem."""
    # As in REST: what a 5xx says may name paths, so only its title leaves.
    more: dict[str, Any] = {"detail": str(error)} if error.status < 500 and str(error) else {}
    if "joint" in error.extra:
        more["joint"] = error.extra["joint"]
    if seq is not None:
        more["seq"] = seq
    return _error(error.code, error.title, error.status, **more)


def _error(code: str, title: str, status: int, **members: Any) -> dict[str, Any]:
    return {"type": "error", "code": code, "title": title, "status": status, **members}


def _whole(document: dict[str, Any], name: str, largest: int, default: int | None = None) -> int:
    value = document.get(name, default)
    if type(value) is not int or not 0 <= value <= largest:
        raise StreamMessageInvalid(f"expected {name} to be a whole number from 0 to {largest}")
    return value
