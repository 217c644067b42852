"""Is the process alive, and can it serve?"""

import time

from anyio import Lock, to_thread
from fastapi import APIRouter

from service.avatars import AvatarStore
from service.errors import AvatarServiceError, NotReady
from service.schemas import Health, Problem


def health_routes(store: AvatarStore, interval_s: float) -> APIRouter:
    """`/livez` and `/readyz`."""
    router = APIRouter(tags=["health"])
    last_success_s, lock = -1e9, Lock()

    @router.get("/livez", operation_id="livez")
    async def livez() -> Health:
        """The process answers."""
        return Health(status="alive")

    @router.get("/readyz", operation_id="readyz", responses={503: {"model": Problem}})
    async def readyz() -> Health:
        """At least one avatar was just reposed for real; the result is kept for a few seconds."""
        nonlocal last_success_s
        async with lock:
            if time.monotonic() - last_success_s >= interval_s:
                await _check_one(store)
                last_success_s = time.monotonic()
        return Health(status="ready")

    return router


async def _check_one(store: AvatarStore) -> None:
    failure: AvatarServiceError | None = None
    for avatar in store.entries().values():
        if avatar is None:
            continue
        try:
            return await to_thread.run_sync(avatar.check)
        except AvatarServiceError as error:
            failure = error
    raise NotReady("no avatar can be reposed") from failure
