"""``info``: this device, what is installed, and what would run."""

from __future__ import annotations

import argparse
import importlib

from . import console, fields, pick_device, table

SHOWN = 3  # named shapes
WHY = {
    "tuned": "tuned on this machine",
    "shipped": "table shipped for this device",
    "architecture": "table shipped for this architecture",
    "heuristic": "heuristic: not tuned",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:INDEX; by default the GPU if there is one")


def run(args: argparse.Namespace) -> int:
    from .. import check
    from ..autotune import store

    out = console()
    device = pick_device(args.device)
    units = "multiprocessors" if device.kind == "cuda" else "cores"
    out.print(f"device    {device.name} ({device.arch}, {device.units} {units}, {device.memory_bytes / 2**30:.0f} GiB)")
    out.print("versions  " + ", ".join(f"{k} {v}" for k, v in check.versions().items()))
    out.print(f"cache     {store.folder()} ({len(store.files())} tuned entries)")
    for name in check.OPS:
        op = importlib.import_module(f"scan_kernels.{name}").OP
        cases = op.cases.tagged(f"tune-{device.kind.replace('cuda', 'gpu')}")[:SHOWN]
        problems = {(c.name, use): c.used(use, device.kind) for c in cases for use in op.cases.USES}
        shown = table(name, "backend", "")
        for backend, reason in op.reasons(next(iter(problems.values()))).items():
            shown.add_row(backend, "available" if reason is None else reason)
        out.print(shown)
        shown = table(f"{name}: what would run", "shape", "use", "backend", "config", "why")
        for (case, use), problem in problems.items():
            choice = op.resolve(problem, device.torch)
            why = WHY[choice.source] + (f"; {choice.note}" if choice.note else "")
            shown.add_row(case, use, choice.backend, fields(choice.config), why)
        out.print(shown)
    return 0
