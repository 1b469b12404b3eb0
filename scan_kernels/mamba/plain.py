"""The short convolution and the one-step update of the Mamba block, in plain torch, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, past: int, silu: bool) -> Tensor:
    """out_t = act(bias + Σ_k weight_k x_{t-past+k}), where steps before the first are zeros; act is silu or nothing.

    Shapes: x (batch, steps, dim), weight (dim, width), bias (dim,); out (batch, steps + past - (width-1), dim), in the
    dtype of x. Sums are float32.
    """
    x = F.pad(x, (0, 0, past, 0))
    outputs = x.shape[1] - (weight.shape[1] - 1)
    y = bias.float() if bias is not None else weight.new_zeros(x.shape[2], dtype=torch.float32)
    for k, tap in enumerate(weight.unbind(1)):
        y = torch.addcmul(y, x[:, k : k + outputs], tap)  # float32, as y is
    return (F.silu(y) if silu else y).to(x.dtype)


def update(
    state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, softplus: bool,
) -> Tensor:  # fmt: skip
    """``selective_state_update``."""
    dtype = u.dtype
    u, delta, A, B, C = (t.float() for t in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.float()
    if softplus:
        delta = F.softplus(delta)
    state.mul_(torch.exp(delta[..., None] * A)).add_((delta * u)[..., None] * B[:, None])
    y = (state * C[:, None]).sum(-1)
    if D is not None:
        y = y + D.float() * u
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(dtype)
