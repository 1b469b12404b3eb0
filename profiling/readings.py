"""What a device was like while something was timed: a GPU's clocks, power, heat and throttling; a CPU's other load.

A GPU is read through NVML, where nvidia-ml-py and a driver are installed; a CPU through Linux' /proc/stat. Where
nobody tells, figures are 0 and ``Conditions.source`` is empty.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from typing import Any

import torch

from .device import Device, nvml

EVERY_S = 0.02  # between two readings: NVML takes up to a millisecond for one
FELL = 0.97  # of the highest clock seen: a lower one is news
OTHERS = 0.10  # of the cores: more than this used by other processes is news
TICKS_S = 0.1  # a shorter look at /proc/stat, which counts hundredths of a second, tells nothing
# NVML's clock event reasons that slow a kernel down; idling, a set clock and a display do not
REASONS = {
    0x04: "power cap", 0x08: "hardware slowdown", 0x10: "clocks held by another GPU (sync boost)",
    0x20: "too hot (software)", 0x40: "too hot (hardware)", 0x80: "power brake",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What was seen of a device during a measurement; 0 where nobody tells."""

    source: str = ""  # who told: "NVML", "/proc/stat", or nobody
    sm_mhz: tuple[float, float] = (0.0, 0.0)  # lowest and highest multiprocessor clock
    memory_mhz: tuple[float, float] = (0.0, 0.0)
    power_w: float = 0.0  # highest
    temperature_c: float = 0.0  # highest
    others: float = 0.0  # share of a CPU's cores that other processes took
    disturbed: tuple[str, ...] = ()  # why a time taken meanwhile may be wrong, in words; empty if nothing was seen


class Watch:
    """Looks at a device from its making until ``conditions`` is asked for."""

    def look(self) -> None:
        """Take a reading, unless the last one was just now. To be called while the device is busy."""

    def conditions(self) -> Conditions:
        """What was seen so far."""
        return Conditions()


def watch(device: Device) -> Watch:
    """A watch of the device that begins now."""
    if device.kind == "cuda" and (found := nvml(device.index)) is not None:
        return _GpuWatch(*found)
    if device.kind == "cpu" and _busy_s() is not None:
        return _CpuWatch(device)
    return Watch()


def energy(device: Device) -> float | None:
    """Joules that the device has used so far, on a counter that moves some ten times a second; None if unknown."""
    if device.kind != "cuda" or (found := nvml(device.index)) is None:
        return None
    used = _ask(found[0], "nvmlDeviceGetTotalEnergyConsumption", found[1])
    return None if used is None else used / 1e3


def top_clock(device: Device) -> float:
    """The highest multiprocessor clock of a GPU in MHz; 0 where nobody tells."""
    if (found := nvml(device.index)) is not None:
        library, handle = found
        if megahertz := _ask(library, "nvmlDeviceGetMaxClockInfo", handle, library.NVML_CLOCK_SM):
            return float(megahertz)
    return getattr(torch.cuda.get_device_properties(device.index), "clock_rate", 0) / 1e3


def _ask(library: Any, question: str, *arguments: Any) -> Any:
    """NVML's answer; None where this binding, driver, device or user gets none."""
    try:
        return getattr(library, question)(*arguments)
    except Exception:
        # NVML has an error class for each
        return None


class _GpuWatch(Watch):
    def __init__(self, library: Any, handle: Any):
        self.library, self.handle = library, handle
        self.next = 0.0
        self.seen: dict[str, list[float]] = {}
        self.reasons = 0

    def look(self) -> None:
        if time.perf_counter() < self.next:
            return
        n, handle = self.library, self.handle
        figures = {
            "sm": _ask(n, "nvmlDeviceGetClockInfo", handle, n.NVML_CLOCK_SM),
            "memory": _ask(n, "nvmlDeviceGetClockInfo", handle, n.NVML_CLOCK_MEM),
            "milliwatts": _ask(n, "nvmlDeviceGetPowerUsage", handle),
            "celsius": _ask(n, "nvmlDeviceGetTemperature", handle, n.NVML_TEMPERATURE_GPU),
            "processes": len(_ask(n, "nvmlDeviceGetComputeRunningProcesses", handle) or ()),
        }
        for name, figure in figures.items():
            if figure is not None:
                self.seen.setdefault(name, []).append(float(figure))
        # renamed in NVML 12.2; older bindings and drivers know the old name only
        names = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        self.reasons |= next((bits for name in names if (bits := _ask(n, name, handle)) is not None), 0)
        self.next = time.perf_counter() + EVERY_S

    def conditions(self) -> Conditions:
        def ends(name: str) -> tuple[float, float]:
            figures = self.seen.get(name, [0.0])
            return min(figures), max(figures)

        sm, memory = ends("sm"), ends("memory")
        said = [f"throttled: {words}" for bit, words in REASONS.items() if self.reasons & bit]
        for name, (low, high) in (("multiprocessor", sm), ("memory", memory)):
            if low < FELL * high:
                said.append(f"the {name} clock fell from {high:.0f} to {low:.0f} MHz")
        if ends("processes")[1] > 1:
            said.append("another process used the GPU")
        return Conditions(
            "NVML", sm, memory, power_w=ends("milliwatts")[1] / 1e3, temperature_c=ends("celsius")[1],
            disturbed=tuple(said),
        )  # fmt: skip


class _CpuWatch(Watch):
    def __init__(self, device: Device):
        self.cores = device.units
        self.begin = time.perf_counter(), _busy_s(), _own_s()

    def conditions(self) -> Conditions:
        begin, busy, own = self.begin
        took, now = time.perf_counter() - begin, _busy_s()
        if took < TICKS_S or now is None or busy is None:
            return Conditions("/proc/stat")
        others = min(1.0, max(0.0, (now - busy) - (_own_s() - own)) / (took * self.cores))
        said = (f"other processes took {100 * others:.0f} % of the cores",) if others > OTHERS else ()
        return Conditions("/proc/stat", others=round(others, 3), disturbed=said)


def _own_s() -> float:
    """Processor seconds of this process and of those it waited for."""
    return sum(os.times()[:4])


def _busy_s() -> float | None:
    """Seconds that the cores this process may run on were not idle, all processes and the hypervisor together."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        cores, total = {f"cpu{n}" for n in os.sched_getaffinity(0)}, 0
        with open("/proc/stat", encoding="ascii") as f:
            for line in f:
                name, *figures = line.split()
                if name in cores:
                    user, nice, system, _, _, irq, softirq, steal = map(int, figures[:8])
                    total += user + nice + system + irq + softirq + steal
        return total / os.sysconf("SC_CLK_TCK")
    return None
