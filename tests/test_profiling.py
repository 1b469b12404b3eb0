"""Timer, ceilings, roofline arithmetic, report pages, and the verbs bench and report."""

from __future__ import annotations

import contextlib
import dataclasses
import html.parser
import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from scan_kernels import counters, measure, parts, selective_scan, sweep, text
from scan_kernels.__main__ import main
from scan_kernels.cli import report_steps
from scan_kernels.peers import PEERS, Peer
from scan_kernels.profiling import ceilings as maker
from scan_kernels.profiling import charts, readings, report, roofline, timer
from scan_kernels.profiling.ceilings import Ceiling, ceilings
from scan_kernels.profiling.device import cpu_name, describe
from scan_kernels.selective_scan import OP
from scan_kernels.selective_scan.cases import ARGUMENTS, Case
from scan_kernels.selective_scan.problem import Problem

CPU = describe("cpu")


# ---- device ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("core", "name"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx avx2 fma", "AMD EPYC, AVX2"),
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f avx512dq", "AMD EPYC, AVX-512"),
        ("model name\t: Old: a CPU\nflags\t\t: fpu sse2", "Old: a CPU"),
        ("BogoMIPS\t: 50.00", "aarch64"),
    ],
)
def test_a_cpu_is_called_by_its_model_and_its_vectors(core, name):
    other = "processor\t: 1\nmodel name\t: another\nflags\t\t: avx2 avx512dq\n"
    assert cpu_name(f"processor\t: 0\n{core}\n\n{other}", "aarch64") == name


# ---- timer -----------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_a_slower_callable_measures_slower_and_the_quartiles_are_in_order():
    timings = timer.compare({"slow": lambda: time.sleep(4e-3), "fast": lambda: time.sleep(1e-3)}, CPU, seconds=0.1)
    for t in timings.values():
        assert 0 < t.low_s <= t.median_s <= t.high_s
        assert t.runs >= timer.LEAST_RUNS
    assert timings["fast"].median_s < timings["slow"].median_s
    assert 4e-3 <= timings["slow"].median_s < 40e-3


def test_a_quick_callable_is_timed_in_batches():
    t = timer.measure(lambda: None, CPU, seconds=0.02)
    assert t.median_s < 1e-5
    assert f"{timer.MOST_CALLS} calls" in t.method


def test_a_very_slow_callable_is_called_twice():
    calls = []
    t = timer.measure(lambda: (calls.append(1), time.sleep(0.06)), CPU, seconds=0.01)
    assert len(calls) == 2
    assert t.runs == 1
    assert t.median_s >= 0.06


@pytest.mark.alone
def test_the_first_call_is_not_counted():
    calls = []

    def compiles_first():
        calls.append(1)
        time.sleep(0.3 if len(calls) == 1 else 1e-3)

    assert timer.measure(compiles_first, CPU, seconds=0.05).median_s < 0.1


def test_what_a_callable_raises_comes_through():
    def broken():
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        timer.measure(broken, CPU)


@pytest.mark.alone
def test_the_hosts_time_is_of_single_calls_and_waits_for_nothing(monkeypatch):
    waits = []
    monkeypatch.setattr(timer, "_synchronise", lambda device: lambda: (waits.append(1), time.sleep(5e-3)))
    t = timer.host(lambda: time.sleep(1e-4), CPU, seconds=0.05)
    assert 1e-4 <= t.low_s <= t.median_s < 4e-3
    assert t.runs % timer.HOST_BURST == 0
    assert waits


@pytest.mark.alone
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_timed_by_graph_replay_and_what_cannot_be_captured_by_events():
    device = describe("cuda")
    x = torch.randn(1 << 24, device="cuda")
    timings = timer.compare({"kernel": lambda: x + 1, "waits": lambda: (x + 1)[0].item()}, device, seconds=0.1)
    assert "CUDA-graph" in timings["kernel"].method
    assert "events" in timings["waits"].method
    # 128 MiB move; no GPU does it in under 10 us, and one that needs 10 ms is not one
    assert 1e-5 < timings["kernel"].median_s < 1e-2
    leaf = x.clone().requires_grad_()
    backward = measure.call(lambda u: u * u, {"u": leaf, "dout": torch.ones_like(x)}, ("u",), "backward")
    assert "CUDA-graph" in timer.measure(backward, device, seconds=0.1).method


@pytest.mark.parametrize("flushed", [False, True])
def test_a_cpu_is_timed_warm_and_cold(flushed, monkeypatch):
    flushes = []
    monkeypatch.setattr(timer, "_flush", lambda device: lambda: (flushes.append(1), time.sleep(5e-3)))
    t = timer.measure(lambda: time.sleep(1e-3), CPU, seconds=0.05, cold=flushed)
    assert 1e-3 <= t.median_s < 4e-3  # the flush is not timed
    assert len(flushes) == (t.runs if flushed else 0)
    assert ("flushed" in t.method) == flushed


