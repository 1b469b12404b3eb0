"""What a GPU's own counters say that a call took, read by ncu where it is installed: the counting formulas' judge.

ncu runs one call in a process of its own. It needs leave to read the counters, which many shared machines do not give.
"""

from __future__ import annotations

import csv
import importlib
import shutil
import subprocess
import sys
from typing import Any

import torch

from . import measure

AGREE = 0.05  # share by which a formula may differ from the counters and still be called right
WARP = 32
# resource: ncu's metrics, each with what one of it counts
METRICS = {
    "bytes": {"dram__bytes_read.sum": 1, "dram__bytes_write.sum": 1},
    "exps": {"smsp__inst_executed_pipe_xu.sum": WARP},
    "flops": {
        "smsp__sass_thread_inst_executed_op_fadd_pred_on.sum": 1,
        "smsp__sass_thread_inst_executed_op_fmul_pred_on.sum": 1,
        "smsp__sass_thread_inst_executed_op_ffma_pred_on.sum": 2,
    },
    "issues": {"smsp__inst_executed.sum": WARP},
}
# the others are the least that the recurrence needs: a kernel adds addresses, loads and sums over lanes
EXACT = ("bytes", "exps")
SECONDS = 180  # that ncu may take: it starts Python, compiles, and replays each kernel several times


def found() -> str | None:
    """Where ncu is, or None."""
    return shutil.which("ncu")


def read(op: str, shape: str, backend: str, use: str) -> dict[str, float]:
    """resource -> what the counters say that one call took. shape: as ``cases.parse`` takes it.

    Errors: RuntimeError, with ncu's own words, if it gives no counters.
    """
    code = f"from scan_kernels.counters import once; once({op!r}, {shape!r}, {backend!r}, {use!r})"
    names = [name for metrics in METRICS.values() for name in metrics]
    command = [
        found() or "ncu", "--profile-from-start", "off", "--target-processes", "all", "--csv", "--page", "raw",
        "--print-units", "base", "--metrics", ",".join(names), sys.executable, "-c", code,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise RuntimeError(f"ncu: {e}"[:200]) from None
    return parse(done.stdout, done.stderr)


def parse(stdout: str, stderr: str = "") -> dict[str, float]:
    """The sums over all kernels of ncu's raw page. Errors: RuntimeError if there is none."""
    rows = list(csv.DictReader(line for line in stdout.splitlines() if line.startswith('"')))
    # the first row holds the units; a kernel has an ID
    kernels = [row for row in rows if row.get("ID")]
    if not kernels:
        said = [line for line in (stdout + "\n" + stderr).splitlines() if "ERR" in line or "rror" in line]
        raise RuntimeError(f"ncu gave no counters: {said[0].strip() if said else 'no kernel was profiled'}"[:200])
    sums = dict.fromkeys(METRICS, 0.0)
    for row in kernels:
        for resource, metrics in METRICS.items():
            for name, each in metrics.items():
                if name not in row:
                    raise RuntimeError(f"ncu knows no {name} on this GPU")
                sums[resource] += each * float(row[name].replace(",", ""))
    return sums


def once(op_name: str, shape: str, backend: str, use: str) -> None:
    """Run one call between the profiler's start and stop, after one that compiles."""
    package = importlib.import_module(f"scan_kernels.{op_name}")
    op: Any = package.OP
    tensors = op.cases.parse(shape, "bfloat16").make("cuda", seed=0)
    call = measure.call(measure.backend(op, backend, getattr(package, op_name)).scan, tensors, op.cases.ARGUMENTS, use)
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
