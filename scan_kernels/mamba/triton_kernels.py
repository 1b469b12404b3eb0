"""Triton kernels of the Mamba block: the short convolution, its gradients, and one step of the scan.

A program of the convolution owns some channels of one piece of a row's time and walks over it in tiles [BT, BD] =
(steps, channels). As in the scan's kernels, the last axis is dealt out to lanes and warps first, so that a thread holds
all steps of its channels, and shifting a tile in time (``delayed``) moves nothing: every value is loaded once, and
computed once but for what a piece needs of its neighbours. Where a target deals the axes out differently, all this
stays right, only slower.

Row r of x is the newest of output r - AHEAD; rows before the first are zeros, of which the first output sees PAST.
"""

from __future__ import annotations

import triton
import triton.language as tl

LENGTHS = ("rows", "outputs", "span", "pieces")  # another length is no reason to compile again


@triton.jit
def at_row(tile, r: tl.constexpr):
    """tile[r] of tile [., BD], as [1, BD]; summed as integers, where adding 0 folds away and touches no NaN."""
    bits = tl.where((tl.arange(0, tile.shape[0]) == r)[:, None], tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0)[None, :].to(tl.float32, bitcast=True)


@triton.jit
def put(tile, r: tl.constexpr, x):
    """The tile with x as its row r."""
    return tl.where((tl.arange(0, tile.shape[0]) == r)[:, None], x, tile)


@triton.jit
def delayed(tile, before, K: tl.constexpr):
    """What was K <= BT steps ago at each step of the tile; ``before`` is the tile before it."""
    BT: tl.constexpr = tile.shape[0]
    found = tile
    if K:
        for r in tl.static_range(BT):
            if r < K:
                found = put(found, r, at_row(before, BT + r - K))
            else:
                found = put(found, r, at_row(tile, r - K))
    return found


@triton.jit
def place(rows, dim, span, pieces, BD: tl.constexpr):
    """(batch entry, first row, one past the last, channels) of this program.

    Loads are of 4 channels a thread, as the stores of float32 sums are: 8, one load of bfloat16, fill the registers.
    """
    blocks = tl.cdiv(dim, BD)
    pid = tl.program_id(0).to(tl.int64)
    block, pid = pid % blocks, pid // blocks
    first = (pid % pieces) * span
    d = (block * BD + tl.arange(0, BD)).to(tl.int32)
    return pid // pieces, first, tl.minimum(first + span, rows), tl.max_contiguous(d, 4)


