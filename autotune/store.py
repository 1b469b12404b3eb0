"""What tuning learnt: one JSON file per key, and the look-up that dispatch asks.

Three sources, best first: this machine's cache (what `tune` measured here), the table shipped for exactly this device,
and the table shipped for its architecture, measured on as many multiprocessors. All hold the same entry:

    {"key": {"op",
             "validity": {"schema", "sources", "versions"},  what the kernels are made of
             "device": {...}, "problem": {...}},             what the choice is for: a machine and a bucket of problems
     "choices": [{"backend", "config", "seconds"}, ...]      one per backend, best first
     ...}                              for people to read: measured problem, trials, how many were unseen, clocks, date

A cached entry counts only where its whole key is equal; ``differences`` names the fields that are not. A shipped one
must agree in problem and hardware, or problem, architecture and multiprocessors; its validity says there what it was
measured with.
Whether a configuration suits the problem at hand is for the caller to check: a bucket holds many problems.

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
import re
import stat
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..profiling.device import Device, setting
from ..profiling.files import cache, make

SCHEMA = 2
TABLES = Path(__file__).parent / "data"
MAX_ENTRY = 256 * 1024  # bytes; an entry with hundreds of trials is a tenth of this
MAX_TABLE = 16 * 1024 * 1024
COMPILERS = (
    "torch", "triton", "cupy", "cupy-cuda12x", "cupy-cuda13x", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "numba",
    "llvmlite",
)  # fmt: skip
HARDWARE = ("name", "arch", "units", "l2_bytes")  # what a shipped table must agree in; drivers and limits vary
LITTER_S = 3600.0  # a temporary file this old was left by a writer that is dead

_reported: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Entry:
    """A stored choice."""

    backend: str
    config: dict[str, Any]
    source: str  # "tuned", "shipped" or "architecture"
    measured: dict[str, Any] | None = None  # the very problem that it was measured on, where that is known


@dataclasses.dataclass(frozen=True)
class Key:
    """What a choice depends on. Two keys that differ in anything are different entries."""

    op: str
    sources: str  # ``hash_sources`` of the kernels
    problem: dict[str, Any]  # the problem's bucket: JSON values only
    device: Device

    def as_dict(self) -> dict[str, Any]:
        hardware = {name: getattr(self.device, name) for name in HARDWARE}
        return {
            "op": self.op,
            "validity": {"schema": SCHEMA, "sources": self.sources, "versions": versions()},
            "device": hardware | setting(self.device),
            "problem": self.problem,
        }

    @property
    def path(self) -> Path:
        """Where this machine keeps the entry."""
        return place(self.as_dict())


def folder() -> Path:
    """This machine's tuned choices, in its cache."""
    return cache() / "tuned"


def files() -> list[Path]:
    """Every entry file of this machine's cache, readable or not."""
    return sorted(folder().glob("*/*/*.json"))


def place(key: dict[str, Any]) -> Path:
    """Where this machine keeps the entry of a key: readable folders, and a name that only this key has.

    Errors: ValueError where the key names no op or device that could be a folder.
    """
    op, name = key.get("op"), key["device"].get("name")
    if not isinstance(op, str) or not re.fullmatch(r"[a-z0-9_]{1,64}", op):
        raise ValueError(f"key: expected an op's name, got {op!r:.100}")
    if not isinstance(name, str) or not (slug := slugged(name)) or len(slug) > 100:
        raise ValueError(f"key: expected a device's name, got {name!r:.100}")
    digest = hashlib.sha256(_canonical(key).encode()).hexdigest()[:32]
    return folder() / op / slug / f"{digest}.json"


