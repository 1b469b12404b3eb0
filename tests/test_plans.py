"""Eager calls, which bypass the registered op: the same results, and a memo that confuses nothing and keeps nothing.

``registered()`` makes the same call meet the op, so the two can be compared bit by bit. The portable backend stands in
for all: everything around the kernels is the same.
"""

import contextlib
import functools
import gc
import itertools
import sys
import threading
import types
import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from scan_kernels import op, selective_scan
from scan_kernels.op import signature
from scan_kernels.selective_scan import OP, SelectiveScan
from scan_kernels.selective_scan.backends import chunked
from scan_kernels.selective_scan.plan import normal_form

module = sys.modules["scan_kernels.selective_scan"]  # the package's attribute of that name is the function
TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
scan = functools.partial(selective_scan, backend="chunked", delta_softplus=True)


class registered(TorchFunctionMode):
    """Under any mode, a call goes through the registered op."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def prepared(**replaced):
    """The portable backend as one that prepares its calls, and holds them to the contract: see op.py."""
    changed = types.ModuleType("chunked")
    vars(changed).update({**vars(chunked), **replaced})

    def prepare(direction):
        def prepare(problem, *tensors_and_config):
            *tensors, config = tensors_and_config
            flat = functools.partial(torch.utils._pytree.tree_leaves, is_leaf=lambda x: x is None)
            expected, call = signature(flat(tensors)), getattr(changed, direction)
            assert problem.direction == direction

            def run(*tensors):
                assert signature(flat(tensors)) == expected
                inputs, *_, results = tensors
                assert all(a is b for a, b in zip(normal_form(inputs), inputs, strict=True))
                last = results.last_state if direction == "forward" else tensors[2].dlast_state
                assert problem.has_last_state == (last is not None)
                call(problem, *tensors, config)

            return run

        return prepare

    changed.prepare_forward, changed.prepare_backward = prepare("forward"), prepare("backward")
    return changed


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    print(f"torch.manual_seed({torch.seed()})")  # shown if the test fails
    monkeypatch.setitem(OP.backends, "chunked", prepared())
    OP.forget()
    yield
    OP.forget()


@pytest.fixture
def looked(monkeypatch):
    """One entry for every call whose metadata was looked at, because no equal call was remembered."""
    seen = []
    convert = module._convert
    monkeypatch.setattr(module, "_convert", lambda *a: [seen.append(a), convert(*a)][1])
    return seen


def sequence(layout="length", dtype=torch.float32, batch=2, dim=6, length=20):
    t = {
        "length": lambda: torch.randn(batch, dim, length, dtype=dtype),
        "dim": lambda: torch.randn(batch, length, dim, dtype=dtype).transpose(1, 2),
        "gaps": lambda: torch.randn(batch, dim, 2 * length, dtype=dtype)[:, :, ::2],
        "channels of more": lambda: torch.randn(batch, 2 * dim, length, dtype=dtype)[:, dim:],
        "off by one": lambda: torch.randn(batch * dim * length + 1, dtype=dtype)[1:].view(batch, dim, length),
    }
    return t[layout]()


def arguments(batch=2, dim=6, length=20, state=3, dtype=torch.float32, grad=True, **changes):
    sizes = {"batch": batch, "dim": dim, "length": length, "dtype": dtype}
    a = {
        "u": sequence(**sizes), "delta": sequence(**sizes), "A": -torch.rand(dim, state),
        "B": torch.randn(batch, state, length, dtype=dtype), "C": torch.randn(batch, state, length, dtype=dtype),
        "D": torch.randn(dim), "z": sequence(**sizes), "delta_bias": torch.randn(dim), "initial_state": None,
    }  # fmt: skip
    a |= changes
    return {k: v.requires_grad_(grad) if isinstance(v, torch.Tensor) and k in TENSORS else v for k, v in a.items()}


def outcome(a, dout=None, **options):
    """out, last_state and all gradients, by name."""
    tensors = {k: a[k].detach().requires_grad_(a[k].requires_grad) for k in TENSORS if a[k] is not None}
    result = scan(**{**a, **tensors, **options})
    found = dict(zip(("out", "last_state"), result if isinstance(result, tuple) else (result,), strict=False))
    leaves = {k: t for k, t in tensors.items() if t.requires_grad}
    if found["out"].requires_grad:
        cotangents = [torch.ones_like(t) if dout is None else dout for t in found.values()]
        gradients = torch.autograd.grad(list(found.values()), list(leaves.values()), cotangents)
        found |= {f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}
    return found


def same(got, wanted):
    """Every bit, dtype and stride."""
    assert got.keys() == wanted.keys()
    for name, t in wanted.items():
        assert torch.equal(got[name], t), name
        assert got[name].dtype == t.dtype, name
        assert got[name].stride() == t.stride(), name


# ---- the two ways of a call -----------------------------------------------------------------------------------------

CHANGES = {
    "nothing": dict,
    "dim-contiguous": lambda: {k: sequence("dim") for k in ("u", "delta", "z")},
    "dim-contiguous z": lambda: {"z": sequence("dim")},
    "gaps": lambda: {"delta": sequence("gaps")},
    "channels of more": lambda: {"u": sequence("channels of more")},
    "off by one": lambda: {"u": sequence("off by one")},
    "state-contiguous C": lambda: {"C": torch.randn(2, 20, 3).transpose(1, 2)},
    "expanded A": lambda: {"A": (-torch.rand(3)).expand(6, 3)},
    "groups": lambda: {k: torch.randn(2, 3, 3, 20) for k in "BC"},
    "one group": lambda: {"B": torch.randn(2, 1, 3, 20)},
    "constant B": lambda: {"B": torch.randn(6, 3)},
    "constant C": lambda: {"C": torch.randn(6, 3)},
    "no D": lambda: {"D": None},
    "no z": lambda: {"z": None},
    "no bias": lambda: {"delta_bias": None},
    "initial state": lambda: {"initial_state": torch.randn(2, 6, 3)},
    "last state": lambda: {"return_last_state": True},
    "no softplus": lambda: {"delta_softplus": False},
    "deterministic": lambda: {"deterministic": True},
    "another backend": lambda: {"backend": "auto"},
    "a configuration": lambda: {"config": chunked.Config(7)},
    "another configuration": lambda: {"config": {"forward": chunked.Config(5), "backward": chunked.Config(9)}},
    "bfloat16": lambda: arguments(dtype=torch.bfloat16),
    "float16": lambda: arguments(dtype=torch.float16),
    "double A, D": lambda: {"A": -torch.rand(6, 3).double(), "D": torch.randn(6).double()},
    "half bias": lambda: {"delta_bias": torch.randn(6).half()},
    "a parameter": lambda: {"A": torch.nn.Parameter(-torch.rand(6, 3))},
    "another length": lambda: arguments(length=33),
    "another batch": lambda: arguments(batch=3),
    "other channels": lambda: arguments(dim=5),
    "other states": lambda: arguments(state=17),
    "no steps": lambda: arguments(length=0),
    "packed": lambda: {**arguments(batch=1), "cu_seqlens": torch.tensor([0, 7, 20])},
    "packed, narrow": lambda: {**arguments(batch=1), "cu_seqlens": torch.tensor([0, 7, 20], dtype=torch.int32)},
    "packed otherwise": lambda: {**arguments(batch=1), "cu_seqlens": torch.tensor([0, 3, 4, 20])},
    "only u's gradient": lambda: {k: v.detach() for k, v in arguments().items() if k in "ABCDz"},
    "no gradients": lambda: arguments(grad=False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_eager_equals_registered(change):
    a = {**arguments(), **change()}
    with registered():
        wanted = outcome(a)
    for _ in range(2):  # the second time by what was remembered
        same(outcome(a), wanted)


ALIKE = ("a parameter", "only u's gradient")  # which a plan need not tell from the plain call
PAIRS = [*(("nothing", name) for name in CHANGES if name != "nothing"), *itertools.pairwise(CHANGES)]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_calls_that_differ_are_not_confused(first, second, looked):
    """Each call as if it were the first, after one that differs from it in one thing, or two."""
    one, other = ({**arguments(), **CHANGES[name]()} for name in (first, second))
    with registered():
        wanted = [outcome(one), outcome(other)]
    looked.clear()
    for a, exact in zip((one, other, one, other), wanted * 2, strict=True):
        same(outcome(a), exact)
    assert len(looked) == 2 - (first == "nothing" and second in ALIKE)


AMBIENT = {
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to half": lambda: torch.autocast("cpu", torch.float16),
    "autocast off": lambda: torch.autocast("cpu", torch.bfloat16, enabled=False),
}


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("ambient", [*AMBIENT.values(), deterministic], ids=[*AMBIENT, "deterministic"])
def test_what_is_set_around_a_call_is_seen(ambient, looked):
    a = arguments()
    outside = outcome(a)
    with registered(), ambient():
        wanted = outcome(a)
    looked.clear()
    for _ in range(2):
        with ambient():
            same(outcome(a), wanted)
        same(outcome(a), outside)
    assert len(looked) == (ambient is not AMBIENT["autocast off"])


@pytest.mark.parametrize("used", ["out", "last_state", "both"])
def test_backwards_that_differ_are_not_confused(used):
    """One forward; cotangents of other strides, dtypes and alignments, with and without that of last_state."""
    a = arguments(dtype=torch.bfloat16)
    leaves = [a[k] for k in TENSORS if a[k] is not None]

    def gradients(out, last, dout, dlast):
        pairs = {"out": ([out], [dout]), "last_state": ([last], [dlast]), "both": ([out, last], [dout, dlast])}[used]
        return torch.autograd.grad(pairs[0], leaves, pairs[1], retain_graph=True)

    with registered():
        through_op = scan(**a, return_last_state=True)
    result = scan(**a, return_last_state=True)
    for layout, wide in [*itertools.product(("length", "dim", "gaps", "off by one"), (False, True))] * 2:
        dout, dlast = sequence(layout, torch.bfloat16), torch.randn(2, 6, 3)
        dlast = dlast.transpose(1, 2).contiguous().transpose(1, 2) if wide else dlast
        for got, exact in zip(gradients(*result, dout, dlast), gradients(*through_op, dout, dlast), strict=True):
            assert torch.equal(got, exact)
            assert got.stride() == exact.stride()


def test_saved_tensors_may_come_back_otherwise():
    """Hooks may return what was saved with other strides, as ``save_on_cpu`` does."""
    a = {**arguments(), **{k: sequence("dim").requires_grad_() for k in ("u", "delta", "z")}}
    wanted = outcome(a)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t.clone(memory_format=torch.contiguous_format)
    ):
        got = outcome(a)
    for name, t in wanted.items():
        torch.testing.assert_close(got[name], t, msg=name)


def test_an_input_that_was_changed_is_noticed():
    a = arguments()
    u = a["u"] * 1
    out = scan(**{**a, "u": u})
    u.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("layout", ["length", "dim"])
@pytest.mark.parametrize("way", [contextlib.nullcontext, registered])
def test_results_may_be_changed_in_place(way, layout):
    a = {**arguments(), "u": sequence(layout).requires_grad_()}
    with way():
        wanted = outcome(a)
        out = scan(**a)
        out *= 2
        (gradient,) = torch.autograd.grad(out.sum(), a["u"])
        torch.testing.assert_close(gradient, 2 * wanted["du"])
        with torch.no_grad():
            out = scan(**a)
        out += torch.ones(6, 1, requires_grad=True)
        assert out.requires_grad


@pytest.mark.parametrize("way", [contextlib.nullcontext, registered])
@pytest.mark.parametrize("names", list(itertools.product("uAB", repeat=2)), ids="".join)
def test_second_derivatives_are_refused(way, names):
    a = arguments()
    with way():
        (gradient,) = torch.autograd.grad(scan(**a).square().sum(), a[names[0]], create_graph=True)
        with pytest.raises(RuntimeError, match=r"second derivatives .* are not implemented"):
            torch.autograd.grad(gradient.sum(), a[names[1]])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    a = arguments()
    wanted = outcome(a)["du"]
    out = torch.utils.checkpoint.checkpoint(lambda u: scan(**{**a, "u": u}), a["u"], use_reentrant=reentrant)
    (out.sum()).backward()
    assert torch.equal(a["u"].grad, wanted)


# ---- what goes through the op ---------------------------------------------------------------------------------------


@pytest.fixture
def through_op(monkeypatch):
    """One entry for every call that meets the registered op."""
    calls = []
    registered_op = module._scan
    monkeypatch.setattr(module, "_scan", lambda *a: [calls.append(a), registered_op(*a)][1])
    return calls


def test_a_plain_call_does_not_meet_the_op(through_op):
    for grad in (False, True):
        out = scan(**arguments(grad=grad))
        assert (out.grad_fn is not None) == grad
        out = scan(**{k: torch.nn.Parameter(v) if v is not None else v for k, v in arguments().items()})
        assert out.grad_fn.name() == f"{SelectiveScan.__name__}Backward"
    assert not through_op


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_device():
    with torch.device("cpu"):
        yield


@pytest.mark.parametrize("mode", [registered, Recorder, default_device, forward_ad.dual_level])
def test_modes_meet_the_op(mode, through_op):
    a = arguments()
    wanted = outcome(a)
    with mode():
        same(outcome(a), wanted)
    assert len(through_op) == 1


def odd(t):
    """The same values, negated lazily."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def test_tensors_that_are_not_plain_memory_meet_the_op(through_op):
    a = arguments(grad=False)
    wanted = scan(**a)
    for k in ("u", "A", "C"):
        got = scan(**{**a, k: a[k].as_subclass(Plain)})
        assert isinstance(got, Plain) or k != "u"
        assert torch.equal(got.as_subclass(torch.Tensor), wanted)
        assert odd(a[k]).is_neg()
        torch.testing.assert_close(scan(**{**a, k: odd(a[k])}), wanted)
    assert len(through_op) == 6


