"""What holds for every selective scan, whatever its sizes, strides, flags, dtype and backend.

Each property relates calls of one backend to each other, so it needs no reference; the gate judges the values.
"""

import itertools
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from scan_kernels import selective_scan
from scan_kernels.selective_scan import OP
from scan_kernels.selective_scan.cases import ARGUMENTS, Case, candidate
from scan_kernels.selective_scan.problem import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPSILON = {torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of a tensor's largest value
LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 130]))
LAYOUTS = ("length", "dim", "gaps", "batch innermost")


def backends():
    reasons = OP.reasons(Problem("forward", batch=2, dim=4, length=20, state=3, device=DEVICE))
    for name, reason in reasons.items():
        yield pytest.param(name, marks=[pytest.mark.skip(reason=reason)] if reason else [])


every_backend = pytest.mark.parametrize("backend", list(backends()))
few_examples = settings(
    max_examples=20,
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@st.composite
def scans(draw, lengths=LENGTHS, packed=False):
    """A small Case and the seed of its tensors."""
    groups = draw(st.sampled_from([1, 2, 3]))
    flag = st.booleans()
    return Case(
        "property",
        batch=draw(st.integers(1, 3)),
        dim=groups * draw(st.sampled_from([1, 2, 5, 18])),
        length=draw(lengths),
        lengths=tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any))) if packed else (),
        state=draw(st.sampled_from([1, 2, 3, 8, 16, 19, 33])),
        groups=groups,
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        layout=draw(st.sampled_from(["length", "dim"])),
        constant_B=draw(flag), constant_C=draw(flag), D=draw(flag), z=draw(flag), bias=draw(flag),
        softplus=draw(flag), initial_state=draw(flag), offset=draw(st.integers(0, 3)),
    ), draw(st.integers(0, 2**31))  # fmt: skip


def make(case, seed, backend):
    """The case's tensors, if the backend can run it."""
    for direction in ("forward", "backward"):
        assume(OP.reasons(case.problem(direction, DEVICE, training=True))[backend] is None)
    return case.make(DEVICE, seed)


def laid(t, layout):
    """A copy of t (batch, dim, length) with other strides; what lies between its elements is NaN."""
    if layout == "dim":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "batch innermost":
        return t.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if layout == "gaps":
        return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0]
    return t.contiguous()


def same(got, wanted):
    """Equal but for rounding, name by name."""
    assert got.keys() == wanted.keys()
    for name, exact in wanted.items():
        x, y = got[name].detach().double().cpu().numpy(), exact.detach().double().cpu().numpy()
        scale = np.abs(y).max(initial=0) + 0.1
        np.testing.assert_allclose(x / scale, y / scale, rtol=0, atol=EPSILON[exact.dtype], err_msg=name)


def part(tensors, start, stop, row=None):
    """The arguments for steps start .. stop, and for one packed sequence with its own states."""
    cut = {
        k: tensors[k][..., start:stop]
        for k in ("u", "delta", "B", "C", "z", "dout")
        if tensors.get(k) is not None and tensors[k].ndim > 2
    }
    if row is not None:
        states = {k: tensors[k] for k in ("initial_state", "dlast_state") if tensors[k] is not None}
        cut |= {k: t[row : row + 1] for k, t in states.items()} | {"cu_seqlens": None}
    return {**tensors, **cut}


def arguments_of(tensors):
    return {k: v for k, v in tensors.items() if k not in ("dout", "dlast_state")}


def values_and_gradients(tensors, function):
    """Like ``candidate``, of a function of the arguments that returns (out, last_state)."""
    leaves = {k: tensors[k].detach().requires_grad_() for k in ARGUMENTS if tensors[k] is not None}
    out, last = function(arguments_of({**tensors, **leaves}))
    gradients = torch.autograd.grad((out, last), list(leaves.values()), (tensors["dout"], tensors["dlast_state"]))
    return {"out": out, "last_state": last} | {f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}


