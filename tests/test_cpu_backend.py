"""The Numba backend against the float64 reference, through the public function."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from scan_kernels import reference, selective_scan
from scan_kernels.selective_scan.backends.cpu import Config

# Of a tensor's norm. Loose enough for a one-element gradient whose terms happen to cancel; the gate (check.py) judges
# accuracy, these tests look for what is wrong outright.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 7e-4}


@pytest.fixture(autouse=True)
def fresh_seed():
    print(f"torch.manual_seed({torch.seed()})")  # shown if the test fails


def make(batch, dim, length, state, *, groups=1, dtype=torch.float32, layout="length", constant=(), without=(),
         softplus=True, cu_seqlens=None):  # fmt: skip
    """Fresh random arguments of selective_scan, all of them unless named in ``without``."""

    def projection(name):
        if name in constant:
            return torch.randn(dim, state)
        if layout == "dim":
            return torch.randn(batch, groups, length, state).to(dtype).transpose(2, 3)
        return torch.randn(batch, groups, state, length).to(dtype)

    def element(positive=False):
        t = torch.randn(batch, length, dim) if layout == "dim" else torch.randn(batch, dim, length)
        t = (t.abs() if positive else t).to(dtype)
        return t.transpose(1, 2) if layout == "dim" else t

    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    arguments = {
        "u": element(),
        "delta": element(positive=not softplus),
        "A": -0.1 - 4 * torch.rand(dim, state),
        "B": projection("B"),
        "C": projection("C"),
        "D": torch.randn(dim),
        "z": element(),
        "delta_bias": torch.rand(dim),
        "initial_state": torch.randn(rows, dim, state),
    }
    arguments = {name: t for name, t in arguments.items() if name not in without}
    flags = {"delta_softplus": softplus, "cu_seqlens": None if cu_seqlens is None else torch.tensor(cu_seqlens)}
    return arguments, flags


def run(arguments, flags, dout=None, dlast=None, **options):
    """(out, last_state, gradients by name, dout, dlast) of the CPU backend."""
    leaves = {name: t.detach().requires_grad_() for name, t in arguments.items()}
    out, last = selective_scan(**leaves, **flags, return_last_state=True, backend="cpu", **options)
    dout = torch.randn_like(out) if dout is None else dout
    dlast = torch.randn_like(last) if dlast is None else dlast
    gradients = torch.autograd.grad((out, last), list(leaves.values()), (dout, dlast))
    return out.detach(), last.detach(), dict(zip(leaves, gradients, strict=True)), dout, dlast


def error(got, want):
    want = torch.as_tensor(want)
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def compare(arguments, flags, tolerance, **options):
    out, last, gradients, dout, dlast = run(arguments, flags, **options)
    exact = {name: t.double().numpy() for name, t in arguments.items()}
    flags = {name: f.numpy() if isinstance(f, torch.Tensor) else f for name, f in flags.items()}
    want_out, want_last = reference.selective_scan(**exact, **flags)
    want = reference.selective_scan_backward(dout.double().numpy(), dlast.double().numpy(), **exact, **flags)
    errors = {"out": error(out, want_out), "last_state": error(last, want_last)}
    errors |= {"d" + name: error(g, want[name]) for name, g in gradients.items()}
    assert out.stride() == arguments["u"].stride() or arguments["u"].numel() == 1
    assert all(e < tolerance for e in errors.values()), errors


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 40, 131, 16), {"groups": 2}),
        ((1, 17, 1, 1), {}),
        ((3, 5, 2, 5), {"without": ("D", "z", "delta_bias", "initial_state"), "softplus": False}),
        ((1, 16, 17, 40), {"without": ("z",)}),
        ((1, 130, 131, 40), {"without": ("D",)}),
        ((2, 12, 17, 5), {"groups": 12, "without": ("delta_bias",)}),
        ((2, 20, 131, 16), {"constant": ("B",)}),
        ((1, 20, 70, 5), {"constant": ("C",), "without": ("initial_state",)}),
        ((2, 33, 131, 16), {"constant": ("B", "C")}),
        ((2, 40, 131, 16), {"layout": "dim"}),
        ((1, 36, 100, 16), {"cu_seqlens": [0, 17, 17, 18, 100], "groups": 2}),
        ((1, 16, 9, 3), {"cu_seqlens": [0, 0, 9, 9], "without": ("initial_state",)}),
    ],
)
def test_against_reference(shape, options):
    compare(*make(*shape, **options), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["length", "dim"])
def test_half_precision(dtype, layout):
    compare(*make(2, 40, 67, 16, groups=2, dtype=dtype, layout=layout), TOLERANCE[dtype])


# tiles shorter than the distance of kept states, equal, longer, and no multiple of it
@pytest.mark.parametrize("config", [Config(1, 16), Config(2, 64), Config(8, 40), Config(3, 128)])
@pytest.mark.parametrize("state", [7, 40])
def test_every_tiling(config, state):
    compare(*make(2, 70, 150, state), TOLERANCE[torch.float32], config={"forward": config, "backward": config})


def test_strided_views():
    arguments, flags = make(2, 20, 50, 16)
    for name in ("u", "delta", "z"):
        arguments[name] = torch.randn(2, 23, 61)[:, 2:22, 5:55]  # misaligned, with gaps
    out, last = selective_scan(**arguments, **flags, return_last_state=True, backend="cpu")
    exact = {name: t.double().numpy() for name, t in arguments.items()}
    want_out, want_last = reference.selective_scan(**exact, delta_softplus=True)
    assert error(out, want_out) < 1e-6
    assert error(last, want_last) < 1e-6


def test_bitwise_repeatable_on_any_number_of_threads():
    arguments, flags = make(3, 100, 90, 16)
    out, last, gradients, dout, dlast = run(arguments, flags)
    threads = torch.get_num_threads()
    try:
        for n in (threads, 1, 2):
            torch.set_num_threads(n)
            again = run(arguments, flags, dout, dlast)
            assert torch.equal(out, again[0])
            assert torch.equal(last, again[1])
            for name, g in gradients.items():
                assert torch.equal(g, again[2][name]), name
    finally:
        torch.set_num_threads(threads)


def test_calls_from_several_threads():
    """In a process of its own: the failure would be an abort."""
    code = textwrap.dedent("""
        from concurrent.futures import ThreadPoolExecutor
        import torch
        from scan_kernels import selective_scan

        u, A, B = torch.randn(2, 70, 90), -torch.rand(70, 4), torch.randn(2, 4, 90)
        want = selective_scan(u, u.abs(), A, B, B, backend="cpu")
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(lambda _: selective_scan(u, u.abs(), A, B, B, backend="cpu"), range(200)):
                assert torch.equal(got, want)
    """)
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_input_reaches_only_what_depends_on_it(bad):
    arguments, flags = make(2, 20, 60, 5)
    clean, clean_last, clean_gradients, dout, dlast = run(arguments, flags)
    arguments["u"][1, 7, 30] = bad
    out, last, gradients, _, _ = run(arguments, flags, dout, dlast)
    assert not torch.isfinite(out[1, 7, 30:]).any()
    assert not torch.isfinite(last[1, 7]).any()
    depends = torch.zeros(2, 20, 60, dtype=torch.bool)
    depends[1, 7, 30:] = True
    assert torch.equal(out[~depends], clean[~depends])
    others = torch.arange(20) != 7
    assert torch.equal(last[0], clean_last[0])
    assert torch.equal(last[1, others], clean_last[1, others])
    for name in ("u", "delta", "z"):
        assert torch.equal(gradients[name][0], clean_gradients[name][0]), name
        assert torch.equal(gradients[name][1, others], clean_gradients[name][1, others]), name
    assert torch.equal(gradients["A"][others], clean_gradients["A"][others])
    assert torch.equal(gradients["B"][0], clean_gradients["B"][0])


def test_nan_in_decay_survives_whatever_its_bits():
    arguments, flags = make(1, 20, 40, 5, without=("z", "D"))
    arguments["A"][3, 2] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # all bits set
    out, last, _, _, _ = run(arguments, flags)
    assert torch.isnan(out[0, 3]).all()
    assert torch.isnan(last[0, 3, 2])
    assert torch.isfinite(out[0, torch.arange(20) != 3]).all()


def test_extreme_steps_and_decays():
    """Relative accuracy far down softplus, decay that underflows to 0, no decay at all, growth to Inf."""
    arguments, flags = make(1, 16, 8, 4, without=("D", "z", "delta_bias", "initial_state"))
    arguments["delta"][:] = torch.tensor([-80.0, -20.0, -5.0, 0.0, 5.0, 19.0, 21.0, 60.0])
    arguments["A"][:] = torch.tensor([0.0, -1e-3, -3.0, -1e4])
    out, last = selective_scan(**arguments, **flags, return_last_state=True, backend="cpu")
    exact = {name: t.double().numpy() for name, t in arguments.items()}
    want, want_last = reference.selective_scan(**exact, delta_softplus=True)
    scale = np.abs(exact["C"][:, 0]).max(1)[:, None] * np.abs(np.cumsum(exact["u"], -1)).max() + np.abs(want)
    assert np.all(np.abs(out.numpy() - want) <= 2e-6 * scale * np.logaddexp(0, exact["delta"]).cumsum(-1))
    assert error(last, want_last) < 2e-6
    assert abs(out[0, :, 0].double().numpy() / want[0, :, 0] - 1).max() < 2e-6  # alone at a step size of e^-80
    arguments["A"][:] = 50.0
    last = selective_scan(**arguments, **flags, return_last_state=True, backend="cpu")[1]
    assert torch.isinf(last).all()


def test_compiled_variants_have_names_of_their_own():
    """Else code that two processes have cached may mix them up."""
    from numba.core.dispatcher import Dispatcher

    from scan_kernels.selective_scan.backends import cpu_kernels, cpu_simd

    compiled = {f for m in (cpu_kernels, cpu_simd) for f in vars(m).values() if isinstance(f, Dispatcher)}
    assert len(compiled) > 20
    assert len({f.py_func.__qualname__ for f in compiled}) == len(compiled)


def test_cached_code_of_another_text_is_never_found(tmp_path):
    """Numba looks at the date of a cached function's own file only, not at the files of what it calls."""
    from scan_kernels.selective_scan.backends import cpu_kernels, cpu_simd

    for name in ("cpu_kernels.py", "cpu_simd.py"):
        source = Path(cpu_simd.__file__).with_name(name)
        (tmp_path / name).write_bytes(source.read_bytes())
    assert cpu_simd.text_hash(tmp_path) == cpu_simd.SOURCES
    with (tmp_path / "cpu_simd.py").open("a") as f:
        f.write("#")
    assert cpu_simd.text_hash(tmp_path) != cpu_simd.SOURCES
    for kernel in (cpu_kernels.forward, cpu_kernels.backward, cpu_kernels.add_up):
        assert cpu_simd.SOURCES in Path(kernel._cache._cache_file._index_path).name


