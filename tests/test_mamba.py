"""The Mamba block: what it computes, that all its ways of computing it agree, and that others' weights fit it."""

import copy
import doctest
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import scan_kernels.mamba
from scan_kernels import Mamba, reference, selective_scan
from scan_kernels.mamba import block
from scan_kernels.mamba.short import causal_conv1d, selective_state_update

VARIANTS = {
    "default": {},
    "biases": {"bias": True, "conv_bias": False},
    "odd sizes": {"d_state": 5, "d_conv": 3, "expand": 1, "dt_rank": 3},
    "one tap": {"d_conv": 1},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


@pytest.fixture(autouse=True)
def fresh_random_numbers():
    """Other numbers in every run; a failing test's captured output says how to repeat them."""
    print(f"torch.manual_seed({torch.seed()})")


def lively(options, d_model=24, **more):
    """A block whose scan has something to remember: steps drawn large, decay rates and skips of all sizes."""
    mamba = Mamba(d_model, dt_min=0.05, dt_max=1.0, **options, **more)
    with torch.no_grad():
        mamba.A_log.add_(torch.randn_like(mamba.A_log))
        mamba.D.add_(torch.randn_like(mamba.D))
        if mamba.in_proj.bias is not None:
            mamba.out_proj.bias.normal_()
    return mamba


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def close_gradients(got, expected):
    """Each within 1e-5 of its own largest entry, or of 1."""
    for g, e in zip(got, expected, strict=True):
        close(g, e, 1e-5 * max(1.0, e.abs().max().item() if e.numel() else 0.0))


def gradients(mamba, out, *inputs):
    """Of a fixed weighting of out, by every parameter and input."""
    weights = torch.cos(torch.arange(out.numel(), dtype=torch.float32)).view(out.shape)
    return torch.autograd.grad((out.float() * weights).sum(), [*mamba.parameters(), *inputs])


def in_float64(mamba, x):
    """The block's equations, one step and tap at a time, on one sequence (length, d_model)."""
    w = {name: p.detach().double().numpy() for name, p in mamba.named_parameters()}
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
    xz = x.double().numpy() @ w["in_proj.weight"].T + w.get("in_proj.bias", 0.0)
    x, z = xz[:, : mamba.d_inner], xz[:, mamba.d_inner :]
    u = np.zeros_like(x) + w.get("conv1d.bias", 0.0)
    for t in range(len(x)):
        for k in range(mamba.d_conv):
            if (source := t - (mamba.d_conv - 1) + k) >= 0:
                u[t] += w["conv1d.weight"][:, 0, k] * x[source]
    u = silu(u)
    delta, B, C = np.split(u @ w["x_proj.weight"].T, [mamba.dt_rank, mamba.dt_rank + mamba.d_state], axis=1)
    delta = delta @ w["dt_proj.weight"].T
    y, _ = reference.selective_scan(
        u.T[None], delta.T[None], -np.exp(w["A_log"]), B.T[None], C.T[None], w["D"], z.T[None], w["dt_proj.bias"], True
    )
    return torch.from_numpy(y[0].T @ w["out_proj.weight"].T + w.get("out_proj.bias", 0.0)).float()


# ---- parameters -----------------------------------------------------------------------------------------------------


def test_parameters_are_those_of_mamba_ssm():
    expected = {
        "in_proj.weight": (128, 32), "conv1d.weight": (64, 1, 4), "conv1d.bias": (64,), "x_proj.weight": (34, 64),
        "dt_proj.weight": (64, 2), "dt_proj.bias": (64,), "A_log": (64, 16), "D": (64,), "out_proj.weight": (32, 64),
    }  # fmt: skip
    assert {name: tuple(t.shape) for name, t in Mamba(32).state_dict().items()} == expected
    biased = {"in_proj.bias": (128,), "out_proj.bias": (32,), **expected}
    del biased["conv1d.bias"]
    assert {n: tuple(t.shape) for n, t in Mamba(32, bias=True, conv_bias=False).state_dict().items()} == biased


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initialisation(dtype):
    mamba = Mamba(80, d_state=7, dt_min=0.002, dt_max=0.2, dt_scale=2.0, layer_idx=3, dtype=dtype)
    assert mamba.dt_rank == 5
    assert mamba.layer_idx == 3
    close(mamba.A_log.exp(), torch.arange(1.0, 8.0).expand(160, 7))
    assert torch.equal(mamba.D, torch.ones(160))
    assert mamba.A_log._no_weight_decay
    assert mamba.D._no_weight_decay
    assert mamba.dt_proj.bias._no_reinit
    assert {p.dtype for n, p in mamba.named_parameters() if n not in ("A_log", "D")} == {dtype}
    dt = F.softplus(mamba.dt_proj.bias.float())
    slack = 1.0 + 40 * torch.finfo(dtype).eps
    assert 0.002 / slack <= dt.min() < 0.004
    assert 0.1 < dt.max() <= 0.2 * slack
    # log-uniform: half of the draws lie below the geometric mean (a fair coin 160 times stays within 80 ± 40)
    assert 40 < (dt < math.sqrt(0.002 * 0.2)).sum() < 120
    bound = 2.0 * 5**-0.5
    assert 0.9 * bound < mamba.dt_proj.weight.max() <= bound * slack
    assert 0.9 * bound < -mamba.dt_proj.weight.min() <= bound * slack
    assert torch.equal(Mamba(80, dt_init="constant").dt_proj.weight, torch.full((160, 5), 5**-0.5))
    assert F.softplus(Mamba(80, dt_min=1e-6, dt_max=1e-5, dt_init_floor=1e-3).dt_proj.bias).min() > 0.99e-3
    with pytest.raises(ValueError, match="dt_init"):
        Mamba(80, dt_init="zeros")


@variants
def test_state_dict_round_trip(options):
    mamba, other = lively(options), Mamba(24, **options)
    other.load_state_dict(mamba.state_dict(), strict=True)
    x = torch.randn(2, 6, 24)
    assert torch.equal(other(x), mamba(x))


# ---- what it computes -----------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("length", [1, 2, 3, 33])
def test_forward_is_the_equations(options, length):
    mamba, x = lively(options), torch.randn(1, length, 24)
    close(mamba(x)[0].detach(), in_float64(mamba, x[0]))


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 2), (2, 40)])
@pytest.mark.parametrize("use_bias", [False, True])
def test_agrees_with_transformers(batch, length, use_bias):
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = modeling.MambaConfig(hidden_size=32, state_size=16, num_hidden_layers=1, use_bias=use_bias)
    mixer = modeling.MambaMixer(config, layer_idx=0)
    mamba = Mamba(32, bias=use_bias)
    mamba.load_state_dict(mixer.state_dict(), strict=True)
    x = torch.randn(batch, length, 32, requires_grad=True)
    ours, theirs = mamba(x), mixer(x)
    close(ours, theirs)
    named = dict(mixer.named_parameters())
    in_our_order = torch.nn.ParameterList(named[name] for name, _ in mamba.named_parameters())
    close_gradients(gradients(mamba, ours, x), gradients(in_our_order, theirs, x))