@pytest.mark.alone
def test_a_flushed_buffer_is_slower_to_read_than_a_warm_one():
    # half of the last cache, so that it stays while nothing else runs
    x = torch.ones(timer.last_cache() // 2 // 4)
    attempts = 3  # neighbours share the cache
    for attempt in range(attempts):
        warm, cold = (timer.measure(lambda: x.sum(), CPU, seconds=0.1, cold=c).low_s for c in (False, True))
        if cold > 1.05 * warm or attempt == attempts - 1:
            break
    assert cold > 1.05 * warm


class FakeGpu:
    """torch.cuda with a clock of its own: a device whose queue, graphs and events can be looked into."""

    def __init__(self, monkeypatch, capturable=True):
        self.now = 0.0  # seconds of the device's time
        self.recording = None
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        class Graph:
            def replay(self):
                for fn in self.work:
                    fn()

        @contextlib.contextmanager
        def capture(graph, stream):
            if not capturable:
                raise RuntimeError("cannot be captured")
            graph.work = gpu.recording = []
            yield
            gpu.recording = None

        nothing = lambda *a: contextlib.nullcontext()  # noqa: E731
        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        for name, fake in {
            "Event": Event, "CUDAGraph": Graph, "graph": capture, "device": nothing, "stream": nothing,
            "Stream": lambda: stream, "current_stream": lambda: stream, "synchronize": lambda *a: None,
            "_sleep": lambda cycles: self.kernel(cycles / 2e9)(),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, fake)

    def kernel(self, seconds):
        def run():
            if self.recording is not None:
                self.recording.append(run)
                return
            self.now += seconds() if callable(seconds) else seconds

        return run


H100 = dataclasses.replace(CPU, kind="cuda", name="NVIDIA H100 80GB HBM3", arch="sm_90", units=132, l2_bytes=50 << 20)


@pytest.mark.alone
def test_on_a_gpu_the_flush_is_outside_the_events(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setattr(timer, "_flush", lambda device: gpu.kernel(50e-6))
    warm, cold = (timer.measure(gpu.kernel(8e-6), H100, seconds=0.01, cold=c) for c in (False, True))
    assert (warm.median_s, cold.median_s) == (pytest.approx(8e-6), pytest.approx(8e-6))  # but for rounding
    assert "CUDA-graph replay" in warm.method
    assert "calls" in warm.method  # a short kernel is replayed in batches
    assert "1 call a sample after L2 was flushed" in cold.method
    assert warm.stopped == "0.01 s were spent"


def test_what_a_gpu_cannot_capture_waits_in_the_queue_outside_the_events(monkeypatch):
    gpu = FakeGpu(monkeypatch, capturable=False)
    t = timer.measure(gpu.kernel(8e-6), H100, seconds=0.01)
    assert t.median_s == pytest.approx(8e-6)
    assert t.method.startswith("events")


def test_the_error_of_a_median_knows_scatter_and_drift():
    random = np.random.default_rng(0)
    runs = [1 + 0.01 * random.standard_normal(64) for _ in range(400)]
    said, true = np.mean([timer._error(r) for r in runs]), np.std([np.median(r) for r in runs])
    assert said == pytest.approx(true, rel=0.3)
    drifting = 1 + 0.01 * np.arange(64)
    assert timer._error(drifting) > 1.5 * timer._error(random.permutation(drifting))
    assert timer._error([1.0]) == 0.0


# ---- what else goes on ---------------------------------------------------------------------------------------


class FakeNvml:
    """nvidia-ml-py on a GPU that tells what it is made to tell, one list of answers a question."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, sm=(1980,), reasons=(0,), joules=(), processes=1):
        self.answers = {"sm": list(sm), "reasons": list(reasons), "millijoules": [1000 * j for j in joules]}
        self.processes = processes

    def _next(self, name):
        answers = self.answers[name]
        if not answers:
            raise RuntimeError("not supported")
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return self._next("sm") if kind == self.NVML_CLOCK_SM else 2619

    def nvmlDeviceGetPowerUsage(self, handle):
        return 412_000

    def nvmlDeviceGetTemperature(self, handle, sensor):
        raise RuntimeError("not supported")

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [object()] * self.processes

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):  # the older name alone
        return self._next("reasons")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self._next("millijoules")


def seen_with(monkeypatch, nvml, looks=3):
    monkeypatch.setattr(readings, "nvml", lambda index: (nvml, "handle"))
    monkeypatch.setattr(readings, "EVERY_S", 0.0)
    watch = readings.watch(H100)
    for _ in range(looks):
        watch.look()
    return watch.conditions()


def test_a_quiet_gpu_is_read_and_not_called_disturbed(monkeypatch):
    seen = seen_with(monkeypatch, FakeNvml(reasons=(0x1, 0x2, 0x100)))  # idle, a set clock, a display
    assert (seen.source, seen.sm_mhz, seen.memory_mhz, seen.power_w) == ("NVML", (1980, 1980), (2619, 2619), 412)
    assert seen.temperature_c == 0  # not supported there
    assert seen.disturbed == ()


@pytest.mark.parametrize(
    ("nvml", "words"),
    [
        ({"reasons": (0, 0x4, 0)}, "power cap"),
        ({"reasons": (0x40, 0)}, "too hot (hardware)"),
        ({"sm": (1980, 1200, 1980)}, "clock fell from 1980 to 1200 MHz"),
        ({"processes": 2}, "another process"),
    ],
)
def test_a_disturbed_gpu_is_labelled(nvml, words, monkeypatch):
    (said,) = seen_with(monkeypatch, FakeNvml(**nvml)).disturbed
    assert words in said


def test_a_throttled_measurement_carries_its_label(monkeypatch):
    monkeypatch.setattr(readings, "nvml", lambda index: (FakeNvml(reasons=(0x20,)), "handle"))
    gpu = FakeGpu(monkeypatch)
    t = timer.measure(gpu.kernel(8e-6), H100, seconds=0.01)
    assert t.disturbed == ("throttled: too hot (software)",)
    assert t.conditions.sm_mhz == (1980, 1980)
    assert t.median_s == pytest.approx(8e-6)


def test_energy_is_counted_between_two_ticks_of_the_counter(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    joules = lambda: 100 + 300 * int(gpu.now * 20) / 20  # noqa: E731  300 W, a tick every 50 ms
    monkeypatch.setattr(readings, "energy", lambda device: joules())
    used = timer.energy(gpu.kernel(1e-3), H100, seconds=0.02)
    assert used == pytest.approx(0.3, rel=0.05)  # 300 W for a millisecond
    monkeypatch.setattr(readings, "energy", lambda device: None)
    assert timer.energy(lambda: None, H100) is None


def test_other_processes_on_this_cpu_are_seen(monkeypatch):
    clock = {"busy": 100.0, "own": 20.0}
    monkeypatch.setattr(readings, "_busy_s", lambda: clock["busy"])
    monkeypatch.setattr(readings, "_own_s", lambda: clock["own"])
    monkeypatch.setattr(time, "perf_counter", lambda: clock["busy"] - clock["own"] + 1e3)
    watch = readings.watch(dataclasses.replace(CPU, units=2))
    clock |= {"busy": 104.0, "own": 21.0}  # 3 s pass: we took 1 s of the cores, all together 4 s
    assert watch.conditions().others == 0.5
    assert watch.conditions().disturbed == ("other processes took 50 % of the cores",)


@pytest.mark.alone
def test_this_cpu_tells_its_load():
    if not os.path.exists("/proc/stat"):
        pytest.skip("no /proc/stat")
    watch = readings.watch(CPU)
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        pass
    seen = watch.conditions()
    assert seen.source == "/proc/stat"
    assert 0 <= seen.others <= 1


@pytest.mark.alone
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_a_cold_cache_clocks_and_a_counter_of_energy():
    device = describe("cuda")
    x = torch.randn(device.l2_bytes // 4 // 4, device="cuda")  # a quarter of L2
    y = torch.empty_like(x)
    warm, cold = (timer.measure(lambda: y.copy_(x), device, seconds=0.1, cold=c) for c in (False, True))
    assert cold.median_s > 1.2 * warm.median_s
    assert "flushed" in cold.method
    if readings.nvml(device.index) is None:
        pytest.skip("NVML does not answer")
    assert warm.conditions.source == "NVML"
    assert warm.conditions.sm_mhz[1] > 100
    if readings.energy(device) is not None:
        used = timer.energy(lambda: y.copy_(x), device, seconds=0.5)
        assert 10 < used / warm.median_s < 1500  # watts


# ---- ceilings and roofline -----------------------------------------------------------------------------------


@pytest.fixture
def no_ceilings(monkeypatch, tmp_path):
    """Nothing is known of any device; returns the folder where it will be kept."""
    monkeypatch.setenv("SCAN_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(maker, "_known", {})
    return tmp_path / "ceilings"


@pytest.mark.alone
def test_ceilings_of_this_cpu_are_plausible_and_measured_once(no_ceilings, monkeypatch):
    begin = time.perf_counter()
    found = {c.resource: c for c in ceilings(CPU)}
    took = time.perf_counter() - begin
    assert set(found) == {"bytes", "exps", "flops"}
    assert 1e8 < found["bytes"].per_second < 1e13
    assert 1e7 < found["exps"].per_second < found["flops"].per_second < 1e15
    assert took < 30
    assert ceilings(CPU) is ceilings(CPU)
    # another process reads what this one kept
    monkeypatch.setattr(maker, "_known", {})
    monkeypatch.setattr(maker, "_MEASURE", {})
    assert {c.resource: c for c in ceilings(CPU)} == found


def test_a_ceiling_is_the_most_ever_measured_and_holds_for_its_device_alone(no_ceilings, monkeypatch):
    rates = iter((5.0, 4.0, 6.0, 1.0, 2.0))
    measure_it = lambda device: (ceiling("bytes", next(rates), "memory"),)  # noqa: E731
    monkeypatch.setattr(maker, "_MEASURE", {"cpu": measure_it})
    assert ceilings(CPU)[0].per_second == 5.0
    assert ceilings(CPU, fresh=True)[0].per_second == 5.0
    assert ceilings(CPU, fresh=True)[0].per_second == 6.0
    assert ceilings(dataclasses.replace(CPU, units=CPU.units + 1))[0].per_second == 1.0
    (file,) = no_ceilings.iterdir()
    for bad in ("", "{}", "[1]", '{"key": 1, "ceilings": []}', file.read_text().replace("1.0", "-1.0")):
        file.write_text(bad)
        monkeypatch.setattr(maker, "_known", {})
        assert ceilings(dataclasses.replace(CPU, units=CPU.units + 1))[0].per_second == 2.0
        rates = iter((2.0,))


def test_a_folder_that_cannot_be_written_costs_a_measurement_and_nothing_else(no_ceilings, monkeypatch):
    no_ceilings.write_text("a file where the folder should be")
    monkeypatch.setattr(maker, "_MEASURE", {"cpu": lambda device: (ceiling("bytes", 7.0, "memory"),)})
    assert ceilings(CPU)[0].per_second == 7.0


def test_what_is_kept_of_a_machine_is_for_its_user_only(monkeypatch, tmp_path):
    monkeypatch.setenv("SCAN_KERNELS_CACHE", str(tmp_path / "above" / "cache"))
    monkeypatch.setattr(maker, "_known", {})
    monkeypatch.setattr(maker, "_MEASURE", {"cpu": lambda device: (ceiling("bytes", 7.0, "memory"),)})
    ceilings(CPU)
    for name in ("cache", "cache/ceilings"):
        assert (tmp_path / "above" / name).stat().st_mode & 0o777 == 0o700


# what the kernels of ceilings.cu find on the made-up GPU below, a second
TRUE = {
    "multiply_add": 30e12,
    "ex2": 4e12,
    "shuffle": 8e12,
    "shared": 32e12,
    "copy": 3e12,
    "l2": 6e12,
    "nothing": 1 / 1.5e-6,
}


@pytest.fixture
def made_up_gpu(monkeypatch):
    """A GPU on which each kernel of ceilings.cu takes as long as the work that its source says it does."""
    from scan_kernels import cuda_module

    gpu = FakeGpu(monkeypatch)
    text = maker.SOURCE.read_text()
    constants = {k: int(v) for k, v in re.findall(r"constexpr int (\w+) = (\d+);", text)}

    class Kernel:
        def __init__(self, files, fields, defines, name):
            assert f"KERNEL({name})" in text
            assert set(re.findall(r"\bp\.(\w+)", text)) <= set(fields)
            self.name = name

        def prepare(self, blocks, threads, shared_bytes, values):
            assert threads == constants["THREADS"]
            lanes = blocks * threads
            loop = lanes * values.get("times", 1) * constants["UNROLL"]
            work = {
                "multiply_add": loop * constants["CHAINS"], "ex2": loop * constants["CHAINS"],
                "shuffle": loop * constants["CHAINS"], "shared": loop * 16,
                "copy": lanes * constants["LOADS"] * 16 * 2,
                "l2": blocks * values.get("times", 1) * values.get("count", 0) * 16, "nothing": 1,
            }[self.name]  # fmt: skip
            assert not values or 5e-4 < work / TRUE[self.name] < 5e-3  # long enough to be timed, and no longer
            return lambda pointers: gpu.kernel(work / TRUE[self.name])()

    real = {name: getattr(torch, name) for name in ("zeros", "ones")}
    for name, make in real.items():
        monkeypatch.setattr(torch, name, lambda *size, make=make, **k: make(*size, **{**k, "device": "cpu"}))
    monkeypatch.setattr(cuda_module, "Kernel", Kernel)
    monkeypatch.setattr(maker, "_cupy", lambda: True)
    monkeypatch.setattr(maker, "COPIED_GPU", 1 << 20)
    monkeypatch.setattr(readings, "nvml", lambda index: None)
    monkeypatch.setattr(readings, "top_clock", lambda device: 1980.0)
    return gpu


def test_the_ceilings_of_a_gpu_are_what_its_kernels_do(made_up_gpu, no_ceilings):
    found = {(c.resource, bool(c.holds)): c for c in ceilings(H100)}
    expected = {
        ("bytes", False): "copy", ("bytes", True): "l2", ("exps", False): "ex2", ("issues", False): "multiply_add",
        ("shuffles", False): "shuffle", ("shared", False): "shared", ("launches", False): "nothing",
    }  # fmt: skip
    for key, kernel in expected.items():
        assert found[key].per_second == pytest.approx(TRUE[kernel], rel=1e-6), kernel
        assert "measured" in found[key].source
    assert found["flops", False].per_second == pytest.approx(2 * TRUE["multiply_add"])
    clock = 132 * 1.98e9
    assert found["bytes", False].datasheet == 3.35e12
    assert found["exps", False].datasheet == pytest.approx(16 * clock)
    assert found["flops", False].datasheet == pytest.approx(256 * clock)  # 66.9e12, as the data sheet says
    assert found["shared", False].datasheet == pytest.approx(128 * clock)
    assert found["bytes", True].holds == H100.l2_bytes // 2
    assert set(expected) | {("flops", False)} == set(found)


def test_without_cupy_clock_and_lanes_stand_in_and_say_so(made_up_gpu, no_ceilings, monkeypatch):
    monkeypatch.setattr(maker, "_cupy", lambda: False)
    monkeypatch.setattr(maker, "_copied", lambda device: {("bytes", 0): (2.5e12, "measured: torch's copy")})
    found = {c.resource: c for c in ceilings(H100)}
    assert found["bytes"].per_second == 2.5e12
    assert found["exps"].per_second == pytest.approx(16 * 132 * 1.98e9)
    assert "not measured" in found["exps"].source
    unknown = dataclasses.replace(H100, name="Some GPU", arch="sm_999")
    assert {c.resource for c in ceilings(unknown)} == {"bytes", "shuffles", "shared"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_ceilings_of_this_gpu_are_near_what_its_maker_says(no_ceilings):
    found = ceilings(describe("cuda"))
    assert {c.resource for c in found} == set(maker.UNITS)
    for c in found:
        assert "not measured" not in c.source
        if c.datasheet:
            assert 0.75 * c.datasheet < c.per_second < 1.05 * c.datasheet, c


@pytest.mark.parametrize(
    ("name", "rate"),
    [("NVIDIA H200", 4.8e12), ("NVIDIA GH200 480GB", 4.0e12), ("NVIDIA H100 80GB HBM3", 3.35e12),
     ("NVIDIA A100-SXM4-80GB", 2.039e12), ("NVIDIA L4", 0.3e12), ("NVIDIA RTX A4000", 0.0)],
)  # fmt: skip
def test_data_sheets_are_found_by_name(name, rate, monkeypatch):
    monkeypatch.setattr(readings, "top_clock", lambda device: 1000.0)
    assert maker._told(dataclasses.replace(H100, name=name)).get(("bytes", 0), 0.0) == rate


def intermediate(code):
    """PTX of a translation unit; cuda-core asks for a driver before it gives any."""
    from cuda.bindings import nvrtc

    def asked(answer):
        assert answer[0] == nvrtc.nvrtcResult.NVRTC_SUCCESS
        return answer[1] if len(answer) > 1 else None

    program = asked(nvrtc.nvrtcCreateProgram(code.encode(), b"unit.cu", 0, [], []))
    options = [b"-std=c++17", b"-ftz=true", b"-arch=compute_90"]
    asked(nvrtc.nvrtcCompileProgram(program, len(options), options))
    room = b" " * asked(nvrtc.nvrtcGetPTXSize(program))
    asked(nvrtc.nvrtcGetPTX(program, room))
    return room.decode()


def test_the_kernels_of_the_ceilings_do_what_is_counted():
    """Of each chain, as many instructions as ``ceilings.py`` counts stand in the loop; and all fit in registers."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    from test_cuda_compile import DEVICES, compile_for

    from scan_kernels.cuda_module import source

    code = source((maker.SOURCE,), maker.FIELDS, {})
    for device in DEVICES:
        usage = compile_for(device.arch, code)
        assert set(usage) == set(TRUE)
        for name, taken in usage.items():
            assert max(taken.stack, taken.stores, taken.loads) == 0, (device.arch, name)
            assert taken.registers * maker.THREADS * maker.BLOCKS <= 65536, (device.arch, name)
            assert taken.shared * maker.BLOCKS <= 64 << 10
    ptx = intermediate(code)
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, re.DOTALL))
    loops = {
        "multiply_add": "fma.rn",
        "ex2": "ex2.approx",
        "shuffle": "shfl.sync.bfly",
        "shared": "ld.volatile.shared.v4",
    }
    for name, instruction in loops.items():
        expected = maker.UNROLL * (1 if name == "shared" else maker.CHAINS)
        assert bodies[name].count(instruction) == expected, name
    assert bodies["copy"].count("ld.global.cs") == bodies["copy"].count("st.global.cs") == maker.LOADS
    assert bodies["l2"].count("ld.global.cg") % maker.LOADS == 0
    assert bodies["l2"].count("ld.global.cg") > 0


