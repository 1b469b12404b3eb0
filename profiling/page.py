"""The page of a report: one HTML file that holds its pictures and fetches nothing."""

from __future__ import annotations

import base64
import math
from html import escape
from typing import Any

from .charts import AXES, NAMES, TITLES, timed

Report = dict[str, Any]
STYLE = """
:root { --ink: #1b1b1b; --soft: #595959; --line: #ddd; --rule: #888; --page: #fff; --card: #f7f7f5; --bad: #a4262c;
        --link: #0b5394; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e3; --soft: #a8a5a0; --line: #3a3a3a; --rule: #777;
        --page: #191a1b; --card: #232425; --bad: #ff8a80; --link: #8ab4f8; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
       max-width: 1320px; padding: 1.2rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .2rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p, li { max-width: 75ch; } ul { padding-left: 1.2rem; } a { color: var(--link); }
nav { font-size: .9rem; color: var(--soft); margin: .6rem 0 1.2rem; }
nav a { margin-right: .9rem; white-space: nowrap; }
.scroll { overflow-x: auto; } .scroll:focus-visible { outline: 2px solid var(--link); }
.picture { overflow-x: auto; background: #fff; border-radius: 6px; padding: .5rem; margin: .6rem 0; }
.picture img { display: block; width: 100%; min-width: 620px; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .22rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { border-bottom: 2px solid var(--rule); font-weight: 600; vertical-align: bottom; } td.t, th.t { text-align: left; }
td.t:first-child { padding-left: 0; } th.t:first-child { padding-left: 0; }
.prose td { white-space: normal; vertical-align: top; } .prose td:first-child { white-space: nowrap; }
tr.peer td { color: var(--soft); } tr.first td { border-top: 2px solid var(--rule); }
.card { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: .7rem 1.5rem; padding: 1rem;
        background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
.card b { display: block; font-size: .8rem; color: var(--soft); font-weight: 600; }
.card small { display: block; color: var(--soft); line-height: 1.35; }
.bad, .bad td { color: var(--bad); font-weight: 600; } .note { color: var(--soft); font-size: .92rem; }
code { background: var(--card); padding: .1rem .3rem; overflow-wrap: anywhere; font-size: .9em; }
@media print { :root { --ink: #000; --soft: #444; --page: #fff; --card: #fff; --line: #ccc; --bad: #a4262c; }
  body { font-size: 10px; max-width: none; padding: 0; } nav { display: none; } h2 { break-after: avoid; }
  .picture { break-inside: avoid; padding: 0; } .scroll { overflow: visible; } th, td { padding: .15rem .3rem; } }
"""
# picture: its heading, and how to read it
WORDS = {
    "speed.png": ("Speed", "The dashed line is the bound: what this device could do if its busiest unit never waited. "
                  "Grey bars are other implementations on the same inputs."),
    "needs.png": ("What binds",
                  "The time that each resource alone would need, beside the time of the fastest backend. The busiest "
                  "unit is the bound; the nearer the first bar is to it, the less there is to gain. Hatched: what a "
                  "kernel needs less of the more channels it gives a lane, and which is never the bound. What needs "
                  "less than a twentieth of the bound is left out."),
    "roofline.png": ("Roofline over exponentials",
                     "A scan computes one exponential for each state and step, so exponentials bind it before "
                     "arithmetic does, and the classic picture hides it. One point for each case and direction, the "
                     "fastest backend's, with its share of the bound. Where a CPU computes exponentials with its "
                     "arithmetic units, the arithmetic besides them keeps points below the roof."),
    "roofline-classic.png": ("The classic roofline", "The same points over floating-point operations. The roof is that "
                             "of FMAs, two operations each; the recurrence is not made of FMAs alone."),
    "scaling.png": ("Scaling", "Time of one call against one size, the others fixed. The dashed line is the bound. A "
                    "line ends where a call takes too long or its tensors do not fit."),
    "memory.png": ("Memory", "Peak memory of a forward with its backward, beyond the inputs: results, gradients, and "
                   "what is kept in between."),
    "figure8.png": ("The paper’s Figure 8", "Time of one call against length, as in the Mamba paper "
                    "(arXiv:2312.00752), measured here. A line ends where a call takes too long or does not fit in "
                    "memory."),
    "errors.png": ("", "For each tensor of each case, the largest share of its allowance that it or one of its rows "
                   "used. Right of the dashed line is failure."),
}  # fmt: skip


