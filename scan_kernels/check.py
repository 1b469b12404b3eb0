"""The gate: every backend against the float64 reference. No speed is reported on a red gate.

A result is accepted if its error is at most twice that of the plain PyTorch implementation in the same dtype, both
measured against float64, for the tensor as a whole and for each of its rows (all axes but the last: a (batch,
channel) row of out, a channel's row of dA). A row where plain is right to the last bit by luck is granted plain's
typical relative error, and a floor stands below everything: 1e-6 of the norm for float32 data; 5e-6 for 16-bit data,
whose float32 by-products (last_state, dA, ...) come from inputs that are themselves rounded to 4e-3 or 5e-4. Outputs
and scratch memory start as NaN. Where the reference is not finite, nothing is asked; where it is, the result must be.

Inputs are fresh random numbers, so a sum of many terms now and then cancels to almost nothing, and its relative error
is then a matter of luck for plain and candidate alike. A near miss, below NEAR times an allowance, is therefore drawn
again, up to DRAWS times in all; what is wrong by more, or wrong in every draw, fails. The row says if it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import os
import platform
from collections.abc import Iterator
from concurrent import futures
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .op import BackendUnavailable, Op
from .profiling.device import describe
from .profiling.files import write

FACTOR = 2.0
NEAR, DRAWS = 3.0, 3
FLOORS = {"float32": 1e-6, "bfloat16": 5e-6, "float16": 5e-6}
OPS = ("selective_scan",)


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of one case on one backend."""

    op: str
    backend: str
    case: str
    tensor: str
    error: float  # ‖x - reference‖ / ‖reference‖
    allowance: float
    worst_row: float  # largest share of its allowance that a row used
    ok: bool
    reason: str = ""


def find_op(name: str) -> Op:
    """The op of that name; ValueError listing the known ones."""
    if name not in OPS:
        raise ValueError(f"--op: expected one of {', '.join(OPS)}, got {name!r}")
    return importlib.import_module(f"scan_kernels.{name}").OP


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill every torch.empty with NaN, so that what a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic  # a module whose switch is a property: no type checker knows it
    fill = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switches.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = fill


def _norms(x: np.ndarray, finite: np.ndarray) -> tuple[float, np.ndarray]:
    """Norm of the finite part: of the tensor, and of each row."""
    rows = np.sqrt((np.where(finite, x, 0.0) ** 2).reshape(-1, x.shape[-1]).sum(-1))
    return float(np.sqrt((rows**2).sum())), rows


def compare(exact: np.ndarray, plain: np.ndarray, got: np.ndarray, floor: float) -> tuple[float, float, float, bool]:
    """(error, allowance, worst row's share of its allowance, accepted) of ``got`` against ``exact``.

    floor: what is allowed however good plain PyTorch is, as a share of the norm: ``FLOORS`` of the inputs' dtype.
    """
    if exact.size == 0:
        return 0.0, floor, 0.0, got.shape == exact.shape
    if exact.ndim == 0 or got.shape != exact.shape:
        return np.inf, floor, np.inf, False
    finite = np.isfinite(exact)
    with np.errstate(all="ignore"):
        # where plain PyTorch overflows its dtype, the candidate may too
        finite &= np.isfinite(plain)
        lost = bool((finite & ~np.isfinite(got)).any())
        error, error_rows = _norms(got - exact, finite & np.isfinite(got))
        yardstick, yardstick_rows = _norms(plain - exact, finite)
        norm, norm_rows = _norms(exact, finite)
        typical = norm / np.sqrt(len(norm_rows))
        luckless = norm_rows * (yardstick / norm if norm else 0.0)
        allowed = FACTOR * yardstick + floor * norm
        allowed_rows = FACTOR * np.maximum(yardstick_rows, luckless) + floor * np.maximum(norm_rows, typical)
        share = np.max(error_rows / np.maximum(allowed_rows, np.finfo(np.float64).tiny))
    scale = norm or 1.0
    ok = not lost and error <= allowed and share <= 1.0
    return (np.inf if lost else error / scale), allowed / scale, float(share), bool(ok)


def run_case(
    op: Op, case: Any, device: torch.device | str, backends: list[str], config: Any = None, seed: int | None = None
) -> list[Row]:
    """Run one case, with the same tensors, on each backend, and judge every output and gradient.

    A backend that cannot run the case gives no rows; config is for a single backend.
    """
    device = torch.device(device)
    problems = [case.problem(direction, device.type, training=True) for direction in ("forward", "backward")]
    able = [b for b in backends if not any(op.reasons(p).get(b, "no such backend") for p in problems)]
    if not able:
        return []
    done: list[Row] = []
    note = ""
    for draw in range(1, (DRAWS if seed is None else 1) + 1):
        rows = _draw(op, case, device, able, config, seed, note)
        again = [
            b for b in able if any(not r.ok for r in rows if r.backend == b)
            and all(r.ok or max(r.worst_row, r.error / r.allowance) < NEAR for r in rows if r.backend == b)
        ]  # fmt: skip
        if draw == DRAWS or not again:
            break
        done += [r for r in rows if r.backend not in again]
        rows, able, note = [r for r in rows if r.backend in again], again, f"draw {draw + 1}, after a near miss"
    return sorted(done + rows, key=lambda row: backends.index(row.backend))


