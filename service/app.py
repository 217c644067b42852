"""Wiring: settings in, application out."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version

from anyio import to_thread
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from service import errors
from service.admission import Admission
from service.avatars import AvatarStore, EngineFactory
from service.cache import AnswerCache, SharedCache
from service.engine import OnnxEngine
from service.engine_room import EngineRoom
from service.gate import Gate
from service.jobs import Jobs
from service.lifecycle import Lifecycle, Traffic, background
from service.limits import Limits
from service.metrics import Metrics
from service.openapi import describe
from service.rates import RateLimiter
from service.redis_link import RedisLink
from service.replicas import Replicas
from service.reposing import Reposing
from service.routes.avatars import avatar_routes
from service.routes.health import health_routes
from service.routes.jobs import job_routes
from service.routes.repose import repose_routes
from service.routes.stream import stream_routes
from service.routes.viewer import viewer_routes
from service.security import Guard
from service.settings import Settings
from service.streaming.streams import Streams
from service.tracing import TELEMETRY, Tracing
from service.uploads import Uploads


def create_app(settings: Settings, make_engine: EngineFactory | None = None) -> FastAPI:
    """The service over the avatars of `settings.bundle_dir`; tests bring their own `make_engine`."""
    make_engine = make_engine or partial(OnnxEngine, threads=settings.threads, cpu_only=settings.cpu_only)
    store = AvatarStore(settings.bundle_dir, make_engine, settings.avatar_bytes, require_gpu=settings.require_gpu)
    metrics, lifecycle = Metrics(), Lifecycle()
    room = EngineRoom(settings, store, metrics)
    replicas = Replicas(store, settings.redis_url)
    link = RedisLink(settings.redis_url, settings.redis_timeout_ms / 1000) if settings.redis_url else None
    cache = AnswerCache(settings.cache_bytes, settings.cache_entry_bytes, SharedCache(link) if link else None)
    reposing = Reposing(settings, store, room, cache, metrics)
    jobs = Jobs(settings, store, room, metrics)
    uploads = Uploads(
        store,
        replicas.announce,
        max_bytes=settings.max_bundle_bytes,
        max_avatar_bytes=settings.avatar_bytes,
        kept_versions=settings.kept_versions,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await to_thread.run_sync(uploads.sweep)
        async with room, background(room.preload(), metrics.watch_loop()), replicas.connected(), jobs.at_work():
            yield
        if link:
            await link.aclose()

    app = FastAPI(
        title="Reposer",
        version=version("reposer"),
        summary="Post SMPL poses, get the clothed surface back, frame after frame.",
        lifespan=lifespan,
        telemetry=TELEMETRY,
    )
    app.state.reposing, app.state.jobs = reposing, jobs
    app.state.store, app.state.room, app.state.lifecycle, app.state.metrics = store, room, lifecycle, metrics
    errors.install(app)
    # The last one added is the first to see a request.
    guard = Guard(settings.keys_file, settings.allowed_origins, open_access=settings.open_access)
    streams = app.state.streams = Streams(settings, store, room, guard, metrics)
    lifecycle.finishers.append(streams.drain)
    app.add_middleware(Gate, settings, store, room, reposing)
    rates = RateLimiter(settings.requests_per_s, settings.burst_requests, link)
    app.add_middleware(Admission, guard, rates, public_metrics=settings.public_metrics)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(Traffic, lifecycle, metrics, settings.max_requests)
    app.add_middleware(Tracing)
    app.add_middleware(Limits, settings)
    app.include_router(health_routes(settings, store, room, lifecycle, metrics))
    app.include_router(avatar_routes(store, uploads))
    app.include_router(repose_routes(reposing))
    app.include_router(job_routes(reposing, jobs))
    app.include_router(stream_routes(streams))
    app.include_router(viewer_routes(settings, store))
    describe(app)
    return app
