"""Turn what a user has into a subject folder: scans with SMPL poses, or one performance capture.

Both readers convert at the border and say what they applied: inside, y is up and lengths are metres.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import trimesh
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from tqdm import tqdm
from trimesh.visual import ColorVisuals

from service.bundle.skeleton import SMPL_PARENTS, axis_angle_to_matrix
from training.data.subject import Scan, Subject, SubjectError, SubjectWriter, checked_sequence, read_arrays

Z_UP_TO_Y_UP = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
"""(x, y, z) with z up becomes (x, z, -y): a turn by -90 degrees about x."""
UNIT_IN_METRES = {"m": 1.0, "cm": 0.01}
SCAN_SUFFIXES = (".ply", ".obj")
CAPTURE_SEQUENCES = (
    ("train_0", "train", 0, 39), ("test_0", "test", 40, 57), ("train_1", "train", 58, 139),
    ("test_1", "test", 140, 156), ("train_2", "train", 157, 174),
)  # fmt: skip
"""(name, split, first frame, last frame) of the crane capture's protocol."""


def import_scans(
    folder: Path,
    out: Path,
    *,
    test: Collection[str] = (),
    up_axis: Literal["y", "z"] = "y",
    units: Literal["m", "cm"] = "m",
    licence: str = "unknown",
    progress: bool = True,
) -> Subject:
    """Read a folder of scans and write a subject.

    ```
    <folder>/rest_joints.npy           (24, 3): the subject's SMPL joints in the T-pose
    <folder>/<sequence>.npz            poses|pose (F, 72 or more), trans|transl (F, 3), mocap_framerate|fps
    <folder>/<sequence>/<frame>.ply    or .obj; the number in the name is the row of the pose file
    ```
    Poses wider than 72 (SMPL-H 156, SMPL-X 165) keep their first 66 numbers; the hands are set to zero.  A
    sequence may have scans for some of its frames only; the others are left out.

    Args:
        test: names of the sequences to hold out.
        up_axis: the axis that points up in scans and poses.  The rest joints are always those of the T-pose
            as SMPL has it, y up.
        units: of scans, translations and rest joints.

    Raises:
        SubjectError: the folder does not hold this, or `out` exists.
    """
    folder = Path(folder)
    if up_axis not in ("y", "z") or units not in UNIT_IN_METRES:
        raise SubjectError(f"expected up_axis 'y' or 'z' and units 'm' or 'cm', got {up_axis!r} and {units!r}")
    names = sorted(path.stem for path in folder.glob("*.npz"))
    if not names:
        raise SubjectError(f"{folder}: expected pose files <sequence>.npz, got none")
    unknown = sorted(set(test) - set(names))
    if unknown:
        raise SubjectError(f"expected test sequences among {', '.join(names)}, got {', '.join(unknown)}")
    rest_joints = _read_rest_joints(folder / "rest_joints.npy") * UNIT_IN_METRES[units]
    world = UNIT_IN_METRES[units] * (Z_UP_TO_Y_UP if up_axis == "z" else np.eye(3))

    poses = {name: read_motion(folder / f"{name}.npz") for name in names}
    rates = {rate for _, _, rate in poses.values()}
    if len(rates) != 1:
        raise SubjectError(f"{folder}: expected one frame rate in all sequences, got {sorted(rates)}")
    provenance = {"source": "import-scans", "applied": {"up_axis": up_axis, "units": units}}
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", folder.resolve().name).lstrip(".-") or "subject"
    writer = SubjectWriter(
        out, name=name, rest_joints=rest_joints, fps=rates.pop(), licence=licence, provenance=provenance
    )
    with writer:
        for name in names:
            pose, translation, _ = poses[name]
            if up_axis == "z":
                pose, translation = _turn_root(pose, translation, rest_joints[0] / UNIT_IN_METRES[units])
            files = _scan_files(folder / name, len(pose))
            rows = np.array([row for row, _ in files])
            split = "test" if name in test else "train"
            writer.add_sequence(name, split, pose[rows], translation[rows] * UNIT_IN_METRES[units], rows)
            for frame, (_, path) in enumerate(tqdm(files, desc=name, unit="scan", disable=not progress)):
                scan = _read_mesh(path)
                vertices = scan.vertices.astype(np.float64) @ world.T
                writer.add_scan(name, frame, Scan(vertices.astype(np.float32), scan.faces, scan.colours))
    return Subject.open(out)


