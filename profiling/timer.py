"""How long a callable takes on a device: warm-up, many samples, their median and spread.

On a GPU the figure is device time: the callable is captured into a CUDA graph of several calls and replayed,
so that the cost of launching from Python does not pollute it; where that is not possible, events stand around a
queued batch of calls. ``Timing.method`` says which. On a CPU it is the wall clock.

Caches are as warm as back-to-back calls make them; asked for a cold one, the timer reads a buffer larger than the last
cache before each call, outside the timed interval. What disturbed a measurement stands in ``Timing.disturbed``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import readings
from .device import Device
from .readings import Conditions

SAMPLE_S = 2e-3  # a sample on a GPU: events resolve 0.5 us, launching a graph costs about 10 us
HOST_SAMPLE_S = 2e-4  # a sample on a CPU: perf_counter and the loop cost well under 1 us
MOST_CALLS = 200  # in one sample
SETTLE_S = 5e-2  # a callable quicker than this gets an untimed call first: the last one's threads may still spin
LAUNCH_BOUND_S = 5e-3  # a call that takes this long to enqueue is a host loop: its launches are part of its cost
HOST_BURST = 50  # calls queued at once: a queue holds about a thousand launches, and a call makes a handful
STABLE = 0.03  # warm-up ends when three calls in a row agree this well
LEAST_RUNS = 5
OVERTIME = 5  # unless that takes this many times the seconds asked for
GROUPS = 8  # of consecutive samples, whose medians tell how steady the time was
SPREAD = 0.10  # quartiles further apart than this share of the median are news
LAST_CACHE = 32 << 20  # bytes, where a CPU does not tell


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds for one call: the median of ``runs`` samples and their quartiles."""

    median_s: float
    low_s: float  # lower quartile
    high_s: float  # upper quartile
    runs: int
    method: str
    stopped: str = ""  # why no more samples were taken
    error_s: float = 0.0  # standard error of the median; 0 for a single sample, which tells none
    disturbed: tuple[str, ...] = ()  # why the figure may be wrong, in words; empty if nothing was seen
    conditions: Conditions | None = None  # of the device, while this and what it was compared with were timed


def measure(fn: Callable[[], Any], device: Device, *, seconds: float = 0.2, cold: bool = False) -> Timing:
    """Time one callable. seconds: how long to sample, after warm-up. cold: with nothing in the last cache.

    A callable that takes more than ``OVERTIME`` times that long is called twice, and the second call is its one sample.

    What ``fn`` returns is dropped. On a GPU it runs on a stream of its own, after the work queued so far.
    Errors: whatever ``fn`` raises.
    """
    return compare({"": fn}, device, seconds=seconds, cold=cold)[""]


def compare(
    fns: dict[str, Callable[[], Any]], device: Device, *, seconds: float = 0.2, cold: bool = False
) -> dict[str, Timing]:
    """Time several callables in interleaved rounds, so that clocks that drift meet all of them alike.

    seconds: sampling time of each callable. Each round takes one sample of each, in an order that rotates.
    cold: before each call a buffer larger than the last cache is read, which is not timed.
    Errors: whatever a callable raises, at its warm-up.
    """
    with _stream(device):
        flush = _flush(device) if cold else None
        samplers = {name: _sampler(fn, device, seconds, flush) for name, fn in fns.items()}
        watch = readings.watch(device)
        running = list(samplers.values())
        while running := [s for s in running if not _enough(s, seconds)]:
            for sampler in running:
                begin = time.perf_counter()
                sampler.samples.append(sampler.sample())
                sampler.spent += time.perf_counter() - begin
                watch.look()
            running = running[1:] + running[:1]
        conditions = watch.conditions()
    return {name: _summary(sampler, seconds, conditions) for name, sampler in samplers.items()}


def energy(fn: Callable[[], Any], device: Device, *, seconds: float = 1.0) -> float | None:
    """Joules that the whole device uses for one call, over calls back to back; None where NVML does not count them.

    Errors: whatever ``fn`` raises.
    """
    if readings.energy(device) is None:
        return None
    with _stream(device):
        sampler = _sampler(fn, device, seconds, None)
        sampler.sample()
        # from one tick of the counter, which moves some ten times a second, to another
        first, calls = _tick(device, sampler)[0], 0
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            sampler.sample()
            calls += sampler.calls
        last, more = _tick(device, sampler)
        return (last - first) / (calls + more)


