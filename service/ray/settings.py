"""What can be set on Ray: all that can be set elsewhere, and the sizes of the two deployments."""

from pydantic import Field

from service.settings import Settings


class RaySettings(Settings):
    """Arguments of the Serve application, each also an environment variable ``REPOSER_<NAME>``."""

    parallel_inferences: int = Field(default=16, ge=1)
    """Calls of engines that one front has under way; what else waits, waits in the front, live frames first."""
    fronts: int = Field(default=1, ge=1)
    """Replicas that answer clients.  Several share rates, finished answers and news of avatars through Redis only."""
    min_engines: int = Field(default=1, ge=1)
    max_engines: int = Field(default=1, ge=1)
    """Replicas that compute; Serve adds some when calls wait, and takes them away when none do."""
    engine_cpus: float = Field(default=1.0, ge=0)
    engine_gpus: float = Field(default=0.0, ge=0)
    """Share of a GPU for one engine replica: with 0.25, four of them share one."""
    avatars_per_engine: int = Field(default=8, ge=1)
    """An engine replica keeps so many avatars; the one not used for longest leaves."""
    engine_calls: int = Field(default=8, ge=1)
    """Calls that an engine replica takes at a time; those of one avatar are computed together."""
    queued_calls: int = Field(default=32, ge=0)
    """Calls of one front that may wait for a replica that takes them; more are refused with 503."""
    call_timeout_s: float = Field(default=30.0, gt=0)
    """A call that has no answer by then, be it that no replica is there yet, is given up with 503."""