@dataclasses.dataclass
class Counted:
    n: int = 1

    def bytes(self):
        return 600 * self.n

    def exps(self):
        return 20 * self.n

    def flops(self):
        return 100 * self.n


def ceiling(resource, per_second, unit):
    return Ceiling(resource, per_second, unit, "given")


def test_the_busiest_unit_is_the_bound():
    made = roofline.bound(
        Counted(), (ceiling("bytes", 100.0, "memory"), ceiling("exps", 2.0, "sfu"), ceiling("flops", 50.0, "fp32"))
    )
    assert made.needs == {"bytes": 6.0, "exps": 10.0, "flops": 2.0}
    assert (made.unit, made.seconds) == ("sfu", 10.0)
    assert made.share(40.0) == 0.25


def test_resources_of_one_unit_wait_for_each_other():
    made = roofline.bound(
        Counted(), (ceiling("bytes", 50.0, "memory"), ceiling("exps", 2.0, "vector"), ceiling("flops", 25.0, "vector"))
    )
    assert made.units == {"memory": 12.0, "vector": 14.0}
    assert (made.unit, made.seconds) == ("vector", 14.0)


def test_a_resource_the_problem_does_not_count_is_left_out():
    made = roofline.bound(Counted(), (ceiling("shuffles", 1.0, "lsu"), ceiling("bytes", 600.0, "memory")))
    assert made.needs == {"bytes": 1.0}
    with pytest.raises(ValueError, match="no known ceiling"):
        roofline.bound(Counted(), ())