def _tick(device: Device, sampler: _Sampler) -> tuple[float, int]:
    """Keep the device busy until its counter of energy moves: what it says then, and how many calls that took."""
    before, calls, begin = readings.energy(device), 0, time.perf_counter()
    while (now := readings.energy(device)) == before and time.perf_counter() - begin < 1.0:
        sampler.sample()
        calls += sampler.calls
    return now or 0.0, calls


def host(fn: Callable[[], Any], device: Device, *, seconds: float = 0.2) -> Timing:
    """How long a call keeps the host busy until it returns: Python, torch and launches, none of the device's work.

    Each call is timed by itself. After every ``HOST_BURST`` of them the device catches up, untimed, so that no call
    waits for room in its queue. Errors: whatever ``fn`` raises.
    """
    synchronise = _synchronise(device)
    _warm_up(fn, synchronise, seconds)
    samples: list[float] = []
    while sum(samples) < seconds:
        for _ in range(HOST_BURST):
            begin = time.perf_counter()
            fn()
            samples.append(time.perf_counter() - begin)
        synchronise()
    return _timing(samples, "host, until a call returns", f"{seconds:g} s were spent")


def _enough(sampler: _Sampler, seconds: float) -> bool:
    return sampler.spent >= (seconds if len(sampler.samples) >= LEAST_RUNS else OVERTIME * seconds)


def _summary(sampler: _Sampler, seconds: float, conditions: Conditions) -> Timing:
    if len(sampler.samples) >= LEAST_RUNS:
        stopped = f"{seconds:g} s were spent"
    else:
        stopped = f"{OVERTIME * seconds:g} s were not enough for {LEAST_RUNS} samples"
    return _timing(sampler.samples, sampler.method, stopped, conditions)


def _timing(samples: Sequence[float], method: str, stopped: str, conditions: Conditions | None = None) -> Timing:
    low, median, high = (float(q) for q in np.percentile(samples, [25, 50, 75]))
    disturbed = conditions.disturbed if conditions else ()
    if high - low > SPREAD * median:
        disturbed += (f"quartiles {100 * (high - low) / median:.0f} % apart",)
    return Timing(median, low, high, len(samples), method, stopped, _error(samples), disturbed, conditions)


