"""``tune``: time every candidate of every backend on named shapes, and keep what wins for this machine."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from . import BadArgument, console, fields, pick_device, seconds, table

if TYPE_CHECKING:
    from ..autotune.tuner import Result, Trial
    from ..op import Op
    from ..profiling.device import Device

DIRECTIONS = ("forward", "backward", "both")
BUDGET = {"cuda": 15.0, "cpu": 2.0}  # seconds of timing for a problem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", default="selective_scan", help="the op to tune (default: %(default)s)")
    parser.add_argument("--backend", action="append", help="try only this backend's candidates (may be repeated)")
    parser.add_argument("--device", help="cpu, cuda or cuda:INDEX; by default the GPU if there is one")
    parser.add_argument(
        "--shapes", nargs="+", default=["default"], metavar="SHAPE",
        help="default (layers of Mamba models), small, the name of a case, or batch,dim,length,state[,bf16|fp16|fp32]",
    )  # fmt: skip
    parser.add_argument("--direction", choices=DIRECTIONS, default="both")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS",
        help="seconds of timing for a problem, compiling and checking not counted (default: 15 on a GPU, 2 on a CPU)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..check import find_op

    try:
        op = find_op(args.op)
    except ValueError as e:
        raise BadArgument(str(e)) from None
    for name in args.backend or ():
        if name not in op.backends:
            raise BadArgument(f"--backend: expected one of {', '.join(op.backends)}, got {name!r}")
    device = pick_device(args.device)
    budget = BUDGET[device.kind] if args.budget is None else args.budget
    if not (math.isfinite(budget) and budget > 0):
        raise BadArgument(f"--budget: expected seconds above 0, got {args.budget}")
    todo = _problems(op, args.shapes, args.direction, device)

    out = console()
    shown = table(
        f"{op.name} on {device.name}", "shape", "use", "backend", "config", "time", "elem/s", "over the heuristic"
    )
    refused: Counter[tuple[str, str]] = Counter()
    gate = Gate(op, device)
    status, stored = 0, 0
    columns = (
        TextColumn("tune"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    try:
        with Progress(*columns, console=out, transient=True) as bar:
            task = bar.add_task("", total=len(todo))
            made: tuple[Any, Any] = (None, None)
            for case, use, problem in todo:
                line = _Line(f"{case.name} {use}", lambda text: bar.update(task, description=text))
                if made[0] is not case:
                    made = (None, None)  # free the last case's tensors first
                    made = (case, case.make(device.torch))
                result = tune_problem(op, case, use, problem, made[1], device, args.backend, budget, gate, line)
                refused.update((t.name[0], t.reason) for t in result.trials.values() if t.reason)
                broken = result.trials[result.default]
                if broken.reason:
                    # what everybody runs who did not tune: this is news, not a trial
                    status = 1
                    out.print(f"{case.name} {use}: the default failed: {broken.reason}", markup=False, style="red")
                if result.winner is None:
                    status = 1
                    shown.add_row(case.name, use, "none passed", "", "", "", "")
                else:
                    try:
                        publish(op, problem, device, result)
                        stored += 1
                    except OSError as e:
                        status = 1
                        out.print(f"not stored: {e}")
                    shown.add_row(case.name, use, *_row(problem, result))
                bar.advance(task)
    except KeyboardInterrupt:
        status = 130
    op.forget()
    out.print(shown)
    for (backend, reason), times in refused.items():
        out.print(f"rejected: {backend}, {times} time{'s' * (times > 1)}: {reason}", markup=False)
    from ..autotune.store import folder

    out.print(f"{stored} of {len(todo)} problems stored in {folder()}{', interrupted' * (status == 130)}", markup=False)
    return status


def _problems(op: Op, shapes: list[str], direction: str, device: Device) -> list[tuple[Any, str, Any]]:
    """(case, use, problem) of everything to tune; of shapes that share a stored entry, the first."""
    cases, known = [], {c.name: c for c in op.cases.CASES}
    for text in shapes:
        if text in ("default", "small"):
            tag = "small" if text == "small" else {"cuda": "gpu", "cpu": "cpu"}[device.kind]
            cases += op.cases.tagged(f"tune-{tag}")
        elif text in known:
            cases.append(known[text])
        else:
            try:
                cases.append(op.cases.parse(text, "bfloat16" if device.kind == "cuda" else "float32"))
            except ValueError as e:
                raise BadArgument(f"--shapes: {e}") from None
    todo: dict[str, tuple[Any, str, Any]] = {}
    for case in cases:
        for use, way in op.cases.USES.items():
            problem = case.used(use, device.kind)
            if direction in ("both", way):
                todo.setdefault(op.key(problem, device).path.name, (case, use, problem))
    return list(todo.values())


class Gate:
    """Whether a candidate is right, on small cases of the same kind. Judged once for each kind and candidate."""

    def __init__(self, op: Op, device: Device):
        self.op, self.device = op, device
        self.judged: dict[Any, tuple] = {}
        self.verdicts: dict[tuple, str | None] = {}

    def __call__(self, case: Any, use: str, backend: str, config: Any) -> str | None:
        """None, or what is wrong with the candidate's results."""
        for small in case.gates():
            key = (small, use, backend, config)
            if key not in self.verdicts:
                self.verdicts[key] = self._judge(small, use, backend, config)
            if self.verdicts[key] is not None:
                return self.verdicts[key]
        return None

    def _judge(self, case: Any, use: str, backend: str, config: Any) -> str | None:
        from .. import check

        if case not in self.judged:
            tensors = case.make(self.device.torch)
            self.judged[case] = (tensors, *check.judged(self.op, tensors))
        tensors, exact, plain = self.judged[case]
        with check.poisoned():
            got = self.op.cases.outcome(tensors, case.used(use, self.device.kind), backend, config)
        for name, tensor in got.items():
            error, allowance, row, ok = check.compare(exact[name], plain[name], tensor.double().cpu().numpy())
            if not ok:
                where = (
                    f"{error:.1e}, allowed {allowance:.1e}" if error > allowance else f"a row {row:.1f}x its allowance"
                )
                return f"wrong result: {name} of {case.name}, {use}: error {where}"
        return None


