"""Search strategies: which candidates to time next, for how long, and whether against each other.

A strategy is a generator. It yields a ``Round`` and is sent back the round's times, {name: median seconds}; a name
that is missing there failed. It knows nothing of what the names stand for.

>>> strategy = halving(["a", "b"], seconds=1.0)
>>> next(strategy)
Round(names=['a', 'b'], seconds=0.25, together=True)
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


def exhaustive(names: Sequence[Name], seconds: float) -> Strategy:
    """Everything, against each other, in equal shares of ``seconds``."""
    yield Round(list(names), seconds / max(1, len(names)), together=True)


def sampled(names: Sequence[Name], seconds: float, count: int, seed: int = 0, keep: Collection[Name] = ()) -> Strategy:
    """``keep`` and a random choice of the others, ``count`` in all, against each other."""
    others = [n for n in names if n not in keep]
    chosen = random.Random(seed).sample(others, min(len(others), max(0, count - len(keep))))
    return exhaustive([n for n in names if n in keep or n in chosen], seconds)


def halving(
    names: Sequence[Name],
    seconds: float,
    keep: Collection[Name] = (),
    group: Callable[[Name], Hashable] = lambda name: None,
) -> Strategy:
    """Successive halving: short looks at many one by one, then a final of the best and ``keep`` together.

    The first look is at the first of each ``group``: a group whose first is hopeless is looked at no further. Then
    half of the candidates leave after each look, and the looks grow longer. Looks and final share ``seconds``.
    """
    times: Times = {}
    look = seconds / 4 / max(1, len(names))
    if len(names) > FINALISTS + len(keep):
        firsts = list({group(n): n for n in reversed(names)}.values())[::-1]
        times |= yield Round(firsts, look, together=False)
        fastest = min(times.values(), default=0.0)
        lost = {group(n) for n in firsts if times.get(n, 0.0) > HOPELESS_GROUP * fastest}
        names = [n for n in names if n in times or (n not in firsts and group(n) not in lost)]
        rivals = [n for n in names if n not in keep]
        unseen = [n for n in names if n not in times]
        while unseen or len(rivals) > FINALISTS:
            times |= yield Round(unseen or rivals, look, together=False)
            rivals = sorted((n for n in rivals if n in times), key=times.__getitem__)
            rivals = [n for n in rivals if times[n] <= HOPELESS * min(times.values())]
            rivals = rivals[: max(FINALISTS, len(rivals) // 2)]
            unseen, look = [], 2 * look
        names = [n for n in names if n in rivals or (n in keep and n in times)]
    if names:
        yield Round(list(names), seconds / 2 / len(names), together=True)
