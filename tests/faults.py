"""Planted faults: a backend that computes as ``chunked`` does but for one thing, and CUDA sources changed likewise."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import os
import time
import types
from pathlib import Path

import torch
from echo import BREAKS

from scan_kernels.profiling.device import describe
from scan_kernels.selective_scan import OP
from scan_kernels.trials import Bench

PACKAGE = "scan_kernels.selective_scan.backends"
calls = itertools.count()


@dataclasses.dataclass(frozen=True)
class FaultyConfig:
    fault: str = "none"


FaultyConfig.__module__ = f"{PACKAGE}.faulty"


def run(direction, problem, tensors, config=None):
    chunked = OP.backends["chunked"]
    chosen = config or chunked.configs(problem, describe("cpu"))[0]
    getattr(chunked, direction)(problem, *tensors, chosen)


def beside(t, offset):
    """The element that lies so many elements off the tensor's first one."""
    return t.as_strided((1,), (1,), t.storage_offset() + offset)


def drop_tail(direction, problem, tensors, main):
    tail = main[..., problem.length // 16 * 16 :]
    before = tail.clone()
    run(direction, problem, tensors)
    tail.copy_(before)


def misuse_stride(direction, problem, tensors, main):
    inputs, *others = tensors
    delta = inputs.delta.as_strided(inputs.delta.shape, inputs.u.stride(), inputs.delta.storage_offset())
    run(direction, problem, (inputs._replace(delta=delta), *others))


def race(direction, problem, tensors, main):
    """Two writers of one element; which of them is the last one changes from call to call."""
    run(direction, problem, tensors)
    values = main[0, 0, 5], torch.nextafter(main[0, 0, 5], torch.tensor(torch.inf, dtype=main.dtype))
    main[0, 0, 5] = values[next(calls) % 2]


def write_before(direction, problem, tensors, main):
    run(direction, problem, tensors)
    beside(main, -1).zero_()


def write_behind(direction, problem, tensors, main):
    run(direction, problem, tensors)
    beside(main, main.numel()).zero_()


def use_stale_stage(direction, problem, tensors, main):
    """The second tile of time is multiplied by the first one's B."""
    inputs, *others = tensors
    B = inputs.B.clone()
    B[..., 32:64] = B[..., :32]
    run(direction, problem, (inputs._replace(B=B), *others))


def write_input(direction, problem, tensors, main):
    run(direction, problem, tensors)
    tensors[0].u[0, 0, 0] += 1


def spoil_states(direction, problem, tensors, main):
    run(direction, problem, tensors)
    if direction == "forward" and problem.checkpoint:
        tensors[1].states[1] = 0


def spoil_row(direction, problem, tensors, main):
    run(direction, problem, tensors)
    main[1, 3] *= 1.01


def spoil_sum(direction, problem, tensors, main):
    run(direction, problem, tensors)
    if direction == "backward":
        tensors[-1].dA[0] = 0


def fill_memory(*_):
    torch.empty(1 << 55)


def chatter(direction, problem, tensors, main):
    """Right, but noisy: what is printed must not get between the replies."""
    os.write(1, b'{"value": "garbage"}\nnoise')
    print("noise", flush=True)
    run(direction, problem, tensors)


def start_slowly(direction, problem, tensors, main):
    """Right, but compiled by its first run in a process, like a backend that cannot compile without running."""
    if next(calls) == 0:
        time.sleep(3.0)
    run(direction, problem, tensors)


KERNEL_FAULTS = {
    "tail": drop_tail, "stride": misuse_stride, "race": race, "bounds before": write_before,
    "bounds behind": write_behind, "stale stage": use_stale_stage, "input": write_input, "states": spoil_states,
    "row": spoil_row, "sum": spoil_sum,
}  # fmt: skip
PROCESS_FAULTS = BREAKS | {"memory": fill_memory, "chatter": chatter, "slow start": start_slowly}
FAULTS = KERNEL_FAULTS | PROCESS_FAULTS


def faulty(*names):
    """A backend whose candidates are "none" and the named faults; the right one dawdles, so that others would win."""
    module = types.ModuleType(FaultyConfig.__module__)
    module.RANK, module.Config = 999, FaultyConfig
    module.supports = lambda problem: None
    module.configs = lambda problem, device: [FaultyConfig(name) for name in ("none", *names)]

    def direction(name):
        def compute(problem, *arguments):
            *tensors, config = arguments
            results = tensors[-1]
            if config.fault == "none":
                time.sleep(2e-3)
                run(name, problem, tensors)
            else:
                FAULTS[config.fault](name, problem, tensors, results[0])

        return compute

    module.forward, module.backward = direction("forward"), direction("backward")
    return module


class FaultyBench(Bench):
    """A worker that has these backends, too."""

    def __init__(self, op, device):
        super().__init__(op, device)
        self.op.__dict__["backends"] = {
            "chunked": OP.backends["chunked"], "faulty": faulty(*FAULTS), "slow": slow_to_compile(),
        }  # fmt: skip


# ---- a backend that takes long to compile ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SlowConfig:
    number: int = 0


SlowConfig.__module__ = f"{PACKAGE}.slow"


def slow_to_compile(count=5, seconds=0.2, patience=20.0):
    """As if each candidate were compiled, to a disk that all processes share, before it first runs.

    The last one's compiler ends once a candidate ran, or when it is out of patience: nobody should wait for it.
    Every process writes what it does when into the folder FAULTS_LOG.
    """
    module = types.ModuleType(SlowConfig.__module__)
    module.RANK, module.Config = 999, SlowConfig
    module.supports = lambda problem: None
    module.configs = lambda problem, device: [SlowConfig(k) for k in range(count)]
    folder = Path(os.environ.get("FAULTS_LOG", "/nonexistent"))

    def log(what, number, begin):
        with (folder / "log").open("a") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            f.write(f"{what} {number} {begin} {time.time()} {os.getpid()}\n")

    def has_run():
        return (folder / "log").exists() and "ran " in (folder / "log").read_text()

    def compiled(number, length):
        marker = folder / f"{number}-{length}"  # each length is another kernel
        if not marker.exists():
            begin = time.time()
            time.sleep(seconds)
            while number == count - 1 and not has_run() and time.time() < begin + patience:
                time.sleep(0.01)
            marker.touch()
            log("compiled", number, begin)

    def prepare_forward(problem, inputs, outputs, config):
        if config.number == 3:
            os._exit(1)  # the compiler crashes
        compiled(config.number, problem.length)
        return lambda inputs, outputs: run("forward", problem, (inputs, outputs))

    def forward(problem, inputs, outputs, config):
        begin = time.time()
        prepare_forward(problem, inputs, outputs, config)(inputs, outputs)
        log("ran", config.number, begin)

    module.prepare_forward, module.forward = prepare_forward, forward
    return module


# ---- the same in the CUDA sources -----------------------------------------------------------------------------------

CUDA_FAULTS = {
    "tail": ("int tiles = (end - begin + TILE - 1) / TILE;", "int tiles = (end - begin) / TILE;"),
    "stride": ("place(AT_##T, p.T##_dim, p.T##_step, t0)", "place(AT_##T, p.u_dim, p.u_step, t0)"),
    "race": ("if (BC_TILES > 0 && !RELAY) __syncthreads(); else __syncwarp();", "__syncwarp();"),
    "bounds": ("SHORT ? extent(t0) : n;", "SHORT ? n : extent_of(o, count, TILE);"),
    "stale stage": (
        "read(ru, raw_u + buffer * RAW_WORDS), read(rd,",
        "read(ru, raw_u + (buffer ^ 1) * RAW_WORDS), read(rd,",
    ),
}


def planted(name):
    """What changes the text of the CUDA forward."""
    before, after = CUDA_FAULTS[name]

    def change(code):
        assert before in code or "scan_backward" in code, name
        return code.replace(before, after)

    return change
