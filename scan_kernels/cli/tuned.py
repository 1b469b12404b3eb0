"""What ``tune`` keeps: show, diff, verify, export, import and clear. All but verify work without the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import console, fields, seconds, table

if TYPE_CHECKING:
    from ..op import Op
    from ..profiling.device import Device

Entry = dict[str, Any]
NAMED = ("direction", "dtype", "state", "rows*dim", "length", "layout", "checkpoint")  # the rest: if set
MOST = 60  # characters of what somebody else wrote


def run(action: str, op: Op, device: Device, file: Path | None, problems: list[tuple[str, Any]]) -> int:
    """Run one action; problems: what ``show`` is asked about, else everything that is kept."""
    done: dict[str, Callable[[], int]] = {
        "show": lambda: _ask(op, device, problems) if problems else _show(op, device),
        "diff": lambda: _diff(op, file),
        "verify": lambda: _verify(op, device),
        "export": lambda: _export(file),
        "import": lambda: _import(file),
        "clear": _clear,
    }
    return done[action]()


def _said(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MOST else text[: MOST - 3] + "..."


def _words(problem: dict[str, Any]) -> str:
    """A bucket of problems in one line."""
    head = f"{problem.get('direction')} {problem.get('dtype')} N={problem.get('state')}"
    sizes = f"rows*dim<={problem.get('rows*dim')} length<={problem.get('length')}"
    flags = [
        name if value is True else f"{name}={value}"
        for name, value in problem.items()
        if value and (name not in NAMED or name in ("layout", "checkpoint")) and (name, value) != ("groups", 1)
    ]
    return _said(f"{head} {sizes}") + " " + " ".join(map(_said, flags))


def _config(choice: dict[str, Any]) -> str:
    return _said(", ".join(f"{k}={v}" for k, v in choice["config"].items()))


def _time(choice: dict[str, Any] | None) -> str:
    value = (choice or {}).get("seconds")
    return seconds(value) if isinstance(value, float) and value > 0 else "?"


def _here(op: Op, device: Device, entry: Entry) -> list[str]:
    """The fields in which an entry's key differs from what this machine would look up for the same problem."""
    from ..autotune import store

    key = store.Key(op.name, op.sources, entry["key"]["problem"], device).as_dict()
    return [
        f"{name} is {_said(theirs)}, here {_said(ours)}" for name, theirs, ours in store.differences(entry["key"], key)
    ]


def _measured(op: Op, entry: Entry) -> Any:
    """The problem that an entry was measured on. Errors: TypeError where it is none."""
    values = entry.get("measured")
    if not isinstance(values, dict):
        raise TypeError("no measured problem")
    usual = op.problem_type("forward", 1, 1, 1, 1).key()
    if values.keys() != usual.keys() or any(type(values[k]) is not type(v) for k, v in usual.items()):
        raise TypeError("not a measured problem")
    return op.problem_type(**values)


def _show(op: Op, device: Device) -> int:
    from ..autotune import store

    out, found = console(), list(store.entries())
    shown = table(f"kept in {store.folder()}", "device", "problem", "backend", "config", "time", "tuned", "used here")
    for path, entry in found:
        if isinstance(entry, str):
            shown.add_row("", _said(path.name), "", "", "", "", f"no: {_said(entry)}")
            continue
        best, differ = entry["choices"][0], _here(op, device, entry)
        used = "no: " + "; ".join(differ) if differ else "yes"
        if not differ:
            try:
                posed = _measured(op, entry)
                _, reason = op.accept(posed, device, best["backend"], best["config"], posed.key())
                used = f"no: {reason}" if reason else used
            except TypeError as e:
                used = f"no: {e}"
        name, problem = entry["key"]["device"].get("name"), _words(entry["key"]["problem"])
        shown.add_row(
            _said(name),
            problem,
            _said(best["backend"]),
            _config(best),
            _time(best),
            _said(entry.get("date", "?")),
            used,
        )
    out.print(shown)
    out.print(f"{len(found)} entries")
    return 0


def _ask(op: Op, device: Device, problems: list[tuple[str, Any]]) -> int:
    """What would run for each problem, and what keeps the entry that comes closest from being used."""
    from ..autotune import store

    kept = [e for _, e in store.entries() if isinstance(e, dict) and e["key"].get("op") == op.name]
    shown = table(f"{op.name} on {device.name}", "problem", "backend", "config", "from", "the nearest entry kept")
    for title, problem in problems:
        choice, key = op.resolve(problem, device.torch), op.key(problem, device).as_dict()
        nearest = min((store.differences(e["key"], key) for e in kept), key=len, default=None)
        if nearest is None:
            why = "nothing is kept"
        else:
            why = "; ".join(f"{n} is {_said(a)}, here {_said(b)}" for n, a, b in nearest) or "is for this problem"
        why += f"; {choice.note}" if choice.note else ""
        shown.add_row(title, choice.backend, fields(choice.config), choice.source, why)
    console().print(shown)
    return 0


