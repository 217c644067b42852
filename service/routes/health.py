"""Is the process alive, can it serve, what is it, and how does it fare?"""

import platform
import time
from importlib.metadata import version

import onnxruntime
from anyio import Lock, to_thread
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.avatars import AvatarStore
from service.engine_room import EngineRoom
from service.errors import AvatarNotFound, AvatarServiceError, Draining, NotReady
from service.gpu import memory_used
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.openapi import problems
from service.schemas import Health, Info
from service.settings import Settings


def health_routes(
    settings: Settings, store: AvatarStore, room: EngineRoom, lifecycle: Lifecycle, metrics: Metrics
) -> APIRouter:
    """Probes, also by the names that KServe knows them; `/info` and `/metrics`."""
    router = APIRouter(tags=["health"])
    last_success_s, lock = -1e9, Lock()

    @router.get("/livez", operation_id="livez")
    @router.get("/v2/health/live", operation_id="kserve_live")
    async def livez() -> Health:
        """The process answers."""
        return Health(status="alive")

    @router.get("/startupz", operation_id="startupz", responses=problems(503))
    async def startupz() -> Health:
        """The avatars that fit into memory have been loaded."""
        if not store.preloaded.is_set():
            raise NotReady("the avatars are being loaded")
        return Health(status="started")

    @router.get("/readyz", operation_id="readyz", responses=problems(503))
    @router.get("/v2/health/ready", operation_id="kserve_ready", responses=problems(503))
    async def readyz() -> Health:
        """At least one avatar was just reposed for real; the result is kept for a few seconds."""
        nonlocal last_success_s
        if lifecycle.draining:
            raise Draining("the service is shutting down")
        if room.gave_up.is_set():
            raise NotReady("no engine works")
        async with lock:
            rebuilding = any(avatar.rebuilding for avatar in store.loaded())
            if rebuilding or time.monotonic() - last_success_s >= settings.readiness_interval_s:
                # Meanwhile no other avatar is loaded: it would drive out the one that is seen to.
                await _check_one(room, store, [] if rebuilding else list(await store.entries()))
                last_success_s = time.monotonic()
        return Health(status="ready")

    @router.get("/avatars/{avatar_id}/ready", operation_id="avatar_ready", responses=problems(404, 503))
    @router.get("/v2/models/{avatar_id}/ready", operation_id="kserve_model_ready", responses=problems(404, 503))
    async def avatar_ready(avatar_id: str) -> Health:
        """This avatar is in memory and was just reposed for real."""
        for avatar in store.loaded():
            if avatar.id == avatar_id:
                await room.check(avatar)
                return Health(status="ready")
        if avatar_id not in await store.entries():
            raise AvatarNotFound("there is no avatar of that name")
        raise NotReady("the avatar is not in memory")

    @router.get("/info", operation_id="info")
    async def info() -> Info:
        """Where frames are computed, by what, and within which limits."""
        engines = [avatar.engine for avatar in store.loaded()]
        return Info(
            version=version("reposer"),
            python=platform.python_version(),
            onnxruntime=onnxruntime.__version__,
            device=engines[0].device if engines else None,
            providers=sorted({engine.provider for engine in engines}),
            avatars_in_memory=len(engines),
            limits={name: getattr(settings, name) for name in _SHOWN},
        )

    @router.get("/metrics", operation_id="metrics", response_class=Response, include_in_schema=False)
    async def show_metrics() -> Response:
        loaded = store.loaded()
        metrics.requests_in_flight.set(lifecycle.in_flight)
        metrics.avatars_loaded.set(len(loaded))
        metrics.avatar_bytes.set(sum(avatar.bytes for avatar in loaded))
        for number, used in (await to_thread.run_sync(memory_used)).items():
            metrics.gpu_memory_bytes.labels(number).set(used)
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


_SHOWN = (
    "max_frames",
    "max_json_bytes",
    "max_npz_bytes",
    "max_bundle_bytes",
    "batch_vertex_frames",
    "batch_ms",
    "queue_ms",
    "live_queue_ms",
    "avatar_bytes",
    "max_streams",
    "stream_max_fps",
)


async def _check_one(room: EngineRoom, store: AvatarStore, others: list[str]) -> None:
    """That one avatar can be reposed: of those in memory, then of the others."""
    failure: AvatarServiceError | None = None
    for avatar_id in dict.fromkeys([avatar.id for avatar in store.loaded()] + others):
        try:
            async with store.lease(avatar_id) as avatar:
                return await room.check(avatar)
        except AvatarServiceError as error:
            failure = error
    raise NotReady("no avatar can be reposed") from failure
