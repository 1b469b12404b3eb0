"""Roofline: from what a problem needs and what a device delivers to the least time it can take.

Pure arithmetic. A problem is anything whose methods count what it needs: ``bytes()``, ``exps()``, ``flops()`` and what
else a ceiling is known of. A resource alone needs count / rate seconds; resources served by the same unit add up;
different units work at the same time, so the unit that needs longest is the bound.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .ceilings import Ceiling, Ceilings

# A kernel needs less of these the more channels it gives a lane: they are shown, and are never the bound.
AVOIDABLE = ("shuffles", "shared")


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time a problem can take on a device."""

    seconds: float
    unit: str  # what binds: the unit that is busy all that time
    needs: dict[str, float]  # resource -> seconds it alone would need
    units: dict[str, float]  # unit -> seconds it would be busy

    def share(self, measured_s: float) -> float:
        """Share of the bound that a measured time reached: 1 is as fast as the device allows."""
        return self.seconds / measured_s


def bound(problem: Any, ceilings: Ceilings, cold: bool = False) -> Bound:
    """The bound of a problem. Resources that the problem does not count, or counts none of, are left out.

    cold: nothing lies in a cache yet, so that no cache's rate counts. Errors: ValueError if nothing is left.
    """
    rates: dict[str, Ceiling] = {}
    counts: dict[str, float] = {}
    for ceiling in ceilings:
        name = ceiling.resource
        if (count := getattr(problem, name, None)) is None or not (needed := count()):
            continue
        if ceiling.holds and (cold or needed > ceiling.holds):
            continue
        counts[name] = needed
        if name not in rates or ceiling.per_second > rates[name].per_second:
            rates[name] = ceiling
    needs = {name: counts[name] / ceiling.per_second for name, ceiling in rates.items()}
    units: dict[str, float] = {}
    for name, ceiling in rates.items():
        if name not in AVOIDABLE:
            units[ceiling.unit] = units.get(ceiling.unit, 0.0) + needs[name]
    if not units:
        raise ValueError(f"no known ceiling counts anything of {problem!r}")
    unit = max(units, key=units.__getitem__)
    return Bound(units[unit], unit, needs, units)
