"""Folders in which other threads, processes and replicas rename and remove meanwhile, and disks that are full."""

import errno
from pathlib import Path


def entries(folder: Path) -> list[Path]:
    """What is in a folder, some of which may be gone by now; nothing for a folder that is not there."""
    # Path.glob and Path.iterdir raise where a folder goes just before they look into it.
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_full(error: OSError) -> bool:
    """Whether there is no room left, on the disk or of what its owner may have."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
