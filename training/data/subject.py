"""A subject on disk: scans of one clothed person with their poses, as training reads them.

```
<subject>/subject.json              format, name, fps, axes, units, skeleton, sequences, provenance, licence
<subject>/sequences/<name>.npz      pose (F, 24, 3) axis-angle, translation (F, 3), optional frame_ids (F,)
<subject>/scans/<name>/00000.npz    vertices (V, 3), faces (T, 3), optional colours (V, 3); world frame
<subject>/truth/                    what evaluation may know and training may not; optional
```
The open subject, dressed, has `truth/garment.npz`: vertices (N, 3) in the T-pose and faces (T, 3) of its garment, and
`truth/<sequence>.npz`: garment_vertices (F, N, 3) float16, the same vertices in each frame, less its translation.
The body below is recomputed: with `body = open_body()`, `body.posed(body.transforms(pose, translation)[frame])`.

The topology may differ from scan to scan.  A folder is written under a temporary name and renamed when it is
complete, so that a reader never sees half a subject.  Nothing in it is ever unpickled.
"""

import json
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from service.bundle.skeleton import SMPL_JOINT_NAMES, SMPL_PARENTS, Skeleton, axis_angle_to_matrix

FORMAT_VERSION = 1
Split = Literal["train", "test"]
SPLITS: tuple[Split, Split] = ("train", "test")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class SubjectError(ValueError):
    """A subject folder, or what was handed over to become one, is not what the format asks for."""


@dataclass(frozen=True)
class Scan:
    """One frame's surface in the world frame: y up, metres, faces counter-clockwise seen from outside."""

    vertices: NDArray[np.float32]
    """(V, 3)"""
    faces: NDArray[np.int32]
    """(T, 3)"""
    colours: NDArray[np.uint8] | None = None
    """(V, 3) sRGB, where the scan has them."""


@dataclass(frozen=True)
class Sequence:
    """The poses of one sequence."""

    name: str
    split: Split
    pose: NDArray[np.float32]
    """(F, 24, 3), axis-angle, radians, SMPL order."""
    translation: NDArray[np.float32]
    """(F, 3), root translation, metres."""
    frame_ids: NDArray[np.int64] | None = None
    """(F,), the frames' numbers at their source, where it has them."""

    def __len__(self) -> int:
        return len(self.pose)

    def rotations(self) -> NDArray[np.float64]:
        """(F, 24, 3, 3), each joint relative to its parent."""
        return axis_angle_to_matrix(self.pose)