def slugged(name: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def entries() -> Iterator[tuple[Path, dict[str, Any] | str]]:
    """Every file of this machine's cache: its entry, or why it cannot be used."""
    for path in files():
        try:
            yield path, _whole(path)
        except (OSError, ValueError, RecursionError) as e:
            yield path, _words(e)


def differences(key: dict[str, Any], other: dict[str, Any], at: str = "") -> list[tuple[str, Any, Any]]:
    """The fields of two keys that differ, as ("device.name", this one's, the other's); None where one has none."""
    found = []
    for name in sorted({*key, *other}):
        a, b = key.get(name), other.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{at}{name}.")
        elif a != b:
            found.append((at + name, a, b))
    return found


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
    # CuPy takes NVRTC from a toolkit where no wheel brings it
    toolkit = Path(os.environ.get("CUDA_PATH") or "/usr/local/cuda") / "version.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found["toolkit"] = str(_read(toolkit, MAX_ENTRY, ours=False)["cuda_nvrtc"]["version"])
    return found


def lookup(key: Key) -> Iterator[Entry]:
    """Stored choices, best source first and fastest backend first within a source. Never raises."""
    whole = key.as_dict()
    if (entry := _read_entry(place(whole), whole)) is not None:
        yield from _entries(entry, "tuned")
    yield from shipped(key)


def shipped(key: Key) -> Iterator[Entry]:
    """The choices of the tables that came with this package. Never raises."""
    problem, hardware = _canonical(key.problem), {name: getattr(key.device, name) for name in HARDWARE}
    for entry in table(TABLES / key.device.slug / f"{key.op}.json").get(problem, ()):
        if hardware.items() <= entry["key"]["device"].items():
            yield from _entries(entry, "shipped")
    for entry in table(TABLES / key.device.arch / f"{key.op}.json").get(problem, ()):
        if entry["key"]["device"].get("units") == key.device.units:
            yield from _entries(entry, "architecture")


def publish(key: Key, choices: list[dict[str, Any]], **record: Any) -> Path:
    """Store choices ({"backend", "config", "seconds"}, best first) under a key; ``record`` is kept beside them.

    The file appears whole or not at all, whoever else writes the same key. Errors: OSError where the folder cannot
    be written; ValueError where ``choices`` would not be read back.
    """
    return keep({"key": key.as_dict(), "choices": choices, **record})


def keep(entry: dict[str, Any]) -> Path:
    """Store a whole entry under its own key: ``publish``, for one that was read elsewhere."""
    path = place(_check(entry)["key"])
    _check(json.loads(write(path, entry, MAX_ENTRY)))
    _reported.discard(str(path))
    return path


def write(path: Path, content: dict[str, Any], limit: int, mode: int = 0o600) -> str:
    """Write a JSON file of at most ``limit`` bytes in one step, with the folders it needs; returns its text.

    A folder of the cache is for its user only. Errors: OSError; ValueError where it is too long or no JSON.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    if len(text) > limit:
        raise ValueError(f"an entry of {len(text)} bytes; at most {limit} are read back")
    make(path.parent)
    _sweep(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with open(handle, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.chmod(temporary, mode)
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # not every file system can do this to a folder
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return text


def clear() -> int:
    """Remove every entry of this machine's cache, and what dead writers left. Returns how many entries there were."""
    found = files()
    for path in found:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    for level in folder().glob("*/*/"):
        _sweep(level, older=0.0)
    _reported.clear()
    return len(found)


def _sweep(level: Path, older: float = LITTER_S) -> None:
    """Remove temporary files of writers that died."""
    for path in level.glob(".writing-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime >= older:
                path.unlink()


# ---- reading what cannot be trusted ----------------------------------------------------------------------------------


def _read_entry(path: Path, whole: dict[str, Any]) -> dict[str, Any] | None:
    try:
        entry = _whole(path)
        if entry["key"] != whole:
            raise ValueError("it holds another key than its name says")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        _report(path, e)
        return None
    return entry


def _whole(path: Path) -> dict[str, Any]:
    """The entry of a cache file. Errors: OSError, ValueError or RecursionError, whatever the file holds."""
    entry = _check(_read(path, MAX_ENTRY, ours=True))
    if (schema := entry["key"]["validity"].get("schema")) != SCHEMA:
        raise ValueError(f"schema {schema!r:.100} instead of {SCHEMA}")
    return entry


@functools.lru_cache(maxsize=64)
def table(path: Path) -> dict[str, list[dict[str, Any]]]:
    """A shipped table's entries by problem; where it cannot be used, none, said once."""
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        for entry in read_table(path)["entries"]:
            found.setdefault(_canonical(entry["key"]["problem"]), []).append(entry)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as e:
        _report(path, e)
        return {}
    return found


def read_table(path: Path) -> dict[str, Any]:
    """Many entries in one file: {"provenance", "entries": [entry, ...]}.

    Errors: OSError, ValueError or RecursionError, whatever the file holds.
    """
    content = _read(path, MAX_TABLE, ours=False)
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise ValueError("not a table of entries")
    for entry in content["entries"]:
        _check(entry)
    return content


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file {"records": [...]}. Errors: those of ``read_table``."""
    content = _read(path, MAX_TABLE, ours=False)
    if not isinstance(content, dict) or not all(isinstance(r, dict) for r in content.get("records", [None])):
        raise ValueError("not a file of records")
    return content["records"]


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
    key = entry.get("key")
    if not isinstance(key, dict) or not all(isinstance(key.get(p), dict) for p in ("validity", "device", "problem")):
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
    measured = entry.get("measured")
    for choice in entry["choices"]:
        yield Entry(choice["backend"], choice["config"], source, measured if isinstance(measured, dict) else None)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _report(path: Path, error: Exception) -> None:
    """Say once per file that it is not used, and how to be rid of it; where no file can be reached, once for all."""
    if isinstance(error, NotADirectoryError):
        path = folder()
    if str(path) in _reported:
        return
    _reported.add(str(path))
    warnings.warn(
        f"ignoring a tuned entry that cannot be used: {path}: {_words(error)}. It may be deleted.", stacklevel=3
    )


def _words(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
