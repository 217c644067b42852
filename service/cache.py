"""Finished answers, kept in the process and dropped when not used for longest."""

import hashlib
from collections import OrderedDict

from service.poses import PoseSequence


class AnswerCache:
    """Least recently used answers up to a number of bytes.  For the event loop's thread only."""

    def __init__(self, max_bytes: int, max_entry_bytes: int) -> None:
        self.max_bytes, self.max_entry_bytes = max_bytes, min(max_entry_bytes, max_bytes)
        self._entries: OrderedDict[bytes, bytes] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> bytes | None:
        """The answer of `key`, now the most recently used one."""
        answer = self._entries.get(key)
        if answer is not None:
            self._entries.move_to_end(key)
        return answer

    def put(self, key: bytes, answer: bytes) -> None:
        """Keep a whole answer, unless it is too long."""
        if len(answer) > self.max_entry_bytes:
            return
        self._bytes += len(answer) - len(self._entries.pop(key, b""))
        self._entries[key] = answer
        while self._bytes > self.max_bytes:
            self._bytes -= len(self._entries.popitem(last=False)[1])


def answer_key(bundle_digest: str, lod: str, media_type: str, poses: PoseSequence) -> bytes:
    """Equal keys have equal answers: the poses count as they were understood, not as they were written."""
    digest = hashlib.sha256(f"1 {bundle_digest} {lod} {media_type} {poses.fps!r} {len(poses)} ".encode())
    digest.update(poses.rotations.tobytes())
    digest.update(poses.translation.tobytes())
    return digest.digest()
