"""What the calls look like on the wire, the same for both clients."""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import ArrayLike

from service.frames import MEDIA_TYPE, Codec

Poses = ArrayLike | os.PathLike[str] | str
"""An array in any shape the service takes, or the path of an .npz, .smpl or .json file."""
Bundle = os.PathLike[str] | str | bytes
"""The path of a folder, .zip or .tar; or the bytes of a zip or tar."""

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
_BUNDLE_TYPES = {".zip": "application/zip", ".tar": "application/x-tar"}
_PIECE_BYTES = 1 << 18


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
    avatar: str

    @classmethod
    def read(cls, answer: dict[str, Any]) -> "Job":
        return cls(
            answer["id"],
            answer["state"],
            answer["frames"],
            answer["frames_done"],
            answer.get("error"),
            answer["avatar"],
        )

    @property
    def ended(self) -> bool:
        return self.state not in ("queued", "running")


@dataclass(frozen=True)
class Call:
    """One request."""

    path: str
    query: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def sent_headers(self) -> dict[str, str]:
        # Said here because httpx cannot see the length of what comes in pieces.
        return self.headers | ({"Content-Length": str(len(self.body))} if self.body else {})

    def pieces(self) -> Iterator[bytes]:
        """The body.  The timeout for sending is one for each piece, and a large bundle takes longer than that."""
        for start in range(0, len(self.body), _PIECE_BYTES):
            yield self.body[start : start + _PIECE_BYTES]


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


def upload_call(avatar: str, bundle: Bundle, if_match: str | None, only_new: bool) -> Call:
    """`PUT /avatars/{id}`.

    Raises:
        OSError: the bundle cannot be read.
        ValueError: it is a file whose name ends with none of .zip, .tar.
    """
    if isinstance(bundle, bytes):
        kind, body = _BUNDLE_TYPES[".zip" if bundle.startswith(b"PK") else ".tar"], bundle
    elif (path := Path(bundle)).is_dir():
        kind, body = _BUNDLE_TYPES[".tar"], _tar_of(path)
    elif path.exists() and path.suffix not in _BUNDLE_TYPES:
        raise ValueError(f"expected a folder, .zip or .tar, got {path.name}")
    else:
        body, kind = path.read_bytes(), _BUNDLE_TYPES[path.suffix]
    headers = {"Content-Type": kind} | _believed(if_match) | ({"If-None-Match": "*"} if only_new else {})
    return Call(avatar_path(avatar), headers=headers, body=body)


def delete_call(avatar: str, if_match: str | None) -> Call:
    """`DELETE /avatars/{id}`."""
    return Call(avatar_path(avatar), headers=_believed(if_match))


def load_call(avatar: str, version: str | None, if_match: str | None) -> Call:
    """`POST /avatars/{id}/load`."""
    query = {} if version is None else {"version": version}
    return Call(avatar_path(avatar, "load"), query, _believed(if_match))


def _believed(digest: str | None) -> dict[str, str]:
    """`If-Match`; the digest may also come as the ETag that it is, or be `*`."""
    if digest is None:
        return {}
    return {"If-Match": digest if digest == "*" or digest.startswith('"') else f'"{digest}"'}


def _tar_of(folder: Path) -> bytes:
    """The files of a folder, at the top: then the folder may have another name than the avatar."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(folder.iterdir()):
            member, data = tarfile.TarInfo(path.name), path.read_bytes()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def avatar_path(avatar: str, *rest: str) -> str:
    """The path below which everything of an avatar is."""
    return "/" + "/".join(["avatars", quote(avatar, safe=""), *rest])


def authorization(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}
