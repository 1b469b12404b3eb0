"""On a GPU: every case on every backend that runs there, and how the op behaves inside CUDA's machinery."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from scan_kernels import check, selective_scan
from scan_kernels.selective_scan import OP, cases
from scan_kernels.selective_scan.backends.cuda import Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.* is not tuned for"),
]
BACKENDS = ("cuda", "triton", "chunked")
SMALL = cases.Case("small", batch=2, dim=40, length=200, dtype="bfloat16")


def arguments(case: cases.Case) -> dict:
    tensors = case.make("cuda")
    return {k: v for k, v in tensors.items() if k not in ("dout", "dlast_state")}


def accept(case: cases.Case, tensors: dict, got: dict) -> None:
    exact, plain = check.judged(OP, tensors)
    for name in got:
        result = got[name].double().cpu().numpy()
        *figures, ok = check.compare(exact[name], plain[name], result, check.FLOORS[case.dtype])
        assert ok, (case.name, name, figures)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [c for c in cases.CASES if {"ci", "gpu"} & set(c.tags)], ids=lambda c: c.name)
def test_case(case, backend):
    rows = check.run_case(OP, case, "cuda", [backend])
    assert rows, f"{backend} did not run"
    failures = [r for r in rows if not r.ok]
    assert not failures, failures


FORWARD, BACKWARD = Config(2, 4, 32), Config(8, 4, 16, 2, groups=2, relay=1)
SPLIT = {
    "forward-split": {
        "forward": Config(4, 4, 32, splits=4, polynomial=4),
        "backward": dataclasses.replace(BACKWARD, splits=3),
    },
    "more-warps-than-groups": {
        "forward": dataclasses.replace(FORWARD, blocks=3),
        "backward": dataclasses.replace(BACKWARD, warps=8, groups=3, splits=4),
    },
    "few-warps": {"forward": Config(16, 1, 16), "backward": dataclasses.replace(BACKWARD, warps=1, groups=8)},
    "wide": {"forward": Config(4, 8, 32, splits=2), "backward": Config(16, 8, 8, splits=2, groups=2, relay=1)},
    "keeps-y": {"forward": dataclasses.replace(FORWARD, keep_y=True), "backward": BACKWARD},
    "keeps-y-and-few-states": {
        "forward": dataclasses.replace(FORWARD, keep_y=True, checkpoint=64, splits=2),
        "backward": dataclasses.replace(BACKWARD, splits=2),
    },
    "keeps-few-states": {"forward": dataclasses.replace(FORWARD, checkpoint=32), "backward": BACKWARD},
    "few-lanes": {"forward": Config(1, 2, 16), "backward": Config(4, 2, 8, splits=2, groups=4, relay=1)},
}


@pytest.mark.parametrize("layout", ["length", "dim"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", SPLIT)
def test_explicit_configurations(name, deterministic, layout):
    case = cases.Case(name, batch=2, dim=40, length=777, dtype="bfloat16", layout=layout, initial_state=True)
    tensors = case.make("cuda")
    accept(case, tensors, cases.candidate(tensors, "cuda", SPLIT[name], deterministic))


RELAYS = {
    "two blocks": Config(4, 8, 16, 2, relay=1),
    "two turns": Config(4, 2, 16, relay=1),
    "groups": Config(8, 15, 16, groups=5, relay=1),
}
ODD = (
    *(cases.Case(f"{n} steps", batch=2, dim=40, length=n, initial_state=True) for n in (1, 15, 16, 17, 100, 1000)),
    cases.Case("packed", dim=40, lengths=(700, 1, 0, 129, 16), initial_state=True),
)


KINDS = (("float32", "length"), ("bfloat16", "length"), ("bfloat16", "dim"), ("float16", "dim"))
BASE = cases.Case("base", batch=2, dim=40, length=333, initial_state=True)
UNUSUAL = [
    *({"state": n, "layout": layout} for n in (3, 5, 64) for layout in ("length", "dim")),
    *({"special": s} for s in ("zero_A", "underflow", "extreme_delta", "nan_u", "inf_delta", "nan_B")),
    {"special": "growing", "length": 130},
    {"length": 5000, "dtype": "bfloat16"},
    {"offset": 1, "dtype": "bfloat16"},
    {"groups": 4, "dtype": "bfloat16", "layout": "dim"},
    {"constant_B": True, "constant_C": True},
    dict.fromkeys(("D", "z", "bias", "softplus"), False),
]


def relay(case: cases.Case, config: Config, training: bool) -> None:
    if case.state > 4 * config.lanes:
        config = dataclasses.replace(config, lanes=case.state // 4, warps=2 * config.groups, blocks=1)
    if training:
        rows = check.run_case(OP, case, "cuda", ["cuda"], {"forward": config})
        assert all(r.ok for r in rows), [r for r in rows if not r.ok]
    else:
        tensors = case.make("cuda", seed=2)
        accept(case, tensors, cases.outcome(tensors, case.used("prefill", "cuda"), "cuda", config))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", RELAYS)
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("case", ODD, ids=lambda c: c.name)
def test_relay_of_any_length(case, kind, name, training):
    relay(dataclasses.replace(case, dtype=kind[0], layout=kind[1]), RELAYS[name], training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["two turns", "groups"])
@pytest.mark.parametrize("fields", UNUSUAL, ids=lambda f: "-".join(map(str, f.values())))
def test_relay_of_an_unusual_problem(fields, name, training):
    relay(dataclasses.replace(BASE, **fields), RELAYS[name], training)


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_gradients_repeat_bitwise(backend):
    case = cases.Case("repeat", batch=3, dim=300, length=500, dtype="bfloat16")
    tensors = case.make("cuda")
    first = cases.candidate(tensors, backend, deterministic=True)
    for _ in range(10):
        again = cases.candidate(tensors, backend, deterministic=True)
        assert all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_on_the_current_stream(backend):
    """The scan waits for a slow producer on its own stream, and for nothing on another."""
    given = arguments(SMALL)
    expected = selective_scan(**given, backend=backend)
    late = torch.empty_like(given["u"]).fill_(torch.nan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(given["u"])
        out = selective_scan(**{**given, "u": late}, backend=backend)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_captured_in_a_cuda_graph(backend):
    tensors = SMALL.make("cuda")
    expected = cases.candidate(tensors, backend, deterministic=True)
    static = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}
    for name in ("u", "delta", "dout"):
        static[name].zero_()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        cases.candidate(static, backend, deterministic=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = cases.candidate(static, backend, deterministic=True)
    for name in ("u", "delta", "dout"):
        static[name].copy_(tensors[name])
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(expected[k], got[k]) for k in expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_device_that_is_not_current(backend):
    assert torch.cuda.current_device() == 0
    tensors = SMALL.make("cuda:1")
    got = cases.candidate(tensors, backend)
    assert all(t.device.index == 1 for t in got.values())
    accept(SMALL, tensors, got)
    assert torch.cuda.current_device() == 0


def test_compiled_equals_eager():
    given = arguments(SMALL)
    given["u"].requires_grad_()
    compiled = torch.compile(lambda kw: selective_scan(**kw), fullgraph=True)
    out, expected = compiled(given), selective_scan(**given)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    (g,) = torch.autograd.grad(out.float().square().sum(), given["u"])
    (h,) = torch.autograd.grad(expected.float().square().sum(), given["u"])
    torch.testing.assert_close(g, h, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("layout", ["length", "dim"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_beyond_2_to_the_31_elements(backend, layout):
    """The last channels of the last row, at offsets past 2^31, equal a small problem of their own."""
    dim, length = 4096, 525_000  # 2.15e9 elements a tensor
    assert dim * length > 2**31
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free device memory")
    small = cases.Case("tail", batch=1, dim=dim, length=length, dtype="bfloat16", state=2, z=False, D=False)
    shape = (1, dim, length) if layout == "length" else (1, length, dim)
    u, delta = (torch.randn(1, device="cuda", dtype=torch.bfloat16).expand(shape).contiguous() for _ in range(2))
    tail = slice(dim - 64, dim)
    for t in (u, delta):
        t[:, tail] = torch.randn_like(t[:, tail]) if layout == "length" else t[:, tail]
    if layout == "dim":
        u, delta = u.transpose(1, 2), delta.transpose(1, 2)
        u[:, tail, :] = torch.randn_like(u[:, tail, :])
    A = -torch.rand(dim, small.state, device="cuda") - 0.5
    B, C = (torch.randn(1, small.state, length, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = selective_scan(u, delta, A, B, C, delta_softplus=True, backend=backend)
    part = selective_scan(
        u[:, tail].clone(), delta[:, tail].clone(), A[tail], B, C, delta_softplus=True, backend=backend
    )
    assert torch.equal(out[:, tail], part) or (out[:, tail] - part).abs().max() < 0.05 * part.abs().max()
    del u, delta, out, part
    torch.cuda.empty_cache()


def test_no_state_tensor_is_ever_made():
    """Peak memory of forward and backward stays far below one (batch, dim, length, state) tensor."""
    case = cases.Case("memory", batch=2, dim=1024, length=4096, dtype="bfloat16")
    tensors = case.make("cuda")
    cases.candidate(tensors, "cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cases.candidate(tensors, "cuda")
    state_tensor = case.batch * case.dim * case.length * case.state * 4
    assert torch.cuda.max_memory_allocated() - before < state_tensor / 4
