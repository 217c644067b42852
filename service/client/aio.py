"""The client for programs with an event loop; the same calls as `Client`, awaited."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from numpy.typing import ArrayLike

from service.client.aio_stream import AsyncStream
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
from service.frames import Codec, Frame, FrameError, StreamReader

TIMEOUT = httpx.Timeout(10.0, read=300.0)


class AsyncClient:
    """Reposes avatars of a service.  `async with AsyncClient(url) as client:`; `Client` says what the calls do."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        retries: int = 4,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url, self._key, self._retries, self._sleep = url.rstrip("/"), key, retries, sleep
        self._http = httpx.AsyncClient(
            base_url=self._url, headers=authorization(key), timeout=TIMEOUT, transport=transport
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connections back."""
        await self._http.aclose()

    async def avatars(self) -> list[dict[str, Any]]:
        """Every avatar, its state and its levels of detail."""
        return (await self._json("GET", Call("/avatars")))["avatars"]

    async def avatar(self, avatar: str) -> dict[str, Any]:
        """Skeleton, provenance and metrics of an avatar."""
        return await self._json("GET", Call(avatar_path(avatar)))

    async def mesh(self, avatar: str, lod: str | None = None) -> bytes:
        """The canonical mesh as .glb: the faces of every frame."""
        query = {} if lod is None else {"lod": lod}
        async with self._answer("GET", Call(avatar_path(avatar, "mesh"), query)) as answer:
            return await answer.aread()

    async def upload(
        self, avatar: str, bundle: Bundle, *, if_match: str | None = None, only_new: bool = False
    ) -> dict[str, Any]:
        """Make or replace an avatar with a folder, a .zip or .tar, or the bytes of one."""
        # Off the loop: to read and pack a large bundle takes a while.
        call = await asyncio.to_thread(upload_call, avatar, bundle, if_match, only_new)
        return await self._json("PUT", call)

    async def delete(self, avatar: str, *, if_match: str | None = None) -> None:
        """Remove an avatar and its older versions."""
        await self._done("DELETE", delete_call(avatar, if_match))

    async def versions(self, avatar: str) -> list[dict[str, Any]]:
        """The version that is served, with `replaced_at` None, and those it replaced, latest first."""
        return (await self._json("GET", Call(avatar_path(avatar, "versions"))))["versions"]

    async def load(self, avatar: str, version: str | None = None, *, if_match: str | None = None) -> dict[str, Any]:
        """Load an avatar into memory, with `version` an older one."""
        return await self._json("POST", load_call(avatar, version, if_match))

    async def unload(self, avatar: str) -> None:
        """Drop an avatar from memory; the next request loads it again."""
        await self._done("POST", Call(avatar_path(avatar, "unload")))

    async def info(self) -> dict[str, Any]:
        """Version, device and limits of the service."""
        return await self._json("GET", Call("/info"))

    async def repose(
        self,
        avatar: str,
        poses: Poses,
        translations: ArrayLike | None = None,
        *,
        codec: Codec = "q16",
        timeout_s: float | None = None,
        **options: Any,
    ) -> AsyncIterator[Frame]:
        """The frames of a sequence, each as soon as it is there."""
        call = repose_call(avatar, poses, translations, frames_type(codec), options, timeout_s=timeout_s)
        async with self._answer("POST", call) as answer:
            reader = StreamReader()
            try:
                async for chunk in answer.aiter_bytes():
                    for frame in reader.feed(chunk):
                        yield frame
                reader.end()
            except FrameError as error:
                raise ConnectionLost(f"the answer broke off: {error}") from error

    async def export(
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
        """Write the reposed sequence to a file, whose name says the format."""
        call = repose_call(avatar, poses, translations, media_type_of(path), options, timeout_s=timeout_s)
        return await self._save("POST", call, Path(path), progress)

    async def submit(
        self, avatar: str, poses: Poses, path: Path | str, translations: ArrayLike | None = None, **options: Any
    ) -> Job:
        """Have the service repose a long sequence in the background; the name of `path` says the format.

        The same request again is the same job.
        """
        call = repose_call(avatar, poses, translations, media_type_of(path), options, "jobs")
        return Job.read(await self._json("POST", call))

    async def jobs(self) -> list[Job]:
        """The jobs of this key, those asked for last first."""
        return [Job.read(job) for job in (await self._json("GET", Call("/jobs")))["jobs"]]

    async def job(self, job_id: str) -> Job:
        """How far a job is."""
        return Job.read(await self._json("GET", Call(f"/jobs/{job_id}")))

    async def cancel(self, job_id: str) -> None:
        """Stop a job, or remove one that has ended."""
        await self._done("DELETE", Call(f"/jobs/{job_id}"))

    async def fetch(
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
                wait_s = polls.saw(await self.job(job_id))
            except ConnectionLost as error:
                wait_s = polls.missed(error)
            if wait_s is None:
                break
            await self._sleep(wait_s)
        return await self._save("GET", Call(f"/jobs/{job_id}/result"), Path(path), None)

    def stream(self, avatar: str, mode: str = "live", *, codec: Codec = "q16", **options: Any) -> AsyncStream:
        """A stream of poses and frames over a WebSocket; `async with client.stream(...) as stream:`."""
        return AsyncStream(self._url, self._key, avatar, {"mode": mode, **options}, codec, self._retries, self._sleep)

    async def _json(self, method: str, call: Call) -> Any:
        async with self._answer(method, call) as answer:
            await answer.aread()
            return answer.json()

    async def _done(self, method: str, call: Call) -> None:
        async with self._answer(method, call):
            pass

    async def _save(
        self, method: str, call: Call, path: Path, progress: Callable[[int, int | None], None] | None
    ) -> Applied:
        # A broken answer must not look like a file.
        part = path.with_name(path.name + ".part")
        try:
            async with self._answer(method, call) as answer:
                length, done = answer.headers.get("content-length", ""), 0
                with open(part, "wb") as file:
                    async for chunk in answer.aiter_bytes():
                        file.write(chunk)
                        done += len(chunk)
                        if progress:
                            progress(done, int(length) if length.isdecimal() else None)
                part.replace(path)
                return Applied.read(answer.headers)
        finally:
            part.unlink(missing_ok=True)

    @asynccontextmanager
    async def _answer(self, method: str, call: Call) -> AsyncIterator[httpx.Response]:
        """A successful answer whose body is not yet read."""
        backoff = Backoff(self._retries)
        while True:
            request = self._http.build_request(
                method,
                call.path,
                params=call.query,
                headers=call.sent_headers,
                content=_pieces(call) if call.body else None,
            )
            try:
                answer = await self._http.send(request, stream=True)
            except httpx.ConnectError as error:
                wait_s = backoff.wait_s()
                if wait_s is None:
                    raise ConnectionLost(f"{self._url}: {error}") from error
                await self._sleep(wait_s)
                continue
            except httpx.HTTPError as error:
                raise ConnectionLost(f"{self._url}: {error}") from error
            try:
                if answer.is_success:
                    yield answer
                    return
                body = await answer.aread()
            except httpx.HTTPError as error:
                raise ConnectionLost(f"{self._url}: {error}") from error
            finally:
                await answer.aclose()
            wait_s = backoff.wait_s(answer.headers.get("retry-after")) if answer.status_code in RETRIED else None
            if wait_s is None:
                raise Refused.read(answer.status_code, body)
            await self._sleep(wait_s)


async def _pieces(call: Call) -> AsyncIterator[bytes]:
    for piece in call.pieces():
        yield piece
