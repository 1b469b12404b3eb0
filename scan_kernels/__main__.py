"""The command line: ``scan-kernels VERB`` or ``python -m scan_kernels VERB``. Each verb is a module of ``cli``."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings

VERBS = {
    "info": "show the device, the backends, and what would run",
    "check": "compare every backend with the float64 reference",
    "tune": "find the fastest backend and configuration on this machine, and keep them",
    "bench": "time one shape, with its bound",
    "report": "check, time everything, and write a page with tables and pictures",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns its exit code: 0 done, 1 failed, 2 bad argument, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(
        prog="scan-kernels", description="Selective-scan (Mamba) kernels: inspect, check, tune, bench, report."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    chosen = next((a for a in argv if not a.startswith("-")), None)
    for name, line in VERBS.items():
        verb = verbs.add_parser(name, help=line, description=line)
        if name == chosen:
            module = importlib.import_module(f"scan_kernels.cli.{name}")
            module.add_arguments(verb)
    args = parser.parse_args(argv)
    from .cli import BadArgument
    from .op import BackendUnavailable

    # the verbs say themselves what is not tuned
    warnings.filterwarnings("ignore", message=r".* is not tuned for ")
    try:
        return module.run(args)
    except (BadArgument, BackendUnavailable) as e:
        verbs.choices[args.verb].error(str(e))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
