"""The public function: registration with torch, layouts, errors, edge sizes, gradients of every argument.

What the backends compute is judged by the gate (test_check.py) and by the properties (test_properties.py); here the
portable backend stands in for all of them, since everything around the kernels is the same.
"""

import functools
import itertools
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from scan_kernels import BackendUnavailable, fastest, reference, selective_scan, selective_scan_fn
from scan_kernels.op import decode_choice, encode_choice
from scan_kernels.selective_scan import OP, _scan, _scan_backward
from scan_kernels.selective_scan.backends import chunked
from scan_kernels.selective_scan.problem import Problem

TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
scan = functools.partial(selective_scan, backend="chunked")


@pytest.fixture(autouse=True)
def fresh_random_numbers():
    """Other numbers in every run; a failing test's captured output says how to repeat them."""
    print(f"torch.manual_seed({torch.seed()})")


@pytest.fixture
def replace(monkeypatch):
    """replace(backend, name=function): put functions in place of a backend's, for one test."""

    def put(backend, **functions):
        module = types.ModuleType(backend)
        vars(module).update({**vars(OP.backends[backend]), **functions})
        monkeypatch.setitem(OP.backends, backend, module)
        OP.forget()

    yield put
    OP.forget()


def arguments(
    batch=2, dim=4, length=20, state=3, groups=2, layout="length", dtype=torch.float32, optional=True, cu_seqlens=None,
    constant=False, requires_grad=False,
):  # fmt: skip
    """Arguments of selective_scan by name."""
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1

    def sequence():
        t = torch.randn(batch, dim, length) if layout == "length" else torch.randn(batch, length, dim).transpose(1, 2)
        return t.to(dtype)

    def projection():
        return torch.randn(dim, state) if constant else torch.randn(batch, groups, state, length).to(dtype)

    given = {
        "u": sequence(), "delta": sequence(), "A": -2 * torch.rand(dim, state), "B": projection(), "C": projection(),
        "D": torch.randn(dim), "z": sequence(), "delta_bias": torch.randn(dim),
        "initial_state": torch.randn(rows, dim, state),
    }  # fmt: skip
    if not optional:
        given = dict(itertools.islice(given.items(), 5))
    given = {k: v.requires_grad_(requires_grad) for k, v in given.items()}
    return given | {"delta_softplus": True, "cu_seqlens": cu_seqlens}


def problem(**changes):
    return Problem(**{"direction": "forward", "batch": 2, "dim": 4, "length": 20, "state": 3, **changes})


def expected(a, dout=None, dlast=None):
    """The reference's (out, last_state), or with dout its gradients by name."""
    n = {k: v.detach().double().numpy() if k in TENSORS and v is not None else v for k, v in a.items()}
    if dout is None:
        return reference.selective_scan(**n)
    dlast = None if dlast is None else dlast.double().numpy()
    return reference.selective_scan_backward(dout.double().numpy(), dlast, **n)


def close(got, exact, tolerance=2e-5):
    exact = np.asarray(exact)
    assert got.shape == exact.shape
    scale = np.abs(exact).max(initial=0.1)  # a sum of many terms may cancel
    np.testing.assert_allclose(got.detach().double().numpy() / scale, exact / scale, rtol=0, atol=tolerance)


# ---- registration with torch ----------------------------------------------------------------------------------------

