"""Who this device is and what it can do at most: the one place that asks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch


@dataclasses.dataclass(frozen=True)
class Device:
    """A device as dispatch, tuner and report need to know it."""

    kind: str  # torch device type: "cuda" or "cpu"
    index: int
    name: str  # product name as the driver or the kernel gives it
    arch: str  # "sm_90"; for a CPU its machine type, such as "x86_64"
    units: int  # multiprocessors, or cores this process may run on
    shared_memory: int  # bytes of shared memory a block may use; 0 on a CPU
    l2_bytes: int  # last shared cache, 0 where unknown
    memory_bytes: int

    @property
    def slug(self) -> str:
        """The name as a folder: letters, digits and dashes."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def torch(self) -> torch.device:
        return torch.device(self.kind, self.index) if self.kind != "cpu" else torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """The most of one resource that a device delivers."""

    resource: str  # what is counted, named as a problem's method that counts it: "bytes", "exps", "flops"
    per_second: float
    unit: str  # what serves it; resources served by the same unit wait for each other
    source: str  # how the figure was found


Ceilings = tuple[Ceiling, ...]


def describe(device: torch.device | str) -> Device:
    """Describe a torch device; the current one of its kind where no index is given."""
    device = torch.device(device)
    if device.type == "cuda":
        return _describe_cuda(torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "cpu":
        return _describe_cpu()
    return Device(device.type, device.index or 0, device.type, device.type, 1, 0, 0, 0)


@functools.cache
def _describe_cuda(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    return Device(
        kind="cuda",
        index=index,
        name=p.name,
        arch=f"sm_{p.major}{p.minor}",
        units=p.multi_processor_count,
        shared_memory=getattr(p, "shared_memory_per_block_optin", 48 * 1024),
        l2_bytes=getattr(p, "L2_cache_size", 0),
        memory_bytes=p.total_memory,
    )


@functools.cache
def _describe_cpu() -> Device:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), name)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        memory = 0
    return Device("cpu", 0, name, platform.machine(), cores, 0, 0, memory)


def setting(device: Device) -> dict[str, int | None]:
    """What may change how fast a device is while it stays the same one; None where nobody tells.

    memory_mhz: highest memory clock. driver: its major version. power_w: the limit set. A CPU has none of these.
    """
    return dict(_setting(device.index) if device.kind == "cuda" else dict.fromkeys(("memory_mhz", "driver", "power_w")))


@functools.cache
def _setting(index: int) -> dict[str, int | None]:
    found: dict[str, int | None] = dict.fromkeys(("memory_mhz", "driver", "power_w"))
    # no library, no driver, no permission: NVML has an error class for each
    with contextlib.suppress(Exception):
        nvml, handle = _nvml(index)
        found["driver"] = int(_text(nvml.nvmlSystemGetDriverVersion()).partition(".")[0])
        found["memory_mhz"] = int(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM))
        found["power_w"] = round(nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1e3)
    return found


def clocks(device: Device) -> dict[str, int]:
    """The clocks of this moment in MHz, as far as somebody tells."""
    found: dict[str, int] = {}
    with contextlib.suppress(Exception):
        if device.kind == "cuda":
            nvml, handle = _nvml(device.index)
            for name, clock in (("sm", nvml.NVML_CLOCK_SM), ("memory", nvml.NVML_CLOCK_MEM)):
                found[f"{name}_mhz"] = int(nvml.nvmlDeviceGetClockInfo(handle, clock))
        else:
            with open("/proc/cpuinfo", encoding="utf-8") as f:
                figures = [float(line.split(":", 1)[1]) for line in f if line.startswith("cpu MHz")]
            found["core_mhz"] = round(max(figures))
    return found


