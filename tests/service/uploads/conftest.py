"""A folder of avatars that a test may change, and bundles to change it with."""

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from service import uploads
from service.bundle.files import write_bundle


@pytest.fixture
def folder(bundle_dir: Path, tmp_path: Path) -> Path:
    """A folder of avatars that a test may change; it holds `tiny`."""
    shutil.copytree(bundle_dir / "tiny", tmp_path / "avatars" / "tiny")
    return tmp_path / "avatars"


@pytest.fixture
def make_bundle(tmp_path: Path, bundle_parts: Any) -> Callable[..., Path]:
    """A valid bundle that differs from others by its metrics, or as said."""

    def make(avatar_id: str = "tiny", iou: float = 0.75, **changes: Any) -> Path:
        path = tmp_path / "made" / f"{iou}" / avatar_id
        write_bundle(path, avatar_id=avatar_id, **bundle_parts | {"metrics": {"iou": iou}} | changes)
        return path

    return make


@pytest.fixture
def no_vetting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vetting has its own tests, and takes a second."""

    async def vet(_: Path) -> None:
        await anyio.lowlevel.checkpoint()

    monkeypatch.setattr(uploads, "vet", vet)


@pytest.fixture(scope="session")
def zip_of() -> Callable[..., bytes]:
    """The files of a folder as a zip, some of them changed."""

    def pack(folder: Path, changed: dict[str, bytes] | None = None) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, data in ({path.name: path.read_bytes() for path in folder.iterdir()} | (changed or {})).items():
                archive.writestr(name, data)
        return buffer.getvalue()

    return pack
