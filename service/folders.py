"""Folders in which other threads, processes and replicas rename and remove meanwhile."""

from pathlib import Path


def entries(folder: Path) -> list[Path]:
    """What is in a folder, some of which may be gone by now; nothing for a folder that is not there."""
    # Path.glob and Path.iterdir raise where a folder goes just before they look into it.
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
