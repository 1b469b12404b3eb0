"""The tuner: candidates are admitted by the gate, timed as a search strategy asks, and the best one is named.

It knows no op. A candidate is a name and a callable; the gate is a function that says why a name must not win. A
candidate that fails is a trial with a reason: data, not an error.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping

import torch

from ..profiling import timer
from ..profiling.device import Device
from .search import HOPELESS_GROUP, Name, Round, Strategy

SLOW_S = 0.1  # a quicker call is timed however slow it seems: launching, or a busy neighbour, may have been the cost


@dataclasses.dataclass(frozen=True)
class Trial:
    """What became of one candidate: a timing, or the reason why there is none."""

    name: Name
    timing: timer.Timing | None = None
    reason: str = ""
    final: bool = False  # timed in the last, interleaved round: comparable with the others of that round


@dataclasses.dataclass(frozen=True)
class Result:
    """Every candidate that was tried, in the order of the trials, and the winner: None if nothing passed."""

    trials: dict[Name, Trial]
    winner: Name | None
    default: Name

    @property
    def gain(self) -> float:
        """The default's time over the winner's, from the final; NaN where the default did not get there."""
        default, winner = self.trials.get(self.default), self.trials.get(self.winner)
        if default is None or winner is None or default.timing is None or winner.timing is None:
            return float("nan")
        return default.timing.median_s / winner.timing.median_s


def tune(
    candidates: Mapping[Name, Callable[[], object]],
    gate: Callable[[Name], str | None],
    device: Device,
    strategy: Strategy,
    default: Name,
    progress: Callable[[Trial], None] = lambda trial: None,
) -> Result:
    """Find the fastest candidate that passes the gate.

    candidates: name -> callable that runs it once on the problem to tune for. gate(name): None, or why its result is
    wrong; asked once for each name, before it is timed. default: what runs if nobody tunes; it is replaced only if
    the gap exceeds the noise. progress: called with each trial as it is made.
    """
    trials: dict[Name, Trial] = {}
    slow: dict[Name, float] = {}  # refused for it: the strategy is told, so that it draws its conclusions

    def note(trial: Trial) -> None:
        trials[trial.name] = trial
        progress(trial)

    def admitted(name: Name) -> bool:
        if name not in trials:
            best = min((t.timing.median_s for t in trials.values() if t.timing is not None), default=math.inf)
            reason, seconds = _refusal(name, candidates[name], gate, device, best)
            note(Trial(name, reason=reason))
            if seconds is not None:
                slow[name] = seconds
        return not trials[name].reason

    def time_all(names: list[Name], request: Round) -> dict[Name, float]:
        passed = [n for n in names if admitted(n)]
        # the timer wants strings for names
        callables = {str(i): candidates[n] for i, n in enumerate(passed)}
        try:
            timings = timer.compare(callables, device, seconds=request.seconds).values()
        except Exception as e:
            if len(passed) == 1:
                note(Trial(passed[0], reason=_said(e)))
                return {}
            # together they may not fit, or one fails only now: alone, the others still count
            return {name: s for n in passed for name, s in time_all([n], request).items()}
        for n, timing in zip(passed, timings, strict=True):
            note(Trial(n, timing, final=request.together))
        return {n: slow[n] for n in names if n in slow} | {n: t.median_s for n, t in zip(passed, timings, strict=True)}

    request = next(strategy, None)
    while request is not None:
        batches = [request.names] if request.together else [[n] for n in request.names]
        times: dict[Name, float] = {}
        for batch in batches:
            times |= time_all(batch, request)
        try:
            request = strategy.send(times)
        except StopIteration:
            request = None
    return Result(trials, _winner(trials.values(), default), default)


def _refusal(
    name: Name, run: Callable[[], object], gate: Callable[[Name], str | None], device: Device, best: float
) -> tuple[str, float | None]:
    """Why the candidate may not take part, empty if it may: it is wrong, raises, or takes the seconds given beside."""

    def call() -> float:
        begin = time.perf_counter()
        run()
        if device.kind == "cuda":
            torch.cuda.synchronize(device.torch)
        return time.perf_counter() - begin

    limit = max(SLOW_S, HOPELESS_GROUP * best)
    try:
        reason = gate(name)
        # the first call may compile
        if reason is None and call() > limit and (seconds := call()) > limit:
            return f"more than {HOPELESS_GROUP:g} times slower than the best", seconds
    except Exception as e:
        reason = _said(e)
    return reason or "", None


def _said(e: Exception) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def _winner(trials: Collection[Trial], default: Name) -> Name | None:
    """The fastest finalist; the default unless its lower quartile is above the fastest one's upper quartile."""
    finalists = {t.name: t.timing for t in trials if t.final and t.timing is not None}
    if not finalists:
        return None
    best = min(finalists, key=lambda n: finalists[n].median_s)
    if default in finalists and finalists[best].high_s >= finalists[default].low_s:
        return default
    return best