@triton.jit
def load_rows(x, first, lowest, stop, step, d, dim, BT: tl.constexpr):
    """Rows first .. first + BT of x in float32, zeros outside lowest .. stop."""
    r = first + tl.arange(0, BT)
    mask = ((r >= lowest) & (r < stop))[:, None] & (d < dim)[None, :]
    return tl.load(x + r[:, None] * step + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_taps(weight, bias, d, dim, WIDTH: tl.constexpr, TAPS: tl.constexpr):
    """(taps [TAPS, BD], bias [1, BD]) in float32; TAPS: a power of two that holds WIDTH."""
    k = tl.arange(0, TAPS)
    mask = (k < WIDTH)[:, None] & (d < dim)[None, :]
    taps = tl.load(weight + d[None, :] * WIDTH + k[:, None], mask=mask, other=0.0).to(tl.float32)
    shift = tl.zeros([1, d.shape[0]], tl.float32)
    if bias is not None:
        shift = tl.load(bias + d, mask=d < dim, other=0.0).to(tl.float32)[None, :]
    return taps, shift


@triton.jit
def convolved(tile, before, taps, shift, WIDTH: tl.constexpr):
    y = tl.broadcast_to(shift, tile.shape)
    for k in tl.static_range(WIDTH):
        y += at_row(taps, k) * delayed(tile, before, WIDTH - 1 - k)
    return y


@triton.jit(do_not_specialize=LENGTHS)
def convolution_kernel(
    x, weight, bias, out, rows, outputs, dim, span, pieces, x_batch, x_step,
    WIDTH: tl.constexpr, TAPS: tl.constexpr, PAST: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out (batch, outputs, dim). Programs: batch x pieces of the outputs x blocks of channels."""
    AHEAD: tl.constexpr = WIDTH - 1 - PAST
    batch, first, stop, d = place(outputs, dim, span, pieces, BD)
    x += batch * x_batch
    out += batch * outputs * dim
    taps, shift = load_taps(weight, bias, d, dim, WIDTH, TAPS)
    before = load_rows(x, first + AHEAD - BT, tl.maximum(first - PAST, 0), rows, x_step, d, dim, BT)
    for t0 in tl.range(first, stop, BT, num_stages=STAGES):
        tile = load_rows(x, t0 + AHEAD, 0, stop + AHEAD, x_step, d, dim, BT)
        y = convolved(tile, before, taps, shift, WIDTH)
        if SILU:
            y *= tl.sigmoid(y)
        t = t0 + tl.arange(0, BT)
        tl.store(out + t[:, None] * dim + d[None, :], y, mask=(t < stop)[:, None] & (d < dim)[None, :])
        before = tile


@triton.jit(do_not_specialize=LENGTHS)
def convolution_backward_kernel(
    x, weight, bias, dout, dx, sums, rows, outputs, dim, span, pieces, x_batch, x_step, dout_batch, dout_step,
    WIDTH: tl.constexpr, TAPS: tl.constexpr, PAST: tl.constexpr, SILU: tl.constexpr, SUMS: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx (batch, rows, dim), and the piece's share of the weight's and the bias's gradient, in ``sums`` (batch, pieces,
    WIDTH + 1, dim). Programs: batch x pieces of the rows x blocks of channels.

    A piece takes into its sums the outputs whose newest row it owns, and walks WIDTH - 1 rows on for its last dx.
    """
    TAIL: tl.constexpr = WIDTH - 1
    AHEAD: tl.constexpr = TAIL - PAST
    batch, first, stop, d = place(rows, dim, span, pieces, BD)
    x += batch * x_batch
    dout += batch * dout_batch
    dx += batch * rows * dim
    d_ok = (d < dim)[None, :]
    taps, shift = load_taps(weight, bias, d, dim, WIDTH, TAPS)
    before = load_rows(x, first - BT, tl.maximum(first - TAIL, 0), rows, x_step, d, dim, BT)
    dy_before = tl.zeros([BT, BD], tl.float32)
    total = tl.zeros([SUMS, BD], tl.float32)
    end = stop + TAIL
    for r0 in tl.range(first, end, BT, num_stages=STAGES):
        tile = load_rows(x, r0, 0, tl.minimum(end, rows), x_step, d, dim, BT)
        dy = load_rows(dout, r0 - AHEAD, 0, tl.minimum(end - AHEAD, outputs), dout_step, d, dim, BT)
        r = r0 + tl.arange(0, BT)
        if SILU:
            y = convolved(tile, before, taps, shift, WIDTH)
            s = tl.sigmoid(y)
            # where there is no output, y may be NaN
            dy = tl.where(((r >= AHEAD) & (r < outputs + AHEAD))[:, None], dy * (s + s * y * (1.0 - s)), 0.0)
        dx_tile = tl.zeros([BT, BD], tl.float32)
        own = tl.where((r < stop)[:, None], dy, 0.0)
        for k in tl.static_range(WIDTH):
            dx_tile += at_row(taps, k) * delayed(dy, dy_before, k)
            share = tl.sum(own * delayed(tile, before, TAIL - k), axis=0)[None, :]
            total = put(total, k, at_row(total, k) + share)
        total = put(total, WIDTH, at_row(total, WIDTH) + tl.sum(own, axis=0)[None, :])
        oldest = r - TAIL  # of output r - AHEAD, and so complete now
        mask = ((oldest >= first) & (oldest < stop))[:, None] & d_ok
        tl.store(dx + oldest[:, None] * dim + d[None, :], dx_tile, mask=mask)
        before = tile
        dy_before = dy
    k = tl.arange(0, SUMS)
    sums += (batch * pieces + first // span) * (WIDTH + 1) * dim
    tl.store(sums + k[:, None] * dim + d[None, :], total, mask=(k < WIDTH + 1)[:, None] & d_ok)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to a few ulp: log1p(e) = 2 atanh(e / (2 + e)), atanh by a polynomial."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    p = ((0.14006009 * q + 0.14000899) * q + 0.20010764) * q + 0.33333208
    return tl.maximum(x, 0.0) + 2.0 * (s + s * q * p)


@triton.jit
def update_kernel(
    state, u, delta, A, B, C, D, z, bias, out, dim, states,
    state_batch, state_dim, state_n, u_batch, delta_batch, A_dim, B_batch, C_batch, z_batch,
    SOFTPLUS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One step of the scan, in place on ``state``. Programs: batch x blocks of channels, on tiles [BD, BN].

    An argument that is None switches its part off.
    """
    blocks = tl.cdiv(dim, BD)
    pid = tl.program_id(0).to(tl.int64)
    batch, d = pid // blocks, (pid % blocks) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    d_ok, n_ok = d < dim, n < states
    mask = d_ok[:, None] & n_ok[None, :]
    value = tl.load(u + batch * u_batch + d, mask=d_ok, other=0.0).to(tl.float32)
    size = tl.load(delta + batch * delta_batch + d, mask=d_ok, other=0.0).to(tl.float32)
    if bias is not None:
        size += tl.load(bias + d, mask=d_ok, other=0.0).to(tl.float32)
    if SOFTPLUS:
        size = softplus(size)
    rate = tl.load(A + d[:, None] * A_dim + n[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(B + batch * B_batch + n, mask=n_ok, other=0.0).to(tl.float32)
    c = tl.load(C + batch * C_batch + n, mask=n_ok, other=0.0).to(tl.float32)
    at = state + batch * state_batch + (d[:, None] * state_dim + n[None, :] * state_n)
    h = tl.exp(size[:, None] * rate) * tl.load(at, mask=mask, other=0.0) + (size * value)[:, None] * b[None, :]
    tl.store(at, h, mask=mask)
    y = tl.sum(tl.where(n_ok[None, :], h * c[None, :], 0.0), axis=1)
    if D is not None:
        y += tl.load(D + d, mask=d_ok, other=0.0).to(tl.float32) * value
    if z is not None:
        gate = tl.load(z + batch * z_batch + d, mask=d_ok, other=0.0).to(tl.float32)
        y *= gate * tl.sigmoid(gate)
    tl.store(out + batch * dim + d, y, mask=d_ok)
