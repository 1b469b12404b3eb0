"""On a GPU: compute-sanitizer on a call of every family of variants of the CUDA kernels, and on the block's in Triton.

``compute-sanitizer --tool memcheck python tests/test_sanitizer.py memcheck`` runs the calls alone.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

from scan_kernels import Mamba, cuda_module, selective_scan
from scan_kernels.selective_scan.backends import cuda
from scan_kernels.selective_scan.backends.cuda import Config
from scan_kernels.selective_scan.cases import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer"),
]

CALLS: dict[str, tuple[dict[str, Any], dict[str, Config], bool]] = {  # case, configs, whether deterministic
    "plain": ({"dim": 72, "dtype": "bfloat16"}, {}, False),
    "relay": ({"dim": 24, "length": 300}, {"forward": Config(4, 8, 16, 2, groups=2, relay=1)}, False),
    "time cut": (
        {"dim": 40, "length": 700, "dtype": "bfloat16"},
        {
            "forward": Config(4, 4, 16, 1, splits=3),
            "backward": Config(8, 4, 16, 2, splits=3, finer=2, groups=2, relay=1),
        },
        False,
    ),
    "packed": ({"dim": 40, "lengths": (70, 0, 1, 33), "dtype": "bfloat16"}, {}, False),
    "dim": ({"dim": 80, "layout": "dim", "dtype": "float16"}, {}, False),
    "dim, deterministic": ({"dim": 96, "length": 130, "layout": "dim", "dtype": "bfloat16"}, {}, True),
    "y and few states kept": (
        {"dim": 72, "length": 150, "dtype": "bfloat16"},
        {"forward": Config(2, 4, 32, 4, checkpoint=32, keep_y=True)},
        False,
    ),
    "64 states": ({"dim": 40, "length": 150, "state": 64, "dtype": "bfloat16"}, {}, False),
    "256 states": ({"dim": 16, "state": 256, "dtype": "bfloat16"}, {}, False),
    "windows": ({"batch": 3, "dim": 72, "length": 300, "state": 32}, {}, False),  # by SCRATCH of ``main``
}


def main(tool: str) -> None:
    warnings.filterwarnings("ignore", ".* is not tuned for")
    source = cuda_module.source
    if tool == "racecheck":  # it follows no other way of passing turns: see Turn
        cuda_module.source = lambda *a: "#define TURN_ARRIVALS 32\n" + source(*a)
    cuda.SCRATCH = 1 << 16
    for name, (fields, configs, deterministic) in CALLS.items():
        t = {k: v for k, v in Case(name, **{"length": 100, **fields}).make("cuda").items() if v is not None}
        dout = t.pop("dout")
        t.pop("dlast_state")
        for v in t.values():
            if isinstance(v, torch.Tensor) and v.is_floating_point():
                v.requires_grad_()
        selective_scan(**t, backend="cuda", config=configs or None, deterministic=deterministic).backward(dout)
        torch.cuda.synchronize()
        print(name, float(t["u"].grad.float().abs().sum()), flush=True)
    mamba, x = Mamba(44, device="cuda"), torch.randn(2, 150, 44, device="cuda", requires_grad=True)
    mamba(x).sum().backward()
    mamba.step(x[:, :1], mamba.allocate_cache(2))
    torch.cuda.synchronize()
    print("block", float(x.grad.abs().sum()), flush=True)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_found(tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3", sys.executable, __file__, tool]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert re.search(r"SUMMARY: 0 (errors|hazards)", said), said[-4000:]
    assert all(f"{name} " in done.stdout for name in (*CALLS, "block")), said[-4000:]


if __name__ == "__main__":
    main(sys.argv[1])