def _nvml(index: int) -> tuple:
    """NVML, and its handle of torch's device of that index."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")


def _text(said: str | bytes) -> str:
    return said.decode() if isinstance(said, bytes) else said


# ---- ceilings ----------------------------------------------------------------------------------------------

# Measured with hand-written loops on one NVIDIA H100 80GB HBM3 at 1980 MHz, November 2026: per second.
MEASURED = {"NVIDIA H100 80GB HBM3": {"bytes": 3.00e12, "exps": 4.12e12, "flops": 2 * 30.8e12}}
# Lanes of a multiprocessor that finish in one clock (CUDA programming guide, arithmetic instructions): FMA, ex2.
LANES = {
    "sm_70": (64, 16), "sm_75": (64, 16), "sm_80": (64, 16), "sm_86": (128, 16), "sm_87": (128, 16),
    "sm_89": (128, 16), "sm_90": (128, 16), "sm_100": (128, 16), "sm_103": (128, 32), "sm_120": (128, 16),
}  # fmt: skip


@functools.cache
def ceilings(device: Device) -> Ceilings:
    """What bounds a kernel on this device: memory traffic, exponentials and fp32 arithmetic (an FMA counts 2).

    Measured once per process, in about a second; what cannot be measured faithfully from Python on a GPU comes from
    a table or from its clock, and ``Ceiling.source`` says so. A resource whose rate is unknown is left out.
    """
    if device.kind == "cuda":
        return _ceilings_cuda(device)
    return _ceilings_cpu(device) if device.kind == "cpu" else ()


def _ceilings_cuda(device: Device) -> Ceilings:
    table = MEASURED.get(device.name, {})
    rates = dict(table)
    sources = dict.fromkeys(table, "measured on this model by hand-written loops")
    megahertz = _clock(device.index)
    if not table and device.arch in LANES and megahertz:
        for resource, lanes, operations in zip(("flops", "exps"), LANES[device.arch], (2, 1), strict=True):
            rates[resource] = float(lanes * operations * device.units * megahertz * 1e6)
            sources[resource] = f"{lanes} lanes/clock x {device.units} multiprocessors x {megahertz:.0f} MHz"
    if copied := _copy_rate(device):
        rates["bytes"], sources["bytes"] = copied, "measured: torch copy, bytes read and written"
    units = {"bytes": "memory", "exps": "special-function units", "flops": "fp32 units"}
    return tuple(Ceiling(name, rates[name], unit, sources[name]) for name, unit in units.items() if name in rates)


def _clock(index: int) -> float:
    """The highest multiprocessor clock in MHz; 0 where nobody tells."""
    if kilohertz := getattr(torch.cuda.get_device_properties(index), "clock_rate", 0):
        return kilohertz / 1e3
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return float(pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM))
    except Exception:
        # no library, no driver, no permission: NVML has an error class for each
        return 0.0


def _copy_rate(device: Device) -> float:
    """Bytes per second that a copy reads and writes in a GPU's memory; 0 where there is no room for it."""
    from .timer import measure

    size = min(1 << 30, device.memory_bytes // 16)
    try:
        source = torch.ones(size // 4, device=device.torch)
        target = torch.empty_like(source)
    except torch.OutOfMemoryError:
        return 0.0
    return 2 * size / measure(lambda: target.copy_(source), device, seconds=0.15).low_s


FMA_CHAIN = 16
COPIED = 1 << 28  # bytes, by all cores together: several times the last cache


def _ceilings_cpu(device: Device) -> Ceilings:
    import numpy as np

    exp2, fma = _cpu_loops()
    cores, size, times = device.units, 2048, 4000
    buffers = [np.full(size, 0.5, np.float32) for _ in range(cores)]
    sources = [np.ones(COPIED // cores // 4, np.float32) for _ in range(cores)]
    targets = [np.ones_like(source) for source in sources]
    copies = [partial(np.copyto, *pair) for pair in zip(targets, sources, strict=True)]
    copied = _rate(copies, 2 * sources[0].nbytes, shared=True)
    exps = _rate([partial(exp2, buffer, times) for buffer in buffers], size * times)
    flops = _rate([partial(fma, buffer, times) for buffer in buffers], size * times * 2 * FMA_CHAIN)
    unit = "vector units"  # a CPU has no unit for exponentials: they are a polynomial of 5 FMAs and 6 operations more
    return (
        Ceiling("bytes", copied, "memory", "measured: a copy on every core, bytes read and written"),
        Ceiling("exps", exps, unit, "measured: exp2 by a degree-5 polynomial, in cache"),
        Ceiling("flops", flops, unit, "measured: chains of fp32 FMAs, in cache"),
    )


def _rate(jobs: Sequence[Callable[[], object]], count: int, shared: bool = False) -> float:
    """What the jobs, one on each core, do per second, each of them ``count``: the best of many short rounds.

    Each thread's own clock stands still while other processes hold its core; shared: the jobs compete for one thing,
    so only the time from first to last counts.
    """

    def timed(job: Callable[[], object]) -> float:
        begin = time.thread_time()
        job()
        return count / (time.thread_time() - begin)

    best, stop = 0.0, time.perf_counter() + 0.25
    with ThreadPoolExecutor(len(jobs)) as pool:
        while (begin := time.perf_counter()) < stop:
            rates = list(pool.map(timed, jobs))
            round_s = time.perf_counter() - begin
            best = max(best, len(jobs) * count / round_s if shared else sum(rates))
    return best


def _cpu_loops() -> tuple[Callable, Callable]:
    """Compiled loops over a float32 buffer, repeated: x = -exp2(x), and a chain of FMAs on each element."""
    import numba
    from numpy import float32, int32, rint

    compiled = numba.njit("void(float32[::1], int64)", nogil=True, fastmath={"contract"})

    def exp2(x, times):
        for _ in range(times):
            for j in range(x.size):
                whole = float32(rint(x[j]))
                f = float32(x[j] - whole)
                p = float32(1.3333558e-3) * f + float32(9.6181291e-3)
                p = p * f + float32(5.5504109e-2)
                p = p * f + float32(2.4022651e-1)
                p = p * f + float32(6.9314718e-1)
                p = float32(p * f + float32(1.0))
                # adding to the exponent's bits multiplies by 2**whole
                x[j] = -float32(int32(p.view(int32) + (int32(whole) << int32(23))).view(float32))

    def fma(x, times):
        for _ in range(times):
            for j in range(x.size):
                v = x[j]
                for _ in range(FMA_CHAIN):
                    v = v * float32(0.999) + float32(1e-3)
                x[j] = v

    return compiled(exp2), compiled(fma)
