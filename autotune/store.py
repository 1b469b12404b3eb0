"""What tuning learnt: one JSON file per key, and the look-up that dispatch asks.

Three sources, best first: this machine's cache (what `tune` measured here), the table shipped for exactly this device,
and the table shipped for its architecture. All hold the same entry:

    {"schema": 1,
     "key": {"op", "problem", "device", "sources", "versions"},
     "choices": [{"backend", "config", "seconds"}, ...]      one per backend, best first
     ...}                                                    measured problem, trials, date: for people to read

A cached entry counts only where its whole key is equal. A shipped one must agree in problem and device, or problem and
architecture; sources and versions say there what it was measured with. Whether a configuration suits the problem at
hand is for the caller to check: a bucket holds many problems.

Nothing that is read here is trusted: it is data, parsed as JSON, checked, and otherwise reported once and ignored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..profiling.device import Device

SCHEMA = 1
TABLES = Path(__file__).parent / "data"
MAX_ENTRY = 256 * 1024  # bytes; an entry with hundreds of trials is a tenth of this
MAX_TABLE = 16 * 1024 * 1024
COMPILERS = ("torch", "triton", "cupy", "cupy-cuda12x", "cupy-cuda13x", "numba")

_reported: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Entry:
    """A stored choice."""

    backend: str
    config: dict[str, Any]
    source: str  # "tuned", "shipped" or "architecture"


@dataclasses.dataclass(frozen=True)
class Key:
    """What a choice depends on. Two keys that differ in anything are different entries."""

    op: str
    sources: str  # ``hash_sources`` of the kernels
    problem: dict[str, Any]  # the problem's bucket: JSON values only
    device: Device

    def as_dict(self) -> dict[str, Any]:
        d = self.device
        return {
            "op": self.op,
            "problem": self.problem,
            "device": {"name": d.name, "arch": d.arch, "units": d.units, "l2_bytes": d.l2_bytes},
            "sources": self.sources,
            "versions": versions(),
        }

    @property
    def path(self) -> Path:
        """Where this machine keeps the entry: readable folders, and a name that only this key has."""
        digest = hashlib.sha256(_canonical(self.as_dict()).encode()).hexdigest()[:32]
        return folder() / self.op / self.device.slug / f"{digest}.json"


def folder() -> Path:
    """This machine's cache of tuned choices: under ``SCAN_KERNELS_CACHE``, or the platform's cache folder."""
    if root := os.environ.get("SCAN_KERNELS_CACHE"):
        return Path(root).expanduser() / "tuned"
    import platformdirs

    return Path(platformdirs.user_cache_dir("scan-kernels", appauthor=False)) / "tuned"


def files() -> list[Path]:
    """Every entry file of this machine's cache, readable or not."""
    return sorted(folder().glob("*/*/*.json"))


