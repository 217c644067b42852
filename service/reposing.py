"""One reposing request from its body to its answer.

All input is checked, and the first frame computed, before the status line leaves: a 200 is broken off later
only if the machine itself fails.  Parsing, computing and encoding run in worker threads, one small batch at
a time, so that the event loop stays free, requests share the device fairly, and a client that has gone stops
the work at the next batch.
"""

from collections.abc import AsyncIterator, Iterator
from functools import partial

from anyio import CapacityLimiter, to_thread
from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from service import answers
from service.answers import Clip
from service.avatars import Avatar, AvatarStore
from service.cache import AnswerCache, answer_key
from service.engine import repose_in_batches
from service.errors import BodyTooLarge, UnsupportedMedia
from service.poses import Options, PoseSequence, parse_json, parse_npz
from service.schemas import ReposeQuery
from service.settings import Settings

JSON_TYPES = ("application/json",)
NPZ_TYPES = ("application/x-npz", "application/octet-stream", "application/zip")
_SUFFIXES = {answers.FRAMES: "frames", answers.NPZ: "npz", answers.GLB: "glb"}


class Reposing:
    """Answers reposing requests for all avatars of a store."""

    def __init__(self, settings: Settings, store: AvatarStore) -> None:
        self._settings, self._store = settings, store
        self.cache = AnswerCache(settings.cache_bytes, settings.cache_entry_bytes)
        self._inference = CapacityLimiter(settings.parallel_inferences)

    async def answer(self, avatar_id: str, query: ReposeQuery, request: Request) -> Response:
        """Read the poses out of `request` and repose the avatar.

        Raises:
            AvatarServiceError: the poses, the avatar or the format asked for will not do; the subclass says why.
        """
        avatar = self._store.get(avatar_id)
        mesh = avatar.mesh(query.lod)
        media_type = answers.negotiate(request.headers.get("accept"))
        body_is_json = _body_is_json(request)
        limit = self._settings.max_json_bytes if body_is_json else self._settings.max_npz_bytes
        body = await read_body(request, limit)
        poses = await to_thread.run_sync(partial(self._parse, body, body_is_json, query.options(), avatar))
        answers.check_length(media_type, len(poses))

        clip = Clip(avatar.id, mesh, len(poses), poses.fps)
        headers = _headers(avatar, query.lod, media_type, poses, clip)
        key = await to_thread.run_sync(answer_key, avatar.bundle.digest, query.lod, media_type, poses)
        cached = self.cache.get(key)
        if cached is not None:
            return Response(cached, media_type=media_type, headers=headers | {"X-Cache": "hit"})
        batches = repose_in_batches(
            avatar.engine, avatar.bundle.skeleton, mesh.vertices, poses, self._settings.batch_vertex_frames
        )
        chunks = answers.encode(media_type, batches, clip)
        first = await self._next(chunks)
        assert first is not None
        if media_type == answers.FRAMES:
            headers["Content-Length"] = str(answers.expected_bytes(media_type, clip))
        keep = answers.expected_bytes(media_type, clip) <= self.cache.max_entry_bytes
        stream = self._stream(first, chunks, key if keep else None)
        return StreamingResponse(stream, media_type=media_type, headers=headers | {"X-Cache": "miss"})

    def _parse(self, body: bytes, body_is_json: bool, options: Options, avatar: Avatar) -> PoseSequence:
        pelvis, settings = avatar.bundle.skeleton.rest_joints[0], self._settings
        if body_is_json:
            return parse_json(body, options, pelvis, settings.max_frames)
        return parse_npz(body, options, pelvis, settings.max_frames, settings.max_npz_bytes)

    async def _stream(self, first: bytes, chunks: Iterator[bytes], key: bytes | None) -> AsyncIterator[bytes]:
        kept, chunk = [], first
        while chunk is not None:
            if key is not None:
                kept.append(chunk)
            yield chunk
            chunk = await self._next(chunks)
        # Only here: what failed or was broken off is never kept.
        if key is not None:
            self.cache.put(key, b"".join(kept))

    async def _next(self, chunks: Iterator[bytes]) -> bytes | None:
        return await to_thread.run_sync(next, chunks, None, limiter=self._inference)


async def read_body(request: Request, limit: int) -> bytes:
    """The body, counted while it is read: what Content-Length says is only a first hint.

    Raises:
        BodyTooLarge: more than `limit` bytes.
    """
    too_large = BodyTooLarge(f"expected at most {limit} bytes; long sequences travel as .npz", limit_bytes=limit)
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def _body_is_json(request: Request) -> bool:
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMedia("expected a body without Content-Encoding")
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type not in JSON_TYPES + NPZ_TYPES:
        expected = ", ".join(JSON_TYPES + NPZ_TYPES)
        raise UnsupportedMedia(f"expected a Content-Type among {expected}, got {content_type[:60]!r}")
    return content_type in JSON_TYPES


def _headers(avatar: Avatar, lod: str, media_type: str, poses: PoseSequence, clip: Clip) -> dict[str, str]:
    """What was applied, so that nobody has to guess."""
    headers = {
        "Reposer-Avatar": avatar.id,
        "Reposer-Bundle": avatar.bundle.digest,
        "Reposer-Lod": lod,
        "Reposer-Frames": str(clip.frame_count),
        "Reposer-Vertices": str(len(clip.mesh.vertices)),
        "Reposer-Fps": f"{poses.fps:.6g}",
        "Reposer-Up-Axis": poses.up_axis,
        "Reposer-Units": poses.units,
        "Reposer-Rotation": poses.rotation,
        "Reposer-Device": avatar.engine.device,
        "Vary": "Accept",
        "Content-Disposition": f'attachment; filename="{avatar.id}.{_SUFFIXES[media_type]}"',
    }
    if poses.warnings:
        headers["Warning"] = ", ".join(f'299 reposer "{text}"' for text in poses.warnings)
    return headers
