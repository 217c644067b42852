"""The avatars of a folder, loaded when they are first asked for, and kept while there is memory for them.

An avatar is used under a lease: meanwhile it is not dropped, whatever else is loaded, reloaded or deleted.
All methods are for the event loop's thread; reading and warming up run in a worker thread, one avatar at a time.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from anyio import to_thread
from numpy.typing import NDArray

from service.bundle.files import Bundle, BundleError, read_bundle, read_manifest
from service.bundle.glb import Mesh
from service.bundle.manifest import CHECKPOINT_FILE, REPOSE_FILE, Manifest, is_avatar_id
from service.engine import Engine
from service.errors import (
    AVATAR_RETRY_S,
    AvatarNotFound,
    AvatarServiceError,
    AvatarUnavailable,
    LodNotFound,
    OutputInvalid,
    Overloaded,
)

log = logging.getLogger(__name__)
EngineFactory = Callable[[bytes], Engine]
"""From the bytes of `repose.onnx` to an engine; raises `AvatarUnavailable`."""


@dataclass(eq=False)
class Avatar:
    """A bundle that was verified, and the engine that runs its graph."""

    bundle: Bundle
    engine: Engine
    """Replaced when a fault has spoilt it."""
    pins: int = 0
    """Leases that are open."""
    rebuilding: bool = False
    """A fault has spoilt the engine, and a new one is being made."""
    spoilt: bool = False
    """The engine failed and could not be rebuilt."""

    @property
    def id(self) -> str:
        return self.bundle.manifest.id

    @property
    def bytes(self) -> int:
        return _bytes_in_memory(self.bundle.manifest)

    def mesh(self, lod: str) -> Mesh:
        """The canonical mesh of a level of detail.

        Raises:
            LodNotFound: there is none of that name.
        """
        if lod not in self.bundle.meshes:
            raise LodNotFound(f"expected lod to be one of {', '.join(self.bundle.meshes)}")
        return self.bundle.meshes[lod]

    @property
    def smallest_lod(self) -> str:
        return min(self.bundle.meshes, key=lambda lod: len(self.bundle.meshes[lod].vertices))

    def repose(self, lod: str, rotations: NDArray[np.float32], translation: NDArray[np.float32]) -> NDArray[np.float32]:
        """(F, 24, 3, 3), (F, 3) -> vertices (F, V, 3), metres; not checked for NaN.  Takes long: for worker threads,
        but for a frame that the engine computes alone.

        Raises:
            OutputInvalid: the engine's answer has the wrong shape.
            EngineFailed: it raised.
        """
        mesh, skeleton = self.mesh(lod), self.bundle.skeleton
        bones = skeleton.bone_transforms(rotations)
        roots = skeleton.root_transforms(rotations, translation)
        vertices = self.engine.repose(mesh.vertices, bones, roots)
        expected = (len(rotations), *mesh.vertices.shape)
        if vertices.shape != expected or vertices.dtype != np.float32:
            raise OutputInvalid(f"expected float32 {expected}, got {vertices.dtype} {vertices.shape}")
        return vertices

    def check(self, *lods: str) -> None:
        """Repose one frame of each level of detail for real, the smallest one if none is named.

        Raises:
            AvatarServiceError: it does not come back finite and in shape.
        """
        for lod in lods or (self.smallest_lod,):
            if not np.isfinite(self.repose(lod, *still_pose())).all():
                raise OutputInvalid("the graph gave vertices that are not finite")


def still_pose() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rotations (1, 24, 3, 3) and translation (1, 3) of a frame in which no joint is turned."""
    return np.tile(np.eye(3, dtype=np.float32), (1, 24, 1, 1)), np.zeros((1, 3), np.float32)


@dataclass(frozen=True)
class Entry:
    """What is known of an avatar without loading it."""

    status: Literal["ready", "stored", "unavailable"]
    manifest: Manifest | None
    """None if it cannot be read."""
    avatar: Avatar | None = None
    """None unless it is ready, that is, loaded."""


