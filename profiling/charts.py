"""The pictures of a report, from its records alone: dark on light, readable in grey, a unit on every axis."""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito: told apart by colour-blind eyes
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C3A")
PEER = "#8a8a8a"
MARKERS = "osD^vP*X<>"
INK = "#1b1b1b"
STYLE: Any = {
    "font.size": 10, "axes.edgecolor": "#666666", "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white",
    "axes.grid": True, "axes.grid.axis": "x", "grid.color": "#dddddd", "axes.axisbelow": True,
}  # fmt: skip
BACKED = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # keeps a label readable where a line crosses it
NAMES = {
    "bytes": "memory", "exps": "exponentials", "issues": "instructions", "flops": "fp32 arithmetic",
    "shuffles": "shuffles", "shared": "shared memory", "launches": "launch",
}  # fmt: skip
TITLES = {"inference": "forward", "training": "forward, training", "backward": "backward",
          "step": "forward + backward"}  # fmt: skip
COUNTED = {"exps": "exponentials", "flops": "floating-point operations"}  # that there is a roofline of
AVOIDABLE = ("shuffles", "shared")  # as in roofline.py
WORTH = 0.05  # of the bound: what needs less is left out of the picture of needs


def timed(case: dict[str, Any], use: str) -> list[dict[str, Any]]:
    """The records of a case that hold a time, backends first, fastest first."""
    found = [r for r in case["results"] if r["use"] == use and "median_s" in r]
    return sorted(found, key=lambda r: (r["kind"] != "backend", r["median_s"]))


def speed(report: dict[str, Any]) -> bytes | None:
    """Elements per second of everything that was timed, a panel for each case and direction, with the bound."""
    panels, colours = _panels(report), _colours(report)
    if not panels:
        return None
    speeds = [p["uses"][u]["elements"] / r["median_s"] / 1e9 for p, u in panels for r in timed(p, u)]
    roofs = [p["uses"][u]["elements"] / p["uses"][u]["seconds"] / 1e9 for p, u in panels]
    low, high = 10 ** _floor(min(speeds)), max(speeds + roofs)
    room = (high / low) ** 0.4  # for the longest label, on the axis

    def draw(axes: Axes, case: dict[str, Any], use: str) -> None:
        rows, need = timed(case, use), case["uses"][use]
        roof = need["elements"] / need["seconds"] / 1e9
        for i, r in enumerate(rows):
            value = need["elements"] / r["median_s"] / 1e9
            axes.barh(i, value - low, left=low, color=colours.get(r["runner"], PEER), height=0.7)
            share = f"  {100 * need['seconds'] / r['median_s']:.2g} % of bound" if r["kind"] == "backend" else ""
            at = roof if value < roof < value * room else value  # not across the bound's line
            axes.text(at * 1.08, i, f"{value:.3g}{share}", va="center", fontsize=9, bbox=BACKED)
        axes.axvline(roof, color=INK, linestyle="--", linewidth=1)
        axes.text(roof, -0.72, f"bound {roof:.3g} ", ha="right", va="center", fontsize=8.5)
        _rows(axes, [r["runner"] for r in rows], top=1.1)
        axes.set_xscale("log")
        axes.set_xlim(low, high * room)

    return _grid(panels, draw, "Gelem/s (1e9 batch x dim x length a second); longer is faster")


def needs(report: dict[str, Any]) -> bytes | None:
    """The time each resource alone would need, beside the time of the fastest backend."""
    panels = _panels(report)
    panels = [(case, use) for case, use in panels if any(r["kind"] == "backend" for r in timed(case, use))]
    if not panels:
        return None
    every = [s * 1e3 for c, u in panels for s in (*_worth(c["uses"][u]).values(), timed(c, u)[0]["median_s"])]
    low, high = 10 ** _floor(min(every)), max(every)

    def draw(axes: Axes, case: dict[str, Any], use: str) -> None:
        best = timed(case, use)[0]
        need = case["uses"][use]
        rows = [(f"measured: {best['runner']}", best["median_s"], PEER, ""),
                (f"bound: {need['unit']}", need["seconds"], INK, "")]  # fmt: skip
        for name, alone in _worth(need).items():
            colour = COLOURS[list(NAMES).index(name) if name in NAMES else -1]
            rows.append((NAMES.get(name, name), alone, colour, "///" * (name in AVOIDABLE)))
        for i, (_, taken, colour, hatch) in enumerate(rows):
            ms = taken * 1e3
            face = "white" if hatch else colour
            axes.barh(i, ms - low, left=low, height=0.7, facecolor=face, edgecolor=colour, hatch=hatch)
            axes.text(ms * 1.08, i, f"{ms:.3g} ms", va="center", fontsize=9, bbox=BACKED)
        _rows(axes, [row[0] for row in rows], top=0.7)
        axes.set_xscale("log")
        axes.set_xlim(low, high * (high / low) ** 0.3)

    return _grid(
        panels, draw, "ms for one call, if nothing else were needed (log scale)",
        lambda case, use: 2 + len(_worth(case["uses"][use])),
    )  # fmt: skip


