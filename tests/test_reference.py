"""The float64 references: gradients against finite differences, outputs against what other means give."""

import itertools

import numpy as np
import pytest

from scan_kernels.reference import selective_scan, selective_scan_backward
from scan_kernels.reference.selective_scan import sigmoid, softplus


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy
    print("seed", seed)  # shown when the test fails
    return np.random.default_rng(seed)


def arguments(
    rng, batch=2, dim=4, length=5, state=3, B="variable", C="variable", groups=None, D=True, z=True, bias=True,
    softplus=True, initial=True, cu_seqlens=None,
):  # fmt: skip
    """Random arguments of the reference: B and C "variable" or "constant"; groups None gives (batch, state, length)."""
    if cu_seqlens is not None:
        batch, length = 1, cu_seqlens[-1]
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1

    def projection(kind):
        if kind == "constant":
            return rng.normal(size=(dim, state))
        return rng.normal(size=(batch, state, length) if groups is None else (batch, groups, state, length))

    return {
        "u": rng.normal(size=(batch, dim, length)),
        "delta": rng.normal(size=(batch, dim, length)) if softplus else rng.uniform(0, 1, (batch, dim, length)),
        "A": -rng.uniform(0.1, 2, (dim, state)),
        "B": projection(B),
        "C": projection(C),
        "D": rng.normal(size=dim) if D else None,
        "z": rng.normal(size=(batch, dim, length)) if z else None,
        # without softplus a negative step grows the state without bound, and differences drown in it
        "delta_bias": None if not bias else rng.normal(size=dim) if softplus else rng.uniform(0, 1, dim),
        "initial_state": rng.normal(size=(rows, dim, state)) if initial else None,
        "delta_softplus": softplus,
        "cu_seqlens": cu_seqlens,
    }


def check_gradients(rng, a, with_dlast=True):
    out, last = selective_scan(**a)
    dout = rng.normal(size=out.shape)
    dlast = rng.normal(size=last.shape) if with_dlast else None
    gradients = selective_scan_backward(dout, dlast, **a)
    tensors = {k: v for k, v in a.items() if isinstance(v, np.ndarray)}
    assert gradients.keys() == tensors.keys()

    def loss():
        out, last = selective_scan(**a)
        return (out * dout).sum() + (0.0 if dlast is None else (last * dlast).sum())

    for name, x in tensors.items():
        assert gradients[name].shape == x.shape
        numeric = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            here, eps = x[i], 1e-5
            x[i] = here + eps
            above = loss()
            x[i] = here - eps
            numeric[i] = (above - loss()) / (2 * eps)
            x[i] = here
        np.testing.assert_allclose(gradients[name], numeric, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=5)))
def test_gradients_for_every_flag(rng, flags):
    names = ("D", "z", "bias", "softplus", "initial")
    check_gradients(rng, arguments(rng, batch=1, dim=2, length=4, state=2, **dict(zip(names, flags, strict=True))))


@pytest.mark.parametrize(
    "form",
    [
        {"groups": 1},
        {"groups": 2},
        {"groups": 4},
        {"B": "constant"},
        {"C": "constant", "groups": 2},
        {"B": "constant", "C": "constant"},
        {"length": 1},
        {"state": 1, "dim": 1},
        {"cu_seqlens": [0, 3, 3, 4, 7]},
        {"cu_seqlens": [0, 0, 5, 5], "groups": 2, "initial": False},
        {"cu_seqlens": [0, 2, 6], "B": "constant"},
    ],
    ids=str,
)
def test_gradients_for_every_form(rng, form):
    check_gradients(rng, arguments(rng, **form))


def test_gradients_without_dlast_state(rng):
    check_gradients(rng, arguments(rng), with_dlast=False)


@pytest.mark.parametrize("length", [1, 2, 60])
def test_time_invariant_case_is_a_convolution(rng, length):
    """Constant Δ, B, C: y = u * K with K_k = Σ_n C Ā^k B̄, Ā = exp(ΔA), B̄ = ΔB."""
    dim, state = 3, 4
    u = rng.normal(size=(2, dim, length))
    A, B, C = -rng.uniform(0.1, 2, (dim, state)), rng.normal(size=(dim, state)), rng.normal(size=(dim, state))
    step = rng.uniform(0.01, 0.5, dim)
    delta = np.broadcast_to(step[:, None], u.shape)
    out, last = selective_scan(u, delta, A, B, C)

    powers = np.exp(step[:, None] * A)[..., None] ** np.arange(length)  # Ā^k: (dim, state, length)
    kernel = np.einsum("dn,dnk,dn->dk", C, powers, step[:, None] * B)
    for b, d in np.ndindex(u.shape[:2]):
        np.testing.assert_allclose(out[b, d], np.convolve(u[b, d], kernel[d])[:length], rtol=1e-10, atol=1e-12)
    expected = np.einsum("dnk,dn,bdk->bdn", powers, step[:, None] * B, u[:, :, ::-1])
    np.testing.assert_allclose(last, expected, rtol=1e-10, atol=1e-12)


def test_initial_state_decays(rng):
    """With u = 0 only the initial state speaks: h_t = exp(A ΣΔ) h_{-1}."""
    a = arguments(rng, D=False, z=False)
    a["u"][:] = 0
    out, last = selective_scan(**a)
    elapsed = np.cumsum(softplus(a["delta"] + a["delta_bias"][:, None]), axis=-1)
    states = np.exp(a["A"][None, :, :, None] * elapsed[:, :, None]) * a["initial_state"][..., None]
    np.testing.assert_allclose(last, states[..., -1], rtol=1e-12)
    np.testing.assert_allclose(out, (a["C"][:, None] * states).sum(2), rtol=1e-10, atol=1e-12)


def test_the_forms_of_B_and_C_mean_the_same(rng):
    a = arguments(rng, B="constant", C="constant", groups=None)
    batch, dim, length = a["u"].shape
    out, last = selective_scan(**a)
    wide = {k: np.broadcast_to(a[k][None, :, :, None], (batch, *a[k].shape, length)) for k in ("B", "C")}
    for got, expected in zip(selective_scan(**{**a, **wide}), (out, last), strict=True):
        np.testing.assert_array_equal(got, expected)

    a = arguments(rng, groups=2)
    repeated = {k: np.repeat(a[k], dim // 2, axis=1) for k in ("B", "C")}
    for got, expected in zip(selective_scan(**{**a, **repeated}), selective_scan(**a), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_packed_equals_separate(rng):
    cu = [0, 4, 4, 5, 11]
    a = arguments(rng, cu_seqlens=cu)
    out, last = selective_scan(**a)
    for i, (start, stop) in enumerate(itertools.pairwise(cu)):
        part = {k: a[k][..., start:stop] for k in ("u", "delta", "B", "C", "z")}
        alone = {**a, **part, "cu_seqlens": None, "initial_state": a["initial_state"][i : i + 1]}
        got_out, got_last = selective_scan(**alone)
        np.testing.assert_array_equal(got_out, out[..., start:stop])
        np.testing.assert_array_equal(got_last[0], last[i])


def test_softplus_and_sigmoid_far_out():
    assert softplus(1000.0) == 1000.0
    assert softplus(-800.0) == 0.0
    np.testing.assert_allclose(softplus(-30.0), np.exp(-30.0), rtol=1e-12)
    np.testing.assert_allclose(sigmoid(np.array([-700.0, 0.0, 700.0])), [np.exp(-700.0), 0.5, 1.0], rtol=1e-12)
