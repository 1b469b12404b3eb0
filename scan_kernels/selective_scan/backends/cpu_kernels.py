"""Numba kernels of the ``cpu`` backend: lanes are channels; a few states at a time stay in registers along time.

A task takes a part (a few blocks of 16 channels of one group, which share tiles of B and C) through a chunk of rows.
Time is cut into tiles. A channel block first gets Δ and Δu for all steps of a tile; then, a few states at a time, a
``sweep`` runs the recurrence along it; what is left is done per element. The backward runs the same sweep forwards
between two kept states, leaving decays and states in scratch, and then the adjoint recurrence backwards. Sums that
cross lanes (dB, dC) stay 16 wide over all blocks of a part and are added up across lanes once.

What a kernel is told stands in one record (``CALL``): addresses, strides in bytes (0 for what is absent) and sizes.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .cpu_simd import (
    FLOAT32,
    LANES,
    ROW,
    TOGETHER,
    broadcast_few,
    decay,
    dot,
    entry,
    fma,
    gather,
    inlined,
    load,
    load_few,
    quiet,
    read_float,
    repeat,
    scatter,
    sigmoid,
    softplus,
    splat,
    store,
    store_few,
    store_unaligned,
    totals,
    variant,
    write_float,
)

TILES = 9  # tiles a channel block needs in the backward
SKEW = 5  # rows between scratch arrays: walked together at 4096 bytes' distance, a store would hold up later loads
SPAN = 4096  # numbers that a task of ``add_up`` adds up
LOG2E = np.float32(1.4426950408889634)
LOG2E_REST = np.float32(1.4426950408889634 - float(LOG2E))
LN2 = np.float32(0.6931471805599453)

_ELEMENTS = ("u", "delta", "z", "out", "dout", "du", "ddelta", "dz")  # (batch, dim, length), element kind ``kind``
_PROJECTIONS = ("B", "C")  # (batch, groups, state, length) of kind ``kind``, or (dim, state) float32
_FLOATS = (
    "A", "D", "delta_bias", "initial_state", "last_state", "states",
    "dlast_state", "dinitial_state", "dA", "dB", "dC", "dD", "ddelta_bias",
)  # fmt: skip
_SIZES = (
    "batch", "dim", "length", "state", "groups", "rows", "kind", "softplus", "checkpoint", "constant_B", "constant_C",
    "part_blocks", "parts", "chunks", "steps", "offsets",
)  # fmt: skip
CALL = np.dtype(
    [(f"{name}{axis}", np.int64) for name in _ELEMENTS for axis in ("", "_b", "_d", "_t")]
    + [(f"{name}{axis}", np.int64) for name in _PROJECTIONS for axis in ("", "_b", "_g", "_n", "_t")]
    + [(name, np.int64) for name in _FLOATS + _SIZES]
)
# One task's scratch: its part of the work, and addresses. One tile or state for every channel block, or shared.
WORK = np.dtype(
    [
        (name, np.int64)
        for name in (
            "group", "begin", "end", "blocks", "padded", "tile", "zeros", "spare", "D", "bias", "A", "h", "fixed_B",
            "fixed_C", "B", "C", "tiles", "dD", "dbias", "dA", "fixed_dB", "fixed_dC", "entering", "decays", "states",
            "sum_B", "sum_C",
        )
    ]
)  # fmt: skip

_njit = njit(error_model="numpy")


@inlined
def _ceil(a, b):
    return (a + b - 1) // b


@_njit
def _part(c, part):
    """(group, first channel, one past the last channel) of a part."""
    size = c.dim // c.groups
    per_group = _ceil(_ceil(size, LANES), c.part_blocks)
    group = part // per_group
    first = group * size + (part % per_group) * c.part_blocks * LANES
    return group, first, min(first + c.part_blocks * LANES, (group + 1) * size)


@_njit
def _span(c, row, offsets):
    """(batch entry, first step, one past the last step, first slot of the states tensor) of a row."""
    if c.offsets:
        return 0, offsets[row], offsets[row + 1], (offsets[row] // c.checkpoint + row if c.checkpoint else 0)
    return row, 0, c.length, (row * _ceil(c.length, c.checkpoint) if c.checkpoint else 0)


@_njit
def _clear(address, rows):
    for i in range(0, rows * ROW, ROW):
        store(address + i, splat(0.0))


@_njit
def _by_channel(address, per_channel, first, lanes, scratch, zeros):
    """Lanes = channels: scratch row n = entry n of each channel of a contiguous float32 (..., dim, per_channel)."""
    size = 4 * per_channel
    gather(FLOAT32, scratch, address + first * size, size, 4, lanes, per_channel, zeros)


@_njit
def _to_channel(address, per_channel, first, lanes, scratch, spare):
    """The inverse of ``_by_channel``."""
    size = 4 * per_channel
    scatter(FLOAT32, scratch, address + first * size, size, 4, lanes, per_channel, spare)


@_njit
def _pack(c, address, stride_n, stride_t, steps, scratch, zeros):
    """B or C of one tile: for every 16 states a tile whose lanes are states, ``c.steps`` rows apart."""
    for n in range(0, c.state, LANES):
        gather(
            c.kind, scratch + n // LANES * c.steps * ROW, address + n * stride_n, stride_n, stride_t,
            min(LANES, c.state - n), steps, zeros,
        )  # fmt: skip


@_njit
def _step_sizes(c, steps, bias, delta, u, du):
    """delta -> Δ, in place, and Δ u."""
    for i in range(0, steps * ROW, ROW):
        x = load(delta + i) + bias
        if c.softplus:
            x = softplus(x)
        store(du + i, load(u + i) * x)
        store(delta + i, quiet(x))


def _sweep(constant_B, constant_C):
    """A few states along steps first .. last of a tile: h in registers, C·h added to y."""

    @variant(constant_B, constant_C)
    def sweep(first, last, A, h, delta, du, y, B, C):
        a, state = load_few(A), load_few(h)
        for i in range(first * ROW, last * ROW, ROW):
            b = load_few(B) if constant_B else broadcast_few(B + i)
            state = fma(decay(load(delta + i), a), state, load(du + i) * b)
            c = load_few(C) if constant_C else broadcast_few(C + i)
            store(y + i, load(y + i) + dot(state, c))
        store_few(h, state)

    return sweep


_sweep_vv, _sweep_vc = _sweep(False, False), _sweep(False, True)
_sweep_cv, _sweep_cc = _sweep(True, False), _sweep(True, True)


@_njit
def _at_state(c, constant, tile, n):
    """Where states n .. n+3 of B or C stand: rows of channels if constant, else lanes of a packed tile."""
    if constant:
        return tile + n * ROW
    return tile + n // LANES * c.steps * ROW + n % LANES * 4


@_njit
def _run(c, first, last, A, h, delta, du, y, B, C):
    """All states along steps first .. last of a tile."""
    for n in range(0, c.state, TOGETHER):
        a, s = A + n * ROW, h + n * ROW
        b, g = _at_state(c, c.constant_B, B, n), _at_state(c, c.constant_C, C, n)
        if c.constant_B and c.constant_C:
            _sweep_cc(first, last, a, s, delta, du, y, b, g)
        elif c.constant_B:
            _sweep_cv(first, last, a, s, delta, du, y, b, g)
        elif c.constant_C:
            _sweep_vc(first, last, a, s, delta, du, y, b, g)
        else:
            _sweep_vv(first, last, a, s, delta, du, y, b, g)


@_njit
def _lay_out(c, w, at):
    """Give every array of scratch its address, from ``at`` on. Returns the first address behind them."""
    state = w.padded * w.blocks
    packed = w.padded // LANES * c.steps + SKEW * ROW
    w.zeros, w.spare, at = at, at + ROW, at + 2 * ROW
    w.D, w.bias, at = at, at + w.blocks * ROW, at + 2 * w.blocks * ROW
    w.A, w.h, at = at, at + state, at + 2 * state
    w.fixed_B, w.fixed_C, at = at, at + state * c.constant_B, at + state * (c.constant_B + c.constant_C)
    w.B, w.C, at = at, at + packed, at + 2 * packed
    w.tiles = at
    if not c.dout:
        return at + 4 * w.tile
    at += TILES * w.blocks * w.tile
    w.dD, w.dbias, at = at, at + w.blocks * ROW, at + 2 * w.blocks * ROW
    w.dA, at = at, at + state
    w.fixed_dB, w.fixed_dC, at = at, at + state * c.constant_B, at + state * (c.constant_B + c.constant_C)
    w.entering = at
    at += state * max(_ceil(c.steps, c.checkpoint), _ceil(min(c.checkpoint, c.length), c.steps))
    # summing lanes reads whole groups of 16 steps
    sums = (TOGETHER * (min(c.steps, c.checkpoint) + LANES) + SKEW) * ROW
    w.decays, w.states, w.sum_B, w.sum_C = at, at + sums, at + 2 * sums, at + 3 * sums
    return at + 4 * sums


@_njit
def _keep(buffer, work):
    """Called last: Numba frees an array after its last use by name, and knows nothing of addresses and records."""
    buffer[0] = 0.0
    work[0].zeros = 0


@_njit
def _block(w, k):
    """(first channel, number of channels) of a part's k-th block."""
    first = w.begin + k * LANES
    return first, min(LANES, w.end - first)


