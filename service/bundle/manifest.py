"""`avatar.json`: what a bundle says about itself.  A manifest that does not fit these types is refused."""

import re
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from service.bundle.skeleton import SMPL_JOINT_NAMES, SMPL_PARENTS, Skeleton

FORMAT_VERSION = 1
AVATAR_ID_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,63}$"
LODS = ("preview", "standard", "high")
"""Levels of detail in the order of their size; every bundle has `standard`."""
DEFAULT_LOD = "standard"
REPOSE_FILE, CHECKPOINT_FILE, MANIFEST_FILE = "repose.onnx", "checkpoint.safetensors", "avatar.json"

AvatarId = Annotated[str, StringConstraints(pattern=AVATAR_ID_PATTERN)]
LodName = Literal["preview", "standard", "high"]
Vector = tuple[float, float, float]


def mesh_file(lod: str) -> str:
    """Name of the file that holds a level of detail."""
    return f"mesh.{lod}.glb"


def is_avatar_id(text: str) -> bool:
    """Whether `text` may name an avatar, and so a folder."""
    return re.fullmatch(AVATAR_ID_PATTERN[1:-1], text) is not None


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SkeletonRecord(_Frozen):
    """The subject's own joints: with them, serving needs no SMPL file."""

    joint_names: tuple[str, ...]
    parents: tuple[int, ...]
    rest_joints: tuple[Vector, ...]
    """Metres, T-pose."""
    canonical_pose: tuple[Vector, ...]
    """Axis-angle, radians."""

    @model_validator(mode="after")
    def _smpl_tree(self) -> "SkeletonRecord":
        if self.joint_names != SMPL_JOINT_NAMES or self.parents != SMPL_PARENTS:
            raise ValueError("expected the 24 SMPL joints in SMPL order")
        if len(self.rest_joints) != 24 or len(self.canonical_pose) != 24:
            raise ValueError(f"expected 24 joints, got {len(self.rest_joints)} and {len(self.canonical_pose)}")
        if any(self.canonical_pose[0]):
            raise ValueError("the root of the canonical pose must not be turned")
        return self

    @classmethod
    def of(cls, skeleton: Skeleton) -> "SkeletonRecord":
        # Every float32 is a float64, so the joints come back bit for bit.
        rows = {name: getattr(skeleton, name).astype(np.float32).tolist() for name in ("rest_joints", "canonical_pose")}
        return cls(joint_names=skeleton.joint_names, parents=skeleton.parents, **rows)

    def skeleton(self) -> Skeleton:
        rest, pose = (np.array(rows, np.float32) for rows in (self.rest_joints, self.canonical_pose))
        return Skeleton(self.joint_names, self.parents, rest, pose)


class LevelOfDetail(_Frozen):
    """One mesh of the avatar."""

    file: str
    vertices: int = Field(ge=1)
    faces: int = Field(ge=1)


class TensorRecord(_Frozen):
    """One input or output of `repose.onnx`: float32; a name in the shape is a size chosen at run time."""

    name: str
    shape: tuple[int | str, ...]


INPUTS = (
    TensorRecord(name="canonical_vertices", shape=("V", 3)),
    TensorRecord(name="bone_transforms", shape=("F", 24, 4, 4)),
    TensorRecord(name="root_transforms", shape=("F", 4, 4)),
)
PLAIN = "plain"
"""An input that a graph may have besides, a bool that is false unless fed: true runs the reference form of the network,
false the fast one, whose distance from it the manifest's metric `fast_max_error_mm` states."""
SKINNING_WEIGHTS = "skinning_weights"
"""Another such input, (V, 24), empty unless fed: the weights of the vertices, in graphs whose weights do not depend on
the pose.  Fed, they need not be read from the network again for every frame, which is most of the work."""
OUTPUTS = (TensorRecord(name="vertices", shape=("F", "V", 3)),)


class FileRecord(_Frozen):
    """What a file of the bundle must be, to the last bit."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=1)


class Manifest(_Frozen):
    """The whole of `avatar.json`."""

    format_version: Literal[1] = FORMAT_VERSION
    id: AvatarId
    up_axis: Literal["y"] = "y"
    units: Literal["m"] = "m"
    skeleton: SkeletonRecord
    levels_of_detail: dict[LodName, LevelOfDetail]
    inputs: tuple[TensorRecord, ...] = INPUTS
    outputs: tuple[TensorRecord, ...] = OUTPUTS
    provenance: dict[str, Any] = Field(default_factory=dict)
    """How the avatar came about: data_set, split, seed, code_version, settings, ..."""
    metrics: dict[str, float] = Field(default_factory=dict)
    files: dict[str, FileRecord]
    """Every file of the folder but `avatar.json` itself."""

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        if DEFAULT_LOD not in self.levels_of_detail:
            raise ValueError(f"the level of detail {DEFAULT_LOD!r} is missing")
        wrong = [level.file for lod, level in self.levels_of_detail.items() if level.file != mesh_file(lod)]
        if wrong:
            raise ValueError(f"a level of detail lies in mesh.<name>.glb, not in {wrong[0]!r}")
        expected = {mesh_file(lod) for lod in self.levels_of_detail} | {REPOSE_FILE, CHECKPOINT_FILE}
        if set(self.files) != expected:
            raise ValueError(f"expected the files {sorted(expected)}, got {sorted(self.files)}")
        if self.inputs != INPUTS or self.outputs != OUTPUTS:
            raise ValueError("the graph's inputs and outputs are not those of format version 1")
        return self