@every_backend
@few_examples
@given(scan=scans(), fraction=st.floats(0, 1))
def test_two_parts_equal_the_whole(backend, scan, fraction):
    """Two calls, the second from the state that the first left, give the values and gradients of one call."""
    case, seed = scan
    tensors = make(case, seed, backend)
    middle = round(fraction * case.length)

    def in_parts(arguments):
        run = {"return_last_state": True, "backend": backend}
        first, state = selective_scan(**part(arguments, 0, middle), **run)
        rest, last = selective_scan(**{**part(arguments, middle, case.length), "initial_state": state}, **run)
        return torch.cat([first, rest], dim=2), last

    same(values_and_gradients(tensors, in_parts), candidate(tensors, backend))


@every_backend
@few_examples
@given(scan=scans(packed=True))
def test_packed_equals_separate(backend, scan):
    case, seed = scan
    tensors = make(case, seed, backend)
    whole = candidate(tensors, backend)
    spans = list(itertools.pairwise(tensors["cu_seqlens"].tolist()))
    parts = [candidate(part(tensors, *span, row=i), backend) for i, span in enumerate(spans)]

    wanted = {}
    for name in whole:
        pieces = [p[name] for p in parts]
        if name in ("last_state", "dinitial_state"):
            wanted[name] = torch.cat(pieces)
        elif pieces[0].ndim > 2:
            wanted[name] = torch.cat(pieces, dim=-1)
        else:  # shared by all sequences
            wanted[name] = torch.stack(pieces).sum(0)
    same(whole, wanted)


@every_backend
@few_examples
@given(scan=scans(lengths=st.integers(1, 20)))
def test_step_by_step_equals_forward(backend, scan):
    case, seed = scan
    tensors = make(case, seed, backend)
    whole, last = selective_scan(**arguments_of(tensors), return_last_state=True, backend=backend)
    state, steps = tensors["initial_state"], []
    for t in range(case.length):
        step = {**part(tensors, t, t + 1), "initial_state": state}
        out, state = selective_scan(**arguments_of(step), return_last_state=True, backend=backend)
        steps.append(out)
    same({"out": torch.cat(steps, dim=2), "last_state": state}, {"out": whole, "last_state": last})


@every_backend
@few_examples
@given(scan=scans(), data=st.data())
def test_permuting_channels_permutes_results(backend, scan, data):
    """Groups may change places, and channels within their group; B and C go with their group."""
    case, seed = scan
    tensors = make(case, seed, backend)
    groups = torch.tensor(data.draw(st.permutations(range(case.groups))), device=DEVICE)
    inner = torch.tensor(data.draw(st.permutations(range(case.dim // case.groups))), device=DEVICE)
    channels = (groups[:, None] * len(inner) + inner).flatten()

    def permuted(name, t):
        if not isinstance(t, torch.Tensor):
            return t
        if name.removeprefix("d") in ("B", "C") and t.ndim > 2:
            return t[:, groups]
        axis = 0 if t.ndim < 3 else 1
        moved = t.index_select(axis, channels)
        return laid(moved, case.layout) if name in ("u", "delta", "z", "dout") else moved

    moved = {k: permuted(k, v) for k, v in tensors.items()}
    same(candidate(moved, backend), {k: permuted(k, v) for k, v in candidate(tensors, backend).items()})


@every_backend
@few_examples
@given(
    scan=scans(),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    projections=st.tuples(st.booleans(), st.booleans()),
)
def test_strides_do_not_matter(backend, scan, layouts, projections):
    case, seed = scan
    tensors = make(case, seed, backend)
    moved = dict(tensors)
    for name, layout in zip(("u", "delta", "z", "dout"), layouts, strict=True):
        if tensors[name] is not None:
            moved[name] = laid(tensors[name], layout)
    for name, state_contiguous in zip("BC", projections, strict=True):
        if tensors[name].ndim > 2:
            t = tensors[name]
            gaps = torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0]
            moved[name] = t.transpose(2, 3).contiguous().transpose(2, 3) if state_contiguous else gaps
    same(candidate(moved, backend), candidate(tensors, backend))


@every_backend
@few_examples
@given(scan=scans(), packed=scans(packed=True))
def test_the_same_call_gives_the_same_bits(backend, scan, packed):
    """With deterministic=True, gradients too."""
    for case, seed in (scan, packed):
        tensors = make(case, seed, backend)
        first, second = (candidate(tensors, backend, deterministic=True) for _ in range(2))
        for name in first:
            assert torch.equal(first[name], second[name]), name
