"""What travels on the wire as JSON."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.avatars import Avatar, Entry
from service.bundle.manifest import DEFAULT_LOD, LevelOfDetail
from service.poses import MAX_FPS, Options
from service.uploads import Version


class PoseQuery(BaseModel):
    """How the posted poses are meant.  What is not said here is taken from the body, and then from the default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    up_axis: Literal["y", "z"] | None = Field(
        default=None, description="Up axis of the posted poses; AMASS has z. Default y. The answer is always y up."
    )
    units: Literal["m", "cm"] | None = Field(default=None, description="Units of the translations. Default m.")
    rotation: Literal["axis_angle", "matrix", "quat_wxyz", "6d"] | None = Field(
        default=None,
        description="What the poses hold; known from their shape, and refused if it does not agree. `6d` are the first "
        "two columns of the matrix, one after the other.",
    )
    frame: Literal["world", "camera"] | None = Field(
        default=None, description="`camera`: y down and z away, as estimators have it (OpenCV). Default world."
    )
    fps: Annotated[float, Field(gt=0, le=MAX_FPS, allow_inf_nan=False)] | None = Field(
        default=None, description="Frames a second of the posted poses. Default 30."
    )
    every: int = Field(default=1, ge=1, le=1000, description="Use each n-th frame only, and divide fps by n.")
    target_fps: Annotated[float, Field(gt=0, le=MAX_FPS, allow_inf_nan=False)] | None = Field(
        default=None, description="Resample to this rate: rotations the short way round, translations straight."
    )
    normalize: bool = Field(
        default=False, description="Take the nearest rotation where a matrix, quaternion or 6d is none."
    )

    def options(self) -> Options:
        return Options(
            up_axis=self.up_axis,
            units=self.units,
            rotation=self.rotation,
            fps=self.fps,
            every=self.every,
            frame=self.frame,
            target_fps=self.target_fps,
            normalize=self.normalize,
        )


class ReposeQuery(PoseQuery):
    """How the posted poses are meant, and what is to be reposed."""

    lod: str = Field(default=DEFAULT_LOD, max_length=32, description="Level of detail of the mesh.")


class LodQuery(BaseModel):
    """Which mesh."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lod: str = Field(default=DEFAULT_LOD, max_length=32, description="Level of detail of the mesh.")


class AvatarSummary(BaseModel):
    """One avatar of the list."""

    id: str
    status: Literal["ready", "stored", "unavailable"] = Field(
        description="In memory; on the disk, and loaded when it is asked for; or damaged."
    )
    device: str | None = Field(description="`cuda` or `cpu`: where this avatar is really computed.")
    provider: str | None = Field(description="The execution provider of ONNX Runtime.")
    levels_of_detail: dict[str, LevelOfDetail]

    @classmethod
    def of(cls, avatar_id: str, entry: Entry) -> "AvatarSummary":
        levels = entry.manifest.levels_of_detail if entry.manifest else {}
        engine = entry.avatar.engine if entry.avatar else None
        return cls(
            id=avatar_id,
            status=entry.status,
            device=engine.device if engine else None,
            provider=engine.provider if engine else None,
            levels_of_detail={str(lod): level for lod, level in levels.items()},
        )


class AvatarList(BaseModel):
    """Every avatar in the folder, damaged ones too."""

    avatars: list[AvatarSummary]


class AvatarDetail(AvatarSummary):
    """What the bundle says about an avatar."""

    bundle_digest: str
    up_axis: str
    units: str
    joint_names: tuple[str, ...]
    parents: tuple[int, ...]
    rest_joints: tuple[tuple[float, float, float], ...]
    canonical_pose: tuple[tuple[float, float, float], ...]
    provenance: dict[str, Any]
    metrics: dict[str, float]

    @classmethod
    def describe(cls, avatar: Avatar) -> "AvatarDetail":
        manifest = avatar.bundle.manifest
        return cls(
            **AvatarSummary.of(avatar.id, Entry("ready", manifest, avatar)).model_dump(),
            **manifest.skeleton.model_dump(),
            bundle_digest=avatar.bundle.digest,
            up_axis=manifest.up_axis,
            units=manifest.units,
            provenance=manifest.provenance,
            metrics=manifest.metrics,
        )


class AvatarVersion(BaseModel):
    """One state of an avatar that is on the disk."""

    digest: str = Field(description="SHA-256 of its `avatar.json`.")
    replaced_at: datetime | None = Field(description="When another took its place; null for the one that is served.")

    @classmethod
    def of(cls, version: Version) -> "AvatarVersion":
        at_s = version.replaced_at_s
        return cls(digest=version.digest, replaced_at=None if at_s is None else datetime.fromtimestamp(at_s, UTC))


class AvatarVersions(BaseModel):
    """The version that is served, then those it replaced, latest first."""

    versions: list[AvatarVersion]


class Health(BaseModel):
    """The process lives, or can serve."""

    status: Literal["alive", "started", "ready"]


class Info(BaseModel):
    """What this process is."""

    version: str
    python: str
    onnxruntime: str
    device: str | None = Field(description="`cuda` or `cpu`, where it really computes; null while no avatar is loaded.")
    providers: list[str] = Field(description="Execution providers of ONNX Runtime in use.")
    avatars_in_memory: int
    limits: dict[str, float] = Field(description="Settings that bound what may be sent; the names are the settings'.")


class Problem(BaseModel):
    """RFC 9457 problem details.  `code` is stable; other members depend on it."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    code: str
    detail: str | None = None
    instance: str | None = None
    request_id: str | None = None