def hash_sources(paths: Iterable[Path]) -> str:
    """One hash over files, and the Python and CUDA files of folders: any change to a kernel changes it."""
    digest = hashlib.sha256()
    for path in paths:
        found = sorted(p for p in path.rglob("*") if p.suffix in (".py", ".cu", ".cuh")) if path.is_dir() else [path]
        for file in found:
            text = file.read_bytes()
            digest.update(f"{file.relative_to(path.parent).as_posix()}\0{len(text)}\0".encode() + text)
    return digest.hexdigest()[:32]


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of what compiles kernels, from package metadata: none of them is imported for it."""
    found = {}
    for name in COMPILERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def lookup(key: Key) -> Iterator[Entry]:
    """Stored choices, best source first and fastest backend first within a source. Never raises."""
    whole = key.as_dict()
    if (entry := _read_entry(key.path, whole)) is not None:
        yield from _entries(entry, "tuned")
    problem, device = _canonical(key.problem), whole["device"]
    for entry in _table(TABLES / key.device.slug / f"{key.op}.json").get(problem, ()):
        if entry["key"].get("device") == device:
            yield from _entries(entry, "shipped")
    for entry in _table(TABLES / key.device.arch / f"{key.op}.json").get(problem, ()):
        yield from _entries(entry, "architecture")


def publish(key: Key, choices: list[dict[str, Any]], **record: Any) -> Path:
    """Store choices ({"backend", "config", "seconds"}, best first) under a key; ``record`` is kept beside them.

    The file appears whole or not at all, whoever else writes the same key. Errors: OSError where the folder cannot
    be written; ValueError where ``choices`` would not be read back.
    """
    entry = {"schema": SCHEMA, "key": key.as_dict(), "choices": choices, **record}
    text = json.dumps(entry, indent=1, allow_nan=False) + "\n"
    if len(text) > MAX_ENTRY:
        raise ValueError(f"an entry of {len(text)} bytes; at most {MAX_ENTRY} are read back")
    _check(json.loads(text))
    path = key.path
    root = folder().parent
    root.parent.mkdir(parents=True, exist_ok=True)
    for level in (root, *reversed([p for p in path.parents if root in p.parents])):
        level.mkdir(mode=0o700, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with open(handle, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _reported.discard(str(path))
    return path


# ---- reading what cannot be trusted ----------------------------------------------------------------------------------


def _read_entry(path: Path, whole: dict[str, Any]) -> dict[str, Any] | None:
    try:
        entry = _check(_read(path, MAX_ENTRY, ours=True))
        if entry["key"] != whole:
            raise ValueError("it holds another key than its name says")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        _report(path, e)
        return None
    return entry


@functools.lru_cache(maxsize=64)
def _table(path: Path) -> dict[str, list[dict[str, Any]]]:
    """A shipped table: {"schema", "entries": [entry, ...]}, as lists of entries by problem."""
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        table = _read(path, MAX_TABLE, ours=False)
        if not isinstance(table, dict) or not isinstance(table.get("entries"), list):
            raise ValueError("not a table of entries")
        for entry in table["entries"]:
            found.setdefault(_canonical(_check(entry)["key"].get("problem")), []).append(entry)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as e:
        _report(path, e)
        return {}
    return found


def _read(path: Path, limit: int, ours: bool) -> Any:
    """Parse a JSON file of at most ``limit`` bytes; with ``ours``, only a plain file of this very user.

    Opened without following a link and without waiting, so that a planted link or pipe is refused, not obeyed.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    if ours:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(path, flags), "rb") as f:
        info = os.fstat(f.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("not a plain file")
        if ours and hasattr(os, "geteuid") and info.st_uid != os.geteuid():
            raise ValueError(f"it belongs to user {info.st_uid}")
        if info.st_size > limit:
            raise ValueError(f"{info.st_size} bytes, more than {limit}")
        text = f.read(limit + 1)
    return json.loads(text[:limit].decode("utf-8"), parse_constant=_no_constant)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _check(entry: Any) -> dict[str, Any]:
    """The entry, if everything that the look-up uses has its type; else ValueError with the reason."""
    if not isinstance(entry, dict):
        raise ValueError("not an entry")
    if entry.get("schema") != SCHEMA:
        raise ValueError(f"schema {entry.get('schema')!r} instead of {SCHEMA}")
    if not isinstance(entry.get("key"), dict):
        raise ValueError("no key")
    choices = entry.get("choices")
    if not isinstance(choices, list) or not choices:
        raise ValueError("no choices")
    for choice in choices:
        if not isinstance(choice, dict) or not isinstance(choice.get("backend"), str):
            raise ValueError("a choice without a backend")
        config = choice.get("config")
        if not isinstance(config, dict) or not all(type(v) in (bool, int, float, str) for v in config.values()):
            raise ValueError("a choice without a configuration of plain values")
    return entry


def _entries(entry: dict[str, Any], source: str) -> Iterator[Entry]:
    for choice in entry["choices"]:
        yield Entry(choice["backend"], choice["config"], source)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _report(path: Path, error: Exception) -> None:
    """Say once per file that it is not used, and how to be rid of it."""
    if str(path) in _reported:
        return
    _reported.add(str(path))
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    warnings.warn(f"ignoring a tuned entry that cannot be used: {path}: {reason}. It may be deleted.", stacklevel=3)
