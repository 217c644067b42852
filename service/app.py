"""Wiring: settings in, application out."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version

from anyio import to_thread
from fastapi import FastAPI

from service import errors
from service.avatars import AvatarStore, EngineFactory
from service.engine import OnnxEngine
from service.reposing import Reposing
from service.routes.avatars import avatar_routes
from service.routes.health import health_routes
from service.routes.repose import repose_routes
from service.settings import Settings


def create_app(settings: Settings, make_engine: EngineFactory | None = None) -> FastAPI:
    """The service over the avatars of `settings.bundle_dir`; tests bring their own `make_engine`."""
    onnx = partial(OnnxEngine, threads=settings.threads, cpu_only=settings.cpu_only)
    store = AvatarStore(settings.bundle_dir, make_engine or onnx)
    reposing = Reposing(settings, store)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await to_thread.run_sync(store.load)
        yield

    app = FastAPI(
        title="Reposer",
        version=version("reposer"),
        summary="Post SMPL poses, get the clothed surface back, frame after frame.",
        lifespan=lifespan,
    )
    app.state.reposing = reposing
    errors.install(app)
    app.include_router(health_routes(store, settings.readiness_interval_s))
    app.include_router(avatar_routes(store))
    app.include_router(repose_routes(reposing))
    return app
