"""Tuning composed: an op's candidates, processes that try them, a search, and the store of what won.

    tune(problem, budget)            tune one problem, keep the result, and use it from now on
    on_first_use(budget)             within it, what is not tuned yet is tuned when it is first run
    Session                          many problems, one after the other, in the same processes

Both functions are ``scan_kernels.autotune``'s. Under torch.distributed rank 0 tunes, and every rank takes its choice.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from types import ModuleType
from typing import Any

import torch

from . import check
from .autotune import search, store, tuner
from .autotune.worker import Failed, Lost, Worker
from .op import Choice, Op, config_from_dict
from .profiling import timer
from .profiling.device import Device, describe

BUDGETS = {"quick": 15.0, "full": math.inf}  # seconds a problem
PATIENCE_S = 20.0  # without an answer a candidate counts as hung
COMPILING = 6  # times as long if it may be compiling
LEFTOVER_S = 5.0  # that an ended search's compiling may take in all; a new process is as long in starting
READY_S = 300.0  # for what all candidates of a problem share: tensors, references, the default's compilation
MOST_COMPILERS = 12
ALIKE = ("direction", "dtype", "state", "layout")  # problems that agree in these tend to agree in what is best
Name = tuple[str, Any]  # backend, Config


class Session:
    """Tunes problems of one op on one device. Its processes live until ``close``, or as long as its ``with`` block.

    patience: seconds without an answer after which a candidate counts as hung. compilers: processes that compile what
    comes next while a candidate is timed; by default up to ``MOST_COMPILERS`` on a GPU's host, none on a CPU, where
    they would disturb what is timed. bench: "module:name" of what runs in them.
    """

    def __init__(
        self, op: Op, device: Device, *, patience: float = PATIENCE_S, compilers: int | None = None,
        bench: str = "scan_kernels.trials:Bench",
    ):  # fmt: skip
        if compilers is None:
            compilers = min(MOST_COMPILERS, (os.cpu_count() or 1) * 3 // 4) if device.kind == "cuda" else 0
        self.op, self.device, self.patience = op, device, patience
        where = str(device.torch)
        self._worker = Worker(bench, preload=True, op=op.name, device=where)
        self._compilers = [_Compiler(Worker(bench, preload=True, op=op.name, device=where)) for _ in range(compilers)]
        self._took: dict[tuple[str, bool], collections.deque[float]] = {}  # by backend, and whether in parts
        self._winners = _earlier_winners(op, device)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for worker in (self._worker, *(c.worker for c in self._compilers)):
            worker.close()

    def tune(
        self,
        problem: Any,
        budget: float = BUDGETS["quick"],
        backends: Sequence[str] | None = None,
        progress: Callable[[tuner.Trial], None] = lambda trial: None,
        *,
        finalists_only: bool = False,
    ) -> tuner.Result:
        """Try candidates of ``backends`` (None: of all), and of the others what they run as things stand.

        budget: seconds; with ``BUDGETS["full"]`` every candidate is looked at. finalists_only: see ``tuner.tune``.
        Errors: BackendUnavailable where none, or not one of ``backends``, can run the problem.
        """
        names, default, keep = self._candidates(problem, backends)
        # what the search waits for first, and one of each backend, for what takes long to compile is asked for last
        firsts = [next(n for n in names if n[0] == backend) for backend in dict.fromkeys(n[0] for n in names)]
        remote = _Remote(self, problem, gates=not finalists_only, apart=firsts)
        for c in self._compilers:
            c.deadline = min(c.deadline, c.begun + LEFTOVER_S)
        opposite = self._opposite(problem)
        remote.expect([*dict.fromkeys([*firsts, *names])])
        self._worker.start()
        begin = time.perf_counter()
        remote.until = time.monotonic() + tuner.LOOKS * budget
        while opposite():
            remote._feed()
            time.sleep(0.002)
        with contextlib.suppress(Failed, Lost):  # each candidate says so for itself
            remote.ready()
        seconds = min(budget, 60.0)
        look, final = min(0.2, seconds / 300), min(1.0, seconds / 30)
        if math.isinf(budget):
            strategy = search.exhaustive(names, look, final, keep)
        else:
            strategy = search.halving(names, look, final, keep, group=lambda name: name[0])
        left = budget - (time.perf_counter() - begin)
        result = tuner.tune(remote, strategy, default, left, progress, finalists_only=finalists_only)
        if result.winner is not None:
            self._winners.append((problem.bucket(), result.winner))
        return dataclasses.replace(result, seconds=time.perf_counter() - begin)

    def time(self, problem: Any, names: Sequence[Name], seconds: float) -> list[timer.Timing]:
        """Time candidates that passed before against each other, each for ``seconds``. Errors: Failed and Lost."""
        return _Remote(self, problem).time(names, seconds)

    def forget(self) -> None:
        """Begin the next search as if nothing had been tuned here."""
        self._winners.clear()

    def verify(self, problem: Any, backend: str, config: Any) -> str | None:
        """None, or what is wrong with a choice for a problem."""
        try:
            return _Remote(self, problem).judge((backend, config))
        except (Failed, Lost) as e:
            return str(e)

    def bound(self, problem: Any) -> float:
        """Seconds that the device needs at least for a problem; 0 where that cannot be told."""
        try:
            return self._worker.ask("bound", READY_S, problem=problem.key())
        except (Failed, Lost):
            return 0.0

    def publish(self, problem: Any, result: tuner.Result) -> dict[str, Any]:
        """Store the winner, and behind it the best configuration of every other backend that was timed.

        Returns the entry. Errors: OSError where it cannot be written; this process uses it all the same.
        """
        choices = _choices(result)
        measured = problem.key()
        found = [store.Entry(c["backend"], c["config"], "tuned", measured) for c in choices]
        self.op.settle(problem, self.device, found)
        entry = {
            "key": self.op.key(problem, self.device).as_dict(),
            "choices": choices,
            "default": _record(result.trials[result.default]),
            "measured": measured,
            "trials": [_record(t) for t in result.trials.values()],
            "unseen": result.unseen,
            "seconds": round(result.seconds, 2),
            "clocks": self._clocks(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        store.keep(entry)
        return entry

    def _opposite(self, problem: Any) -> Callable[[], bool]:
        """Have the default of the other direction compiled, if it takes part in judging; says if that goes on still."""
        other = self.op.cases.opposite(problem)
        if other is None or not self._compilers:
            return lambda: False
        choice = self.op.resolve(other, self.device.torch)
        name = choice.backend, choice.config
        remote = _Remote(self, other, apart=[name])
        remote.expect([name])
        return lambda: remote._is_at(name)

    def _clocks(self) -> dict[str, int]:
        try:
            return self._worker.ask("clocks", READY_S)
        except (Failed, Lost):
            return {}

    def _candidates(self, problem: Any, backends: Sequence[str] | None) -> tuple[list[Name], Name, list[Name]]:
        """(all, the heuristic that runs if nobody tunes, those that the final must hold), what is likely best first."""
        op, device = self.op, self.device
        for name in backends or ():
            op.backend(name, problem)
        usable = [name for name, reason in op.reasons(problem).items() if reason is None]
        if not usable:
            op.resolve(problem, device.torch)  # raises, with the reasons
        offered = {name: op.backends[name].configs(problem, device) for name in usable}  # type: ignore[union-attr]
        default = (usable[0], offered[usable[0]][0])
        keep = [default, *_stored(op, problem, device)]
        keep = [k for k in keep if not backends or k[0] in backends or k == default]
        others: list[Name] = []
        for name in usable:
            if backends and name not in backends:
                keep.append((name, op.resolve(problem, device.torch, name).config))
            else:
                others += [(name, config) for config in offered[name]]
        bucket = problem.bucket()
        alike = [name for b, name in self._winners if all(b.get(k) == bucket[k] for k in ALIKE)]
        others = search.nearest(others, alike, _steps_between)
        return list(dict.fromkeys([*keep, *others])), default, list(dict.fromkeys(keep))


def _earlier_winners(op: Op, device: Device) -> list[tuple[dict[str, Any], Name]]:
    """(bucket, what won) of all that is kept for this device, whatever versions it was tuned with."""
    found = []
    for _, entry in store.entries():
        if isinstance(entry, dict) and (entry["key"].get("op"), entry["key"]["device"].get("name")) == (
            op.name,
            device.name,
        ):
            best = entry["choices"][0]
            module = op.backends.get(best["backend"])
            config = config_from_dict(module.Config, best["config"]) if isinstance(module, ModuleType) else None
            if config is not None:
                found.append((entry["key"]["problem"], (best["backend"], config)))
    return found


def _stored(op: Op, problem: Any, device: Device) -> list[Name]:
    """What the store has for the problem: the first choice of each source that can run it."""
    found: dict[str, Name] = {}
    for entry in store.lookup(op.key(problem, device)):
        config, _ = op.accept(problem, device, entry.backend, entry.config, entry.measured)
        if config is not None:
            found.setdefault(entry.source, (entry.backend, config))
    return list(found.values())


def _steps_between(a: Name, b: Name) -> float:
    """How many fields of two candidates differ; more than any where their backends do."""
    if a[0] != b[0]:
        return 1000.0
    return sum(getattr(a[1], f.name) != getattr(b[1], f.name) for f in dataclasses.fields(a[1]))


class _Compiler:
    """A process that compiles, and what it is at."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self.job: tuple[_Remote, Name, int | None] | None = None
        self.begun = self.deadline = 0.0
        self.warm = False  # the first job of a process also waits for its libraries and its context on the device


