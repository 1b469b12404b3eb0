"""From a report's records to a page, pictures and an index. Needs no device: report.json is enough.

A report is plain data (what JSON holds):

    device      fields of ``Device`` and its slug        date, command, seconds, complete
    ceilings    fields of every ``Ceiling``              versions     package -> version
    gate        backend -> {cases, failed, skipped}      peers        name, what, version, missing
    cases       each {name, title, about, uses, results}, with
        uses      use -> {elements, counts, seconds, unit, needs, units}: what the problem needs, and its bound
        results   each {runner, kind, use} with a timing (median_s, low_s, high_s, runs, method), or a reason
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from html import escape
from pathlib import Path
from typing import Any

from . import charts
from .charts import NAMES, TITLES, timed

Report = dict[str, Any]
PICTURES = {
    "speed.png": (charts.speed, "Speed",
                  "The dashed line is the bound: what this device could do if its busiest unit never waited. "
                  "Grey bars are other implementations on the same inputs."),
    "needs.png": (charts.needs, "What binds",
                  "The time that each resource alone would need, beside the time of the fastest backend. "
                  "The busiest unit is the bound; the nearer the first bar is to it, the less there is to gain."),
    "roofline.png": (charts.roofline, "Roofline over exponentials",
                     "A scan computes one exponential for each state and step, so exponentials bind it before "
                     "arithmetic does: the roofline is drawn over exponentials per byte, one point a backend and case. "
                     "Where a CPU computes exponentials with its arithmetic units, the arithmetic besides them keeps "
                     "points below the roof."),
}  # fmt: skip
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 0 auto; max-width: 1180px;
       padding: 1.2rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p { max-width: 75ch; } img { width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 2px solid #888; font-weight: 600; } td.t, th.t { text-align: left; }
.prose td { white-space: normal; } tr.peer td { color: #595959; } tr.first td { border-top: 2px solid #888; }
.card { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: .4rem 1.5rem; padding: 1rem;
        border: 1px solid #ccc; border-radius: 6px; }
.card b { display: block; font-size: .8rem; color: #595959; font-weight: 600; }
.bad, .bad td { color: #a4262c; font-weight: 600; }
code { background: #f3f3f3; padding: .1rem .3rem; overflow-wrap: anywhere; }
@media print { body { font-size: 11px; max-width: none; } h2 { break-after: avoid; } img { break-inside: avoid; } }
"""


