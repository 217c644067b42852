"""Turn a user's copy of CAPE, or of DFAUST and PosePrior in AMASS, into a subject folder.

The layouts are those in which the sets are published; nothing of them is shipped here.  CAPE gives clothed, registered
meshes of a posed body.  AMASS gives poses and a shape, and the scans are the body meshes that the user's model file
makes of them, without soft tissue (DMPL), as in SNARF and INS.
Reference: Ma et al., "CAPE", CVPR 2020; Mahmood et al., "AMASS", ICCV 2019; Chen et al., "SNARF", ICCV 2021, section 4.
"""

import re
import zipfile
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from training.data.importers import _read_mesh, _turn_root
from training.data.smpl_file import SmplModel, read_smpl_file
from training.data.subject import Scan, Subject, SubjectError, SubjectWriter, _numbers

CAPE_FPS = 60.0
CAPE_LICENCE = "CAPE licence: non-commercial scientific research only; made from the user's own copy"
AMASS_LICENCE = "AMASS and SMPL licences: non-commercial scientific research only; made from the user's own copies"
FARTHEST_CLOTH_M = 0.1
"""The median vertex of a clothed mesh is nearer than this to the body that its pose gives, or they do not fit."""


def import_cape(
    folder: Path,
    out: Path,
    *,
    subject: str,
    smpl: Path,
    clothing: str | None = None,
    minimal_shape: Path | None = None,
    test: Collection[str] = (),
    every: int = 1,
    progress: bool = True,
) -> Subject:
    """Read one person in one outfit of CAPE and write a subject; CAPE is y up, in metres.

    ```
    <folder>/sequences/<subject>/<clothing>_<motion>/<clothing>_<motion>.000001.npz
                                    v_posed (V, 3), v_cano (V, 3), pose (72,), transl (3,); 60 a second
    <folder>/minimal_body_shape/<subject>/<subject>_minimal.npy    (V, 3): the T-pose body without clothes
    ```
    The rest joints are those of the minimal body by the model file's regressor.  Frames whose file cannot be read
    (the published set holds a few) are left out and named in the provenance.

    Args:
        smpl: the SMPL model file of the subject's gender (`misc/subj_genders.pkl`).
        clothing: for a subject that has several outfits: one avatar wears one.
        minimal_shape: `.npy` or `.ply`, where it is not at its place.
        test: names of the sequences to hold out, as `shortlong_hips`.
        every: keep every n-th frame.

    Raises:
        SubjectError: the folder does not hold this, its meshes do not lie on the bodies that its poses give, or
            `out` exists.
    """
    folder = Path(folder)
    _check_every(every)
    model = read_smpl_file(smpl)
    minimal = _read_minimal(minimal_shape or folder / "minimal_body_shape" / subject / f"{subject}_minimal.npy", model)
    sequences = _cape_sequences(folder / "sequences" / subject, clothing)
    _check_test(test, [path.name for path in sequences])
    unreadable: list[str] = []
    provenance = {
        "source": "prepare-cape",
        "cape": {"subject": subject, "sequences": [path.name for path in sequences]},
        "applied": {"up_axis": "y", "units": "m", "every": every, "model_file": Path(smpl).name},
        "assumed": {"fps": CAPE_FPS},
        "unreadable_frames": unreadable,
    }
    writer = SubjectWriter(
        out, name=f"cape-{subject}-{sequences[0].name.split('_')[0]}", rest_joints=model.rest_joints(minimal),
        fps=CAPE_FPS / every, licence=CAPE_LICENCE, provenance=provenance,
    )  # fmt: skip
    unposed, trained = np.zeros_like(model.template), 0
    with writer:
        for path in sequences:
            split = "test" if path.name in test else "train"
            poses, translations, ids, gaps = [], [], [], []
            for number, file in tqdm(_numbered(path, every), desc=path.name, unit="frame", disable=not progress):
                frame = _read_cape_frame(file, len(model.template))
                if frame is None:
                    unreadable.append(file.name)
                    continue
                body = model.posed(minimal, frame.pose, frame.translation)
                gaps.append(np.median(np.linalg.norm(frame.vertices - body, axis=1)))
                writer.add_scan(path.name, len(ids), Scan(frame.vertices.astype(np.float32), model.faces))
                poses.append(frame.pose)
                translations.append(frame.translation)
                ids.append(number)
                if split == "train":
                    unposed += frame.unposed
                    trained += 1
            if not ids:
                raise SubjectError(f"{path}: expected frames <name>.<number>.npz that can be read, got none")
            if np.median(gaps) > FARTHEST_CLOTH_M:
                raise SubjectError(
                    f"{path}: expected v_posed on the body that pose and transl give (y up, metres, the subject's "
                    f"own minimal shape), got {np.median(gaps):.2f} m between them"
                )
            writer.add_sequence(path.name, split, np.stack(poses), np.stack(translations), np.array(ids))
        if trained:
            writer.add_truth("registration", _registration(model, unposed / trained))
    return Subject.open(out)


