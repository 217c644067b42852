"""Avatars as a resource: which there are, their canonical meshes, and changing them."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import StringConstraints

from service.archive import ArchiveKind
from service.avatars import AvatarStore
from service.bundle.manifest import mesh_file
from service.errors import AvatarNotFound, UnsupportedMedia
from service.openapi import problems
from service.schemas import AvatarDetail, AvatarList, AvatarSummary, AvatarVersion, AvatarVersions, LodQuery
from service.uploads import Conditions, Uploads

GLB = "model/gltf-binary"
ARCHIVES: dict[str, ArchiveKind] = {
    "application/zip": "zip",
    "application/x-zip-compressed": "zip",
    "application/x-tar": "tar",
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BUNDLE = {"required": True, "content": dict.fromkeys(ARCHIVES, _BINARY)}
_CONDITIONS = [
    {
        "name": name,
        "in": "header",
        "required": False,
        "schema": {"type": "string"},
        "description": text,
    }
    for name, text in (
        ("If-Match", 'Only if the avatar is at this version: `"<digest>"` as in its ETag, or `*` for any.'),
        ("If-None-Match", "`*`: only if there is no such avatar."),
    )
]
AvatarIdPath = Annotated[str, Path(description="Name of the avatar.", examples=["open"])]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def avatar_routes(store: AvatarStore, uploads: Uploads) -> APIRouter:
    """`/avatars` and `/avatars/{id}`, but for what computes."""
    router = APIRouter(tags=["avatars"])

    @router.get("/avatars", operation_id="list_avatars", responses=problems())
    async def list_avatars() -> AvatarList:
        """Every avatar, where it is computed, and its levels of detail."""
        entries = await store.entries()
        return AvatarList(avatars=[AvatarSummary.of(*entry) for entry in entries.items()])

    @router.get("/avatars/{avatar_id}", operation_id="get_avatar", responses=problems(404, 503))
    async def get_avatar(avatar_id: AvatarIdPath, response: Response) -> AvatarDetail:
        """Skeleton, provenance and metrics of an avatar; the ETag is for `If-Match`."""
        async with store.lease(avatar_id) as avatar:
            response.headers["ETag"] = f'"{avatar.bundle.digest}"'
            return AvatarDetail.describe(avatar)

    @router.get(
        "/avatars/{avatar_id}/mesh",
        operation_id="get_mesh",
        response_class=Response,
        responses=problems(404, 422, 503)
        | {200: {"content": {GLB: _BINARY}}, 304: {"description": "The mesh you have is the current one"}},
    )
    async def get_mesh(avatar_id: AvatarIdPath, query: Annotated[LodQuery, Query()], request: Request) -> Response:
        """The canonical mesh as .glb; its vertices and faces are those of every reposed frame."""
        async with store.lease(avatar_id) as avatar:
            avatar.mesh(query.lod)
            etag = f'"{avatar.bundle.manifest.files[mesh_file(query.lod)].sha256[:32]}"'
            headers = {"ETag": etag, "Cache-Control": "no-cache"}
            known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
            if etag in known or known == ["*"]:
                return Response(status_code=304, headers=headers)
            return Response(avatar.bundle.mesh_files[query.lod], media_type=GLB, headers=headers)

    @router.put(
        "/avatars/{avatar_id}",
        operation_id="put_avatar",
        responses=problems(400, 403, 408, 409, 412, 413, 415, 422, 507)
        | {201: {"model": AvatarDetail, "description": "The avatar is new"}},
        openapi_extra={"requestBody": _BUNDLE, "parameters": _CONDITIONS},
    )
    async def put_avatar(avatar_id: AvatarIdPath, request: Request, response: Response) -> AvatarDetail:
        """Upload a bundle as zip or tar, with the files at the top or in a folder named after the avatar.

        It is verified, its graph is vetted and run once; only then it takes the place of the one that is served.
        On any refusal that one goes on.
        """
        content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
        kind = ARCHIVES.get(content_type)
        if kind is None:
            raise UnsupportedMedia(f"expected one of {', '.join(ARCHIVES)}, got {content_type[:60]!r}")
        announced = int(request.headers.get("content-length", 0))
        avatar, is_new = await uploads.put(avatar_id, request.stream(), kind, _conditions(request), announced)
        response.status_code = 201 if is_new else 200
        response.headers["ETag"] = f'"{avatar.bundle.digest}"'
        return AvatarDetail.describe(avatar)

    @router.delete(
        "/avatars/{avatar_id}",
        operation_id="delete_avatar",
        status_code=204,
        responses=problems(403, 404, 409, 412, 507),
        openapi_extra={"parameters": _CONDITIONS[:1]},
    )
    async def delete_avatar(avatar_id: AvatarIdPath, request: Request) -> None:
        """Remove an avatar and its older versions.  Who uses it at the moment may go on."""
        await uploads.delete(avatar_id, _conditions(request))

    @router.get("/avatars/{avatar_id}/versions", operation_id="list_versions", responses=problems(404))
    async def list_versions(avatar_id: AvatarIdPath) -> AvatarVersions:
        """The version that is served and those it replaced, latest first."""
        versions = uploads.versions(avatar_id)
        return AvatarVersions(versions=[AvatarVersion.of(version) for version in versions])

    @router.post(
        "/avatars/{avatar_id}/load",
        operation_id="load_avatar",
        responses=problems(403, 404, 409, 412, 422, 503, 507),
        openapi_extra={"parameters": _CONDITIONS[:1]},
    )
    async def load_avatar(
        avatar_id: AvatarIdPath,
        request: Request,
        response: Response,
        version: Annotated[
            Digest | None, Query(description="Go back to this version first, unless it is served already.")
        ] = None,
    ) -> AvatarDetail:
        """Load an avatar into memory, so that its next request need not wait."""
        if version is not None:
            await uploads.go_back(avatar_id, version, _conditions(request))
        async with store.lease(avatar_id) as avatar:
            response.headers["ETag"] = f'"{avatar.bundle.digest}"'
            return AvatarDetail.describe(avatar)

    @router.post(
        "/avatars/{avatar_id}/unload", operation_id="unload_avatar", status_code=204, responses=problems(403, 404)
    )
    async def unload_avatar(avatar_id: AvatarIdPath) -> None:
        """Drop an avatar from memory; the next request loads it again."""
        if uploads.digest(avatar_id) is None:
            raise AvatarNotFound("there is no avatar of that name")
        store.forget(avatar_id)

    return router


def _conditions(request: Request) -> Conditions:
    return Conditions(request.headers.get("if-match"), request.headers.get("if-none-match"))
