"""The viewer: its page at `/`, its files under `/viewer/`, and the poses of a file in the one form it plays.

The page is built from `viewer/` by npm.  Nothing of another origin is loaded, and nothing inline runs.
"""

import io
import zipfile
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import numpy as np
from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, HTMLResponse
from starlette.exceptions import HTTPException

from service.avatars import AvatarStore
from service.errors import UnsupportedMedia
from service.headers import READ_HEADERS
from service.openapi import problems
from service.poses import PoseSequence, parse_json, parse_npz
from service.reposing import read_body
from service.rotations import axis_angle
from service.routes.avatars import AvatarIdPath
from service.schemas import PoseQuery
from service.settings import Settings

JSON, NPZ, NPY, ROWS = "application/json", "application/x-npz", "application/x-npy", "application/vnd.reposer.poses"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
FOREVER = "public, max-age=31536000, immutable"
"""The name of every file but the page itself changes with its content."""
NOT_BUILT = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Reposer</title>
<h1>The service runs, but its viewer was not built</h1>
<p>In the folder of the service: <code>scripts/build-viewer</code>, or start it with <code>make serve</code>.</p>
<p>The API works without it: see <a href="docs">its description</a>.</p></html>"""
_BINARY = {"schema": {"type": "string", "format": "binary"}}


def viewer_routes(settings: Settings, store: AvatarStore) -> APIRouter:
    """`GET /`, `GET /viewer/{file}`, `POST /avatars/{id}/poses`."""
    router, folder = APIRouter(), settings.viewer_dir

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        index = folder / "index.html"
        if not index.is_file():
            return HTMLResponse(NOT_BUILT, 404, HEADERS | {"Cache-Control": "no-store"})
        return FileResponse(index, headers=HEADERS | {"Cache-Control": "no-cache"})

    @router.get("/viewer/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        # Looked up among the names that are there: nothing else can be asked for.
        files = {path.name: path for path in (folder / "viewer").glob("*") if path.is_file()}
        if name not in files:
            raise HTTPException(404)
        return FileResponse(files[name], headers=HEADERS | {"Cache-Control": FOREVER})

    @router.post(
        "/avatars/{avatar_id}/poses",
        operation_id="read_poses",
        tags=["avatars"],
        response_class=Response,
        responses=problems(400, 404, 413, 415, 422, 503) | {200: {"content": {ROWS: _BINARY}, "headers": READ_HEADERS}},
        openapi_extra={"requestBody": {"required": True, "content": dict.fromkeys((JSON, NPZ, NPY), _BINARY)}},
    )
    async def read_poses(avatar_id: AvatarIdPath, query: Annotated[PoseQuery, Query()], request: Request) -> Response:
        """Read a pose file as `repose` would, without reposing: what to send to the stream to play it.

        The answer is 75 little-endian float32 for each frame: axis-angle of the 24 joints, then the translation of the
        root; y up, metres.  The `Reposer-*` headers say what was applied.
        """
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind not in _READERS:
            raise UnsupportedMedia(f"expected a Content-Type among {', '.join(_READERS)}, got {kind[:60]!r}")
        async with store.lease(avatar_id) as avatar:
            pelvis = avatar.bundle.skeleton.rest_joints[0]
        body = await read_body(request, settings.max_json_bytes if kind == JSON else settings.max_npz_bytes)
        read = partial(_READERS[kind], options=query.options(), pelvis=pelvis, max_frames=settings.max_frames)
        poses = await to_thread.run_sync(lambda: read(body, settings.max_npz_bytes))
        headers = {
            "Reposer-Frames": str(len(poses)),
            "Reposer-Fps": f"{poses.fps:.6g}",
            "Reposer-Up-Axis": poses.up_axis,
            "Reposer-Units": poses.units,
            "Cache-Control": "no-store",
        }
        rows = np.concatenate([axis_angle(poses.rotations).reshape(len(poses), 72), poses.translation], axis=1)
        return Response(rows.astype("<f4").tobytes(), media_type=ROWS, headers=headers)

    return router


def _read_json(body: bytes, _: int, **how: Any) -> PoseSequence:
    return parse_json(body, **how)


def _read_npz(body: bytes, max_bytes: int, **how: Any) -> PoseSequence:
    return parse_npz(body, max_bytes=max_bytes, **how)


def _read_npy(body: bytes, max_bytes: int, **how: Any) -> PoseSequence:
    """One array: read by the reader of archives, which trusts nothing."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("poses.npy", body)
    return parse_npz(archive.getvalue(), max_bytes=max_bytes, **how)


_READERS: dict[str, Callable[..., PoseSequence]] = {JSON: _read_json, NPZ: _read_npz, NPY: _read_npy}