class _Remote:
    """The tuner's Runner for one problem: asks the session's processes.

    gates: compile ahead what judging takes. apart: candidates of which each input of the gate is compiled by a process
    of its own; it is sooner done, but kernels that inputs share are then compiled several times.
    """

    def __init__(self, session: Session, problem: Any, gates: bool = True, apart: Sequence[Name] = ()):
        self.session, self.problem, self.gates, self.apart = session, problem, gates, apart
        self.queue: list[tuple[Name, int | None]] = []
        self.begun: dict[Name, set[int | None]] = {}
        self.done: dict[Name, set[int | None]] = {}
        self.until = math.inf  # what is not compiled by then is not looked at
        self.compiled: dict[Name, str | None] = {}  # None, or what went wrong; a name that is not here was not begun
        self.trusted: tuple[str, dict[str, Any]] | None = None  # the first that passed, whichever worker judged it

    def expect(self, names: Sequence[Name]) -> None:
        asked = []
        if self.session._compilers:
            left = [n for n in names if n not in self.compiled]
            asked = [(n, part) for n in left for part in self._parts(n) if part not in self.begun.get(n, ())]
        others = dict.fromkeys(self.queue if names else ())
        self.queue = list(dict.fromkeys(asked) | others)
        self._feed()

    def _parts(self, name: Name) -> list[int | None]:
        """What is compiled of it in one go, as ``Bench.compile`` has it."""
        if not self.gates:
            return [-1]
        return [-1, *range(len(self.session.op.cases.gates(self.problem)))] if name in self.apart else [None]

    def ready(self) -> None:
        """Have made what all candidates share, also in a worker that took a lost one's place."""
        self._ask("ready", READY_S)

    def next(self, names: Sequence[Name], patience: float) -> Name | None:
        """One that is compiled; None where none is, or will be in time. The first where nobody compiles ahead."""
        deadline = time.monotonic() + patience
        while self.session._compilers:
            self._feed()
            if (found := next((n for n in names if n in self.compiled), None)) is not None:
                return found
            queued = {n for n, _ in self.queue}
            if time.monotonic() > deadline or not any(n in queued or self._is_at(n) for n in names):
                return None
            time.sleep(0.002)
        return names[0]

    def judge(self, name: Name) -> str | None:
        self.ready()
        if (reason := self._compile(name)) is not None:
            return reason
        patience = self.session.patience * (1 if self.gates and self._is_ahead(name) else COMPILING)
        backend, config = name[0], dataclasses.asdict(name[1])
        reason = self._ask("judge", patience, backend=backend, config=config, trusted=self.trusted)
        if reason is None and self.trusted is None:
            self.trusted = backend, config
        return reason

    def time(self, names: Sequence[Name], seconds: float) -> list[timer.Timing]:
        self.ready()
        for name in names:
            if (reason := self._compile(name)) is not None:
                raise Failed(reason)
        patience = self.session.patience * (1 if self.gates or all(map(self._is_ahead, names)) else COMPILING)
        patience += 10 * len(names) * seconds
        candidates = [(backend, dataclasses.asdict(config)) for backend, config in names]
        return [timer.Timing(**t) for t in self._ask("time", patience, candidates=candidates, seconds=seconds)]

    def _is_ahead(self, name: Name) -> bool:
        """Whether all that it launches is compiled: a backend need not be able to without launching it."""
        module = self.session.op.backends[name[0]]
        return name in self.compiled and hasattr(module, f"prepare_{self.problem.direction}")

    def _is_at(self, name: Name) -> bool:
        return any(c.job is not None and c.job[:2] == (self, name) for c in self.session._compilers)

    def _compile(self, name: Name) -> str | None:
        """Wait for processes that compile it, or have none begin; None, or what went wrong there."""
        while self._is_at(name):
            self._feed()
            time.sleep(0.002)
        self._forget(name)
        return self.compiled.get(name)

    def _forget(self, name: Name) -> None:
        """Have no more of it compiled."""
        self.queue = [(n, part) for n, part in self.queue if n != name]

    def _ask(self, method: str, timeout: float, **arguments: Any) -> Any:
        """Ask the worker; while it works, keep the compilers fed."""
        worker = self.session._worker
        worker.post(method, problem=self.problem.key(), **arguments)
        deadline = time.monotonic() + timeout
        while self.session._compilers and not worker.ready() and time.monotonic() < deadline:
            self._feed()
            time.sleep(0.002)
        return worker.receive(max(0.0, deadline - time.monotonic()))

    def _feed(self) -> None:
        """Collect what is compiled, give up on what hangs, and hand out what is next."""
        now = time.monotonic()
        for c in self.session._compilers:
            late = now > c.deadline
            if c.job is not None and (late or c.worker.ready()):
                (remote, name, part), c.job = c.job, None
                remote.done.setdefault(name, set()).add(part)
                if len(remote.done[name]) == len(remote._parts(name)):
                    remote.compiled.setdefault(name, None)
                if late or c.warm:
                    # what is ended here would have taken longer
                    remote._times(name, part).append((1 + late) * (now - c.begun))
                c.warm = True
                try:
                    c.worker.receive(0.0 if late else 1.0)
                except Failed:
                    pass  # it says so again where it is judged
                except Lost as e:
                    remote.compiled[name], c.warm = f"compiling: {e}", False
                    remote._forget(name)
            while c.job is None and self.queue:
                name, part = self.queue.pop(0)
                if now + statistics.median(self._times(name, part) or [0.0]) > self.until:
                    self._forget(name)  # it would be done too late, and in the next search's way
                    continue
                c.job, c.begun, c.deadline = (self, name, part), now, now + COMPILING * self.session.patience
                self.begun.setdefault(name, set()).add(part)
                job = {"backend": name[0], "config": dataclasses.asdict(name[1]), "part": part}
                c.worker.post("compile", problem=self.problem.key(), **job)

    def _times(self, name: Name, part: int | None) -> collections.deque[float]:
        """How long compiling such a candidate, or such a part of one, took of late."""
        return self.session._took.setdefault((name[0], part is not None), collections.deque(maxlen=9))