def test_import_stays_light():
    code = (
        "import sys, scan_kernels; from scan_kernels.selective_scan.backends import cpu; print('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names an x86 instruction set")
def test_math_without_avx512():
    """The portable exponential, which a machine with AVX-512 would never run, on a lesser instruction set."""
    code = textwrap.dedent("""
        import numpy as np
        from numba import njit
        from scan_kernels.selective_scan.backends import cpu_simd
        from scan_kernels.selective_scan.backends.cpu_simd import decay, exp, load, softplus, splat, store

        assert not cpu_simd.AVX512

        @njit
        def run(n, x, y):
            for i in range(0, 64 * n, 64):
                v = load(x + i)
                store(y + i, decay(v, splat(1.0)))
                store(y + 64 * n + i, exp(v))
                store(y + 128 * n + i, softplus(v))

        n = 1000
        memory = np.zeros(4 * 16 * n + 16, np.float32)
        first = -memory.ctypes.data % 64 // 4
        x, y = memory[first:][:16 * n], memory[first + 16 * n:][:48 * n].reshape(3, -1)
        x[:] = np.random.default_rng().uniform(-87, 88, 16 * n)
        x[:5] = -np.inf, np.inf, np.nan, 0, -1e30
        run(n, x.ctypes.data, y.ctypes.data)
        with np.errstate(all="ignore"):
            want = np.array([np.exp2(np.float64(x)), np.exp(np.float64(x)), np.logaddexp(0, np.float64(x))])
        np.testing.assert_allclose(y, want, rtol=4e-7, atol=1e-44)
    """)
    lesser = {"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}
    subprocess.run([sys.executable, "-c", code], env=os.environ | lesser, check=True)
