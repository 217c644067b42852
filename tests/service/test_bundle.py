"""A bundle comes back as it was written, and anything else is refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.bundle.files import BundleError, read_bundle, write_bundle
from service.bundle.glb import Mesh
from service.bundle.manifest import is_avatar_id


@pytest.fixture
def bundle(bundle_dir: Path, tmp_path: Path) -> Path:
    """A copy that a test may harm."""
    return Path(shutil.copytree(bundle_dir / "tiny", tmp_path / "tiny"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((bundle / "avatar.json").read_text())
    change(document)
    (bundle / "avatar.json").write_text(json.dumps(document))


def test_round_trip_is_exact(bundle: Path, bundle_parts: dict[str, Any]) -> None:
    read = read_bundle(bundle)
    for lod, mesh in bundle_parts["meshes"].items():
        for name in ("vertices", "faces", "colors", "skin_joints", "skin_weights"):
            np.testing.assert_array_equal(getattr(read.meshes[lod], name), getattr(mesh, name))
        assert read.mesh_files[lod] == (bundle / f"mesh.{lod}.glb").read_bytes()
    for name in ("rest_joints", "canonical_pose"):
        np.testing.assert_array_equal(getattr(read.skeleton, name), getattr(bundle_parts["skeleton"], name))
    assert read.skeleton.parents == bundle_parts["skeleton"].parents
    assert read.repose_onnx == bundle_parts["repose_onnx"]
    assert (bundle / "checkpoint.safetensors").read_bytes() == bundle_parts["checkpoint"]
    assert read.manifest.provenance == bundle_parts["provenance"]
    assert read.manifest.metrics == bundle_parts["metrics"]
    assert read.manifest.levels_of_detail["standard"].vertices == len(bundle_parts["meshes"]["standard"].vertices)


def test_the_same_parts_have_the_same_digest(tmp_path: Path, bundle_dir: Path, bundle_parts: dict[str, Any]) -> None:
    write_bundle(tmp_path / "tiny", avatar_id="tiny", **bundle_parts)
    assert read_bundle(tmp_path / "tiny").digest == read_bundle(bundle_dir / "tiny").digest


def test_replaces_an_older_bundle_and_leaves_nothing_behind(bundle: Path, bundle_parts: dict[str, Any]) -> None:
    before = read_bundle(bundle).digest
    (bundle / "stray").write_text("a file of the older bundle")
    write_bundle(bundle, avatar_id="tiny", **bundle_parts | {"metrics": {"iou": 0.75}})
    assert read_bundle(bundle).manifest.metrics == {"iou": 0.75}
    assert read_bundle(bundle).digest != before
    assert [path.name for path in bundle.parent.iterdir()] == ["tiny"]


def test_a_failed_write_leaves_the_old_bundle(
    bundle: Path, bundle_parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_bundle(bundle).digest

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bundle(bundle, avatar_id="tiny", **bundle_parts)
    assert read_bundle(bundle).digest == before
    assert [path.name for path in bundle.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize("name", ["repose.onnx", "checkpoint.safetensors", "mesh.standard.glb", "mesh.preview.glb"])
def test_a_flipped_bit_is_refused(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name}: the SHA-256"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["repose.onnx", "mesh.standard.glb", "avatar.json"])
def test_a_truncated_file_is_refused(bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[:-9])
    with pytest.raises(BundleError, match=name):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["repose.onnx", "checkpoint.safetensors", "mesh.preview.glb", "avatar.json"])
def test_a_missing_file_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=name):
        read_bundle(bundle)


def test_an_unknown_file_is_refused(bundle: Path) -> None:
    (bundle / "checkpoint.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(BundleError, match=r"unknown files \['checkpoint.pkl'\]"):
        read_bundle(bundle)


def test_a_link_out_of_the_folder_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "repose.onnx").rename(tmp_path / "elsewhere")
    (bundle / "repose.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="cannot be opened"):
        read_bundle(bundle)


def test_a_pipe_is_refused_and_not_waited_on(bundle: Path) -> None:
    (bundle / "repose.onnx").unlink()
    os.mkfifo(bundle / "repose.onnx")
    with pytest.raises(BundleError, match="not a plain file"):
        read_bundle(bundle)


def test_a_huge_manifest_is_not_read(bundle: Path) -> None:
    with open(bundle / "avatar.json", "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleError, match="more than"):
        read_bundle(bundle)


def _move(document: dict[str, Any], name: str) -> None:
    document["files"][name] = document["files"].pop("mesh.standard.glb")
    document["levels_of_detail"]["standard"]["file"] = name


MANIFEST_FAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "version 2": lambda d: d.update(format_version=2),
    "no version": lambda d: d.pop("format_version"),
    "version as text": lambda d: d.update(format_version="1"),
    "other id": lambda d: d.update(id="other"),
    "id with path": lambda d: d.update(id="../tiny"),
    "unknown key": lambda d: d.update(extra=1),
    "unknown nested key": lambda d: d["skeleton"].update(scale=1),
    "z up": lambda d: d.update(up_axis="z"),
    "centimetres": lambda d: d.update(units="cm"),
    "traversal": lambda d: _move(d, "../tiny/mesh.standard.glb"),
    "absolute path": lambda d: _move(d, "/etc/passwd"),
    "no standard level": lambda d: d["levels_of_detail"].pop("standard"),
    "unknown level": lambda d: d["levels_of_detail"].update(ultra=d["levels_of_detail"]["standard"]),
    "file not listed": lambda d: d["files"].pop("repose.onnx"),
    "other vertex count": lambda d: d["levels_of_detail"]["standard"].update(vertices=7),
    "other face count": lambda d: d["levels_of_detail"]["standard"].update(faces=7),
    "23 joints": lambda d: d["skeleton"]["rest_joints"].pop(),
    "joint at NaN": lambda d: d["skeleton"]["rest_joints"][3].__setitem__(0, float("nan")),
    "other tree": lambda d: d["skeleton"]["parents"].__setitem__(5, 0),
    "turned root": lambda d: d["skeleton"]["canonical_pose"].__setitem__(0, [0.1, 0, 0]),
    "other inputs": lambda d: d["inputs"].pop(),
    "other output shape": lambda d: d["outputs"][0].update(shape=["F", "V", 4]),
    "metric at infinity": lambda d: d["metrics"].update(iou=float("inf")),
    "hash of wrong form": lambda d: d["files"]["repose.onnx"].update(sha256="0"),
}


@pytest.mark.parametrize("fault", MANIFEST_FAULTS)
def test_a_manifest_with_a_fault_is_refused(bundle: Path, fault: str) -> None:
    edit(bundle, MANIFEST_FAULTS[fault])
    with pytest.raises(BundleError):
        read_bundle(bundle)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_no_object_is_refused(bundle: Path, text: bytes) -> None:
    (bundle / "avatar.json").write_bytes(text)
    with pytest.raises(BundleError):
        read_bundle(bundle)


BAD_IDS = ["", "A", "-a", "_a", "a b", "../a", "a/b", "a\n", "ä", ".", "..", "a" * 65]


@pytest.mark.parametrize("avatar_id", BAD_IDS)
def test_bad_ids_are_no_ids(avatar_id: str, tmp_path: Path, bundle_parts: dict[str, Any]) -> None:
    assert not is_avatar_id(avatar_id)
    with pytest.raises(BundleError):
        write_bundle(tmp_path / avatar_id, avatar_id=avatar_id, **bundle_parts)
    assert not list(tmp_path.iterdir())


def test_writing_refuses_what_reading_would(tmp_path: Path, bundle_parts: dict[str, Any]) -> None:
    meshes = bundle_parts["meshes"]
    for change in (
        {"meshes": {"preview": meshes["preview"]}},
        {"meshes": meshes | {"ultra": meshes["standard"]}},
        {"metrics": {"iou": float("nan")}},
        {"provenance": {"seed": object()}},
        {"repose_onnx": b""},
    ):
        with pytest.raises(BundleError):
            write_bundle(tmp_path / "tiny", avatar_id="tiny", **bundle_parts | change)
        assert not list(tmp_path.iterdir())


def test_a_mesh_must_be_one() -> None:
    vertices, faces = np.zeros((3, 3), np.float32), np.array([[0, 1, 2]], np.int32)
    for bad in (
        (vertices[:, :2], faces),
        (vertices, faces[:, :2]),
        (vertices[:0], faces),
        (vertices, faces + 1),
        (vertices, faces - 1),
        (vertices + np.float32(np.nan), faces),
        (vertices, faces, vertices[:2]),
    ):
        with pytest.raises(ValueError, match=r"vert|face|normals"):
            Mesh(*bad)
