"""Two reports: what became faster or slower, by intervals that know what two runs of the same code differ by.

A cell is a case, a use and a backend. What two measurements of a cell differ by has two parts: the scatter of samples,
which each timing knows (``error_s``), and what changes between one measurement and the next though nothing did:
clocks, addresses, what else runs. The second is estimated from ``passes``, over all of a backend's cells in both
reports together: every report measures each cell twice, some time apart. A loop of launches is less steady than one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from typing import Any

FAST, SAME, SLOW, AMBIGUOUS = "FAST", "SAME", "SLOW", "AMBIGUOUS"
# Standard errors on either side: 1 of 100 cells lies outside by chance, which leaves room for what all measurements of
# a run share, and their passes do not show.
CONFIDENT = 2.58
MATTERS = 0.005  # relative: a difference that is surely there, but smaller, is nobody's concern
TOLERATED = 0.03  # a change of this size would have been seen, or the cell is ambiguous
LEAST_NOISE = 0.002  # relative: what two measurements differ by at least, however alike the passes were
UNKNOWN_NOISE = 0.01  # where no cell was measured twice
ENOUGH = 5  # pairs of measurements that tell a backend's noise; with fewer it is taken to be that of all


@dataclasses.dataclass(frozen=True)
class Cell:
    """One comparison: by how much the new time is longer, and what is to be thought of it."""

    case: str
    use: str
    backend: str
    old_s: float
    new_s: float
    change: float  # new / old - 1
    low: float  # the interval in which the change lies
    high: float
    verdict: str
    why: str = ""  # of a cell that is ambiguous


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Cell]:
    """Every cell that both reports timed. Errors: ValueError if they are of different devices, or share no cell."""
    names = [report["device"]["name"] for report in (old, new)]
    if names[0] != names[1]:
        raise ValueError(f"expected two reports of one device, got {names[0]} and {names[1]}")
    before, after = _cells(old), _cells(new)
    shared = [key for key in before if key in after]
    if not shared:
        raise ValueError("the reports have timed no case in common")
    noise = between([*before.values(), *after.values()])
    return [_cell(key, before[key], after[key], noise[key[2]]) for key in shared]


def between(records: list[dict[str, Any]]) -> dict[str, float]:
    """Of each backend: relative deviation of one measurement of a cell from another, from those measured twice.

    By the median, so that cells in which something happened do not set it for the others.
    """
    apart: dict[str, list[float]] = {r["runner"]: [] for r in records}
    for r in records:
        passes = r.get("passes", ())
        apart[r["runner"]] += [abs(math.log(a / b)) for a, b in itertools.pairwise(passes)]
    everyone = [d for of_one in apart.values() for d in of_one]
    return {backend: _deviation(own if len(own) >= ENOUGH else everyone) for backend, own in apart.items()}


def _deviation(apart: list[float]) -> float:
    if not apart:
        return UNKNOWN_NOISE
    # the median of |difference| of two normal deviates is 0.6745 sqrt(2) of their deviation
    return max(LEAST_NOISE, statistics.median(apart) / (0.6745 * math.sqrt(2)))


def _cells(report: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {
        (case["name"], r["use"], r["runner"]): r | {"title": case["title"]}
        for case in report["cases"] for r in case["results"] if r["kind"] == "backend" and "median_s" in r
    }  # fmt: skip


def _error(record: dict[str, Any], noise: float) -> float:
    """Relative standard error of a cell's time."""
    median, runs, passes = record["median_s"], record["runs"], record.get("passes", [0])
    # older reports: the quartiles alone, as if the samples knew nothing of each other
    scatter = record.get("error_s") or 0.93 * (record["high_s"] - record["low_s"]) / math.sqrt(runs)
    return math.hypot(scatter / median, noise) / math.sqrt(len(passes))


def _cell(key: tuple[str, str, str], old: dict[str, Any], new: dict[str, Any], noise: float) -> Cell:
    ratio = math.log(new["median_s"] / old["median_s"])
    half = CONFIDENT * math.hypot(_error(old, noise), _error(new, noise))
    low, high = math.expm1(ratio - half), math.expm1(ratio + half)
    # a wide spread is in the interval already; what else disturbed a measurement is not
    disturbed = [w for r in (old, new) for w in r.get("disturbed", ()) if not w.startswith("quartiles")]
    few = min(old["runs"], new["runs"]) < 3
    why = ""
    if disturbed or few:
        verdict, why = AMBIGUOUS, disturbed[0] if disturbed else "fewer than three samples"
    elif low > MATTERS:
        verdict = SLOW
    elif high < -MATTERS:
        verdict = FAST
    elif low > -TOLERATED and high < TOLERATED:
        verdict = SAME
    else:
        verdict, why = AMBIGUOUS, f"a change of {100 * TOLERATED:.0f} % cannot be ruled out"
    return Cell(old["title"], *key[1:], old["median_s"], new["median_s"], math.expm1(ratio), low, high, verdict, why)
