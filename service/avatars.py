"""The avatars of a folder, each with its network loaded and warm."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.bundle.files import Bundle, BundleError, read_bundle
from service.bundle.glb import Mesh
from service.bundle.manifest import is_avatar_id
from service.engine import Engine, repose_in_batches
from service.errors import AvatarNotFound, AvatarServiceError, AvatarUnavailable, LodNotFound
from service.poses import PoseSequence

log = logging.getLogger(__name__)
EngineFactory = Callable[[bytes], Engine]
"""From the bytes of `repose.onnx` to an engine; raises `AvatarUnavailable`."""


@dataclass(frozen=True)
class Avatar:
    """A bundle that was verified, and the engine that runs its graph."""

    bundle: Bundle
    engine: Engine

    @property
    def id(self) -> str:
        return self.bundle.manifest.id

    def mesh(self, lod: str) -> Mesh:
        """The canonical mesh of a level of detail.

        Raises:
            LodNotFound: there is none of that name.
        """
        if lod not in self.bundle.meshes:
            raise LodNotFound(f"expected lod to be one of {', '.join(self.bundle.meshes)}")
        return self.bundle.meshes[lod]

    def check(self) -> None:
        """Repose a few vertices for real.

        Raises:
            AvatarServiceError: they do not come back finite and in shape.
        """
        some = next(iter(self.bundle.meshes.values())).vertices[:64]
        for _ in repose_in_batches(self.engine, self.bundle.skeleton, some, self.canonical_poses(), len(some)):
            pass

    def canonical_poses(self) -> PoseSequence:
        """One frame in which no joint is turned."""
        still: NDArray[np.float32] = np.tile(np.eye(3, dtype=np.float32), (1, 24, 1, 1))
        return PoseSequence(still, np.zeros((1, 3), np.float32), 30.0, "y", "m", "matrix")


class AvatarStore:
    """All avatars of a folder.  One that is damaged does not hinder the others."""

    def __init__(self, bundle_dir: Path, make_engine: EngineFactory) -> None:
        self._bundle_dir, self._make_engine = bundle_dir, make_engine
        self._avatars: dict[str, Avatar | None] = {}

    def load(self) -> None:
        """Read every bundle.  Takes seconds: call it from a worker thread."""
        folders = sorted(path for path in self._bundle_dir.iterdir() if is_avatar_id(path.name) and path.is_dir())
        self._avatars = {path.name: self._load(path) for path in folders}
        if not self._avatars:
            log.warning("no avatars in %s", self._bundle_dir)

    def _load(self, path: Path) -> Avatar | None:
        try:
            bundle = read_bundle(path)
            avatar = Avatar(bundle, self._make_engine(bundle.repose_onnx))
            avatar.check()
        except (BundleError, AvatarServiceError) as error:
            log.error("avatar %s cannot be served: %s", path.name, error, exc_info=error.__cause__)
            return None
        sizes = {lod: len(mesh.vertices) for lod, mesh in bundle.meshes.items()}
        log.info(
            "avatar %s runs on %s (%s), vertices %s", avatar.id, avatar.engine.device, avatar.engine.provider, sizes
        )
        return avatar

    def get(self, avatar_id: str) -> Avatar:
        """The avatar of that name.

        Raises:
            AvatarNotFound: there is none.
            AvatarUnavailable: there is one, but it is damaged.
        """
        if avatar_id not in self._avatars:
            shown = avatar_id if is_avatar_id(avatar_id) else "of that name"
            raise AvatarNotFound(f"there is no avatar {shown}")
        avatar = self._avatars[avatar_id]
        if avatar is None:
            raise AvatarUnavailable(f"the bundle of {avatar_id} could not be loaded")
        return avatar

    def entries(self) -> dict[str, Avatar | None]:
        """Every avatar by name; None stands for one that cannot be served."""
        return dict(self._avatars)
