"""Avatars as a resource: upload, replace, go back to an older version, delete.

    <bundle_dir>/<id>/                       what is served
    <bundle_dir>/.versions/<id>/<digest>/    what was replaced, the latest few
    <bundle_dir>/.uploads/<random>/          at work, locked by the process that writes it
    <bundle_dir>/.locks/<id>                 locked while the avatar is being changed, by whichever process

A bundle is received, unpacked, vetted and run in a folder of its own; only then is it renamed into its place.  Locks
are the kernel's: a process that was killed holds none, and what it left behind is swept at the next start.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from anyio import CancelScope, CapacityLimiter, fail_after, run_process, to_thread

from service.archive import ArchiveKind, unpack
from service.avatars import Avatar, AvatarStore
from service.bundle.files import BundleError, read_bundle
from service.bundle.manifest import AVATAR_ID_PATTERN, MANIFEST_FILE, is_avatar_id
from service.errors import (
    AvatarNotFound,
    AvatarServiceError,
    AvatarUnavailable,
    BundleInvalid,
    InsufficientStorage,
    PreconditionFailed,
    UploadConflict,
    VersionNotFound,
)
from service.folders import entries

log = logging.getLogger(__name__)
MAX_VETTING_S = 300
_NOT_STORED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
Announce = Callable[[str], Awaitable[None]]
"""Tells the other replicas that an avatar has changed."""


@dataclass(frozen=True)
class Version:
    """One state of an avatar that is on the disk."""

    digest: str
    replaced_at_s: float | None
    """When it was replaced, seconds since 1970; None for the one that is served."""


@dataclass(frozen=True)
class Conditions:
    """What a caller believes the avatar to be: the headers If-Match and If-None-Match."""

    if_match: str | None = None
    if_none_match: str | None = None

    def check(self, digest: str | None) -> None:
        """Raises `PreconditionFailed` unless the avatar, None if there is none, is as believed."""
        if self.if_match is not None and not _matches(self.if_match, digest):
            raise PreconditionFailed("the avatar is not at the version of If-Match")
        if self.if_none_match is not None and _matches(self.if_none_match, digest):
            raise PreconditionFailed("the avatar is there already")


class Uploads:
    """Changes the folder of avatars.  One change of an avatar at a time, over all replicas that share the folder."""

    def __init__(
        self, store: AvatarStore, announce: Announce, *, max_bytes: int, max_avatar_bytes: int, kept_versions: int
    ) -> None:
        self._store, self._folder, self._announce = store, store.bundle_dir, announce
        self._max_bytes, self._max_avatar_bytes, self._kept_versions = max_bytes, max_avatar_bytes, kept_versions
        self._vetting = CapacityLimiter(1)  # it takes a core and memory from those who are served

    def sweep(self) -> None:
        """Remove what killed processes left, and give back an avatar whose replacement they did not end."""
        with _stored("the folder of avatars cannot be swept"):
            if not os.access(self._folder, os.W_OK):
                return
            with self._lock(".sweep", fcntl.LOCK_EX):
                for leftover in entries(self._folder / ".uploads"):
                    descriptor = os.open(leftover, os.O_RDONLY)
                    try:
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue  # its process lives
                    finally:
                        os.close(descriptor)
                    shutil.rmtree(leftover)
            for versions in entries(self._folder / ".versions"):
                self._recover(versions.name)

    def _recover(self, avatar_id: str) -> None:
        try:
            with self._lock(avatar_id):
                versions = self._kept(avatar_id)
                if versions and not (self._folder / avatar_id).exists():
                    os.rename(self._version_folder(avatar_id, versions[0].digest), self._folder / avatar_id)
        except UploadConflict:
            pass  # its process lives

    async def put(
        self,
        avatar_id: str,
        body: AsyncIterator[bytes],
        kind: ArchiveKind,
        conditions: Conditions,
        announced_bytes: int | None = None,
    ) -> tuple[Avatar, bool]:
        """Take a new bundle for an avatar, which may be a new one; returns it, and whether it is new.

        Raises:
            UploadConflict: somebody else is changing it.
            PreconditionFailed: it is not as `conditions` say.
            BundleInvalid, BodyTooLarge: the bundle is refused.  What was served goes on, as after all of these.
            InsufficientStorage: the disk is full, or cannot be written.
        """
        if not is_avatar_id(avatar_id):
            raise BundleInvalid(f"expected an id of the form {AVATAR_ID_PATTERN}")
        async with self._changing(avatar_id, conditions), self._workplace() as place:
            if announced_bytes and 2 * announced_bytes > shutil.disk_usage(place).free:
                raise InsufficientStorage(f"no room for {announced_bytes} bytes")
            spool, fresh = place / "body", place / avatar_id
            with open(spool, "w+b") as file:
                async for part in body:
                    await to_thread.run_sync(file.write, part)
                fresh.mkdir()
                await to_thread.run_sync(unpack, file, kind, fresh, self._max_bytes)
            spool.unlink()
            return await self._vet_and_serve(avatar_id, fresh)

    async def go_back(self, avatar_id: str, digest: str, conditions: Conditions) -> None:
        """Serve an older version again.

        Where it is served already there is nothing to do, whatever the conditions: who asks again, not knowing that it
        was done, learns that it was.

        Raises:
            VersionNotFound: it is not kept.
            AvatarUnavailable, Overloaded: it is served already, but cannot be loaded here.
            UploadConflict, PreconditionFailed, BundleInvalid, InsufficientStorage: as in `put`.
        """
        if not is_avatar_id(avatar_id):
            raise AvatarNotFound("there is no avatar of that name")
        if digest == self.digest(avatar_id):
            held = self._store.in_memory(avatar_id)
            if held is not None and held.bundle.digest != digest:
                await self._store.reload(avatar_id)  # another replica did it, and its word has not come yet
            return
        async with self._changing(avatar_id, conditions), self._workplace() as place:
            if digest not in {version.digest for version in self._kept(avatar_id)}:
                raise VersionNotFound(f"expected one of the versions of {avatar_id}")
            fresh = place / avatar_id
            copy = partial(shutil.copytree, self._version_folder(avatar_id, digest), fresh, copy_function=os.link)
            await to_thread.run_sync(copy)
            await self._vet_and_serve(avatar_id, fresh)

    async def delete(self, avatar_id: str, conditions: Conditions) -> None:
        """Remove an avatar and its versions.

        Raises:
            AvatarNotFound: there is none.
            UploadConflict, PreconditionFailed, InsufficientStorage: as in `put`.
        """
        if not is_avatar_id(avatar_id) or not (self._folder / avatar_id).is_dir():
            raise AvatarNotFound(f"there is no avatar {avatar_id if is_avatar_id(avatar_id) else 'of that name'}")

        def remove(place: Path) -> None:
            # The versions first: without its current state, an avatar with versions is one to be given back.
            shutil.rmtree(self._folder / ".versions" / avatar_id, ignore_errors=True)
            os.rename(self._folder / avatar_id, place / avatar_id)

        async with self._changing(avatar_id, conditions), self._workplace() as place:
            with CancelScope(shield=True):
                async with self._store.reading:
                    await to_thread.run_sync(remove, place)
                    self._store.forget(avatar_id)
                await self._announce(avatar_id)

    def versions(self, avatar_id: str) -> list[Version]:
        """The states of an avatar that are on the disk: the one that is served, then the others, latest first.

        Raises:
            AvatarNotFound: there is none.
        """
        digest = self.digest(avatar_id)
        if digest is None:
            raise AvatarNotFound(f"there is no avatar {avatar_id if is_avatar_id(avatar_id) else 'of that name'}")
        return [Version(digest, None), *self._kept(avatar_id)]

    def digest(self, avatar_id: str) -> str | None:
        """The digest of the bundle on the disk; None if there is none."""
        return digest_of(self._folder / avatar_id) if is_avatar_id(avatar_id) else None

    async def _vet_and_serve(self, avatar_id: str, fresh: Path) -> tuple[Avatar, bool]:
        """`fresh` takes the place of the avatar if there is nothing to be said against it."""
        async with self._vetting:
            try:
                # Cheap faults first; then what may crash, elsewhere; then one real inference where it will run.
                await to_thread.run_sync(read_bundle, fresh)
                await vet(fresh)
                avatar = await self._store.prepare(fresh)
            except (BundleError, AvatarUnavailable) as error:
                raise BundleInvalid(str(error)) from error
        if avatar.bytes > self._max_avatar_bytes:
            raise BundleInvalid(
                f"an avatar of {avatar.bytes} bytes in memory, where {self._max_avatar_bytes} are for all"
            )
        is_new = not (self._folder / avatar_id).exists()
        with CancelScope(shield=True):
            async with self._store.reading:
                await to_thread.run_sync(self._publish, fresh, avatar_id, avatar.bundle.digest)
                try:
                    self._store.install(avatar)
                except AvatarServiceError:
                    self._store.forget(avatar_id)  # no room at the moment: it is loaded when it is asked for
            await self._announce(avatar_id)
        log.info("avatar %s is now %s", avatar_id, avatar.bundle.digest[:16])
        return avatar, is_new

    def _publish(self, fresh: Path, avatar_id: str, digest: str) -> None:
        target, old_digest = self._folder / avatar_id, self.digest(avatar_id)
        old = self._version_folder(avatar_id, old_digest or "")
        if old_digest is not None:
            shutil.rmtree(old, ignore_errors=True)
            old.parent.mkdir(parents=True, exist_ok=True)
            os.utime(target)  # the time at which it was replaced
            os.rename(target, old)
        try:
            os.rename(fresh, target)
        except OSError:
            if old_digest is not None:
                os.rename(old, target)
            raise
        _sync(self._folder)
        shutil.rmtree(self._version_folder(avatar_id, digest), ignore_errors=True)
        for version in self._kept(avatar_id)[self._kept_versions :]:
            shutil.rmtree(self._version_folder(avatar_id, version.digest), ignore_errors=True)

    def _kept(self, avatar_id: str) -> list[Version]:
        versions = []
        for folder in entries(self._folder / ".versions" / avatar_id):
            with suppress(FileNotFoundError):  # who only asks for the versions holds no lock
                versions.append(Version(folder.name, folder.stat().st_mtime))
        return sorted(versions, key=lambda version: -(version.replaced_at_s or 0))

    def _version_folder(self, avatar_id: str, digest: str) -> Path:
        return self._folder / ".versions" / avatar_id / digest

    @asynccontextmanager
    async def _changing(self, avatar_id: str, conditions: Conditions) -> AsyncIterator[None]:
        """Nobody else changes the avatar meanwhile."""
        with _stored(f"{avatar_id} cannot be stored"), self._lock(avatar_id):
            conditions.check(self.digest(avatar_id))
            yield

    @asynccontextmanager
    async def _workplace(self) -> AsyncIterator[Path]:
        """An empty folder that is gone afterwards, whatever happens."""
        place = self._folder / ".uploads" / uuid.uuid4().hex
        with self._lock(".sweep", fcntl.LOCK_SH):
            place.mkdir(parents=True)
            descriptor = os.open(place, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield place
        finally:
            with CancelScope(shield=True):
                await to_thread.run_sync(partial(shutil.rmtree, place, ignore_errors=True))
            os.close(descriptor)

    @contextmanager
    def _lock(self, name: str, mode: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> Iterator[None]:
        # The files stay: one that was removed could be locked by two.
        (self._folder / ".locks").mkdir(exist_ok=True)
        descriptor = os.open(self._folder / ".locks" / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, mode)
            except BlockingIOError:
                raise UploadConflict(f"somebody else is changing {name}", {"Retry-After": "2"}) from None
            yield
        finally:
            os.close(descriptor)


async def vet(folder: Path) -> None:
    """`service.vetting` in another process, which may crash.

    Raises:
        BundleInvalid: the bundle is refused; or the process crashed, or took too long or too much memory.
    """
    command = [sys.executable, "-m", "service.vetting", str(folder)]
    try:
        with fail_after(MAX_VETTING_S):
            ended = await run_process(command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
        verdict = json.loads(ended.stdout)
    except TimeoutError:
        raise BundleInvalid(f"the graph does not come to an end within {MAX_VETTING_S} s") from None
    except ValueError:
        log.warning("vetting ended with %d: %s", ended.returncode, ended.stderr.decode(errors="replace")[-2000:])
        raise BundleInvalid("the bundle cannot be looked into: its graph crashes or takes too much memory") from None
    if verdict:
        raise BundleInvalid(verdict["refused"])


def digest_of(folder: Path) -> str | None:
    """The digest of the bundle in a folder, which is not verified; None if there is no such folder."""
    try:
        return hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()
    except OSError:
        return hashlib.sha256().hexdigest() if folder.is_dir() else None


@contextmanager
def _stored(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_STORED:
            raise
        raise InsufficientStorage(what) from error


def _matches(header: str, digest: str | None) -> bool:
    tags = {tag.strip() for tag in header.split(",")}
    return digest is not None and ("*" in tags or f'"{digest}"' in tags)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