def _choices(result: tuner.Result) -> list[dict[str, Any]]:
    timed = [(t, t.timing.median_s) for t in result.trials.values() if t.timing is not None]
    best: dict[str, tuner.Trial] = {}
    for trial, _ in sorted(timed, key=lambda pair: (pair[0].name != result.winner, not pair[0].final, pair[1])):
        best.setdefault(trial.name[0], trial)
    return [_record(t, "backend", "config", "seconds") for t in best.values()]


def _record(trial: tuner.Trial, *only: str) -> dict[str, Any]:
    backend, config = trial.name
    record: dict[str, Any] = {"backend": backend, "config": dataclasses.asdict(config)}
    if trial.timing is None:
        record["reason"] = trial.reason
    else:
        t = trial.timing
        record |= {"seconds": t.median_s, "low": t.low_s, "high": t.high_s, "runs": t.runs, "final": trial.final}
    return {k: v for k, v in record.items() if not only or k in only}


# ---- from Python -----------------------------------------------------------------------------------------------------


def seconds_of(budget: str | float) -> float:
    """A budget's seconds; ValueError that says what was expected."""
    if isinstance(budget, str) and budget in BUDGETS:
        return BUDGETS[budget]
    with contextlib.suppress(TypeError, ValueError):
        if math.isfinite(seconds := float(budget)) and seconds > 0:
            return seconds
    raise ValueError(f"budget: expected {', '.join(BUDGETS)} or seconds above 0, got {budget!r}")