FORMS = {
    "bare": {"optional": False},
    "full": {},
    "dim-contiguous": {"layout": "dim"},
    "bare, dim-contiguous, bf16": {"optional": False, "layout": "dim", "dtype": torch.bfloat16},
    "constant B and C": {"constant": True},
    "packed": {"batch": 1, "cu_seqlens": torch.tensor([0, 7, 7, 20])},
    "packed, dim-contiguous": {"batch": 1, "layout": "dim", "cu_seqlens": torch.tensor([0, 20], dtype=torch.int32)},
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
CHOICE = encode_choice("chunked", None, None)


def flat(a):
    return [*(a.get(name) for name in TENSORS), a["cu_seqlens"]]


@forms
@pytest.mark.parametrize("last_state", [False, True])
def test_opcheck_forward(form, last_state):
    sample = (*flat(arguments(**form, requires_grad=True)), True, last_state, 16, False, False, CHOICE)
    torch.library.opcheck(_scan, sample)


@forms
@pytest.mark.parametrize("given", ["dout", "dlast_state", "both"])
def test_opcheck_backward(form, given):
    tensors = flat(arguments(**form))
    out, last, states, _y = _scan(*tensors, True, True, 16, False, False, CHOICE)
    dout = None if given == "dlast_state" else torch.randn_like(out)
    dlast = None if given == "dout" else torch.randn_like(last)
    torch.library.opcheck(_scan_backward, (dout, dlast, states, None, *tensors, True, 16, False, False, CHOICE))


def compiler_backends():
    return ["aot_eager", "inductor"] if shutil.which("g++") or shutil.which("clang++") else ["aot_eager"]


@pytest.mark.parametrize("compiler", compiler_backends())
def test_compiled_equals_eager(compiler):
    torch.compiler.reset()

    def layer(a):
        out, last = scan(**a, return_last_state=True)
        return out * 2, last

    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    for length in (20, 33, 50):  # a second length, and one that the dynamic graph of the second must serve
        a = arguments(length=length, requires_grad=True)
        leaves = [a[name] for name in TENSORS]
        eager, got = layer(a), compiled(a)
        cotangents = [torch.randn_like(t) for t in eager]
        for x, y in zip(got, eager, strict=True):
            torch.testing.assert_close(x, y)
        eager_gradients, gradients = (torch.autograd.grad(pair, leaves, cotangents) for pair in (eager, got))
        for name, x, y in zip(TENSORS, gradients, eager_gradients, strict=True):
            torch.testing.assert_close(x, y, msg=name)


def test_compiled_packed_with_a_configuration(replace):
    torch.compiler.reset()
    seen = []
    replace("chunked", forward=lambda *args: [seen.append(args[-1]), chunked.forward(*args)])

    def function(**a):
        return selective_scan(**a, config=chunked.Config(5))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for cu in ([0, 7, 7, 20], [0, 1, 19, 20]):
        a = arguments(batch=1, layout="dim", cu_seqlens=torch.tensor(cu))
        torch.testing.assert_close(compiled(**a), function(**a))
    assert set(seen) == {chunked.Config(5)}


def test_autocast():
    a = arguments(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, last = scan(**a, return_last_state=True)
    assert out.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    low = {k: a[k].detach().bfloat16() for k in ("u", "delta", "B", "C", "z")}
    torch.testing.assert_close(out, scan(**(a | low)), rtol=0, atol=0)
    out.float().sum().backward()
    for name in TENSORS:
        assert a[name].grad.dtype == torch.float32, name
    with torch.autocast("cpu", torch.bfloat16):
        constant = arguments(constant=True)
        assert scan(**constant).dtype == torch.bfloat16


def test_meta_tensors_have_the_right_shapes():
    a = {k: v.to("meta") if k in TENSORS else v for k, v in arguments(layout="dim").items()}
    out, last = selective_scan(**a, return_last_state=True)
    assert out.shape == a["u"].shape
    assert out.stride() == a["u"].stride()
    assert last.shape == (2, 4, 3)


# ---- layouts --------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "length": lambda b, d, n: torch.randn(b, d, n),
    "dim": lambda b, d, n: torch.randn(b, n, d).transpose(1, 2),
    "batch innermost": lambda b, d, n: torch.randn(d, n, b).permute(2, 0, 1),
    "length outermost": lambda b, d, n: torch.randn(n, b, d).permute(1, 2, 0),
    "every second step": lambda b, d, n: torch.randn(b, d, 2 * n)[:, :, ::2],
    "slice of channels": lambda b, d, n: torch.randn(b, 2 * d, n)[:, d:],
    "slice of dim-contiguous channels": lambda b, d, n: torch.randn(b, n, 2 * d)[:, :, d:].transpose(1, 2),
    "odd offset": lambda b, d, n: torch.randn(b * d * n + 3)[3:].view(b, d, n),
    "expanded batch": lambda b, d, n: torch.randn(1, d, n).expand(b, d, n),
    "expanded batch, dim": lambda b, d, n: torch.randn(1, n, d).transpose(1, 2).expand(b, d, n),
    "expanded length": lambda b, d, n: torch.randn(b, d, 1).expand(b, d, n),
    "expanded dim": lambda b, d, n: torch.randn(b, 1, n).expand(b, d, n),
}
SIZES = [(2, 4, 18), (2, 1, 18), (2, 4, 1), (1, 1, 1)]


@pytest.fixture
def normal_form(replace):
    """The portable backend, checking that it is handed the normal form that problem.py promises."""

    def walked(problem, tensors):
        axis = {"length": 2, "dim": 1}[problem.layout]
        for t in tensors:
            assert t is None or t.stride(axis) == 1 or t.shape[axis] == 1

    def check(problem, i):
        walked(problem, (i.u, i.delta, i.z))
        for t in (i.B, i.C):
            assert 1 in t.stride()[-2:]
        for t in (i.A, i.D, i.delta_bias, i.initial_state, i.cu_seqlens):
            assert t is None or t.is_contiguous()

    def forward(problem, inputs, outputs, config):
        check(problem, inputs)
        walked(problem, [outputs.out])
        chunked.forward(problem, inputs, outputs, config)

    def backward(problem, inputs, states, cotangents, gradients, config):
        check(problem, inputs)
        walked(problem, (cotangents.dout, gradients.du, gradients.ddelta, gradients.dz))
        chunked.backward(problem, inputs, states, cotangents, gradients, config)

    replace("chunked", forward=forward, backward=backward)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.usefixtures("normal_form")
def test_every_layout_alone_and_mixed(layout, size):
    batch, dim, length = size
    for other in (layout, LAYOUTS["length"], LAYOUTS["dim"]):
        a = arguments(batch, dim, length, groups=1)
        a |= {"u": layout(*size), "delta": other(*size), "z": other(*size)}
        a["B"] = torch.randn(batch, length, 3).transpose(1, 2)
        a["C"] = torch.randn(batch, 3, 2 * length)[:, :, ::2]
        leaves = {k: a[k].requires_grad_() for k in TENSORS}
        out, last = scan(**a, return_last_state=True)
        dout, dlast = layout(*size), torch.randn(last.shape)
        for got, exact in zip((out, last), expected(a), strict=True):
            close(got, exact)
        gradients = torch.autograd.grad((out, last), list(leaves.values()), (dout, dlast))
        exact = expected(a, dout, dlast)
        for name, got in zip(leaves, gradients, strict=True):
            close(got, exact[name])


@pytest.mark.parametrize("layout", ["length", "dim"])
def test_the_result_lies_like_u(layout):
    a = arguments(layout=layout, requires_grad=True)
    out = scan(**a)
    assert out.stride() == a["u"].stride()
    for name, gradient in zip("uz", torch.autograd.grad(out.sum(), (a["u"], a["z"])), strict=True):
        assert gradient.stride() == a[name].stride()


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 2])
@pytest.mark.parametrize("layout", ["length", "dim"])
def test_short_lengths(length, layout):
    a = arguments(length=length, layout=layout, requires_grad=True)
    out, last = scan(**a, return_last_state=True)
    for got, exact in zip((out, last), expected(a), strict=True):
        close(got, exact)
    dout, dlast = torch.randn(out.shape), torch.randn(last.shape)
    gradients = torch.autograd.grad((out, last), [a[k] for k in TENSORS], (dout, dlast))
    exact = expected(a, dout, dlast)
    for name, got in zip(TENSORS, gradients, strict=True):
        close(got, exact[name])


