"""The pictures of a report, from its records alone: dark on light, readable in grey, a unit on every axis."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")  # Okabe and Ito: told apart by colour-blind eyes
PEER = "#8a8a8a"
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
TITLES = {"inference": "forward", "training": "forward, training", "backward": "backward"}


def timed(case: dict[str, Any], use: str) -> list[dict[str, Any]]:
    """The records of a case that hold a time, backends first, fastest first."""
    found = [r for r in case["results"] if r["use"] == use and "median_s" in r]
    return sorted(found, key=lambda r: (r["kind"] != "backend", r["median_s"]))


def speed(report: dict[str, Any]) -> bytes:
    """Elements per second of everything that was timed, a panel for each case and direction, with the bound."""
    panels, colours = _panels(report), _colours(report)
    speeds = [p["uses"][u]["elements"] / r["median_s"] / 1e9 for p, u in panels for r in timed(p, u)]
    roofs = [p["uses"][u]["elements"] / p["uses"][u]["seconds"] / 1e9 for p, u in panels]
    low, high = 10 ** _floor(min(speeds)), max(speeds + roofs)

    def draw(axes: Axes, case: dict[str, Any], use: str) -> None:
        rows, need = timed(case, use), case["uses"][use]
        for i, r in enumerate(rows):
            value = need["elements"] / r["median_s"] / 1e9
            axes.barh(i, value - low, left=low, color=colours.get(r["runner"], PEER), height=0.7)
            share = f"  {100 * need['seconds'] / r['median_s']:.2g} % of bound" if r["kind"] == "backend" else ""
            axes.text(value * 1.08, i, f"{value:.3g}{share}", va="center", fontsize=9, bbox=BACKED)
        roof = need["elements"] / need["seconds"] / 1e9
        axes.axvline(roof, color=INK, linestyle="--", linewidth=1)
        axes.text(roof, -0.72, f"bound {roof:.3g} ", ha="right", va="center", fontsize=8.5)
        _rows(axes, [r["runner"] for r in rows], top=1.1)
        axes.set_xscale("log")
        # room on the right for the longest label, in decades of the axis
        axes.set_xlim(low, high * (high / low) ** 0.4)

    return _grid(panels, draw, "Gelem/s (1e9 batch x dim x length a second); longer is faster")


def needs(report: dict[str, Any]) -> bytes:
    """The time each resource alone would need, beside the time of the fastest backend."""
    panels = _panels(report)
    panels = [(case, use) for case, use in panels if any(r["kind"] == "backend" for r in timed(case, use))]
    every = [s * 1e3 for c, u in panels for s in (*c["uses"][u]["needs"].values(), timed(c, u)[0]["median_s"])]
    low, high = 10 ** _floor(min(every)), max(every)

    def draw(axes: Axes, case: dict[str, Any], use: str) -> None:
        best = timed(case, use)[0]
        need = case["uses"][use]
        rows = [(f"measured: {best['runner']}", best["median_s"]), (f"bound: {need['unit']}", need["seconds"])]
        rows += [(NAMES.get(k, k), s) for k, s in need["needs"].items()]
        for i, (_, seconds) in enumerate(rows):
            ms = seconds * 1e3
            axes.barh(i, ms - low, left=low, color=(PEER, INK, *COLOURS)[i], height=0.7)
            axes.text(ms * 1.08, i, f"{ms:.3g} ms", va="center", fontsize=9)
        _rows(axes, [name for name, _ in rows], top=0.7)
        axes.set_xscale("log")
        axes.set_xlim(low, high * (high / low) ** 0.3)

    return _grid(panels, draw, "ms for one call, if nothing else were needed (log scale)")


def roofline(report: dict[str, Any]) -> bytes:
    """Exponentials per second against exponentials per byte: the roofline that binds a scan."""
    rates = {c["resource"]: c["per_second"] for c in report["ceilings"]}
    colours = _colours(report)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.2, 4.6), layout="constrained")
        axes.grid(True, axis="both")
        ridge = rates["exps"] / rates["bytes"]
        xs = [ridge / 30, ridge, ridge * 30]
        axes.plot(xs, [x * rates["bytes"] for x in xs[:2]] + [rates["exps"]], color=INK, linewidth=1.6)
        axes.text(ridge * 1.1, rates["exps"] * 1.12, f"exponentials: {rates['exps']:.3g} a second", fontsize=9)
        axes.text(ridge / 9, ridge / 10 * rates["bytes"] / 2, f"memory: {rates['bytes']:.3g} B/s", fontsize=9)
        markers = {"inference": "o", "training": "s", "backward": "^"}
        for case in report["cases"]:
            for use, need in case["uses"].items():
                x = need["counts"]["exps"] / need["counts"]["bytes"]
                for r in timed(case, use):
                    if r["kind"] == "backend":
                        y = need["counts"]["exps"] / r["median_s"]
                        axes.plot(x, y, markers[use], markersize=7, color=colours[r["runner"]], markeredgecolor=INK)
        shown = {r["runner"] for c in report["cases"] for u in c["uses"] for r in timed(c, u)}
        for name, colour in colours.items():
            if name in shown:
                axes.plot([], [], "D", color=colour, markeredgecolor=INK, label=name)
        for use, marker in markers.items():
            axes.plot([], [], marker, color="white", markeredgecolor=INK, label=TITLES[use])
        axes.set(xscale="log", yscale="log", xlabel="exponentials per byte of memory traffic (count / B)",
                 ylabel="exponentials a second (1/s)")  # fmt: skip
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, top * 1.6)
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        return _png(figure)


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


def _grid(panels, draw, label: str) -> bytes:
    """A row for each case, a column for each direction, panels as tall as their bars need."""
    cases = list({id(c): c for c, _ in panels}.values())
    uses = [u for u in ("inference", "backward") if any(u == p[1] for p in panels)]
    tall = [max(len(timed(c, u)) for u in uses) + 2.2 for c in cases]
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
