"""The tuner: candidates are admitted by the gate, timed as a search strategy asks, and the best one is named.

It knows no op and runs nothing itself: a ``Runner`` does. A candidate that is wrong, raises, hangs or takes its
process along is a trial with a reason: data, not an error.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from ..profiling.timer import Timing
from .search import Name, Strategy
from .worker import Failed, Lost

LOOKS = 0.6  # of the budget: when it is spent no further candidate is looked at, and the final is held
FLOOR = 0.005  # of a median: no timing is believed to be better than this


@dataclasses.dataclass(frozen=True)
class Trial:
    """What became of one candidate: a timing, or the reason why there is none."""

    name: Name
    timing: Timing | None = None
    reason: str = ""
    final: bool = False  # timed in the last, interleaved round: comparable with the others of that round


@dataclasses.dataclass(frozen=True)
class Result:
    """Every candidate that was tried, in the order of the trials, and the winner: None if nothing passed."""

    trials: dict[Name, Trial]
    winner: Name | None
    default: Name
    seconds: float = 0.0  # what the whole took
    unseen: int = 0  # candidates for which there was no time

    @property
    def gain(self) -> float:
        """The default's time over the winner's, from the final; NaN where the default did not get there."""
        default, winner = self.trials.get(self.default), self.trials.get(self.winner)
        if default is None or winner is None or default.timing is None or winner.timing is None:
            return float("nan")
        return default.timing.median_s / winner.timing.median_s


class Runner(Protocol):
    """What judges and times candidates. Errors of all its methods: worker.Failed and worker.Lost."""

    def expect(self, names: Sequence[Name]) -> None:
        """These will be asked for next, in this order, before what else is expected: a hint, to compile them meanwhile.

        None of them: nothing else will be asked for.
        """

    def next(self, names: Sequence[Name], patience: float) -> Name | None:
        """Which of these to look at next; None if it takes more than so many seconds until one is compiled."""

    def judge(self, name: Name) -> str | None:
        """None, or why the candidate must not win."""

    def time(self, names: Sequence[Name], seconds: float) -> list[Timing]:
        """Time candidates in interleaved rounds, each for ``seconds``."""


def tune(
    runner: Runner,
    strategy: Strategy,
    default: Name,
    budget: float = math.inf,
    progress: Callable[[Trial], None] = lambda trial: None,
    *,
    finalists_only: bool = False,
) -> Result:
    """Find the fastest candidate that passes the gate.

    default: what runs if nobody tunes; it is replaced only if the gap exceeds the noise, see ``noise``. budget:
    seconds for all of it; what is being compiled or timed as they end is finished, and the final is always held.
    progress: called with each trial as it is made. finalists_only: judge none but those that reach the final, for
    a bound on what tuning can find in less time; of the others, a trial then says nothing about right or wrong.
    """
    trials: dict[Name, Trial] = {}
    judged: set[Name] = set()
    begin = time.perf_counter()
    unseen: set[Name] = set()

    def note(trial: Trial) -> None:
        trials[trial.name] = trial
        progress(trial)

    def admitted(name: Name) -> bool:
        if name not in judged and not (name in trials and trials[name].reason):
            judged.add(name)
            try:
                reason = runner.judge(name)
            except (Failed, Lost) as e:
                reason = str(e)
            if reason or name not in trials:
                note(Trial(name, reason=reason or ""))
        return not trials[name].reason

    def timed(names: list[Name], seconds: float, final: bool) -> dict[Name, float]:
        try:
            timings = runner.time(names, seconds) if names else []
        except (Failed, Lost) as e:
            if len(names) == 1:
                note(Trial(names[0], reason=str(e)))
                return {}
            # one of them fails only now, or together they do not fit: alone, the others still count
            alone = {n: s for name in names for n, s in timed([name], seconds, final).items()}
            return timed(list(alone), seconds, final) if 1 < len(alone) < len(names) else alone
        for n, timing in zip(names, timings, strict=True):
            note(Trial(n, timing, final=final))
        return {n: t.median_s for n, t in zip(names, timings, strict=True)}

    def looks(names: list[Name], seconds: float) -> dict[Name, float]:
        left = list(names)
        times: dict[Name, float] = {}
        while left:
            patience = LOOKS * budget - (time.perf_counter() - begin)
            # whatever the budget, the first candidate of all is looked at
            name = left[0] if not trials else runner.next(left, patience) if patience > 0 else None
            if name is None:
                break
            left.remove(name)
            times |= timed([name], seconds, False) if finalists_only or admitted(name) else {}
        for name in left:
            if (earlier := trials.get(name)) is None:
                unseen.add(name)
            elif earlier.timing:
                times[name] = earlier.timing.median_s
        return times

    request = next(strategy, None)
    while request is not None:
        runner.expect([n for n in request.names if n not in trials])
        if request.together:
            times = timed([n for n in request.names if admitted(n)], request.seconds, True)
        else:
            times = looks(request.names, request.seconds)
        try:
            request = strategy.send(times)
        except StopIteration:
            request = None
    runner.expect([])
    return Result(trials, _winner(trials.values(), default), default, time.perf_counter() - begin, len(unseen))


def noise(timing: Timing) -> float:
    """Seconds on either side of a median: two timings of one thing lie further apart than both in 1 case of 20.

    The notch of a box plot: McGill, Tukey and Larsen 1978, 1.57 times the quartiles' distance over sqrt(runs).
    """
    return max(1.57 * (timing.high_s - timing.low_s) / math.sqrt(timing.runs), FLOOR * timing.median_s)


def _winner(trials: Collection[Trial], default: Name) -> Name | None:
    """The fastest finalist; the default unless the noise intervals of the two are apart."""
    finalists = {t.name: t.timing for t in trials if t.final and t.timing is not None}
    if not finalists:
        return None
    best = min(finalists, key=lambda n: finalists[n].median_s)
    if default in finalists:
        ours, theirs = finalists[best], finalists[default]
        if ours.median_s + noise(ours) >= theirs.median_s - noise(theirs):
            return default
    return best
