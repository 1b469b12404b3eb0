"""Time backends and peers on the same tensors, and put the problem's bound beside every time.

A use is one of ``cases.USES`` that a user can call: ``inference`` (forward without gradients), ``training`` (forward
that keeps what the backward needs) and ``backward`` (all gradients, through autograd); or ``step``, a training forward
and its backward in one call. What is timed is the call a user makes, not the kernel alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .op import Op
from .peers import Peer
from .profiling import roofline, timer
from .profiling.ceilings import Ceilings
from .profiling.device import Device

USES = ("inference", "backward", "training")
COLD = 0.5  # of the seconds of a measurement go to one with cold caches, too
SLOW = 1.0  # times those seconds: a call that takes longer is neither timed cold nor a second time
# how far a peer's result may be from ours, in norm, and still count as the same computation
AGREEMENT = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 3e-2}

Scan = Callable[..., Tensor]  # the arguments of the op's public function by name -> out


@dataclasses.dataclass(frozen=True)
class Runner:
    """Something that computes the op: one of our backends, or a peer."""

    name: str
    kind: str  # "backend" or "peer"
    scan: Scan
    unfit: Callable[[Any], str | None]  # problem -> why it is not run, or None
    alone: bool = False  # slow and fills the memory: timed by itself, while the allowance lasts
    backend: str = "auto"  # of a backend of ours, what the dispatch is asked for


@dataclasses.dataclass
class Allowance:
    """Seconds that may still be spent on slow runners, in all."""

    left: float


def backend(op: Op, name: str, function: Callable[..., Any]) -> Runner:
    """A backend of ours as a runner; function: the op's public function."""
    scan: Scan = functools.partial(function, backend=name)
    return Runner(name, "backend", scan, lambda p: op.reasons(p)[name], backend=name)


def peer(op: Op, other: Peer, device: Device) -> Runner:
    """A peer as a runner. Errors: ImportError where it is not installed."""
    return Runner(other.name, "peer", other.load(op), lambda p: other.unfit(p, device), other.materialises)


def call(scan: Scan, tensors: dict[str, Any], arguments: tuple[str, ...], use: str) -> Callable[[], Any]:
    """The call to time. It returns out, or all gradients with that of the first argument at their head."""
    given = {k: v for k, v in tensors.items() if k not in ("dout", "dlast_state")}
    if use == "inference":

        def inference() -> Tensor:
            with torch.no_grad():
                return scan(**given)

        return inference
    leaves = {k: given[k].detach().requires_grad_() for k in arguments if given[k] is not None}
    if use == "training":
        return lambda: scan(**given | leaves)
    if use == "step":
        return lambda: torch.autograd.grad(scan(**given | leaves), list(leaves.values()), tensors["dout"])
    held: list[Tensor] = []

    def backward() -> tuple[Tensor, ...]:
        # the first call is never timed. It also runs the forward, on the stream that the timer chose: autograd
        # works on the forward's stream, and a graph capture must not leave its own
        if not held:
            held.append(scan(**given | leaves))
        return torch.autograd.grad(held[0], list(leaves.values()), tensors["dout"], retain_graph=True)

    return backward


def bounds(problem: Any, ceilings: Ceilings) -> dict[str, Any]:
    """What a problem needs, as data: counts, seconds for each resource and unit, the bound, that with cold caches."""
    bound = roofline.bound(problem, ceilings)
    counts = {resource: getattr(problem, resource)() for resource in bound.needs}
    cold_s = roofline.bound(problem, ceilings, cold=True).seconds
    return {"elements": problem.elements, "counts": counts, **dataclasses.asdict(bound), "cold_s": cold_s}


def peak(fn: Callable[[], Any], device: Device) -> int | None:
    """Bytes that a call takes at its peak, beyond what was taken before; None where nobody tells.

    On a GPU, of torch's allocator; on a CPU, of the whole process, in whole pages. A first call, which may compile, is
    not counted. Errors: whatever ``fn`` raises.
    """
    fn()
    if device.kind == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what is free must not count as taken
        with open("/proc/self/clear_refs", "w", encoding="ascii") as f:
            f.write("5")  # the peak is now what is taken
        before = _resident("VmRSS")
        fn()
        return max(0, _resident("VmHWM") - before)
    return None


