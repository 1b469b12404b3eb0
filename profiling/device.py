"""Who this device is: the one place that asks. What it can do at most: ``ceilings.py``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import platform
import re
from typing import Any

import torch

VECTORS = {"avx512dq": "AVX-512", "avx2": "AVX2"}  # by the flag of /proc/cpuinfo, the widest first


@dataclasses.dataclass(frozen=True)
class Device:
    """A device as dispatch, tuner and report need to know it."""

    kind: str  # torch device type: "cuda" or "cpu"
    index: int
    name: str  # product name as the driver or the kernel gives it; of a CPU also its widest vectors, if they are known
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
            name = cpu_name(f.read(), name)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        memory = 0
    return Device("cpu", 0, name, platform.machine(), cores, 0, 0, memory)


def cpu_name(cpuinfo: str, unknown: str) -> str:
    """Model and vectors of the first core of /proc/cpuinfo. Virtual machines call very different CPUs by one name."""
    core = dict(line.split(":", 1) for line in cpuinfo.partition("\n\n")[0].splitlines() if ":" in line)
    about = {name.strip(): value.strip() for name, value in core.items()}
    flags = about.get("flags", "").split()
    widest = next((words for flag, words in VECTORS.items() if flag in flags), "")
    return ", ".join(filter(None, (about.get("model name", unknown), widest)))


def setting(device: Device) -> dict[str, int | None]:
    """What may change how fast a device is while it stays the same one; None where nobody tells.

    memory_mhz: highest memory clock. driver: its major version. power_w: the limit set. A CPU has none of these.
    """
    return dict(_setting(device) if device.kind == "cuda" else dict.fromkeys(("memory_mhz", "driver", "power_w")))


@functools.cache
def _setting(device: Device) -> dict[str, int | None]:
    found: dict[str, int | None] = dict.fromkeys(("memory_mhz", "driver", "power_w"))
    # no permission: NVML has an error class for each
    with contextlib.suppress(Exception):
        if asked := nvml(device.index):
            library, handle = asked
            found["driver"] = int(driver(device).partition(".")[0])
            found["memory_mhz"] = int(library.nvmlDeviceGetMaxClockInfo(handle, library.NVML_CLOCK_MEM))
            found["power_w"] = round(library.nvmlDeviceGetPowerManagementLimit(handle) / 1e3)
    return found


def driver(device: Device) -> str:
    """The version of a GPU's driver, in full; "" where nobody tells."""
    with contextlib.suppress(Exception):
        if device.kind == "cuda" and (asked := nvml(device.index)):
            version = asked[0].nvmlSystemGetDriverVersion()
            return version.decode() if isinstance(version, bytes) else version
    return ""


def clocks(device: Device) -> dict[str, int]:
    """The clocks of this moment in MHz, as far as somebody tells."""
    found: dict[str, int] = {}
    with contextlib.suppress(Exception):
        if device.kind == "cuda":
            if asked := nvml(device.index):
                library, handle = asked
                for name, clock in (("sm", library.NVML_CLOCK_SM), ("memory", library.NVML_CLOCK_MEM)):
                    found[f"{name}_mhz"] = int(library.nvmlDeviceGetClockInfo(handle, clock))
        else:
            with open("/proc/cpuinfo", encoding="utf-8") as f:
                figures = [float(line.split(":", 1)[1]) for line in f if line.startswith("cpu MHz")]
            found["core_mhz"] = round(max(figures))
    return found


@functools.cache
def nvml(index: int) -> tuple[Any, Any] | None:
    """(the library, its handle of torch's device of that index), or None where there is no library, driver or leave."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
    except Exception:
        return None