def test_a_cache_bounds_what_it_holds_unless_it_is_cold():
    known = (ceiling("bytes", 100.0, "memory"), Ceiling("bytes", 300.0, "L2 cache", "given", holds=1000))
    warm, large, cold = (roofline.bound(Counted(n), known, cold) for n, cold in ((1, False), (2, False), (1, True)))
    assert (warm.unit, warm.seconds) == ("L2 cache", 2.0)
    assert (large.unit, large.seconds) == ("memory", 12.0)
    assert (cold.unit, cold.seconds) == ("memory", 6.0)


def test_what_a_kernel_can_avoid_is_shown_and_is_not_the_bound():
    counted = types.SimpleNamespace(bytes=lambda: 600, shared=lambda: 10**6, shuffles=lambda: 0)
    known = (ceiling("bytes", 100.0, "memory"), ceiling("shared", 1.0, "smem"), ceiling("shuffles", 1.0, "shuffles"))
    made = roofline.bound(counted, known)
    assert made.needs == {"bytes": 6.0, "shared": 10**6}
    assert (made.unit, made.seconds) == ("memory", 6.0)


def test_instructions_are_counted_as_the_recurrence_is_written():
    """By hand for one element of two states, with everything: 5 a state, then 4 + D + bias + softplus 6 + gate 5."""
    whole = Problem("forward", 1, 1, 1, 2, has_D=True, has_bias=True, has_z=True, softplus=True)
    assert whole.issues() == 2 * 5 + 17
    assert Problem("forward", 1, 1, 1, 2).issues() == 2 * 5 + 4
    assert dataclasses.replace(whole, direction="backward").issues() == 2 * 13 + 34
    assert whole.shared() == 2 * 8
    assert whole.shuffles() == 0
    assert dataclasses.replace(whole, direction="backward", constant_B=True).shuffles() == 2
    assert whole.launches() == 1


def test_the_bound_of_the_paper_shape_on_an_h100():
    """By hand, per element: 8 bytes, 16 + 2 + 2 exponentials; B and C of (8, 16, 2048) add 1 MB."""
    problem = Problem("forward", 8, 5120, 2048, 16, dtype="bfloat16", has_z=True, softplus=True)
    h100 = (ceiling("bytes", 3.00e12, "memory"), ceiling("exps", 4.12e12, "sfu"))
    made = roofline.bound(problem, h100)
    elements = 8 * 5120 * 2048
    assert made.unit == "sfu"
    assert made.seconds == pytest.approx(elements * 20 / 4.12e12)
    assert made.needs["bytes"] == pytest.approx(elements * 8 / 3.00e12, rel=0.01)


# ---- measuring backends and peers ------------------------------------------------------------------------------


def test_a_backend_gets_a_bound_and_a_peer_that_disagrees_gets_no_time():
    case = Case("small", batch=1, dim=8, length=40)
    wrong = measure.Runner(
        "wrong", "peer", lambda **a: 2 * selective_scan(**a, backend="chunked"), lambda p: None, True
    )
    unfit = measure.Runner("unfit", "peer", lambda **a: None, lambda p: "cannot", True)
    fails = measure.Runner("fails", "peer", lambda **a: a["u"].missing, lambda p: None)
    runners = [measure.backend(OP, "chunked", selective_scan), wrong, unfit, fails]
    found = list(measure.results(OP, case, case.make(), runners, CPU, 0.01, ("inference", "backward")))
    ours = [r for r in found if r["runner"] == "chunked"]
    assert [r["use"] for r in ours] == ["inference", "backward"]
    assert all(r["median_s"] > 0 and r["config"] and r["chosen"] for r in ours)
    reasons = {r["runner"]: r["reason"] for r in found if "reason" in r}
    assert reasons["wrong"] == "the results of the backends and wrong disagree"
    assert reasons["unfit"] == "cannot"
    assert "AttributeError" in reasons["fails"]
    need = measure.bounds(case.used("inference"), ceilings(CPU))
    assert need["elements"] == 8 * 40
    assert need["counts"]["exps"] == 8 * 40 * 20


def test_the_one_that_disagrees_with_most_gets_no_time_even_if_it_is_ours():
    case = Case("small", batch=1, dim=8, length=40)
    right = [measure.Runner(name, "peer", lambda **a: selective_scan(**a), lambda p: None) for name in ("a", "b")]
    wrong = measure.Runner("ours", "backend", lambda **a: 1.01 * selective_scan(**a), lambda p: None)
    found = list(measure.results(OP, case, case.make(), [wrong, *right], CPU, 0.01, ("inference", "training")))
    assert {(r["runner"], "reason" in r) for r in found} == {("ours", True), ("a", False), ("b", False)}
    assert "disagrees with a" in found[0]["reason"]
    found = list(measure.results(OP, case, case.make(), [wrong, right[0]], CPU, 0.01, ("inference",)))
    assert {r["reason"] for r in found} == {"the results of ours and a disagree"}


def test_slow_runners_stop_when_their_allowance_is_spent():
    case = Case("small", batch=1, dim=4, length=8)
    slow = measure.Runner("slow", "peer", lambda **a: (time.sleep(0.02), selective_scan(**a))[1], lambda p: None, True)
    allowance = measure.Allowance(0.01)
    runners = [measure.backend(OP, "chunked", selective_scan), slow]
    found = list(measure.results(OP, case, case.make(), runners, CPU, 0.01, measure.USES, allowance))
    times = [r for r in found if r["runner"] == "slow"]
    assert "median_s" in times[0]
    assert all("used up" in r["reason"] for r in times[1:])


