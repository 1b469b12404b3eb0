# ruff: noqa: E402 - what needs Triton is imported where it is installed
"""The Triton backend against the float64 reference, and its kernels through Triton's CUDA compiler.

Triton decides at import whether its kernels are compiled or interpreted, so the cases that need no GPU run in one
process of their own, with TRITON_INTERPRET=1. The compile tests need neither a GPU nor a driver.
"""

import dataclasses
import random
import sys

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton_help import compile_for_h100, compiles_without_a_device, interpret, recorder, spilled_bytes

from scan_kernels import reference, trials
from scan_kernels.profiling.device import Device
from scan_kernels.selective_scan import selective_scan
from scan_kernels.selective_scan.backends import triton as backend
from scan_kernels.selective_scan.problem import Cotangents, Gradients, Inputs, Kept, Outputs, Problem

H100 = Device("cuda", 0, "H100", "sm_90", 132, 232448, 50 << 20, 80 << 30)
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of a tensor's largest value
interpreted = pytest.mark.skipif(not backend.INTERPRETED, reason="run by test_cases_in_the_interpreter")

CASES = {
    "plain": {"D": False, "z": False, "bias": False, "softplus": False, "last": False, "state": 16},
    "every flag": {"batch": 2, "initial": True},
    # of a single gradient dB all could cancel, and the error is judged by the largest
    "one step": {"batch": 8, "dim": 16, "state": 1, "length": 1, "initial": True},
    "two steps, constant B and C": {"length": 2, "constant_B": True, "constant_C": True},
    "dim contiguous, groups": {"batch": 2, "layout": "dim", "groups": 2, "dim": 6, "state": 16, "length": 18},
    "40 states": {"dim": 2, "state": 40, "length": 70, "z": False},
    "interval of several tiles, cut in time": {
        "length": 70,
        "config": (2, 8, 1, 3, 2, 2),
        "initial": True,
        "checkpoint": 24,
    },
    "interval that no tile divides": {"length": 23, "config": (2, 4, 1, 2), "constant_B": True, "checkpoint": 6},
    "packed, one empty": {"length": 37, "cu_seqlens": [0, 5, 5, 20, 37], "initial": True, "constant_C": True},
    "packed, deterministic": {
        "dim": 6,
        "groups": 3,
        "layout": "dim",
        "state": 3,
        "length": 20,
        "cu_seqlens": [0, 0, 18, 20],
        "deterministic": True,
    },
    "cut in time, deterministic": {"length": 33, "config": (2, 16, 1, 2), "deterministic": True, "initial": True},
    "cut in time, dim contiguous": {"layout": "dim", "dim": 4, "groups": 2, "config": (2, 16, 1, 2), "last": False},
    "bfloat16": {"dtype": torch.bfloat16, "length": 18},
    "float16": {"dtype": torch.float16, "length": 18, "layout": "dim"},
    "nan": {"batch": 2, "poison": ("u", (0, 1, 4), float("nan"))},
    "infinite rate": {"length": 18, "poison": ("A", (1, 0), float("-inf"))},
    "far below softplus": {"dim": 1, "D": False, "last": False, "length": 18, "poison": ("delta", (0, 0), -40.0)},
    "far above softplus": {"length": 18, "poison": ("delta", (0, 1), 60.0)},
}


def make(
    rng, batch, dim, length, state, groups, dtype, layout, constant_B, constant_C, D, z, bias, softplus, rows, initial
):
    def series():
        x = torch.from_numpy(rng.standard_normal((batch, length, dim) if layout == "dim" else (batch, dim, length)))
        return x.to(dtype).transpose(1, 2) if layout == "dim" else x.to(dtype)

    def normal(*shape):
        return torch.from_numpy(rng.standard_normal(shape)).float()

    delta = series() * 0.5
    tensors = {
        "u": series(),
        "delta": delta if softplus else delta.abs(),
        "A": -torch.exp(normal(dim, state)),
        "B": normal(dim, state) if constant_B else normal(batch, groups, state, length).to(dtype),
        "C": normal(dim, state) if constant_C else normal(batch, groups, state, length).to(dtype),
        "D": normal(dim) if D else None,
        "z": series() if z else None,
        "delta_bias": 0.3 * normal(dim) if bias else None,
        "initial_state": normal(rows, dim, state) if initial else None,
    }
    return {name: t for name, t in tensors.items() if t is not None}