def op_of(problem: Any) -> Op:
    """The op whose problem this is; TypeError where there is none."""
    for name in check.OPS:
        if isinstance(problem, (op := check.find_op(name)).problem_type):
            return op
    raise TypeError(f"problem: expected an op's Problem, got {type(problem).__name__}")


def tune(problem: Any, budget: str | float = "quick", device: torch.device | str | None = None) -> Choice:
    """Tune one problem: find the fastest backend and configuration that are right, keep them, and use them.

    problem: an op's ``Problem``. budget: "quick" (15 s), "full" (every candidate) or seconds. device: where it runs;
    by default the current device of ``problem.device``. Takes processes of its own, which start by importing torch.

    Under torch.distributed all ranks must call it with the same problem: rank 0 tunes, and all take its choice. A
    deterministic problem keeps the choice that this process, or the store, has of it.

    Errors: TypeError or ValueError that names the argument; BackendUnavailable where nothing can run the problem;
    RuntimeError where every candidate was rejected. A store that cannot be written is a warning.
    """
    op, seconds = op_of(problem), seconds_of(budget)
    where = describe(device or problem.device)
    if _ranks() > 1:

        def here() -> list[dict[str, Any]]:
            found = _tuned(op, problem, where, seconds)
            chosen = op.resolve(problem, where.torch)  # of a deterministic problem, maybe not what was found
            first = {"backend": chosen.backend, "config": dataclasses.asdict(chosen.config)}
            return [first, *({k: c[k] for k in first} for c in found)]

        said = _from_rank_0(here)
        found = [store.Entry(c["backend"], c["config"], "tuned", problem.key()) for c in said]
        op.settle(problem, where, found, always=True)
    else:
        _tuned(op, problem, where, seconds)
    return op.resolve(problem, where.torch)


