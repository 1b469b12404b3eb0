"""``tune``: find the fastest backend and configuration for named problems, keep them, and look after what is kept."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import BadArgument, console, fields, pick_device, seconds, table

if TYPE_CHECKING:
    from ..autotune.tuner import Result, Trial
    from ..op import Op
    from ..profiling.device import Device

ACTIONS = ("show", "diff", "verify", "export", "import", "clear", "regret")
# channels of a layer's scan, twice d_model, in the models of the Mamba paper; all have 16 states
MODELS = {"mamba-130m": 1536, "mamba-370m": 2048, "mamba-790m": 3072, "mamba-1.4b": 4096, "mamba-2.8b": 5120}
STATE = 16
DIRECTIONS = ("forward", "backward", "both")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", nargs="?", choices=ACTIONS,
        help="instead of tuning: show what is kept, and why it is used or not; diff it with what would run without it, "
        "or with an exported FILE; verify it against the reference; export or import a FILE; clear all of it; "
        "or measure the regret of tuning on random problems, and keep the records in FILE",
    )  # fmt: skip
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="of export, import, diff and regret")
    parser.add_argument("--op", default="selective_scan", help="the op to tune (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:INDEX; by default the GPU if there is one")
    parser.add_argument(
        "--model", nargs="+", metavar="MODEL",
        help=f"layers of {', '.join(MODELS)}, or of the model whose config.json is FILE",
    )  # fmt: skip
    for name, help in (
        ("batch", "batch sizes (default: 1 8)"),
        ("length", "lengths (default: 2048)"),
        ("dim", "channels, in place of a model's"),
        ("state", f"state sizes (default: the model's, or {STATE})"),
    ):
        parser.add_argument(f"--{name}", nargs="+", type=int, metavar="N", help=help)
    parser.add_argument("--dtype", nargs="+", metavar="DTYPE", help="bf16, fp16 or fp32 (default: bf16, on a CPU fp32)")
    parser.add_argument(
        "--shapes", nargs="+", metavar="SHAPE",
        help="in place of these: default (layers of Mamba models), table (what the shipped tables hold), small, the "
        "name of a case, or batch,dim,length,state[,bf16|fp16|fp32]",
    )  # fmt: skip
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE",
        help="what else the problems are, such as layout=dim has_z=no deterministic=yes",
    )  # fmt: skip
    parser.add_argument("--direction", choices=DIRECTIONS, default="both")
    parser.add_argument("--backend", action="append", help="try only this backend's candidates (may be repeated)")
    parser.add_argument(
        "--budget",
        default="quick",
        help="for a problem: quick (15 s), full (every candidate) or seconds (default: quick)",
    )
    parser.add_argument("--problems", type=int, default=40, metavar="N", help="of regret (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of regret's problems (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="tune what is tuned already, too")
    parser.add_argument(
        "--table", nargs="?", const=Path("autotune/data"), type=Path, metavar="FOLDER",
        help="then write what is kept for this device to the tables that are shipped (default: %(const)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from ..check import find_op

    try:
        op = find_op(args.op)
    except ValueError as e:
        raise BadArgument(str(e)) from None
    for name in args.backend or ():
        if name not in op.backends:
            raise BadArgument(f"--backend: expected one of {', '.join(op.backends)}, got {name!r}")
    if (args.action in ("export", "import")) > (args.file is not None):
        raise BadArgument(f"{args.action}: expected a FILE")
    if args.file is not None and args.action not in ("export", "import", "diff", "regret"):
        raise BadArgument(f"FILE: expected with export, import, diff or regret only, got {args.file}")
    device = pick_device(args.device)
    if args.action == "regret":
        return _regret(op, device, args)
    if args.action:
        from . import tuned

        chosen = problems(op, args, device) if args.action == "show" and _narrowed(args) else []
        return tuned.run(args.action, op, device, args.file, chosen)
    return _tune(op, args, device)


def _regret(op: Op, device: Device, args: argparse.Namespace) -> int:
    from .. import tuning
    from . import regret

    if args.problems < 1:
        raise BadArgument(f"--problems: expected at least 1, got {args.problems}")
    try:
        return regret.run(op, device, args.problems, args.seed, tuning.seconds_of(args.budget), args.file)
    except ValueError as e:
        raise BadArgument(f"regret: {e}") from None


def _narrowed(args: argparse.Namespace) -> bool:
    return bool(args.shapes or args.model or args.dim)


# ---- which problems --------------------------------------------------------------------------------------------------


def problems(op: Op, args: argparse.Namespace, device: Device) -> list[tuple[str, Any]]:
    """(title, problem) of everything asked for; of problems that share a stored entry, the first."""
    try:
        settings = dict(op.cases.setting(text) for text in args.set)
    except ValueError as e:
        raise BadArgument(f"--set: {e}") from None
    if args.shapes and (args.model or args.dim):
        raise BadArgument("--shapes: expected without --model and --dim")
    cases = _grid(op, args, device) if args.model or args.dim else _named(op, args, device)
    layouts = ("dim", "length") if args.model and "layout" not in settings else (None,)
    todo: dict[str, tuple[str, Any]] = {}
    for case, layout in itertools.product(cases, layouts):
        for use, way in op.cases.USES.items():
            changes = settings | ({"layout": layout} if layout else {})
            try:
                problem = op.cases.adapted(case.used(use, device.kind), changes)
            except ValueError as e:
                raise BadArgument(f"--set: {e}") from None
            if args.direction in ("both", way):
                words = [case.name, use, *(f"{k}={v}" for k, v in changes.items())]
                todo.setdefault(op.key(problem, device).path.name, (" ".join(words), problem))
    return list(todo.values())


def _named(op: Op, args: argparse.Namespace, device: Device) -> list[Any]:
    if args.batch or args.length or args.state or args.dtype:
        if not args.shapes:
            raise BadArgument("--batch, --length, --state, --dtype: expected with --model or --dim")
        raise BadArgument("--shapes: expected without --batch, --length, --state and --dtype")
    cases, known = [], {c.name: c for c in op.cases.CASES}
    for text in args.shapes or ["default"]:
        if text in ("default", "table", "small"):
            tag = {"cuda": "gpu", "cpu": "cpu"}[device.kind] if text == "default" else text
            cases += op.cases.tagged(f"tune-{tag}")
        elif text in known:
            cases.append(known[text])
        else:
            try:
                cases.append(op.cases.parse(text, "bfloat16" if device.kind == "cuda" else "float32"))
            except ValueError as e:
                raise BadArgument(f"--shapes: {e}") from None
    return cases


def _grid(op: Op, args: argparse.Namespace, device: Device) -> list[Any]:
    layers = [_layer(text) for text in args.model or ()] + [(dim, STATE) for dim in args.dim or ()]
    kinds = args.dtype or ["bf16" if device.kind == "cuda" else "fp32"]
    made = []
    for kind, length, batch, (dim, own) in itertools.product(
        kinds, args.length or [2048], args.batch or [1, 8], layers
    ):
        for state in args.state or [own]:
            try:
                made.append(op.cases.parse(f"{batch},{dim},{length},{state},{kind}", ""))
            except ValueError as e:
                raise BadArgument(f"--batch, --dim, --length, --state, --dtype: {e}") from None
    return made


def _layer(text: str) -> tuple[int, int]:
    """(channels, states) of a model's layers."""
    name = text if text in MODELS else f"mamba-{text}"
    if name in MODELS:
        return MODELS[name], STATE
    path = Path(text)
    try:
        found = json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))
        own = found.get("ssm_cfg") or {}
        state = own.get("d_state", found.get("state_size", STATE))
        width = found.get("d_model", found.get("hidden_size"))
        dim = found.get("intermediate_size") or int(own.get("expand", found.get("expand", 2)) * width)
    except FileNotFoundError:
        raise BadArgument(f"--model: expected one of {', '.join(MODELS)} or a file, got {text!r}") from None
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise BadArgument(f"--model: expected a config.json with d_model or hidden_size, got {text!r}: {e}") from None
    if not (isinstance(dim, int) and isinstance(state, int)):
        raise BadArgument(
            f"--model: expected whole numbers of channels and states in {text!r}, got {dim!r} and {state!r}"
        )
    return dim, state


