"""Writing and reading an avatar's folder.  A reader never sees half a bundle, and never believes what it did not check.

    avatars/<id>/avatar.json  mesh.<lod>.glb  repose.onnx  checkpoint.safetensors

Nothing in it is ever unpickled.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.bundle.glb import GlbError, Mesh, read_mesh, write_mesh
from service.bundle.manifest import (
    CHECKPOINT_FILE,
    LODS,
    MANIFEST_FILE,
    REPOSE_FILE,
    FileRecord,
    LevelOfDetail,
    Manifest,
    SkeletonRecord,
    mesh_file,
)
from service.bundle.skeleton import Skeleton

MAX_MANIFEST_BYTES = 1 << 20
MAX_FILE_BYTES = 2 << 30


class BundleError(ValueError):
    """The folder is not a whole, unharmed bundle of a version we know."""


@dataclass(frozen=True)
class Bundle:
    """A verified bundle in memory.  The checkpoint is verified but not kept: serving does not need it."""

    manifest: Manifest
    skeleton: Skeleton
    meshes: dict[str, Mesh]
    mesh_files: dict[str, bytes]
    """The GLB of each level of detail, as it lies on disk."""
    repose_onnx: bytes
    digest: str
    """SHA-256 of `avatar.json`, which names the hash of every other file: equal digests are equal avatars."""


def write_bundle(
    path: Path,
    *,
    avatar_id: str,
    skeleton: Skeleton,
    meshes: Mapping[str, Mesh],
    repose_onnx: bytes,
    checkpoint: bytes,
    provenance: dict[str, Any],
    metrics: dict[str, float],
) -> Manifest:
    """Write a bundle to the folder `path`, replacing the one that is there.

    The files go to a temporary folder beside `path`, are synced and read back through `read_bundle`, and only
    then take the place of the old ones: on any failure the old bundle stays.

    Args:
        path: the bundle's folder, named `avatar_id`; its parents are made.
        meshes: the mesh of each level of detail, in the canonical pose; `standard` must be there.
        repose_onnx: a graph with the inputs and outputs of `manifest.INPUTS` and `OUTPUTS`, opset >= 18.
        provenance: anything JSON can hold: data_set, split, seed, code_version, settings.

    Raises:
        BundleError: what was given does not make a valid bundle.
    """
    path = Path(path)
    if path.name != avatar_id:
        raise BundleError(f"expected a folder named {avatar_id!r}, got {path.name!r}")
    unknown = set(meshes) - set(LODS)
    if unknown:
        raise BundleError(f"expected levels of detail among {LODS}, got {sorted(unknown)}")
    contents = {mesh_file(lod): write_mesh(meshes[lod], avatar_id) for lod in LODS if lod in meshes}
    contents |= {REPOSE_FILE: repose_onnx, CHECKPOINT_FILE: checkpoint}
    levels = {
        lod: {"file": mesh_file(lod), "vertices": len(meshes[lod].vertices), "faces": len(meshes[lod].faces)}
        for lod in LODS
        if lod in meshes
    }
    try:
        manifest = Manifest.model_validate(
            {
                "id": avatar_id,
                "skeleton": SkeletonRecord.of(skeleton),
                "levels_of_detail": {lod: LevelOfDetail(**level) for lod, level in levels.items()},
                "provenance": provenance,
                "metrics": metrics,
                "files": {name: FileRecord(sha256=_sha256(data), bytes=len(data)) for name, data in contents.items()},
            }
        )
        text = json.dumps(manifest.model_dump(mode="json"), indent=1, allow_nan=False).encode() + b"\n"
    except (ValidationError, ValueError, TypeError) as error:
        raise BundleError(f"not a valid bundle: {error}") from error
    _replace_folder(path, contents | {MANIFEST_FILE: text})
    return manifest


def read_bundle(path: Path) -> Bundle:
    """Read and verify a bundle.

    Raises:
        BundleError: a file is missing, too many, too long, too short, changed, no plain file, or says other
            sizes than the manifest; the version is unknown; the folder is not named after the avatar.
    """
    path = Path(path)
    return _read(path, path.name)


def read_manifest(path: Path) -> Manifest:
    """Read what a bundle says of itself; its other files are neither read nor verified.

    Raises:
        BundleError: `avatar.json` is missing or invalid, or the folder is not named after the avatar.
    """
    return _read_manifest(path, path.name)[0]


def _read_manifest(path: Path, avatar_id: str) -> tuple[Manifest, bytes]:
    text = _read_file(path / MANIFEST_FILE, None)
    try:
        document = json.loads(text)
        version = document.get("format_version") if isinstance(document, dict) else None
        if version != 1:
            raise BundleError(f"expected format version 1, got {version!r}")
        manifest = Manifest.model_validate(document)
    except BundleError:
        raise
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{MANIFEST_FILE} is not valid: {error}") from error
    if manifest.id != avatar_id:
        raise BundleError(f"the folder {avatar_id!r} holds the avatar {manifest.id!r}")
    return manifest, text


def _read(path: Path, avatar_id: str) -> Bundle:
    manifest, text = _read_manifest(path, avatar_id)
    present = {entry.name for entry in path.iterdir()}
    expected = set(manifest.files) | {MANIFEST_FILE}
    if present != expected:
        raise BundleError(f"missing files {sorted(expected - present)}, unknown files {sorted(present - expected)}")
    contents = {name: _read_file(path / name, record) for name, record in manifest.files.items()}
    meshes = {}
    for lod, level in manifest.levels_of_detail.items():
        try:
            mesh = read_mesh(contents[level.file])
        except GlbError as error:
            raise BundleError(f"{level.file}: {error}") from error
        if (len(mesh.vertices), len(mesh.faces)) != (level.vertices, level.faces):
            raise BundleError(f"{level.file}: expected {level.vertices} vertices and {level.faces} faces")
        meshes[str(lod)] = mesh
    return Bundle(
        manifest=manifest,
        skeleton=manifest.skeleton.skeleton(),
        meshes=meshes,
        mesh_files={str(lod): contents[level.file] for lod, level in manifest.levels_of_detail.items()},
        repose_onnx=contents[REPOSE_FILE],
        digest=_sha256(text),
    )


def _read_file(path: Path, record: FileRecord | None) -> bytes:
    """The bytes of a plain file, checked against its record; the manifest has none but a limit."""
    try:
        # Neither through a link nor waiting on a pipe: a bundle is made of plain files.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BundleError(f"{path.name} cannot be opened: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path.name} is not a plain file")
        if record is None:
            if status.st_size > MAX_MANIFEST_BYTES:
                raise BundleError(f"{path.name} has {status.st_size} bytes, more than {MAX_MANIFEST_BYTES}")
        elif status.st_size != record.bytes or record.bytes > MAX_FILE_BYTES:
            raise BundleError(f"{path.name}: expected {record.bytes} bytes, got {status.st_size}")
        data = file.read(status.st_size)
    if record is not None and _sha256(data) != record.sha256:
        raise BundleError(f"{path.name}: the SHA-256 is not the manifest's")
    return data


def _replace_folder(path: Path, contents: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden names are no avatar ids, so a reader of the parent passes over what a crash leaves behind.
    mark = uuid.uuid4().hex
    fresh, old = path.parent / f".{path.name}.new-{mark}", path.parent / f".{path.name}.old-{mark}"
    fresh.mkdir()
    try:
        for name, data in contents.items():
            with open(fresh / name, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(fresh)
        _read(fresh, path.name)
        replaces = path.exists()
        if replaces:
            os.rename(path, old)
        try:
            os.rename(fresh, path)
        except OSError:
            if replaces:
                os.rename(old, path)
            raise
        _sync_folder(path.parent)
    finally:
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        os.fsync(descriptor)
    os.close(descriptor)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
