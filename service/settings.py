"""Everything that can be set, read once at the start."""

import tempfile
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Environment variables are the upper-cased names with the prefix ``REPOSER_``."""

    model_config = SettingsConfigDict(env_prefix="REPOSER_", frozen=True)

    bundle_dir: Path
    """Folder with one sub-folder per avatar.  Required: there is no sensible default."""
    viewer_dir: Path = Path("viewer/dist")
    """The built viewer; without it, `/` says how to build it."""
    max_frames: int = Field(default=10_000, ge=1)
    """A longer sequence is refused with 413."""
    max_json_bytes: int = Field(default=2 << 20, ge=1)
    """A longer JSON body is refused with 413; long sequences travel as .npz."""
    max_npz_bytes: int = Field(default=64 << 20, ge=1)
    """A longer .npz body, or one whose arrays are larger than this when inflated, is refused with 413."""
    max_bundle_bytes: int = Field(default=512 << 20, ge=1)
    """A longer upload of a bundle, or one that holds more, is refused with 413."""
    body_idle_s: float = Field(default=30.0, gt=0)
    """A body of which nothing came for so long is refused with 408; so is one of less than 1000 bytes a second."""
    send_idle_s: float = Field(default=30.0, gt=0)
    """A client that takes no byte of an answer for so long is cut off."""
    kept_versions: int = Field(default=3, ge=0)
    """Replaced versions of an avatar that are kept on disk and can be gone back to."""
    keys_file: Path | None = None
    """API keys as `reposer keys add` writes them.  None lets everybody in."""
    open_access: bool = False
    """Let everybody in on other addresses than this machine's own, where there are no keys."""
    public_metrics: bool = False
    """Answer `/metrics` without a key: for where only Prometheus can ask for it."""
    allowed_origins: tuple[str, ...] = ()
    """Pages of other hosts from which browsers may call, such as `["https://viewer.example"]`."""
    requests_per_s: float = Field(default=0.0, ge=0)
    """Requests and WebSocket handshakes a second of one key, or of one address without keys; 0 sets no limit."""
    burst_requests: int = Field(default=20, ge=1)
    """So many of them may come at once after a pause."""
    batch_vertex_frames: int = Field(default=262_144, ge=1)
    """Frames times vertices given to the engine at once: bounds the memory, whatever the length of the sequence."""
    threads: int = Field(default=0, ge=0)
    """Threads of one inference on the CPU; 0 takes one for each core the process may use."""
    parallel_inferences: int = Field(default=2, ge=1)
    """Batches computed at the same time: with 2, the device has the next one when one ends."""
    batch_ms: float = Field(default=25.0, gt=0)
    """A batch takes about this long: how long a live frame may have to wait for work that began before it came."""
    queue_ms: float = Field(default=50.0, ge=0)
    """A request is refused if those that end sooner would keep it waiting for longer than this and than it takes
    itself, or all others for four times as long; a tenth of the first while most have to be refused."""
    live_queue_ms: float = Field(default=250.0, ge=0)
    """A live frame is refused if those that wait before it take longer than this."""
    max_requests: int = Field(default=256, ge=1)
    """Requests in flight, probes not counted; more are refused with 503 before anything of them is read."""
    avatar_bytes: int = Field(default=2 << 30, ge=1)
    """Memory for loaded avatars.  Those not used for longest leave; those in use stay."""
    cpu_only: bool = False
    """Stay on the CPU even where CUDA is there."""
    require_gpu: bool = False
    """Serve no avatar that would run on the CPU, and end with an error if that is all there is."""
    drain_grace_s: float = Field(default=7.0, ge=0)
    """So long may requests in flight go on after SIGTERM; with closing, within the 10 s that containers are given."""
    redis_url: str | None = None
    """Redis shared by all replicas, such as `redis://cache:6379/0`.  None: this process knows of no other."""
    redis_timeout_ms: float = Field(default=50.0, gt=0)
    """A call of Redis that takes longer has failed; after one such, Redis is left alone for 5 seconds."""
    cache_bytes: int = Field(default=128 << 20, ge=0)
    """Finished answers kept in the process; 0 keeps none."""
    cache_entry_bytes: int = Field(default=32 << 20, ge=0)
    """An answer longer than this is not kept."""
    jobs_dir: Path = Path(tempfile.gettempdir()) / "reposer-jobs"
    """Folder of the jobs and their results; replicas that share it share the jobs."""
    jobs_bytes: int = Field(default=8 << 30, ge=1)
    """All jobs and results together; the oldest make room for new ones."""
    max_job_frames: int = Field(default=50_000, ge=1)
    """A longer sequence is refused with 413 as a job too."""
    readiness_interval_s: float = Field(default=5.0, ge=0)
    """`/readyz` computes a real frame at most this often."""
    max_streams: int = Field(default=64, ge=0)
    """WebSocket streams open at the same time; more are refused with 503."""
    max_streams_per_key: int = Field(default=32, ge=1)
    """Those of one key, or of one address without keys; more are refused with 429."""
    stream_max_fps: float = Field(default=120.0, gt=0)
    """No live stream gets more frames a second."""
    stream_messages_per_s: int = Field(default=240, ge=1)
    """A stream that sends more messages a second is closed."""
    stream_silence_s: float = Field(default=10.0, gt=0)
    """A stream is closed if nothing comes, or no frame is acknowledged, for so long; asked after half of it."""
    stream_send_timeout_s: float = Field(default=2.0, gt=0)
    """A client that has not taken a frame by then is too slow, and its stream is closed."""
    stream_close_timeout_s: float = Field(default=1.0, gt=0)
    """A close that cannot be sent by then is not sent."""
