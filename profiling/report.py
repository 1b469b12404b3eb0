"""A report's records, and what is made of them: files, pictures and the index. Needs no device: report.json is enough.

A report is plain data (what JSON holds), ``SCHEMA`` 2:

    device      fields of ``Device`` and its slug        date, command, seconds, complete
    ceilings    fields of every ``Ceiling``              versions, sources     package -> version, op -> hash
    formulas    resource -> how it is counted            peers        each {name, what, version, missing}
    gate        backend -> {cases, failed, skipped, shares}; shares: how many tensors used 0 to 5 %, 5 to 10 % ... of
                what the gate allows, and last how many more than all
    cases       each {name, title, about, tokens, measured, uses, results, check}, with
        uses      use -> {elements, counts, seconds, unit, needs, units, cold_s}: what the problem needs, its bounds
        results   each {runner, kind, use} with a reason, or fields of a ``Timing`` and, where known, passes (medians of
                  several measurements), set_aside (one that was disturbed), cold (another timing), energy_j,
                  config, chosen, untuned_s, difference
    sweeps      each {axis, title, points}; a point {size, uses, results}, or {size, reason}
    parts       each {part, title, results}: the block, the convolution, a single step
    counters    {read, why, rows}; a row {case, use, backend, resource, counted, read, exact, agrees}
    figure8     None, or {title, date, command, points, operations, peers}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import charts, page
from .charts import TITLES, timed
from .files import write
from .page import seconds, speed_ups

__all__ = ["PICTURES", "SCHEMA", "empty", "index", "load", "render", "save", "seconds", "speed_ups"]

Report = dict[str, Any]
SCHEMA = 2
SHARES = 20  # parts of its allowance that a tensor's error is counted in
PICTURES = {
    "speed.png": charts.speed, "needs.png": charts.needs, "roofline.png": charts.roofline,
    "roofline-classic.png": charts.classic, "scaling.png": charts.scaling, "memory.png": charts.memory,
    "figure8.png": charts.figure8, "errors.png": charts.errors,
}  # fmt: skip


def empty() -> Report:
    """A report of nothing, which has everything that a reader may ask for."""
    return {
        "schema": SCHEMA, "command": "", "date": "", "seconds": 0.0, "complete": False, "device": {}, "ceilings": [],
        "versions": {}, "sources": {}, "formulas": {}, "gate": {}, "peers": [], "cases": [], "sweeps": [], "parts": [],
        "counters": {}, "figure8": None,
    }  # fmt: skip


def load(path: Path) -> Report:
    """Read a report.json, of this schema or an older one. Errors: ValueError, in one line, if it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror or e}") from None
    except ValueError as e:
        raise ValueError(f"{path}: expected a report.json, got no JSON: {e}") from None
    if not isinstance(found, dict) or not isinstance(found.get("device"), dict) or "cases" not in found:
        raise ValueError(f"{path}: expected a report.json, got JSON without a device and cases")
    if found.get("schema", 0) not in range(1, SCHEMA + 1):
        raise ValueError(f"{path}: expected schema 1 to {SCHEMA}, got {found.get('schema')}")
    # schema 1 had none of what is empty here, and measured every case once
    report = empty() | found | {"schema": SCHEMA}
    for case in report["cases"]:
        case.setdefault("measured", 1)
    return report


def save(report: Report, folder: Path) -> None:
    """Write report.json."""
    write(folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")


def render(report: Report, folder: Path) -> Path:
    """Write report.html, which holds its pictures and fetches nothing, and the pictures as files beside it."""
    pictures = {}
    for name, draw in PICTURES.items():
        if (drawn := draw(report)) is not None:
            pictures[name] = drawn
            write(folder / name, drawn)
        else:
            (folder / name).unlink(missing_ok=True)
    path = folder / "report.html"
    write(path, page.html(report, pictures))
    return path


def index(root: Path) -> Path:
    """Write README.md in ``root``: the newest table and picture of every device that has a report there."""
    parts = [
        "# Benchmark reports\n",
        "Generated; do not edit. `python -m scan_kernels report` measures the machine it runs on, writes its folder "
        "here and this page; `python -m scan_kernels check --record` writes check.json.\n",
    ]
    for file in sorted(root.glob("*/report.json")):
        report, slug = load(file), file.parent.name
        links = [
            f"[{n}]({slug}/{n})" for n in ("report.html", "report.json", "check.json") if (file.parent / n).is_file()
        ]
        parts += [
            f"## {report['device']['name']}\n",
            f"{report['date'][:10]}, `{report['command']}`. {' · '.join(links)}\n",
            _markdown(report),
        ]
        shown = {
            "speed.png": f"Speed of every backend and peer on {report['device']['name']}, beside the bound",
            "figure8.png": f"Time of a scan, attention and a convolution against length on {report['device']['name']}",
        }
        parts += [f"![{words}]({slug}/{n})\n" for n, words in shown.items() if (file.parent / n).is_file()]
    path = root / "README.md"
    write(path, "\n".join(parts))
    return path


def _markdown(report: Report) -> str:
    """The fastest backend of each case and direction, as a Markdown table."""
    peers = [p["name"] for p in report["peers"] if not p["missing"]]
    head = [
        "case",
        "direction",
        "backend",
        "time",
        "Gelem/s",
        "share of bound",
        "bound by",
        *(f"over {p}" for p in peers),
    ]
    lines = [head, ["---"] * len(head)]
    for case in report["cases"]:
        for use in ("inference", "backward"):
            best = next((r for r in timed(case, use) if r["kind"] == "backend"), None)
            if best is None:
                continue
            need, gains = case["uses"][use], speed_ups(case, use, best["median_s"])
            lines.append([
                case["title"], TITLES[use], best["runner"], seconds(best["median_s"]),
                f"{need['elements'] / best['median_s'] / 1e9:.3g}", f"{100 * need['seconds'] / best['median_s']:.2g} %",
                need["unit"], *(f"{gains[p]:.3g}x" if p in gains else "" for p in peers),
            ])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
