"""Jobs on the disk, shared by all replicas: what is wanted, how far it is, and the results.

    <id>/job.json     the job; written by whoever made it, then only by the worker that holds the latest claim
    <id>/poses.npz    rotations and translation
    <id>/claim.<n>    the n-th worker that took it; touched while it works, so a dead worker is seen
    <id>/cancel       it is not wanted any more
    <id>/result       there once it is whole

Everything is written under another name and renamed.  All of this blocks: it is for worker threads.
"""

import io
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from service.errors import InsufficientStorage, JobNotFound
from service.folders import entries
from service.npz import read_npz
from service.poses import PoseSequence

STALE_S = 15.0
"""A worker whose claim was not touched for so long is dead."""
MAX_CLAIMS = 2
"""A job that has cost two workers their life gets no third."""


class Job(BaseModel):
    """A motion that is reposed in the background."""

    id: str = Field(description="Made of what is wanted: the same request is the same job.")
    owner: str | None = Field(default=None, description="Name of the key that asked for it.")
    avatar: str
    bundle: str = Field(description="Digest of the avatar's bundle.")
    lod: str
    media_type: str
    frames: int
    fps: float
    state: Literal["queued", "running", "done", "failed", "cancelled"] = "queued"
    frames_done: int = 0
    error: str | None = Field(default=None, description="Code of the problem, for a job that failed.")
    result_bytes: int | None = None
    created_s: float = Field(description="Seconds since 1970.")
    applied: dict[str, str] = Field(description="What was applied to the input, as the headers of an answer say it.")

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


class JobStore:
    """A folder of jobs that holds at most `max_bytes`: the oldest that have ended make room."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def add(self, job: Job, poses: PoseSequence) -> tuple[Job, bool]:
        """Write a job down; gives the one that is there already, unless that one failed or was cancelled.

        Raises:
            InsufficientStorage: the disk, or the folder of jobs, is full.
        """
        with suppress(JobNotFound):
            known = self.get(job.id)
            if known.state not in ("failed", "cancelled"):
                return known, False
            self.remove(job.id)
        content = io.BytesIO()
        np.savez(content, rotations=poses.rotations, translation=poses.translation)
        fresh = self.folder / f".new-{uuid.uuid4().hex}"
        try:
            fresh.mkdir(parents=True)
            self.make_room(len(content.getvalue()))
            write_whole(fresh / "poses.npz", content.getvalue())
            write_whole(fresh / "job.json", job.model_dump_json().encode())
            fresh.rename(self.folder / job.id)
        except OSError as error:
            with suppress(JobNotFound):  # somebody was faster with the same
                return self.get(job.id), False
            raise InsufficientStorage(f"the job cannot be written: {error}") from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return job, True

    def get(self, job_id: str) -> Job:
        """Raises `JobNotFound` where there is none."""
        try:
            job = Job.model_validate_json((self.folder / job_id / "job.json").read_bytes())
        except (OSError, ValidationError) as error:
            raise JobNotFound("there is no such job, or not any more") from error
        if not job.ended and (self.folder / job_id / "cancel").exists():
            job.state = "cancelled"
        return job

    def jobs(self) -> list[Job]:
        """All that are there, those asked for last first."""
        return sorted(self._jobs(), key=lambda job: -job.created_s)

    def poses(self, job: Job) -> PoseSequence:
        """What is to be reposed."""
        path = self.folder / job.id / "poses.npz"
        arrays: dict[str, Any] = read_npz(path.read_bytes(), ("rotations", "translation"), 1 << 40)
        return PoseSequence(arrays["rotations"], arrays["translation"], job.fps, "y", "m", "matrix")

    def save(self, job: Job) -> None:
        """Write down how far a job is."""
        write_whole(self.folder / job.id / "job.json", job.model_dump_json().encode())

    def cancel(self, job_id: str) -> None:
        """Raises `JobNotFound` where there is none; a job that has ended is removed with its result."""
        if self.get(job_id).ended:
            self.remove(job_id)
        else:
            (self.folder / job_id / "cancel").touch()

    def claim(self, job_id: str) -> Path | None:
        """Take a job that nobody works on; None where somebody does, or it has ended, or cost too many workers."""
        if self.get(job_id).ended:
            return None
        claims = self._claims(job_id)
        if len(claims) >= MAX_CLAIMS or (claims and _age_s(claims[-1]) < STALE_S):
            return None
        # One in between may be gone: whose worker ended in good order.
        number = int(claims[-1].suffix[1:]) + 1 if claims else 1
        path = self.folder / job_id / f"claim.{number}"
        try:
            path.open("x").close()
        except OSError:  # another was faster, or the job is gone
            return None
        return path

    def waiting(self) -> Iterator[str]:
        """Jobs that nobody works on.  One that has cost too many workers their life is marked as failed."""
        for job in self._jobs():
            claims = self._claims(job.id)
            if job.ended or (claims and _age_s(claims[-1]) < STALE_S):
                continue
            if len(claims) < MAX_CLAIMS:
                yield job.id
            else:
                self.save(job.model_copy(update={"state": "failed", "error": "worker-lost"}))

    def make_room(self, needed: int) -> None:
        """Remove jobs that have ended, oldest first, until there is room for `needed` bytes.

        Raises:
            InsufficientStorage: the rest is still being worked on.
        """
        used = sum(map(_size, entries(self.folder)))
        for job in sorted(self._jobs(), key=lambda job: job.created_s):
            if used + needed <= self.max_bytes:
                return
            if job.ended:
                used -= _size(self.folder / job.id)
                self.remove(job.id)
        if used + needed > self.max_bytes:
            raise InsufficientStorage(f"the jobs at work hold {used} of {self.max_bytes} bytes")

    def result(self, job_id: str) -> Path:
        """Where the result of a job is, or will be."""
        return self.folder / job_id / "result"

    def remove(self, job_id: str) -> None:
        """Forget a job and its result."""
        shutil.rmtree(self.folder / job_id, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a process that was killed left half written."""
        for path in entries(self.folder):
            if path.name.startswith(".new-") and _age_s(path) > STALE_S:
                shutil.rmtree(path, ignore_errors=True)

    def _jobs(self) -> list[Job]:
        jobs = []
        for folder in entries(self.folder):
            with suppress(JobNotFound):
                jobs.append(self.get(folder.name))
        return jobs

    def _claims(self, job_id: str) -> list[Path]:
        return sorted(path for path in entries(self.folder / job_id) if path.name.startswith("claim."))


def write_whole(path: Path, content: bytes) -> None:
    """A reader sees the old file or the new one, never half of one."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, as far as they are there and may be seen: a volume has folders of its own."""
    size = 0
    with suppress(OSError):
        for path in entries(folder):
            with suppress(OSError):
                size += path.stat().st_size
    return size


def _age_s(path: Path) -> float:
    # Files are compared over machines, so this is the wall clock; a jump of it only moves a second try.
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
