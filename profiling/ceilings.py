"""What a device can do at most: each resource measured once, and kept; what its maker says stands beside.

On a GPU the kernels of ceilings.cu are timed, through CuPy; without it, clock x lanes stands in. On a CPU, NumPy's copy
and loops compiled by Numba. Measuring takes a second or a few; the result is kept in the platform's cache folder, or
under ``SCAN_KERNELS_CACHE``, for exactly this device, driver and these sources.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import files, readings, timer
from .device import Device, driver


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """The most of one resource that a device delivers."""

    resource: str  # what is counted, named as a problem's method that counts it: "bytes", "exps", "flops", ...
    per_second: float
    unit: str  # what serves it; resources served by the same unit wait for each other
    source: str  # how the figure was found
    holds: int = 0  # bytes: it is for calls that move no more than this and find it there; 0: for all
    datasheet: float = 0.0  # the same by the maker's word, or by clock x lanes; 0 where unknown


Ceilings = tuple[Ceiling, ...]

# Device memory by its maker's data sheet, B/s: the first name that stands in a device's own
MEMORY = {
    "H200": 4.8e12, "GH200": 4.0e12, "H100 NVL": 3.9e12, "H100 PCIe": 2.0e12, "H100": 3.35e12,
    "A100-PCIE-40GB": 1.555e12, "A100-SXM4-40GB": 1.555e12, "A100": 2.039e12, "B200": 8.0e12,
    "L40S": 0.864e12, "L40": 0.864e12, "L4": 0.3e12, "A40": 0.696e12, "RTX 5090": 1.792e12,
    "RTX 4090": 1.008e12, "RTX 3090": 0.936e12,
}  # fmt: skip
# Lanes of a multiprocessor that finish in one clock (CUDA programming guide, arithmetic instructions): FMA, ex2.
LANES = {
    "sm_70": (64, 16), "sm_75": (64, 16), "sm_80": (64, 16), "sm_86": (128, 16), "sm_87": (128, 16),
    "sm_89": (128, 16), "sm_90": (128, 16), "sm_100": (128, 16), "sm_103": (128, 32), "sm_120": (128, 16),
}  # fmt: skip
SHUFFLES, SHARED = 32, 128  # of every multiprocessor, in one clock: lanes that exchange, bytes of shared memory
# resource: the unit that serves it on a GPU
UNITS = {
    "bytes": "memory", "exps": "special-function units", "issues": "instruction issue", "flops": "fp32 units",
    "shuffles": "shuffles", "shared": "shared memory", "launches": "launching",
}  # fmt: skip

Measured = tuple[float, timer.Timing]
_known: dict[Device, Ceilings] = {}


def ceilings(device: Device, fresh: bool = False) -> Ceilings:
    """What bounds a kernel on this device, as far as it is known.

    fresh: measure again even if figures are kept. A ceiling is the most, so of old and new figures the higher stays.
    """
    if device not in _known or fresh:
        kept = {(c.resource, c.holds): c for c in _read(device)}
        if fresh or not kept:
            for c in _MEASURE.get(device.kind, lambda _: ())(device):
                before = kept.get((c.resource, c.holds))
                kept[c.resource, c.holds] = c if before is None or c.per_second > before.per_second else before
            _write(device, tuple(kept.values()))
        _known[device] = tuple(kept.values())
    return _known[device]


# ---- kept ----------------------------------------------------------------------------------------------------


def _path(device: Device) -> Path:
    return files.cache() / "ceilings" / f"{device.slug}.json"


def _key(device: Device) -> dict[str, Any]:
    """What the figures hold for; index and the like do not matter."""
    sources = (Path(__file__), Path(__file__).with_suffix(".cu"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    return {
        "name": device.name, "arch": device.arch, "units": device.units, "memory_bytes": device.memory_bytes,
        "driver": driver(device), "cupy": device.kind == "cuda" and _cupy(), "sources": digest,
    }  # fmt: skip


def _read(device: Device) -> Ceilings:
    """What is kept for exactly this device; nothing if that is no such file, or not one of ours."""
    try:
        content = json.loads(_path(device).read_text(encoding="utf-8"))
        if content["key"] != _key(device):
            return ()
        found = tuple(Ceiling(**c) for c in content["ceilings"])
        return found if all(0 < c.per_second < math.inf for c in found) else ()
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _write(device: Device, found: Ceilings) -> None:
    """Keep the figures, in one step. Where the folder cannot be written they are measured anew by the next process."""
    if not found:
        return
    content = {"key": _key(device), "ceilings": [dataclasses.asdict(c) for c in found]}
    with contextlib.suppress(OSError):
        files.write(_path(device), json.dumps(content, indent=1))


# ---- GPU -----------------------------------------------------------------------------------------------------

FIELDS = {"from": "const uint4*", "to": "uint4*", "sink": "float*", "count": "long long", "times": "long long"}
SOURCE = Path(__file__).with_suffix(".cu")
THREADS, CHAINS, UNROLL, LOADS = 256, 8, 32, 4  # as in ceilings.cu
BLOCKS = 4  # on a multiprocessor: 1024 threads, which every GPU holds at once and which hide every latency
BURST_S = 1e-3  # a kernel is made to last about this long
COPIED_GPU = 1 << 29  # bytes of each of the two buffers: ten times the largest L2


def _cupy() -> bool:
    import importlib.util

    return importlib.util.find_spec("cupy") is not None


def _measure_cuda(device: Device) -> Ceilings:
    told = _told(device)
    measured = _kernels(device, told) if _cupy() else _copied(device)
    found = []
    for (resource, holds), (rate, source) in ({k: (v, "") for k, v in told.items()} | measured).items():
        source = source or ("the maker's data sheet" if resource == "bytes" else "clock x lanes, not measured")
        sheet = told.get((resource, holds), 0.0)
        unit = "L2 cache" if holds else UNITS[resource]
        found.append(Ceiling(resource, rate, unit, source, holds, sheet))
    return tuple(sorted(found, key=lambda c: (list(UNITS).index(c.resource), c.holds)))


def _told(device: Device) -> dict[tuple[str, int], float]:
    """What the maker says, as (resource, holds) -> per second."""
    found = {}
    if sheet := next((rate for name, rate in MEMORY.items() if re.search(rf"\b{name}\b", device.name)), 0.0):
        found["bytes", 0] = sheet
    clock = device.units * readings.top_clock(device) * 1e6
    if device.arch in LANES and clock:
        fma, ex2 = LANES[device.arch]
        found["exps", 0], found["issues", 0], found["flops", 0] = ex2 * clock, fma * clock, 2 * fma * clock
    if clock:
        found["shuffles", 0], found["shared", 0] = SHUFFLES * clock, SHARED * clock
    return found


def _kernels(device: Device, told: dict[tuple[str, int], float]) -> dict[tuple[str, int], tuple[float, str]]:
    """(resource, holds) -> (per second, how it was measured), by the kernels of ceilings.cu."""
    from ..cuda_module import Kernel

    blocks = BLOCKS * device.units
    sink = torch.zeros(1, device=device.torch)
    found: dict[tuple[str, int], tuple[float, str]] = {}

    def rate(
        name: str, work: float, blocks: int, pointers: dict[str, int], **values: int
    ) -> tuple[float, timer.Timing]:
        """Work a second of a launch, in the faster quarter of its samples."""
        launch = Kernel((SOURCE,), FIELDS, {}, name).prepare(blocks, THREADS, 0, values)
        timing = timer.measure(lambda: launch({"sink": sink.data_ptr()} | pointers), device, seconds=0.05)
        return work / timing.low_s, timing

    def chain(name: str, resource: str, lane: float, words: str) -> float:
        """Loop for about BURST_S; lane: what one lane's instruction does."""
        expected = told.get((resource, 0)) or 1e12
        step = lane * blocks * THREADS * UNROLL * (1 if name == "shared" else CHAINS)
        times = max(1, round(BURST_S * expected / step))
        per_second, timing = rate(name, step * times, blocks, {}, times=times)
        found[resource, 0] = per_second, f"measured: {words}{_at(timing)}"
        return per_second

    with torch.cuda.device(device.index):
        operations = chain("multiply_add", "issues", 1, "chains of fp32 FMAs, one a lane")
        found["flops", 0] = 2 * operations, "measured: twice the FMAs"
        chain("ex2", "exps", 1, "chains of ex2")
        chain("shuffle", "shuffles", 1, "chains of warp shuffles, one a lane")
        chain("shared", "shared", 16, "reads of 16 bytes a lane, no bank conflicts")
        tile = LOADS * THREADS * 16
        size = min(COPIED_GPU, device.memory_bytes // 16) // tile * tile
        a, b = torch.zeros(2, size, dtype=torch.uint8, device=device.torch)
        ends = {"from": a.data_ptr(), "to": b.data_ptr()}
        per_second, timing = rate("copy", 2 * size, size // tile, ends)
        found["bytes", 0] = per_second, f"measured: a copy, read and written{_at(timing)}"
        if device.l2_bytes:
            held = 1 << int(math.log2(device.l2_bytes / 3))  # well inside, even where L2 is two halves
            times = max(1, round(BURST_S * 5e12 / (blocks * held)))
            per_second, timing = rate("l2", float(blocks) * held * times, blocks, ends, count=held // 16, times=times)
            found["bytes", device.l2_bytes // 2] = per_second, f"measured: reads of {held >> 20} MiB over and over"
        per_second, timing = rate("nothing", 1, 1, {})
        found["launches", 0] = per_second, f"measured: an empty kernel again and again in a CUDA graph: " \
            f"{1e6 / per_second:.2f} us each"  # fmt: skip
    return found


def _at(timing: timer.Timing) -> str:
    clock = timing.conditions.sm_mhz[1] if timing.conditions else 0.0
    return f", at {clock:.0f} MHz" if clock else ""


def _copied(device: Device) -> dict[tuple[str, int], tuple[float, str]]:
    """Device memory alone, by torch's copy."""
    source = torch.ones(min(COPIED_GPU, device.memory_bytes // 16) // 4, device=device.torch)
    target = torch.empty_like(source)
    seconds = timer.measure(lambda: target.copy_(source), device, seconds=0.15).low_s
    return {("bytes", 0): (2 * source.nbytes / seconds, "measured: torch's copy, read and written")}


# ---- CPU -----------------------------------------------------------------------------------------------------

FMA_CHAIN = 16
COPIED = 1 << 28  # bytes, by all cores together: several times the last cache


def _measure_cpu(device: Device) -> Ceilings:
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
        Ceiling("bytes", copied, "memory", "measured: a copy on every core, read and written"),
        Ceiling("exps", exps, unit, "measured: exp2 by a degree-5 polynomial, in cache"),
        Ceiling("flops", flops, unit, "measured: chains of fp32 FMAs, in cache; an FMA counts 2"),
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


_MEASURE: dict[str, Callable[[Device], Ceilings]] = {"cuda": _measure_cuda, "cpu": _measure_cpu}