def test_a_lazily_negated_cotangent():
    a = arguments()
    dout = sequence()
    got, wanted = outcome(a, odd(dout)), outcome(a, dout)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name])


NOT_PLAIN = {
    "meta": lambda t: t.to("meta"),
    "zero": lambda t: torch._efficientzerotensor(t.shape),
    "sparse": torch.Tensor.to_sparse,
    "csc": torch.Tensor.to_sparse_csc,
    "mkldnn": torch.Tensor.to_mkldnn,
    "negated": odd,
    "subclass": lambda t: t.as_subclass(Plain),
    "list": torch.Tensor.tolist,
}


@pytest.mark.filterwarnings("ignore:Sparse CSC")
@pytest.mark.parametrize("make", NOT_PLAIN.values(), ids=NOT_PLAIN.keys())
def test_what_is_not_plain_memory_has_no_signature(make):
    plain = torch.ones(2, 3)
    assert signature((plain, None, plain)) is not None
    assert signature((plain, None, make(plain))) is None


@pytest.mark.filterwarnings("ignore")
def test_what_traces_sees_the_op():
    a = arguments(grad=False)
    wanted = scan(**a)

    def function(u):
        return scan(**{**a, "u": u})

    class Module(torch.nn.Module):
        def forward(self, u):
            return function(u)

    assert torch.equal(function(a["u"]), wanted)  # remembered, which must not matter
    assert "scan_kernels.selective_scan" in make_fx(function)(a["u"]).code
    for strict in (False, True):
        exported = torch.export.export(Module(), (a["u"],), strict=strict)
        assert "scan_kernels.selective_scan" in str(exported.graph)
        assert torch.equal(exported.module()(a["u"]), wanted)
    traced = torch.jit.trace(function, (a["u"],))
    assert "selective_scan" in str(traced.graph)
    assert torch.equal(traced(a["u"]), wanted)
    graphs = []
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=lambda g, _: [graphs.append(g), g.forward][1])
    assert torch.equal(compiled(a["u"]), wanted)
    assert "scan_kernels.selective_scan" in graphs[0].code


