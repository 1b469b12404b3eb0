# ruff: noqa: E402 - what needs Triton is imported where it is installed
"""The Mamba block's Triton kernels against its plain functions in float64; see test_triton_backend for the two ways."""

import sys

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton_help import compile_for_h100, compiles_without_a_device, interpret, recorder, spilled_bytes

from scan_kernels import Mamba
from scan_kernels.mamba import plain, short
from scan_kernels.mamba import triton as launching

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of a tensor's largest value
CONVOLUTIONS = {
    "one step": {"length": 1, "batch": 2},
    "two steps, two taps": {"length": 2, "width": 2},
    "three steps, no activation": {"length": 3, "width": 3, "silu": False},
    "no bias, ragged channels": {"length": 9, "dim": 130, "bias": False},
    "bfloat16": {"length": 21, "dtype": torch.bfloat16},
    "bfloat16, weights in float32": {"length": 6, "dtype": torch.bfloat16, "weights": torch.float32},
    "float16, length-contiguous": {"length": 6, "dtype": torch.float16, "layout": "length"},
    "one tap": {"length": 6, "width": 1},
    "eight taps": {"length": 10, "width": 8},
    "initial state": {"length": 18, "initial": True},
    "initial state, one step": {"length": 1, "initial": True, "width": 3},
    "packed, some short or empty": {"length": 11, "offsets": [0, 1, 1, 3, 11], "initial": True},
    "packed, from nothing": {"length": 12, "offsets": [0, 7, 12], "dtype": torch.bfloat16},
    "several pieces": {"length": 19, "batch": 2, "width": 2, "span": 8},
    "several pieces, initial state": {"length": 18, "initial": True, "span": 8},
    "no steps": {"length": 0, "initial": True},
}
LONG = {  # what the interpreter would take minutes for
    "long": {"length": 1000, "batch": 3, "dim": 300},
    "long, in bfloat16, from a state": {
        "length": 1030,
        "batch": 2,
        "dim": 264,
        "dtype": torch.bfloat16,
        "initial": True,
    },
    "long and packed": {"length": 700, "dim": 256, "offsets": [0, 2, 300, 700], "span": 64},
}
UPDATES = {
    "bare": {"D": False, "z": False, "bias": False, "softplus": False},
    "all": {},
    "one state": {"state": 1, "dim": 130},
    "7 states, bfloat16": {"state": 7, "dtype": torch.bfloat16},
    "64 states, float16": {"state": 64, "dtype": torch.float16},
    "256 states": {"state": 256, "z": False},
    "state as a view": {"view": True},
    "far from softplus's bend": {"delta": 40.0},
}


@pytest.fixture(autouse=True)
def fresh_random_numbers():
    print(f"torch.manual_seed({torch.seed()})")


def watch(monkeypatch):
    """The names of what is launched, as it happens."""
    launched = []
    for name in ("convolve", "convolve_backward", "update"):
        launch = getattr(launching, name)
        monkeypatch.setattr(launching, name, lambda *a, n=name, launch=launch: launched.append(n) or launch(*a))
    return launched


def agree(found, wanted, dtype):
    for name, want in wanted.items():
        got = found[name].detach().double().cpu()
        assert got.shape == want.shape, name
        allowed = TOLERANCE[dtype] * want.abs().max().item() if want.numel() else 0.0
        torch.testing.assert_close(got, want.detach(), rtol=0, atol=allowed, msg=lambda m, name=name: f"{name}: {m}")


def convolve(
    device, monkeypatch, length, batch=1, dim=40, width=4, dtype=torch.float32, weights=None, bias=True, silu=True,
    initial=False, offsets=None, layout="dim", span=256,
):  # fmt: skip
    monkeypatch.setattr(launching, "TILES", {k: t._replace(span=span) for k, t in launching.TILES.items()})
    monkeypatch.setattr(launching, "ENOUGH", 1)  # or every tile would be a program of its own
    rows = len(offsets) - 1 if offsets else batch
    projection = torch.randn(batch, length, 2 * dim).to(dtype)  # of which x is one half, as it lies in the block
    x = projection[..., dim:].transpose(1, 2)
    tensors = {
        "x": x.contiguous() if layout == "length" else x,
        "weight": torch.randn(dim, width).to(weights or dtype),
        "bias": torch.randn(dim).to(weights or dtype) if bias else None,
        "initial_state": torch.randn(rows, dim, width - 1).to(dtype) if initial else None,
    }
    tensors = {name: t for name, t in tensors.items() if t is not None}
    cotangents = torch.randn(batch, dim, length).to(dtype), torch.randn(rows, dim, width - 1).to(dtype)
    given = {"activation": "silu" if silu else None, "return_last_state": True}

    def run(leaves, device):
        more = {"cu_seqlens": torch.tensor(offsets, device=device)} if offsets else {}
        out, last = short.causal_conv1d(**leaves, **given, **more)
        sources = [t for t in (out, last) if t.requires_grad]
        along = [c.to(device, t.dtype) for c, t in zip(cotangents, (out, last), strict=True) if t.requires_grad]
        gradients = torch.autograd.grad(sources, leaves.values(), along)
        return {"out": out, "last": last} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}

    launched = watch(monkeypatch)
    leaves = {name: t.to(device).detach().requires_grad_() for name, t in tensors.items()}
    found = run(leaves, device)
    wanted = run({name: t.double().requires_grad_() for name, t in tensors.items()}, "cpu")  # no kernel takes float64
    agree(found, wanted, dtype)
    assert found["out"].dtype == dtype
    assert found["out"].numel() == 0 or found["out"].stride(1) == 1
    assert all(found[f"d{name}"].dtype == t.dtype for name, t in leaves.items())
    assert launched == ["convolve", "convolve_backward"]


