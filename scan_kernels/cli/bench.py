"""``bench``: a quick measurement in the terminal, with its bound, or one for each size of a sweep."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
from typing import Any

from . import BadArgument, console, fields, pick_device, seconds, table

DIRECTIONS: dict[str, tuple[str, ...]] = {
    "forward": ("inference",),
    "training": ("training",),
    "backward": ("backward",),
    "all": ("inference", "training", "backward"),
}
AXES = ("batch", "dim", "length", "state")
CLIFF = 1.25  # growth, beyond what the bound explains, of the time of an element from one size to the next


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", default="selective_scan", help="the op to time (default: %(default)s)")
    parser.add_argument("--shape", required=True, metavar="BATCH,DIM,LENGTH[,STATE]", help="state is 16 by default")
    parser.add_argument("--dtype", help="fp32, bf16 or fp16 (default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--backend", action="append", help="only this backend (may be repeated); by default all")
    parser.add_argument("--direction", choices=DIRECTIONS, default="all", help="default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda or cuda:INDEX; by default the GPU if there is one")
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on a measurement (default: %(default)s)")
    parser.add_argument(
        "--sweep", metavar="AXIS=FROM:TO", help="one of batch, dim, length and state, doubled from FROM up to TO"
    )
    parser.add_argument("--host", action="store_true", help="also time the host alone: Python, torch and launches")


def run(args: argparse.Namespace) -> int:
    import torch

    from .. import check, measure
    from ..profiling import timer
    from ..profiling.ceilings import ceilings

    if not (math.isfinite(args.seconds) and args.seconds > 0):
        raise BadArgument(f"--seconds: expected a number above 0, got {args.seconds}")
    try:
        op = check.find_op(args.op)
    except ValueError as e:
        raise BadArgument(str(e)) from None
    function = getattr(importlib.import_module(op.package), op.name)
    device = pick_device(args.device)
    if args.host and device.kind == "cpu":
        raise BadArgument("--host: a CPU is its own host, and its times say all; expected a GPU")
    case = _case(op, args.shape, args.dtype or ("bf16" if device.kind == "cuda" else "fp32"))
    sizes = _sizes(op, case, args.sweep)
    for name in args.backend or ():
        if name not in op.backends:
            raise BadArgument(f"--backend: expected one of {', '.join(op.backends)}, got {name!r}")
        op.backend(name, case.used("inference", device.kind))
    reasons = op.reasons(case.used("inference", device.kind))
    names = list(dict.fromkeys(args.backend)) if args.backend else [n for n, why in reasons.items() if why is None]

    out = console()
    columns = ["direction", "backend", "config", "time", "quartiles", "cold", "Gelem/s", "of bound", "bound by", "runs"]
    columns += ["host"] * args.host
    failed = False
    shares: dict[tuple[str, str], float] = {}  # of the bound, at the size before
    verdicts: dict[int, list[str]] = {}
    for case in sizes:
        out.print(f"{case.batch} x {case.dim} x {case.length}, {case.state} states, {case.dtype} on {device.name}")
        notes: dict[str, None] = {}
        shown = table("", *columns, *(["beyond the bound"] if args.sweep else []))
        if case.state not in verdicts:  # sizes of one state pose the same small cases
            verdicts[case.state] = [name for name in names if _passes(op, case, device, name, out)]
        green = verdicts[case.state]
        failed |= len(green) < len(names)
        try:
            tensors = case.make(device.torch)
        except torch.OutOfMemoryError:
            out.print("  does not fit in memory")
            break
        runners = {name: measure.backend(op, name, function) for name in green}
        for r in measure.results(
            op, case, tensors, list(runners.values()), device, args.seconds, DIRECTIONS[args.direction], cold=True
        ):
            problem = case.used(r["use"], device.kind)
            direction = "training" if r["use"] == "training" else problem.direction
            if "reason" in r:
                failed = True
                shown.add_row(direction, r["runner"], "", r["reason"])
                continue
            need, choice = measure.bounds(problem, ceilings(device)), op.resolve(problem, device.torch, r["runner"])
            more = []
            if args.host:
                call = measure.call(runners[r["runner"]].scan, tensors, op.cases.ARGUMENTS, r["use"])
                more = [seconds(timer.host(call, device, seconds=args.seconds).median_s)]
            share, known = need["seconds"] / r["median_s"], (r["runner"], r["use"])
            if args.sweep:
                growth = shares.get(known, share) / share
                failed |= growth > CLIFF
                more.append(f"x {growth:.2f}" + " CLIFF" * (growth > CLIFF) if known in shares else "")
            shares[known] = share
            shown.add_row(
                direction, r["runner"], fields(choice.config), seconds(r["median_s"]),
                f"{seconds(r['low_s'])} to {seconds(r['high_s'])}",
                seconds(r["cold"]["median_s"]) if "cold" in r else "", f"{need['elements'] / r['median_s'] / 1e9:.3g}",
                f"{100 * share:.2g} %", f"{need['unit']}, {seconds(need['seconds'])}",
                f"{r['runs']} x {r['method']}", *more,
            )  # fmt: skip
            notes |= dict.fromkeys(f"{r['runner']}, {direction}: {words}" for words in r.get("disturbed", ()))
        out.print(shown)
        for note in notes:
            out.print(f"disturbed: {note}", markup=False)
        del tensors, runners
    return int(failed)


def _case(op: Any, shape: str, dtype: str) -> Any:
    text = shape if shape.count(",") == 3 else f"{shape},16"
    try:
        return op.cases.parse(f"{text},{dtype}", dtype)
    except ValueError:
        expected = (
            "--shape batch,dim,length[,state] with sizes from 1 and at most 256 states, --dtype fp32, bf16 or fp16"
        )
        raise BadArgument(f"expected {expected}; got --shape {shape} --dtype {dtype}") from None


def _sizes(op: Any, case: Any, sweep: str | None) -> list[Any]:
    """The case itself, or one for each size of the sweep."""
    if sweep is None:
        return [case]
    axis, _, ends = sweep.partition("=")
    first, _, last = ends.partition(":")
    most = op.cases.MAX_STATE if axis == "state" else 2**31 - 1
    known = axis in AXES and first.isdecimal() and last.isdecimal()
    if not known or not 1 <= int(first) <= int(last) <= most:
        raise BadArgument(
            f"--sweep: expected AXIS=FROM:TO, AXIS one of {', '.join(AXES)}, 1 <= FROM <= TO <= {most}; got {sweep!r}"
        )
    size, found = int(first), []
    while size <= int(last):
        found.append(dataclasses.replace(case, **{axis: size}))
        size *= 2
    return found


def _passes(op: Any, case: Any, device: Any, name: str, out: Any) -> bool:
    """Whether a backend is right on small cases of the same kind: no speed is shown on a red gate."""
    from .. import check

    rows = [row for small in case.gates() for row in check.run_case(op, small, device.torch, [name])]
    wrong = [row for row in rows if not row.ok]
    for row in wrong:
        why = row.reason or f"error {row.error:.1e}, allowed {row.allowance:.1e}"
        out.print(f"{name}: not timed, its gate is red: {row.tensor} of {row.case}: {why}", markup=False)
    return not wrong
