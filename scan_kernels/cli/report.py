"""``report``: check, time every backend and peer, and write the page, the pictures and the index."""

from __future__ import annotations

import argparse
import dataclasses
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import BadArgument, console, pick_device, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Progress

    from ..measure import Allowance, Runner
    from ..op import Op
    from ..profiling.device import Device

CHECKED_STEPS = 384  # of the text's activations: what a float64 reference does in about a second
PEER_SECONDS = 75.0
ABOUT = "random tensors distributed as in a Mamba layer at initialisation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:INDEX; by default the GPU if there is one")
    parser.add_argument("--text", metavar="PATH", help="file whose bytes a Mamba layer reads (default: the README)")
    parser.add_argument("--tune", action="store_true", help="tune the shapes of the report first")
    parser.add_argument("--out", default="bench_reports", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=0.2, metavar="N", help="time spent on a measurement (default: %(default)s)"
    )
    parser.add_argument(
        "--peer-seconds", type=float, default=PEER_SECONDS, metavar="N",
        help="time spent on implementations without a kernel, in all (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from .. import text
    from ..check import find_op
    from ..measure import Allowance
    from ..profiling import report as pages

    for option, value in (("--seconds", args.seconds), ("--peer-seconds", args.peer_seconds)):
        if not (math.isfinite(value) and value > 0):
            raise BadArgument(f"{option}: expected a number above 0, got {value}")
    device = pick_device(args.device)
    path = Path(args.text) if args.text else text.default_path()
    try:
        read = text.activations(path, device)
    except ValueError as e:
        raise BadArgument(f"--text: {e}") from None
    if args.tune and _tune(device) == 130:
        return 130

    out, root = console(), Path(args.out)
    op = find_op("selective_scan")
    record = _record(args, device)
    folder = root / record["device"]["slug"]
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    red = []
    try:
        with Progress(*columns, console=out, transient=True) as bar:
            record["gate"] = _gate(device, root, bar)
            red = [name for name, g in record["gate"].items() if g["failed"]]
            runners, allowance = _runners(op, record, device), Allowance(args.peer_seconds)
            for case in _cases(op, device, (path, *read), runners, args.seconds, allowance, bar):
                record["cases"].append(case)
                pages.save(record, folder)
        record["complete"] = True
    except KeyboardInterrupt:
        out.print("interrupted: what was measured is kept")
    for name in red:
        out.print(f"{name}: no speed is reported: its gate is red (see scan-kernels check)", markup=False)
    for p in record["peers"]:
        if p["missing"]:
            out.print(f"{p['name']}: {p['missing']}", markup=False)
    if not record["cases"]:
        out.print("nothing was timed, and nothing written" + " but check.json" * bool(record["gate"]))
        return 1 if record["complete"] else 130
    pages.save(record, folder)
    page = pages.render(record, folder)
    index = pages.index(root)
    out.print(_shown(record))
    out.print(f"written: {page}, {index}", markup=False)
    return int(bool(red)) if record["complete"] else 130


def _tune(device: Device) -> int:
    """Run the verb ``tune`` on the shapes of the report."""
    from ..__main__ import main
    from ..check import find_op

    names = [case.name for case in _bench(find_op("selective_scan"), device)]
    return main(["tune", "--device", str(device.torch), "--shapes", *names])


def _bench(op: Op, device: Device) -> list[Any]:
    return op.cases.tagged("bench-gpu" if device.kind == "cuda" else "bench-cpu")


def _record(args: argparse.Namespace, device: Device) -> dict[str, Any]:
    """The report without its measurements."""
    from .. import check
    from ..peers import PEERS
    from ..profiling.ceilings import ceilings

    options = [f"--device {args.device}"] * bool(args.device) + [f"--text {args.text}"] * bool(args.text)
    options += ["--tune"] * args.tune + [f"--seconds {args.seconds:g}"] * (args.seconds != 0.2)
    options += [f"--peer-seconds {args.peer_seconds:g}"] * (args.peer_seconds != PEER_SECONDS)
    return {
        "schema": 1,
        "command": " ".join(["python -m scan_kernels report", *options]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": args.seconds,
        "complete": False,
        "device": dataclasses.asdict(device) | {"slug": device.slug},
        "ceilings": [dataclasses.asdict(c) for c in ceilings(device)],
        "versions": check.versions() | {p.package: p.version for p in PEERS if p.version},
        "sources": {name: check.find_op(name).sources for name in check.OPS},
        "gate": {},
        "peers": [],
        "cases": [],
    }


def _gate(device: Device, root: Path, bar: Progress) -> dict[str, dict[str, Any]]:
    """Check every backend, write check.json, and count for each: cases, failed ones, or why it was skipped."""
    from .. import check

    task = bar.add_task("checking", total=None)
    tags = ("ci", "gpu") if device.kind == "cuda" else ("ci",)
    rows, skipped = check.run(
        ["selective_scan"], None, device.torch, tags, lambda words: bar.update(task, description=f"checking {words}")
    )
    bar.remove_task(task)
    check.write_record(rows, skipped, ["selective_scan"], device.torch, root)
    verdicts: dict[str, dict[str, bool]] = {}
    for row in rows:
        cases = verdicts.setdefault(row.backend, {})
        cases[row.case] = cases.get(row.case, True) and row.ok
    gate: dict[str, dict[str, Any]] = {
        name: {"cases": len(cases), "failed": sum(not ok for ok in cases.values()), "skipped": ""}
        for name, cases in verdicts.items()
    }
    for name, reason in skipped.get("selective_scan", {}).items():
        gate[name] = {"cases": 0, "failed": 0, "skipped": reason}
    return gate


def _runners(op: Op, record: dict[str, Any], device: Device) -> list[Runner]:
    """The backends whose gate is green, then the peers that are installed; fills in ``record["peers"]``."""
    from .. import measure
    from ..peers import PEERS
    from ..selective_scan import selective_scan

    green = [name for name in op.backends if (g := record["gate"].get(name)) and g["cases"] and not g["failed"]]
    runners = [measure.backend(op, name, selective_scan) for name in green]
    for peer in PEERS:
        missing = None if device.kind in peer.devices else f"does not run on {device.kind}"
        try:
            if missing is None:
                runners.append(measure.peer(op, peer, device))
        except ImportError as e:
            missing = f"not installed ({e})" if not peer.version else str(e)
        known = {"name": peer.name, "what": peer.what, "version": peer.version, "missing": missing}
        record["peers"].append(known)
    return runners


def _cases(
    op: Op, device: Device, read: tuple[Path, Any, dict], runners: list[Runner], seconds: float, allowance: Allowance,
    bar: Progress,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Measure case after case: those of the op, then the text's."""
    from .. import check, measure
    from ..profiling.ceilings import ceilings

    if not any(r.kind == "backend" for r in runners):
        return
    path, text, activations = read
    short = {long: name for name, long in op.cases.DTYPES.items()}
    cases = [*_bench(op, device), text]
    task = bar.add_task("timing", total=len(cases) * len(measure.USES) * len(runners))
    for case in cases:
        real = case is text
        tensors = activations if real else case.make(device.torch)
        title = f"{case.batch}x{case.dim}x{case.length} N={case.state} {short[case.dtype]}" + " text" * real
        about = f"the activations of a byte-level Mamba layer that reads {path.name}" if real else ABOUT
        made: dict[str, Any] = {"name": case.name, "title": title, "about": about, "results": []}
        made["uses"] = {u: measure.bounds(case.used(u, device.kind), ceilings(device)) for u in measure.USES}
        fit = runners
        if real:
            bar.update(task, description="checking the text's activations")
            made["check"] = _checked(op, case, tensors, [r.name for r in runners if r.kind == "backend"], check)
            fit = [r for r in runners if made["check"].get(r.name, {"ok": True})["ok"]]
        bar.update(task, description=f"timing {title}")
        for result in measure.results(op, case, tensors, fit, device, seconds, allowance=allowance):
            made["results"].append(result)
            bar.update(task, advance=1, description=f"timing {title}: {result['use']}")
        del tensors
        yield made


def _checked(op: Op, case: Any, tensors: dict[str, Any], names: list[str], check: Any) -> dict[str, dict[str, Any]]:
    """Hold each backend against float64 on the first steps of real activations."""
    from ..text import beginning

    cut = beginning(tensors, CHECKED_STEPS)
    exact, plain = check.judged(op, cut)
    found = {}
    for name in names:
        with check.poisoned():
            got = op.cases.candidate(cut, name)
        worst = ("", 0.0, 0.0, -1.0, True)
        for tensor in exact:
            error, allowance, share, ok = check.compare(
                exact[tensor], plain[tensor], got[tensor].double().cpu().numpy()
            )
            worst = max(worst, (tensor, error, allowance, share, ok), key=lambda w: (not w[4], w[3]))
        found[name] = {"tensor": worst[0], "error": f"{worst[1]:.1e}", "allowance": f"{worst[2]:.1e}", "ok": worst[4]}
    return found


def _shown(record: dict[str, Any]) -> Any:
    """The headline table for a terminal."""
    from ..profiling.charts import TITLES, timed
    from ..profiling.report import seconds, speed_ups

    peers = [p["name"] for p in record["peers"] if not p["missing"]]
    shown = table(
        f"selective_scan on {record['device']['name']}", "case", "direction", "what ran", "time", "Gelem/s",
        "of bound", "bound by", *(f"over {p}" for p in peers),
    )  # fmt: skip
    for case in record["cases"]:
        for use, need in case["uses"].items():
            for r in timed(case, use):
                gains = speed_ups(case, use, r["median_s"]) if r["kind"] == "backend" else {}
                shown.add_row(
                    case["title"], TITLES[use], r["runner"], seconds(r["median_s"]),
                    f"{need['elements'] / r['median_s'] / 1e9:.3g}", f"{100 * need['seconds'] / r['median_s']:.2g} %",
                    need["unit"], *(f"{gains[p]:.3g}x" if p in gains else "" for p in peers),
                )  # fmt: skip
    return shown