def compare(
    device, batch=1, dim=3, length=17, state=5, groups=1, dtype=torch.float32, layout="length", constant_B=False,
    constant_C=False, D=True, z=True, bias=True, softplus=True, initial=False, last=True, cu_seqlens=None,
    deterministic=False, config=None, checkpoint=0, poison=None,
):  # fmt: skip
    """Outputs and all gradients against the reference, on fresh inputs; memory not written reads NaN."""
    seed = random.SystemRandom().randrange(2**32)
    rng = np.random.default_rng(seed)
    rows = len(cu_seqlens) - 1 if cu_seqlens else batch
    tensors = make(
        rng,
        batch,
        dim,
        length,
        state,
        groups,
        dtype,
        layout,
        constant_B,
        constant_C,
        D,
        z,
        bias,
        softplus,
        rows,
        initial,
    )
    if poison:
        name, at, value = poison
        tensors[name][at] = value
    dout = torch.from_numpy(rng.standard_normal((batch, dim, length))).to(dtype)
    dlast = torch.from_numpy(rng.standard_normal((rows, dim, state))).float() if last else None

    leaves = {name: t.to(device).detach().requires_grad_() for name, t in tensors.items()}
    given = {"cu_seqlens": torch.tensor(cu_seqlens, device=device)} if cu_seqlens else {}
    if config:
        given["config"] = dict.fromkeys(("forward", "backward"), backend.Config(*config))
    default = pytest.MonkeyPatch()
    if checkpoint:
        default.setattr(sys.modules["scan_kernels.selective_scan"], "default_checkpoint", lambda state: checkpoint)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        out, last_state = selective_scan(
            **leaves,
            **given,
            delta_softplus=softplus,
            return_last_state=True,
            backend="triton",
            deterministic=deterministic,
        )
        sources, cotangents = ([out, last_state], [dout, dlast]) if last else ([out], [dout])
        found = torch.autograd.grad(sources, leaves.values(), [c.to(device) for c in cotangents])
    finally:
        torch.use_deterministic_algorithms(False)
        default.undo()

    exact = {name: t.double().numpy() for name, t in tensors.items()}
    more = {"delta_softplus": softplus, "cu_seqlens": cu_seqlens}
    want_out, want_last = reference.selective_scan(**exact, **more)
    wanted = reference.selective_scan_backward(
        dout.double().numpy(), None if dlast is None else dlast.double().numpy(), **exact, **more
    )
    # float32 knows x to |x| 2**-24, so exp(x) to the same share of itself; dA is quadratic in the step size
    rounding = 4 * 2**-24 * abs(poison[2]) if poison and np.isfinite(poison[2]) else 0.0
    pairs = {"out": (out, want_out), "last_state": (last_state, want_last)}
    pairs |= {f"d{name}": (gradient, wanted[name]) for name, gradient in zip(leaves, found, strict=True)}
    for name, (got, want) in pairs.items():
        allowed = (TOLERANCE[dtype] + rounding) * np.abs(want[np.isfinite(want)]).max(initial=0)
        np.testing.assert_allclose(
            got.detach().double().cpu().numpy(), want, rtol=0, atol=allowed, err_msg=f"{name}, seed {seed}"
        )
    return out, last_state, *found


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_interpreted(case):
    compare("cpu", **CASES[case])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_native(case):
    compare("cuda", **CASES[case])


@pytest.mark.skipif(backend.INTERPRETED, reason="this is the interpreter's process")
def test_cases_in_the_interpreter():
    interpret(__file__, len(CASES))


@pytest.mark.skipif(backend.INTERPRETED, reason="the interpreter runs on a CPU")
def test_cpu_is_refused_in_words():
    problem = Problem("forward", 1, 1, 1, 1)
    assert "TRITON_INTERPRET=1" in backend.supports(problem)
    assert backend.supports(Problem("forward", 1, 1, 1, 1, device="cuda")) is None


# ---- compiled without a device --------------------------------------------------------------------------------------


def on_no_device(p):
    """What a backend is given for a problem: tensors without memory."""
    dtype = getattr(torch, p.dtype)

    def f32(*shape, when=True):
        return torch.empty(shape, device="meta") if when else None

    def series(when=True):
        x = torch.empty((p.batch, p.dim, p.length), dtype=dtype, device="meta")
        if not when:
            return None
        return x if p.layout == "length" else x.transpose(1, 2).contiguous().transpose(1, 2)

    def projection(constant):
        shape = (p.batch, p.groups, p.state, p.length)
        return f32(p.dim, p.state) if constant else torch.empty(shape, dtype=dtype, device="meta")

    inputs = Inputs(
        series(), series(), f32(p.dim, p.state), projection(p.constant_B), projection(p.constant_C),
        f32(p.dim, when=p.has_D), series(p.has_z), f32(p.dim, when=p.has_bias),
        f32(p.rows, p.dim, p.state, when=p.has_initial_state),
        torch.empty(p.sequences + 1, dtype=torch.int32, device="meta") if p.sequences else None,
    )  # fmt: skip
    last = f32(p.rows, p.dim, p.state, when=p.has_last_state)
    states = f32(p.checkpoints, p.dim, p.state, when=p.checkpoint > 0)
    if p.direction == "forward":
        return inputs, Outputs(series(), last, states)
    like = [None if t is None else torch.empty(t.shape, device="meta") for t in inputs[:9]]
    gradients = Gradients(series(), series(), *like[2:6], series(p.has_z), *like[7:])
    return inputs, Kept(states), Cotangents(series(), last), gradients


