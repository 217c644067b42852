"""What the calls look like on the wire, the same for both clients."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import ArrayLike

from service.frames import MEDIA_TYPE, Codec

Poses = ArrayLike | os.PathLike[str] | str
"""An array in any shape the service takes, or the path of an .npz, .smpl or .json file."""

MEDIA_TYPES = {
    ".frames": MEDIA_TYPE,
    ".q16.frames": f"{MEDIA_TYPE};codec=q16",
    ".q16d.frames": f"{MEDIA_TYPE};codec=q16d",
    ".ndjson": "application/x-ndjson",
    ".npz": "application/x-npz",
    ".glb": "model/gltf-binary",
    ".glb.zip": "application/vnd.reposer.glb+zip",
    ".skinned.glb": "application/vnd.reposer.skinned+gltf-binary",
    ".usdz": "model/vnd.usdz+zip",
    ".pc2.zip": "application/vnd.reposer.pc2+zip",
    ".pc2": "application/x-pc2",
    ".mdd": "application/x-mdd",
    ".ply.zip": "application/vnd.reposer.ply+zip",
    ".obj.zip": "application/vnd.reposer.obj+zip",
}
"""Suffix of a file -> what to ask for."""
_BODY_TYPES = {".npz": "application/x-npz", ".smpl": "application/x-npz", ".json": "application/json"}


@dataclass(frozen=True)
class Applied:
    """What the service says it applied to the posted poses."""

    frames: int
    vertices: int
    fps: float
    up_axis: str
    units: str
    warning: str | None

    @classmethod
    def read(cls, headers: Any) -> "Applied":
        return cls(
            int(headers["reposer-frames"]),
            int(headers["reposer-vertices"]),
            float(headers["reposer-fps"]),
            headers["reposer-up-axis"],
            headers["reposer-units"],
            headers.get("warning"),
        )


@dataclass(frozen=True)
class Job:
    """A sequence that is reposed in the background."""

    id: str
    state: str
    """queued, running, done, failed or cancelled."""
    frames: int
    frames_done: int
    error: str | None

    @classmethod
    def read(cls, answer: dict[str, Any]) -> "Job":
        return cls(answer["id"], answer["state"], answer["frames"], answer["frames_done"], answer.get("error"))

    @property
    def ended(self) -> bool:
        return self.state not in ("queued", "running")


@dataclass(frozen=True)
class Call:
    """One request."""

    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


def media_type_of(path: Path | str) -> str:
    """The format that the name of a file asks for.

    Raises:
        ValueError: none of ours.
    """
    name = Path(path).name
    for suffix in sorted(MEDIA_TYPES, key=len, reverse=True):
        if name.endswith(suffix):
            return MEDIA_TYPES[suffix]
    raise ValueError(f"expected a name that ends with one of {', '.join(MEDIA_TYPES)}, got {name}")


def frames_type(codec: Codec) -> str:
    """The media type of the frame stream in this codec."""
    return f"{MEDIA_TYPE};codec={codec}"


def repose_call(
    avatar: str,
    poses: Poses,
    translations: ArrayLike | None,
    accept: str,
    options: dict[str, Any],
    resource: str = "repose",
    timeout_s: float | None = None,
) -> Call:
    """`POST /avatars/{id}/repose`, or `/jobs`.

    Args:
        timeout_s: seconds that the service is given; it answers 504 if they do not do.

    Raises:
        OSError: the file of poses cannot be read.
        ValueError: its name ends with none of .npz, .smpl, .json.
    """
    if isinstance(poses, str | os.PathLike):
        path = Path(poses)
        kind = _BODY_TYPES.get(path.suffix)
        if kind is None:
            raise ValueError(f"expected poses in .npz, .smpl or .json, got {path.name}")
        body = path.read_bytes()
    else:
        kind, file = "application/x-npz", io.BytesIO()
        arrays = {"poses": np.asarray(poses)} | ({} if translations is None else {"trans": np.asarray(translations)})
        np.savez(file, allow_pickle=False, **arrays)
        body = file.getvalue()
    # Booleans in lower case, as everywhere but in Python.
    query = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in options.items()
        if value is not None
    }
    headers = {"Content-Type": kind, "Accept": accept}
    headers |= {} if timeout_s is None else {"Request-Timeout": str(timeout_s)}
    return Call(avatar_path(avatar, resource), query, headers, body)


def avatar_path(avatar: str, *rest: str) -> str:
    """The path below which everything of an avatar is."""
    return "/" + "/".join(["avatars", quote(avatar, safe=""), *rest])


def authorization(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}