def import_capture(npz: Path, out: Path) -> Subject:
    """Read a performance capture with registered topology (`crane.npz`) and write a subject with its fixed split.

    The registered weights and the canonical mesh go to `truth/registration.npz`: baselines may use them, but
    a method trained on scans does not have them.
    """
    path = Path(npz)
    arrays = read_arrays(path)
    needed = ("vertices", "box_min", "box_max", "faces", "pose", "transl", "rest_joints", "fps")
    missing = [key for key in needed if key not in arrays]
    if missing:
        raise SubjectError(f"{path}: expected the arrays {', '.join(needed)}, got none named {', '.join(missing)}")
    if len(arrays["pose"]) != len(arrays["vertices"]) or len(arrays["pose"]) <= CAPTURE_SEQUENCES[-1][3]:
        raise SubjectError(f"{path}: expected {CAPTURE_SEQUENCES[-1][3] + 1} frames, got {len(arrays['pose'])}")
    box_min, box_max = arrays["box_min"], arrays["box_max"]
    step = (box_max - box_min) / 65535
    provenance = {
        "source": "import-capture",
        "applied": {"up_axis": "y", "units": "m"},
        **{f"capture_{key}": str(arrays[key]) for key in ("source", "pose_note", "fps_note") if key in arrays},
    }
    licence = str(arrays["licence_note"]) if "licence_note" in arrays else "research use"
    writer = SubjectWriter(
        out, name=path.stem, rest_joints=arrays["rest_joints"], fps=float(arrays["fps"]), licence=licence,
        provenance=provenance,
    )  # fmt: skip
    with writer:
        for name, split, first, last in CAPTURE_SEQUENCES:
            ids = np.arange(first, last + 1)
            writer.add_sequence(name, split, arrays["pose"][ids].reshape(-1, 24, 3), arrays["transl"][ids], ids)
            for frame, source in enumerate(ids):
                vertices = (box_min + arrays["vertices"][source] * step).astype(np.float32)
                writer.add_scan(name, frame, Scan(vertices, arrays["faces"]))
        registered = ("skinning_weights", "canonical_vertices", "loose_cloth", "faces")
        truth = {key: arrays[key] for key in registered if key in arrays}
        if "skinning_weights" in truth:
            weights = truth["skinning_weights"].astype(np.float32)
            truth["skinning_weights"] = weights / weights.sum(1, keepdims=True)  # float16 rows do not sum to 1
        writer.add_truth("registration", truth)
    return Subject.open(out)


def read_motion(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Poses (F, 24, 3), translation (F, 3) and frame rate of an AMASS-like npz file, in its own axes and units."""
    arrays = read_arrays(path)
    poses = _first_of(arrays, ("poses", "pose"), path)
    translation = _first_of(arrays, ("trans", "transl"), path)
    rate = _first_of(arrays, ("mocap_framerate", "mocap_frame_rate", "fps"), path)
    if poses.ndim != 2 or poses.shape[1] < 66:
        raise SubjectError(f"{path}: expected poses (F, 72), got {poses.shape}")
    if rate.size != 1 or not float(rate) > 0:
        raise SubjectError(f"{path}: expected one positive frame rate, got {rate}")
    width = 72 if poses.shape[1] == 72 else 66  # wider layouts have fingers where SMPL has hands
    body = np.zeros((len(poses), 72))
    body[:, :width] = poses[:, :width]
    pose = body.reshape(-1, 24, 3)
    checked_sequence({"pose": pose, "translation": translation}, path.stem, "train", where=str(path))
    return pose, translation.astype(np.float64), float(rate)


def _first_of(arrays: Mapping[str, NDArray[Any]], keys: tuple[str, ...], path: Path) -> NDArray[Any]:
    for key in keys:
        if key in arrays:
            return arrays[key]
    raise SubjectError(f"{path}: expected an array {' or '.join(keys)}, got {', '.join(sorted(arrays))}")


def _read_rest_joints(path: Path) -> NDArray[np.float64]:
    if not path.is_file():
        raise SubjectError(f"expected a file {path} with the T-pose joints (24, 3), got none")
    try:
        joints = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise SubjectError(f"{path}: expected a plain array (24, 3): {error}") from error
    if not isinstance(joints, np.ndarray) or joints.shape != (len(SMPL_PARENTS), 3):
        raise SubjectError(f"{path}: expected rest joints (24, 3), got {getattr(joints, 'shape', 'an archive')}")
    return joints.astype(np.float64)


def _scan_files(folder: Path, frames: int) -> list[tuple[int, Path]]:
    """(pose row, file) of every scan of a sequence, in order."""
    files: dict[int, Path] = {}
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.suffix.lower() not in SCAN_SUFFIXES:
            continue
        numbers = re.findall(r"\d+", path.stem)
        if not numbers:
            raise SubjectError(f"{path}: expected a frame number in the file's name, got none")
        row = int(numbers[-1])
        if row >= frames:
            raise SubjectError(f"{path}: expected a frame in 0..{frames - 1} (rows of the pose file), got {row}")
        if row in files:
            raise SubjectError(f"frame {row} has two scans: {files[row]} and {path}")
        files[row] = path
    if not files:
        raise SubjectError(f"{folder}: expected scans <frame>.ply or <frame>.obj, got none")
    return sorted(files.items())


def _read_mesh(path: Path) -> Scan:
    try:
        mesh = trimesh.load_mesh(path, process=False, maintain_order=True)
    except Exception as error:  # trimesh's readers raise whatever their parser met
        raise SubjectError(f"{path}: expected a triangle mesh: {error}") from error
    if not isinstance(mesh, trimesh.Trimesh) or len(mesh.faces) == 0:
        raise SubjectError(f"{path}: expected one triangle mesh, got {type(mesh).__name__} without faces")
    colours = None
    if isinstance(mesh.visual, ColorVisuals) and mesh.visual.kind == "vertex":
        colours = np.asarray(mesh.visual.vertex_colors)[:, :3].astype(np.uint8)
    return Scan(np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces, np.int32), colours)


def _turn_root(
    pose: NDArray[np.float64], translation: NDArray[np.float64], pelvis: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Carry root rotation and translation from a z-up world to a y-up one.

    The root turns about the pelvis joint, which SMPL does not put at the origin: the point that turns is
    `pelvis + translation`, so the pelvis itself is left out of the turn of the translation.
    """
    turned = pose.copy()
    turned[:, 0] = Rotation.from_matrix(Z_UP_TO_Y_UP @ axis_angle_to_matrix(pose[:, 0])).as_rotvec()
    return turned, (pelvis + translation) @ Z_UP_TO_Y_UP.T - pelvis