@pytest.mark.filterwarnings("ignore")
def test_functorch_meets_the_op(through_op):
    """It batches by calling the op for each part, and refuses gradients, which its registration does not offer it."""
    a = arguments(grad=False)
    wanted = scan(**a)

    def function(u):
        return scan(**{**a, "u": u})

    assert torch.equal(torch.func.vmap(function)(torch.stack([a["u"]] * 2))[1], wanted)
    assert len(through_op) == 1
    assert torch.equal(torch.func.vmap(lambda x: x * wanted.new_ones(1) + scan(**a))(torch.zeros(2, 1))[1], wanted)
    assert len(through_op) == 2
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda u: function(u).sum())(a["u"])


def test_a_backward_under_a_mode_meets_the_op():
    seen = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    a = arguments()
    (wanted,) = torch.autograd.grad(scan(**a).sum(), a["u"])
    out = scan(**a)
    with Seeing():
        (got,) = torch.autograd.grad(out.sum(), a["u"])
    assert torch.equal(got, wanted)
    assert torch.ops.scan_kernels.selective_scan_backward.default in seen


# ---- what is remembered ---------------------------------------------------------------------------------------------


def test_an_equal_call_is_looked_at_once(looked):
    for _ in range(3):
        scan(**arguments()).sum().backward()
    assert len(looked) == 1