def launches(problem, config):
    """What a run of the problem launches."""
    recorded = []
    getattr(backend, problem.direction)(problem, *on_no_device(problem), config, recorder(recorded))
    return recorded


FULL = dict.fromkeys(("has_D", "has_z", "has_bias", "softplus", "has_last_state", "has_initial_state"), True)
COMPILED = {
    "mamba": Problem("forward", 8, 5120, 2048, 16, dtype="bfloat16", checkpoint=16, device="cuda", **FULL),
    "wide, cut in time": Problem("forward", 1, 64, 8192, 256, dtype="float32", checkpoint=64, device="cuda", **FULL),
    "packed": Problem(
        "forward", 1, 1536, 4099, 40, dtype="float16", groups=3, layout="dim", checkpoint=64, device="cuda",
        sequences=7, constant_B=True, deterministic=True, **FULL,
    ),
}  # fmt: skip


@pytest.mark.skipif(backend.INTERPRETED, reason="kernels are interpreted, not compiled")
@compiles_without_a_device
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_for_cuda_and_hardly_spills(name, direction, tmp_path):
    problem = dataclasses.replace(COMPILED[name], direction=direction)
    config = backend.configs(problem, H100)[0]
    recorded = launches(problem, config)
    assert len(recorded) == (3 if config.splits > 1 else 1)
    for kernel, arguments, options in recorded:
        spilled = spilled_bytes(compile_for_h100(kernel, arguments, options), tmp_path)
        assert spilled <= (384 if kernel.__name__ == "backward_kernel" else 128), f"{kernel.__name__}: {spilled} bytes"


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", COMPILED)
def test_preparing_compiles_what_a_call_launches_and_launches_nothing(name, direction, monkeypatch):
    problem = dataclasses.replace(COMPILED[name], direction=direction)
    config = backend.configs(problem, H100)[0]
    compiled = []
    monkeypatch.setattr(backend, "_compile", recorder(compiled))
    # on no device, a launch would raise
    getattr(backend, f"prepare_{direction}")(problem, *on_no_device(problem), config)

    def without_tensors(recorded):
        return [(k, {n: v for n, v in a.items() if not torch.is_tensor(v)}, options) for k, a, options in recorded]

    assert without_tensors(compiled) == without_tensors(launches(problem, config))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", COMPILED)
def test_a_tuning_compiles_ahead_what_its_trial_launches(name, direction, monkeypatch):
    """Triton compiles a kernel again for sizes that 16 divides or that are 1: those of fewer channels would not do."""
    problem = dataclasses.replace(COMPILED[name], direction=direction)
    config = backend.configs(problem, H100)[0]
    compiled = []
    monkeypatch.setattr(backend, "_compile", recorder(compiled))
    monkeypatch.setattr(backend, "supports", lambda problem: None)
    trials.Bench("selective_scan", "cpu").compile(problem.key(), "triton", dataclasses.asdict(config), part=-1)

    def specialised(recorded):
        def of(value):
            return (value.dtype, value.data_ptr() % 16) if torch.is_tensor(value) else value

        return [(k, {n: of(v) for n, v in arguments.items()}, options) for k, arguments, options in recorded]

    assert specialised(compiled) == specialised(launches(problem, config))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("state", [1, 7, 16, 64, 256])
def test_configs_are_valid_and_the_first_fills_an_h100(direction, state):
    problem = Problem(direction, 8, 5120, 2048, state, checkpoint=16, dtype="bfloat16", device="cuda")
    found = backend.configs(problem, H100)
    assert 1 < len(found) <= 16
    assert len(set(found)) == len(found)
    for c in found:
        assert all(v & (v - 1) == 0 and v > 0 for v in (c.block_dim, c.block_time, c.num_warps))
        # all steps of a state in one thread: lanes and warps are taken up by channels and states
        assert c.block_dim * triton.next_power_of_2(state) >= 32 * c.num_warps
    first = found[0]
    programs = 8 * 5120 // first.block_dim * first.splits
    assert programs * first.num_warps >= 132 * 4