def _error(samples: Sequence[float]) -> float:
    """Standard error of the median, from the quartiles and from the medians of consecutive groups: the larger.

    The first holds for samples that know nothing of each other; a disturbance that lasts shows in the second.
    """
    if len(samples) < LEAST_RUNS:
        return 0.0
    low, high = np.percentile(samples, [25, 75])
    # of a normal distribution: the quartiles are 1.349 deviations apart, and a median errs by 1.253 times a mean
    independent = 1.253 * (high - low) / 1.349 / len(samples) ** 0.5
    groups = [np.median(group) for group in np.array_split(samples, min(GROUPS, len(samples) // 2))]
    return float(max(independent, np.std(groups, ddof=1) / len(groups) ** 0.5))


@contextlib.contextmanager
def _stream(device: Device) -> Iterator[None]:
    """On CUDA a side stream of the device, after what is queued: the default one cannot be captured."""
    if device.kind != "cuda":
        yield
        return
    with torch.cuda.device(device.index):
        before, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(before)
        with torch.cuda.stream(side):
            yield
        before.wait_stream(side)


def _sampler(fn: Callable[[], Any], device: Device, seconds: float, flush: Callable[[], Any] | None) -> _Sampler:
    synchronise = _synchronise(device)
    call_s, host_s = _warm_up(fn, synchronise, seconds)
    if call_s >= OVERTIME * seconds:
        slow = _HostSampler(fn, synchronise, 1, settle=False)
        slow.samples.append(call_s)
        slow.spent = call_s
        return slow
    if device.kind != "cuda":
        if flush is not None:
            return _ColdHostSampler(fn, synchronise, flush)
        return _HostSampler(fn, synchronise, _calls(HOST_SAMPLE_S, call_s), settle=call_s < SETTLE_S)
    calls = 1 if flush is not None else _calls(SAMPLE_S, call_s)
    if host_s < LAUNCH_BOUND_S:
        try:
            return _GraphSampler(fn, calls, flush)
        except RuntimeError:
            # it synchronises, copies from the host or otherwise cannot be captured
            torch.cuda.synchronize()
    return _EventSampler(fn, calls, host_s, flush)


def _flush(device: Device) -> Callable[[], Any]:
    """What reads a buffer twice the size of the last cache. It is not written, so nothing is left to write back."""
    if device.kind == "cuda":
        return torch.ones(max(2 * device.l2_bytes, LAST_CACHE) // 4, device=device.torch).sum
    # one thread of NumPy's: torch's would still spin when the timed call begins
    return np.ones(2 * last_cache() // 4, np.float32).sum


@functools.cache
def last_cache() -> int:
    """Bytes of a CPU's last cache."""
    sizes = [LAST_CACHE]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) << 10)
    return max(sizes)


def _calls(sample_s: float, call_s: float) -> int:
    return int(min(MOST_CALLS, max(1, np.ceil(sample_s / max(call_s, 1e-9)))))


def _synchronise(device: Device) -> Callable[[], None]:
    if device.kind == "cpu":
        return lambda: None
    if device.kind == "cuda":
        return torch.cuda.synchronize
    return torch.accelerator.synchronize


def _warm_up(fn: Callable[[], Any], synchronise: Callable[[], None], seconds: float) -> tuple[float, float]:
    """Call until stable; the last call's seconds until done, and until the host got control back.

    The first call, which may compile, is not counted; a slow callable gets one more, a quick one several.
    """
    fn()
    synchronise()
    times: list[float] = []
    while True:
        begin = time.perf_counter()
        fn()
        host = time.perf_counter() - begin
        synchronise()
        times.append(time.perf_counter() - begin)
        last = times[-3:]
        stable = len(last) == 3 and max(last) <= (1 + STABLE) * min(last) and sum(times) >= 0.1 * seconds
        if stable or sum(times) >= 0.5 * seconds:
            return last[-1], host


class _Sampler:
    """One callable's samples so far: seconds of one call each, and the seconds it took to take them."""

    method: str
    calls: int  # in one sample

    def __init__(self) -> None:
        self.samples: list[float] = []
        self.spent = 0.0

    def sample(self) -> float:
        """Seconds for one call, from one timed batch of calls."""
        raise NotImplementedError


class _HostSampler(_Sampler):
    def __init__(self, fn: Callable[[], Any], synchronise: Callable[[], None], calls: int, settle: bool):
        super().__init__()
        self.fn, self.synchronise, self.calls, self.settle = fn, synchronise, calls, settle
        self.method = f"wall clock, {calls} call{'s' * (calls > 1)} a sample"

    def sample(self) -> float:
        if self.settle:
            self.fn()
        self.synchronise()
        begin = time.perf_counter()
        for _ in range(self.calls):
            self.fn()
        self.synchronise()
        return (time.perf_counter() - begin) / self.calls


class _ColdHostSampler(_HostSampler):
    def __init__(self, fn: Callable[[], Any], synchronise: Callable[[], None], flush: Callable[[], Any]):
        super().__init__(fn, synchronise, 1, settle=False)
        self.flush, self.method = flush, "wall clock, 1 call a sample after the last cache was flushed"

    def sample(self) -> float:
        self.flush()
        return super().sample()


class _GraphSampler(_Sampler):
    def __init__(self, fn: Callable[[], Any], calls: int, flush: Callable[[], Any] | None):
        super().__init__()
        self.calls, self.flush = calls, flush
        self.method = _batch_method("CUDA-graph replay", calls, flush)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            for _ in range(calls):
                fn()
        self.sample()  # the first replay also uploads the graph

    def sample(self) -> float:
        if self.flush is not None:
            self.flush()
        return _between_events(self.graph.replay) / self.calls


class _EventSampler(_Sampler):
    def __init__(self, fn: Callable[[], Any], calls: int, host_s: float, flush: Callable[[], Any] | None):
        super().__init__()
        self.fn, self.calls, self.flush = fn, calls, flush
        self.method = _batch_method("events", calls, flush)
        # the device waits while the batch is queued; 2 GHz is above any clock, so the wait is long enough
        self.wait = int(2e9 * 1.2 * host_s * calls) if host_s < LAUNCH_BOUND_S else 0

    def sample(self) -> float:
        if self.flush is not None:
            self.flush()
        if self.wait:
            torch.cuda._sleep(self.wait)
        return _between_events(self._batch) / self.calls

    def _batch(self) -> None:
        for _ in range(self.calls):
            self.fn()


def _batch_method(way: str, calls: int, flush: Callable[[], Any] | None) -> str:
    return f"{way}, {calls} call{'s' * (calls > 1)} a sample" + " after L2 was flushed" * (flush is not None)


def _between_events(launch: Callable[[], Any]) -> float:
    """Seconds of the device's time. The events wait in the same queue, behind a flush or a wait if there is one."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    launch()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3
