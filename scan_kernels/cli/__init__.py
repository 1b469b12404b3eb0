"""The verbs of ``python -m scan_kernels``: one module each, with

    add_arguments(parser)    its options
    run(args) -> int         the exit code

(``report`` is spread over three: what it measures, step by step, and how it compares stand in ``report_*.py``.)

A verb composes the rooms: it may import all of them, and nothing imports a verb. Imports stand inside the functions,
so that one verb's help does not wait for another's libraries. To add a verb, add its module and a line to ``VERBS`` in
``__main__.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..profiling.device import Device


class BadArgument(ValueError):
    """An argument that makes no sense: one line for the user and exit code 2."""


def pick_device(text: str | None) -> Device:
    """The device named, made current; by default the GPU if there is one, else the CPU."""
    import torch

    from ..profiling.device import describe

    name = text or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadArgument(f"--device: expected cpu, cuda or cuda:INDEX, got {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise BadArgument("--device: torch sees no CUDA device here")
        if (device.index or 0) >= torch.cuda.device_count():
            raise BadArgument(f"--device: {name}: there are {torch.cuda.device_count()} CUDA devices")
        if device.index is not None:
            torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise BadArgument(f"--device: expected cpu or cuda, got {name!r}")
    return describe(device)


def console() -> Console:
    """Where verbs print: as wide as the terminal, and wide enough for tables in a file or a pipe."""
    from rich.console import Console

    wide = Console(highlight=False)
    return wide if wide.is_terminal else Console(highlight=False, width=160)


def table(title: str, *columns: str) -> Table:
    """A plain table whose cells are words, not markup."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    made = Table(box=SIMPLE_HEAD, title=Text(title), title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def seconds(s: float) -> str:
    """A time with its unit: "49.5 us"."""
    unit, scale = next(((u, k) for u, k in (("s", 1.0), ("ms", 1e-3)) if s >= k), ("us", 1e-6))
    return f"{s / scale:.4g} {unit}"


def fields(config: object) -> str:
    """A Config without its name: "chunk=64"."""
    return str(config).partition("(")[2].removesuffix(")")
