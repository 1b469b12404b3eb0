"""The gate: what is right passes, and planted faults are found, in CPU backends and in the CUDA kernels."""

import dataclasses
import shutil

import pytest
import torch
from emulator import install
from faults import CUDA_FAULTS, FaultyConfig, faulty, planted

from scan_kernels import cuda_module
from scan_kernels.gate import GUARD, Fence, Gate
from scan_kernels.profiling.device import describe
from scan_kernels.selective_scan import OP, cases
from scan_kernels.selective_scan.backends import cuda

CPU = torch.device("cpu")
CASE = cases.parse("2,8,65,4", "float32")
NAMES = (
    "tail", "stride", "race", "bounds before", "bounds behind", "stale stage", "input", "states", "row", "sum",
)  # fmt: skip
EXPECTED = {
    "tail": "wrong result: ", "stride": "wrong result: ", "race": "does not repeat: ",
    "bounds before": "writes outside its memory: 4 bytes before",
    "bounds behind": "writes outside its memory: 4 bytes behind",
    "stale stage": "wrong result: ", "input": "writes to its input u", "states": "wrong result: ",
    "row": "wrong result: ", "sum": "wrong result: dA",
}  # fmt: skip
GATE = Gate(OP, CPU)  # what it computes once serves all tests


@pytest.fixture(autouse=True)
def backends(monkeypatch, tmp_path):
    monkeypatch.setenv("SCAN_KERNELS_CACHE", str(tmp_path / "cache"))
    chunked, cpu = OP.backends["chunked"], OP.backends["cpu"]
    monkeypatch.setitem(OP.__dict__, "backends", {"chunked": chunked, "cpu": cpu, "faulty": faulty(*NAMES)})
    GATE._verdicts.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of a busy machine's cores, the tests wait for one only
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("use", ["inference", "training", "backward"])
@pytest.mark.parametrize("fault", NAMES)
def test_a_planted_fault_is_refused(fault, use):
    verdict = GATE(CASE.used(use), "faulty", FaultyConfig(fault))
    elsewhere = {"states": ("inference", "backward"), "sum": ("inference", "training")}
    if use in elsewhere.get(fault, ()):
        assert verdict is None
    else:
        assert verdict.startswith(EXPECTED[fault])


@pytest.mark.parametrize("use", cases.USES)
@pytest.mark.parametrize(
    "more",
    [{}, {"layout": "dim", "dtype": "bfloat16"}, {"softplus": False, "z": False}, {"lengths": (5, 0, 60)}],
    ids=str,
)
def test_what_is_right_passes(use, more):
    problem = dataclasses.replace(CASE, **more).used(use)
    for backend in ("chunked", "cpu"):
        for config in OP.backends[backend].configs(problem, describe("cpu")):
            assert GATE(problem, backend, config) is None
    assert GATE(problem, "faulty", FaultyConfig()) is None


def test_the_three_sets_are_what_they_should_be():
    problem = dataclasses.replace(CASE, batch=4, dim=64, length=512).used("training")
    odd, even, extreme = cases.gates(problem)
    assert odd[1].length % 2
    assert extreme[0].make(seed=0)["delta"].abs().max() > 50
    for case, small in (odd, even, extreme):
        assert small.bucket() != problem.bucket()
        assert {k: v for k, v in small.key().items() if k not in ("batch", "dim", "length", "has_last_state")} == {
            k: v for k, v in problem.key().items() if k not in ("batch", "dim", "length", "has_last_state")
        }
        t = case.make(seed=0)
        assert (t["u"].stride() == t["delta"].stride()) == (case.pitch == 0)
        assert t["u"].shape == (small.batch, small.dim, small.length)


def test_sums_may_vary_unless_the_problem_is_deterministic(monkeypatch):
    """A backward whose sums are added up in another order each time, as atomics do."""
    flips = iter(range(10**9))

    def backward(problem, *tensors):
        OP.backends["chunked"].backward(problem, *tensors[:-1], OP.backends["chunked"].configs(problem, None)[0])
        tensors[-2].dA.mul_(1 + 1.2e-7 * (next(flips) % 2))

    monkeypatch.setattr(OP.backends["faulty"], "backward", backward)
    problem = CASE.used("backward")
    assert GATE(problem, "faulty", FaultyConfig()) is None
    verdict = GATE(dataclasses.replace(problem, deterministic=True), "faulty", FaultyConfig())
    assert verdict == "does not repeat: dA of two runs differs, in odd length"


def test_a_fence_keeps_strides_and_alignment_and_sees_every_byte():
    fence = Fence()
    given = torch.randn(3, 4, 10)[:, :, 1:8].transpose(1, 2)
    copy = fence.copy(given, "t")
    assert torch.equal(copy, given)
    assert copy.stride() == given.stride()
    assert copy.data_ptr() % 16 == given.data_ptr() % 16
    made = fence.empty((2, 3), (3, 1), torch.bfloat16, CPU)
    assert made.isnan().all()
    assert fence.broken() is None
    for offset in (-GUARD // 2, -1, 6, 5 + GUARD // 2):
        beside = made.as_strided((1,), (1,), made.storage_offset() + offset)
        before = beside.clone()
        beside.zero_()
        assert "writes outside its memory: 2 bytes" in fence.broken()
        beside.copy_(before)
    copy.as_strided((1,), (1,), copy.storage_offset() + 7).zero_()  # between two of its rows
    assert fence.broken() == "writes to its input t"


# ---- the CUDA kernels, in the emulator and on a GPU ------------------------------------------------------------------

CONFIG = cuda.Config(2, 4, 32)
POSED = dataclasses.replace(CASE, dtype="bfloat16")
EMULATED = Gate(OP, CPU)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("fault", [*CUDA_FAULTS, None])
def test_a_fault_planted_in_the_cuda_source_is_refused_in_the_emulator(fault, monkeypatch, tmp_path):
    EMULATED._verdicts.clear()
    install(monkeypatch, tmp_path, **({"change": planted(fault)} if fault else {}))
    monkeypatch.setitem(OP.__dict__, "backends", OP.backends | {"cuda": cuda})
    verdict = EMULATED(POSED.used("inference", "cuda"), "cuda", CONFIG)
    if fault is None:
        assert verdict is None
        return
    # where strides are mixed up, what comes after a row is overwritten as well
    expected = "writes outside its memory: " if fault in ("bounds", "stride") else "wrong result: out"
    assert verdict.startswith(expected), verdict


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fault", [*CUDA_FAULTS, None])
def test_a_fault_planted_in_the_cuda_source_is_refused_on_a_gpu(fault, monkeypatch):
    real = cuda_module.source
    if fault:
        monkeypatch.setattr(cuda_module, "source", lambda *given: planted(fault)(real(*given)))
    monkeypatch.setitem(OP.__dict__, "backends", OP.backends | {"cuda": cuda})
    cuda._kernel.cache_clear()
    try:
        verdict = Gate(OP, torch.device("cuda"))(POSED.used("inference", "cuda"), "cuda", CONFIG)
    finally:
        cuda._kernel.cache_clear()
    assert (verdict is None) == (fault is None), verdict