def test_low_precision_weights():
    mamba = lively({})
    low = copy.deepcopy(mamba).bfloat16()
    x = torch.randn(2, 20, 24)
    got = low(x.bfloat16())
    assert got.dtype == torch.bfloat16
    close(got.float(), mamba(x), 0.05)


def test_autocast():
    mamba, x = lively({}), torch.randn(2, 20, 24)
    whole = mamba(x)
    expected = gradients(mamba, whole)
    cache = mamba.allocate_cache(2)
    with torch.autocast("cpu", torch.bfloat16):
        out = mamba(x)
        steps = torch.cat([mamba(x[:, :19], cache=cache), mamba.step(x[:, 19:], cache)], 1)
    assert out.dtype == torch.bfloat16
    assert cache.ssm.dtype == torch.float32
    close(out.float(), whole, 0.05)
    close(steps.float(), whole, 0.05)
    for got, g in zip(gradients(mamba, out), expected, strict=True):
        assert got.dtype == g.dtype
        assert (got - g).norm() < 0.05 * g.norm()


def test_the_scan_gets_views_that_lie_right(monkeypatch):
    seen = {}

    def spy(u, delta, A, B, C, D, z, *args, **kwargs):
        seen.update(u=u, delta=delta, B=B, C=C, z=z)
        return selective_scan(u, delta, A, B, C, D, z, *args, **kwargs)

    monkeypatch.setattr(block, "selective_scan", spy)
    mamba = Mamba(24)
    outputs = []
    mamba.in_proj.register_forward_hook(lambda *a: outputs.append(a[2]))
    mamba.out_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    mamba(torch.randn(2, 9, 24))
    assert all(t.stride(1) == 1 for t in seen.values())
    assert seen["z"].untyped_storage().data_ptr() == outputs[0].untyped_storage().data_ptr()
    assert outputs[1].is_contiguous()


# ---- all ways agree -------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_step_by_step_equals_forward(options, dtype, tolerance):
    mamba = lively(options, dtype=dtype)
    x = torch.randn(3, 11, 24).to(dtype)
    cache, whole_cache = mamba.allocate_cache(3), mamba.allocate_cache(3)
    whole = mamba(x, cache=whole_cache)
    steps = torch.cat([mamba.step(x[:, t : t + 1], cache) for t in range(11)], 1)
    assert not steps.requires_grad
    close(steps, whole.detach(), tolerance)
    close(whole, mamba(x), tolerance)
    close(cache.ssm, whole_cache.ssm, tolerance)
    close(cache.conv, whole_cache.conv, tolerance)