@pytest.mark.parametrize("peer", PEERS, ids=lambda p: p.name)
def test_an_installed_peer_computes_the_same(peer: Peer):
    if "cpu" not in peer.devices:
        pytest.skip(f"{peer.name} does not run on a CPU")
    try:
        scan = peer.load(OP)
    except ImportError as e:
        pytest.skip(f"{peer.name} is not installed: {e}")
    for flags in ({}, {"D": False, "z": False, "bias": False}):
        case = Case("small", batch=2, dim=6, length=21, **flags)
        tensors = case.make()
        for use in ("inference", "backward"):
            ours = measure.call(lambda **a: selective_scan(**a, backend="chunked"), tensors, ARGUMENTS, use)()
            theirs = measure.call(scan, tensors, ARGUMENTS, use)()
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_what_tuning_gained_is_timed_beside_the_rule_of_thumb(monkeypatch):
    case = Case("small", batch=1, dim=8, length=40)
    resolve, asked = OP.resolve, []

    def tuned(problem, device, backend="auto", config=None):
        choice = resolve(problem, device, backend, config)
        asked.append(config)
        other = choice.module.configs(problem, CPU)[1]
        return choice if config else dataclasses.replace(choice, config=other, source="tuned")

    monkeypatch.setattr(OP, "resolve", tuned)
    runner = measure.backend(OP, "chunked", selective_scan)
    (record,) = measure.results(OP, case, case.make(), [runner], CPU, 0.01, ("inference",))
    default = OP.backends["chunked"].configs(case.used("inference"), CPU)[0]
    assert record["chosen"] == "tuned"
    assert record["config"] != dataclasses.asdict(default)
    assert record["untuned_s"] > 0
    assert default in asked  # the rule of thumb ran by its own configuration
    monkeypatch.setattr(OP, "resolve", resolve)
    (record,) = measure.results(OP, case, case.make(), [runner], CPU, 0.01, ("inference",))
    assert "untuned_s" not in record


def test_two_measurements_of_a_call_become_one():
    first = {"runner": "a", "use": "inference", "median_s": 1.0, "low_s": 0.9, "high_s": 1.1, "runs": 5,
             "disturbed": ["x"], "cold": {"median_s": 7.0}}  # fmt: skip
    second = first | {"median_s": 2.0, "low_s": 1.9, "high_s": 2.1, "runs": 7, "disturbed": ["x", "y"]}
    made = measure.merged(first, second)
    assert (made["median_s"], made["low_s"], made["runs"]) == (1.5, pytest.approx(1.4), 12)
    assert made["passes"] == [1.0, 2.0]
    assert made["disturbed"] == ["x", "y"]
    again = measure.merged(made, first | {"median_s": 3.0})
    assert again["passes"] == [1.0, 2.0, 3.0]
    assert again["median_s"] == 2.0
    quiet = first | {"median_s": 4.0, "disturbed": []}
    for made in (measure.merged(first, quiet), measure.merged(quiet, first)):
        assert (made["median_s"], made["disturbed"], made["cold"]) == (4.0, [], {"median_s": 7.0})
        assert made["set_aside"] == {"median_s": 1.0, "disturbed": ["x"]}
    failed = {"runner": "a", "use": "inference", "reason": "out of memory"}
    assert measure.merged(first, failed) == first
    assert measure.merged(failed, first) == first


def test_the_peak_of_a_call_is_what_it_takes_at_once():
    peaks = [measure.peak(lambda n=n: [torch.ones(n << 18) for _ in range(2)], CPU) for n in (8, 32)]
    if peaks[0] is None:
        pytest.skip("this system does not tell")
    for n, found in zip((8, 32), peaks, strict=True):
        assert found == pytest.approx(2 * n << 20, rel=0.15)


def test_the_sizes_of_an_axis_are_powers_of_two_and_end_at_the_last():
    axis = sweep.Axis("length", 512, 1 << 20)
    assert axis.sizes(full=True) == [1 << n for n in range(9, 21)]
    assert axis.sizes(full=False) == [512, *(1 << n for n in range(10, 21, 2))]
    assert sweep.Axis("state", 4, 4).sizes(full=False) == [4]


def test_who_takes_too_long_or_fails_is_not_tried_at_larger_sizes():
    patience = sweep.Patience(0.1)
    for size, seconds in ((8, 0.05), (16, 0.2), (32, None)):
        record = {"runner": "slow", "use": "backward"}
        patience.note(record | ({"median_s": seconds} if seconds else {"reason": "larger sizes"}), size)
    patience.note({"runner": "broken", "use": "backward", "reason": "out of memory"}, 16)
    assert patience.why["slow", "backward"] == "took 0.2 s at 16; larger sizes are not tried"
    assert patience.why["broken", "backward"] == "out of memory"
    assert ("slow", "inference") not in patience.why


@pytest.mark.parametrize("name", ["attention", "convolution"])
def test_an_operation_that_is_wrong_is_not_drawn(name, monkeypatch):
    right = getattr(sweep, name)

    def wrong(*arguments):
        run, tensors = right(*arguments)
        return lambda: run() * 1.01, tensors

    sweep._check_operations(CPU)
    monkeypatch.setattr(sweep, name, wrong)
    with pytest.raises(RuntimeError, match=name):
        sweep._check_operations(CPU)


def test_a_part_that_computes_something_else_gets_no_time(monkeypatch):
    monkeypatch.setattr(parts, "SIZES", {"cpu": (1, 8, 16)})
    known = {"step": {"scan-kernels": parts._step_ours, "off": lambda s: (lambda: parts._step_ours(s)[0]() + 1, []),
                      "absent": parts._step_of_mamba_ssm}}  # fmt: skip
    monkeypatch.setattr(parts, "PARTS", known)
    monkeypatch.setattr(parts, "titles", lambda device: {"step": "a step"})
    (made,) = parts.results(CPU, 0.01)
    by_name = {r["runner"]: r for r in made["results"]}
    assert by_name["scan-kernels"]["median_s"] > 0
    assert "from ours in norm" in by_name["off"]["reason"]
    assert "not installed" in by_name["absent"]["reason"]