def _resident(name: str) -> int:
    """Bytes of a line of /proc/self/status. Errors: OSError where there is none."""
    with open("/proc/self/status", encoding="ascii") as f:
        for line in f:
            if line.startswith(name):
                return int(line.split()[1]) << 10
    raise OSError(f"no {name}")


def results(
    op: Op,
    case: Any,
    tensors: dict[str, Any],
    runners: list[Runner],
    device: Device,
    seconds: float,
    uses: tuple[str, ...] = USES,
    allowance: Allowance | None = None,
    cold: bool = False,
) -> Iterator[dict[str, Any]]:
    """Time every runner in every use of a case; one record each, as it is made.

    A backend that runs a tuned configuration is timed beside its own rule of thumb. cold: time with cold caches, too.

    Results are held against each other: a runner far from what most agree on gets no time, in this use and the next.
    allowance: for runners that are timed alone, spent over all cases it is passed to; what comes after gets no time.
    """
    allowance = allowance or Allowance(float("inf"))
    wrong: dict[str, str] = {}
    for use in uses:
        problem = case.used(use, device.kind)
        reasons = {r.name: r.unfit(problem) or wrong.get(r.name) for r in runners}
        differences: dict[str, float] = {}
        timings: dict[str, timer.Timing | str] = {}
        trusted = None
        if use != "training":
            light = [r for r in runners if reasons[r.name] is None and not r.alone]
            results = {r.name: _try(op, tensors, r, use, reasons) for r in light}
            trusted = _agree(results, AGREEMENT[case.dtype], wrong, differences)
            reasons |= wrong
            del results
        light = [r for r in runners if not (reasons[r.name] or r.alone)]
        untuned = _untuned(op, problem, light, device)
        timings |= _time(op, tensors, [*light, *untuned], use, device, seconds)
        quick = [r for r in light if isinstance(t := timings[r.name], timer.Timing) and t.median_s < SLOW * seconds]
        colds = _time(op, tensors, quick, use, device, COLD * seconds, cold=True) if cold else {}
        for r in (r for r in runners if reasons[r.name] is None and r.alone):
            if allowance.left <= 0:
                reasons[r.name] = "the time for slow implementations was used up"
                continue
            begin = time.perf_counter()
            if use != "training":
                got = _try(op, tensors, r, use, reasons)
                _agree({"the backends": trusted, r.name: got}, AGREEMENT[case.dtype], wrong, differences)
                reasons[r.name] = reasons[r.name] or wrong.get(r.name)
                del got
            if reasons[r.name] is None:
                timings |= _time(op, tensors, [r], use, device, seconds)
            allowance.left -= time.perf_counter() - begin
        for r in runners:
            record: dict[str, Any] = {"runner": r.name, "kind": r.kind, "use": use}
            outcome = reasons[r.name] or timings[r.name]
            if isinstance(outcome, str):
                yield record | {"reason": outcome}
                continue
            record |= dataclasses.asdict(outcome)
            if r.name in differences:
                record["difference"] = differences[r.name]
            if r.kind == "backend":
                choice = op.resolve(problem, device.torch, r.backend)
                record |= {"config": dataclasses.asdict(choice.config), "chosen": choice.source}
            if isinstance(beside := timings.get(r.name + UNTUNED), timer.Timing):
                record["untuned_s"] = beside.median_s
            if isinstance(at_first := colds.get(r.name), timer.Timing):
                record["cold"] = {"median_s": at_first.median_s, "low_s": at_first.low_s, "high_s": at_first.high_s,
                                  "runs": at_first.runs, "method": at_first.method}  # fmt: skip
            yield record


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """One record of two of the same call at different times: means, and ``passes``, the median of each time.

    How far apart those are tells what the spread within one measurement does not. If only one of them was disturbed,
    the other counts, and the disturbed one is named in ``set_aside``.
    """
    if "median_s" not in first or "median_s" not in second:
        return second if "median_s" in second else first
    if bool(first["disturbed"]) != bool(second["disturbed"]):
        aside = first if first["disturbed"] else second
        # of the first, what the second has not: cold caches
        return (first | second if aside is first else first) | {
            "set_aside": {"median_s": aside["median_s"], "disturbed": list(aside["disturbed"])}
        }
    found = first | {"runs": first["runs"] + second["runs"]}
    found["passes"] = [*first.get("passes", [first["median_s"]]), second["median_s"]]
    earlier = len(found["passes"]) - 1
    for key in ("median_s", "low_s", "high_s", "error_s", "untuned_s"):
        if key in first and key in second:
            found[key] = (earlier * first[key] + second[key]) / (earlier + 1)
    found["disturbed"] = list(dict.fromkeys([*first["disturbed"], *second["disturbed"]]))
    return found