def test_without_skip_and_step_bias():
    mamba, x = lively({}), torch.randn(2, 7, 24)
    mamba.D = mamba.dt_proj.bias = None
    cache = mamba.allocate_cache(2)
    close(torch.cat([mamba.step(x[:, t : t + 1], cache) for t in range(7)], 1), mamba(x).detach())


@variants
def test_prefill_in_chunks_equals_whole(options):
    mamba, x = lively(options), torch.randn(2, 20, 24)
    cache = mamba.allocate_cache(2)
    addresses = cache.conv.data_ptr(), cache.ssm.data_ptr()
    with torch.inference_mode():
        whole = mamba(x)
        parts = [mamba(chunk, cache=cache) for chunk in x[:, :19].split([1, 7, 0, 2, 9], dim=1)]
        close(torch.cat([*parts, mamba.step(x[:, 19:], cache)], 1), whole)
    assert addresses == (cache.conv.data_ptr(), cache.ssm.data_ptr())


def test_training_in_chunks_takes_the_cache_as_given():
    mamba, x = lively({}), torch.randn(2, 12, 24, requires_grad=True)
    cache = mamba.allocate_cache(2)
    first = mamba(x[:, :5], cache=cache)
    second = mamba(x[:, 5:], cache=cache)
    close(torch.cat([first, second], 1), mamba(x))
    (dx,) = torch.autograd.grad(second.sum(), x, retain_graph=True)
    assert not dx[:, :5].any()
    assert dx[:, 5:].all()
    gradients(mamba, torch.cat([first, second], 1), x)


@variants
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed_equals_separate(options, index):
    mamba = lively(options)
    sizes = [5, 0, 1, 2, 9, 0]
    xs = [torch.randn(1, n, 24, requires_grad=True) for n in sizes]
    offsets = torch.tensor([0, 5, 5, 6, 8, 17, 17], dtype=index)
    caches, packed_cache = [mamba.allocate_cache(1) for _ in sizes], mamba.allocate_cache(len(sizes))
    separate = torch.cat([mamba(x, cache=cache) for x, cache in zip(xs, caches, strict=True)], 1)
    packed = mamba(torch.cat(xs, 1), cu_seqlens=offsets, cache=packed_cache)
    close(packed, separate)
    close_gradients(gradients(mamba, packed, *xs), gradients(mamba, separate, *xs))
    # the next chunk of every sequence, packed again, goes on where its own sequence stopped
    nexts = [torch.randn(1, n, 24) for n in [2, 3, 0, 4, 1, 6]]
    offsets = torch.tensor([0, 2, 5, 5, 9, 10, 16], dtype=index)
    separate = torch.cat([mamba(x, cache=cache) for x, cache in zip(nexts, caches, strict=True)], 1)
    close(mamba(torch.cat(nexts, 1), cu_seqlens=offsets, cache=packed_cache), separate)
    close(packed_cache.conv, torch.cat([c.conv for c in caches]))
    close(packed_cache.ssm, torch.cat([c.ssm for c in caches]))


@variants
def test_padding_anywhere_changes_nothing(options):
    mamba = lively(options)
    mask = torch.tensor(
        [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 1, 0, 0], [0] * 7]
    )
    mask = mask[:, torch.randperm(7)]
    x = torch.randn(5, 7, 24).masked_fill(mask[..., None] == 0, math.nan).requires_grad_()
    cache, single_caches = mamba.allocate_cache(5), [mamba.allocate_cache(1) for _ in range(5)]
    out = mamba(x, mask=mask, cache=cache)
    assert not out[mask == 0].any()
    single = torch.cat([mamba(x[r : r + 1, mask[r] == 1], cache=single_caches[r])[0] for r in range(5)])
    close(out[mask == 1], single)
    close_gradients(gradients(mamba, out[mask == 1], x), gradients(mamba, single, x))
    follow = torch.randn(5, 1, 24)
    after = mamba.step(follow, cache)
    close(after, torch.cat([mamba.step(follow[r : r + 1], single_caches[r]) for r in range(5)]))


def test_a_bad_value_stays_in_its_sequence_and_future():
    mamba, x = lively({}), torch.randn(1, 12, 24)
    offsets = torch.tensor([0, 4, 12])
    good = mamba(x, cu_seqlens=offsets)
    for bad_step, reached in ((1, range(1, 4)), (6, range(6, 12))):
        bad = x.clone()
        bad[0, bad_step] = math.nan
        out = mamba(bad, cu_seqlens=offsets)
        clean = [t for t in range(12) if t not in reached]
        assert torch.equal(out[:, clean], good[:, clean])
        assert out[0, bad_step].isnan().all()