def roofline(report: dict[str, Any]) -> bytes | None:
    """Exponentials per second against exponentials per byte: the roofline that binds a scan."""
    return _roofline(report, "exps")


def classic(report: dict[str, Any]) -> bytes | None:
    """Floating-point operations per second against operations per byte."""
    return _roofline(report, "flops")


def _roofline(report: dict[str, Any], resource: str) -> bytes | None:
    """The fastest backend of each case and use under the roof of memory and of a resource, with its share of bound."""
    rates = {c["resource"]: c["per_second"] for c in report["ceilings"] if not c.get("holds")}
    points = []
    for case in report["cases"]:
        for use, need in case["uses"].items():
            if (best := next((r for r in timed(case, use) if r["kind"] == "backend"), None)) is None:
                continue
            count = need["counts"][resource]
            share = f"{100 * need['seconds'] / best['median_s']:.0f} %"
            points.append((use, count / need["counts"]["bytes"], count / best["median_s"], case["title"], share,
                           best["runner"]))  # fmt: skip
    if not points or not rates.keys() >= {resource, "bytes"}:
        return None
    memory, top = rates["bytes"], rates[resource]
    ridge, colours = top / memory, _colours(report)
    words = COUNTED[resource]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9.6, 5.6), layout="constrained")
        axes.grid(True, axis="both")
        # a column of labels stands to the right of each use's points: room for three
        left = min(ridge, *(x for _, x, *_ in points)) / 5
        right = max(ridge, *(x for _, x, *_ in points)) * 14
        bottom = min(y for _, _, y, *_ in points) / 1.8
        axes.plot([left, ridge, right], [left * memory, top, top], color=INK, linewidth=1.6)
        axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(bottom, left * memory), top * 1.7))
        axes.set(xlabel=f"{words} per byte of memory traffic (count / B)", ylabel=f"{words} a second (1/s)")
        axes.text(right / 1.05, top * 1.06, f"{words}: {top:.3g} a second", fontsize=9, ha="right")
        at = 0.6 * ridge
        axes.annotate(f"memory: {memory:.3g} B/s", (at, at * memory), (-8, 6), textcoords="offset points", fontsize=9,
                      ha="right")  # fmt: skip
        markers = dict(zip(("inference", "training", "backward"), "os^", strict=True))
        low, high = (math.log(y) for y in axes.get_ylim())
        column = max(x for _, x, *_ in points) * 1.6
        labels = []
        for use, x, y, title, share, runner in points:
            axes.plot(x, y, markers[use], markersize=7, color=colours[runner], markeredgecolor=INK, zorder=3)
            labels.append((y, x, f"{share}  {title}, {TITLES[use]}"))
        places = _apart([math.log(y) for y, *_ in labels], (high - low) / 34, low, high - 0.12 * (high - low))
        for (y, x, label), place in zip(labels, places, strict=True):
            axes.plot([x, column], [y, math.exp(place)], color="#bbbbbb", linewidth=0.6, zorder=1)
            axes.text(column * 1.03, math.exp(place), label, fontsize=7.5, va="center", bbox=BACKED, zorder=2)
        for name in dict.fromkeys(p[-1] for p in points):
            axes.plot([], [], "D", color=colours[name], markeredgecolor=INK, label=name)
        for use in dict.fromkeys(p[0] for p in points):
            axes.plot([], [], markers[use], color="white", markeredgecolor=INK, label=TITLES[use])
        figure.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=9)
        return _png(figure)


