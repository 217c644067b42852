"""The Serve application: `serve run service.ray.app:app bundle_dir=avatars`.

Two deployments.  A front is the same application that `reposer serve` runs; its engines are calls of the other one.
"""

from functools import partial
from pathlib import Path

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from service.app import create_app
from service.avatars import EngineFactory
from service.ray.engines import Engines, RemoteEngine
from service.ray.settings import RaySettings
from service.security import check_binding
from service.serve import set_up_logging


@serve.ingress()
class Front:
    """Answers clients: everything but the engines."""

    def __init__(self, settings: RaySettings, engines: DeploymentHandle) -> None:
        set_up_logging()
        self._service = create_app(settings, partial(RemoteEngine, engines, timeout_s=settings.call_timeout_s))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._service

    def check_health(self) -> None:
        """Asked by Serve, which replaces the replica if this raises."""
        if self._service.state.room.gave_up.is_set():
            raise RuntimeError("no engine works any more")


def app(settings: RaySettings) -> Application:
    """What Serve runs.

    Raises:
        KeyFileError: there are neither keys nor the wish to do without.
    """
    return application(settings)


def application(settings: RaySettings, make_engine: EngineFactory | None = None) -> Application:
    """The same; tests bring their own `make_engine`, which runs in the replicas."""
    # Where Serve listens is the cluster's affair, and as a rule it is every address.
    check_binding("0.0.0.0", settings.keys_file, open_access=settings.open_access)
    # Replicas have a working folder of their own.
    paths = {name: value.resolve() for name, value in settings if isinstance(value, Path)}
    settings = settings.model_copy(update=paths)
    engines = serve.deployment(
        Engines,
        ray_actor_options={"num_cpus": settings.engine_cpus, "num_gpus": settings.engine_gpus},
        max_ongoing_requests=settings.engine_calls,
        max_queued_requests=settings.queued_calls,
        # How soon a dead replica is missed.
        health_check_period_s=2.0,
        autoscaling_config={
            "min_replicas": settings.min_engines,
            "max_replicas": settings.max_engines,
            "target_ongoing_requests": settings.engine_calls / 2,
        },
    ).bind(settings, make_engine)
    front = serve.deployment(
        Front,
        num_replicas=settings.fronts,
        # Above what the application itself admits: it refuses the rest with a problem that says why.
        max_ongoing_requests=2 * (settings.max_requests + settings.max_streams),
        graceful_shutdown_timeout_s=settings.drain_grace_s,
    )
    return front.bind(settings, engines)
