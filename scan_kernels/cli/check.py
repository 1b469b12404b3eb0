"""``check``: every backend against the float64 reference."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import BadArgument, console, pick_device, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", help="only this op (may be repeated)")
    parser.add_argument("--backend", action="append", help="only this backend (may be repeated)")
    parser.add_argument("--device", help="cpu, cuda or cuda:INDEX; by default the GPU if there is one")
    parser.add_argument("--record", action="store_true", help="write bench_reports/<device>/check.json")


def run(args: argparse.Namespace) -> int:
    """Print a row a backend and case: its worst tensor. Exit code 1 on any failure, or if nothing could run."""
    from rich.progress import Progress
    from rich.text import Text

    from .. import check

    names = args.op or list(check.OPS)
    for name in names:
        try:
            op = check.find_op(name)
        except ValueError as e:
            raise BadArgument(str(e)) from None
        for backend in args.backend or ():
            if backend not in op.backends:
                raise BadArgument(f"--backend: expected one of {', '.join(op.backends)}, got {backend!r}")
    device = pick_device(args.device)
    tags = ("ci", "gpu") if device.kind == "cuda" else ("ci",)
    out = console()
    with Progress(console=out, transient=True) as bar:
        task = bar.add_task("check", total=sum(check.count(name, tags) for name in names))
        rows, skipped = check.run(
            names, args.backend, device.torch, tags, lambda text: bar.update(task, advance=1, description=text)
        )
    shown = table("", "op", "backend", "case", "worst tensor", "error", "allowance", "worst row", "")
    cases: dict[tuple[str, str, str], list[check.Row]] = {}
    for row in rows:
        cases.setdefault((row.op, row.backend, row.case), []).append(row)
    failed = 0
    for key, group in cases.items():
        worst = max(group, key=lambda r: (not r.ok, r.worst_row))
        failed += not worst.ok
        verdict = Text(f"pass {worst.reason}", "green") if worst.ok else Text(f"FAIL {worst.reason}", "red")
        figures = (f"{worst.error:.1e}", f"{worst.allowance:.1e}", f"{worst.worst_row:.2f}")
        shown.add_row(*key, worst.tensor, *figures, verdict)
    out.print(shown)
    for name, reasons in skipped.items():
        for backend, reason in reasons.items():
            out.print(f"{name}: {backend} skipped: {reason}", markup=False)
    out.print(f"{len(cases) - failed} passed, {failed} failed on {device.name}")
    if args.record:
        out.print(f"recorded in {check.write_record(rows, skipped, names, device.torch, Path('bench_reports'))}")
    return 1 if failed or not cases else 0