def seconds(s: float) -> str:
    """A time with its unit: "49.5 us"."""
    unit, scale = next(((u, k) for u, k in (("s", 1.0), ("ms", 1e-3)) if s >= k), ("us", 1e-6))
    return f"{s / scale:.4g} {unit}"


def span(low_s: float, high_s: float) -> str:
    """From a time to another, with one unit: "49.1 to 51.3 us"."""
    high, unit = seconds(high_s).split()
    scale = {"s": 1.0, "ms": 1e-3, "us": 1e-6}[unit]
    return f"{low_s / scale:.4g} to {high} {unit}"


def speed_ups(case: dict[str, Any], use: str, median_s: float) -> dict[str, float]:
    """How many times faster than each peer that was timed in the same use."""
    return {r["runner"]: r["median_s"] / median_s for r in timed(case, use) if r["kind"] == "peer"}


def html(report: Report, pictures: dict[str, bytes]) -> str:
    """The page. pictures: file name -> PNG, as far as there are any."""
    title = f"Selective scan on {report['device']['name']}"
    unfinished = "" if report["complete"] else "<p class=bad>Interrupted: what was done until then.</p>"

    def shown(name: str) -> str:
        if name not in pictures:
            return ""
        heading, words = WORDS[name]
        data = base64.b64encode(pictures[name]).decode()
        alt = escape(_alt(report, name), quote=True)
        top = f"<h2 id='{_slug(heading)}'>{heading}</h2>" if heading else ""
        return (f"{top}<p>{words}</p><div class=picture tabindex=0>"
                f"<img alt='{alt}' src='data:image/png;base64,{data}'></div>")  # fmt: skip

    sections = [
        _headline(report), shown("speed.png"), shown("needs.png"), shown("roofline.png"),
        shown("roofline-classic.png"), shown("scaling.png"), shown("memory.png"),
        shown("figure8.png") + (_figure8(report) if "figure8.png" in pictures else ""), _parts(report),
        _tuned(report),
        _gate(report) + shown("errors.png"), _bounds(report), _counters(report), _conditions(report),
        _left_out(report), _environment(report),
    ]  # fmt: skip
    body = "".join(sections)
    headings = [part.partition(">")[::2] for part in body.split("<h2 id=")[1:]]
    links = " ".join(f"<a href='#{at.strip(chr(39))}'>{rest.partition('</h2>')[0]}</a>" for at, rest in headings)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><body><h1>{escape(title)}</h1>{unfinished}"
        f"<p class=note>{escape(report['date'][:10])}, <code>{escape(report['command'])}</code></p>{_card(report)}"
        f"<nav aria-label='On this page'>{links}</nav><main>{body}</main></body></html>\n"
    )


def _slug(heading: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in heading.lower())


def _alt(report: Report, name: str) -> str:
    """A picture in words: what it shows, and its most telling figures."""
    first = WORDS[name][0] or "Error histogram"
    if name == "errors.png":
        each = [f"{k}: {sum(g['shares'])} tensors, {g['shares'][-1]} beyond their allowance"
                for k, g in report["gate"].items() if g.get("shares")]  # fmt: skip
    elif name in ("scaling.png", "memory.png", "figure8.png"):
        use, figure = ("inference", "median_s") if name == "scaling.png" else ("step", "median_s")
        figure = "peak_bytes" if name == "memory.png" else figure
        of_length = (p for axis in report["sweeps"] if axis["axis"] == "length" for p in axis["points"])
        points = report["figure8"]["points"] if name == "figure8.png" else of_length
        last = {r["runner"]: (p["size"], r[figure]) for p in points for r in p.get("results", ())
                if r["use"] == use and figure in r}  # fmt: skip
        each = [f"{who}: {seconds(x) if figure == 'median_s' else f'{x / 2**20:.0f} MiB'} at length {n}"
                for who, (n, x) in last.items()]  # fmt: skip
        first += f": {TITLES[use]}, at the longest that each ran"
    else:
        each = []
        for case in report["cases"]:
            for use, need in case["uses"].items():
                if best := next((r for r in timed(case, use) if r["kind"] == "backend"), None):
                    share = f"{100 * need['seconds'] / best['median_s']:.0f} % of the bound set by {need['unit']}"
                    each.append(
                        f"{case['title']} {TITLES[use]}: {best['runner']}, {seconds(best['median_s'])}, {share}"
                    )
    return f"{first}. {'; '.join(each)}."


