"""``report --compare`` and ``report --self-check``: what became faster or slower, and whether that can be told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import BadArgument, table
from .report_steps import PASSES, bench, progress

if TYPE_CHECKING:
    from rich.console import Console

    from ..profiling.device import Device

PLANTED, WRONG = 0.03, 0.05  # a slowdown that must be found, and the share of cells that may be misjudged
ROUNDS = 2  # of equal code, equal code again, and slowed-down code
LEAST_CALLS = 10  # in a measurement: the scatter of fewer does not tell how far their median may be off


def show(old: dict[str, Any], new: dict[str, Any], out: Console) -> int:
    """Show what became faster or slower; 1 if anything became slower."""
    from ..profiling import compare

    try:
        cells = compare.compare(old, new)
    except ValueError as e:
        raise BadArgument(f"--compare: {e}") from None
    out.print(_cells_shown(f"{old['date'][:10]} and {new['date'][:10]} on {new['device']['name']}", cells))
    counts = {v: sum(c.verdict == v for c in cells) for v in (compare.FAST, compare.SAME, compare.SLOW)}
    counts[compare.AMBIGUOUS] = len(cells) - sum(counts.values())
    out.print(", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    return int(counts[compare.SLOW] > 0)


def _cells_shown(title: str, cells: list[Any]) -> Any:
    from ..profiling.charts import TITLES
    from ..profiling.report import seconds

    shown = table(title, "case", "direction", "backend", "old", "new", "change", "between", "")
    for c in cells:
        shown.add_row(
            c.case, TITLES[c.use], c.backend, seconds(c.old_s), seconds(c.new_s), f"{100 * c.change:+.1f} %",
            f"{100 * c.low:+.1f} and {100 * c.high:+.1f} %", c.verdict + f": {c.why}" * bool(c.why),
        )  # fmt: skip
    return shown


def self_check(device: Device, seconds: float, root: Path, about: dict[str, str], out: Console) -> int:
    """Does ``compare`` tell? 0 if it misjudges at most ``WRONG`` of the cells of equal code, and of slowed-down code.

    seconds: of sampling for a measurement. about: what else to write into self-check.json.
    """
    import json

    from .. import measure
    from ..check import find_op
    from ..profiling import compare
    from ..profiling import report as pages
    from ..profiling.timer import compare as together
    from ..selective_scan import selective_scan

    op = find_op("selective_scan")
    kinds = ("as it is", "as it is, again", "slowed down")
    runs: list[dict[str, Any]] = [
        {"device": {"name": device.name}, "cases": [], "date": about["date"]} for _ in range(len(kinds) * ROUNDS)
    ]
    records: list[dict[tuple[str, str, str], dict[str, Any]]] = [{} for _ in runs]
    with progress(out) as bar:
        cases = bench(op, device)
        task = bar.add_task("", total=PASSES * len(runs) * len(cases))
        for n in range(PASSES):
            for i, record in enumerate(records):
                slowed = i % len(kinds) == 2
                for case in cases:
                    tensors = case.make(device.torch)
                    for use in measure.USES:
                        able = [k for k, why in op.reasons(case.used(use, device.kind)).items() if why is None]
                        calls = {
                            name: measure.call(measure.backend(op, name, selective_scan).scan, tensors,
                                               op.cases.ARGUMENTS, use)
                            for name in able
                        }  # fmt: skip
                        known = {
                            k: records[0][key]["median_s"] for k in able if (key := (case.name, use, k)) in records[0]
                        }
                        calls = {k: c for k, c in calls.items() if LEAST_CALLS * known.get(k, 0.0) < seconds}
                        if slowed:
                            calls = {k: _slowed(c, known[k], device) for k, c in calls.items()}
                        for name, timing in together(calls, device, seconds=seconds).items():
                            made = {"runner": name, "kind": "backend", "use": use} | dataclasses.asdict(timing)
                            key = case.name, use, name
                            record[key] = measure.merged(record[key], made) if key in record else made
                    del tensors
                    bar.update(task, advance=1, description=f"{kinds[i % len(kinds)]}: {case.name}, pass {n + 1}")
    for run, record in zip(runs, records, strict=True):
        for (case, *_), r in record.items():
            if LEAST_CALLS * r["median_s"] < seconds:
                run["cases"].append({"name": case, "title": case, "results": [r]})
    found: dict[str, list[Any]] = {"same": [], "planted": []}
    for i in range(0, len(runs), len(kinds)):
        found["same"] += compare.compare(runs[i], runs[i + 1])
        found["planted"] += compare.compare(runs[i], runs[i + 2])
    differ = [c for c in found["same"] if c.verdict in (compare.FAST, compare.SLOW)]
    missed = [c for c in found["planted"] if c.verdict != compare.SLOW]
    out.print(_cells_shown(f"equal code called different on {device.name}", differ))
    out.print(_cells_shown(f"a slowdown of {100 * PLANTED:.0f} % not found on {device.name}", missed))
    shares = {"differ": len(differ) / len(found["same"]), "missed": len(missed) / len(found["planted"])}
    noise = compare.between([r for record in records for r in record.values()])
    verdict = {
        **about, "device": device.name, "noise": noise, **shares,
        "cells": {k: [dataclasses.asdict(c) for c in cells] for k, cells in found.items()},
    }  # fmt: skip
    target = root / device.slug / "self-check.json"
    pages.write(target, json.dumps(verdict, indent=1) + "\n")
    for words, kind, wrong in (("of equal code, called different", "same", differ),
                               (f"slowed down by {100 * PLANTED:.0f} %, not found", "planted", missed)):  # fmt: skip
        out.print(f"{words}: {len(wrong)} of {len(found[kind])} cells")
    for name, share in noise.items():
        out.print(f"two measurements of equal code differ by {100 * share:.2f} % with {name} (standard deviation)")
    out.print(f"written: {target}", markup=False)
    return int(max(shares.values()) > WRONG)


def _slowed(call: Any, median_s: float, device: Device) -> Any:
    """The call with a share of its time more, on the device itself."""
    import time

    import torch

    from ..profiling import readings
    from ..profiling.ceilings import ceilings

    more = PLANTED * median_s
    if device.kind == "cuda":
        launch_s = next((1 / c.per_second for c in ceilings(device) if c.resource == "launches"), 0.0)
        cycles = max(1, round((more - launch_s) * readings.top_clock(device) * 1e6))

        return lambda: (call(), torch.cuda._sleep(cycles))

    def run() -> None:
        call()
        end = time.perf_counter() + more
        while time.perf_counter() < end:
            pass

    return run