class Subject:
    """A subject folder, checked when opened; scans are read, and checked, one by one."""

    def __init__(self, path: Path, meta: dict[str, Any], skeleton: Skeleton, sequences: dict[str, Sequence]) -> None:
        self.path = path
        self.skeleton = skeleton
        self._meta = meta
        self._sequences = sequences

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Subject":
        """Read and check everything but the scans' contents.

        Raises:
            SubjectError: a file is missing, or does not hold what the format asks for.
        """
        folder = Path(path)
        meta = _read_json(folder / "subject.json")
        _check_meta(meta)
        skeleton = _check_skeleton(meta["skeleton"])
        sequences: dict[str, Sequence] = {}
        for number, entry in enumerate(meta["sequences"]):
            name, split, frames = _check_entry(entry, number)
            if name in sequences:
                raise SubjectError(f"subject.json: sequence {name!r} is listed twice")
            sequence = _read_sequence(folder / "sequences" / f"{name}.npz", name, split)
            if len(sequence) != frames:
                raise SubjectError(f"sequence {name!r}: expected {frames} frames by subject.json, got {len(sequence)}")
            missing = [i for i in range(frames) if not scan_path(folder, name, i).is_file()]
            if missing:
                raise SubjectError(
                    f"sequence {name!r}: expected {frames} scans, got {frames - len(missing)}; "
                    f"first missing: {scan_path(folder, name, missing[0])}"
                )
            sequences[name] = sequence
        return cls(folder, meta, skeleton, sequences)

    @property
    def name(self) -> str:
        return self._meta["name"]

    @property
    def fps(self) -> float:
        return float(self._meta["fps"])

    @property
    def provenance(self) -> dict[str, Any]:
        return self._meta["provenance"]

    @property
    def licence(self) -> str:
        return self._meta["licence"]

    @property
    def sequences(self) -> tuple[str, ...]:
        """The sequences' names, in the order of subject.json."""
        return tuple(self._sequences)

    def sequence(self, name: str) -> Sequence:
        if name not in self._sequences:
            raise SubjectError(f"expected one of the sequences {', '.join(self._sequences)}, got {name!r}")
        return self._sequences[name]

    def frames(self, split: str) -> list[tuple[str, int]]:
        """Every (sequence, frame index) of a split, in order."""
        if split not in SPLITS:
            raise SubjectError(f"expected split 'train' or 'test', got {split!r}")
        return [(s.name, i) for s in self._sequences.values() if s.split == split for i in range(len(s))]

    def scan(self, name: str, frame: int) -> Scan:
        """Read one scan.

        Raises:
            SubjectError: there is no such frame, or its file does not hold a scan.
        """
        count = len(self.sequence(name))
        if not 0 <= frame < count:
            raise SubjectError(f"sequence {name!r}: expected a frame in 0..{count - 1}, got {frame}")
        path = scan_path(self.path, name, frame)
        arrays = read_arrays(path)
        scan = Scan(_take(arrays, "vertices", path), _take(arrays, "faces", path), arrays.get("colours"))
        return checked_scan(scan.vertices, scan.faces, scan.colours, where=str(path))

    def truth(self, name: str) -> dict[str, NDArray[Any]] | None:
        """The arrays of `truth/<name>.npz`, for evaluation only; None where the subject has none."""
        path = self.path / "truth" / f"{name}.npz"
        return read_arrays(path) if path.is_file() else None


class SubjectWriter:
    """Writes a subject folder; it appears under its name only when the `with` block ends without an error.

    `folder` is the temporary folder: other processes may write scans into it with `write_scan`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str,
        rest_joints: NDArray[np.floating],
        fps: float,
        licence: str,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        _check_name(name, "subject name")
        skeleton = {
            "joint_names": list(SMPL_JOINT_NAMES),
            "parents": list(SMPL_PARENTS),
            "rest_joints": np.asarray(rest_joints, np.float32).astype(float).round(6).tolist(),
        }
        self.provenance: dict[str, Any] = dict(provenance or {})
        self._meta: dict[str, Any] = {
            "format": FORMAT_VERSION, "name": name, "fps": fps, "up_axis": "y", "units": "m",
            "skeleton": skeleton, "sequences": [], "provenance": self.provenance, "licence": licence,
        }  # fmt: skip
        _check_meta(self._meta | {"sequences": [None]})
        _check_skeleton(skeleton)

    def __enter__(self) -> Self:
        if self.path.exists():
            raise SubjectError(f"{self.path} exists already; remove it or choose another name")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        self.folder.chmod(0o755)  # mkdtemp makes it private, and a subject is not
        (self.folder / "sequences").mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                text = json.dumps(self._meta, indent=1)
                (self.folder / "subject.json").write_text(text + "\n", encoding="utf-8")
                Subject.open(self.folder)
                self.folder.rename(self.path)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def add_sequence(
        self,
        name: str,
        split: str,
        pose: NDArray[np.floating],
        translation: NDArray[np.floating],
        frame_ids: NDArray[np.integer] | None = None,
    ) -> None:
        """Write the poses of a sequence; its scans are written by `add_scan`, before or after."""
        arrays: dict[str, NDArray[Any]] = {
            "pose": np.asarray(pose, np.float32),
            "translation": np.asarray(translation, np.float32),
        }
        if frame_ids is not None:
            arrays["frame_ids"] = np.asarray(frame_ids, np.int64)
        _check_entry({"name": name, "split": split, "frames": len(arrays["pose"])}, 0)
        if any(entry["name"] == name for entry in self._meta["sequences"]):
            raise SubjectError(f"sequence {name!r} was added twice")
        checked_sequence(arrays, name, split, where=f"sequence {name!r}")
        np.savez_compressed(self.folder / "sequences" / f"{name}.npz", **arrays)  # pyright: ignore[reportArgumentType]
        self._meta["sequences"].append({"name": name, "split": split, "frames": len(arrays["pose"])})

    def add_scan(self, name: str, frame: int, scan: Scan) -> None:
        write_scan(self.folder, name, frame, scan)

    def add_truth(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write what evaluation may know and training may not."""
        _check_name(name, "truth name")
        (self.folder / "truth").mkdir(exist_ok=True)
        np.savez_compressed(self.folder / "truth" / f"{name}.npz", **arrays)  # pyright: ignore[reportArgumentType]