class _Line:
    """The progress bar's text: what is tuned, how much was tried, and the best so far."""

    def __init__(self, title: str, show: Any):
        self.title, self.show = title, show
        self.tried: set[Any] = set()
        self.refused = 0
        self.best: Trial | None = None

    def __call__(self, trial: Trial) -> None:
        self.tried.add(trial.name)
        self.refused += bool(trial.reason)
        if trial.timing and (
            not self.best or not self.best.timing or trial.timing.median_s < self.best.timing.median_s
        ):
            self.best = trial
        best = ""
        if self.best and self.best.timing:
            best = f", best {self.best.name[0]} {seconds(self.best.timing.median_s)}"
        self.show(f"{self.title}: {len(self.tried)} tried, {self.refused} rejected{best}")


def tune_problem(
    op: Op, case: Any, use: str, problem: Any, tensors: Any, device: Device, backends: list[str] | None,
    budget: float, gate: Gate, progress: Any,
) -> Result:  # fmt: skip
    """Try all candidates of ``backends`` (None: of all), and of the others what they would run as things stand."""
    from ..autotune import search, tuner

    for name in backends or ():
        op.backend(name, problem)
    usable = [name for name, reason in op.reasons(problem).items() if reason is None]
    heuristics = {name: op.backends[name].configs(problem, device)[0] for name in usable}  # type: ignore[union-attr]
    default = next(iter(heuristics.items()))
    names, keep = [default], [default]
    for name in usable:
        if backends and name not in backends:
            names.append((name, op.resolve(problem, device.torch, name).config))
            keep.append(names[-1])
        else:
            names += [(name, config) for config in op.backends[name].configs(problem, device)]  # type: ignore[union-attr]
    names = list(dict.fromkeys(names))
    launch = op.cases.launcher(tensors, problem)
    return tuner.tune(
        {(name, config): launch(op.backends[name], config) for name, config in names},
        lambda candidate: gate(case, use, *candidate),
        device,
        search.halving(names, budget, keep=keep, group=lambda candidate: candidate[0]),
        default,
        progress,
    )


def publish(op: Op, problem: Any, device: Device, result: Result) -> None:
    """Store the winner, and behind it the best configuration of every other backend that was timed."""
    from ..autotune import store

    timed = [(t, t.timing.median_s) for t in result.trials.values() if t.timing is not None]
    best: dict[str, Trial] = {}
    for trial, _ in sorted(timed, key=lambda pair: (pair[0].name != result.winner, not pair[0].final, pair[1])):
        best.setdefault(trial.name[0], trial)
    store.publish(
        op.key(problem, device),
        [_record(t, "backend", "config", "seconds") for t in best.values()],
        measured=problem.key(),
        trials=[_record(t) for t in result.trials.values()],
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _record(trial: Trial, *only: str) -> dict[str, Any]:
    backend, config = trial.name
    record: dict[str, Any] = {"backend": backend, "config": dataclasses.asdict(config)}
    if trial.timing is None:
        record["reason"] = trial.reason
    else:
        t = trial.timing
        record |= {"seconds": t.median_s, "low": t.low_s, "high": t.high_s, "runs": t.runs, "final": trial.final}
    return {k: v for k, v in record.items() if not only or k in only}


def _row(problem: Any, result: Result) -> tuple[str, ...]:
    backend, config = result.winner
    timing = result.trials[result.winner].timing
    assert timing is not None
    speed, gain = problem.elements / timing.median_s, result.gain
    gained = "default" if result.winner == result.default else "-" if math.isnan(gain) else f"{gain:.2f}x"
    return backend, fields(config), seconds(timing.median_s), f"{speed / 1e9:.3g} G", gained
