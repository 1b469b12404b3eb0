"""What tests of Triton kernels share: the interpreter's process, and compiling without a device."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

compiles_without_a_device = pytest.mark.skipif(
    tuple(int(v) for v in triton.__version__.split(".")[:2]) < (3, 3),
    reason="compiling without a device needs Triton 3.3",
)


def interpret(file, cases):
    """Runs a file's tests named test_interpreted in a process that interprets kernels; as many must pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", "test_interpreted"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert f"{cases} passed" in done.stdout


def recorder(recorded):
    """A launch that adds (kernel, its arguments by name, launch options) to a list instead."""

    def launch(kernel, grid, *args, **named):
        options = {"num_warps": named.pop("num_warps")}
        recorded.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | named, options))

    return launch


def compile_for_h100(kernel, arguments, options):
    """The cubin, specialised as a launch would be."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointer = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = pointer[value.dtype]
        elif value is None or kernel.params[i].is_constexpr or value == 1:
            signature[name], constants[(i,)] = "constexpr", value
            continue
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]


def spilled_bytes(cubin, folder):
    """Stack of a thread: what did not fit in registers."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton carries no cuobjdump")
    (folder / "kernel.cubin").write_bytes(cubin)
    usage = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout).group(1))