def test_compiled_whole():
    mamba, x = lively({}), torch.randn(1, 12, 24)
    compiled = torch.compile(mamba, backend="aot_eager", fullgraph=True)
    for options in ({}, {"cu_seqlens": torch.tensor([0, 4, 12])}):
        out, expected = compiled(x, **options), mamba(x, **options)
        close(out, expected)
        close_gradients(gradients(mamba, out), gradients(mamba, expected))
    torch.compiler.reset()


# ---- learning, errors, the example ----------------------------------------------------------------------------------


def test_learns_to_copy():
    """Repeat the first half after a marker: impossible without carrying the tokens through the scan."""
    tokens, half = 4, 4
    model = torch.nn.Sequential(
        torch.nn.Embedding(tokens + 1, 32), Mamba(32, dt_min=0.1, dt_max=1.0), torch.nn.Linear(32, tokens)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        said = torch.randint(tokens, (32, half))
        heard = torch.cat([said, torch.full((32, half), tokens)], 1)
        loss = F.cross_entropy(model(heard)[:, half:].flatten(0, 1), said.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert math.log(tokens) * 0.9 < losses[0]
    assert np.mean(losses[-10:]) < 0.4 * math.log(tokens)


def test_errors_name_the_argument():
    mamba, x = Mamba(24), torch.randn(2, 5, 24)
    offsets = torch.tensor([0, 5])
    with pytest.raises(ValueError, match=r"hidden_states: expected shape \(batch, length, d_model=24\), got \(5, 24\)"):
        mamba(x[0])
    with pytest.raises(ValueError, match="hidden_states: expected batch 1"):
        mamba(x, cu_seqlens=offsets)
    with pytest.raises(ValueError, match="mask"):
        mamba(x[:1], cu_seqlens=offsets, mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="cu_seqlens"):
        mamba(x[:1], cu_seqlens=torch.tensor([0, 3, 6]))
    with pytest.raises(ValueError, match=r"cache\.conv: expected shape \(2, 48, 3\), got \(3, 48, 3\)"):
        mamba(x, cache=mamba.allocate_cache(3))
    with pytest.raises(ValueError, match=r"cache\.ssm"):
        mamba.step(x[:, :1], Mamba(24, d_state=8).allocate_cache(2))
    with pytest.raises(ValueError, match="hidden_states"):
        mamba.step(x, mamba.allocate_cache(2))
    with pytest.raises(ValueError, match="activation"):
        causal_conv1d(x, torch.ones(5, 2), activation="relu")


def test_docstring_example_runs():
    torch.manual_seed(0)
    results = doctest.testmod(scan_kernels.mamba)
    assert results.attempted > 10
    assert results.failed == 0


# ---- the two functions around the scan ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution_is_torchs(width):
    x, weight, bias = torch.randn(2, 6, 9), torch.randn(6, width), torch.randn(6)
    before = torch.randn(2, 6, width - 1)
    out, last = causal_conv1d(x, weight, bias, initial_state=before, activation="silu", return_last_state=True)
    whole = torch.cat([before, x], 2)
    close(out, F.silu(F.conv1d(whole, weight[:, None], bias, groups=6)))
    assert torch.equal(last, whole[..., 9:])
    close(causal_conv1d(x, weight), F.conv1d(F.pad(x, (width - 1, 0)), weight[:, None], groups=6))


def test_convolution_rounds_once():
    x, weight = torch.randn(2, 6, 50).bfloat16(), torch.randn(6, 4).bfloat16()
    exact = F.conv1d(F.pad(x.double(), (3, 0)), weight.double()[:, None], groups=6)
    error = (causal_conv1d(x, weight).double() - exact).abs()
    assert (error <= 0.501 * torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("given", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("softplus", [False, True])
def test_state_update_is_one_step_of_the_scan(given, softplus):
    batch, dim, state = 3, 10, 5
    u, delta, z = torch.randn(3, batch, dim)
    options = {"D": torch.randn(dim), "z": z, "delta_bias": torch.randn(dim)}
    options = {name: options[name] for name in given}
    A, (B, C), h = -torch.rand(dim, state), torch.randn(2, batch, state), torch.randn(batch, dim, state)
    sequence = {**options, "z": z[..., None]} if "z" in given else options
    out, last = selective_scan(
        u[..., None], delta[..., None], A, B[..., None], C[..., None], **sequence,
        delta_softplus=softplus, return_last_state=True, initial_state=h,
    )  # fmt: skip
    close(selective_state_update(h, u, delta, A, B, C, **options, delta_softplus=softplus), out[..., 0])
    close(h, last)
