"""``tune regret``: how good tuning is, on problems drawn at random: measured, and kept problem by problem.

The regret of a choice is by how much more time it takes than the best that every candidate, exhaustively tried, gives.
All choices of a problem are timed against each other, interleaved, in the end.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import console, table

if TYPE_CHECKING:
    from ..op import Op
    from ..profiling.device import Device

Record = dict[str, Any]
FINAL_S = {"cuda": 0.5, "cpu": 1.0}  # for each choice, at the end
EXHAUSTIVE = "every candidate"


def run(op: Op, device: Device, count: int, seed: int, budget: float, file: Path | None) -> int:
    """Measure ``count`` problems, those that ``file`` has from an earlier call left out, and show what came out."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .. import tuning
    from ..autotune import store

    out = console()
    problems = op.cases.drawn(count, seed, device.kind)
    records: list[Record] = []
    if file is not None and file.exists():
        records = store.read_records(file)
    done = [r["problem"] for r in records]
    todo = [p for p in problems if p.key() not in done]
    status = 0
    columns = (TextColumn("regret"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=out, transient=True) as bar, tuning.Session(op, device) as session:
            task = bar.add_task("", total=len(todo))
            for problem in todo:
                records.append(_measured(op, session, problem, budget))
                if file is not None:
                    store.write(file, {"device": device.name, "records": records}, store.MAX_TABLE, mode=0o644)
                bar.advance(task)
    except KeyboardInterrupt:
        status = 130
    asked = [p.key() for p in problems]
    found = [r for r in records if r["problem"] in asked and "times" in r]
    out.print(f"{len(found)} of {count} problems measured on {device.name}")
    for r in records:
        if "failed" in r:
            out.print(f"{r['failed']}: {r['problem']}", markup=False)
    if found:
        out.print(summary(found))
    return status or (0 if found else 1)


def _measured(op: Op, session: Any, problem: Any, budget: float) -> Record:
    """One problem: tuned twice, then exhaustively, and all choices timed against each other."""
    from .. import tuning
    from ..autotune import store

    chosen: dict[str, Any] = {}
    took: dict[str, float] = {}
    unseen: dict[str, int] = {}
    # the quick ones come first, so that the very first finds nothing compiled
    for name, seconds in (("tuned", budget), ("tuned again", budget), (EXHAUSTIVE, tuning.BUDGETS["full"])):
        session.forget()
        result = session.tune(problem, seconds, finalists_only=name == EXHAUSTIVE)
        if result.winner is None:
            return {"problem": problem.key(), "failed": "no candidate passed"}
        chosen[name], took[name], unseen[name] = result.winner, round(result.seconds, 2), result.unseen
        chosen["heuristic"] = result.default
    # the exhaustive search keeps the default where the gap is noise: here the fastest is asked for
    timed = [t for t in result.trials.values() if t.final and t.timing]
    chosen[EXHAUSTIVE] = min(timed, key=lambda t: t.timing.median_s).name
    for entry in store.shipped(op.key(problem, session.device)):
        config, _ = op.accept(problem, session.device, entry.backend, entry.config, entry.measured)
        if config is not None:
            chosen["shipped"] = entry.backend, config
            break
    names = list(dict.fromkeys(chosen.values()))
    timings = session.time(problem, names, FINAL_S[session.device.kind])
    of = dict(zip(names, timings, strict=True))
    return {
        "problem": problem.key(),
        "seconds": took,
        "unseen": unseen,
        "times": {name: dataclasses.asdict(of[c]) for name, c in chosen.items()},
        "choices": {name: {"backend": c[0], "config": dataclasses.asdict(c[1])} for name, c in chosen.items()},
    }


def summary(records: list[Record]) -> Any:
    """The figures of all records as a table."""
    from ..autotune.tuner import noise
    from ..profiling.timer import Timing

    shown = table("regret", "choice", "mean", "worst", "problems")
    for name in ("tuned", "tuned again", "shipped", "heuristic"):
        regrets = [regret(r, name) for r in records if name in r["times"]]
        if regrets:
            mean, worst = (f"{100 * f(regrets):.2g} %" for f in (statistics.mean, max))
            shown.add_row(name, mean, worst, str(len(regrets)))
    apart = 0
    for r in records:
        a, b = (Timing(**r["times"][name]) for name in ("tuned", "tuned again"))
        apart += abs(a.median_s - b.median_s) > noise(a) + noise(b)
    gains = [r["times"]["heuristic"]["median_s"] / r["times"]["tuned"]["median_s"] for r in records]
    gained = math.exp(statistics.mean(map(math.log, gains)))
    shown.add_section()
    shown.add_row(
        "two tunings further apart than the noise", f"{100 * apart / len(records):.2g} %", "", str(len(records))
    )
    shown.add_row("gain over the heuristic (geometric mean, best)", f"{gained:.3g}x", f"{max(gains):.3g}x", "")
    for name in ("tuned", "tuned again", EXHAUSTIVE):
        took = [r["seconds"][name] for r in records]
        shown.add_row(f"seconds: {name}", f"{statistics.mean(took):.3g}", f"{max(took):.3g}", "")
        if missed := [r["unseen"][name] for r in records if "unseen" in r]:  # older records do not say
            shown.add_row(f"unseen: {name}", f"{statistics.mean(missed):.3g}", str(max(missed)), str(len(missed)))
    return shown


def regret(record: Record, name: str) -> float:
    """By what share of the best time a choice takes longer."""
    times = {k: t["median_s"] for k, t in record["times"].items()}
    return times[name] / min(times.values()) - 1.0