@pytest.mark.parametrize("name", [*TENSORS, "cu_seqlens"])
def test_each_tensor_counts_with_its_strides_dtype_and_alignment(name):
    """In the signature; whatever a backend makes of it."""
    plain = torch.arange(24.0).view(2, 3, 4)
    others = {
        "shape": plain[:, :, :3].contiguous(),
        "strides": plain.transpose(1, 2).contiguous().transpose(1, 2),
        "dtype": plain.half(),
        "alignment": torch.arange(25.0)[1:].view(2, 3, 4),
        "absence": None,
    }
    at = [*TENSORS, "cu_seqlens"].index(name)

    def placed(t):
        tensors = [plain.clone() for _ in range(10)]
        tensors[at] = t
        return signature(tensors)

    assert placed(plain) == placed(plain.clone()) == placed(torch.nn.Parameter(plain))
    for what, t in others.items():
        assert placed(t) != placed(plain), what


def test_offsets_are_checked_in_every_call():
    a = arguments(batch=1, grad=False)
    scan(**a, cu_seqlens=torch.tensor([0, 7, 20]))
    for offsets in ([0, 21, 20], [1, 7, 20], [0, 7, 19]):
        with pytest.raises(ValueError, match="cu_seqlens: expected non-decreasing offsets from 0 to length=20"):
            scan(**a, cu_seqlens=torch.tensor(offsets))


