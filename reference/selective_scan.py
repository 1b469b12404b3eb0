"""Selective scan (S6), sequential, in float64: the meaning of every kernel in this library.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv:2312.00752), Algorithm 2 with
the discretisation of section 2 (zero-order hold for A, Euler for B), one channel d and state n at a time:

    Δ_t = softplus(delta_t + delta_bias)                       (softplus and bias where asked for)
    h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t                     h_{-1} = initial_state, or 0
    y_t = Σ_n C_t h_t + D u_t
    out_t = y_t silu(z_t)                                      (where there is a gate z)

Shapes: u, delta, z (batch, dim, length); A (dim, state); B, C (batch, state, length), (batch, groups, state, length)
or constant (dim, state); D, delta_bias (dim,); initial_state, last_state (rows, dim, state). With cu_seqlens, batch
is 1 and row i is steps cu_seqlens[i] .. cu_seqlens[i+1]; otherwise rows are batch entries.
"""

from __future__ import annotations

import numpy as np


def softplus(x):
    return np.logaddexp(0.0, x)


def sigmoid(x):
    return np.exp(-np.logaddexp(0.0, -x))


def rows(batch, length, cu_seqlens):
    """(batch entry, first step, one past the last step) of every independent sequence."""
    if cu_seqlens is None:
        return [(b, 0, length) for b in range(batch)]
    offsets = [int(o) for o in cu_seqlens]
    return [(0, offsets[i], offsets[i + 1]) for i in range(len(offsets) - 1)]


def per_channel(M, batch, dim, length):
    """B or C, whatever its form, as (batch, dim, state, length): what each channel sees."""
    M = np.asarray(M, np.float64)
    if M.ndim == 2:
        return np.broadcast_to(M[None, :, :, None], (batch, dim, M.shape[1], length))
    if M.ndim == 3:
        M = M[:, None]
    return np.repeat(M, dim // M.shape[1], axis=1)


def from_channels(dM, M):
    """Gradient of ``per_channel``: sum over whatever the channels shared."""
    M = np.asarray(M)
    if M.ndim == 2:
        return dM.sum(axis=(0, 3))
    batch, dim, state, length = dM.shape
    groups = 1 if M.ndim == 3 else M.shape[1]
    return dM.reshape(batch, groups, dim // groups, state, length).sum(axis=2).reshape(M.shape)


def _prepare(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    u, delta, A = (np.asarray(x, np.float64) for x in (u, delta, A))
    D, z, delta_bias = (None if x is None else np.asarray(x, np.float64) for x in (D, z, delta_bias))
    batch, dim, length = u.shape
    raw = delta if delta_bias is None else delta + delta_bias[:, None]
    Δ = softplus(raw) if delta_softplus else raw
    return u, raw, Δ, A, per_channel(B, batch, dim, length), per_channel(C, batch, dim, length), D, z


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None, cu_seqlens=None
):
    """The equations above. Returns (out (batch, dim, length), last_state (rows, dim, state)), float64."""
    u, _, Δ, A, B, C, D, z = _prepare(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    batch, dim, length = u.shape
    spans = rows(batch, length, cu_seqlens)
    y = np.zeros_like(u)
    last_state = np.zeros((len(spans), dim, A.shape[1]))
    with np.errstate(all="ignore"):  # tests send NaN, Inf and underflowing decays through on purpose
        for r, (b, start, stop) in enumerate(spans):
            h = last_state[r] if initial_state is None else np.array(initial_state[r], np.float64)
            for t in range(start, stop):
                h = np.exp(Δ[b, :, t, None] * A) * h + (Δ[b, :, t] * u[b, :, t])[:, None] * B[b, :, :, t]
                y[b, :, t] = (C[b, :, :, t] * h).sum(-1)
            last_state[r] = h
        if D is not None:
            y = y + D[:, None] * u
        return (y if z is None else y * (z * sigmoid(z))), last_state


def selective_scan_backward(
    dout, dlast_state, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None,
    cu_seqlens=None,
):  # fmt: skip
    """Gradients of Σ dout*out + Σ dlast_state*last_state, by the adjoint recurrence.

    With dy = dout silu(z) and G_t = ∂loss/∂h_t, running backwards in time:

        G_t = C_t dy_t + exp(Δ_{t+1} A) G_{t+1}                G_L = dlast_state, or 0
        du_t = Δ_t Σ_n G_t B_t + D dy_t
        dΔ_t = u_t Σ_n G_t B_t + Σ_n A (exp(Δ_t A) h_{t-1}) G_t
        dA = Σ_t Δ_t exp(Δ_t A) h_{t-1} G_t
        dB_t = Σ_d Δ_t u_t G_t,   dC_t = Σ_d dy_t h_t,   dinitial_state = exp(Δ_0 A) G_0

    Returns a dict with the names of the inputs: u, delta, A, B, C and, where given, D, z, delta_bias, initial_state.
    """
    B_given, C_given = B, C
    u, raw, Δ, A, B, C, D, z = _prepare(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    batch, _, length = u.shape
    spans = rows(batch, length, cu_seqlens)
    dout = np.asarray(dout, np.float64)
    with np.errstate(all="ignore"):
        gate = 1.0 if z is None else z * sigmoid(z)
        dy = dout * gate
        y = np.zeros_like(u)
        du = np.zeros_like(u) if D is None else D[:, None] * dy
        dΔ = np.zeros_like(u)
        dA = np.zeros_like(A)
        dB, dC = np.zeros(B.shape), np.zeros(C.shape)
        dinitial = np.zeros((len(spans), *A.shape))
        for r, (b, start, stop) in enumerate(spans):
            h = np.zeros(A.shape) if initial_state is None else np.array(initial_state[r], np.float64)
            entering = []  # h_{t-1}, for every step of this row
            for t in range(start, stop):
                entering.append(h)
                h = np.exp(Δ[b, :, t, None] * A) * h + (Δ[b, :, t] * u[b, :, t])[:, None] * B[b, :, :, t]
                y[b, :, t] = (C[b, :, :, t] * h).sum(-1)
                dC[b, :, :, t] = dy[b, :, t, None] * h
            g = np.zeros(A.shape) if dlast_state is None else np.array(dlast_state[r], np.float64)
            for t in reversed(range(start, stop)):
                decay = np.exp(Δ[b, :, t, None] * A)
                G = C[b, :, :, t] * dy[b, :, t, None] + g
                GB = (G * B[b, :, :, t]).sum(-1)
                through_decay = decay * entering[t - start] * G
                du[b, :, t] += Δ[b, :, t] * GB
                dΔ[b, :, t] = u[b, :, t] * GB + (A * through_decay).sum(-1)
                dA += Δ[b, :, t, None] * through_decay
                dB[b, :, :, t] = (Δ[b, :, t] * u[b, :, t])[:, None] * G
                g = decay * G
            dinitial[r] = g
        ddelta = dΔ * sigmoid(raw) if delta_softplus else dΔ
        dB, dC = from_channels(dB, B_given), from_channels(dC, C_given)
        gradients = {"u": du, "delta": ddelta, "A": dA, "B": dB, "C": dC}
        if D is not None:
            gradients["D"] = (dy * u).sum((0, 2))
            y = y + D[:, None] * u
        if z is not None:
            gradients["z"] = dout * y * (sigmoid(z) * (1 + z * sigmoid(-z)))
        if delta_bias is not None:
            gradients["delta_bias"] = ddelta.sum((0, 2))
        if initial_state is not None:
            gradients["initial_state"] = dinitial
        return gradients
