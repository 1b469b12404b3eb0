"""Benchmarks for pytest-benchmark: ``pytest --benchmark-only``, off otherwise; no figure of theirs is in a report.

The cases are those of the report, with every backend that can run here. A round is one call and waits for the device:
what it shows is a user's wall clock, launches and waiting included. ``--benchmark-autosave``, ``--benchmark-compare``
and the rest of pytest-benchmark's options work as usual.
"""

from __future__ import annotations

import pytest
import torch

from scan_kernels import measure, selective_scan
from scan_kernels.profiling.ceilings import ceilings
from scan_kernels.profiling.device import describe
from scan_kernels.selective_scan import OP
from scan_kernels.selective_scan.cases import ARGUMENTS, Case, tagged

KIND = "cuda" if torch.cuda.is_available() else "cpu"
TINY = Case("tiny", batch=1, dim=16, length=64, tags=())
CASES = {case.name: case for case in [TINY, *tagged("bench-gpu" if KIND == "cuda" else "bench-cpu")]}
ROUNDS_S = 0.5  # of a benchmark, at most

pytestmark = [
    pytest.mark.benchmark(max_time=ROUNDS_S, min_rounds=3, warmup=True, warmup_iterations=2),
    pytest.mark.filterwarnings("ignore:.* is not tuned for"),
]


@pytest.mark.parametrize("use", measure.USES)
@pytest.mark.parametrize("backend", list(OP.backends))
@pytest.mark.parametrize("name", CASES)
def test_scan(benchmark, name, backend, use):
    case, device = CASES[name], describe(KIND)
    problem = case.used(use, KIND)
    if (reason := OP.reasons(problem)[backend]) is not None:
        pytest.skip(reason)
    runner = measure.backend(OP, backend, selective_scan)
    call = measure.call(runner.scan, case.make(device.torch, seed=0), ARGUMENTS, use)
    synchronise = torch.cuda.synchronize if KIND == "cuda" else lambda: None

    def round_() -> None:
        call()
        synchronise()

    # the bound stands beside the time in --benchmark-json and in what --benchmark-save keeps
    need = measure.bounds(problem, ceilings(device))
    benchmark.group = f"{name} {use}"
    benchmark.extra_info |= {"bound_s": need["seconds"], "bound_by": need["unit"], "elements": need["elements"]}
    benchmark(round_)
