"""Where the library keeps what it found out, and how it writes a file: in one step, whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache() -> Path:
    """The folder for what was measured on this machine: ``SCAN_KERNELS_CACHE``, or the platform's cache folder."""
    if root := os.environ.get("SCAN_KERNELS_CACHE"):
        return Path(root).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("scan-kernels", appauthor=False))


def make(folder: Path) -> None:
    """Make a folder and those above it; the cache and what lies in it are for their user only."""
    root = cache()
    private = [p for p in (folder, *folder.parents) if p == root or root in p.parents]
    (private[-1].parent if private else folder).mkdir(parents=True, exist_ok=True)
    for level in reversed(private):
        level.mkdir(mode=0o700, exist_ok=True)


def write(path: Path, content: str | bytes) -> None:
    """Write a file in one step, with the folders it needs: a reader sees the old content or the new, never a part."""
    make(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