def _table(head: list[str], rows: list[tuple[str, list[str]]], text: int, label: str) -> str:
    """A table; each row is (class, cells); the first ``text`` columns hold words."""

    def line(tag: str, cells: list[str], kind: str = "") -> str:
        inner = "".join(f"<{tag}{' class=t' if i < text else ''}>{escape(c)}</{tag}>" for i, c in enumerate(cells))
        return f"<tr class='{kind}'>{inner}</tr>" if kind else f"<tr>{inner}</tr>"

    lines = "".join(line("td", cells, kind) for kind, cells in rows)
    named = f"<table aria-label='{escape(label, quote=True)}'>"
    return f"<div class=scroll tabindex=0>{named}<thead>{line('th', head)}</thead><tbody>{lines}</tbody></table></div>"


def _rate(c: dict[str, Any], value: float) -> str:
    """A ceiling in a unit that people use."""
    if c["resource"] == "launches":
        return f"{1e6 / value:.2f} us each"
    scale = 10 ** (3 * int(math.log10(value) // 3))
    prefix = {1e3: "k", 1e6: "M", 1e9: "G", 1e12: "T", 1e15: "P"}.get(scale, "")
    unit = {"bytes": "B/s", "shared": "B/s", "flops": "FLOP/s"}.get(c["resource"], "/s")
    return f"{value / (scale if prefix else 1):.3g} {prefix}{unit}"


def _card(report: Report) -> str:
    d = report["device"]
    units = "multiprocessors" if d["kind"] == "cuda" else "cores"
    facts = [
        ("Device", f"{d['name']}, {d['arch']}", ""),
        ("Size", f"{d['units']} {units}, {d['memory_bytes'] / 2**30:.0f} GiB", ""),
    ]
    for c in report["ceilings"]:
        name = "L2 cache" if c.get("holds") else NAMES.get(c["resource"], c["resource"])
        sheet = f"; data sheet or clock: {_rate(c, c['datasheet'])}" if c.get("datasheet") else ""
        facts.append((f"Ceiling: {name}", _rate(c, c["per_second"]), c["source"] + sheet))
    if driver := report["versions"].get("driver"):
        facts.append(("Driver", driver, ""))
    cells = "".join(
        f"<div><b>{escape(k)}</b>{escape(v)}{f'<small>{escape(small)}</small>' if small else ''}</div>"
        for k, v, small in facts
    )
    return f"<div class=card>{cells}</div>"


def _headline(report: Report) -> str:
    peers = [p["name"] for p in report["peers"] if not p["missing"]]
    every = [(c, r) for c in report["cases"] for r in c["results"]]
    cold, joules = any("cold" in r for _, r in every), any(r.get("energy_j") for _, r in every)
    head = ["case", "direction", "what ran", "time", "IQR", "n", *["cold"] * cold, "Gelem/s", "of bound", "bound by",
            *["uJ/token"] * joules, *(f"over {p}" for p in peers)]  # fmt: skip
    rows = []
    for case in report["cases"]:
        for use in case["uses"]:
            need, first = case["uses"][use], "first"
            for r in timed(case, use):
                gains = speed_ups(case, use, r["median_s"]) if r["kind"] == "backend" else {}
                spread = f"{100 * (r['high_s'] - r['low_s']) / r['median_s']:.2g} %" if r["runs"] > 1 else ""
                cells = [
                    case["title"], TITLES[use], r["runner"], seconds(r["median_s"]) + " †" * bool(r.get("disturbed")),
                    spread, str(r["runs"]),
                    *[seconds(r["cold"]["median_s"]) if "cold" in r else ""] * cold,
                    f"{need['elements'] / r['median_s'] / 1e9:.3g}", f"{100 * need['seconds'] / r['median_s']:.2g} %",
                    need["unit"],
                    *[f"{1e6 * r['energy_j'] / case['tokens']:.3g}" if r.get("energy_j") else ""] * joules,
                    *(f"{gains[p]:.3g}x" if p in gains else "" for p in peers),
                ]  # fmt: skip
                rows.append((" ".join([first, "peer" * (r["kind"] == "peer")]).strip(), cells))
                first = ""
    alike: dict[str, list[str]] = {}
    for c in report["cases"]:
        alike.setdefault(c["about"], []).append(c["title"])
    about = "".join(f"<li><b>{escape(', '.join(titles))}</b>: {escape(words)}</li>" for words, titles in alike.items())
    return (
        f"<h2 id=times>Times</h2><ul>{about}</ul><p>Medians of n samples, with their interquartile range (IQR), "
        "caches as warm as back-to-back calls make them; cold: the last cache was read full before each call. Forward "
        "is the call without gradients; “forward, training” keeps what the backward needs; backward is all gradients "
        "through autograd. An element is one channel at one time step: batch x dim x length of them. “over X” is how "
        "many times faster than X. † The measurement was disturbed, as <a href='#conditions'>below</a>."
        + " Energy is that of the whole GPU, for each of batch x length tokens." * joules
        + "</p>"
        + _table(head, rows, 3, "Times")
    )


def _tuned(report: Report) -> str:
    rows = []
    for case in report["cases"]:
        for r in (r for use in case["uses"] for r in timed(case, use) if r["kind"] == "backend" and "config" in r):
            gain = f"{r['untuned_s'] / r['median_s']:.3g}x" if "untuned_s" in r else ""
            config = ", ".join(f"{k}={v}" for k, v in r["config"].items())
            rows.append(("", [case["title"], TITLES[r["use"]], r["runner"], r["chosen"], gain, config]))
    return (
        "<h2 id=tuned>Choices</h2><p>The configuration that ran, and where it came from: tuned on this machine, "
        "shipped for this device or its architecture, or the backend’s own rule of thumb (heuristic). The gain is over "
        "that rule, timed side by side.</p>"
        + _table(["case", "direction", "backend", "chosen", "gain", "configuration"], rows, 6, "Choices")
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
        "<h2 id=gate>Correctness</h2><p>Every backend ran every case against a float64 reference before it was timed: "
        "values and all gradients, each tensor and each (batch, channel) row within twice the error of plain PyTorch "
        "in the same dtype. A backend that failed has no times here.</p>"
        + _table(["backend", "result"], rows, 2, "Correctness")
    )


def _bounds(report: Report) -> str:
    resources = list(dict.fromkeys(k for c in report["cases"] for n in c["uses"].values() for k in n["needs"]))
    head = ["case", "direction", *(f"{NAMES.get(k, k)}: count" for k in resources),
            *(f"{NAMES.get(k, k)}: alone" for k in resources), "bound", "bound by", "bound, cold"]  # fmt: skip
    rows = [
        ("", [case["title"], TITLES[use],
              *(f"{n['counts'][k]:.4g}" if k in n["counts"] else "" for k in resources),
              *(seconds(n["needs"][k]) if k in n["needs"] else "" for k in resources),
              seconds(n["seconds"]), n["unit"], seconds(n.get("cold_s", n["seconds"]))])
        for case in report["cases"] for use, n in case["uses"].items()
    ]  # fmt: skip
    formulas = report["formulas"] or {
        "bytes": "Each input read once, each output written once.",
        "exps": "One for each state and step, with those of softplus and of the gate.",
        "flops": "Multiplications and additions of the recurrence; an FMA counts 2.",
    }
    listed = "".join(f"<li><b>{escape(NAMES.get(k, k))}</b>: {escape(words)}</li>" for k, words in formulas.items())
    return (
        f"<h2 id=counts>How the bound is counted</h2><ul>{listed}</ul><p>A resource alone needs count / ceiling; "
        "resources that share a unit add up; the busiest unit is the bound. What fits in half of L2 is bounded by L2 "
        "where that was measured, as long as caches are warm.</p>" + _table(head, rows, 2, "Counts and bounds")
    )


def _counters(report: Report) -> str:
    c = report["counters"]
    heading = "<h2 id=counters>Held against the hardware’s counters</h2>"
    if not c.get("read"):
        why = c.get("why") or "the version that measured this did not"
        return f"{heading}<p>Counters were not read: {escape(why)}.</p>"
    head = ["case", "direction", "backend", "resource", "counted", "read", "read / counted", ""]
    rows = [
        ("" if r["agrees"] or not r["exact"] else "bad",
         [r["case"], TITLES[r["use"]], r["backend"], NAMES.get(r["resource"], r["resource"]), f"{r['counted']:.4g}",
          f"{r['read']:.4g}", f"{r['read'] / r['counted']:.3f}",
          ("within 5 %" if r["agrees"] else "OFF BY MORE THAN 5 %") if r["exact"] else "at least what is counted"])
        for r in c["rows"]
    ]  # fmt: skip
    why = f"<p>Not all were read: {escape(c['why'])}.</p>" if c["why"] else ""
    return (
        f"{heading}<p>What ncu read for one call of the fastest backend. Memory traffic and exponentials are what the "
        "formulas say; of instructions and arithmetic these are the least, to which a kernel adds addresses, loads "
        "and sums over lanes.</p>" + why + _table(head, rows, 4, "Counters")
    )


def _figure8(report: Report) -> str:
    made = report["figure8"]
    rows = []
    names = list(dict.fromkeys(r["runner"] for p in made["points"] for r in p["results"]))
    for use in ("inference", "step"):
        for point in made["points"]:
            times = {r["runner"]: r.get("median_s") for r in point["results"] if r["use"] == use}
            rows.append(
                ("", [TITLES[use], str(point["size"]), *(seconds(t) if (t := times.get(n)) else "" for n in names)])
            )
    reasons: dict[str, str] = {}
    for r in (r for p in made["points"] for r in p["results"] if "reason" in r):
        reasons.setdefault(f"{r['runner']}, {TITLES[r['use']]}", r["reason"])
    why = "".join(f"<li>{escape(k)}: {escape(v)}</li>" for k, v in reasons.items())
    what = "".join(f"<li><b>{escape(k)}</b>: {escape(v)}</li>" for k, v in made["operations"].items())
    missing = [f"{p['name']} ({p['missing']})" for p in made["peers"] if p["missing"]]
    absent = f"<p>Missing: {escape('; '.join(missing))}.</p>" if missing else ""
    return (
        f"<p>{escape(made['title'])}, random inputs; {escape(made['date'][:10])}, "
        f"<code>{escape(made['command'])}</code>.</p><ul>{what}</ul>{absent}"
        + _table(["direction", "length", *names], rows, 2, "Time against length")
        + (f"<h3>Where a line ends, and why</h3><ul class=note>{why}</ul>" if why else "")
    )


def _parts(report: Report) -> str:
    rows, without = [], []
    for part in report["parts"]:
        ours = {r["use"]: r["median_s"] for r in part["results"] if r["kind"] == "backend" and "median_s" in r}
        first = "first"
        for r in part["results"]:
            if "reason" in r:
                without.append(f"<li>{escape(part['part'])}, {escape(r['runner'])}: {escape(r['reason'])}</li>")
                continue
            gain = f"{r['median_s'] / ours[r['use']]:.3g}x" if r["kind"] == "peer" and r["use"] in ours else ""
            cells = [part["title"] if first else "", r["runner"], TITLES[r["use"]], seconds(r["median_s"])]
            rows.append((first, [*cells, span(r["low_s"], r["high_s"]), gain]))
            first = ""
    if not report["parts"]:
        return ""
    return (
        "<h2 id=parts>The block and its parts</h2><p>What stands around the scan, with the same weights and inputs for "
        "everybody; who is far from our result gets no time. The convolution and the single step of this package are "
        "plain torch. The last column is how many times as long as ours.</p>"
        + _table(["", "who", "direction", "time", "quartiles", "over ours"], rows, 3, "The block and its parts")
        + (f"<p>Without a time:</p><ul class=note>{''.join(without)}</ul>" if without else "")
    )


def _conditions(report: Report) -> str:
    """What the device was like, from every record that says so."""
    every = [r["conditions"] for c in report["cases"] for r in c["results"] if r.get("conditions")]
    every = [c for c in every if c["source"]]
    said = [
        ("", [c["title"], TITLES[r["use"]], r["runner"], "; ".join(r["disturbed"])])
        for c in report["cases"] for r in c["results"] if r.get("disturbed")
    ]  # fmt: skip
    heading = "<h2 id=conditions>While it was measured</h2>"
    if not every:
        return f"{heading}<p>Nobody told: neither clocks nor other load were read.</p>"

    def ends(name: str, unit: str) -> str:
        figures = [x for c in every for x in (c[name] if isinstance(c[name], list | tuple) else [c[name]])]
        return f"{min(figures):.0f} to {max(figures):.0f} {unit}"

    gpu = any(c["source"] == "NVML" for c in every)
    facts = (
        [("Multiprocessor clock", ends("sm_mhz", "MHz")), ("Memory clock", ends("memory_mhz", "MHz")),
         ("Power, highest of each measurement", ends("power_w", "W")),
         ("Temperature, highest of each", ends("temperature_c", "°C"))] if gpu
        else [("Share of the cores that other processes took",
               f"{100 * min(c['others'] for c in every):.0f} to {100 * max(c['others'] for c in every):.0f} %")]
    )  # fmt: skip
    aside = sum("set_aside" in r for c in report["cases"] for r in c["results"])
    again = f"<p>{aside} more were disturbed once and not the other time, which counts.</p>" if aside else ""
    clean = "<p>No measurement was disturbed: no throttling, no falling clock, no other load, no wide spread.</p>"
    return (
        f"{heading}<p>Read through {escape(every[0]['source'])} during each measurement.</p>"
        + _table(["", ""], [("", [k, v]) for k, v in facts], 1, "Conditions")
        + (
            f"<p>Disturbed, of {len(every)} measurements:</p>"
            + _table(["case", "direction", "what ran", "by"], said, 4, "Disturbed measurements")
            if said
            else clean
        )
        + again
    )


def _left_out(report: Report) -> str:
    rows = [("", [p["name"], p["what"], p["version"], p["missing"] or "timed"]) for p in report["peers"]]
    peers = _table(["peer", "what is called", "version", ""], rows, 4, "Peers")
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in report["cases"]:
        for r in case["results"]:
            if "reason" in r:
                reasons.setdefault((r["runner"], r["reason"]), []).append(f"{case['title']} {TITLES[r['use']]}")
    for axis in report["sweeps"]:
        for point in axis["points"]:
            if "reason" in point:
                where = reasons.setdefault(("everybody", point["reason"]), [])
                where.append(f"{AXES[axis['axis']]} {point['size']}")
    left = [("", [name, "; ".join(dict.fromkeys(where)), reason]) for (name, reason), where in reasons.items()]
    return f"<h2 id=peers>Peers</h2><div class=prose>{peers}</div>" + (
        "<h3>Not timed, and why</h3><div class=prose>"
        f"{_table(['what', 'where', 'why'], left, 3, 'Not timed')}</div>" if left else ""
    )  # fmt: skip


def _environment(report: Report) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    results = [r for c in report["cases"] for r in c["results"]]
    methods = sorted({r["method"].split(",")[0] for r in results if "method" in r})
    stopped = sorted({r["stopped"] for r in results if r.get("stopped")})
    runs = [r["runs"] for r in results if "runs" in r]
    counted = f"; {min(runs)} to {max(runs)} samples" if runs else ""
    ended = f", until {escape('; or until '.join(stopped))}" if stopped else ""
    return (
        f"<h2 id=environment>Environment</h2><p>Command: <code>{escape(report['command'])}</code></p>"
        f"<p>{escape(versions)}</p><p>Timed by {escape(', '.join(methods) or 'nothing')}{counted}{ended}, backends in "
        "interleaved rounds; implementations that fill the memory run by themselves. All figures stand in "
        "report.json.</p>"
    )
