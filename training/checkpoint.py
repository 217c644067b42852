"""Checkpoints: tensors and a few words in one safetensors file, written whole or not at all."""

import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint is not what training wrote, or belongs to other settings."""


def write_file(path: Path, content: bytes) -> None:
    """Replace a file at once: a reader, or a reader after a crash, sees the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def encode_checkpoint(tensors: dict[str, Tensor], words: dict[str, Any]) -> bytes:
    """A safetensors file as bytes."""
    # A copy of each: safetensors refuses tensors that share memory or are not contiguous.
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(contiguous, {"reposer": json.dumps(words)})


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and words of a checkpoint.

    Raises:
        CheckpointError: the file is missing, broken or not ours.
    """
    # Opened once: safetensors' own reader opens by name twice, and training may replace the file in between.
    try:
        content = path.read_bytes()
        return load(content), _words(content)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint of reposer-train: {error}") from error


def read_words(path: Path) -> dict[str, Any]:
    """The words of a checkpoint, without its tensors.

    Raises:
        CheckpointError: the file is missing, broken or not ours.
    """
    try:
        with path.open("rb") as stream:
            length = stream.read(8)
            return _words(length + stream.read(int.from_bytes(length, "little")))
    except (OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint of reposer-train: {error}") from error


def _words(content: bytes) -> dict[str, Any]:
    """From the start of a safetensors file: the header's length in 8 bytes, then the header as JSON."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"]["reposer"])


def code_version() -> str:
    """The package's version and, in a git checkout, its commit, with `-dirty` if the tree differs from it."""
    source = Path(__file__).parent
    if not (source.parent / ".git").exists():
        return version("reposer")
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version("reposer")
    return f"{version('reposer')}+{commit}"
