"""Numba kernels of the ``cpu`` backend: lanes are channels, four states at a time stay in registers along a tile of time.

A task takes a part (a few blocks of 16 channels of one group, which share tiles of B and C) through a chunk of rows.
Within a tile every channel block first gets Δ, Δu and the skip term for all steps (``prologue``); then, four states at
a time, the recurrence runs along the tile (``sweep``), and what is left is done per element. What a kernel is told
stands in one record (``CALL``): addresses, strides in bytes (0 for what is absent) and sizes.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .cpu_simd import (
    FLOAT32,
    INLINE,
    LANES,
    ROW,
    broadcast,
    exp2,
    fma,
    gather,
    load,
    quiet,
    read_float,
    scatter,
    sigmoid,
    softplus,
    splat,
    store,
    store_unaligned,
    totals,
    write_float,
)

QUAD = 4  # states that advance together: enough independent chains to hide the latency of an FMA
LOG2E = np.float32(1.4426950408889634)
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

_njit = njit(error_model="numpy")


@njit(**INLINE)
def _ceil(a, b):
    return (a + b - 1) // b


@_njit
def _aligned(buffer):
    """Address of the first whole scratch row in a buffer that has one row to spare."""
    return (buffer.ctypes.data + ROW - 1) // ROW * ROW


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
def _decay_rates(c, first, lanes, scratch, zeros):
    """A in units of log2, so that the decay is 2^(Δ A)."""
    _by_channel(c.A, c.state, first, lanes, scratch, zeros)
    for n in range(c.state):
        store(scratch + n * ROW, quiet(load(scratch + n * ROW) * splat(LOG2E)))


@_njit
def _pack(c, address, stride_n, stride_t, steps, scratch, zeros):
    """B or C of one tile: for every 16 states a tile whose lanes are states, ``c.steps`` rows apart."""
    for n in range(0, c.state, LANES):
        gather(
            c.kind, scratch + n // LANES * c.steps * ROW, address + n * stride_n, stride_n, stride_t,
            min(LANES, c.state - n), steps, zeros,
        )  # fmt: skip


@_njit
def _step_sizes(c, steps, bias, delta):
    """delta -> Δ, in place."""
    for t in range(steps):
        x = load(delta + t * ROW) + bias
        if c.softplus:
            x = softplus(x)
        store(delta + t * ROW, quiet(x))


def _sweep(constant_B, constant_C):
    """Four states along steps first .. last of a tile: h in registers, C·h added to y."""

    @_njit
    def sweep(first, last, A, h, delta, du, y, B, C):
        a0, a1, a2, a3 = load(A), load(A + ROW), load(A + 2 * ROW), load(A + 3 * ROW)
        h0, h1, h2, h3 = load(h), load(h + ROW), load(h + 2 * ROW), load(h + 3 * ROW)
        for i in range(first * ROW, last * ROW, ROW):
            d = load(delta + i)
            x = load(du + i)
            if constant_B:
                b0, b1, b2, b3 = load(B), load(B + ROW), load(B + 2 * ROW), load(B + 3 * ROW)
            else:
                b = B + i
                b0, b1, b2, b3 = broadcast(b), broadcast(b + 4), broadcast(b + 8), broadcast(b + 12)
            h0 = fma(exp2(d * a0), h0, x * b0)
            h1 = fma(exp2(d * a1), h1, x * b1)
            h2 = fma(exp2(d * a2), h2, x * b2)
            h3 = fma(exp2(d * a3), h3, x * b3)
            if constant_C:
                c0, c1, c2, c3 = load(C), load(C + ROW), load(C + 2 * ROW), load(C + 3 * ROW)
            else:
                c = C + i
                c0, c1, c2, c3 = broadcast(c), broadcast(c + 4), broadcast(c + 8), broadcast(c + 12)
            store(y + i, fma(h3, c3, fma(h2, c2, fma(h1, c1, fma(h0, c0, load(y + i))))))
        store(h, h0)
        store(h + ROW, h1)
        store(h + 2 * ROW, h2)
        store(h + 3 * ROW, h3)

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
    for n in range(0, c.state, QUAD):
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
def _forward_task(call, offsets, task):
    c = call[0]
    chunk = task % c.chunks
    group, begin, end = _part(c, task // c.chunks)
    blocks = _ceil(end - begin, LANES)
    padded = _ceil(c.state, LANES) * LANES * ROW  # bytes of a scratch row for every state
    tile = c.steps * ROW
    packed = _ceil(c.state, LANES) * tile

    buffer = np.zeros((4 * blocks * padded + 2 * packed + 4 * tile + (2 * blocks + 3) * ROW) // 4, np.float32)
    zeros = _aligned(buffer)
    spare = zeros + ROW
    A = spare + ROW
    h = A + blocks * padded
    constant_B = h + blocks * padded
    constant_C = constant_B + blocks * padded
    B = constant_C + blocks * padded
    C = B + packed
    delta = C + packed
    du = delta + tile
    y = du + tile
    z = y + tile
    D = z + tile
    bias = D + blocks * ROW

    for k in range(blocks):
        first = begin + k * LANES
        lanes = min(LANES, end - first)
        _decay_rates(c, first, lanes, A + k * padded, zeros)
        if c.constant_B:
            _by_channel(c.B, c.state, first, lanes, constant_B + k * padded, zeros)
        if c.constant_C:
            _by_channel(c.C, c.state, first, lanes, constant_C + k * padded, zeros)
        if c.D:
            _by_channel(c.D, 1, first, lanes, D + k * ROW, zeros)
        if c.delta_bias:
            _by_channel(c.delta_bias, 1, first, lanes, bias + k * ROW, zeros)

    row_bytes = 4 * c.dim * c.state
    for row in range(c.rows * chunk // c.chunks, c.rows * (chunk + 1) // c.chunks):
        batch, start, stop, slot = _span(c, row, offsets)
        for k in range(blocks):
            first = begin + k * LANES
            lanes = min(LANES, end - first)
            if c.initial_state:
                _by_channel(c.initial_state + row * row_bytes, c.state, first, lanes, h + k * padded, zeros)
            else:
                for n in range(c.state):
                    store(h + k * padded + n * ROW, splat(0.0))
        for t in range(start, stop, c.steps):
            steps = min(c.steps, stop - t)
            if not c.constant_B:
                _pack(c, c.B + batch * c.B_b + group * c.B_g + t * c.B_t, c.B_n, c.B_t, steps, B, zeros)
            if not c.constant_C:
                _pack(c, c.C + batch * c.C_b + group * c.C_g + t * c.C_t, c.C_n, c.C_t, steps, C, zeros)
            for k in range(blocks):
                first = begin + k * LANES
                lanes = min(LANES, end - first)
                at = c.u + batch * c.u_b + first * c.u_d + t * c.u_t
                gather(c.kind, du, at, c.u_d, c.u_t, lanes, steps, zeros)
                at = c.delta + batch * c.delta_b + first * c.delta_d + t * c.delta_t
                gather(c.kind, delta, at, c.delta_d, c.delta_t, lanes, steps, zeros)
                _step_sizes(c, steps, load(bias + k * ROW), delta)
                skip = load(D + k * ROW)
                for i in range(0, steps * ROW, ROW):
                    u = load(du + i)
                    store(y + i, u * skip if c.D else splat(0.0))
                    store(du + i, u * load(delta + i))

                b = constant_B + k * padded if c.constant_B else B
                g = constant_C + k * padded if c.constant_C else C
                i = 0
                while i < steps:
                    last = steps
                    if c.checkpoint:
                        done = t + i - start
                        if done % c.checkpoint == 0:
                            at = c.states + (slot + done // c.checkpoint) * row_bytes
                            _to_channel(at, c.state, first, lanes, h + k * padded, spare)
                        last = min(steps, i + c.checkpoint - done % c.checkpoint)
                    _run(c, i, last, A + k * padded, h + k * padded, delta, du, y, b, g)
                    i = last

                if c.z:
                    at = c.z + batch * c.z_b + first * c.z_d + t * c.z_t
                    gather(c.kind, z, at, c.z_d, c.z_t, lanes, steps, zeros)
                    for i in range(0, steps * ROW, ROW):
                        x = load(z + i)
                        store(y + i, load(y + i) * x * sigmoid(x))
                at = c.out + batch * c.out_b + first * c.out_d + t * c.out_t
                scatter(c.kind, y, at, c.out_d, c.out_t, lanes, steps, spare)
        if c.last_state:
            for k in range(blocks):
                first = begin + k * LANES
                lanes = min(LANES, end - first)
                _to_channel(c.last_state + row * row_bytes, c.state, first, lanes, h + k * padded, spare)


@njit(parallel=True, cache=True, error_model="numpy")
def forward(tasks, call, offsets):
    for task in prange(tasks):
        _forward_task(call, offsets, task)


def _sweep_back(constant_B, constant_C):
    """Four states of one channel block through a tile, forwards to get decays and states, then backwards.

    h: the state that enters the tile. g: exp(Δ A) G of the step after the tile on entry, of its first step on return.
    y gets C·h, GB gets G·B, AG gets Σ A exp(Δ A) h G (A in units of log2). dA, dB, dC are added to: dA per channel, dB
    and dC per channel if constant, else 4 rows for every step, whose lanes are summed later.
    """

    @_njit
    def sweep(steps, A, h, g, delta, du, dy, y, GB, AG, B, C, decays, states, dA, dB, dC):
        a0, a1, a2, a3 = load(A), load(A + ROW), load(A + 2 * ROW), load(A + 3 * ROW)
        h0, h1, h2, h3 = load(h), load(h + ROW), load(h + 2 * ROW), load(h + 3 * ROW)
        for i in range(0, steps * ROW, ROW):
            d = load(delta + i)
            x = load(du + i)
            if constant_B:
                b0, b1, b2, b3 = load(B), load(B + ROW), load(B + 2 * ROW), load(B + 3 * ROW)
            else:
                b = B + i
                b0, b1, b2, b3 = broadcast(b), broadcast(b + 4), broadcast(b + 8), broadcast(b + 12)
            if constant_C:
                c0, c1, c2, c3 = load(C), load(C + ROW), load(C + 2 * ROW), load(C + 3 * ROW)
            else:
                c = C + i
                c0, c1, c2, c3 = broadcast(c), broadcast(c + 4), broadcast(c + 8), broadcast(c + 12)
            e0, e1, e2, e3 = exp2(d * a0), exp2(d * a1), exp2(d * a2), exp2(d * a3)
            at = decays + QUAD * i
            store(at, e0)
            store(at + ROW, e1)
            store(at + 2 * ROW, e2)
            store(at + 3 * ROW, e3)
            at = states + QUAD * i
            store(at, h0)
            store(at + ROW, h1)
            store(at + 2 * ROW, h2)
            store(at + 3 * ROW, h3)
            h0 = fma(e0, h0, x * b0)
            h1 = fma(e1, h1, x * b1)
            h2 = fma(e2, h2, x * b2)
            h3 = fma(e3, h3, x * b3)
            store(y + i, fma(h3, c3, fma(h2, c2, fma(h1, c1, fma(h0, c0, load(y + i))))))

        g0, g1, g2, g3 = load(g), load(g + ROW), load(g + 2 * ROW), load(g + 3 * ROW)
        s0, s1, s2, s3 = load(dA), load(dA + ROW), load(dA + 2 * ROW), load(dA + 3 * ROW)
        for j in range(steps):
            i = (steps - 1 - j) * ROW
            d = load(delta + i)
            x = load(du + i)
            v = load(dy + i)
            if constant_B:
                b0, b1, b2, b3 = load(B), load(B + ROW), load(B + 2 * ROW), load(B + 3 * ROW)
                at = dB
            else:
                b = B + i
                b0, b1, b2, b3 = broadcast(b), broadcast(b + 4), broadcast(b + 8), broadcast(b + 12)
                at = dB + QUAD * i
            if constant_C:
                c0, c1, c2, c3 = load(C), load(C + ROW), load(C + 2 * ROW), load(C + 3 * ROW)
                into = dC
            else:
                c = C + i
                c0, c1, c2, c3 = broadcast(c), broadcast(c + 4), broadcast(c + 8), broadcast(c + 12)
                into = dC + QUAD * i
            store(into, fma(v, h0, load(into)))
            store(into + ROW, fma(v, h1, load(into + ROW)))
            store(into + 2 * ROW, fma(v, h2, load(into + 2 * ROW)))
            store(into + 3 * ROW, fma(v, h3, load(into + 3 * ROW)))
            g0, g1, g2, g3 = fma(c0, v, g0), fma(c1, v, g1), fma(c2, v, g2), fma(c3, v, g3)
            store(at, fma(x, g0, load(at)))
            store(at + ROW, fma(x, g1, load(at + ROW)))
            store(at + 2 * ROW, fma(x, g2, load(at + 2 * ROW)))
            store(at + 3 * ROW, fma(x, g3, load(at + 3 * ROW)))
            store(GB + i, fma(g3, b3, fma(g2, b2, fma(g1, b1, fma(g0, b0, load(GB + i))))))
            at = decays + QUAD * i
            g0, g1 = g0 * load(at), g1 * load(at + ROW)
            g2, g3 = g2 * load(at + 2 * ROW), g3 * load(at + 3 * ROW)
            at = states + QUAD * i
            h0, h1, h2, h3 = load(at), load(at + ROW), load(at + 2 * ROW), load(at + 3 * ROW)
            e0, e1, e2, e3 = g0 * h0, g1 * h1, g2 * h2, g3 * h3
            s0, s1, s2, s3 = fma(d, e0, s0), fma(d, e1, s1), fma(d, e2, s2), fma(d, e3, s3)
            store(AG + i, fma(a3, e3, fma(a2, e2, fma(a1, e1, fma(a0, e0, load(AG + i))))))
        store(g, g0)
        store(g + ROW, g1)
        store(g + 2 * ROW, g2)
        store(g + 3 * ROW, g3)
        store(dA, s0)
        store(dA + ROW, s1)
        store(dA + 2 * ROW, s2)
        store(dA + 3 * ROW, s3)

    return sweep


_back_vv, _back_vc = _sweep_back(False, False), _sweep_back(False, True)
_back_cv, _back_cc = _sweep_back(True, False), _sweep_back(True, True)


@_njit
def _clear(address, rows):
    for i in range(0, rows * ROW, ROW):
        store(address + i, splat(0.0))


@_njit
def _sum_lanes(rows, steps, count, address, stride, scratch):
    """rows: 4 for every step. Write the lane sums of the first ``count`` states, time contiguous, ``stride`` apart."""
    for q in range(count):
        for t in range(0, steps, LANES):
            sums = totals(rows + (QUAD * t + q) * ROW, QUAD * ROW)
            at = address + q * stride + 4 * t
            if t + LANES <= steps:
                store_unaligned(at, sums)
            else:
                store(scratch, sums)
                for j in range(steps - t):
                    write_float(at + 4 * j, read_float(scratch + 4 * j))


@_njit
def _backward_task(call, offsets, task):
    c = call[0]
    part, chunk = task // c.chunks, task % c.chunks
    group, begin, end = _part(c, part)
    blocks = _ceil(end - begin, LANES)
    padded = _ceil(c.state, LANES) * LANES * ROW
    tile = c.steps * ROW
    packed = _ceil(c.state, LANES) * tile
    quad = QUAD * _ceil(c.steps, LANES) * LANES * ROW  # lane sums read whole groups of 16 steps
    subtiles = _ceil(min(c.checkpoint, c.length), c.steps)

    rows_needed = (
        (8 + subtiles) * blocks * padded + 2 * packed + (9 * blocks + 1) * tile + 4 * quad + (4 * blocks + 4) * ROW
    )
    buffer = np.zeros(rows_needed // 4, np.float32)
    zeros = _aligned(buffer)
    spare = zeros + ROW
    scratch = spare + ROW
    A = scratch + ROW
    h = A + blocks * padded
    g = h + blocks * padded
    dA = g + blocks * padded
    constant_B = dA + blocks * padded
    constant_C = constant_B + blocks * padded
    constant_dB = constant_C + blocks * padded
    constant_dC = constant_dB + blocks * padded
    entering = constant_dC + blocks * padded
    B = entering + subtiles * blocks * padded
    C = B + packed
    unused = C + packed
    decays = unused + tile
    states = decays + quad
    sum_B = states + quad
    sum_C = sum_B + quad
    D = sum_C + quad
    bias = D + blocks * ROW
    dD = bias + blocks * ROW
    dbias = dD + blocks * ROW
    tiles = dbias + blocks * ROW  # 9 for every block, in the order they are named in below

    for k in range(blocks):
        first = begin + k * LANES
        lanes = min(LANES, end - first)
        _decay_rates(c, first, lanes, A + k * padded, zeros)
        if c.constant_B:
            _by_channel(c.B, c.state, first, lanes, constant_B + k * padded, zeros)
        if c.constant_C:
            _by_channel(c.C, c.state, first, lanes, constant_C + k * padded, zeros)
        if c.D:
            _by_channel(c.D, 1, first, lanes, D + k * ROW, zeros)
        if c.delta_bias:
            _by_channel(c.delta_bias, 1, first, lanes, bias + k * ROW, zeros)

    row_bytes = 4 * c.dim * c.state
    for row in range(c.rows * chunk // c.chunks, c.rows * (chunk + 1) // c.chunks):
        batch, start, stop, slot = _span(c, row, offsets)
        sums_at = 4 * ((part * c.batch + batch) * c.state * c.length)
        for k in range(blocks):
            first = begin + k * LANES
            lanes = min(LANES, end - first)
            if c.dlast_state:
                _by_channel(c.dlast_state + row * row_bytes, c.state, first, lanes, g + k * padded, zeros)
            else:
                _clear(g + k * padded, c.state)

        kept = _ceil(stop - start, c.checkpoint)
        for j in range(kept):
            keep = kept - 1 - j
            origin = start + keep * c.checkpoint
            limit = min(stop, origin + c.checkpoint)
            subs = _ceil(limit - origin, c.steps)
            for k in range(blocks):
                first = begin + k * LANES
                lanes = min(LANES, end - first)
                at = c.states + (slot + keep) * row_bytes
                _by_channel(at, c.state, first, lanes, entering + k * padded, zeros)

            # forwards to the last tile, keeping the state that enters each; then backwards
            for step in range(2 * subs - 1):
                ahead = step < subs - 1
                sub = step if ahead else 2 * subs - 2 - step
                t = origin + sub * c.steps
                steps = min(c.steps, limit - t)
                if not c.constant_B:
                    _pack(c, c.B + batch * c.B_b + group * c.B_g + t * c.B_t, c.B_n, c.B_t, steps, B, zeros)
                if not c.constant_C:
                    _pack(c, c.C + batch * c.C_b + group * c.C_g + t * c.C_t, c.C_n, c.C_t, steps, C, zeros)
                for k in range(blocks):
                    first = begin + k * LANES
                    lanes = min(LANES, end - first)
                    u = tiles + k * 9 * tile
                    du, delta, slope, dy, gate, y, GB, AG = (
                        u + tile, u + 2 * tile, u + 3 * tile, u + 4 * tile,
                        u + 5 * tile, u + 6 * tile, u + 7 * tile, u + 8 * tile,
                    )  # fmt: skip
                    at = c.u + batch * c.u_b + first * c.u_d + t * c.u_t
                    gather(c.kind, u, at, c.u_d, c.u_t, lanes, steps, zeros)
                    at = c.delta + batch * c.delta_b + first * c.delta_d + t * c.delta_t
                    gather(c.kind, delta, at, c.delta_d, c.delta_t, lanes, steps, zeros)
                    if c.softplus:
                        for i in range(0, steps * ROW, ROW):
                            store(slope + i, sigmoid(load(delta + i) + load(bias + k * ROW)))
                    _step_sizes(c, steps, load(bias + k * ROW), delta)
                    for i in range(0, steps * ROW, ROW):
                        store(du + i, load(u + i) * load(delta + i))
                    state = entering + (sub * blocks + k) * padded
                    if ahead:
                        following = state + blocks * padded
                        for i in range(0, c.state * ROW, ROW):
                            store(following + i, load(state + i))
                        b = constant_B + k * padded if c.constant_B else B
                        cc = constant_C + k * padded if c.constant_C else C
                        _run(c, 0, steps, A + k * padded, following, delta, du, unused, b, cc)
                        continue
                    at = c.dout + batch * c.dout_b + first * c.dout_d + t * c.dout_t
                    gather(c.kind, dy, at, c.dout_d, c.dout_t, lanes, steps, zeros)
                    if c.z:
                        at = c.z + batch * c.z_b + first * c.z_d + t * c.z_t
                        gather(c.kind, gate, at, c.z_d, c.z_t, lanes, steps, zeros)
                        for i in range(0, steps * ROW, ROW):
                            v = load(gate + i)
                            s = sigmoid(v)
                            ds = load(dy + i) * s
                            store(gate + i, ds * fma(v, splat(1.0) - s, splat(1.0)))
                            store(dy + i, ds * v)
                    skip = load(D + k * ROW)
                    for i in range(0, steps * ROW, ROW):
                        store(y + i, load(u + i) * skip if c.D else splat(0.0))
                        store(GB + i, splat(0.0))
                        store(AG + i, splat(0.0))
                if ahead:
                    continue

                for n in range(0, c.state, QUAD):
                    if not c.constant_B:
                        _clear(sum_B, QUAD * steps)
                    if not c.constant_C:
                        _clear(sum_C, QUAD * steps)
                    for k in range(blocks):
                        u = tiles + k * 9 * tile
                        du, delta, dy, y, GB, AG = (
                            u + tile, u + 2 * tile, u + 4 * tile, u + 6 * tile, u + 7 * tile, u + 8 * tile
                        )  # fmt: skip
                        at = k * padded + n * ROW
                        b = _at_state(c, c.constant_B, constant_B + k * padded if c.constant_B else B, n)
                        cc = _at_state(c, c.constant_C, constant_C + k * padded if c.constant_C else C, n)
                        db = constant_dB + at if c.constant_B else sum_B
                        dc = constant_dC + at if c.constant_C else sum_C
                        state = entering + sub * blocks * padded + at
                        if c.constant_B and c.constant_C:
                            _back_cc(
                                steps,
                                A + at,
                                state,
                                g + at,
                                delta,
                                du,
                                dy,
                                y,
                                GB,
                                AG,
                                b,
                                cc,
                                decays,
                                states,
                                dA + at,
                                db,
                                dc,
                            )
                        elif c.constant_B:
                            _back_cv(
                                steps,
                                A + at,
                                state,
                                g + at,
                                delta,
                                du,
                                dy,
                                y,
                                GB,
                                AG,
                                b,
                                cc,
                                decays,
                                states,
                                dA + at,
                                db,
                                dc,
                            )
                        elif c.constant_C:
                            _back_vc(
                                steps,
                                A + at,
                                state,
                                g + at,
                                delta,
                                du,
                                dy,
                                y,
                                GB,
                                AG,
                                b,
                                cc,
                                decays,
                                states,
                                dA + at,
                                db,
                                dc,
                            )
                        else:
                            _back_vv(
                                steps,
                                A + at,
                                state,
                                g + at,
                                delta,
                                du,
                                dy,
                                y,
                                GB,
                                AG,
                                b,
                                cc,
                                decays,
                                states,
                                dA + at,
                                db,
                                dc,
                            )
                    at = sums_at + 4 * (n * c.length + t)
                    count = min(QUAD, c.state - n)
                    if not c.constant_B:
                        _sum_lanes(sum_B, steps, count, c.dB + at, 4 * c.length, scratch)
                    if not c.constant_C:
                        _sum_lanes(sum_C, steps, count, c.dC + at, 4 * c.length, scratch)

                for k in range(blocks):
                    first = begin + k * LANES
                    lanes = min(LANES, end - first)
                    u = tiles + k * 9 * tile
                    delta, slope, dy, gate, y, GB, AG = (
                        u + 2 * tile, u + 3 * tile, u + 4 * tile, u + 5 * tile, u + 6 * tile, u + 7 * tile, u + 8 * tile
                    )  # fmt: skip
                    skip = load(D + k * ROW)
                    to_D, to_bias = load(dD + k * ROW), load(dbias + k * ROW)
                    for i in range(0, steps * ROW, ROW):
                        x, v, s = load(u + i), load(dy + i), load(GB + i)
                        ddelta = fma(load(AG + i), splat(LN2), x * s)
                        if c.softplus:
                            ddelta = ddelta * load(slope + i)
                        to_bias = to_bias + ddelta
                        to_D = fma(v, x, to_D)
                        store(AG + i, ddelta)
                        store(GB + i, fma(skip, v, load(delta + i) * s) if c.D else load(delta + i) * s)
                        store(gate + i, load(gate + i) * load(y + i))
                    store(dD + k * ROW, to_D)
                    store(dbias + k * ROW, to_bias)
                    at = c.du + batch * c.du_b + first * c.du_d + t * c.du_t
                    scatter(c.kind, GB, at, c.du_d, c.du_t, lanes, steps, spare)
                    at = c.ddelta + batch * c.ddelta_b + first * c.ddelta_d + t * c.ddelta_t
                    scatter(c.kind, AG, at, c.ddelta_d, c.ddelta_t, lanes, steps, spare)
                    if c.z:
                        at = c.dz + batch * c.dz_b + first * c.dz_d + t * c.dz_t
                        scatter(c.kind, gate, at, c.dz_d, c.dz_t, lanes, steps, spare)

        if c.dinitial_state:
            for k in range(blocks):
                first = begin + k * LANES
                lanes = min(LANES, end - first)
                _to_channel(c.dinitial_state + row * row_bytes, c.state, first, lanes, g + k * padded, spare)

    for k in range(blocks):
        first = begin + k * LANES
        lanes = min(LANES, end - first)
        _to_channel(c.dA + chunk * row_bytes, c.state, first, lanes, dA + k * padded, spare)
        if c.constant_B:
            _to_channel(c.dB + chunk * row_bytes, c.state, first, lanes, constant_dB + k * padded, spare)
        if c.constant_C:
            _to_channel(c.dC + chunk * row_bytes, c.state, first, lanes, constant_dC + k * padded, spare)
        if c.dD:
            _to_channel(c.dD + chunk * 4 * c.dim, 1, first, lanes, dD + k * ROW, spare)
        if c.ddelta_bias:
            _to_channel(c.ddelta_bias + chunk * 4 * c.dim, 1, first, lanes, dbias + k * ROW, spare)


@njit(parallel=True, cache=True, error_model="numpy")
def backward(tasks, call, offsets):
    for task in prange(tasks):
        _backward_task(call, offsets, task)