class AvatarStore:
    """All avatars of a folder.  One that is damaged does not hinder the others."""

    def __init__(
        self, bundle_dir: Path, make_engine: EngineFactory, max_bytes: int = 2 << 30, require_gpu: bool = False
    ) -> None:
        self.bundle_dir, self._max_bytes = bundle_dir, max_bytes
        self._new_engine, self._require_gpu = make_engine, require_gpu
        self._loaded: OrderedDict[str, Avatar] = OrderedDict()  # least recently used first
        self._loading: dict[str, asyncio.Task[Avatar]] = {}
        self.reading = asyncio.Lock()
        """Held while a bundle is read; who changes a folder holds it, so that nobody here reads half of two bundles."""
        self._damaged: dict[str, float] = {}  # when to look again, on the monotonic clock
        self.preloaded = asyncio.Event()
        """Set once the avatars that fit into memory have been loaded at the start."""

    @asynccontextmanager
    async def lease(self, avatar_id: str) -> AsyncIterator[Avatar]:
        """The avatar of that name, loaded if need be, and not dropped meanwhile.

        Raises:
            AvatarNotFound: there is none.
            AvatarUnavailable: there is one, but it is damaged or larger than the memory for avatars.
            Overloaded: the memory is full of avatars that are in use.
        """
        avatar = await self._get(avatar_id)
        avatar.pins += 1
        try:
            yield avatar
        finally:
            avatar.pins -= 1

    async def _get(self, avatar_id: str) -> Avatar:
        if not is_avatar_id(avatar_id):
            raise AvatarNotFound("there is no avatar of that name")
        if avatar := self._loaded.get(avatar_id):
            self.touch(avatar)
            return avatar
        if (left_s := self._damaged.get(avatar_id, -1e9) - time.monotonic()) > 0:
            raise AvatarUnavailable(f"the bundle of {avatar_id} could not be loaded", left_s)
        if avatar_id not in self._loading:
            task = self._loading[avatar_id] = asyncio.create_task(self._load(avatar_id))
            # All who asked may have gone when it fails; it is logged in any case.
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
        # Shielded: others may wait for it, and the next one to ask will find it.
        return await asyncio.shield(self._loading[avatar_id])

    async def _load(self, avatar_id: str) -> Avatar:
        try:
            async with self.reading:
                folder = self.bundle_dir / avatar_id
                self._make_room(_bytes_in_memory(await to_thread.run_sync(_manifest, folder)))
                return self.install(await self.prepare(folder))
        except AvatarUnavailable as error:
            self._damaged[avatar_id] = time.monotonic() + AVATAR_RETRY_S
            log.error("avatar %s cannot be served: %s", avatar_id, error, exc_info=error.__cause__)
            raise
        finally:
            del self._loading[avatar_id]

    async def prepare(self, folder: Path) -> Avatar:
        """Read, verify and warm up the bundle in `folder`; nothing that is served changes.

        Raises:
            AvatarUnavailable: it will not do.
            Overloaded: the engine has no time for it.
        """
        return await to_thread.run_sync(self._prepare, folder)

    def _prepare(self, folder: Path) -> Avatar:
        try:
            bundle = read_bundle(folder)
            avatar = Avatar(bundle, self._make_engine(bundle.repose_onnx))
            avatar.check(*bundle.meshes)
        except (AvatarUnavailable, Overloaded):
            raise
        except (BundleError, AvatarServiceError) as error:
            raise AvatarUnavailable(f"{folder.name}: {error}") from error
        sizes = {lod: len(mesh.vertices) for lod, mesh in bundle.meshes.items()}
        engine = avatar.engine
        log.info("avatar %s runs on %s (%s), vertices %s", avatar.id, engine.device, engine.provider, sizes)
        return avatar

    def _make_engine(self, graph: bytes) -> Engine:
        engine = self._new_engine(graph)
        if self._require_gpu and engine.device != "cuda":
            raise AvatarUnavailable(f"a GPU is required, and it would run on {engine.device}")
        return engine

    def install(self, avatar: Avatar) -> Avatar:
        """Serve this avatar from now on; leases of the one it replaces go on with what they have.

        Raises:
            AvatarUnavailable: it is larger than the memory for avatars.
            Overloaded: the memory is full of avatars that are in use.  The one it was to replace still serves.
        """
        self._make_room(avatar.bytes, replacing=avatar.id)
        self._loaded[avatar.id] = avatar
        self._loaded.move_to_end(avatar.id)
        self._damaged.pop(avatar.id, None)
        return avatar

    async def reload(self, avatar_id: str) -> None:
        """The folder has changed: take the new bundle.  If it will not do, the old one still serves.

        Raises:
            AvatarUnavailable, Overloaded: as in `install`.
        """
        self._damaged.pop(avatar_id, None)
        if avatar_id in self._loaded or avatar_id in self._loading:
            async with self.reading:
                self.install(await self.prepare(self.bundle_dir / avatar_id))

    def forget(self, avatar_id: str) -> None:
        """Drop an avatar from memory; leases that are open go on."""
        self._loaded.pop(avatar_id, None)
        self._damaged.pop(avatar_id, None)

    def drop_idle(self, but: Avatar | None = None) -> None:
        """Drop all avatars that are not in use: the device has run out of memory."""
        for avatar_id, avatar in list(self._loaded.items()):
            if not avatar.pins and avatar is not but:
                self.forget(avatar_id)

    async def rebuild(self, avatar: Avatar) -> bool:
        """Give `avatar` a new engine in place of one that a fault has spoilt; whether that one works."""

        def build() -> None:
            avatar.engine = self._make_engine(avatar.bundle.repose_onnx)
            avatar.check(*avatar.bundle.meshes)  # the first frame of each mesh takes longer than the next ones

        avatar.rebuilding = True
        try:
            await to_thread.run_sync(build)
        except AvatarServiceError as error:
            log.error("avatar %s cannot be rebuilt: %s", avatar.id, error, exc_info=error.__cause__)
            return False
        finally:
            avatar.rebuilding = False
        return True

    def give_up(self, avatar: Avatar) -> None:
        """Serve `avatar` no more; its folder may be tried again after a while."""
        avatar.spoilt = True
        if self._loaded.get(avatar.id) is avatar:
            self.forget(avatar.id)
            self._damaged[avatar.id] = time.monotonic() + AVATAR_RETRY_S

    async def preload(self) -> None:
        """Load what fits into memory, so that the first request need not wait."""
        try:
            avatar_ids = await to_thread.run_sync(self._avatar_ids)
            if not avatar_ids:
                log.warning("no avatars in %s", self.bundle_dir)
            for avatar_id in avatar_ids:
                try:
                    manifest = await to_thread.run_sync(_manifest, self.bundle_dir / avatar_id)
                    if self._bytes() + _bytes_in_memory(manifest) > self._max_bytes:
                        break
                    await self._get(avatar_id)
                except AvatarServiceError:
                    continue  # logged where it was raised; it will be asked for, or not
        finally:
            self.preloaded.set()

    def touch(self, avatar: Avatar) -> None:
        """Count an avatar that is loaded as used now."""
        self._loaded.move_to_end(avatar.id)

    def in_memory(self, avatar_id: str) -> Avatar | None:
        """The avatar of that name, if it is loaded; a look, not a use."""
        return self._loaded.get(avatar_id)

    def loaded(self) -> list[Avatar]:
        """What is in memory, most recently used first."""
        return list(reversed(self._loaded.values()))

    async def entries(self) -> dict[str, Entry]:
        """Every avatar of the folder by name."""
        avatar_ids = await to_thread.run_sync(self._avatar_ids)
        return {avatar_id: await self._entry(avatar_id) for avatar_id in avatar_ids}

    async def _entry(self, avatar_id: str) -> Entry:
        if avatar := self._loaded.get(avatar_id):
            return Entry("ready", avatar.bundle.manifest, avatar)
        try:
            manifest = await to_thread.run_sync(_manifest, self.bundle_dir / avatar_id)
        except AvatarServiceError:
            return Entry("unavailable", None)
        damaged = time.monotonic() < self._damaged.get(avatar_id, -1e9)
        return Entry("unavailable" if damaged else "stored", manifest)

    def _avatar_ids(self) -> list[str]:
        return sorted(path.name for path in self.bundle_dir.iterdir() if is_avatar_id(path.name) and path.is_dir())

    def _bytes(self) -> int:
        return sum(avatar.bytes for avatar in self._loaded.values())

    def _make_room(self, needed: int, replacing: str | None = None) -> None:
        if needed > self._max_bytes:
            raise AvatarUnavailable(f"an avatar of {needed} bytes, where {self._max_bytes} are for all")
        others = [avatar for avatar in self._loaded.values() if avatar.id != replacing]
        used = sum(avatar.bytes for avatar in others)
        leaving = []
        for avatar in others:
            if used + needed > self._max_bytes and not avatar.pins:
                leaving.append(avatar)
                used -= avatar.bytes
        if used + needed > self._max_bytes:
            raise Overloaded("the memory is full of avatars that are in use", retry_after_s=10)
        for avatar in leaving:
            log.info("avatar %s leaves the memory", avatar.id)
            self.forget(avatar.id)


def _manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise AvatarNotFound(f"there is no avatar {folder.name}")
    try:
        return read_manifest(folder)
    except (BundleError, OSError) as error:
        raise AvatarUnavailable(f"{folder.name}: {error}") from error


def _bytes_in_memory(manifest: Manifest) -> int:
    """About what an avatar takes: each file but the checkpoint as it is, the meshes decoded, the graph in a session."""
    sizes = {name: record.bytes for name, record in manifest.files.items() if name != CHECKPOINT_FILE}
    return 2 * sum(sizes.values()) + sizes[REPOSE_FILE]