def test_batch_zero():
    a = arguments(batch=0, requires_grad=True)
    out, last = scan(**a, return_last_state=True)
    assert out.shape == (0, 4, 20)
    assert last.shape == (0, 4, 3)
    (out.sum() + last.sum()).backward()
    assert a["A"].grad.eq(0).all()
    assert a["u"].grad.shape == (0, 4, 20)


def test_only_empty_sequences():
    cu = torch.tensor([0, 0, 0])
    a = arguments(batch=1, length=0, cu_seqlens=cu, requires_grad=True)
    _, last = scan(**a, return_last_state=True)
    torch.testing.assert_close(last, a["initial_state"])
    dlast = torch.randn(last.shape)
    (gradient,) = torch.autograd.grad(last, a["initial_state"], dlast)
    torch.testing.assert_close(gradient, dlast)


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [["u"], ["A"], ["B", "z"], ["C"], ["delta_bias"], ["initial_state"], ["delta", "D"]])
def test_gradients_of_some_arguments(asked):
    a = arguments()
    for name in asked:
        a[name].requires_grad_()
    out, last = scan(**a, return_last_state=True)
    dout, dlast = torch.randn(out.shape), torch.randn(last.shape)
    torch.autograd.backward((out, last), (dout, dlast))
    exact = expected(a, dout, dlast)
    for name in TENSORS:
        if name in asked:
            close(a[name].grad, exact[name])
        else:
            assert a[name].grad is None


