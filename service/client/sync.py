"""The client for programs without an event loop."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from numpy.typing import ArrayLike

from service.client.backoff import RETRIED, Backoff, Polls
from service.client.calls import (
    Applied,
    Bundle,
    Call,
    Job,
    Poses,
    authorization,
    avatar_path,
    delete_call,
    frames_type,
    load_call,
    media_type_of,
    repose_call,
    upload_call,
)
from service.client.errors import ConnectionLost, Refused
from service.client.sync_stream import Stream
from service.frames import Codec, Frame, FrameError, decode_stream

TIMEOUT = httpx.Timeout(10.0, read=300.0)


class Client:
    """Reposes avatars of a service.  `with Client(url) as client:`; not for several threads at once.

    Every call may raise `Refused` (the service said no) and `ConnectionLost`.  What the service puts off, with 429 or
    503, is tried again, up to `retries` times and not before `Retry-After`.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        retries: int = 4,
        sleep: Callable[[float], None] = time.sleep,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._url, self._key, self._retries, self._sleep = url.rstrip("/"), key, retries, sleep
        self._http = httpx.Client(base_url=self._url, headers=authorization(key), timeout=TIMEOUT, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def avatars(self) -> list[dict[str, Any]]:
        """Every avatar, its state and its levels of detail."""
        return self._json("GET", Call("/avatars"))["avatars"]

    def avatar(self, avatar: str) -> dict[str, Any]:
        """Skeleton, provenance and metrics of an avatar."""
        return self._json("GET", Call(avatar_path(avatar)))

    def mesh(self, avatar: str, lod: str | None = None) -> bytes:
        """The canonical mesh as .glb: the faces of every frame."""
        query = {} if lod is None else {"lod": lod}
        with self._answer("GET", Call(avatar_path(avatar, "mesh"), query)) as answer:
            return answer.read()

    def upload(
        self, avatar: str, bundle: Bundle, *, if_match: str | None = None, only_new: bool = False
    ) -> dict[str, Any]:
        """Make or replace an avatar; what `avatar` says of it then.

        A broken connection is `ConnectionLost` and not tried again: `versions` says whether the upload came through.

        Args:
            bundle: a folder, a .zip or .tar, or the bytes of one; held in memory.
            if_match: `bundle_digest` that the avatar must still have; with another one it is `Refused` with 412.
            only_new: `Refused` with 412 if there is such an avatar already.

        Raises:
            ValueError, OSError: the name is that of no archive; the bundle cannot be read.
        """
        return self._json("PUT", upload_call(avatar, bundle, if_match, only_new))

    def delete(self, avatar: str, *, if_match: str | None = None) -> None:
        """Remove an avatar and its older versions.

        After `ConnectionLost` it may be gone: to delete it again is then `Refused` with 404.
        """
        self._done("DELETE", delete_call(avatar, if_match))

    def versions(self, avatar: str) -> list[dict[str, Any]]:
        """The version that is served, with `replaced_at` None, and those it replaced, latest first."""
        return self._json("GET", Call(avatar_path(avatar, "versions")))["versions"]

    def load(self, avatar: str, version: str | None = None, *, if_match: str | None = None) -> dict[str, Any]:
        """Load an avatar into memory; what `avatar` says of it.

        Args:
            version: digest of one of `versions` to go back to first.
            if_match: for going back, as for `upload`; not looked at if `version` is served already.
        """
        return self._json("POST", load_call(avatar, version, if_match))

    def unload(self, avatar: str) -> None:
        """Drop an avatar from memory; the next request loads it again."""
        self._done("POST", Call(avatar_path(avatar, "unload")))

    def info(self) -> dict[str, Any]:
        """Version, device and limits of the service."""
        return self._json("GET", Call("/info"))

    def repose(
        self,
        avatar: str,
        poses: Poses,
        translations: ArrayLike | None = None,
        *,
        codec: Codec = "q16",
        timeout_s: float | None = None,
        **options: Any,
    ) -> Iterator[Frame]:
        """The frames of a sequence, each as soon as it is there.

        Args:
            poses: an array such as (F, 72), or the path of a file.
            translations: (F, 3), for an array of poses.
            codec: q16 is half of f32 and exact to 0.02 mm.
            timeout_s: seconds that each try may take the service; what takes longer is `Refused` with 504.
            options: lod, up_axis, units, fps and the other query parameters of `POST /avatars/{id}/repose`.
        """
        call = repose_call(avatar, poses, translations, frames_type(codec), options, timeout_s=timeout_s)
        with self._answer("POST", call) as answer:
            try:
                yield from decode_stream(answer.iter_bytes())
            except FrameError as error:
                raise ConnectionLost(f"the answer broke off: {error}") from error

    def export(
        self,
        avatar: str,
        poses: Poses,
        path: Path | str,
        translations: ArrayLike | None = None,
        *,
        progress: Callable[[int, int | None], None] | None = None,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Applied:
        """Write the reposed sequence to a file, whose name says the format.

        Args:
            progress: called with the bytes that have come and, where it is known, the number of all.
            timeout_s: as for `repose`.

        Raises:
            ValueError, OSError: the name is that of no format; the file cannot be written.
        """
        call = repose_call(avatar, poses, translations, media_type_of(path), options, timeout_s=timeout_s)
        return self._save("POST", call, Path(path), progress)

    def submit(
        self, avatar: str, poses: Poses, path: Path | str, translations: ArrayLike | None = None, **options: Any
    ) -> Job:
        """Have the service repose a long sequence in the background; the name of `path` says the format.

        The same request again is the same job.
        """
        call = repose_call(avatar, poses, translations, media_type_of(path), options, "jobs")
        return Job.read(self._json("POST", call))

    def jobs(self) -> list[Job]:
        """The jobs of this key, those asked for last first; a key of the admin plane sees all."""
        return [Job.read(job) for job in self._json("GET", Call("/jobs"))["jobs"]]

    def job(self, job_id: str) -> Job:
        """How far a job is."""
        return Job.read(self._json("GET", Call(f"/jobs/{job_id}")))

    def cancel(self, job_id: str) -> None:
        """Stop a job, or remove one that has ended."""
        self._done("DELETE", Call(f"/jobs/{job_id}"))

    def fetch(
        self, job_id: str, path: Path | str, *, progress: Callable[[int, int | None], None] | None = None
    ) -> Applied:
        """Wait for a job and write its result to a file.

        Args:
            progress: called with the frames that are done and the number of all.

        Raises:
            Refused: the job failed or was cancelled.
        """
        polls = Polls(progress)
        while True:
            try:
                wait_s = polls.saw(self.job(job_id))
            except ConnectionLost as error:
                wait_s = polls.missed(error)
            if wait_s is None:
                break
            self._sleep(wait_s)
        return self._save("GET", Call(f"/jobs/{job_id}/result"), Path(path), None)

    def stream(self, avatar: str, mode: str = "live", *, codec: Codec = "q16", **options: Any) -> Stream:
        """A stream of poses and frames over a WebSocket; `with client.stream(...) as stream:`.

        Args:
            mode: `live`, the newest pose wins; or `complete`, every pose gets its frame.
            options: lod, max_fps, window, up_axis, units, frame, rotation, normalize.
        """
        return Stream(self._url, self._key, avatar, {"mode": mode, **options}, codec, self._retries, self._sleep)

    def _json(self, method: str, call: Call) -> Any:
        with self._answer(method, call) as answer:
            answer.read()
            return answer.json()

    def _done(self, method: str, call: Call) -> None:
        with self._answer(method, call):
            pass

    def _save(self, method: str, call: Call, path: Path, progress: Callable[[int, int | None], None] | None) -> Applied:
        # A broken answer must not look like a file.
        part = path.with_name(path.name + ".part")
        try:
            with self._answer(method, call) as answer:
                length, done = answer.headers.get("content-length", ""), 0
                with open(part, "wb") as file:
                    for chunk in answer.iter_bytes():
                        file.write(chunk)
                        done += len(chunk)
                        if progress:
                            progress(done, int(length) if length.isdecimal() else None)
                part.replace(path)
                return Applied.read(answer.headers)
        finally:
            part.unlink(missing_ok=True)

    @contextmanager
    def _answer(self, method: str, call: Call) -> Iterator[httpx.Response]:
        """A successful answer whose body is not yet read."""
        backoff = Backoff(self._retries)
        while True:
            request = self._http.build_request(
                method,
                call.path,
                params=call.query,
                headers=call.sent_headers,
                content=call.pieces() if call.body else None,
            )
            try:
                answer = self._http.send(request, stream=True)
            except httpx.ConnectError as error:
                wait_s = backoff.wait_s()
                if wait_s is None:
                    raise ConnectionLost(f"{self._url}: {error}") from error
                self._sleep(wait_s)
                continue
            except httpx.HTTPError as error:
                raise ConnectionLost(f"{self._url}: {error}") from error
            try:
                if answer.is_success:
                    yield answer
                    return
                body = answer.read()
            except httpx.HTTPError as error:
                raise ConnectionLost(f"{self._url}: {error}") from error
            finally:
                answer.close()
            wait_s = backoff.wait_s(answer.headers.get("retry-after")) if answer.status_code in RETRIED else None
            if wait_s is None:
                raise Refused.read(answer.status_code, body)
            self._sleep(wait_s)
