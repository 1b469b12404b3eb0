"""Search strategies: which candidates to time next, for how long, and whether against each other.

A strategy is a generator. It yields a ``Round`` and is sent back the round's times, {name: median seconds}; a name
that is missing there failed, or there was no time left to try it. Names stand for anything. All strategies end in
the same way: the best few and those to ``keep`` against each other, interleaved.

>>> strategy = halving(["a", "b"], look=0.1, final=1.0)
>>> next(strategy)
Round(names=['a', 'b'], seconds=1.0, together=True)
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Collection, Generator, Hashable, Sequence
from typing import Any

Name = Any  # hashable
Times = dict[Name, float]

FINALISTS = 3
HOPELESS = 1.5  # a candidate this many times slower than the best leaves after a short look
HOPELESS_GROUP = 4.0  # so does a whole group by its first member: tuning seldom gains as much


@dataclasses.dataclass(frozen=True)
class Round:
    """Time each of ``names`` for ``seconds``; ``together``: interleaved, so that small gaps can be told."""

    names: list[Name]
    seconds: float
    together: bool


Strategy = Generator[Round, Times, None]


def exhaustive(names: Sequence[Name], look: float, final: float, keep: Collection[Name] = ()) -> Strategy:
    """A look of ``look`` seconds at each, then the final of ``final`` seconds each."""
    times: Times = {}
    if len(names) > FINALISTS + len(keep):
        times |= yield Round(list(names), look, together=False)
        names = _finalists(names, times, keep)
    yield from _final(names, final)


def sampled(
    names: Sequence[Name], look: float, final: float, count: int, seed: int = 0, keep: Collection[Name] = ()
) -> Strategy:
    """``exhaustive`` over ``keep`` and a random choice of the others, ``count`` in all."""
    others = [n for n in names if n not in keep]
    chosen = set(random.Random(seed).sample(others, min(len(others), max(0, count - len(keep)))))
    return exhaustive([n for n in names if n in keep or n in chosen], look, final, keep)


def halving(
    names: Sequence[Name],
    look: float,
    final: float,
    keep: Collection[Name] = (),
    group: Callable[[Name], Hashable] = lambda name: None,
) -> Strategy:
    """Successive halving: short looks at many one by one, then the final.

    One ``group`` after the other is looked at, in the order of their first members: where that one is hopeless, no
    other of its group but those to keep. Then half of the candidates leave after each look, and the looks grow longer.
    Where time may run out, what comes first in ``names`` is looked at first: see ``nearest``.
    """
    times: Times = {}
    if len(names) > FINALISTS + len(keep):
        groups: dict[Hashable, list[Name]] = {}
        for name in names:
            groups.setdefault(group(name), []).append(name)
        for first, *others in groups.values():
            times |= yield Round([first], look, together=False)
            if times.get(first, 0.0) > HOPELESS_GROUP * min(times.values(), default=0.0):
                others = [n for n in others if n in keep]
            if others:
                times |= yield Round(others, look, together=False)
        rivals = [n for n in times if n not in keep]
        while True:
            rivals = [n for n in sorted(rivals, key=times.__getitem__) if times[n] <= HOPELESS * min(times.values())]
            rivals = rivals[: max(FINALISTS, len(rivals) // 2)]
            if len(rivals) <= FINALISTS:
                break
            look *= 2
            again = yield Round(rivals, look, together=False)
            rivals, times = [n for n in rivals if n in again], times | again
        names = _finalists([n for n in names if n in rivals or n in keep], times, keep)
    yield from _final(names, final)


def nearest(names: Sequence[Name], to: Collection[Name], distance: Callable[[Name, Name], float]) -> list[Name]:
    """``names`` by their distance to the nearest of ``to``: what won before and its neighbours come first."""
    return sorted(names, key=lambda n: min((distance(n, t) for t in to), default=0.0))


def _finalists(names: Sequence[Name], times: Times, keep: Collection[Name]) -> list[Name]:
    """Those to keep that did not fail, and the best of the others, in the order of ``names``."""
    best = sorted((n for n in names if n in times and n not in keep), key=times.__getitem__)[:FINALISTS]
    return [n for n in names if n in best or (n in keep and n in times)]


def _final(names: Sequence[Name], seconds: float) -> Strategy:
    if names:
        yield Round(list(names), seconds, together=True)