def _draw(op: Op, case: Any, device: torch.device, backends: list[str], config: Any, seed: int | None, note: str):
    """Rows of every backend for one draw of the case's tensors."""
    tensors = case.make(device, seed)
    exact, plain = judged(op, tensors)
    rows: list[Row] = []
    for backend in backends:
        try:
            with poisoned():
                got = op.cases.candidate(tensors, backend, config)
        except BackendUnavailable:
            continue
        except Exception as e:
            rows.append(
                Row(
                    op.name,
                    backend,
                    case.name,
                    "",
                    np.inf,
                    FLOORS[case.dtype],
                    np.inf,
                    False,
                    f"{type(e).__name__}: {e}",
                )
            )
        else:
            rows += [
                dataclasses.replace(_row(op, backend, case, name, exact, plain, got), reason=note) for name in exact
            ]
    return rows


def judged(op: Op, tensors: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The float64 results and those of plain PyTorch for the same tensors."""
    plain = {k: v.double().cpu().numpy() for k, v in op.cases.baseline(tensors).items()}
    return op.cases.judge(tensors), plain


def _row(op, backend, case, name, exact, plain, got) -> Row:
    result = got[name].double().cpu().numpy()
    error, allowance, share, ok = compare(exact[name], plain[name], result, FLOORS[case.dtype])
    return Row(op.name, backend, case.name, name, error, allowance, share, ok)


def versions() -> dict[str, str]:
    """Versions of what the results depend on."""
    found = {"python": platform.python_version()}
    for name in ("scan-kernels", "torch", "triton", "numpy", "numba", "cupy-cuda12x", "cupy-cuda13x"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def count(name: str, tags: tuple[str, ...]) -> int:
    """How many cases ``run`` goes through for one op."""
    return len([c for c in find_op(name).cases.CASES if set(c.tags) & set(tags)])


def run(
    ops: list[str], backends: list[str] | None, device: torch.device, tags: tuple[str, ...], progress: Any = None
) -> tuple[list[Row], dict[str, dict[str, str]]]:
    """Run every case with one of the tags on every backend. Returns the rows, and skipped[op][backend] = reason.

    On a GPU, cases run side by side in processes of their own: the reference and compilers take most of the time.
    """
    rows: list[Row] = []
    skipped: dict[str, dict[str, str]] = {}
    for name in ops:
        op = find_op(name)
        cases = [c for c in op.cases.CASES if set(c.tags) & set(tags)]
        able = []
        for backend in backends or list(op.backends):
            reasons = [op.reasons(c.problem("forward", device.type)).get(backend, "no such backend") for c in cases]
            if all(reasons):
                skipped.setdefault(name, {})[backend] = reasons[0] or ""
            else:
                able.append(backend)
        found: dict[str, list[Row]] = {}
        for case, of_case in _side_by_side(op, cases, device, able):
            found[case] = of_case
            if progress is not None:
                progress(f"{name} {case}")
        in_order = (row for case in cases for row in found[case.name])
        rows += sorted(in_order, key=lambda row: able.index(row.backend))
    return rows, skipped


def _workers(device: torch.device) -> int:
    """Processes that check cases side by side: each needs a core, and room for a context and a case on the GPU."""
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    return min(14, (os.cpu_count() or 1) - 2, free >> 32)


def _side_by_side(op: Op, cases: list[Any], device: torch.device, able: list[str]) -> Iterator[tuple[str, list[Row]]]:
    """(case's name, its rows) as they are done."""
    workers = min(len(cases), _workers(device))
    if workers < 2:
        for case in cases:
            yield case.name, run_case(op, case, device, able)
        return
    with futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            pending = {pool.submit(_rows_of, op.name, case.name, str(device), able): case.name for case in cases}
            for done in futures.as_completed(pending):
                yield pending[done], done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _rows_of(op_name: str, case_name: str, device: str, able: list[str]) -> list[Row]:
    """In a process of its own: the rows of a case."""
    op = find_op(op_name)
    return run_case(op, next(c for c in op.cases.CASES if c.name == case_name), device, able)


def write_record(rows: list[Row], skipped: dict, ops: list[str], where: torch.device, folder: Path) -> Path:
    """bench_reports/<device>/check.json: device, versions, hash of the kernel sources, every row."""
    device = describe(where)
    target = folder / device.slug / "check.json"
    content = {
        "device": dataclasses.asdict(device),
        "versions": versions(),
        "sources": {name: find_op(name).sources for name in ops},
        "skipped": skipped,
        "passed": sum(r.ok for r in rows),
        "failed": sum(not r.ok for r in rows),
    }
    lines = ",\n".join(json.dumps(_plain_numbers(dataclasses.asdict(r))) for r in rows)
    head = json.dumps(content, indent=1)
    write(target, head[:-2] + ',\n "rows": [\n' + lines + "\n]}\n")
    return target


def _plain_numbers(row: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity; four digits tell an error."""
    return {k: (float(f"{v:.4g}") if np.isfinite(v) else str(v)) if isinstance(v, float) else v for k, v in row.items()}
