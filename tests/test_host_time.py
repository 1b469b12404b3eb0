"""On a GPU: what a call costs the host before the kernels run. Small scans are bound by it."""

from __future__ import annotations

import functools

import pytest
import torch

from scan_kernels import measure, selective_scan
from scan_kernels.profiling import timer
from scan_kernels.profiling.device import describe
from scan_kernels.selective_scan import cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.* is not tuned for"),
]
# Seconds: forward without gradients, forward that keeps what a backward needs, all gradients through autograd.
GOALS = {"inference": 40e-6, "training": 40e-6, "backward": 60e-6}
SLACK = 2  # for a slow or busy host


@pytest.mark.parametrize("use", GOALS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["length", "dim"])
def test_host_time_of_a_call(use, dtype, layout):
    case = cases.Case("tiny", batch=1, dim=64, length=64, dtype=dtype, layout=layout)
    scan = functools.partial(selective_scan, backend="cuda", delta_softplus=True)
    tensors = {k: v for k, v in case.make("cuda").items() if k != "delta_softplus"}
    call = measure.call(scan, tensors, cases.ARGUMENTS, use)
    time = timer.host(call, describe("cuda"))
    print(f"{use} {dtype} {layout}: {time.median_s * 1e6:.1f} us, {time.low_s * 1e6:.1f} to {time.high_s * 1e6:.1f}")
    assert time.median_s < SLACK * GOALS[use]
