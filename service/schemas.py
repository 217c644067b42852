"""What travels on the wire as JSON."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.avatars import Avatar
from service.bundle.manifest import DEFAULT_LOD, LevelOfDetail
from service.poses import MAX_FPS, Options


class ReposeQuery(BaseModel):
    """How the posted poses are meant.  What is not said here is taken from the body, and then from the default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lod: str = Field(default=DEFAULT_LOD, max_length=32, description="Level of detail of the mesh.")
    up_axis: Literal["y", "z"] | None = Field(
        default=None, description="Up axis of the posted poses; AMASS has z. Default y. The answer is always y up."
    )
    units: Literal["m", "cm"] | None = Field(default=None, description="Units of the translations. Default m.")
    rotation: Literal["axis_angle", "matrix"] | None = Field(
        default=None, description="What the poses hold; known from their shape, and refused if it does not agree."
    )
    fps: Annotated[float, Field(gt=0, le=MAX_FPS, allow_inf_nan=False)] | None = Field(
        default=None, description="Frames a second of the posted poses. Default 30."
    )
    every: int = Field(default=1, ge=1, le=1000, description="Use each n-th frame only, and divide fps by n.")

    def options(self) -> Options:
        return Options(self.up_axis, self.units, self.rotation, self.fps, self.every)


class LodQuery(BaseModel):
    """Which mesh."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lod: str = Field(default=DEFAULT_LOD, max_length=32, description="Level of detail of the mesh.")


class AvatarSummary(BaseModel):
    """One avatar of the list."""

    id: str
    status: Literal["ready", "unavailable"]
    device: str | None = Field(description="`cuda` or `cpu`: where this avatar is really computed.")
    provider: str | None = Field(description="The execution provider of ONNX Runtime.")
    levels_of_detail: dict[str, LevelOfDetail]

    @classmethod
    def of(cls, avatar_id: str, avatar: Avatar | None) -> "AvatarSummary":
        if avatar is None:
            return cls(id=avatar_id, status="unavailable", device=None, provider=None, levels_of_detail={})
        levels = {str(lod): level for lod, level in avatar.bundle.manifest.levels_of_detail.items()}
        engine = avatar.engine
        return cls(
            id=avatar_id, status="ready", device=engine.device, provider=engine.provider, levels_of_detail=levels
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
            **AvatarSummary.of(avatar.id, avatar).model_dump(),
            **manifest.skeleton.model_dump(),
            bundle_digest=avatar.bundle.digest,
            up_axis=manifest.up_axis,
            units=manifest.units,
            provenance=manifest.provenance,
            metrics=manifest.metrics,
        )


class Health(BaseModel):
    """The process lives, or can serve."""

    status: Literal["alive", "ready"]


class Problem(BaseModel):
    """RFC 9457 problem details.  `code` is stable; other members depend on it."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    code: str
    detail: str | None = None
    instance: str | None = None