def import_amass(
    folder: Path,
    out: Path,
    *,
    smpl: Path,
    test: Collection[str] = (),
    held_out: Path | None = None,
    every: int = 1,
    progress: bool = True,
) -> Subject:
    """Read one person of AMASS (a subject of DFAUST), pose the body of the model file, and write a subject.

    ```
    <folder>/<name>_poses.npz    poses (F, 156), trans (F, 3), betas (16,), gender, mocap_framerate
    ```
    AMASS is z up; the subject is y up.  The hands are flat and rigid: SMPL's poses say nothing of fingers.

    Args:
        smpl: the SMPL-H model file of the person's gender, or SMPL's; the body is shaped by as many `betas` as it has.
        test: names of the sequences to hold out, as `50002_chicken_wings`.
        held_out: a folder of another person (PosePrior: `MPI_Limits/03099`) whose poses are put on this one's body and
            held out, to see how the avatar does far from what it learned.
        every: keep every n-th frame; poses at a multiple of the folder's frame rate are thinned to the same.

    Raises:
        SubjectError: the folders do not hold this, or `out` exists.
    """
    folder = Path(folder)
    _check_every(every)
    model = read_smpl_file(smpl)
    own = _amass_sequences(folder)
    _check_test(test, [sequence.name for sequence in own])
    betas, rate = own[0].betas, own[0].rate
    for sequence in own:
        if sequence.betas.shape != betas.shape or not np.allclose(sequence.betas, betas, atol=1e-5):
            raise SubjectError(f"{folder}: expected one person, got other betas in {sequence.name}")
    others = _amass_sequences(Path(held_out)) if held_out else []
    shaped = model.shaped(betas)
    rest_joints = model.rest_joints(shaped)
    provenance = {
        "source": "prepare-amass",
        "amass": {
            "folder": folder.resolve().name, "gender": own[0].gender,
            "held_out": Path(held_out).resolve().name if held_out else None,
        },
        "applied": {
            "up_axis": "z", "units": "m", "hands": "flat", "every": every, "model_file": Path(smpl).name,
            "betas": min(len(betas), model.shape_blend.shape[2]),
        },
    }  # fmt: skip
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", folder.resolve().name)
    writer = SubjectWriter(
        out, name=f"amass-{name}", rest_joints=rest_joints, fps=rate / every, licence=AMASS_LICENCE,
        provenance=provenance,
    )  # fmt: skip
    with writer:
        for sequence in (*own, *others):
            stride = round(every * sequence.rate / rate)
            if stride < 1 or abs(stride * rate / sequence.rate - every) > 0.01 * every:
                raise SubjectError(
                    f"{sequence.name}: expected a multiple of {rate / every:g} frames a second, got {sequence.rate:g}"
                )
            rows = np.arange(0, len(sequence.pose), stride)
            pose, translation = _turn_root(sequence.pose[rows], sequence.translation[rows], rest_joints[0])
            split = "train" if sequence in own and sequence.name not in test else "test"
            writer.add_sequence(sequence.name, split, pose, translation, rows)
            for frame in tqdm(range(len(rows)), desc=sequence.name, unit="frame", disable=not progress):
                vertices = model.posed(shaped, pose[frame], translation[frame])
                writer.add_scan(sequence.name, frame, Scan(vertices.astype(np.float32), model.faces))
        writer.add_truth("registration", _registration(model, shaped))
    return Subject.open(out)


@dataclass(frozen=True)
class _CapeFrame:
    vertices: NDArray[np.float64]
    """(V, 3), posed."""
    unposed: NDArray[np.float64]
    """(V, 3), in the T-pose."""
    pose: NDArray[np.float64]
    """(24, 3)"""
    translation: NDArray[np.float64]
    """(3,)"""


@dataclass(frozen=True, eq=False)
class _AmassSequence:
    name: str
    pose: NDArray[np.float64]
    """(F, 24, 3), z up, hands zero."""
    translation: NDArray[np.float64]
    """(F, 3)"""
    betas: NDArray[np.float64]
    gender: str
    rate: float
    """Frames a second."""


def _cape_sequences(folder: Path, clothing: str | None) -> list[Path]:
    paths = sorted(path for path in folder.glob("*_*") if path.is_dir())
    outfits = sorted({path.name.split("_")[0] for path in paths})
    if not outfits:
        raise SubjectError(f"{folder}: expected folders <clothing>_<motion> of CAPE, got none")
    if clothing is None and len(outfits) > 1:
        raise SubjectError(f"{folder}: expected a choice of clothing among {', '.join(outfits)}, got none")
    if clothing is not None and clothing not in outfits:
        raise SubjectError(f"{folder}: expected clothing among {', '.join(outfits)}, got {clothing!r}")
    return [path for path in paths if clothing is None or path.name.split("_")[0] == clothing]


