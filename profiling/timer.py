"""How long a callable takes on a device: warm-up, many samples, their median and spread.

On a GPU the figure is device time: the callable is captured into a CUDA graph of several calls and replayed,
so that the cost of launching from Python does not pollute it; where that is not possible, events stand around a
queued batch of calls. ``Timing.method`` says which. On a CPU it is the wall clock. Inputs stay where the previous
call left them: caches are as warm as back-to-back calls make them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from .device import Device

SAMPLE_S = 2e-3  # a sample on a GPU: events resolve 0.5 us, launching a graph costs about 10 us
HOST_SAMPLE_S = 2e-4  # a sample on a CPU: perf_counter and the loop cost well under 1 us
MOST_CALLS = 200  # in one sample
SETTLE_S = 5e-2  # a callable quicker than this gets an untimed call first: the last one's threads may still spin
LAUNCH_BOUND_S = 5e-3  # a call that takes this long to enqueue is a host loop: its launches are part of its cost
HOST_BURST = 50  # calls queued at once: a queue holds about a thousand launches, and a call makes a handful
STABLE = 0.03  # warm-up ends when three calls in a row agree this well
LEAST_RUNS = 5
OVERTIME = 5  # unless that takes this many times the seconds asked for


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds for one call: the median of ``runs`` samples and their quartiles."""

    median_s: float
    low_s: float  # lower quartile
    high_s: float  # upper quartile
    runs: int
    method: str


def measure(fn: Callable[[], Any], device: Device, *, seconds: float = 0.2) -> Timing:
    """Time one callable. seconds: how long to sample, after warm-up.

    A callable that takes more than ``OVERTIME`` times that long is called twice, and the second call is its one sample.

    What ``fn`` returns is dropped. On a GPU it runs on a stream of its own, after the work queued so far.
    Errors: whatever ``fn`` raises.
    """
    return compare({"": fn}, device, seconds=seconds)[""]


def compare(fns: dict[str, Callable[[], Any]], device: Device, *, seconds: float = 0.2) -> dict[str, Timing]:
    """Time several callables in interleaved rounds, so that clocks that drift meet all of them alike.

    seconds: sampling time of each callable. Each round takes one sample of each, in an order that rotates.
    Errors: whatever a callable raises, at its warm-up.
    """
    with _stream(device):
        samplers = {name: _sampler(fn, device, seconds) for name, fn in fns.items()}
        running = list(samplers.values())
        while running := [s for s in running if not _enough(s, seconds)]:
            for sampler in running:
                begin = time.perf_counter()
                sampler.samples.append(sampler.sample())
                sampler.spent += time.perf_counter() - begin
            running = running[1:] + running[:1]
    return {name: _summary(sampler) for name, sampler in samplers.items()}


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
    low, median, high = np.percentile(samples, [25, 50, 75])
    return Timing(float(median), float(low), float(high), len(samples), "host, until a call returns")


def _enough(sampler: _Sampler, seconds: float) -> bool:
    return sampler.spent >= (seconds if len(sampler.samples) >= LEAST_RUNS else OVERTIME * seconds)


def _summary(sampler: _Sampler) -> Timing:
    low, median, high = np.percentile(sampler.samples, [25, 50, 75])
    return Timing(float(median), float(low), float(high), len(sampler.samples), sampler.method)


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


def _sampler(fn: Callable[[], Any], device: Device, seconds: float) -> _Sampler:
    synchronise = _synchronise(device)
    call_s, host_s = _warm_up(fn, synchronise, seconds)
    if call_s >= OVERTIME * seconds:
        slow = _HostSampler(fn, synchronise, 1, settle=False)
        slow.samples.append(call_s)
        slow.spent = call_s
        return slow
    if device.kind != "cuda":
        return _HostSampler(fn, synchronise, _calls(HOST_SAMPLE_S, call_s), settle=call_s < SETTLE_S)
    calls = _calls(SAMPLE_S, call_s)
    if host_s < LAUNCH_BOUND_S:
        try:
            return _GraphSampler(fn, calls)
        except RuntimeError:
            # it synchronises, copies from the host or otherwise cannot be captured
            torch.cuda.synchronize()
    return _EventSampler(fn, calls, host_s)


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


class _GraphSampler(_Sampler):
    def __init__(self, fn: Callable[[], Any], calls: int):
        super().__init__()
        self.calls = calls
        self.method = f"CUDA-graph replay, {calls} call{'s' * (calls > 1)} a sample"
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            for _ in range(calls):
                fn()
        self.sample()  # the first replay also uploads the graph

    def sample(self) -> float:
        return _between_events(self.graph.replay) / self.calls


class _EventSampler(_Sampler):
    def __init__(self, fn: Callable[[], Any], calls: int, host_s: float):
        super().__init__()
        self.fn, self.calls = fn, calls
        self.method = f"events, {calls} queued call{'s' * (calls > 1)} a sample"
        # the device waits while the batch is queued; 2 GHz is above any clock, so the wait is long enough
        self.wait = int(2e9 * 1.2 * host_s * calls) if host_s < LAUNCH_BOUND_S else 0

    def sample(self) -> float:
        if self.wait:
            torch.cuda._sleep(self.wait)
        return _between_events(self._batch) / self.calls

    def _batch(self) -> None:
        for _ in range(self.calls):
            self.fn()


def _between_events(launch: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    launch()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3
