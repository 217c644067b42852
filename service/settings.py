"""Everything that can be set, read once at the start."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Environment variables are the upper-cased names with the prefix ``REPOSER_``."""

    model_config = SettingsConfigDict(env_prefix="REPOSER_", frozen=True)

    bundle_dir: Path
    """Folder with one sub-folder per avatar.  Required: there is no sensible default."""
    max_frames: int = Field(default=10_000, ge=1)
    """A longer sequence is refused with 413."""
    max_json_bytes: int = Field(default=4 << 20, ge=1)
    """A longer JSON body is refused with 413; long sequences travel as .npz."""
    max_npz_bytes: int = Field(default=64 << 20, ge=1)
    """A longer .npz body, or one whose arrays are larger than this when inflated, is refused with 413."""
    batch_vertex_frames: int = Field(default=65_536, ge=1)
    """Frames times vertices given to the engine at once: bounds the memory, whatever the length of the sequence."""
    threads: int = Field(default=0, ge=0)
    """Threads of one inference on the CPU; 0 takes one for each core the process may use."""
    parallel_inferences: int = Field(default=1, ge=1)
    """Batches computed at the same time; on one device more than 1 seldom helps."""
    cpu_only: bool = False
    """Stay on the CPU even where CUDA is there."""
    cache_bytes: int = Field(default=128 << 20, ge=0)
    """Finished answers kept in the process; 0 keeps none."""
    cache_entry_bytes: int = Field(default=32 << 20, ge=0)
    """An answer longer than this is not kept."""
    readiness_interval_s: float = Field(default=5.0, ge=0)
    """`/readyz` computes a real frame at most this often."""
