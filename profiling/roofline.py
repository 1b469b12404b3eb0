"""Roofline: from what a problem needs and what a device delivers to the least time it can take.

Pure arithmetic. A problem is anything whose methods count what it needs: ``bytes()``, ``exps()``, ``flops()``.
A resource alone needs count / rate seconds; resources served by the same unit add up; different units work at the
same time, so the unit that needs longest is the bound.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .device import Ceilings


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


def bound(problem: Any, ceilings: Ceilings) -> Bound:
    """The bound of a problem. Resources that the problem does not count are left out.

    Errors: ValueError if nothing is left.
    """
    needs: dict[str, float] = {}
    units: dict[str, float] = {}
    for ceiling in ceilings:
        if (count := getattr(problem, ceiling.resource, None)) is not None:
            needs[ceiling.resource] = count() / ceiling.per_second
            units[ceiling.unit] = units.get(ceiling.unit, 0.0) + needs[ceiling.resource]
    if not units:
        raise ValueError(f"no known ceiling counts anything of {problem!r}")
    unit = max(units, key=units.__getitem__)
    return Bound(units[unit], unit, needs, units)