def update(
    device, monkeypatch, batch=3, dim=40, state=16, dtype=torch.float32, D=True, z=True, bias=True, softplus=True,
    view=False, delta=1.0,
):  # fmt: skip
    h = torch.randn(batch, dim, state)
    u, gate = torch.randn(batch, 2 * dim).to(dtype).chunk(2, 1)
    B, C = torch.randn(batch, 2 * state + 3).to(dtype)[:, 3:].chunk(2, 1)
    step = (delta * torch.randn(batch, dim)).to(dtype)
    step = step if softplus else step.abs()
    arguments = [u, step, -torch.rand(dim, state), B, C, torch.randn(dim) if D else None, gate if z else None,
                 torch.randn(dim) if bias else None]  # fmt: skip
    on_device = h.to(device, copy=True)
    if view:
        on_device = on_device.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    launched = watch(monkeypatch)
    given = [t if t is None else t.to(device) for t in arguments]
    out = short.selective_state_update(on_device, *given, delta_softplus=softplus)
    assert launched == ["update"]
    assert out.dtype == dtype
    h = h.double()
    want = plain.update(h, *[t if t is None else t.double() for t in arguments], softplus)  # in float32 but for sums
    agree({"out": out}, {"out": want.double()}, dtype)
    agree({"state": on_device}, {"state": h}, torch.float32)


def run(kind, case, device, monkeypatch):
    if kind == "convolution":
        convolve(device, monkeypatch, **(CONVOLUTIONS | LONG)[case])
    else:
        update(device, monkeypatch, **UPDATES[case])


ALL = [("convolution", case) for case in CONVOLUTIONS] + [("update", case) for case in UPDATES]
interpreted = pytest.mark.skipif(not launching.INTERPRETED, reason="run by test_cases_in_the_interpreter")
compiled = pytest.mark.skipif(launching.INTERPRETED, reason="this is the interpreter's process")


@interpreted
@pytest.mark.parametrize(("kind", "case"), ALL)
def test_interpreted(kind, case, monkeypatch):
    run(kind, case, "cpu", monkeypatch)


@interpreted
def test_interpreted_block_compiled_whole():
    """torch.compile meets the registered ops, and a second derivative is refused in words."""
    mamba, x = Mamba(8), torch.randn(1, 3, 8, requires_grad=True)
    out = torch.compile(mamba, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(out, mamba(x), rtol=1e-5, atol=1e-5)
    (dx,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(mamba(x).sum(), x)[0], rtol=1e-4, atol=1e-5)
    u = x.transpose(1, 2)
    (dx,) = torch.autograd.grad(short.causal_conv1d(u, torch.randn(8, 4)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("kind", "case"), [*ALL, *(("convolution", case) for case in LONG)])
def test_native(kind, case, monkeypatch):
    run(kind, case, "cuda", monkeypatch)


@compiled
def test_cases_in_the_interpreter():
    interpret(__file__, len(ALL) + 1)


def test_a_gpu_without_triton_has_the_plain_functions(monkeypatch):
    assert short._look("cuda")
    monkeypatch.delitem(sys.modules, "scan_kernels.mamba.triton")
    monkeypatch.delattr("scan_kernels.mamba.triton")
    monkeypatch.setitem(sys.modules, "triton", None)  # what cannot be imported
    assert not short._look("cuda")
    assert not short._look("xpu")


@compiled
def test_what_no_kernel_takes_is_plain(monkeypatch):
    x = torch.empty(1)
    assert not short._fused(x)
    monkeypatch.setitem(short._FOUND, "cpu", True)
    assert short._fused(x, None, x.bfloat16())
    assert not short._fused(x, x.double())


# ---- compiled without a device --------------------------------------------------------------------------------------


@compiled
@compiles_without_a_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_for_cuda_without_spills(dtype, tmp_path):
    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    recorded = []
    launch = recorder(recorded)
    x, dout = meta(4, 2048, 10240)[..., :5120], meta(4, 2048, 5120)
    launching.convolve(x, meta(5120, 4), meta(5120), 3, True, launch)
    launching.convolve_backward(dout, x, meta(5120, 4), meta(5120), 3, True, launch)
    f32 = {"dtype": torch.float32}
    launching.update(
        meta(64, 5120, 16, **f32), meta(64, 5120), meta(64, 5120), meta(5120, 16, **f32), meta(64, 16), meta(64, 16),
        meta(5120, **f32), meta(64, 5120), meta(5120), True, launch,
    )  # fmt: skip
    assert len(recorded) == 3
    for kernel, arguments, options in recorded:
        assert spilled_bytes(compile_for_h100(kernel, arguments, options), tmp_path) == 0, kernel.__name__