@pytest.mark.parametrize("used", ["out", "last_state"])
def test_gradients_through_one_output(used):
    a = arguments(requires_grad=True)
    out, last = scan(**a, return_last_state=True)
    dout, dlast = torch.randn(out.shape), torch.randn(last.shape)
    if used == "out":
        gradients = torch.autograd.grad(out, [a[k] for k in TENSORS], dout)
        exact = expected(a, dout)
    else:
        gradients = torch.autograd.grad(last, [a[k] for k in TENSORS], dlast)
        exact = expected(a, torch.zeros_like(dout), dlast)
    for name, got in zip(TENSORS, gradients, strict=True):
        close(got, exact[name])


def test_nothing_is_kept_without_gradients():
    a = arguments(requires_grad=True)
    with torch.no_grad():
        assert scan(**a).grad_fn is None
    assert scan(**{k: v.detach() if k in TENSORS else v for k, v in a.items()}).grad_fn is None
    with torch.inference_mode():
        assert scan(**a).is_inference()


def test_parameters_in_other_float_types():
    a = arguments()
    names = ("A", "D", "delta_bias", "initial_state")
    low = {k: a[k].bfloat16().requires_grad_() for k in names}
    rounded = {k: v.detach().float() for k, v in low.items()}
    out = scan(**(a | low))
    torch.testing.assert_close(out, scan(**(a | rounded)))
    out.sum().backward()
    assert all(v.grad.dtype == torch.bfloat16 for v in low.values())
    constant = arguments(constant=True, dtype=torch.bfloat16)
    double = {k: constant[k].double().requires_grad_() for k in "BC"}
    out = scan(**(constant | double))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert double["B"].grad.dtype == torch.float64