def test_the_counters_of_all_kernels_add_up():
    names = [name for metrics in counters.METRICS.values() for name in metrics]
    lines = ["==PROF== Connected", ",".join(f'"{n}"' for n in ("ID", "Kernel Name", *names)),
             ",".join(['""', '""', *['"byte"'] * len(names)]),
             ",".join(['"0"', '"scan"', *[f'"{1000 * (i + 1):,}"' for i in range(len(names))]]),
             ",".join(['"1"', '"combine"', *['"1"'] * len(names)]), "==PROF== Disconnected"]  # fmt: skip
    read = counters.parse("\n".join(lines))
    assert read == {
        "bytes": 1001 + 2001, "exps": 32 * 3001, "flops": 4001 + 5001 + 2 * 6001, "issues": 32 * 7001,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        counters.parse("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n")


def test_counters_are_read_where_ncu_is(monkeypatch):
    """Two resources agree with the formulas, one of them does not; what ncu says instead is kept."""
    made = small_report()
    made["cases"][0]["name"] = "1x10x100"
    rich = types.SimpleNamespace(add_task=lambda *a, **k: 0, remove_task=lambda task: None)
    asked = []

    def read(*what):
        asked.append(what)
        return {"bytes": 8300.0, "exps": 30000.0, "flops": 1.5e5, "issues": 1.0}

    monkeypatch.setattr(counters, "found", lambda: "/usr/bin/ncu")
    monkeypatch.setattr(counters, "read", read)
    found = report_steps._counters(H100, made, rich)
    assert asked[0] == ("selective_scan", "1,10,100,16,bf16", "ours", "inference")
    assert {r["resource"]: r["agrees"] for r in found["rows"] if r["use"] == "inference"} == {
        "bytes": True, "exps": False, "flops": False,
    }  # fmt: skip
    monkeypatch.setattr(counters, "read", lambda *what: counters.parse("", "==ERROR== no leave"))
    found = report_steps._counters(H100, made, rich)
    assert not found["read"]
    assert "no leave" in found["why"]


def test_a_peer_says_why_it_does_not_fit():
    loop = next(p for p in PEERS if p.loop_states)
    base = Problem("forward", 1, 64, 256, 16)
    assert loop.unfit(base, CPU) is None
    assert "Python loop" in loop.unfit(dataclasses.replace(base, length=1 << 20), CPU)
    assert "groups" in loop.unfit(dataclasses.replace(base, groups=2), CPU)
    assert "backward" in loop.unfit(dataclasses.replace(base, direction="backward", dim=8192, length=4096), CPU)
    assert "GB" in loop.unfit(dataclasses.replace(base, batch=1 << 16, dim=4096), CPU)


# ---- real input ------------------------------------------------------------------------------------------------


def test_text_activations_are_what_the_layer_feeds_its_scan(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"the quick brown fox" * 300)
    case, tensors = text.activations(path, CPU)
    assert (case.batch, case.length, case.state) == (1, text.LONGEST, 16)
    assert tensors["u"].shape == (1, case.dim, case.length)
    assert tensors["delta_softplus"] is True
    # equal bytes give equal inputs: once the convolution's window is past its start, the text repeats every 19 steps
    torch.testing.assert_close(tensors["u"][..., 30], tensors["u"][..., 49])
    cut = text.beginning(tensors, 40)
    out = selective_scan(**{k: v for k, v in tensors.items() if k not in ("dout", "dlast_state")})
    part = selective_scan(**{k: v for k, v in cut.items() if k not in ("dout", "dlast_state")})
    torch.testing.assert_close(part, out[..., :40])


def test_a_bad_text_is_one_line(tmp_path):
    empty = tmp_path / "empty"
    empty.touch()
    for path in (empty, tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            text.activations(path, CPU)


# ---- pages -----------------------------------------------------------------------------------------------------


def small_report() -> report.Report:
    """A report of made-up figures, with everything that one can hold."""
    need = {
        "elements": 1000, "counts": {"bytes": 8000, "exps": 20000, "flops": 100000, "shared": 5}, "seconds": 2e-3,
        "unit": "vector", "needs": {"bytes": 1e-3, "exps": 1.5e-3, "flops": 5e-4, "shared": 1e-3},
        "units": {"memory": 1e-3, "vector": 2e-3}, "cold_s": 2e-3,
    }  # fmt: skip

    def result(runner, kind, use, s, **more):
        timing = timer.Timing(s, 0.9 * s, 1.1 * s, 9, "wall clock, 1 call a sample", "0.2 s were spent", 0.01 * s)
        return {"runner": runner, "kind": kind, "use": use} | json.loads(json.dumps(dataclasses.asdict(timing))) | more

    ours = {
        "cold": {"median_s": 6e-3, "low_s": 6e-3, "high_s": 6e-3, "runs": 3, "method": "cold"}, "energy_j": 2e-3,
        "config": {"tile": 4}, "chosen": "tuned", "untuned_s": 5e-3, "disturbed": ["throttled: power cap"],
        "conditions": dataclasses.asdict(readings.Conditions("NVML", (1700, 1980), (2619, 2619), 512.0, 61.0)),
    }  # fmt: skip
    points = [
        {"size": n, "uses": {"inference": need, "backward": need},
         "results": [result("ours", "backend", "inference", n * 1e-6), result("theirs", "peer", "inference", n * 1e-4),
                     result("ours", "backend", "backward", n * 1e-6),
                     {"runner": "ours", "kind": "backend", "use": "step", "peak_bytes": n << 20}]}
        for n in (512, 1024)
    ]  # fmt: skip
    paper = [
        {"size": n, "results": [result("scan-kernels", "backend", "inference", n * 1e-6),
                                result("attention", "operation", "inference", n * 1e-5),
                                {"runner": "attention", "kind": "operation", "use": "step", "reason": "out of memory"}]}
        for n in (512, 1024)
    ]  # fmt: skip
    return report.empty() | {
        "command": "python -m scan_kernels report", "date": "2026-11-23T00:00:00+00:00", "seconds": 0.2,
        "complete": True, "device": dataclasses.asdict(CPU) | {"name": "A <fast> CPU", "slug": "a-fast-cpu"},
        "ceilings": [dataclasses.asdict(c) for c in (
            ceiling("bytes", 8e6, "memory"), Ceiling("bytes", 2e7, "L2 cache", "given", 100, 0.0),
            Ceiling("exps", 1.3e7, "vector", "given", 0, 1.6e7), ceiling("flops", 2e8, "vector"),
            ceiling("launches", 5e5, "launching"))],
        "versions": {"torch": "2", "driver": "580.1"}, "formulas": {"exps": "one for each & every state"},
        "gate": {"ours": {"cases": 9, "failed": 0, "skipped": "", "shares": [5] * 20 + [0]},
                 "bad": {"cases": 9, "failed": 2, "skipped": "", "shares": [5] * 20 + [2]}},
        "peers": [{"name": "theirs", "what": "x", "version": "1", "missing": None},
                  {"name": "absent", "what": "y", "version": "", "missing": "not installed"}],
        "cases": [{
            "name": "one", "title": "1x10x100", "about": "random", "measured": 2, "tokens": 100,
            "uses": {"inference": need, "backward": need},
            "results": [result("ours", "backend", "inference", 4e-3, **ours),
                        result("theirs", "peer", "inference", 8e-2),
                        result("ours", "backend", "backward", 1e-2),
                        {"runner": "theirs", "kind": "peer", "use": "backward", "reason": "takes minutes"}],
        }],
        "sweeps": [{"axis": "length", "title": "batch 1", "points": [*points, {"size": 2048, "reason": "full"}]}],
        "parts": [{"part": "block", "title": "a block", "results": [
            result("scan-kernels", "backend", "inference", 1e-3), result("theirs", "peer", "inference", 7e-3),
            {"runner": "fla", "kind": "peer", "use": "inference", "reason": "no fla"}]}],
        "counters": {"read": True, "why": "", "rows": [
            {"case": "1x10x100", "use": "inference", "backend": "ours", "resource": "exps", "counted": 20000,
             "read": 20400.0, "exact": True, "agrees": True}]},
        "figure8": {"title": "batch 1", "date": "2026-11-24", "command": "report --figure8", "points": paper,
                    "operations": {"attention": "flash"}, "peers": []},
    }  # fmt: skip


class Links(html.parser.HTMLParser):
    """Collects what a browser would fetch, and the words of every table cell."""

    def __init__(self, page: str):
        super().__init__()
        self.fetched: list[str] = []
        self.cells: list[str] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.fetched += [v for k, v in attributes if k in ("src", "href", "srcset", "data")]
        self.inside = tag == "td"

    def handle_data(self, data):
        if self.inside:
            self.cells.append(data)
            self.inside = False


def test_a_page_is_rendered_from_json_alone_and_fetches_nothing(tmp_path):
    made = small_report()
    folder = tmp_path / "a-fast-cpu"
    report.save(made, folder)
    page = report.render(report.load(folder / "report.json"), folder).read_text()
    seen = Links(page)
    inside = [link for link in seen.fetched if link.startswith("#")]
    assert len(inside) > 10
    assert all(f"id={link[1:]}" in page.replace("'", "") for link in inside)
    pictures = [link for link in seen.fetched if link not in inside]
    assert len(pictures) == len(report.PICTURES)
    assert all(link.startswith("data:image/png;base64,") for link in pictures)
    assert not re.search(r"@import|url\(|<script", page)
    # 1000 elements in 4 ms; cold 6 ms; half of the bound; 2 mJ; 80 ms / 4 ms over the peer
    first = seen.cells.index("4 ms †")
    assert seen.cells[first + 1 : first + 9] == [
        "20 %", "9", "6 ms", "0.00025", "50 %", "vector", "20", "20x",
    ]  # fmt: skip
    for words in (
        "A &lt;fast&gt; CPU", "2 of 9 FAILED", "takes minutes", "not installed", "one for each &amp; every state",
        "1700 to 1980 MHz", "<td class=t>throttled: power cap</td>", "1.25x", "within 5 %", "2.00 us each",
        "data sheet or clock: 16 M/s", "attention, forward + backward: out of memory", "0.2 s were spent", "580.1",
        "no fla", "<td>7x</td>",
    ):  # fmt: skip
        assert words in page, words
    for name in report.PICTURES:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_every_picture_has_its_figures_in_words(tmp_path):
    page = report.render(small_report(), tmp_path).read_text()
    alts = re.findall(r"<img alt='([^']*)'", page)
    assert len(alts) == len(report.PICTURES)
    for words in (
        "1x10x100 forward: ours, 4 ms, 50 % of the bound set by vector", "ours: 1.024 ms at length 1024",
        "ours: 1024 MiB at length 1024", "bad: 102 tensors, 2 beyond their allowance",
    ):  # fmt: skip
        assert any(words in alt for alt in alts), words


def test_an_older_report_is_read_and_what_it_lacks_is_said(tmp_path):
    keys = ("command", "date", "seconds", "complete", "device", "ceilings", "versions", "peers", "cases")
    old = {k: v for k, v in small_report().items() if k in keys} | {"schema": 1}
    for c in old["ceilings"]:
        del c["holds"], c["datasheet"]
    for r in old["cases"][0]["results"]:
        for key in ("stopped", "error_s", "disturbed", "conditions", "cold", "untuned_s", "energy_j"):
            r.pop(key, None)
    old["gate"] = {"ours": {"cases": 9, "failed": 0, "skipped": ""}}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(old))
    assert main(["report", "--from", str(path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Counters were not read" in page
    assert "Nobody told" in page
    assert len(re.findall("<img", page)) == 4
    assert (tmp_path / "speed.png").is_file()
    assert not (tmp_path / "scaling.png").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [("no", "no JSON"), ("[]", "without a device"), ('{"device": {}, "cases": [], "schema": 99}', "schema 1 to 2"),
     (None, "No such file")],
)  # fmt: skip
def test_what_is_no_report_is_one_line(content, words, tmp_path, capsys):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    for option in ("--from", "--compare"):
        with pytest.raises(SystemExit) as e:
            main(["report", option, str(path)])
        assert e.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert words in said
        assert option in said


def test_labels_are_moved_apart_and_no_further():
    moved = charts._apart([1.0, 1.05, 5.0, 1.1], 0.5, 0.0, 10.0)
    assert moved == pytest.approx([1.0, 1.5, 5.0, 2.0])
    ordered = sorted(charts._apart([9.9, 9.8, 9.7], 0.5, 0.0, 10.0))
    assert ordered == pytest.approx([9.0, 9.5, 10.0])


def test_a_report_without_any_time_still_renders(tmp_path):
    made = small_report() | {"complete": False, "sweeps": [], "figure8": None}
    made["cases"][0]["results"] = []
    assert "Interrupted" in report.render(made, tmp_path).read_text()


def test_the_index_shows_every_device_and_links_what_is_there(tmp_path):
    for slug in ("one", "two"):
        report.save(small_report(), tmp_path / slug)
    report.render(small_report(), tmp_path / "one")
    (tmp_path / "one" / "check.json").write_text("{}")
    words = report.index(tmp_path).read_text()
    assert words.count("## A <fast> CPU") == 2
    assert "(one/report.html)" in words
    assert "(one/check.json)" in words
    assert "(one/speed.png)" in words
    assert "(two/report.json)" in words
    assert "(two/report.html)" not in words
    assert "python -m scan_kernels report" in words
    assert "| 1x10x100 | forward | ours | 4 ms | 0.00025 | 50 % | vector | 20x |" in words


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    report.write(path, "old")
    report.write(path, "new")
    assert path.read_text() == "new"

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write(path, "newer")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


# ---- verbs -----------------------------------------------------------------------------------------------------


def verb(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "scan_kernels", *arguments], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_bench_prints_a_time_with_its_bound():
    done = verb("bench", "--device", "cpu", "--shape", "1,32,64", "--backend", "chunked", "--seconds", "0.02",
                "--direction", "forward")  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "chunked" in line)
    assert "forward" in line
    assert "%" in line
    assert "units" in line or "memory" in line
    assert len(re.findall(r"\d [mu]?s\b", line)) >= 5  # time, two quartiles, cold, bound


def test_the_benchmarks_are_off_unless_asked_for_and_can_be_compared(tmp_path):
    def run(*options):
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_benchmarks.py", "-k", "tiny and chunked", *options]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=300, check=False, cwd=Path(__file__).parent.parent,
        )  # fmt: skip

    storage = f"--benchmark-storage={tmp_path}"
    assert "3 skipped" in run().stdout
    first = run("--benchmark-only", storage, "--benchmark-autosave")
    assert "3 passed" in first.stdout, first.stdout + first.stderr
    again = run("--benchmark-only", storage, "--benchmark-compare")
    assert "3 passed" in again.stdout
    assert "(0001_" in again.stdout  # the saved run's rows stand beside the new ones
    (saved,) = tmp_path.rglob("0001_*.json")
    for made in json.loads(saved.read_text())["benchmarks"]:
        assert made["extra_info"]["bound_s"] > 0
        assert made["stats"]["median"] > made["extra_info"]["bound_s"]


def test_a_sweep_is_a_measurement_for_each_size_and_a_cliff_fails(monkeypatch, capsys):
    """Twice as long, an element takes ten times as long; then the same again."""
    seconds = iter((1e-3, 20e-3, 40e-3))

    def results(op, case, *others, **options):
        took = next(seconds)
        yield {"use": "inference", "runner": "chunked", "median_s": took, "low_s": took, "high_s": took, "runs": 3,
               "method": "one call"}  # fmt: skip

    monkeypatch.setattr(measure, "results", results)
    arguments = ["bench", "--device", "cpu", "--shape", "1,32,64", "--backend", "chunked", "--direction", "forward"]
    assert main([*arguments, "--sweep", "length=64:256"]) == 1
    shown = capsys.readouterr().out
    assert [f"1 x 32 x {n}," in shown for n in (32, 64, 128, 256, 512)] == [False, True, True, True, False]
    assert shown.count("CLIFF") == 1
    assert "x 10.00 CLIFF" in shown
    assert "x 1.00" in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("bench", "--op", "abacus", "--shape", "1,2,3"), "--op"),
        (("bench", "--shape", "1,2"), "--shape"),
        (("bench", "--shape", "1,2,0"), "--shape"),
        (("bench", "--shape", "1,2,3", "--dtype", "int8"), "--dtype"),
        (("bench", "--shape", "1,2,3", "--backend", "abacus"), "--backend"),
        (("bench", "--shape", "1,2,3", "--host"), "--host"),
        (("bench", "--shape", "1,2,3", "--sweep", "width=1:4"), "--sweep"),
        (("bench", "--shape", "1,2,3", "--sweep", "length=8:4"), "--sweep"),
        (("bench", "--shape", "1,2,3", "--sweep", "state=1:512"), "--sweep"),
        (("report", "--text", "/no/such/file"), "--text"),
        (("report", "--seconds", "-1"), "--seconds"),
    ],
)
def test_bad_arguments_give_one_line_and_exit_code_2(arguments, named, capsys):
    from scan_kernels.__main__ import main

    with pytest.raises(SystemExit) as e:
        main([*arguments, "--device", "cpu"])
    assert e.value.code == 2
    words = capsys.readouterr().err
    assert words.count("\n") == 1
    assert named in words


