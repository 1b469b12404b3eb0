"""Numba on the CPU: vectors of channels, threads over channel blocks and rows. The default where there is no GPU."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch
from torch import Tensor

from ..problem import Cotangents, Gradients, Inputs, Kept, Outputs, Problem

RANK = 0
LANES = 16
MOST_TASKS = 128  # tasks that rows are cut into where channels alone give fewer: a fixed number, whatever the threads
_LOCK = threading.Lock()
KINDS = {"float32": 0, "bfloat16": 1, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut. The results depend on it in rounding only, and on the number of threads not at all."""

    blocks: int  # blocks of 16 channels that share one packed tile of B and C, and one partial sum of dB and dC
    steps: int  # time steps of a tile: all of a tile's scratch should stay in the first-level cache


def supports(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return f"runs on the CPU only, not on {problem.device}"
    return "does not keep y for the backward" if problem.keep_y else None


def configs(problem: Problem, device) -> list[Config]:
    """First the most blocks that leave two tasks for every core; forwards, longer tiles mean fewer memory streams."""
    steps = 128 if problem.direction == "forward" else 64
    all_blocks = problem.groups * -(-(problem.dim // problem.groups) // LANES) * problem.rows
    first = next((n for n in (8, 4, 2) if all_blocks >= 2 * n * device.units), 1)
    return [
        Config(first, steps),
        *(Config(n, s) for n in (1, 2, 4, 8) for s in (32, 64, 128) if (n, s) != (first, steps)),
    ]


def _fill(call, name: str, tensor: Tensor | None, axes: str = "") -> None:
    """Address of a tensor and, where asked for, its strides in bytes."""
    if tensor is None:
        return
    call[name] = tensor.data_ptr()
    for axis, stride in zip(axes, tensor.stride(), strict=False):
        call[f"{name}_{axis}"] = stride * tensor.element_size()


def _call(problem: Problem, inputs: Inputs, config: Config):
    """The record that tells a kernel everything, with the inputs filled in, and the offsets of packed sequences."""
    from . import cpu_kernels

    p = problem
    call = cpu_kernels.np.zeros(1, cpu_kernels.CALL)
    c = call[0]
    for name in ("u", "delta", "z"):
        _fill(c, name, getattr(inputs, name), "bdt")
    for name in ("B", "C"):
        tensor = getattr(inputs, name)
        _fill(c, name, tensor, "bgnt" if tensor.ndim == 4 else "")
    for name in ("A", "D", "delta_bias", "initial_state"):
        _fill(c, name, getattr(inputs, name))
    for name in (
        "batch",
        "dim",
        "length",
        "state",
        "groups",
        "rows",
        "softplus",
        "checkpoint",
        "constant_B",
        "constant_C",
    ):
        c[name] = getattr(p, name)
    c["kind"] = KINDS[p.dtype]
    blocks = -(-(p.dim // p.groups) // LANES)
    c["part_blocks"] = min(blocks, config.blocks)
    c["parts"] = p.groups * -(-blocks // c["part_blocks"])
    c["chunks"] = min(p.rows, -(-MOST_TASKS // c["parts"]))
    c["steps"] = config.steps
    c["offsets"] = p.sequences > 0
    offsets = torch.zeros(1, dtype=torch.int64) if inputs.cu_seqlens is None else inputs.cu_seqlens.to(torch.int64)
    return call, offsets.numpy()


def _launch(kernel, tasks: int, *arguments) -> None:
    """Run on as many threads as torch would use, and no more than there are tasks.

    Where Numba has only its own thread pool (the layer "workqueue"), two threads that enter it at once abort the
    process, hence the lock.
    """
    import numba

    config: Any = numba.config
    with _LOCK:
        before = numba.get_num_threads()
        numba.set_num_threads(min(torch.get_num_threads(), config.NUMBA_NUM_THREADS, tasks))
        try:
            kernel(*arguments)
        finally:
            numba.set_num_threads(before)


def forward(problem: Problem, inputs: Inputs, outputs: Outputs, config: Config) -> None:
    from . import cpu_kernels

    call, offsets = _call(problem, inputs, config)
    c = call[0]
    _fill(c, "out", outputs.out, "bdt")
    _fill(c, "last_state", outputs.last_state)
    _fill(c, "states", outputs.states)
    tasks = int(c["parts"] * c["chunks"])
    _launch(cpu_kernels.forward, tasks, tasks, call, offsets)


def backward(
    problem: Problem, inputs: Inputs, kept: Kept, cotangents: Cotangents, gradients: Gradients, config: Config
) -> None:
    """Sums over channels or rows that several tasks share go through one partial sum for each task, added in order."""
    from . import cpu_kernels

    p = problem
    call, offsets = _call(problem, inputs, config)
    c = call[0]
    parts, chunks = int(c["parts"]), int(c["chunks"])
    _fill(c, "states", kept.states)
    _fill(c, "dlast_state", cotangents.dlast_state)
    _fill(c, "dout", cotangents.dout, "bdt")
    for name in ("du", "ddelta", "dz"):
        _fill(c, name, getattr(gradients, name), "bdt")
    _fill(c, "dinitial_state", gradients.dinitial_state)
    partial = {}
    for name, constant in (
        ("dA", True),
        ("dB", p.constant_B),
        ("dC", p.constant_C),
        ("dD", True),
        ("ddelta_bias", True),
    ):
        if (whole := getattr(gradients, name)) is not None:
            outer = (1, chunks, 1) if constant else (p.groups, parts // p.groups, p.batch)
            partial[name] = torch.empty(*outer, whole.numel() // (outer[0] * outer[2]))
            _fill(c, name, partial[name])
    _launch(cpu_kernels.backward, parts * chunks, parts * chunks, call, offsets)
    for name, sums in partial.items():
        whole = getattr(gradients, name).view(sums.shape[2], sums.shape[0], -1)
        _launch(cpu_kernels.add_up, -(-whole.numel() // cpu_kernels.SPAN), sums.numpy(), whole.numpy())
