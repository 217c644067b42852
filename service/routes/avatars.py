"""Which avatars there are, and their canonical meshes."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from service.avatars import AvatarStore
from service.bundle.manifest import mesh_file
from service.schemas import AvatarDetail, AvatarList, AvatarSummary, LodQuery, Problem

GLB = "model/gltf-binary"
_PROBLEMS: dict[int | str, dict[str, Any]] = {404: {"model": Problem}, 422: {"model": Problem}, 503: {"model": Problem}}


def avatar_routes(store: AvatarStore) -> APIRouter:
    """`GET /avatars`, `GET /avatars/{id}`, `GET /avatars/{id}/mesh`."""
    router = APIRouter(tags=["avatars"])

    @router.get("/avatars", operation_id="list_avatars")
    async def list_avatars() -> AvatarList:
        """Every avatar, where it is computed, and its levels of detail."""
        return AvatarList(avatars=[AvatarSummary.of(*entry) for entry in store.entries().items()])

    @router.get("/avatars/{avatar_id}", operation_id="get_avatar", responses=_PROBLEMS)
    async def get_avatar(avatar_id: str) -> AvatarDetail:
        """Skeleton, provenance and metrics of an avatar."""
        return AvatarDetail.describe(store.get(avatar_id))

    @router.get(
        "/avatars/{avatar_id}/mesh",
        operation_id="get_mesh",
        response_class=Response,
        responses=_PROBLEMS
        | {200: {"content": {GLB: {}}}, 304: {"description": "The mesh you have is the current one"}},
    )
    async def get_mesh(avatar_id: str, query: Annotated[LodQuery, Query()], request: Request) -> Response:
        """The canonical mesh as .glb; its vertices and faces are those of every reposed frame."""
        avatar = store.get(avatar_id)
        avatar.mesh(query.lod)
        etag = f'"{avatar.bundle.manifest.files[mesh_file(query.lod)].sha256[:32]}"'
        headers = {"ETag": etag, "Cache-Control": "no-cache"}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if etag in known or known == ["*"]:
            return Response(status_code=304, headers=headers)
        return Response(avatar.bundle.mesh_files[query.lod], media_type=GLB, headers=headers)

    return router
