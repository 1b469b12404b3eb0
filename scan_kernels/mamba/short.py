"""The short convolution and the single step of the Mamba block: by Triton kernels on a GPU, else in plain torch."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from . import plain

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of what the kernels take


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time: each channel with its own few taps.

        y_t = bias + Σ_k weight_k x_{t-(width-1)+k},   k = 0 .. width-1
        out_t = silu(y_t) where activation is "silu", else y_t

    What comes before a sequence's first step is initial_state, or 0; never another sequence's end.

    Shapes: x (batch, dim, length), any strides; weight (dim, width); bias (dim,); initial_state (rows, dim, width-1),
    oldest first. With cu_seqlens (sequences + 1,) batch is 1 and row i is steps cu_seqlens[i] .. cu_seqlens[i+1];
    otherwise rows are batch entries.
    Returns: out, shaped like x, in its dtype, dim-contiguous; with ``return_last_state`` also the initial_state with
    which each row would go on. Sums are float32. Both carry gradients; by the kernels no second ones, and those of the
    weight and the bias repeat bit by bit.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation: expected None or 'silu', got {activation!r}")
    _, dim, length = x.shape
    tail = weight.shape[1] - 1
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    steps = x.transpose(1, 2)  # channels innermost: what the projections around the convolution read and write
    # `padded` gives every row its own `tail` steps of past, but for zeros before the first, which need no memory
    fresh = initial_state is None and cu_seqlens is None
    if initial_state is not None:
        before = initial_state.transpose(1, 2).to(x.dtype)
    elif not fresh:
        before = steps.new_zeros(rows, tail, dim)
    if fresh:
        padded = steps
    elif cu_seqlens is None:
        padded = torch.cat([before, steps], dim=1)
    else:
        time, row = torch.arange(length, device=x.device), torch.arange(rows, device=x.device)
        offsets = cu_seqlens.long().clamp(0, length)
        starts, stops = offsets[:-1], offsets[1:]
        owner = torch.searchsorted(stops, time, right=True).clamp(max=rows - 1)
        place = time + (owner + 1) * tail
        past = (starts + row * tail)[:, None] + torch.arange(tail, device=x.device)
        padded = steps.new_zeros(length + rows * tail, dim).index_copy(0, place, steps[0])
        padded = padded.index_copy(0, past.flatten(), before.flatten(0, 1))[None]

    out = _convolve(padded, weight, bias, tail if fresh else 0, activation == "silu")
    if cu_seqlens is not None:
        out = out[:, place - tail]
    out = out.transpose(1, 2)
    if not return_last_state:
        return out
    if cu_seqlens is not None:
        last = padded[0, past + (stops - starts)[:, None]]
    elif fresh:
        last = F.pad(steps[:, max(0, length - tail) :], (0, 0, max(0, tail - length), 0))
    else:
        last = padded[:, length:]
    return out, last.transpose(1, 2)


def selective_state_update(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """One step of the selective scan: writes the new state over ``state`` and returns out.

        Δ = softplus(delta + delta_bias)             (softplus and bias where asked for)
        h = exp(Δ A) h + Δ u B
        out = (Σ_n C h + D u) silu(z)                (skip and gate where given)

    Shapes: state (batch, dim, state) float32; u, delta, z (batch, dim); A (dim, state); B, C (batch, state);
    D, delta_bias (dim,). Computed in float32; out (batch, dim) has the dtype of u.
    """
    arguments = (state, u, delta, A, B, C, D, z, delta_bias)
    # no kernel computes the gradients of a step
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments)
    fused = not recorded and state.dtype == torch.float32 and _fused(*arguments)
    return (_update if fused else plain.update)(*arguments, delta_softplus)


_FOUND: dict[str, bool] = {}  # kind of device: whether the kernels run there


def _kernels_run_on(kind: str) -> bool:
    """Looked up once. Not functools.cache, which torch.compile warns of; what torch offers for it imports Triton."""
    if kind not in _FOUND:
        _FOUND[kind] = _look(kind)
    return _FOUND[kind]


def _look(kind: str) -> bool:
    """Triton is imported only where its kernels might run."""
    if kind != "cuda" and not (kind == "cpu" and os.environ.get("TRITON_INTERPRET")):
        return False
    try:
        from . import triton
    except ImportError:
        return False
    return kind == "cuda" or triton.INTERPRETED


def _fused(*tensors: Tensor | None) -> bool:
    given = [t for t in tensors if t is not None]
    return all(t.dtype in DTYPES for t in given) and _kernels_run_on(given[0].device.type)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, past: int, silu: bool) -> Tensor:
    return (_convolution if _fused(x, weight, bias) else plain.convolve)(x, weight, bias, past, silu)


# ---- the registered ops ---------------------------------------------------------------------------------------------


@torch.library.custom_op("scan_kernels::short_convolution", mutates_args=())
def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, past: int, silu: bool) -> Tensor:
    from . import triton

    return triton.convolve(x, weight, bias, past, silu)


@_convolution.register_fake
def _(x, weight, bias, past, silu):
    return x.new_empty(x.shape[0], x.shape[1] + past - (weight.shape[1] - 1), x.shape[2])


@torch.library.custom_op("scan_kernels::short_convolution_backward", mutates_args=())
def _convolution_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, past: int, silu: bool
) -> tuple[Tensor, Tensor]:
    """(dx, float32 gradients of the taps and last of the bias (width + 1, dim))."""
    from . import triton

    return triton.convolve_backward(dout, x, weight, bias, past, silu)


@_convolution_backward.register_fake
def _(dout, x, weight, bias, past, silu):
    return x.new_empty(x.shape), x.new_empty(weight.shape[1] + 1, x.shape[2], dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.past, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout):
    x, weight, bias = ctx.saved_tensors
    dx, sums = _convolution_backward(dout, x, weight, bias, ctx.past, ctx.silu)
    return dx, sums[:-1].t().to(weight.dtype), None if bias is None else sums[-1].to(bias.dtype), None, None


def _second(ctx, *_):
    raise RuntimeError("causal_conv1d: second derivatives (the gradient of its gradient) are not implemented on a GPU")


_convolution.register_autograd(_backward, setup_context=_setup_context)
_convolution_backward.register_autograd(_second)


@torch.library.custom_op("scan_kernels::state_update", mutates_args={"state"})
def _update(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
) -> Tensor:
    from . import triton

    return triton.update(state, u, delta, A, B, C, D, z, delta_bias, softplus)


@_update.register_fake
def _(state, u, delta, A, B, C, D, z, delta_bias, softplus):
    return u.new_empty(u.shape)