# ---- tuning ----------------------------------------------------------------------------------------------------------


def _tune(op: Op, args: argparse.Namespace, device: Device) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .. import tuning
    from ..autotune import store
    from ..autotune.worker import NoWorker

    try:
        budget = tuning.seconds_of(args.budget)
    except ValueError as e:
        raise BadArgument(f"--{e}") from None
    asked = problems(op, args, device)
    for _, problem in asked:
        for name in args.backend or ():
            op.backend(name, problem)
    # what is deterministic stays as it is, whoever asks: its results would change
    listed, older = _listed(op, device, args.table) if args.table else ([], [])
    kept = [
        p for _, p in asked
        if (_is_tuned(op, p, device) and (p.deterministic or not args.again))
        or (p.bucket() in listed and not args.again)
    ]  # fmt: skip
    todo = [(title, p) for title, p in asked if p not in kept]
    todo.sort(key=lambda t: t[1].bucket() in older)  # first what the table lacks altogether

    out = console()
    shown = table(
        f"{op.name} on {device.name}",
        "problem",
        "backend",
        "config",
        "time",
        "elem/s",
        "of bound",
        "over the heuristic",
    )
    refused: Counter[tuple[str, str]] = Counter()
    unwritable: Counter[str] = Counter()
    status, stored, unseen = 0, 0, 0
    columns = (
        TextColumn("tune"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    try:
        with Progress(*columns, console=out, transient=True) as bar, tuning.Session(op, device) as session:
            task = bar.add_task("", total=len(todo))
            for title, problem in todo:
                bar.update(task, description=title)
                line = _Line(title, session.bound(problem), lambda text: bar.update(task, description=text))
                result = session.tune(problem, budget, args.backend, line)
                refused.update((t.name[0], t.reason) for t in result.trials.values() if t.reason)
                unseen += result.unseen
                if broken := result.trials[result.default].reason:
                    # what everybody runs who did not tune: this is news, not a trial
                    status = 1
                    out.print(f"{title}: the default failed: {broken}", markup=False, style="red")
                row: tuple[str, ...] = ("none passed",)
                if result.winner is None:
                    status = 1
                else:
                    try:
                        session.publish(problem, result)
                        stored += 1
                    except OSError as e:
                        unwritable[str(e)] += 1
                    row = _row(problem, result, line.bound)
                shown.add_row(title, *row)
                if not out.is_terminal:  # no bar to be seen there
                    out.print(f"{title}: {'  '.join(row)}", markup=False)
                bar.advance(task)
    except KeyboardInterrupt:
        status = 130
    except NoWorker as e:
        status = 1
        out.print(str(e), markup=False, style="red")
    op.forget()
    if todo:
        out.print(shown)
    for (backend, reason), times in refused.items():
        out.print(f"rejected: {backend}, {times} time{'s' * (times > 1)}: {reason}", markup=False)
    if unseen:
        out.print(f"{unseen} candidates were not tried for lack of time: --budget full tries all")
    for reason, times in unwritable.items():
        status = status or 1
        out.print(f"not stored, {times} problem{'s' * (times > 1)}: {reason}", markup=False)
    if kept:
        more = "" if args.again else "; --again tunes anew what is not deterministic"
        out.print(f"{len(kept)} tuned already{more}")
    out.print(
        f"{stored} of {len(todo)} problems stored in {store.folder()}{', interrupted' * (status == 130)}", markup=False
    )
    if args.table:
        status = max(status, _write_table(op, device, args.table, out))
    return status


def _listed(op: Op, device: Device, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The problems that the table in a folder has from this hardware, measured in earlier runs: of these sources, of
    others."""
    from ..autotune import store, tables

    path = tables.path_of(folder, device.slug, op.name)
    try:
        found = store.read_table(path)["entries"] if path.exists() else []
    except (OSError, ValueError, RecursionError) as e:
        raise BadArgument(f"--table: {path} cannot be read: {e}") from None
    hardware = {name: getattr(device, name) for name in store.HARDWARE}
    listed: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for key in (entry["key"] for entry in found):
        if hardware.items() <= key["device"].items():
            listed[key["validity"].get("sources") != op.sources].append(key["problem"])
    return listed


def _is_tuned(op: Op, problem: Any, device: Device) -> bool:
    from ..autotune import store

    return any(entry.source == "tuned" for entry in store.lookup(op.key(problem, device)))


class _Line:
    """The progress bar's text: what is tuned, how much was tried, the best so far, and what was rejected why."""

    def __init__(self, title: str, bound: float, show: Any):
        self.title, self.bound, self.show = title, bound, show
        self.trials: dict[Any, Trial] = {}

    def __call__(self, trial: Trial) -> None:
        self.trials[trial.name] = trial
        text = f"{self.title}: {len(self.trials)} tried"
        timed = [(t.timing.median_s, t.name[0]) for t in self.trials.values() if t.timing]
        if timed:
            best, backend = min(timed)
            text += f", best {backend} {seconds(best)} = {_share(self.bound, best)} of the bound"
        reasons = Counter(t.reason.partition(":")[0] for t in self.trials.values() if t.reason)
        if reasons:
            text += ", rejected: " + ", ".join(f"{times} {reason}" for reason, times in reasons.items())
        self.show(text)


def _share(bound: float, taken: float) -> str:
    return f"{100 * bound / taken:.2g} %" if bound else "?"


def _row(problem: Any, result: Result, bound: float) -> tuple[str, ...]:
    backend, config = result.winner
    timing = result.trials[result.winner].timing
    assert timing is not None
    speed, gain, taken = problem.elements / timing.median_s, result.gain, seconds(timing.median_s)
    gained = "default" if result.winner == result.default else "-" if math.isnan(gain) else f"{gain:.2f}x"
    return backend, fields(config), taken, f"{speed / 1e9:.3g} G", _share(bound, timing.median_s), gained


def _write_table(op: Op, device: Device, folder: Path, out: Any) -> int:
    """Write all that is kept for this device and these sources to the shipped tables."""
    from ..autotune import store, tables

    entries = []
    for _, entry in store.entries():
        if isinstance(entry, dict) and entry["key"]["op"] == op.name:
            here = store.Key(op.name, op.sources, entry["key"]["problem"], device).as_dict()
            entries += [entry] if here == entry["key"] else []
    # where there was time for one of several candidates, it would keep a better rule of thumb from being used one day
    compared = [e for e in entries if not e.get("unseen") or sum("seconds" in t for t in e["trials"]) > 1]
    if alone := len(entries) - len(compared):
        out.print(f"{alone} entries not for the table: there was time for one candidate")
    entries = compared
    if not entries:
        out.print("no table written: nothing new is kept for this device")
        return 0
    try:
        written = tables.write(folder, op.name, entries, provenance(entries))
    except (OSError, ValueError) as e:
        out.print(f"no table written: {e}", markup=False)
        return 1
    out.print(f"{len(entries)} entries written to {', '.join(map(str, written))}", markup=False)
    return 0


def provenance(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the figures of a table come from."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        where = Path(__file__).resolve().parent
        commit = subprocess.run(command, cwd=where, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    newest = max(entries, key=lambda e: e.get("date", ""))
    clocks: dict[str, list[int]] = {}
    for entry in entries:
        for name, megahertz in entry.get("clocks", {}).items():
            clocks.setdefault(name, []).append(megahertz)
    return {
        "commit": commit,
        "device": newest["key"]["device"],
        "validity": newest["key"]["validity"],
        "clocks": {name: [min(seen), max(seen)] for name, seen in clocks.items()},
        "date": newest.get("date", ""),
    }