def test_a_call_that_failed_fails_again():
    for _ in range(2):
        with pytest.raises(TypeError, match=r"u: expected float32, bfloat16 or float16, got torch.float64"):
            scan(**arguments(dtype=torch.float64))
        with pytest.raises(op.BackendUnavailable):
            scan(**arguments(), backend="no-such-backend")


def test_forget_drops_what_was_prepared(monkeypatch):
    """A configuration that tuning found meanwhile is used by a call that ran before."""
    a = arguments()
    used = []
    changed = prepared(
        forward=lambda *args: [used.append(args[-1]), chunked.forward(*args)],
        backward=lambda *args: [used.append(args[-1]), chunked.backward(*args)],
    )
    monkeypatch.setitem(OP.backends, "chunked", changed)
    best = chunked.Config(11)
    for expected in (None, best):
        if expected:
            monkeypatch.setattr(OP, "_resolve", lambda *args: op.Choice("chunked", best, "tuned", changed))
            scan(**a).sum().backward()
            assert best not in used  # not yet
            OP.forget()
            assert not OP.calls
        used.clear()
        scan(**a).sum().backward()
        assert len(used) == 2
        assert expected is None or set(used) == {best}
        used.clear()


def test_a_prepared_call_is_made_once_and_serves_both_ways(monkeypatch):
    made = []
    changed = prepared()
    for name in ("prepare_forward", "prepare_backward"):
        prepare = getattr(changed, name)
        monkeypatch.setattr(changed, name, lambda *args, make=prepare: [made.append(args[0].direction), make(*args)][1])
    monkeypatch.setitem(OP.backends, "chunked", changed)
    a = arguments()
    wanted = outcome(a)
    for _ in range(2):
        same(outcome(a), wanted)
    assert made == ["forward", "backward"]


@pytest.mark.parametrize("backend", ["chunked", "auto"])
def test_nothing_is_held(backend):
    a = arguments()
    out, last = scan(**a, backend=backend, return_last_state=True)
    (out.sum() + last.sum()).backward()
    watched = [weakref.ref(t) for t in (out, last, *(t for t in a.values() if t is not None))]
    gradients = [weakref.ref(t.grad) for t in a.values() if t is not None]
    del a, out, last
    gc.collect()
    assert OP.calls
    assert not any(ref() is not None for ref in watched + gradients)


def test_new_lengths_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(op, "MOST_REMEMBERED", 10)
    wanted = {}
    for turn in range(2):
        for length in range(1, 30):
            a = arguments(length=length) if turn == 0 else wanted[length][0]
            got = outcome(a)
            wanted.setdefault(length, (a, got))
            same(got, wanted[length][1])
            assert all(len(memo) <= 10 for memo in (OP.calls, OP._resolved, OP._stored))


def test_threads():
    """Calls of one signature from several threads at once, forward and backward."""
    given = [arguments() for _ in range(8)]
    wanted = [outcome(a) for a in given]
    OP.forget()
    failures = []

    def work(a, exact):
        try:
            for _ in range(10):
                same(outcome(a), exact)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(given, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
