"""The short convolution and the one-step update of the Mamba block, in plain torch, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    which each row would go on. Sums are float32. Both carry gradients.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation: expected None or 'silu', got {activation!r}")
    _, dim, length = x.shape
    tail = weight.shape[1] - 1
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    steps = x.transpose(1, 2)  # channels innermost: what the projections around the convolution read and write
    before = steps.new_zeros(rows, tail, dim) if initial_state is None else initial_state.transpose(1, 2).to(x.dtype)

    # `padded` gives every row its own `tail` steps of past, so that the taps below need no case distinctions
    if cu_seqlens is None:
        padded = torch.cat([before, steps], dim=1)
        last = padded[:, length:]
    else:
        time, row = torch.arange(length, device=x.device), torch.arange(rows, device=x.device)
        offsets = cu_seqlens.long().clamp(0, length)
        starts, stops = offsets[:-1], offsets[1:]
        owner = torch.searchsorted(stops, time, right=True).clamp(max=rows - 1)
        place = time + (owner + 1) * tail
        past = (starts + row * tail)[:, None] + torch.arange(tail, device=x.device)
        padded = steps.new_zeros(length + rows * tail, dim).index_copy(0, place, steps[0])
        padded = padded.index_copy(0, past.flatten(), before.flatten(0, 1))
        last = padded[past + (stops - starts)[:, None]]
        padded = padded[None]

    outputs = padded.shape[1] - tail
    y = bias.float() if bias is not None else weight.new_zeros(dim, dtype=torch.float32)
    for k, tap in enumerate(weight.unbind(1)):
        y = torch.addcmul(y, padded[:, k : k + outputs], tap)  # float32, as y is
    if cu_seqlens is not None:
        y = y[:, place - tail]
    out = (F.silu(y) if activation else y).to(x.dtype).transpose(1, 2)
    return (out, last.transpose(1, 2)) if return_last_state else out


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
    dtype = u.dtype
    u, delta, A, B, C = (t.float() for t in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.float()
    if delta_softplus:
        delta = F.softplus(delta)
    state.mul_(torch.exp(delta[..., None] * A)).add_((delta * u)[..., None] * B[:, None])
    y = (state * C[:, None]).sum(-1)
    if D is not None:
        y = y + D.float() * u
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(dtype)