def _apart(values: list[float], least: float, low: float, high: float) -> list[float]:
    """Values moved as little as needed for neighbours to be ``least`` apart, within the ends if they fit there."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = dict.fromkeys(order, low)
    at = low
    for i in order:
        found[i] = at = max(values[i], at)
        at += least
    at = high
    for i in reversed(order):
        found[i] = at = min(found[i], at)
        at -= least
    return [found[i] for i in range(len(values))]


AXES = {"length": "length (time steps)", "dim": "batch x dim (channels)", "state": "states of a channel"}


def scaling(report: dict[str, Any]) -> bytes | None:
    """Time against size, a row for each axis, a column for each direction, with the bound."""
    rows = [axis for axis in report["sweeps"] if any("results" in p for p in axis["points"])]
    if not rows:
        return None
    uses = ("inference", "backward")
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(len(rows), len(uses), figsize=(11, 3.7 * len(rows)), squeeze=False,
                                    layout="constrained")  # fmt: skip
        for i, axis in enumerate(rows):
            for j, use in enumerate(uses):
                lines = _lines(axis["points"], use, "median_s", 1e3)
                _draw_lines(grid[i][j], report, lines)
                bound = [(p["size"], 1e3 * p["uses"][use]["seconds"]) for p in axis["points"] if "uses" in p]
                grid[i][j].plot(*zip(*bound, strict=True), color=INK, linestyle="--", linewidth=1.2, label="bound")
                grid[i][j].set(xlabel=AXES[axis["axis"]], ylabel="ms for one call")
                grid[i][j].set_title(f"{TITLES[use]}: {axis['title']}", fontsize=10, loc="left", fontweight="bold")
        _legend(figure, grid)
        return _png(figure)


def memory(report: dict[str, Any]) -> bytes | None:
    """Peak memory of a forward with its backward against length."""
    axis = next((axis for axis in report["sweeps"] if axis["axis"] == "length"), None)
    lines = _lines(axis["points"], "step", "peak_bytes", 1 / 2**20) if axis else {}
    if axis is None or not lines:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.6, 4.6), layout="constrained")
        _draw_lines(axes, report, lines)
        axes.set(xlabel=AXES["length"], ylabel="MiB beyond the inputs, at the peak")
        axes.set_title(f"forward + backward: {axis['title']}", fontsize=10, loc="left", fontweight="bold")
        _legend(figure, [[axes]])
        return _png(figure)


def figure8(report: dict[str, Any]) -> bytes | None:
    """The Mamba paper's picture: time against length, for scans, attention and convolution."""
    made = report.get("figure8")
    if not made or not made["points"]:
        return None
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, 2, figsize=(11, 5.0), squeeze=False, layout="constrained", sharey=True)
        for axes, use in zip(grid[0], ("inference", "step"), strict=True):
            _draw_lines(axes, report, _lines(made["points"], use, "median_s", 1e3))
            axes.set(xlabel=AXES["length"])
            axes.set_title(f"{TITLES[use]}: {made['title']}", fontsize=10, loc="left", fontweight="bold")
        grid[0][0].set(ylabel="ms for one call")
        _legend(figure, grid)
        return _png(figure)


def errors(report: dict[str, Any]) -> bytes | None:
    """How much of its allowance each tensor of the check used, a panel for each backend."""
    gates = {name: g for name, g in report["gate"].items() if g.get("shares")}
    if not gates:
        return None
    colours = _colours(report)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(gates), figsize=(3.9 * len(gates), 3.1), squeeze=False, sharey=True,
                                    layout="constrained")  # fmt: skip
        for axes, (name, g) in zip(grid[0], gates.items(), strict=True):
            shares = g["shares"]
            step = 100 / (len(shares) - 1)
            axes.bar([step * (i + 0.5) for i in range(len(shares))], shares, width=0.9 * step,
                     color=[colours.get(name, PEER)] * (len(shares) - 1) + ["#a4262c"])  # fmt: skip
            axes.axvline(100, color=INK, linestyle="--", linewidth=1)
            axes.set(xlabel="share of allowance used (%)", xlim=(0, 100 + 1.2 * step))
            axes.set_xticks([0, 25, 50, 75, 100])
            axes.set_title(f"{name}: {sum(shares)} tensors", fontsize=10, loc="left", fontweight="bold")
        grid[0][0].set(ylabel="tensors")
        return _png(figure)


def _lines(points: list[dict[str, Any]], use: str, figure: str, scale: float) -> dict[str, list[tuple[int, float]]]:
    """runner -> (size, scaled figure) wherever it was measured, in order of size."""
    found: dict[str, list[tuple[int, float]]] = {}
    for point in sorted(points, key=lambda p: p["size"]):
        for r in point.get("results", ()):
            if r["use"] == use and r.get(figure):
                found.setdefault(r["runner"], []).append((point["size"], r[figure] * scale))
    return found