def test_second_derivatives_are_refused():
    a = arguments(requires_grad=True)
    (gradient,) = torch.autograd.grad(scan(**a).square().sum(), a["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan: second derivatives"):
        gradient.square().sum().backward()


def test_a_call_that_kept_nothing_has_no_backward():
    tensors = flat(arguments(requires_grad=True))
    out, *_ = _scan(*tensors, True, False, 0, False, False, CHOICE)
    with pytest.raises(RuntimeError, match="checkpoint=0"):
        out.sum().backward()


def test_forms_of_B_and_C_have_gradients_of_their_shape():
    for B in (torch.randn(4, 3), torch.randn(2, 3, 20), torch.randn(2, 4, 3, 20)):
        a = arguments(optional=False) | {"B": B.clone().requires_grad_(), "C": B.clone().requires_grad_()}
        out = scan(**a)
        dout = torch.randn(out.shape)
        exact = expected(a, dout)
        for name, got in zip("BC", torch.autograd.grad(out, (a["B"], a["C"]), dout), strict=True):
            close(got, exact[name])


def test_a_constant_beside_groups():
    a = arguments(groups=4) | {"B": torch.randn(4, 3)}
    close(scan(**a), expected(a)[0])


def test_inputs_are_left_alone():
    a = arguments(batch=1, cu_seqlens=torch.tensor([0, 5, 20]), requires_grad=True)
    before = {k: v.detach().clone() for k, v in a.items() if isinstance(v, torch.Tensor)}
    out, last = scan(**a, return_last_state=True)
    (out.sum() + last.sum()).backward()
    for name, value in before.items():
        assert torch.equal(a[name].detach(), value), name


@pytest.mark.parametrize("explicit", [True, False])
def test_deterministic_reaches_the_backend(explicit, replace):
    seen = []
    replace("chunked", forward=lambda problem, *rest: [seen.append(problem), chunked.forward(problem, *rest)])
    a = arguments()
    try:
        torch.use_deterministic_algorithms(not explicit)
        scan(**a, deterministic=True if explicit else None)
        scan(**a, deterministic=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [p.deterministic for p in seen] == [True, False]


# ---- errors ---------------------------------------------------------------------------------------------------------

R = torch.randn
BAD = [
    ({"u": None}, TypeError, "u: expected a torch.Tensor, got NoneType"),
    ({"u": np.zeros((2, 4, 20))}, TypeError, "u: expected a torch.Tensor, got ndarray"),
    ({"delta": 1.0}, TypeError, "delta: expected a torch.Tensor, got float"),
    ({"D": 1.0}, TypeError, "D: expected a torch.Tensor, got float"),
    ({"C": None}, TypeError, "C: expected a torch.Tensor, got NoneType"),
    ({"A": R(4, 3, device="meta")}, ValueError, "A: expected a tensor on cpu, as u, got meta"),
    ({"u": R(2, 4, 20).to_sparse()}, TypeError, "u: expected a dense tensor, got torch.sparse_coo"),
    ({"u": R(2, 4, 20).double()}, TypeError, "u: expected float32, bfloat16 or float16, got torch.float64"),
    ({"u": R(4, 20)}, ValueError, "u: expected shape (batch, dim, length), got (4, 20)"),
    ({"delta": R(2, 4, 19)}, ValueError, "delta: expected the shape of u, (2, 4, 20), got (2, 4, 19)"),
    ({"delta": R(2, 4, 20).half()}, TypeError, "delta: expected the dtype of u, torch.float32, got torch.float16"),
    ({"z": R(2, 20, 4)}, ValueError, "z: expected the shape of u, (2, 4, 20), got (2, 20, 4)"),
    ({"z": R(2, 4, 20).bfloat16()}, TypeError, "z: expected the dtype of u, torch.float32, got torch.bfloat16"),
    ({"A": R(5, 3)}, ValueError, "A: expected shape (dim=4, state), got (5, 3)"),
    ({"A": R(4)}, ValueError, "A: expected shape (dim=4, state), got (4,)"),
    ({"A": R(4, 257)}, ValueError, "A: expected 1 to 256 states, got 257"),
    ({"A": R(4, 0)}, ValueError, "A: expected 1 to 256 states, got 0"),
    ({"A": torch.ones(4, 3).int()}, TypeError, "A: expected a real floating-point tensor, got torch.int32"),
    ({"A": R(4, 3).to(torch.complex64)}, TypeError, "A: expected a real floating-point tensor, got torch.complex64"),
    ({"B": R(4, 2)}, ValueError, "B: expected shape (dim=4, state=3) where constant, got (4, 2)"),
    ({"B": torch.ones(4, 3).int()}, TypeError, "B: expected a real floating-point tensor, got torch.int32"),
    ({"B": R(2, 3, 19)}, ValueError, "B: expected shape (batch=2[, groups], state=3, length=20) or (dim=4, state=3)"),
    ({"C": R(1, 3, 20)}, ValueError, "C: expected shape (batch=2[, groups], state=3, length=20) or (dim=4, state=3)"),
    ({"B": R(20)}, ValueError, "B: expected shape (batch=2[, groups], state=3, length=20) or (dim=4, state=3)"),
    ({"B": R(2, 3, 3, 20)}, ValueError, "B: expected a number of groups that divides dim=4, got 3"),
    ({"C": R(2, 4, 3, 20)}, ValueError, "C: expected as many groups as B, (2, 2, 3, 20), got (2, 4, 3, 20)"),
    ({"B": R(2, 2, 3, 20).half()}, TypeError, "B: expected the dtype of u, torch.float32, got torch.float16"),
    ({"D": R(3)}, ValueError, "D: expected shape (dim=4,), got (3,)"),
    ({"D": torch.ones(4).int()}, TypeError, "D: expected a real floating-point tensor, got torch.int32"),
    ({"delta_bias": R(4, 1)}, ValueError, "delta_bias: expected shape (dim=4,), got (4, 1)"),
    ({"initial_state": R(4, 3)}, ValueError, "initial_state: expected shape (rows=2, dim=4, state=3), got (4, 3)"),
    ({"cu_seqlens": [0, 20]}, TypeError, "cu_seqlens: expected a torch.Tensor, got list"),
    ({"cu_seqlens": torch.tensor([0.0, 20.0])}, TypeError, "cu_seqlens: expected int32 or int64, got torch.float32"),
    ({"cu_seqlens": torch.tensor([0])}, ValueError, "cu_seqlens: expected shape (sequences + 1,), got (1,)"),
    ({"cu_seqlens": torch.tensor([0, 20])}, ValueError, "u: expected batch 1 with cu_seqlens, got 2"),
    ({"backend": 3}, TypeError, "backend: expected a name, such as \"auto\", got 3"),
    ({"config": (16,)}, TypeError, "config: expected a backend's Config or"),
    ({"config": chunked.Config}, TypeError, "config: expected a backend's Config or"),
    ({"config": {"fwd": chunked.Config()}}, TypeError, "config: expected a backend's Config or"),
    ({"config": chunked.Config(), "backend": "cpu"}, TypeError, "config: expected a Config of backend 'cpu'"),
    ({"config": problem()}, TypeError, "config: expected the Config of a backend that can be imported, got one"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_input(change, kind, message):
    with pytest.raises(kind) as raised:
        selective_scan(**{**arguments(), **change})
    assert message in str(raised.value)


@pytest.mark.parametrize("offsets", [[0, 19], [1, 20], [0, 12, 8, 20], [0, 30, 20], [-1, 20]])
def test_bad_offsets(offsets):
    a = arguments(batch=1, optional=False, cu_seqlens=torch.tensor(offsets))
    with pytest.raises(ValueError, match=r"cu_seqlens: expected non-decreasing offsets from 0 to length=20, got \["):
        scan(**a)


# fields of a configuration of each backend
FIELDS = {"chunked": (), "cpu": (1, 64), "cuda": (4, 1, 16), "triton": (16, 16, 1)}


@pytest.mark.parametrize("name", OP.backends)
def test_a_configuration_is_known_by_its_backend(name):
    if not isinstance(OP.backends[name], types.ModuleType):
        pytest.skip(OP.backends[name])
    config = OP.backends[name].Config(*FIELDS[name])
    assert decode_choice(OP, encode_choice("auto", config, None), "forward") == ("auto", config)


@pytest.mark.parametrize("backend", ["cuda", "no-such-backend"])
def test_unavailable_backend_lists_all_with_their_reasons(backend):
    with pytest.raises(BackendUnavailable) as raised:
        selective_scan(**arguments(), backend=backend)
    message = str(raised.value)
    assert f"backend={backend!r} cannot run" in message
    reasons = OP.reasons(problem())
    assert {"cpu", "cuda", "triton", "chunked"} <= reasons.keys()
    for name, reason in reasons.items():
        assert f"\n  {name}: {reason or 'can run it'}" in message


def test_a_backend_whose_library_is_missing_says_so(monkeypatch):
    monkeypatch.setitem(OP.backends, "cuda", "not installed (No module named 'cupy')")
    with pytest.raises(BackendUnavailable, match=r"cuda: not installed \(No module named 'cupy'\)"):
        selective_scan(**arguments(), backend="cuda")


# ---- dispatch -------------------------------------------------------------------------------------------------------


def test_fastest_of_tensors_is_fastest_of_their_problem():
    same = problem(groups=2, has_D=True, has_z=True, has_bias=True, softplus=True, has_initial_state=True, layout="dim")
    assert fastest(arguments(layout="dim")) == fastest(same)
    assert fastest(arguments(layout="dim")).source in ("tuned", "shipped", "architecture", "heuristic")


def test_what_fastest_names_is_what_runs(replace):
    a = arguments()
    choice = fastest(a)
    ran = []
    replace(choice.backend, forward=lambda *args: [ran.append(args[-1]), choice.module.forward(*args)])
    selective_scan(**a)
    assert ran == [choice.config]


@pytest.mark.parametrize(
    ("problem", "kind", "message"),
    [
        ([1], TypeError, "problem: expected a Problem or the arguments of selective_scan by name, got list"),
        ({"u": R(2, 4, 20)}, TypeError, "delta: expected a torch.Tensor, got NoneType"),
        ({**arguments(), "gate": 1}, TypeError, "problem: expected arguments of selective_scan that decide what runs"),
        ({**arguments(), "A": R(3, 3)}, ValueError, "A: expected shape (dim=4, state), got (3, 3)"),
    ],
)
def test_fastest_of_bad_input(problem, kind, message):
    with pytest.raises(kind) as raised:
        fastest(problem)
    assert message in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_fastest_where_there_is_no_such_device():
    with pytest.raises(BackendUnavailable, match="no CUDA device"):
        fastest(problem(device="cuda"))


def test_explicit_configurations_reach_their_direction(replace):
    seen = []
    replace(
        "chunked",
        forward=lambda *args: [seen.append(args[-1]), chunked.forward(*args)],
        backward=lambda *args: [seen.append(args[-1]), chunked.backward(*args)],
    )
    forward, backward = chunked.Config(5), chunked.Config(7)
    selective_scan(**arguments(requires_grad=True), config={"forward": forward, "backward": backward}).sum().backward()
    assert seen == [forward, backward]


def test_names_and_order_are_mamba_ssms():
    a = arguments()
    positional = [a[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    out, last = selective_scan_fn(*positional, True, True)
    named = {k: v for k, v in a.items() if k != "initial_state"}
    for got, exact in zip((out, last), expected(named), strict=True):
        close(got, exact)


def test_importing_is_light():
    heavy = {"triton", "cupy", "numba", "matplotlib", "transformers", "torch._dynamo"}
    code = f"import sys, scan_kernels; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
