"""What a call of the client may end in."""

# ruff: noqa: N818 - what went wrong is the name.

import json
from typing import Any


class ClientError(Exception):
    """Root of the tree."""


class Refused(ClientError):
    """The service answered with a problem (RFC 9457)."""

    def __init__(self, status: int, code: str, detail: str, problem: dict[str, Any]) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status, self.code, self.detail, self.problem = status, code, detail, problem

    @classmethod
    def read(cls, status: int, body: bytes) -> "Refused":
        """From an answer that is no success."""
        try:
            problem = json.loads(body)
            return cls(status, problem["code"], problem.get("detail") or problem["title"], problem)
        except (ValueError, KeyError, TypeError):
            return cls(status, "unknown", "from something that is not Reposer", {})


class ConnectionLost(ClientError):
    """The service cannot be reached, or the connection broke off and may not be tried again."""


class StreamClosed(ClientError):
    """The service closed the stream, for a reason that a new connection would not mend."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code} {reason}".rstrip())
        self.code, self.reason = code, reason


class PoseRefused(ClientError):
    """A message of this stream was refused; the stream goes on."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error.get('code')}: {error.get('detail') or error.get('title')}")
        self.code, self.seq = str(error.get("code")), error.get("seq")


class AvatarChanged(ClientError):
    """After a reconnect the avatar is another version: fetch its mesh again.  The stream goes on."""