def _numbered(folder: Path, every: int) -> list[tuple[int, Path]]:
    """(frame number, file) of every n-th frame of a sequence, in order."""
    # The published set holds some files that writing left behind; their names do not end like a frame's.
    pattern = re.compile(re.escape(folder.name) + r"\.(\d+)\.npz")
    found = ((pattern.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)[::every]


def _read_cape_frame(path: Path, vertices: int) -> _CapeFrame | None:
    """One frame, or None where its file cannot be read.

    Raises:
        SubjectError: the file can be read and is no frame of CAPE.
    """
    shapes = {"v_posed": (vertices, 3), "v_cano": (vertices, 3), "pose": (72,), "transl": (3,)}
    try:
        arrays = _read_some(path, shapes)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, SubjectError):
            raise
        return None
    for key, shape in shapes.items():
        if arrays[key].shape != shape:
            raise SubjectError(f"{path}: expected {key} {shape}, got {arrays[key].shape}")
    frame = {key: _numbers(array, f"{path}: {key}").astype(np.float64) for key, array in arrays.items()}
    return _CapeFrame(frame["v_posed"], frame["v_cano"], frame["pose"].reshape(24, 3), frame["transl"])


def _read_some(path: Path, keys: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Some arrays of an npz file, and no others: published files hold Python objects beside them."""
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        missing = [key for key in keys if key not in archive]
        if missing:
            raise SubjectError(f"{path}: expected the arrays {', '.join(keys)}, got none named {', '.join(missing)}")
        return {key: archive[key] for key in keys}


def _read_minimal(path: Path, model: SmplModel) -> NDArray[np.float64]:
    if not path.is_file():
        raise SubjectError(f"expected the minimal body shape at {path}, got none; name it with --minimal-shape")
    try:
        vertices = np.load(path, allow_pickle=False) if path.suffix == ".npy" else _read_mesh(path).vertices
    except (ValueError, OSError, EOFError) as error:
        raise SubjectError(f"{path}: expected a minimal body shape .npy or .ply: {error}") from error
    if vertices.shape != model.template.shape:
        raise SubjectError(f"{path}: expected the model file's {model.template.shape} vertices, got {vertices.shape}")
    return vertices.astype(np.float64)


def _amass_sequences(folder: Path) -> list[_AmassSequence]:
    paths = sorted(folder.glob("*_poses.npz"))
    if not paths:
        raise SubjectError(f"{folder}: expected files <name>_poses.npz of AMASS, got none")
    return [_read_amass(path) for path in paths]


def _read_amass(path: Path) -> _AmassSequence:
    keys = ("poses", "trans", "betas", "mocap_framerate", "gender")
    try:
        arrays = _read_some(path, keys)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, SubjectError):
            raise
        raise SubjectError(f"{path}: expected an npz file of AMASS: {error}") from error
    gender = arrays.pop("gender").item()
    poses, translation, betas, rate = (_numbers(array, f"{path}: {key}") for key, array in arrays.items())
    if poses.ndim != 2 or poses.shape[1] != 156:
        raise SubjectError(f"{path}: expected SMPL-H poses (F, 156), got {poses.shape}")
    if translation.shape != (len(poses), 3) or betas.ndim != 1:
        raise SubjectError(
            f"{path}: expected trans ({len(poses)}, 3) and betas (16,), got {translation.shape} and {betas.shape}"
        )
    if rate.size != 1 or rate.item() <= 0:
        raise SubjectError(f"{path}: expected one positive frame rate, got {rate}")
    pose = np.zeros((len(poses), 24, 3))
    pose[:, :22] = poses[:, :66].reshape(-1, 22, 3)
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", path.stem.removesuffix("_poses"))
    return _AmassSequence(
        name, pose, translation.astype(np.float64), betas.astype(np.float64),
        gender.decode() if isinstance(gender, bytes) else str(gender), rate.item(),
    )  # fmt: skip


def _registration(model: SmplModel, vertices: NDArray[np.floating]) -> dict[str, NDArray[Any]]:
    """What the scans' common topology tells evaluation: T-pose vertices, faces and registered skinning weights."""
    return {
        "canonical_vertices": vertices.astype(np.float32),
        "faces": model.faces,
        "skinning_weights": model.weights.astype(np.float32),
    }


def _check_every(every: int) -> None:
    if every < 1:
        raise SubjectError(f"expected to keep every 1st, 2nd, ... frame, got {every}")


def _check_test(test: Collection[str], names: list[str]) -> None:
    unknown = sorted(set(test) - set(names))
    if unknown:
        raise SubjectError(f"expected test sequences among {', '.join(names)}, got {', '.join(unknown)}")
