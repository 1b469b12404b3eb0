"""Shipped tables: what was tuned on one device, kept for everybody who has such a device or one of its kind.

A device's kind is its architecture and how many multiprocessors it has: how work is cut into blocks is chosen for their
number, and another number leaves many of them without work in the end.

A table is one JSON file, data/<device>/<op>.json or data/<architecture>/<op>.json:

    {"provenance": {...},      commit, versions, clocks, date: where the figures come from
     "entries": [{"key", "choices", "trials", ...}, ...]}      as in the store; trials: those that may matter elsewhere
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import store

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
NEAR = 1.5  # trials that took at most this many times the best time are kept: one of them may be best for two devices
ABSENT = 2 * NEAR  # what a configuration is taken to cost where it was not tried, or was slower than that


def path_of(folder: Path, place: str, op: str) -> Path:
    """The table of an op for a device's slug or an architecture."""
    return folder / place / f"{op}.json"


def merged(old: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of a table, one for each problem and hardware: the new ones, and old ones for other problems."""
    found = {_subject(e): e for e in old}
    found |= {_subject(e): compact(e) for e in new}
    return [found[key] for key in sorted(found)]


def compact(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of the store as a table holds it: without trials that failed or were slow."""
    timed = [t for t in entry.get("trials", ()) if "seconds" in t]
    best = min((t["seconds"] for t in timed), default=0.0)
    trials = [
        {name: t[name] for name in ("backend", "config", "seconds")}
        for t in sorted(timed, key=lambda t: t["seconds"])
        if t["seconds"] <= NEAR * best
    ]
    return {k: v for k, v in entry.items() if k in ("key", "choices", "measured", "date")} | {"trials": trials}


def fallback(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each problem and number of multiprocessors, an entry with the choice whose worst case over devices is best.

    The worst case of a configuration is how many times longer than the best it takes on the device that suits it
    least. Its ``seconds`` are those of that device.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        subject = entry["key"]["problem"], entry["key"]["device"].get("units")
        groups.setdefault(json.dumps(subject, sort_keys=True), []).append(entry)
    return [_compromise(groups[problem]) for problem in sorted(groups)]


def _compromise(group: list[dict[str, Any]]) -> dict[str, Any]:
    worst: dict[str, tuple[float, float, dict[str, Any]]] = {}
    for entry in group:
        for trial in entry["trials"]:
            name = json.dumps([trial["backend"], trial["config"]], sort_keys=True)
            if name not in worst:
                costs = [_cost(other, trial) for other in group]
                worst[name] = (*max(costs), trial)
    ranked = sorted(worst.values(), key=lambda found: found[:2])
    choices: dict[str, dict[str, Any]] = {}
    for ratio, seconds, trial in ranked:
        choice = {"backend": trial["backend"], "config": trial["config"], "seconds": seconds, "worst": round(ratio, 3)}
        choices.setdefault(trial["backend"], choice)
    devices = sorted({e["key"]["device"]["name"] for e in group})
    made = {"key": group[0]["key"], "choices": list(choices.values()) or group[0]["choices"], "from": devices}
    measured = group[0].get("measured")  # of a bucket, devices may have measured different problems
    same = measured is not None and all(e.get("measured") == measured for e in group)
    return made | {"measured": measured} if same else made


def _cost(entry: dict[str, Any], trial: dict[str, Any]) -> tuple[float, float]:
    """(times the best, seconds) that a configuration takes where this entry was measured."""
    best = min(t["seconds"] for t in entry["trials"]) if entry["trials"] else trial["seconds"]
    for t in entry["trials"]:
        if (t["backend"], t["config"]) == (trial["backend"], trial["config"]):
            return t["seconds"] / best, t["seconds"]
    return ABSENT, ABSENT * best


def write(folder: Path, op: str, entries: list[dict[str, Any]], provenance: dict[str, Any]) -> list[Path]:
    """Merge entries of one device into its table, and make its architecture's table anew from those of its devices.

    Returns the files written. Errors: OSError; ValueError where a table that is there cannot be read.
    """
    slug = store.slugged(entries[0]["key"]["device"]["name"])
    path = path_of(folder, slug, op)
    old = store.read_table(path)["entries"] if path.exists() else []
    table = {"provenance": provenance, "entries": merged(old, entries)}
    store.write(path, table, store.MAX_TABLE, mode=0o644)
    written = [path]
    arch = entries[0]["key"]["device"].get("arch")
    devices = [p for p in sorted(folder.glob(f"*/{op}.json")) if not p.parent.name.startswith("sm_")]
    found = [e for p in devices for e in store.read_table(p)["entries"] if e["key"]["device"].get("arch") == arch]
    if arch in ARCHITECTURES:
        made = fallback(found)
        path = path_of(folder, arch, op)
        measured = provenance | {"from": sorted({name for e in made for name in e["from"]})}
        store.write(path, {"provenance": measured, "entries": made}, store.MAX_TABLE, mode=0o644)
        written.append(path)
    store.table.cache_clear()
    return written


def _subject(entry: dict[str, Any]) -> str:
    hardware = {name: entry["key"]["device"].get(name) for name in store.HARDWARE}
    return json.dumps([hardware, entry["key"]["problem"]], sort_keys=True)
