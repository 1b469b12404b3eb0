"""``check``: every backend against the float64 reference."""

from __future__ import annotations

import argparse

from . import BadArgument, pick_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", help="only this op (may be repeated)")
    parser.add_argument("--backend", action="append", help="only this backend (may be repeated)")
    parser.add_argument("--device", help="cpu, cuda or cuda:INDEX; by default the GPU if there is one")
    parser.add_argument("--record", action="store_true", help="write bench_reports/<device>/check.json")


def run(args: argparse.Namespace) -> int:
    from .. import check

    for name in args.op or check.OPS:
        try:
            op = check.find_op(name)
        except ValueError as e:
            raise BadArgument(str(e)) from None
        for backend in args.backend or ():
            if backend not in op.backends:
                raise BadArgument(f"--backend: expected one of {', '.join(op.backends)}, got {backend!r}")
    return check.main(args.op, args.backend, str(pick_device(args.device).torch), args.record)