def _diff(op: Op, file: Path | None) -> int:
    """The cache beside an exported file or, without one, beside what runs without it: a shipped table or heuristic."""
    from ..autotune import store

    out = console()
    kept = {_named(e): e for _, e in store.entries() if isinstance(e, dict)}
    theirs: dict[str, Entry] = {}
    if file is not None:
        if (read := _read(file)) is None:
            return 1
        theirs = {_named(e): e for e in read}
    else:
        theirs = {name: other for name, e in kept.items() if (other := _without(op, e)) is not None}
    shown = table(
        f"kept here, and {'in ' + str(file) if file else 'what runs without it'}",
        "device", "problem", "here", "config", "time", "there", "config", "time",
    )  # fmt: skip
    same, only_here, only_there = 0, len(kept.keys() - theirs.keys()), len(theirs.keys() - kept.keys())
    for name in sorted(kept.keys() & theirs.keys()):
        a, b = kept[name]["choices"][0], theirs[name]["choices"][0]
        if (a["backend"], a["config"]) == (b["backend"], b["config"]):
            same += 1
            continue
        key = kept[name]["key"]
        sides = [cell for c in (a, b) for cell in (_said(c["backend"]), _config(c), _time(c))]
        shown.add_row(_said(key["device"].get("name")), _words(key["problem"]), *sides)
    out.print(shown)
    out.print(f"{shown.row_count} differ, {same} alike, {only_here} only here, {only_there} only there")
    return 0


def _named(entry: Entry) -> str:
    """What two entries for the same thing have in common: op, device and problem, whatever was installed."""
    import json

    return json.dumps([entry["key"].get("op"), entry["key"]["device"], entry["key"]["problem"]], sort_keys=True)


def _without(op: Op, entry: Entry) -> Entry | None:
    """An entry of what would run on the entry's device without it, as far as one can tell."""
    from ..autotune import store
    from ..profiling.device import Device

    key, d = entry["key"], entry["key"]["device"]
    kind = str(key["problem"].get("device"))
    theirs = Device(kind, 0, str(d.get("name")), str(d.get("arch")), d.get("units", 0), 0, d.get("l2_bytes", 0), 0)
    for found in store.shipped(store.Key(op.name, op.sources, key["problem"], theirs)):
        return {"choices": [{"backend": found.backend, "config": found.config}]}
    default = entry.get("default")
    if isinstance(default, dict) and isinstance(default.get("config"), dict) and "backend" in default:
        return {"choices": [default]}
    return None


def _verify(op: Op, device: Device) -> int:
    """Judge every choice that this machine would use anew. Exit code 1 if one is wrong, or a file is spoilt."""
    from rich.progress import Progress

    from .. import tuning
    from ..autotune import store

    out, right, elsewhere, wrong = console(), 0, 0, 0
    found = list(store.entries())
    with Progress(console=out, transient=True) as bar, tuning.Session(op, device) as session:
        task = bar.add_task("verify", total=len(found))
        for path, entry in found:
            faults: list[str] = []
            if isinstance(entry, str):
                faults = [entry]
            elif _here(op, device, entry):
                elsewhere += 1
                bar.advance(task)
                continue
            else:
                try:
                    problem = _measured(op, entry)
                    bar.update(task, description=_words(entry["key"]["problem"]))
                    for choice in entry["choices"]:
                        config, reason = op.accept(problem, device, choice["backend"], choice["config"], problem.key())
                        reason = reason or session.verify(problem, choice["backend"], config) or ""
                        faults += [f"{_said(choice['backend'])}: {reason}"] if reason else []
                except TypeError as e:
                    faults = [str(e)]
            for fault in faults:
                out.print(f"{path}: {fault}", markup=False, style="red")
            wrong += bool(faults)
            right += not faults
            bar.advance(task)
    out.print(f"{right} entries are right, {wrong} are not, {elsewhere} are for other machines or versions")
    return 1 if wrong else 0


def _export(file: Path | None) -> int:
    from ..autotune import store

    assert file is not None
    entries = [e for _, e in store.entries() if isinstance(e, dict)]
    try:
        store.write(file, {"provenance": {"exported": True}, "entries": entries}, store.MAX_TABLE, mode=0o644)
    except (OSError, ValueError) as e:
        console().print(f"not exported: {e}", markup=False)
        return 1
    console().print(f"{len(entries)} entries exported to {file}", markup=False)
    return 0


def _read(file: Path) -> list[Entry] | None:
    from ..autotune import store

    try:
        return store.read_table(file)["entries"]
    except (OSError, ValueError, RecursionError) as e:
        console().print(f"{file} cannot be read: {e}", markup=False)
        return None


def _import(file: Path | None) -> int:
    """Take over every entry that is newer than what is kept. Nothing of the file is trusted but what is checked."""
    from ..autotune import store

    assert file is not None
    if (read := _read(file)) is None:
        return 1
    kept = {p: e for p, e in store.entries() if isinstance(e, dict)}
    out, taken, older = console(), 0, 0
    refused: dict[str, int] = {}
    for entry in read:
        try:
            present = kept.get(store.place(entry["key"]))
            if present is not None and str(present.get("date", "")) >= str(entry.get("date", "")):
                older += 1
                continue
            store.keep(entry)
            taken += 1
        except (OSError, ValueError) as e:
            refused[_said(e)] = refused.get(_said(e), 0) + 1
    for reason, times in refused.items():
        out.print(f"refused, {times} time{'s' * (times > 1)}: {reason}", markup=False)
    out.print(f"{taken} of {len(read)} entries imported, {older} are no newer than what is kept")
    return 1 if refused else 0


def _clear() -> int:
    from ..autotune import store

    try:
        console().print(f"{store.clear()} entries removed from {store.folder()}", markup=False)
    except OSError as e:
        console().print(f"not cleared: {e}", markup=False)
        return 1
    return 0