@_njit
def _prepare(c, w, part):
    """Scratch for a part, zeroed, with all that stays the same along time. The caller must keep what is returned."""
    w.group, w.begin, w.end = _part(c, part)
    w.blocks = _ceil(w.end - w.begin, LANES)
    w.padded = _ceil(c.state, LANES) * LANES * ROW
    w.tile = (c.steps + SKEW) * ROW
    buffer = np.zeros(_lay_out(c, w, 0) // 4 + LANES, np.float32)
    _lay_out(c, w, (buffer.ctypes.data + ROW - 1) // ROW * ROW)
    for k in range(w.blocks):
        first, lanes = _block(w, k)
        _by_channel(c.A, c.state, first, lanes, w.A + k * w.padded, w.zeros)
        for n in range(0, c.state * ROW, ROW):
            at = k * w.padded + n
            a = quiet(load(w.A + at))
            store(w.A + at, fma(a, splat(LOG2E), a * splat(LOG2E_REST)))
        if c.constant_B:
            _by_channel(c.B, c.state, first, lanes, w.fixed_B + k * w.padded, w.zeros)
        if c.constant_C:
            _by_channel(c.C, c.state, first, lanes, w.fixed_C + k * w.padded, w.zeros)
        if c.D:
            _by_channel(c.D, 1, first, lanes, w.D + k * ROW, w.zeros)
        if c.delta_bias:
            _by_channel(c.delta_bias, 1, first, lanes, w.bias + k * ROW, w.zeros)
    return buffer


@_njit
def _states_in(c, w, address, to):
    """Load the states of a part's channels, or zeros where there is no tensor."""
    for k in range(w.blocks):
        first, lanes = _block(w, k)
        if address:
            _by_channel(address, c.state, first, lanes, to + k * w.padded, w.zeros)
        else:
            _clear(to + k * w.padded, c.state)


@_njit
def _states_out(c, w, address, scratch):
    for k in range(w.blocks):
        first, lanes = _block(w, k)
        _to_channel(address, c.state, first, lanes, scratch + k * w.padded, w.spare)


@_njit
def _pack_projections(c, w, batch, t, steps):
    if not c.constant_B:
        _pack(c, c.B + batch * c.B_b + w.group * c.B_g + t * c.B_t, c.B_n, c.B_t, steps, w.B, w.zeros)
    if not c.constant_C:
        _pack(c, c.C + batch * c.C_b + w.group * c.C_g + t * c.C_t, c.C_n, c.C_t, steps, w.C, w.zeros)


@_njit
def _projections(c, w, k):
    """Where block k finds B and C."""
    return (w.fixed_B + k * w.padded if c.constant_B else w.B), (w.fixed_C + k * w.padded if c.constant_C else w.C)


@_njit
def _forward_tile(c, w, k, batch, t, steps, done, slot):
    """One channel block along one tile. done: steps of this row before it."""
    first, lanes = _block(w, k)
    delta, du, y, z = w.tiles, w.tiles + w.tile, w.tiles + 2 * w.tile, w.tiles + 3 * w.tile
    at = c.u + batch * c.u_b + first * c.u_d + t * c.u_t
    gather(c.kind, du, at, c.u_d, c.u_t, lanes, steps, w.zeros)
    at = c.delta + batch * c.delta_b + first * c.delta_d + t * c.delta_t
    gather(c.kind, delta, at, c.delta_d, c.delta_t, lanes, steps, w.zeros)
    skip = load(w.D + k * ROW)
    for i in range(0, steps * ROW, ROW):
        store(y + i, load(du + i) * skip if c.D else splat(0.0))
    _step_sizes(c, steps, load(w.bias + k * ROW), delta, du, du)

    A, h = w.A + k * w.padded, w.h + k * w.padded
    B, C = _projections(c, w, k)
    i = 0
    while i < steps:
        last = steps
        if c.checkpoint:
            beyond = (done + i) % c.checkpoint
            if beyond == 0:
                at = c.states + (slot + (done + i) // c.checkpoint) * 4 * c.dim * c.state
                _to_channel(at, c.state, first, lanes, h, w.spare)
            last = min(steps, i + c.checkpoint - beyond)
        _run(c, i, last, A, h, delta, du, y, B, C)
        i = last

    if c.z:
        at = c.z + batch * c.z_b + first * c.z_d + t * c.z_t
        gather(c.kind, z, at, c.z_d, c.z_t, lanes, steps, w.zeros)
        for i in range(0, steps * ROW, ROW):
            x = load(z + i)
            store(y + i, load(y + i) * x * sigmoid(x))
    at = c.out + batch * c.out_b + first * c.out_d + t * c.out_t
    scatter(c.kind, y, at, c.out_d, c.out_t, lanes, steps, w.spare)


@_njit
def _forward_task(call, offsets, task):
    work = np.zeros(1, WORK)
    c, w = call[0], work[0]
    buffer = _prepare(c, w, task // c.chunks)
    chunk = task % c.chunks
    row_bytes = 4 * c.dim * c.state
    for row in range(c.rows * chunk // c.chunks, c.rows * (chunk + 1) // c.chunks):
        batch, start, stop, slot = _span(c, row, offsets)
        _states_in(c, w, c.initial_state + row * row_bytes if c.initial_state else 0, w.h)
        for t in range(start, stop, c.steps):
            steps = min(c.steps, stop - t)
            _pack_projections(c, w, batch, t, steps)
            for k in range(w.blocks):
                _forward_tile(c, w, k, batch, t, steps, t - start, slot)
        if c.last_state:
            _states_out(c, w, c.last_state + row * row_bytes, w.h)
    _keep(buffer, work)


def _sweep_back(constant_B, constant_C):
    """A few states of one channel block through a tile, forwards to get decays and states, then backwards.

    h: the state that enters the tile. g: exp(Δ A) G of the step after the tile on entry, of its first step on return.
    y gets C·h, GB gets G·B, AG gets Σ A exp(Δ A) h G / ln 2. dA, dB, dC are added to: dA per channel, dB and dC per
    channel if constant, else a few rows for every step, whose lanes are summed later.
    """

    @variant(constant_B, constant_C)
    def sweep(steps, kept, moving, B, C, decays, states, dB, dC):
        A, h, g, dA = kept
        delta, du, dy, y, GB, AG = moving
        a, state = load_few(A), load_few(h)
        for i in range(0, steps * ROW, ROW):
            b = load_few(B) if constant_B else broadcast_few(B + i)
            c = load_few(C) if constant_C else broadcast_few(C + i)
            x = load(du + i)  # as all that is read, before what is stored: else it cannot be an operand in memory
            e = decay(load(delta + i), a)
            store_few(decays + TOGETHER * i, e)
            store_few(states + TOGETHER * i, state)
            state = fma(e, state, x * b)
            store(y + i, load(y + i) + dot(state, c))

        adjoint, total = load_few(g), repeat(splat(0.0))
        for j in range(steps):
            i = (steps - 1 - j) * ROW
            d, x, v = load(delta + i), load(du + i), load(dy + i)
            b = load_few(B) if constant_B else broadcast_few(B + i)
            c = load_few(C) if constant_C else broadcast_few(C + i)
            at = dC if constant_C else dC + TOGETHER * i
            store_few(at, fma(v, state, load_few(at)))
            adjoint = fma(v, c, adjoint)
            at = dB if constant_B else dB + TOGETHER * i
            store_few(at, fma(x, adjoint, load_few(at)))
            store(GB + i, load(GB + i) + dot(adjoint, b))
            adjoint = adjoint * load_few(decays + TOGETHER * i)
            state = load_few(states + TOGETHER * i)
            e = adjoint * state
            total = fma(d, e, total)
            store(AG + i, load(AG + i) + dot(a, e))
        store_few(g, adjoint)
        store_few(dA, load_few(dA) + total)

    return sweep


_back_vv, _back_vc = _sweep_back(False, False), _sweep_back(False, True)
_back_cv, _back_cc = _sweep_back(True, False), _sweep_back(True, True)


@_njit
def _sum_lanes(rows, steps, count, address, stride, scratch):
    """rows: a few for every step. Write the lane sums of the first ``count`` states, along time, ``stride`` apart."""
    for q in range(count):
        for t in range(0, steps, LANES):
            sums = totals(rows + (TOGETHER * t + q) * ROW, TOGETHER * ROW)
            at = address + q * stride + 4 * t
            if t + LANES <= steps:
                store_unaligned(at, sums)
            else:
                store(scratch, sums)
                for j in range(steps - t):
                    write_float(at + 4 * j, read_float(scratch + 4 * j))


@_njit
def _tiles(w, k):
    """Block k's tiles: u, Δu, Δ, dΔ/d(delta), dy, d(out)/dz for y = 1, y, ΣG·B, ΣA exp(Δ A) h G / ln 2."""
    u, n = w.tiles + k * TILES * w.tile, w.tile
    return u, u + n, u + 2 * n, u + 3 * n, u + 4 * n, u + 5 * n, u + 6 * n, u + 7 * n, u + 8 * n


@_njit
def _inputs_in(c, w, k, batch, t, steps):
    first, lanes = _block(w, k)
    u, du, delta, slope, _, _, _, _, _ = _tiles(w, k)
    at = c.u + batch * c.u_b + first * c.u_d + t * c.u_t
    gather(c.kind, u, at, c.u_d, c.u_t, lanes, steps, w.zeros)
    at = c.delta + batch * c.delta_b + first * c.delta_d + t * c.delta_t
    gather(c.kind, delta, at, c.delta_d, c.delta_t, lanes, steps, w.zeros)
    bias = load(w.bias + k * ROW)
    if c.softplus:
        for i in range(0, steps * ROW, ROW):
            store(slope + i, sigmoid(load(delta + i) + bias))
    _step_sizes(c, steps, bias, delta, u, du)


@_njit
def _cotangents_in(c, w, k, batch, t, steps):
    """dy, what dz is but for its factor y, and sums made ready."""
    first, lanes = _block(w, k)
    u, _, _, _, dy, gate, y, GB, AG = _tiles(w, k)
    at = c.dout + batch * c.dout_b + first * c.dout_d + t * c.dout_t
    gather(c.kind, dy, at, c.dout_d, c.dout_t, lanes, steps, w.zeros)
    if c.z:
        at = c.z + batch * c.z_b + first * c.z_d + t * c.z_t
        gather(c.kind, gate, at, c.z_d, c.z_t, lanes, steps, w.zeros)
        for i in range(0, steps * ROW, ROW):
            z = load(gate + i)
            s = sigmoid(z)
            d = load(dy + i) * s
            store(gate + i, d * fma(z, splat(1.0) - s, splat(1.0)))
            store(dy + i, d * z)
    skip = load(w.D + k * ROW)
    for i in range(0, steps * ROW, ROW):
        store(y + i, load(u + i) * skip if c.D else splat(0.0))
        store(GB + i, splat(0.0))
        store(AG + i, splat(0.0))


@_njit
def _piece(c, w, first, steps, entering, sums_at):
    """All channel blocks through steps first .. first+steps of the tile; then this part's share of dB and dC.

    entering: states that enter the piece. sums_at: offset of its first step in the partial sums of dB and dC.
    """
    i = first * ROW
    for n in range(0, c.state, TOGETHER):
        if not c.constant_B:
            _clear(w.sum_B, TOGETHER * steps)
        if not c.constant_C:
            _clear(w.sum_C, TOGETHER * steps)
        for k in range(w.blocks):
            _, du, delta, _, dy, _, y, GB, AG = _tiles(w, k)
            at = k * w.padded + n * ROW
            B, C = _projections(c, w, k)
            B, C = _at_state(c, c.constant_B, B, n), _at_state(c, c.constant_C, C, n)
            moving = (delta + i, du + i, dy + i, y + i, GB + i, AG + i)
            kept = (w.A + at, entering + at, w.h + at, w.dA + at)
            if c.constant_B and c.constant_C:
                _back_cc(steps, kept, moving, B, C, w.decays, w.states, w.fixed_dB + at, w.fixed_dC + at)
            elif c.constant_B:
                _back_cv(steps, kept, moving, B, C + i, w.decays, w.states, w.fixed_dB + at, w.sum_C)
            elif c.constant_C:
                _back_vc(steps, kept, moving, B + i, C, w.decays, w.states, w.sum_B, w.fixed_dC + at)
            else:
                _back_vv(steps, kept, moving, B + i, C + i, w.decays, w.states, w.sum_B, w.sum_C)
        at = sums_at + 4 * n * c.length
        count = min(TOGETHER, c.state - n)
        if not c.constant_B:
            _sum_lanes(w.sum_B, steps, count, c.dB + at, 4 * c.length, w.spare)
        if not c.constant_C:
            _sum_lanes(w.sum_C, steps, count, c.dC + at, 4 * c.length, w.spare)


@_njit
def _gradients_out(c, w, k, batch, t, steps):
    first, lanes = _block(w, k)
    u, _, delta, slope, dy, gate, y, GB, AG = _tiles(w, k)
    skip = load(w.D + k * ROW)
    dD, dbias = splat(0.0), splat(0.0)  # of this tile alone: one running sum over all steps would round far more
    for i in range(0, steps * ROW, ROW):
        x, v, s = load(u + i), load(dy + i), load(GB + i)
        ddelta = fma(x, s, load(AG + i) * splat(LN2))
        if c.softplus:
            ddelta = ddelta * load(slope + i)
        dbias = dbias + ddelta
        dD = fma(v, x, dD)
        store(AG + i, ddelta)
        through_h = load(delta + i) * s
        store(GB + i, fma(skip, v, through_h) if c.D else through_h)
        if c.z:
            store(gate + i, load(gate + i) * load(y + i))
    store(w.dD + k * ROW, load(w.dD + k * ROW) + dD)
    store(w.dbias + k * ROW, load(w.dbias + k * ROW) + dbias)
    at = c.du + batch * c.du_b + first * c.du_d + t * c.du_t
    scatter(c.kind, GB, at, c.du_d, c.du_t, lanes, steps, w.spare)
    at = c.ddelta + batch * c.ddelta_b + first * c.ddelta_d + t * c.ddelta_t
    scatter(c.kind, AG, at, c.ddelta_d, c.ddelta_t, lanes, steps, w.spare)
    if c.z:
        at = c.dz + batch * c.dz_b + first * c.dz_d + t * c.dz_t
        scatter(c.kind, gate, at, c.dz_d, c.dz_t, lanes, steps, w.spare)


@_njit
def _backward_span(c, w, batch, t, stop, slot, sums_at):
    """Steps t .. stop, which start at a kept state: one tile of several kept states, or several tiles of one."""
    row_bytes = 4 * c.dim * c.state
    state = w.blocks * w.padded
    pieces = _ceil(stop - t, min(c.checkpoint, c.steps))
    piece = min(c.checkpoint, c.steps)
    tiles = _ceil(stop - t, c.steps)
    if c.checkpoint <= c.steps:
        for j in range(pieces):
            _states_in(c, w, c.states + (slot + j) * row_bytes, w.entering + j * state)
    else:
        _states_in(c, w, c.states + slot * row_bytes, w.entering)
        for j in range(tiles - 1):
            at = t + j * c.steps
            _pack_projections(c, w, batch, at, c.steps)
            for k in range(w.blocks):
                _inputs_in(c, w, k, batch, at, c.steps)
                _, du, delta, _, _, _, y, _, _ = _tiles(w, k)
                h = w.entering + (j + 1) * state + k * w.padded
                for i in range(0, c.state * ROW, ROW):
                    store(h + i, load(h - state + i))
                B, C = _projections(c, w, k)
                _run(c, 0, c.steps, w.A + k * w.padded, h, delta, du, y, B, C)

    for j in range(pieces):
        done = (pieces - 1 - j) * piece  # steps before this piece; a tile begins at a multiple of its length
        within = done % c.steps if c.checkpoint > c.steps else done
        at = t + done - within
        steps = min(c.steps, stop - at)
        if within + piece >= steps:
            _pack_projections(c, w, batch, at, steps)
            for k in range(w.blocks):
                _inputs_in(c, w, k, batch, at, steps)
                _cotangents_in(c, w, k, batch, at, steps)
        entering = w.entering + (pieces - 1 - j) * state
        _piece(c, w, within, min(piece, steps - within), entering, sums_at + 4 * (t + done))
        if within == 0:
            for k in range(w.blocks):
                _gradients_out(c, w, k, batch, at, steps)


@_njit
def _backward_task(call, offsets, task):
    work = np.zeros(1, WORK)
    c, w = call[0], work[0]
    part, chunk = task // c.chunks, task % c.chunks
    buffer = _prepare(c, w, part)
    row_bytes = 4 * c.dim * c.state
    per_span = max(1, c.steps // c.checkpoint)  # kept states a span
    length = per_span * c.checkpoint
    for row in range(c.rows * chunk // c.chunks, c.rows * (chunk + 1) // c.chunks):
        batch, start, stop, slot = _span(c, row, offsets)
        _states_in(c, w, c.dlast_state + row * row_bytes if c.dlast_state else 0, w.h)
        sums_at = 4 * (part * c.batch + batch) * c.state * c.length
        spans = _ceil(stop - start, length)
        for j in range(spans):
            span = spans - 1 - j
            t = start + span * length
            _backward_span(c, w, batch, t, min(stop, t + length), slot + span * per_span, sums_at)
        if c.dinitial_state:
            _states_out(c, w, c.dinitial_state + row * row_bytes, w.h)

    _states_out(c, w, c.dA + chunk * row_bytes, w.dA)
    if c.constant_B:
        _states_out(c, w, c.dB + chunk * row_bytes, w.fixed_dB)
    if c.constant_C:
        _states_out(c, w, c.dC + chunk * row_bytes, w.fixed_dC)
    for k in range(w.blocks):
        first, lanes = _block(w, k)
        if c.dD:
            _to_channel(c.dD + chunk * 4 * c.dim, 1, first, lanes, w.dD + k * ROW, w.spare)
        if c.ddelta_bias:
            _to_channel(c.ddelta_bias + chunk * 4 * c.dim, 1, first, lanes, w.dbias + k * ROW, w.spare)
    _keep(buffer, work)


@entry
def forward(tasks, call, offsets):
    for task in prange(tasks):
        _forward_task(call, offsets, task)


@entry
def backward(tasks, call, offsets):
    for task in prange(tasks):
        _backward_task(call, offsets, task)


@entry
def add_up(parts, whole):
    """whole[b, g] = the sum of parts[g, :, b], in order.

    parts: (groups, count, batch, size), whole: (batch, groups, size), both contiguous float32.
    """
    groups, count, batch, size = parts.shape
    spans = (size + SPAN - 1) // SPAN
    for task in prange(batch * groups * spans):
        first = task % spans * SPAN
        last = min(first + SPAN, size)
        b, g = task // spans // groups, task // spans % groups
        for i in range(first, last):
            whole[b, g, i] = parts[g, 0, b, i]
        for p in range(1, count):
            for i in range(first, last):
                whole[b, g, i] += parts[g, p, b, i]