@pytest.fixture
def small_world(monkeypatch, tmp_path):
    """The verb report on two tiny cases, with a gate that passes chunked and fails cpu; returns its arguments."""
    from scan_kernels import check, peers
    from scan_kernels.selective_scan import cases

    tiny = [Case(name, batch=1, dim=4, length=12) for name in ("first", "second")]
    rows = [
        check.Row("selective_scan", name, "c", "out", 0.0, 1.0, 0.0, ok)
        for name, ok in (("chunked", True), ("cpu", False))
    ]
    monkeypatch.setattr(cases, "tagged", lambda tag: tiny)
    monkeypatch.setattr(check, "run", lambda *a: (rows, {"selective_scan": {"cuda": "no GPU"}}))
    monkeypatch.setattr(peers, "PEERS", tuple(p for p in PEERS if p.name in ("plain torch", "mamba_ssm")))
    axes = (sweep.Axis("length", 8, 32, dim=4), sweep.Axis("state", 4, 4, dim=4, length=8))
    monkeypatch.setattr(sweep, "AXES", {"cpu": axes})
    monkeypatch.setattr(sweep, "FIGURE", {"cpu": sweep.Axis("length", 8, 32, dim=64)})
    monkeypatch.setattr(sweep, "SECONDS", 0.005)
    monkeypatch.setattr(parts, "SIZES", {"cpu": (1, 8, 16)})
    monkeypatch.setattr(measure, "SLOW", 1e3)  # nothing is slow here, however busy the machine
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two of them wait for each other for milliseconds where the cores are busy
    path = tmp_path / "words"
    path.write_text("to be or not to be")
    out = tmp_path / "out"
    yield ["report", "--device", "cpu", "--text", str(path), "--seconds", "0.05", "--out", str(out)], out / CPU.slug
    torch.set_num_threads(threads)