def write(path: Path, content: str | bytes) -> None:
    """Write a file in one step: a reader sees the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def save(report: Report, folder: Path) -> None:
    """Write report.json."""
    write(folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")


def render(report: Report, folder: Path) -> Path:
    """Write report.html, which holds its pictures and fetches nothing, and the pictures as files beside it."""
    pictures = {}
    counted = {c["resource"] for c in report["ceilings"]}
    ours = any(r["kind"] == "backend" and "median_s" in r for case in report["cases"] for r in case["results"])
    for name, (draw, *_) in PICTURES.items():
        if ours and (name != "roofline.png" or counted >= {"bytes", "exps"}):
            pictures[name] = draw(report)
            write(folder / name, pictures[name])
        else:
            (folder / name).unlink(missing_ok=True)
    page = folder / "report.html"
    write(page, _page(report, pictures))
    return page


def index(root: Path) -> Path:
    """Write README.md in ``root``: the newest table and picture of every device that has a report there."""
    parts = [
        "# Benchmark reports\n",
        "Generated; do not edit. `python -m scan_kernels report` measures the machine it runs on, writes its folder "
        "here and this page; `python -m scan_kernels check --record` writes check.json.\n",
    ]
    for file in sorted(root.glob("*/report.json")):
        report, slug = json.loads(file.read_text()), file.parent.name
        links = [
            f"[{n}]({slug}/{n})" for n in ("report.html", "report.json", "check.json") if (file.parent / n).is_file()
        ]
        parts += [
            f"## {report['device']['name']}\n",
            f"{report['date'][:10]}, `{report['command']}`. {' · '.join(links)}\n",
            _markdown(report),
        ]
        if (file.parent / "speed.png").is_file():
            parts.append(f"![Speed of every backend and peer on {report['device']['name']}]({slug}/speed.png)\n")
    path = root / "README.md"
    write(path, "\n".join(parts))
    return path


def seconds(s: float) -> str:
    """A time with its unit: "49.5 us"."""
    unit, scale = next(((u, k) for u, k in (("s", 1.0), ("ms", 1e-3)) if s >= k), ("us", 1e-6))
    return f"{s / scale:.4g} {unit}"


def speed_ups(case: dict[str, Any], use: str, median_s: float) -> dict[str, float]:
    """How many times faster than each peer that was timed in the same use."""
    return {r["runner"]: r["median_s"] / median_s for r in timed(case, use) if r["kind"] == "peer"}


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


# ---- the page ------------------------------------------------------------------------------------------------


def _page(report: Report, pictures: dict[str, bytes]) -> str:
    title = f"Selective scan on {report['device']['name']}"
    unfinished = "" if report["complete"] else "<p class=bad>Interrupted: what was done until then.</p>"
    body = [f"<h1>{escape(title)}</h1>", unfinished, _card(report), _headline(report)]
    for name, content in pictures.items():
        _, heading, words = PICTURES[name]
        data = base64.b64encode(content).decode()
        alt = escape(f"{heading}: the figures stand in the table above")
        body.append(f"<h2>{heading}</h2><p>{words}</p><img alt='{alt}' src='data:image/png;base64,{data}'>")
    body += [_gate(report), _bounds(report), _left_out(report), _environment(report)]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def _table(head: list[str], rows: list[tuple[str, list[str]]], text: int = 1) -> str:
    """A table; each row is (class, cells); the first ``text`` columns hold words."""

    def line(tag: str, cells: list[str], kind: str = "") -> str:
        inner = "".join(f"<{tag}{' class=t' if i < text else ''}>{escape(c)}</{tag}>" for i, c in enumerate(cells))
        return f"<tr class='{kind}'>{inner}</tr>"

    lines = "".join(line("td", cells, kind) for kind, cells in rows)
    return f"<div class=scroll><table><thead>{line('th', head)}</thead><tbody>{lines}</tbody></table></div>"


def _card(report: Report) -> str:
    d = report["device"]
    units = "multiprocessors" if d["kind"] == "cuda" else "cores"
    facts = {
        "Device": f"{d['name']}, {d['arch']}",
        "Size": f"{d['units']} {units}, {d['memory_bytes'] / 2**30:.0f} GiB",
    }
    for c in report["ceilings"]:
        unit = "B/s" if c["resource"] == "bytes" else "/s"
        facts[f"Ceiling: {NAMES.get(c['resource'], c['resource'])}"] = f"{c['per_second']:.3g} {unit} ({c['source']})"
    facts["Measured"] = report["date"]
    return (
        "<div class=card>" + "".join(f"<div><b>{escape(k)}</b>{escape(v)}</div>" for k, v in facts.items()) + "</div>"
    )


def _headline(report: Report) -> str:
    peers = [p["name"] for p in report["peers"] if not p["missing"]]
    head = ["case", "direction", "what ran", "time", "quartiles", "Gelem/s", "share of bound", "bound by",
            *(f"over {p}" for p in peers)]  # fmt: skip
    rows = []
    for case in report["cases"]:
        for use in case["uses"]:
            need, first = case["uses"][use], "first"
            for r in timed(case, use):
                gains = speed_ups(case, use, r["median_s"]) if r["kind"] == "backend" else {}
                cells = [
                    case["title"], TITLES[use], r["runner"], seconds(r["median_s"]),
                    f"{seconds(r['low_s'])} to {seconds(r['high_s'])}",
                    f"{need['elements'] / r['median_s'] / 1e9:.3g}", f"{100 * need['seconds'] / r['median_s']:.2g} %",
                    need["unit"], *(f"{gains[p]:.3g}x" if p in gains else "" for p in peers),
                ]  # fmt: skip
                rows.append((" ".join([first, "peer" * (r["kind"] == "peer")]).strip(), cells))
                first = ""
    about = "".join(f"<li><b>{escape(c['title'])}</b>: {escape(c['about'])}</li>" for c in report["cases"])
    return (
        f"<h2>Times</h2><ul>{about}</ul><p>Medians. Forward is the call without gradients; “forward, training” keeps "
        "what the backward needs; backward is all gradients through autograd. An element is one channel at one time "
        "step: batch x dim x length of them. “over X” is how many times faster than X.</p>" + _table(head, rows, 3)
    )


def _gate(report: Report) -> str:
    rows = []
    for name, g in report["gate"].items():
        verdict = g["skipped"] or (f"{g['failed']} of {g['cases']} FAILED" if g["failed"] else f"{g['cases']} passed")
        rows.append(("bad" if g["failed"] else "", [name, verdict]))
    for case in report["cases"]:
        for name, c in case.get("check", {}).items():
            words = "within its allowance" if c["ok"] else "FAILED"
            rows.append(("", [name, f"{case['title']}: {words}; worst tensor {c['tensor']}, error {c['error']}, "
                                    f"allowed {c['allowance']}"]))  # fmt: skip
    return (
        "<h2>Correctness gate</h2><p>Every backend ran every case against a float64 reference before it was timed: "
        "values and all gradients, each tensor and each (batch, channel) row within twice the error of plain PyTorch "
        "in the same dtype. A backend that failed has no times here.</p>" + _table(["backend", "result"], rows, 2)
    )


def _bounds(report: Report) -> str:
    resources = list(dict.fromkeys(k for c in report["cases"] for n in c["uses"].values() for k in n["needs"]))
    head = ["case", "direction", *(f"{NAMES.get(k, k)}: count" for k in resources),
            *(f"{NAMES.get(k, k)}: alone" for k in resources), "bound", "bound by"]  # fmt: skip
    rows = [
        ("", [case["title"], TITLES[use], *(f"{n['counts'][k]:.4g}" for k in resources),
              *(seconds(n["needs"][k]) for k in resources), seconds(n["seconds"]), n["unit"]])
        for case in report["cases"] for use, n in case["uses"].items()
    ]  # fmt: skip
    return (
        "<h2>How the bound is counted</h2><p>Memory: each input read once, each output written once, in bytes. "
        "Exponentials: one for each state and step, with those of softplus and of the gate. Arithmetic: "
        "multiplications and additions of the recurrence, an FMA counts 2. A resource alone needs count / ceiling; "
        "resources that share a unit add up; the busiest unit is the bound. Counted, not read from hardware "
        "counters.</p>" + _table(head, rows, 2)
    )


def _left_out(report: Report) -> str:
    rows = [("", [p["name"], p["what"], p["version"], p["missing"] or "timed"]) for p in report["peers"]]
    peers = _table(["peer", "what is called", "version", ""], rows, 4)
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in report["cases"]:
        for r in case["results"]:
            if "reason" in r:
                reasons.setdefault((r["runner"], r["reason"]), []).append(f"{case['title']} {TITLES[r['use']]}")
    left = [("", [name, "; ".join(dict.fromkeys(where)), reason]) for (name, reason), where in reasons.items()]
    return f"<h2>Peers</h2>{peers}" + (
        f"<h2>Not timed, and why</h2><div class=prose>{_table(['what', 'where', 'why'], left, 3)}</div>" if left else ""
    )


def _environment(report: Report) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    methods = sorted({r["method"].split(",")[0] for c in report["cases"] for r in c["results"] if "method" in r})
    return (
        f"<h2>Environment</h2><p>Command: <code>{escape(report['command'])}</code></p><p>{escape(versions)}</p>"
        f"<p>Timed by {escape(', '.join(methods) or 'nothing')}, about {report['seconds']:g} s a measurement, backends "
        "in interleaved rounds on warm caches; implementations that fill the memory run by themselves. "
        "All figures stand in report.json.</p>"
    )