def _tuned(op: Op, problem: Any, device: Device, seconds: float) -> list[dict[str, Any]]:
    """Tune, store and settle; returns the choices."""
    found = list(store.lookup(op.key(problem, device)))
    if problem.deterministic and found and found[0].source == "tuned":
        return [{"backend": e.backend, "config": e.config} for e in found if e.source == "tuned"]
    with Session(op, device) as session:
        result = session.tune(problem, seconds)
        if result.winner is None:
            reasons = "; ".join(dict.fromkeys(f"{t.name[0]}: {t.reason}" for t in result.trials.values()))
            raise RuntimeError(f"{op.name}: no candidate passed the gate: {reasons}")
        try:
            session.publish(problem, result)
        except OSError as e:
            warnings.warn(f"{op.name}: what tuning found cannot be stored: {e}", stacklevel=3)
    return _choices(result)


@contextlib.contextmanager
def on_first_use(budget: str | float = "quick") -> Iterator[None]:
    """Within this context, a problem for which nothing is tuned or shipped is tuned before it first runs.

    Only calls with ``backend="auto"`` and no config, and none while a CUDA graph is captured. Where tuning fails, a
    warning says why and the heuristic runs. Under torch.distributed all ranks must meet the same problems in the same
    order. budget: see ``tune``.
    """
    seconds_of(budget)

    def tune_it(problem: Any, device: Device) -> None:
        if device.kind == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        try:
            tune(problem, budget, device.torch)
        except Exception as e:
            warnings.warn(f"tuning failed, the heuristic runs: {type(e).__name__}: {e}", stacklevel=2)

    ops = [check.find_op(name) for name in check.OPS]
    before = [op.on_untuned for op in ops]
    for op in ops:
        op.on_untuned = tune_it
        op.forget()
    try:
        yield
    finally:
        for op, hook in zip(ops, before, strict=True):
            op.on_untuned = hook


def _ranks() -> int:
    d = torch.distributed
    return d.get_world_size() if d.is_available() and d.is_initialized() else 1


def _from_rank_0(compute: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What rank 0 computed, on every rank, as JSON; an error of rank 0 is raised on every rank."""
    d = torch.distributed
    where = torch.device("cuda", torch.cuda.current_device()) if d.get_backend() == "nccl" else torch.device("cpu")
    said: dict[str, Any] = {}
    if d.get_rank() == 0:
        try:
            said = {"choices": compute()}
        except Exception as e:
            said = {"error": f"{type(e).__name__}: {e}"}
    text = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8).to(where)
    size = torch.tensor([text.numel()], device=where)
    d.broadcast(size, 0)
    if d.get_rank():
        text = torch.empty(int(size), dtype=torch.uint8, device=where)
    d.broadcast(text, 0)
    said = json.loads(bytes(text.cpu().tolist()))
    if "error" in said:
        raise RuntimeError(f"tuning failed on rank 0: {said['error']}")
    return said["choices"]