def test_report_times_what_passed_its_gate_and_nothing_else(small_world, capsys):

    arguments, folder = small_world
    assert main(arguments) == 1  # a red gate is a failure, after everything else was done
    made = json.loads((folder / "report.json").read_text())
    assert made["complete"]
    assert [c["name"] for c in made["cases"]] == ["first", "second", "text"]
    assert {r["runner"] for c in made["cases"] for r in c["results"]} == {"chunked", "plain torch"}
    assert all("median_s" in r for c in made["cases"] for r in c["results"])
    ours = [r for c in made["cases"] for r in c["results"] if r["runner"] == "chunked"]
    assert all(r["cold"]["runs"] and r["stopped"] for r in ours)
    assert all("set_aside" in r or r["median_s"] == pytest.approx(sum(r["passes"]) / 2) for r in ours)
    assert made["formulas"]["exps"].startswith("Exponentials and their kin")
    assert made["gate"]["chunked"]["shares"] == [1, *[0] * 20]
    assert [[p["size"] for p in axis["points"]] for axis in made["sweeps"]] == [[8, 32], [4]]
    steps = [r for r in made["sweeps"][0]["points"][1]["results"] if r["use"] == "step"]
    assert {r["runner"] for r in steps} == {"chunked", "plain torch"}
    assert all(r["peak_bytes"] > 0 for r in steps if r["runner"] == "plain torch")
    assert made["counters"]["why"]
    for part in made["parts"]:
        assert {r["use"] for r in part["results"] if "median_s" in r} == {"inference", "step"} - (
            {"step"} if part["part"] == "step" else set()
        )
        assert {r["runner"] for r in part["results"]} == set(parts.PARTS[part["part"]])
    assert made["cases"][2]["check"]["chunked"]["ok"]
    assert made["cases"][2]["uses"]["inference"]["elements"] == 512 * len("to be or not to be")
    assert made["peers"][0]["name"] == "mamba_ssm"
    assert made["peers"][0]["missing"]
    assert (folder / "report.html").is_file()
    assert (folder / "check.json").is_file()
    assert (folder.parent / "README.md").is_file()
    assert "cpu: no speed is reported" in capsys.readouterr().out


def test_an_interrupted_report_keeps_what_is_done(small_world, monkeypatch):
    from scan_kernels.__main__ import main

    arguments, folder = small_world
    whole = measure.results

    def interrupted(op, case, *rest, **options):
        if case.name == "second":
            raise KeyboardInterrupt
        return whole(op, case, *rest, **options)

    monkeypatch.setattr(measure, "results", interrupted)
    assert main(arguments) == 130
    made = json.loads((folder / "report.json").read_text())
    assert [c["name"] for c in made["cases"]] == ["first"]
    assert not made["complete"]
    assert "Interrupted" in (folder / "report.html").read_text()


def test_an_interrupted_report_goes_on_where_it_was(small_world, monkeypatch):
    arguments, folder = small_world
    whole, seen = measure.results, []

    def interrupted(op, case, *rest, **options):
        seen.append(case.name)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return whole(op, case, *rest, **options)

    monkeypatch.setattr(measure, "results", interrupted)
    assert main(arguments) == 130
    assert main([*arguments, "--resume"]) == 1
    made = json.loads((folder / "report.json").read_text())
    assert made["complete"]
    # first and second and text, then first again: interrupted at second, which comes next
    assert seen[:7] == ["first", "second", "text", "first", "second", "second", "text"]
    assert seen.count("length-8") == 2  # forward and backward
    ours = [r for c in made["cases"] for r in c["results"] if r["runner"] == "chunked"]
    assert all("set_aside" in r or len(r["passes"]) == 2 for r in ours)


def test_there_is_nothing_to_resume_elsewhere(small_world, capsys):
    arguments, _ = small_world
    with pytest.raises(SystemExit):
        main([*arguments, "--resume"])
    assert "--resume" in capsys.readouterr().err


def test_the_papers_picture_is_added_to_the_report_and_kept_by_the_next(small_world, capsys):
    arguments, folder = small_world
    assert main([*arguments, "--figure8"]) == 0
    made = json.loads((folder / "report.json").read_text())
    points = made["figure8"]["points"]
    assert [p["size"] for p in points] == [8, 16, 32]
    for use in ("inference", "step"):
        timed = {r["runner"] for r in points[-1]["results"] if r["use"] == use and "median_s" in r}
        assert timed == {"scan-kernels", "plain torch", "attention", "convolution"}
    assert (folder / "figure8.png").is_file()
    assert "--figure8" in made["figure8"]["command"]
    main(arguments)
    made = json.loads((folder / "report.json").read_text())
    assert made["figure8"]["points"] == points
    assert "attention" in (folder / "report.html").read_text()


def test_a_report_may_be_compared_with_the_one_before(small_world, tmp_path, capsys):
    arguments, folder = small_world
    main(arguments)
    before = tmp_path / "before.json"
    before.write_bytes((folder / "report.json").read_bytes())
    assert main([*arguments, "--compare", str(before)]) == 1  # as without: one gate is red
    said = capsys.readouterr().out
    counts = re.search(r"(\d+) FAST, (\d+) SAME, (\d+) SLOW, (\d+) AMBIGUOUS", said)
    assert sum(map(int, counts.groups())) == 3 * 3  # cases, uses
    (folder / "report.html").unlink()
    for k, source in enumerate((before, folder / "report.json")):
        assert main(["report", "--from", str(source), "--out", str(tmp_path / f"drawn{k}")]) == 0
        assert (tmp_path / f"drawn{k}" / CPU.slug / "report.html").is_file()
    assert not (folder / "report.html").exists()
