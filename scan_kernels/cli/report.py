"""``report``: check, time every backend and peer, and write the page, the pictures and the index."""

from __future__ import annotations

import argparse
import dataclasses
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import BadArgument, console, pick_device, table
from .report_compare import self_check, show
from .report_steps import bench, entrants, progress, steps

if TYPE_CHECKING:
    from rich.console import Console

    from ..op import Op
    from ..profiling.device import Device

SECONDS, PEER_SECONDS = 0.2, 20.0
OUT = Path("bench_reports")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:INDEX; by default the GPU if there is one")
    parser.add_argument("--text", metavar="PATH", help="file whose bytes a Mamba layer reads (default: the README)")
    parser.add_argument("--tune", action="store_true", help="tune the shapes of the report first")
    parser.add_argument("--full", action="store_true", help="twice as many sizes in the scaling plots")
    parser.add_argument("--resume", action="store_true", help="go on with the report that was interrupted")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"default: {OUT}, or with --from beside the JSON")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="N", help="time spent on a measurement (default: %(default)s)"
    )
    parser.add_argument(
        "--peer-seconds", type=float, default=PEER_SECONDS, metavar="N",
        help="time spent on implementations without a kernel, in all (default: %(default)s)",
    )  # fmt: skip
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--figure8", action="store_true", help="only the Mamba paper's picture, added to the report")
    other.add_argument("--from", dest="source", metavar="JSON", help="measure nothing: draw a report.json again")
    other.add_argument(
        "--compare", nargs="+", metavar="JSON",
        help="OLD [NEW]: what became faster or slower; without NEW, this machine is measured; exit code 1 if slower",
    )  # fmt: skip
    other.add_argument(
        "--self-check", action="store_true",
        help="does --compare tell equal code from a planted slowdown of 3 %%? exit code 1 if not",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    for option, value in (("--seconds", args.seconds), ("--peer-seconds", args.peer_seconds)):
        if not (math.isfinite(value) and value > 0):
            raise BadArgument(f"{option}: expected a number above 0, got {value}")
    if args.source:
        return _draw_again(Path(args.source), args.out, console())
    args.out = args.out or OUT
    if args.compare and len(args.compare) > 2:
        raise BadArgument(f"--compare: expected OLD [NEW], got {len(args.compare)} files")
    old = _load("--compare", args.compare[0]) if args.compare else None
    if old is not None and len(args.compare) == 2:
        return show(old, _load("--compare", args.compare[1]), console())
    device = pick_device(args.device)
    if args.self_check:
        about = {"command": _command(args), "date": _now()}
        return self_check(device, args.seconds, args.out, about, console())
    status, record = _figure8(args, device) if args.figure8 else _report(args, device)
    if old is None or status == 130:
        return status
    return max(status, show(old, record, console()))


# ---- what is measured ------------------------------------------------------------------------------------------------


def _report(args: argparse.Namespace, device: Device) -> tuple[int, dict[str, Any]]:
    """Measure everything; (exit code, record). What is done is saved as it is made."""
    from .. import text
    from ..check import find_op
    from ..profiling import report as pages

    path = Path(args.text) if args.text else text.default_path()
    try:
        read = text.activations(path, device)
    except ValueError as e:
        raise BadArgument(f"--text: {e}") from None
    out, root, op = console(), args.out, find_op("selective_scan")
    folder = root / device.slug
    record = _begun(args, device, folder)
    if args.tune and _tune(device) == 130:
        return 130, record
    try:
        with progress(out) as bar:
            for _ in steps(args, op, device, record, (path, *read), root, bar):
                pages.save(record, folder)
        record["complete"] = True
    except KeyboardInterrupt:
        out.print("interrupted: what was measured is kept; report --resume goes on")
    red = [name for name, g in record["gate"].items() if g["failed"]]
    for name in red:
        out.print(f"{name}: no speed is reported: its gate is red (see scan-kernels check)", markup=False)
    for p in record["peers"]:
        if p["missing"]:
            out.print(f"{p['name']}: {p['missing']}", markup=False)
    if not record["cases"]:
        out.print("nothing was timed, and nothing written" + " but check.json" * bool(record["gate"]))
        return (1 if record["complete"] else 130), record
    pages.save(record, folder)
    page, index = pages.render(record, folder), pages.index(root)
    out.print(_shown(record))
    out.print(f"written: {page}, {index}", markup=False)
    return (int(bool(red)) if record["complete"] else 130), record


def _figure8(args: argparse.Namespace, device: Device) -> tuple[int, dict[str, Any]]:
    """Measure the paper's picture alone, into the report that the folder holds or a new one."""
    from .. import measure, sweep
    from ..check import find_op, run_case
    from ..profiling import report as pages
    from ..selective_scan import selective_scan

    out, root, op = console(), args.out, find_op("selective_scan")
    folder = root / device.slug
    record = _kept(folder) or _record(args, device)
    axis, dtype = sweep.FIGURE[device.kind], sweep.DTYPE[device.kind]
    case = axis.case(op, axis.first, dtype)
    fastest = op.resolve(case.used("inference", device.kind), device.torch).backend
    wrong = [row for small in case.gates() for row in run_case(op, small, device.torch, [fastest]) if not row.ok]
    if wrong:
        out.print(f"{fastest}: no speed is reported: {wrong[0].tensor} of {wrong[0].case} is wrong", style="red")
        return 1, record
    # whichever backend the dispatch takes at each length
    scan: Any = selective_scan
    ours = measure.Runner("scan-kernels", "backend", scan, lambda p: None)
    runners, peers = entrants(op, {}, device)
    runners = [ours, *(r for r in runners if r.name in sweep.FIGURE_PEERS)]
    peers = [p for p in peers if p["name"] in sweep.FIGURE_PEERS]
    made = record["figure8"] if args.resume and record["figure8"] else {"points": []}
    made |= {
        "title": axis.title(dtype), "date": _now(), "command": _command(args), "sources": op.sources,
        "operations": sweep.OPERATIONS, "peers": peers,
    }  # fmt: skip
    record["figure8"], status = made, 0
    try:
        with progress(out) as bar:
            task = bar.add_task("the paper's picture", total=len(axis.sizes(full=True)))
            for points in sweep.figure8(op, device, runners, made["points"]):
                made["points"] = points
                bar.update(task, completed=len(points))
                pages.save(record, folder)
    except KeyboardInterrupt:
        out.print("interrupted: what was measured is kept; report --figure8 --resume goes on")
        status = 130
    if not made["points"]:
        return status or 1, record
    pages.save(record, folder)
    page, index = pages.render(record, folder), pages.index(root)
    from ..profiling.report import seconds

    names = list(dict.fromkeys(r["runner"] for p in made["points"] for r in p["results"]))
    for use, title in (("inference", "forward"), ("step", "forward + backward")):
        shown = table(f"{title}: {made['title']} on {device.name}", "length", *names)
        for point in made["points"]:
            times = {r["runner"]: r.get("median_s") for r in point["results"] if r["use"] == use}
            shown.add_row(str(point["size"]), *(seconds(t) if (t := times.get(n)) else "" for n in names))
        out.print(shown)
    out.print(f"written: {folder / 'figure8.png'}, {page}, {index}", markup=False)
    return status, record


def _tune(device: Device) -> int:
    """Run the verb ``tune`` on the shapes of the report."""
    from ..__main__ import main
    from ..check import find_op

    names = [case.name for case in bench(find_op("selective_scan"), device)]
    return main(["tune", "--device", str(device.torch), "--shapes", *names])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _command(args: argparse.Namespace) -> str:
    """What was typed, without what only says where to go on or what to compare with."""
    words = [f"--device {args.device}"] * bool(args.device) + [f"--text {args.text}"] * bool(args.text)
    words += ["--tune"] * args.tune + ["--full"] * args.full + ["--figure8"] * args.figure8
    words += ["--self-check"] * args.self_check + [f"--seconds {args.seconds:g}"] * (args.seconds != SECONDS)
    words += [f"--peer-seconds {args.peer_seconds:g}"] * (args.peer_seconds != PEER_SECONDS)
    return " ".join(["python -m scan_kernels report", *words])


def _record(args: argparse.Namespace, device: Device) -> dict[str, Any]:
    """The report without its measurements."""
    from .. import check
    from ..peers import PEERS
    from ..profiling import report as pages
    from ..profiling.ceilings import ceilings
    from ..profiling.device import driver

    version = driver(device)
    return pages.empty() | {
        "command": _command(args),
        "date": _now(),
        "seconds": args.seconds,
        "device": dataclasses.asdict(device) | {"slug": device.slug},
        "ceilings": [dataclasses.asdict(c) for c in ceilings(device, fresh=True)],
        "versions": check.versions() | {p.package: p.version for p in PEERS if p.version}
        | ({"driver": version} if version else {}),
        "sources": {name: check.find_op(name).sources for name in check.OPS},
        "formulas": _formulas(check.find_op("selective_scan"), device),
    }  # fmt: skip


def _formulas(op: Op, device: Device) -> dict[str, str]:
    """How everything that a ceiling is known of is counted, in the problem's own words."""
    import inspect

    from ..profiling.ceilings import ceilings

    methods = {c.resource: getattr(op.problem_type, c.resource, None) for c in ceilings(device)}
    return {name: " ".join((inspect.getdoc(m) or "").split()) for name, m in methods.items() if m is not None}


def _kept(folder: Path) -> dict[str, Any] | None:
    """The report that a folder holds, if there is one that this version can go on with."""
    from ..profiling import report as pages

    try:
        return pages.load(folder / "report.json")
    except ValueError:
        return None


def _begun(args: argparse.Namespace, device: Device, folder: Path) -> dict[str, Any]:
    """A new record, with the paper's picture of the last; or, to resume, the unfinished one."""
    kept = _kept(folder)
    if args.resume:
        from .. import check

        sources = {name: check.find_op(name).sources for name in check.OPS}
        if kept is None or kept["sources"] != sources or kept["device"]["name"] != device.name:
            raise BadArgument(f"--resume: expected a report of this device and these kernels in {folder}, found none")
        return kept | {"complete": False}
    record = _record(args, device)
    return record | {"figure8": kept["figure8"]} if kept else record


# ---- what is drawn and compared --------------------------------------------------------------------------------------


def _load(option: str, path: str) -> dict[str, Any]:
    from ..profiling import report as pages

    try:
        return pages.load(Path(path))
    except ValueError as e:
        raise BadArgument(f"{option}: {e}") from None


def _draw_again(source: Path, root: Path | None, out: Console) -> int:
    """The page and pictures of a report, and the index above them: beside a report.json, or under ``root``."""
    from ..profiling import report as pages

    record = _load("--from", str(source))
    beside = root is None and source.name == "report.json"  # another name is not the page's own record
    folder = source.parent if beside else (root or OUT) / record["device"]["slug"]
    pages.save(record, folder)
    page = pages.render(record, folder)
    out.print(f"written: {page}, {pages.index(folder.parent)}", markup=False)
    return 0


def _shown(record: dict[str, Any]) -> Any:
    """The headline table for a terminal."""
    from ..profiling.charts import TITLES, timed
    from ..profiling.report import seconds, speed_ups

    peers = [p["name"] for p in record["peers"] if not p["missing"]]
    shown = table(
        f"selective_scan on {record['device']['name']}", "case", "direction", "what ran", "time", "cold", "Gelem/s",
        "of bound", "bound by", *(f"over {p}" for p in peers), "",
    )  # fmt: skip
    for case in record["cases"]:
        for use, need in case["uses"].items():
            for r in timed(case, use):
                gains = speed_ups(case, use, r["median_s"]) if r["kind"] == "backend" else {}
                shown.add_row(
                    case["title"], TITLES[use], r["runner"], seconds(r["median_s"]),
                    seconds(r["cold"]["median_s"]) if "cold" in r else "",
                    f"{need['elements'] / r['median_s'] / 1e9:.3g}", f"{100 * need['seconds'] / r['median_s']:.2g} %",
                    need["unit"], *(f"{gains[p]:.3g}x" if p in gains else "" for p in peers),
                    "disturbed" * bool(r.get("disturbed")),
                )  # fmt: skip
    return shown