def scan_path(folder: Path, name: str, frame: int) -> Path:
    return folder / "scans" / name / f"{frame:05d}.npz"


def write_scan(folder: Path, name: str, frame: int, scan: Scan) -> None:
    """Check a scan and write it into a subject folder in the making."""
    _check_name(name, "sequence name")
    path = scan_path(folder, name, frame)
    scan = checked_scan(scan.vertices, scan.faces, scan.colours, where=f"scan {name}/{frame:05d}")
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"vertices": scan.vertices, "faces": scan.faces}
    if scan.colours is not None:
        arrays["colours"] = scan.colours
    np.savez_compressed(path, **arrays)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Every array of an npz file, never unpickling.

    Raises:
        SubjectError: the file is missing, is not an npz file, or holds Python objects.
    """
    if not path.is_file():
        raise SubjectError(f"expected a file {path}, got none")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise SubjectError(f"{path}: expected an npz file, got a single array")
            return {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, SubjectError):
            raise
        raise SubjectError(f"{path}: expected an npz file of plain arrays: {error}") from error


def checked_scan(
    vertices: NDArray[Any], faces: NDArray[Any], colours: NDArray[Any] | None = None, *, where: str
) -> Scan:
    """A Scan of these arrays, or a SubjectError that says what is wrong with them."""
    vertices, faces = _numbers(vertices, f"{where}: vertices"), np.asarray(faces)
    if vertices.ndim != 2 or vertices.shape[1] != 3 or len(vertices) < 4:
        raise SubjectError(f"{where}: expected vertices (V, 3) with V >= 4, got {vertices.shape}")
    if faces.ndim != 2 or faces.shape[1] != 3 or len(faces) < 4 or faces.dtype.kind not in "iu":
        raise SubjectError(f"{where}: expected integer faces (T, 3) with T >= 4, got {faces.dtype} {faces.shape}")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise SubjectError(
            f"{where}: expected face indices in 0..{len(vertices) - 1}, got {faces.min()}..{faces.max()}"
        )
    if colours is not None and (colours.shape != vertices.shape or colours.dtype != np.uint8):
        raise SubjectError(f"{where}: expected uint8 colours {vertices.shape}, got {colours.dtype} {colours.shape}")
    return Scan(vertices.astype(np.float32), faces.astype(np.int32), colours)


def checked_sequence(arrays: Mapping[str, NDArray[Any]], name: str, split: Split | str, *, where: str) -> Sequence:
    """A Sequence of these arrays, or a SubjectError that says what is wrong with them."""
    pose = _numbers(_take(arrays, "pose", where), f"{where}: pose")
    translation = _numbers(_take(arrays, "translation", where), f"{where}: translation")
    if pose.ndim != 3 or pose.shape[1:] != (24, 3) or len(pose) == 0:
        raise SubjectError(f"{where}: expected pose (F, 24, 3) with F >= 1, got {pose.shape}")
    if translation.shape != (len(pose), 3):
        raise SubjectError(f"{where}: expected translation ({len(pose)}, 3), got {translation.shape}")
    frame_ids = arrays.get("frame_ids")
    if frame_ids is not None and (frame_ids.shape != (len(pose),) or frame_ids.dtype.kind not in "iu"):
        raise SubjectError(
            f"{where}: expected integer frame_ids ({len(pose)},), got {frame_ids.dtype} {frame_ids.shape}"
        )
    if split not in SPLITS:
        raise SubjectError(f"{where}: expected split 'train' or 'test', got {split!r}")
    ids = None if frame_ids is None else frame_ids.astype(np.int64)
    return Sequence(
        name, "train" if split == "train" else "test", pose.astype(np.float32), translation.astype(np.float32), ids
    )


def _read_sequence(path: Path, name: str, split: Split) -> Sequence:
    return checked_sequence(read_arrays(path), name, split, where=f"sequence {name!r}")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SubjectError(f"expected a subject folder with a subject.json, got none at {path}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SubjectError(f"{path}: expected JSON: {error}") from error
    if not isinstance(meta, dict):
        raise SubjectError(f"{path}: expected a JSON object, got {type(meta).__name__}")
    return meta


def _check_meta(meta: dict[str, Any]) -> None:
    if meta.get("format") != FORMAT_VERSION:
        raise SubjectError(f"subject.json: expected format {FORMAT_VERSION}, got {meta.get('format')!r}")
    kinds = {"name": str, "fps": (int, float), "skeleton": dict, "sequences": list, "provenance": dict, "licence": str}
    for key, kind in kinds.items():
        if not isinstance(meta.get(key), kind):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise SubjectError(f"subject.json: expected {key!r} as {names}, got {meta.get(key)!r}")
    if not (np.isfinite(meta["fps"]) and meta["fps"] > 0):
        raise SubjectError(f"subject.json: expected a positive 'fps', got {meta['fps']}")
    for key, value in (("up_axis", "y"), ("units", "m")):
        if meta.get(key) != value:
            raise SubjectError(f"subject.json: expected {key!r} {value!r}, got {meta.get(key)!r}")
    if not meta["sequences"]:
        raise SubjectError("subject.json: expected at least one sequence, got none")


def _check_skeleton(entry: dict[str, Any]) -> Skeleton:
    if entry.get("joint_names") != list(SMPL_JOINT_NAMES) or entry.get("parents") != list(SMPL_PARENTS):
        raise SubjectError("subject.json: expected the 24 SMPL joint names and parents in SMPL order, got others")
    try:
        joints = np.asarray(entry.get("rest_joints"), np.float64)
    except (TypeError, ValueError) as error:
        raise SubjectError(f"subject.json: expected rest_joints (24, 3): {error}") from error
    if joints.shape != (24, 3) or not np.isfinite(joints).all():
        raise SubjectError(f"subject.json: expected finite rest_joints (24, 3), got {joints.shape}")
    return Skeleton.smpl(joints)


def _check_entry(entry: Any, number: int) -> tuple[str, Split, int]:
    if not isinstance(entry, dict) or not isinstance(entry.get("frames"), int):
        raise SubjectError(f"subject.json: expected sequence {number} as {{name, split, frames}}, got {entry!r}")
    name, split = _check_name(entry.get("name"), f"sequence {number}: name"), entry.get("split")
    if split not in SPLITS:
        raise SubjectError(f"sequence {name!r}: expected split 'train' or 'test', got {split!r}")
    return name, split, entry["frames"]


def _check_name(name: Any, what: str) -> str:
    """Names become file names, so they hold nothing that could lead out of the folder."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SubjectError(f"{what}: expected letters, digits, '_', '-' and '.', got {name!r}")
    return name


def _take(arrays: Mapping[str, NDArray[Any]], key: str, where: Path | str) -> NDArray[Any]:
    if key not in arrays:
        raise SubjectError(f"{where}: expected an array {key!r}, got {', '.join(sorted(arrays)) or 'nothing'}")
    return arrays[key]


def _numbers(array: NDArray[Any], where: str) -> NDArray[Any]:
    array = np.asarray(array)
    if array.dtype.kind not in "fiu":
        raise SubjectError(f"{where}: expected numbers, got {array.dtype}")
    if not np.isfinite(array).all():
        raise SubjectError(f"{where}: expected finite numbers, got {int((~np.isfinite(array)).sum())} that are not")
    return array