UNTUNED = " by rule of thumb"


def _untuned(op: Op, problem: Any, runners: list[Runner], device: Device) -> list[Runner]:
    """For each backend that runs a choice of tuning, the same with the configuration it has without."""
    found = []
    for r in (r for r in runners if r.kind == "backend"):
        choice = op.resolve(problem, device.torch, r.backend)
        default = choice.module.configs(problem, device)[0]
        if choice.config != default:
            scan = functools.partial(r.scan, config={problem.direction: default})
            found.append(dataclasses.replace(r, name=r.name + UNTUNED, scan=scan))
    return found


def _try(op: Op, tensors: dict[str, Any], runner: Runner, use: str, reasons: dict[str, str | None]) -> Tensor | None:
    """out, or the first gradient, of one call; where it fails, None and the reason noted."""
    try:
        got = call(runner.scan, tensors, op.cases.ARGUMENTS, use)()
        return (got[0] if use == "backward" else got).detach()
    except Exception as e:
        reasons[runner.name] = words(e)
        return None


def _agree(
    results: dict[str, Tensor | None],
    tolerance: float,
    wrong: dict[str, str],
    differences: dict[str, float],
) -> Tensor | None:
    """The result that most others agree with, the first of equals; whoever is far from it is wrong.

    Where no two of several agree nobody knows who is right, so all are called wrong and nothing is returned.
    """
    made = {name: t for name, t in results.items() if t is not None}
    apart = {a: {b: float((made[b].float() - x.float()).norm() / x.float().norm()) for b in made if b != a}
             for a, x in made.items()}  # fmt: skip
    votes = {name: sum(d <= tolerance for d in others.values()) for name, others in apart.items()}
    if len(made) > 1 and not any(votes.values()):
        wrong |= dict.fromkeys(made, f"the results of {' and '.join(made)} disagree")
        return None
    if not made:
        return None
    trusted = max(votes, key=votes.__getitem__)
    for name, difference in apart[trusted].items():
        differences[name] = difference
        if not difference <= tolerance:
            wrong[name] = f"disagrees with {trusted} and others: {difference:.1e} in norm"
    return made[trusted]


def _time(
    op: Op, tensors: dict[str, Any], group: list[Runner], use: str, device: Device, seconds: float, cold: bool = False
) -> dict[str, timer.Timing | str]:
    def calls(runners: list[Runner]) -> dict[str, Callable[[], Any]]:
        return {r.name: call(r.scan, tensors, op.cases.ARGUMENTS, use) for r in runners}

    if not group:
        return {}
    try:
        return dict(timer.compare(calls(group), device, seconds=seconds, cold=cold))
    except Exception as e:
        if len(group) == 1:
            return {group[0].name: words(e)}
        # one of them failed: each by itself, and the one that fails says why
        return {k: v for r in group for k, v in _time(op, tensors, [r], use, device, seconds, cold).items()}
    finally:
        if device.kind == "cuda":
            torch.cuda.empty_cache()


def words(e: Exception) -> str:
    """An exception in one line, for a record."""
    if isinstance(e, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(e).__name__}: {e}".splitlines()[0][:200]