def _draw_lines(axes: Axes, report: dict[str, Any], lines: dict[str, list[tuple[int, float]]]) -> None:
    """Lines on two logarithmic axes; each runner has its colour and marker, the same in every panel."""
    names = _everyone(report)
    for name, line in lines.items():
        i = names.index(name)
        ours = i < len(_colours(report)) or name == "scan-kernels"
        axes.plot(*zip(*line, strict=True), marker=MARKERS[i % len(MARKERS)], color=_shades(report)[name],
                  linewidth=2.0 if ours else 1.2, markersize=5.5 if ours else 4.5, markeredgecolor=INK,
                  markeredgewidth=0.5, linestyle="-" if ours else (0, (4, 1.5)), label=name)  # fmt: skip
    axes.grid(True, axis="both")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")


def _everyone(report: dict[str, Any]) -> list[str]:
    """Everybody who has a record, backends first."""
    every = [r for c in report["cases"] for r in c["results"]]
    every += [r for a in report["sweeps"] for p in a["points"] for r in p.get("results", ())]
    every += [r for p in (report.get("figure8") or {"points": []})["points"] for r in p["results"]]
    return list(dict.fromkeys(r["runner"] for r in sorted(every, key=lambda r: r["kind"] != "backend")))


def _shades(report: dict[str, Any]) -> dict[str, str]:
    """A colour for everybody: backends as everywhere, then what is left, then greys."""
    names, fixed = _everyone(report), _colours(report)
    fixed["scan-kernels"] = COLOURS[0]
    left = [c for c in COLOURS if c not in fixed.values()] + ["#555555", "#8a8a8a", "#333333", "#b0b0b0"]
    others = [n for n in names if n not in fixed]
    return fixed | {name: left[i % len(left)] for i, name in enumerate(others)}


def _legend(figure: Figure, grid: Any) -> None:
    """One legend for all panels, beside them."""
    found: dict[str, Any] = {}
    for row in grid:
        for axes in row:
            handles, labels = axes.get_legend_handles_labels()
            found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=8, frameon=False, fontsize=9)


def _worth(need: dict[str, Any]) -> dict[str, float]:
    """resource -> seconds it alone would need, without what is negligible."""
    return {name: s for name, s in need["needs"].items() if s > WORTH * need["seconds"]}


def _panels(report: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    return [(c, u) for c in report["cases"] for u in ("inference", "backward") if u in c["uses"] and timed(c, u)]


def _colours(report: dict[str, Any]) -> dict[str, str]:
    """A colour for each backend, the same in every picture."""
    names = dict.fromkeys(r["runner"] for c in report["cases"] for r in c["results"] if r["kind"] == "backend")
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _floor(value: float) -> int:
    """The power of ten below a value, so that its bar has some length."""
    power = 0
    while 10.0**power > value / 1.5:
        power -= 1
    while 10.0 ** (power + 1) <= value / 1.5:
        power += 1
    return power


def _rows(axes: Axes, names: list[str], top: float) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -top)
    axes.tick_params(axis="y", length=0)


def _grid(panels, draw, label: str, bars: Any = None) -> bytes:
    """A row for each case, a column for each direction, panels as tall as their bars need."""
    bars = bars or (lambda case, use: len(timed(case, use)))
    cases = list({id(c): c for c, _ in panels}.values())
    uses = [u for u in ("inference", "backward") if any(u == p[1] for p in panels)]
    tall = [max(bars(c, u) for u in uses if u in c["uses"]) + 2.2 for c in cases]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(cases), len(uses), figsize=(6.0 * len(uses), 0.36 * sum(tall) + 0.6), squeeze=False,
            gridspec_kw={"height_ratios": tall}, layout="constrained", sharex=True,
        )  # fmt: skip
        for i, case in enumerate(cases):
            for j, use in enumerate(uses):
                if any(p[0] is case and p[1] == use for p in panels):
                    draw(grid[i][j], case, use)
                    grid[i][j].set_title(f"{case['title']}: {TITLES[use]}", fontsize=10, loc="left", fontweight="bold")
                else:
                    grid[i][j].set_axis_off()
        figure.supxlabel(label, fontsize=10)
        return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # no creation date and no version inside: the same records give the same bytes
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
