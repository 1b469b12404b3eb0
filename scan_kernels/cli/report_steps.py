"""What ``report`` measures, step by step, into a record: check, times, energy, sizes in a row, counters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from rich.console import Console
    from rich.progress import Progress

    from ..measure import Allowance, Runner
    from ..op import Op
    from ..profiling.device import Device

CHECKED_STEPS = 384  # of the text's activations: what a float64 reference does in about a second
PASSES = 2  # over all cases, for what two measurements of the same call differ by
SLOW_SWEEP = 0.1  # of the seconds for implementations without a kernel go to each axis of the sweeps
ENERGY_S = 0.5  # of calls back to back, for the energy of one
ABOUT = "random tensors distributed as in a Mamba layer at initialisation"


def bench(op: Op, device: Device) -> list[Any]:
    return op.cases.tagged("bench-gpu" if device.kind == "cuda" else "bench-cpu")


def progress(out: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=out, transient=True)


def steps(
    args: argparse.Namespace, op: Op, device: Device, record: dict[str, Any], read: tuple[Path, Any, dict], root: Path,
    bar: Progress,
) -> Iterator[None]:  # fmt: skip
    """Fill the record, what matters most first; a step is worth saving. What it holds already is not done again."""
    from .. import measure, parts, sweep

    if not record["gate"]:
        record["gate"] = _gate(device, root, bar)
    runners, record["peers"] = entrants(op, record["gate"], device)
    if not any(r.kind == "backend" for r in runners):
        return
    allowance = measure.Allowance(args.peer_seconds)
    for done in range(PASSES):
        for _ in _cases(op, device, read, runners, args.seconds, allowance, record, done, bar):
            yield
    if device.kind == "cuda":
        for _ in _energies(op, device, runners, record, bar):
            yield
    points = sum(len(axis.sizes(args.full)) for axis in sweep.AXES[device.kind])
    task = bar.add_task("sizes in a row", total=points)
    slow = SLOW_SWEEP * args.peer_seconds
    for made in sweep.sweeps(op, device, runners, slow, args.full, record["sweeps"]):
        record["sweeps"] = made
        done = sum(len(axis["points"]) for axis in made)
        bar.update(task, completed=done, description=f"sizes in a row: {done} of {points}")
        yield
    bar.remove_task(task)
    if len(record["parts"]) < len(parts.PARTS):
        task = bar.add_task("the block and its parts", total=len(parts.PARTS))
        record["parts"] = []
        for part in parts.results(device, args.seconds):
            record["parts"].append(part)
            bar.update(task, advance=1, description=part["title"])
        bar.remove_task(task)
        yield
    if not record["counters"]:
        record["counters"] = _counters(device, record, bar)
        yield


def _gate(device: Device, root: Path, bar: Progress) -> dict[str, dict[str, Any]]:
    """Check every backend, write check.json, and count for each: cases, failed ones, errors; or why it was skipped."""
    from .. import check
    from ..profiling.report import SHARES

    tags = ("ci", "gpu") if device.kind == "cuda" else ("ci",)
    task = bar.add_task("checking", total=check.count("selective_scan", tags))
    rows, skipped = check.run(
        ["selective_scan"], None, device.torch, tags,
        lambda words: bar.update(task, advance=1, description=f"checking {words}"),
    )  # fmt: skip
    bar.remove_task(task)
    check.write_record(rows, skipped, ["selective_scan"], device.torch, root)
    gate: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row.backend for row in rows):
        mine = [row for row in rows if row.backend == name]
        cases: dict[str, bool] = {}
        # of each tensor: the largest share of what it was allowed that it, or one of its rows, used
        shares = [0] * (SHARES + 1)
        for row in mine:
            cases[row.case] = cases.get(row.case, True) and row.ok
            used = max(row.worst_row, row.error / row.allowance if row.error else 0.0)  # of nothing, none is allowed
            shares[min(SHARES, int(used * SHARES)) if math.isfinite(used) else SHARES] += 1
        gate[name] = {
            "cases": len(cases), "failed": sum(not ok for ok in cases.values()), "skipped": "", "shares": shares,
        }  # fmt: skip
    for name, reason in skipped.get("selective_scan", {}).items():
        gate[name] = {"cases": 0, "failed": 0, "skipped": reason}
    return gate


def entrants(op: Op, gate: dict[str, dict[str, Any]], device: Device) -> tuple[list[Runner], list[dict[str, Any]]]:
    """The backends whose gate is green, then the peers that are installed; and what is known of every peer."""
    from .. import measure
    from ..peers import PEERS
    from ..selective_scan import selective_scan

    green = [name for name in op.backends if (g := gate.get(name)) and g["cases"] and not g["failed"]]
    runners, known = [measure.backend(op, name, selective_scan) for name in green], []
    for peer in PEERS:
        missing = None if device.kind in peer.devices else f"does not run on {device.kind}"
        try:
            if missing is None:
                runners.append(measure.peer(op, peer, device))
        except ImportError as e:
            missing = f"not installed ({e})" if not peer.version else str(e)
        known.append({"name": peer.name, "what": peer.what, "version": peer.version, "missing": missing})
    return runners, known


def _cases(
    op: Op, device: Device, read: tuple[Path, Any, dict], runners: list[Runner], seconds: float, allowance: Allowance,
    record: dict[str, Any], done: int, bar: Progress,
) -> Iterator[None]:  # fmt: skip
    """Measure case after case, those of the op, then the text's, once; done: how often they have been measured.

    Each time but the first is without what takes longer for one call than a measurement should, and is merged with
    what is there.
    """
    from .. import check, measure
    from ..profiling.ceilings import ceilings

    path, text, activations = read
    short = {long: name for name, long in op.cases.DTYPES.items()}
    cases = [*bench(op, device), text]
    runners = [r for r in runners if not (done and r.alone)]
    task = bar.add_task("timing", total=len(cases) * len(measure.USES) * len(runners))
    for case in cases:
        real = case is text
        title = f"{case.batch}x{case.dim}x{case.length} N={case.state} {short[case.dtype]}" + " text" * real
        about = f"the activations of a byte-level Mamba layer that reads {path.name}" if real else ABOUT
        known = next((c for c in record["cases"] if c["name"] == case.name), None)
        if known is not None and known["measured"] > done:
            continue
        tensors = activations if real else case.make(device.torch)
        made: dict[str, Any] = known or {"name": case.name, "title": title, "about": about, "results": []}
        made["tokens"] = case.batch * case.length
        made["uses"] = {u: measure.bounds(case.used(u, device.kind), ceilings(device)) for u in measure.USES}
        if real and "check" not in made:
            bar.update(task, description="checking the text's activations")
            made["check"] = _checked(op, case, tensors, [r.name for r in runners if r.kind == "backend"], check)
        fit = [r for r in runners if made.get("check", {}).get(r.name, {"ok": True})["ok"]]
        results = {(r["runner"], r["use"]): r for r in made["results"]}
        slow = {name for (name, _), r in results.items() if r.get("median_s", 0.0) > measure.SLOW * seconds}
        fit = [r for r in fit if r.name not in slow]
        again = f", again ({done + 1} of {PASSES})" if done else ""
        bar.update(task, description=f"timing {title}{again}")
        for result in measure.results(op, case, tensors, fit, device, seconds, allowance=allowance, cold=not done):
            key = result["runner"], result["use"]
            results[key] = measure.merged(results[key], result) if key in results else result
            bar.update(task, advance=1, description=f"timing {title}: {result['use']}{again}")
        del tensors
        made |= {"results": list(results.values()), "measured": done + 1}
        if known is None:
            record["cases"].append(made)
        yield
    bar.remove_task(task)


def _energies(op: Op, device: Device, runners: list[Runner], record: dict[str, Any], bar: Progress) -> Iterator[None]:
    """Joules of one call of the fastest backend, forward and backward, of every case of the op."""
    from .. import measure
    from ..profiling import timer
    from ..profiling.charts import timed

    task = bar.add_task("energy", total=None)
    for case in bench(op, device):
        made = next(c for c in record["cases"] if c["name"] == case.name)
        tensors = None
        for use in ("inference", "backward"):
            best = next((r for r in timed(made, use) if r["kind"] == "backend"), None)
            if best is None or "energy_j" in best:
                continue
            tensors = tensors or case.make(device.torch)
            scan = next(r.scan for r in runners if r.name == best["runner"])
            call = measure.call(scan, tensors, op.cases.ARGUMENTS, use)
            best["energy_j"] = timer.energy(call, device, seconds=ENERGY_S)
        del tensors
        yield
    bar.remove_task(task)


def _counters(device: Device, record: dict[str, Any], bar: Progress) -> dict[str, Any]:
    """What ncu counts for the fastest backend in the first case, beside what the formulas say."""
    from .. import counters
    from ..profiling.charts import timed

    if device.kind != "cuda" or counters.found() is None:
        why = "a CPU has none that it could be asked for" if device.kind != "cuda" else "ncu is not installed"
        return {"read": False, "why": why, "rows": []}
    case, rows, why = record["cases"][0], [], ""
    task = bar.add_task("ncu reads the counters", total=None)
    shape = case["name"].replace("x", ",") + ",16,bf16"
    for use in ("inference", "backward"):
        best = next((r for r in timed(case, use) if r["kind"] == "backend"), None)
        if best is None:
            continue
        try:
            read = counters.read("selective_scan", shape, best["runner"], use)
        except (RuntimeError, ValueError) as e:
            why = str(e)
            break
        counts = case["uses"][use]["counts"]
        rows += [
            {"case": case["title"], "use": use, "backend": best["runner"], "resource": name, "counted": counts[name],
             "read": figure, "exact": name in counters.EXACT,
             "agrees": abs(figure / counts[name] - 1) <= counters.AGREE}
            for name, figure in read.items() if name in counts
        ]  # fmt: skip
    bar.remove_task(task)
    return {"read": bool(rows), "why": why, "rows": rows}


def _checked(op: Op, case: Any, tensors: dict[str, Any], names: list[str], check: Any) -> dict[str, dict[str, Any]]:
    """Hold each backend against float64 on the first steps of real activations."""
    from ..text import beginning

    cut = beginning(tensors, CHECKED_STEPS)
    exact, plain = check.judged(op, cut)
    found = {}
    for name in names:
        with check.poisoned():
            got = op.cases.candidate(cut, name)
        worst = ("", 0.0, 0.0, -1.0, True)
        for tensor in exact:
            result, floor = got[tensor].double().cpu().numpy(), check.FLOORS[case.dtype]
            error, allowance, share, ok = check.compare(exact[tensor], plain[tensor], result, floor)
            worst = max(worst, (tensor, error, allowance, share, ok), key=lambda w: (not w[4], w[3]))
        found[name] = {"tensor": worst[0], "error": f"{worst[1]:.1e}", "allowance": f"{worst[2]:.1e}", "ok": worst[4]}
    return found
