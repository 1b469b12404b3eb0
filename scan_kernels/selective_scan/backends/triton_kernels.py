"""Triton kernels of the selective scan.

A program owns a tile of channels, with all their states, of one row (or of one piece of a row's time) and walks its
time in tiles. Inputs come as tiles [BT, BD] = (steps, channels); the recurrence is unrolled over the steps of a tile,
on states [BN, BD].

Layouts decide the speed, and Triton chooses them; three habits make it choose well. Tiles are [BT, BN, BD], because
the last axes are dealt out to lanes and warps first: all steps of a state then lie in one thread, where picking a step
out of a tile (``at_step``) or putting one in (``put``) folds away. What lanes share is made once and then spread
(``computed_once``). What lanes add up moves through shared memory once (``sum_last``), not through a shuffle for each
halving. On a target that deals the axes out differently all this stays right, only slower.

Row r, piece c covers steps [c*span, (c+1)*span) of the row. ``span`` is a multiple of the checkpoint interval K, and
tiles never cross a multiple of K, so a state entering step k*K is always a state entering a tile.
Steps, rows and strides are 64-bit where they are multiplied.
"""

# ruff: noqa: SIM102 - a condition known at compile time stands in an `if` of its own
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MAX_FLOAT = tl.constexpr(3.4e38)


# ---- scalar functions -----------------------------------------------------------------------------------------------


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to a few ulp everywhere: log1p(e) = 2 atanh(s), s = e / (2 + e) <= 1/3; atanh by a minimax
    polynomial, off by 5e-9 of the result."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    s = e / (2.0 + e)
    q = s * s
    p = 0.14006009 * q + 0.14000899
    p = p * q + 0.20010764
    p = p * q + 0.33333208
    return tl.maximum(x, 0.0) + 2.0 * (s + s * q * p)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); the square of a reciprocal root is three instructions shorter than a quotient."""
    r = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return r * r


@triton.jit
def finite(A):
    """A with infinite rates made finite, so that a masked step (size 0) still leaves a state alone."""
    A = tl.where(float("-inf") == A, -MAX_FLOAT, A)
    return tl.where(float("inf") == A, MAX_FLOAT, A)


@triton.jit
def to_log2(size):
    """Δ log2(e), for exp2(Δ log2(e) A). In two parts, because one float32 constant is off by 1.3e-8, the same way at
    every step, which adds up over a long growing or slowly decaying row; so would a rounded A log2(e)."""
    return size * 1.4375 + size * 0.0051950408889634


@triton.jit
def decay(x, EXACT: tl.constexpr):
    """2**x. EXACT, for float32 data: small exponents by a polynomial, because a GPU's exp2 is off by up to 1.2e-7 of
    its result, which adds up over the many steps that a slow decay remembers."""
    fast = tl.exp2(x)
    if EXACT:
        p = 1.54035304e-4 * x + 1.33335581e-3
        p = p * x + 9.61812911e-3
        p = p * x + 5.55041087e-2
        p = p * x + 2.40226507e-1
        p = p * x + 6.93147181e-1
        fast = tl.where(tl.abs(x) < 0.375, p * x + 1.0, fast)
    return fast


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x as dtype, to nearest even; Triton's interpreter would cut bfloat16 off, so there it is rounded by hand."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


INTERPRETED = tl.constexpr(not isinstance(rounded, triton.JITFunction))


# ---- layouts --------------------------------------------------------------------------------------------------------


@triton.jit
def computed_once(x):
    """x, in the layout of Triton's choice for its shape. A sum over one thing: the compiler cannot look past it, so it
    neither moves the work of making x to where x is used, which may be once for each lane that shares it, or a second
    time in another layout, nor lets the layout of a load spread into the recurrence."""
    return tl.sum(tl.expand_dims(x, 0), axis=0)


@triton.jit
def computed_again(x):
    """x (a zero may lose its sign), but the compiler does not know that it is x: what depends on it is computed anew
    rather than held in registers."""
    return x + 0.0


@triton.jit
def over_states(x, BN: tl.constexpr):
    """x [BT, BD] for each state: [BT, BN, BD]."""
    return tl.broadcast_to(x[:, None, :], (x.shape[0], BN, x.shape[1]))


@triton.jit
def at_step(x, t: tl.constexpr):
    """x[t] of x [BT, ., .]; of [1, ., .], which holds for all steps, the only one.

    Summed as integers: adding 0 then folds away, and neither NaN nor -0.0 is touched.
    """
    bits = x.to(tl.int32, bitcast=True)
    if x.shape[0] > 1:
        bits = tl.where((tl.arange(0, x.shape[0]) == t)[:, None, None], bits, 0)
    return tl.sum(bits, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def put(tile, t: tl.constexpr, x):
    """The tile [BT, ., .] with x as its step t."""
    return tl.where((tl.arange(0, tile.shape[0]) == t)[:, None, None], x[None, :, :], tile)


@triton.jit
def for_all_channels(M, part: tl.constexpr, PART: tl.constexpr, BD: tl.constexpr):
    """Steps part*PART .. of a B or C [BT, BN, 1], for each channel: [PART, BN, BD]. One that is constant, [1, BN, BD],
    as it is. All lanes need all of it, and a whole tile would fill their registers."""
    BT: tl.constexpr = M.shape[0]
    BN: tl.constexpr = M.shape[1]
    if BT == 1:
        return tl.broadcast_to(M, (1, BN, BD))
    else:
        steps = at_step(tl.reshape(M, (BT // PART, PART, BN)), part)
        return tl.broadcast_to(steps[:, :, None], (PART, BN, BD))


@triton.jit
def sum_states(x, LANES: tl.constexpr):
    """x [BN, BD] summed over those of a channel's states that a thread holds: [LANES, BD]."""
    return tl.sum(tl.reshape(x, (x.shape[0] // LANES, LANES, x.shape[1])), axis=0)


@triton.jit
def sum_last(x):
    """x [., ., 2**k] summed over its last axis, which lies in lanes. Splitting off the last bit of that axis moves the
    tile, through shared memory, to where its other bits lie in a thread; a plain sum would shuffle every value k times.
    """
    HALF: tl.constexpr = x.shape[2] // 2
    if HALF:
        low, high = tl.split(tl.permute(tl.reshape(x, (x.shape[0], x.shape[1], HALF, 2)), (2, 0, 1, 3)))
        return tl.sum(low + high, axis=0)
    else:
        return tl.reshape(x, (x.shape[0], x.shape[1]))


@triton.jit
def over_lanes(x):
    """x [BT, LANES, BD], one ``sum_states`` a step, summed over lanes: [BT, BD]."""
    return sum_last(tl.permute(computed_once(x), (0, 2, 1)))


@triton.jit
def next_state(h, size, x, b, rate, EXACT: tl.constexpr):
    """exp(Δ A) h + Δ u B, all [BN, BD]; size: Δ log2(e), x: Δ u."""
    return decay(size * rate, EXACT) * h + x * b


# ---- addresses ------------------------------------------------------------------------------------------------------


@triton.jit
def row_bounds(cu_seqlens, row, length, PACKED: tl.constexpr):
    """(batch entry, first step, steps) of a row; offsets out of range are clamped."""
    if PACKED:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + row).to(tl.int64), 0), length)
        stop = tl.minimum(tl.maximum(tl.load(cu_seqlens + row + 1).to(tl.int64), start), length)
        return row * 0, start, stop - start
    else:
        return row, row * 0, row * 0 + length


@triton.jit
def lines(x, t0, tau, d, line, TIME_CONTIGUOUS: tl.constexpr):
    """Pointers [BT, BD] to steps t0 + tau of channels d; stride 1 is along length or dim, ``line`` the other's."""
    if TIME_CONTIGUOUS:
        return (x + t0) + (tau[:, None] + d[None, :] * line)
    else:
        return (x + t0 * line) + (tau.to(tl.int64)[:, None] * line + d[None, :])


@triton.jit
def load_lines(x, t0, tau, d, line, mask, TIME_CONTIGUOUS: tl.constexpr):
    return tl.load(lines(x, t0, tau, d, line, TIME_CONTIGUOUS), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_projection(M, t0, tau, t_ok, n, n_ok, stride_n, stride_t):
    """[BT, BN, 1] of a B or C that varies with time; M points at its batch entry and group."""
    tile = (M + t0 * stride_t) + (tau.to(tl.int64)[:, None] * stride_t + n.to(tl.int64)[None, :] * stride_n)
    return computed_once(tl.load(tile, mask=t_ok[:, None] & n_ok[None, :], other=0.0).to(tl.float32))[:, :, None]


@triton.jit
def step_sizes(delta, bias, mask, SOFTPLUS: tl.constexpr):
    """(before softplus, Δ) of a tile; a masked step has size 0, which leaves the state as it is."""
    raw = delta + bias[None, :]
    if SOFTPLUS:
        return raw, computed_once(tl.where(mask, softplus(raw), 0.0))
    else:
        return raw, tl.where(mask, raw, 0.0)


@triton.jit
def tile_span(tile, first, stop, K: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr):
    """(first step, one past the last) of a tile, relative to the row. K = 0: tiles follow each other unbroken."""
    if K:
        t0 = first + (tile // TILES) * K + (tile % TILES) * BT
        return t0, tl.minimum(stop, first + (tile // TILES + 1) * K)
    else:
        return first + tile * BT, stop


@triton.jit
def tile_count(steps, K: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr):
    if K:
        return tl.cdiv(steps, K) * TILES
    else:
        return tl.cdiv(steps, BT)


@triton.jit
def add_or_store(target, value, mask, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(target, value, mask=mask, sem="relaxed")
    else:
        tl.store(target, value, mask=mask)


# ---- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    u, delta, A, B, C, D, z, bias, initial_state, cu_seqlens, out, last_state, states, entering, totals,
    dim, state, length, groups, blocks, pieces, span,
    u_batch, u_line, delta_batch, delta_line, z_batch, z_line, out_batch, out_line,
    B_batch, B_group, B_n, B_t, C_batch, C_group, C_n, C_t,
    BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr,
    TIME_CONTIGUOUS: tl.constexpr, PACKED: tl.constexpr, SOFTPLUS: tl.constexpr, SPLIT: tl.constexpr,
    ONLY_STATE: tl.constexpr, PART: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One pass of the forward over a piece of a row. Programs: rows x pieces x groups x blocks of a group's channels.

    An argument that is None switches its part off. SPLIT: the piece starts from ``entering`` (rows, pieces, dim,
    state) rather than from the initial state. ONLY_STATE: start every piece from 0 and write only the state it ends
    with, into ``entering`` of the next piece, and the sum of its step sizes, into ``totals`` (rows, pieces, dim); the
    last piece hands nothing on and has no program.
    """
    EXACT: tl.constexpr = delta.dtype.element_ty == tl.float32
    pid = tl.program_id(0).to(tl.int64)
    block, pid = pid % blocks, pid // blocks
    group, pid = pid % groups, pid // groups
    walked = pieces - 1 if ONLY_STATE else pieces
    piece, row = pid % walked, pid // walked
    per_group = dim // groups
    in_group = block * BD + tl.arange(0, BD).to(tl.int64)
    d_ok = in_group < per_group
    d = group * per_group + in_group
    n = tl.arange(0, BN)
    n_ok = n < state
    nd_ok = n_ok[:, None] & d_ok[None, :]
    nd = d[None, :] * state + n[:, None]
    tau = tl.arange(0, BT)

    batch, start, steps = row_bounds(cu_seqlens, row, length, PACKED)
    first = piece * span
    stop = tl.minimum(steps, first + span)
    u += batch * u_batch
    delta += batch * delta_batch
    rate = computed_once(finite(tl.load(A + nd, mask=nd_ok, other=0.0)))
    step_bias = tl.zeros([BD], tl.float32)
    if bias is not None:
        step_bias = tl.load(bias + d, mask=d_ok, other=0.0)
    if B_t is None:
        B_tile = tl.load(B + nd, mask=nd_ok, other=0.0)[None, :, :]
    else:
        B += batch * B_batch + group * B_group
    if not ONLY_STATE:
        out += batch * out_batch
        if z is not None:
            z += batch * z_batch
        if D is not None:
            skip = tl.load(D + d, mask=d_ok, other=0.0)
        if C_t is None:
            C_tile = tl.load(C + nd, mask=nd_ok, other=0.0)[None, :, :]
        else:
            C += batch * C_batch + group * C_group

    h = tl.zeros([BN, BD], tl.float32)
    if SPLIT:
        h += computed_once(tl.load(entering + (row * pieces + piece) * dim * state + nd, mask=nd_ok, other=0.0))
    elif initial_state is not None and not ONLY_STATE:
        h += computed_once(tl.load(initial_state + row * dim * state + nd, mask=nd_ok, other=0.0))
    total = tl.zeros([BD], tl.float32)

    for tile in tl.range(tile_count(stop - first, K, BT, TILES), num_stages=STAGES):
        t0, end = tile_span(tile, first, stop, K, BT, TILES)
        if states is not None:
            if tile % TILES == 0:
                slot = (start // K + row if PACKED else row * tl.cdiv(length, K)) + t0 // K
                tl.store(states + slot * dim * state + nd, h, mask=nd_ok)
        t = start + t0
        t_ok = tau < tl.minimum(end - t0, BT).to(tl.int32)
        td_ok = t_ok[:, None] & d_ok[None, :]
        x = load_lines(u, t, tau, d, u_line, td_ok, TIME_CONTIGUOUS)
        _, size = step_sizes(
            load_lines(delta, t, tau, d, delta_line, td_ok, TIME_CONTIGUOUS), step_bias, td_ok, SOFTPLUS
        )
        if B_t is not None:
            B_tile = load_projection(B, t, tau, t_ok, n, n_ok, B_n, B_t)
        if not ONLY_STATE:
            if C_t is not None:
                C_tile = load_projection(C, t, tau, t_ok, n, n_ok, C_n, C_t)
        sizes = over_states(computed_once(to_log2(size)), BN)
        inputs = over_states(computed_once(size * x), BN)
        y = tl.zeros([BT, LANES, BD], tl.float32)
        for part in tl.static_range(BT // PART):
            B_part = for_all_channels(B_tile, part, PART, BD)
            if not ONLY_STATE:
                C_part = for_all_channels(C_tile, part, PART, BD)
            for i in tl.static_range(part * PART, part * PART + PART):
                h = next_state(h, at_step(sizes, i), at_step(inputs, i), at_step(B_part, i - part * PART), rate, EXACT)
                if not ONLY_STATE:
                    y = put(y, i, sum_states(h * at_step(C_part, i - part * PART), LANES))
        if ONLY_STATE:
            total += tl.sum(size, axis=0)
        else:
            y = over_lanes(y)
            if D is not None:
                y += skip[None, :] * x
            if z is not None:
                gate = load_lines(z, t, tau, d, z_line, td_ok, TIME_CONTIGUOUS)
                y *= gate * sigmoid(gate)
            tl.store(lines(out, t, tau, d, out_line, TIME_CONTIGUOUS), rounded(y, out.dtype.element_ty), mask=td_ok)

    if ONLY_STATE:
        tl.store(entering + (row * pieces + piece + 1) * dim * state + nd, h, mask=nd_ok)
        tl.store(totals + (row * pieces + piece) * dim + d, total, mask=d_ok)
    elif last_state is not None:
        if piece == pieces - 1:
            tl.store(last_state + row * dim * state + nd, h, mask=nd_ok)


@triton.jit
def combine_kernel(
    A, edge, carry, totals, dim, state, pieces,
    BN: tl.constexpr, BD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Carry states (or, in reverse, adjoints) across pieces: carry[next] += decay of the piece * carry[piece].

    edge: (rows, dim, state), what enters the first piece, or None for 0. carry: (rows, pieces, dim, state) holds what
    each piece hands on when it starts from 0. Programs: rows x blocks of channels.
    """
    blocks = tl.cdiv(dim, BD)
    row, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    d = block * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    d_ok = d < dim
    ok = (n < state)[:, None] & d_ok[None, :]
    nd = d.to(tl.int64)[None, :] * state + n[:, None]
    rate = finite(tl.load(A + nd, mask=ok, other=0.0))
    h = tl.zeros([BN, BD], tl.float32)
    if edge is not None:
        h = tl.load(edge + row * dim * state + nd, mask=ok, other=0.0)
    i = tl.program_id(0) * 0
    while i < pieces:
        piece = pieces - 1 - i if REVERSE else i
        at = carry + (row * pieces + piece) * dim * state + nd
        own = tl.load(at, mask=ok & (i > 0), other=0.0)
        if i > 0:
            before = piece + 1 if REVERSE else piece - 1
            size = tl.load(totals + (row * pieces + before) * dim + d, mask=d_ok, other=0.0)
            # a product of growing decays may overflow where every single step is finite: 0 stays 0 then
            h = own + tl.where(h == 0.0, 0.0, tl.exp2(to_log2(size)[None, :] * rate) * h)
        tl.store(at, h, mask=ok)
        i += 1


# ---- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def adjoint_kernel(
    delta, A, C, z, bias, dout, entering, totals,
    dim, state, length, groups, blocks, pieces, span,
    delta_batch, delta_line, z_batch, z_line, dout_batch, dout_line, C_batch, C_group, C_n, C_t,
    BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, TIME_CONTIGUOUS: tl.constexpr, SOFTPLUS: tl.constexpr,
    PART: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The adjoint x = exp(Δ A) (C dy + x) over a piece, backwards from 0: ``forward_kernel``'s ONLY_STATE in reverse.

    Writes what the piece hands to the piece before it into ``entering`` (rows, pieces, dim, state) of that piece, and
    the sum of its step sizes into ``totals``. Rows are not packed. Programs as in ``forward_kernel``, but none for the
    first piece.
    """
    EXACT: tl.constexpr = delta.dtype.element_ty == tl.float32
    pid = tl.program_id(0).to(tl.int64)
    block, pid = pid % blocks, pid // blocks
    group, pid = pid % groups, pid // groups
    piece, row = pid % (pieces - 1) + 1, pid // (pieces - 1)
    per_group = dim // groups
    in_group = block * BD + tl.arange(0, BD).to(tl.int64)
    d_ok = in_group < per_group
    d = group * per_group + in_group
    n = tl.arange(0, BN)
    n_ok = n < state
    nd_ok = n_ok[:, None] & d_ok[None, :]
    nd = d[None, :] * state + n[:, None]
    tau = tl.arange(0, BT)

    first = piece * span
    stop = tl.minimum(length, first + span)
    delta += row * delta_batch
    dout += row * dout_batch
    if z is not None:
        z += row * z_batch
    rate = computed_once(finite(tl.load(A + nd, mask=nd_ok, other=0.0)))
    step_bias = tl.zeros([BD], tl.float32)
    if bias is not None:
        step_bias = tl.load(bias + d, mask=d_ok, other=0.0)
    if C_t is None:
        C_tile = tl.load(C + nd, mask=nd_ok, other=0.0)[None, :, :]
    else:
        C += row * C_batch + group * C_group
    x = tl.zeros([BN, BD], tl.float32)
    total = tl.zeros([BD], tl.float32)
    tiles = tl.cdiv(stop - first, BT)
    for turn in tl.range(tiles, num_stages=STAGES):
        t = first + (tiles - 1 - turn) * BT
        t_ok = tau < tl.minimum(stop - t, BT).to(tl.int32)
        td_ok = t_ok[:, None] & d_ok[None, :]
        _, size = step_sizes(
            load_lines(delta, t, tau, d, delta_line, td_ok, TIME_CONTIGUOUS), step_bias, td_ok, SOFTPLUS
        )
        dy = load_lines(dout, t, tau, d, dout_line, td_ok, TIME_CONTIGUOUS)
        if z is not None:
            gate = load_lines(z, t, tau, d, z_line, td_ok, TIME_CONTIGUOUS)
            dy *= gate * sigmoid(gate)
        if C_t is not None:
            C_tile = load_projection(C, t, tau, t_ok, n, n_ok, C_n, C_t)
        sizes = over_states(computed_once(to_log2(size)), BN)
        dys = over_states(computed_once(dy), BN)
        for part in tl.static_range(BT // PART - 1, -1, -1):
            C_part = for_all_channels(C_tile, part, PART, BD)
            for i in tl.static_range(part * PART + PART - 1, part * PART - 1, -1):
                G = at_step(dys, i) * at_step(C_part, i - part * PART) + x
                x = decay(at_step(sizes, i) * rate, EXACT) * G
        total += tl.sum(size, axis=0)
    tl.store(entering + (row * pieces + piece - 1) * dim * state + nd, x, mask=nd_ok)
    tl.store(totals + (row * pieces + piece) * dim + d, total, mask=d_ok)


@triton.jit
def backward_kernel(
    u, delta, A, B, C, D, z, bias, cu_seqlens, states, kept, dout, dlast_state, entering,
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial_state,
    dim, state, length, groups, blocks, pieces, span,
    u_batch, u_line, delta_batch, delta_line, z_batch, z_line, dout_batch, dout_line,
    du_batch, du_line, ddelta_batch, ddelta_line, dz_batch, dz_line,
    B_batch, B_group, B_n, B_t, C_batch, C_group, C_n, C_t, part_block, part_row,
    BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr,
    TIME_CONTIGUOUS: tl.constexpr, PACKED: tl.constexpr, SOFTPLUS: tl.constexpr,
    PART: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
    ATOMIC_BLOCKS: tl.constexpr, ATOMIC_ROWS: tl.constexpr,
):  # fmt: skip
    """All gradients of a piece of a row: states recomputed from ``states`` a tile at a time, latest tile first.

    kept: scratch (rows, pieces, TILES, dim, state) for the states entering an interval's tiles where it has several.
    Programs as in ``forward_kernel``. An argument that is None switches its part off. ``entering`` (rows, pieces,
    dim, state): the adjoint that comes from the piece after; None: ``dlast_state``, or 0.
    dB, dC that vary with time are summed over the program's channels, then over blocks: by atomic additions to the
    zeroed gradient where ATOMIC_BLOCKS, else each block writes its own part, ``part_block`` elements further on.
    dA, dD, dbias and constant dB, dC are summed over the program's steps, then likewise over rows and pieces:
    ATOMIC_ROWS, or a part for each, ``part_row`` channels further on.
    """
    EXACT: tl.constexpr = delta.dtype.element_ty == tl.float32
    # what z gates is summed in the sweep back, which has C at hand; but exact decays leave no registers there
    Y_FIRST: tl.constexpr = EXACT and z is not None
    pid = tl.program_id(0).to(tl.int64)
    block, pid = pid % blocks, pid // blocks
    group, pid = pid % groups, pid // groups
    piece, row = pid % pieces, pid // pieces
    per_group = dim // groups
    in_group = block * BD + tl.arange(0, BD).to(tl.int64)
    d_ok = in_group < per_group
    d = group * per_group + in_group
    n = tl.arange(0, BN)
    n_ok = n < state
    nd_ok = n_ok[:, None] & d_ok[None, :]
    nd = d[None, :] * state + n[:, None]
    tau = tl.arange(0, BT)

    batch, start, steps = row_bounds(cu_seqlens, row, length, PACKED)
    first = piece * span
    stop = tl.minimum(steps, first + span)
    slot = start // K + row if PACKED else row * tl.cdiv(length, K)
    if TILES > 1:
        kept += (row * pieces + piece) * TILES * dim * state
    u += batch * u_batch
    delta += batch * delta_batch
    dout += batch * dout_batch
    du += batch * du_batch
    ddelta += batch * ddelta_batch
    if z is not None:
        z += batch * z_batch
        dz += batch * dz_batch
    A_tile = computed_once(tl.load(A + nd, mask=nd_ok, other=0.0))
    rate = finite(A_tile)
    step_bias = tl.zeros([BD], tl.float32)
    if bias is not None:
        step_bias = tl.load(bias + d, mask=d_ok, other=0.0)
    if D is not None:
        skip = tl.load(D + d, mask=d_ok, other=0.0)
    if B_t is None:
        B_tile = tl.load(B + nd, mask=nd_ok, other=0.0)[None, :, :]
    else:
        B += batch * B_batch + group * B_group
        dB += block * part_block + (batch * groups + group) * state * length
    if C_t is None:
        C_tile = tl.load(C + nd, mask=nd_ok, other=0.0)[None, :, :]
    else:
        C += batch * C_batch + group * C_group
        dC += block * part_block + (batch * groups + group) * state * length

    x = tl.zeros([BN, BD], tl.float32)
    if entering is not None:
        x += computed_once(tl.load(entering + (row * pieces + piece) * dim * state + nd, mask=nd_ok, other=0.0))
    elif dlast_state is not None:
        x += computed_once(tl.load(dlast_state + row * dim * state + nd, mask=nd_ok, other=0.0))
    dA_sum = tl.zeros([BN, BD], tl.float32)
    dB_sum = tl.zeros([BN, BD], tl.float32)
    dC_sum = tl.zeros([BN, BD], tl.float32)
    dD_sum = tl.zeros([BD], tl.float32)
    dbias_sum = tl.zeros([BD], tl.float32)

    count = tile_count(stop - first, K, BT, TILES)
    for turn in tl.range(count, num_stages=STAGES):
        tile = count - 1 - turn
        t0, end = tile_span(tile, first, stop, K, BT, TILES)
        h_tile = states + (slot + t0 // K) * dim * state + nd
        if TILES > 1:
            sub = tile % TILES
            if sub == TILES - 1:
                # coming upon an interval from its end: run through it once, keeping the state that enters each tile
                r = computed_once(tl.load(h_tile, mask=nd_ok, other=0.0))
                s = sub * 0
                while s < sub:
                    ts = start + t0 + (s - sub) * BT
                    s_ok = tau < tl.minimum(start + end - ts, BT).to(tl.int32)
                    sd_ok = s_ok[:, None] & d_ok[None, :]
                    v = load_lines(u, ts, tau, d, u_line, sd_ok, TIME_CONTIGUOUS)
                    raw = load_lines(delta, ts, tau, d, delta_line, sd_ok, TIME_CONTIGUOUS)
                    _, size = step_sizes(raw, step_bias, sd_ok, SOFTPLUS)
                    if B_t is not None:
                        B_tile = load_projection(B, ts, tau, s_ok, n, n_ok, B_n, B_t)
                    sizes = over_states(computed_once(to_log2(size)), BN)
                    inputs = over_states(computed_once(size * v), BN)
                    for part in tl.static_range(BT // PART):
                        B_part = for_all_channels(B_tile, part, PART, BD)
                        for i in tl.static_range(part * PART, part * PART + PART):
                            r = next_state(
                                r, at_step(sizes, i), at_step(inputs, i), at_step(B_part, i - part * PART), rate, EXACT
                            )
                    s += 1
                    tl.store(kept + s * dim * state + nd, r, mask=nd_ok)
                tl.debug_barrier()
            h_tile = tl.where(sub == 0, h_tile, kept + sub * dim * state + nd)
        h0 = computed_once(tl.load(h_tile, mask=nd_ok, other=0.0))
        t = start + t0
        t_ok = tau < tl.minimum(end - t0, BT).to(tl.int32)
        td_ok = t_ok[:, None] & d_ok[None, :]
        v = load_lines(u, t, tau, d, u_line, td_ok, TIME_CONTIGUOUS)
        raw, size = step_sizes(
            load_lines(delta, t, tau, d, delta_line, td_ok, TIME_CONTIGUOUS), step_bias, td_ok, SOFTPLUS
        )
        dy = load_lines(dout, t, tau, d, dout_line, td_ok, TIME_CONTIGUOUS)
        if z is not None:
            gate = load_lines(z, t, tau, d, z_line, td_ok, TIME_CONTIGUOUS)
        if B_t is not None:
            B_tile = load_projection(B, t, tau, t_ok, n, n_ok, B_n, B_t)
        if C_t is not None:
            C_tile = load_projection(C, t, tau, t_ok, n, n_ok, C_n, C_t)
        sizes = over_states(computed_once(to_log2(size)), BN)
        inputs = over_states(computed_once(size * v), BN)
        hs = tl.zeros([BT, BN, BD], tl.float32)
        y = tl.zeros([BT, LANES, BD], tl.float32)
        h = h0
        for part in tl.static_range(BT // PART):
            B_part = for_all_channels(B_tile, part, PART, BD)
            if Y_FIRST:
                C_part = for_all_channels(C_tile, part, PART, BD)
            for i in tl.static_range(part * PART, part * PART + PART):
                h = next_state(h, at_step(sizes, i), at_step(inputs, i), at_step(B_part, i - part * PART), rate, EXACT)
                hs = put(hs, i, h)
                if Y_FIRST:
                    y = put(y, i, sum_states(h * at_step(C_part, i - part * PART), LANES))
        if Y_FIRST:
            before_gate = over_lanes(y)

        if z is not None:
            open_ = sigmoid(gate)
            slope = dy * open_ * (1.0 + gate * (1.0 - open_))
            dy *= gate * open_
        dys = over_states(computed_once(dy), BN)
        tn = tau[:, None] + n.to(tl.int64)[None, :] * length
        tn_ok = t_ok[:, None] & n_ok[None, :]
        if C_t is not None:
            add_or_store((dC + t) + tn, sum_last(computed_once(dys * hs)), tn_ok, ATOMIC_BLOCKS)
        else:
            dC_sum += tl.sum(dys * hs, axis=0)

        # the sweep back makes decays, and spreads B and C, anew: held since the sweep forward, they would not fit
        sizes, B_again, C_again = computed_again(sizes), computed_again(B_tile), computed_again(C_tile)
        Gs = hs
        GB = tl.zeros([BT, LANES, BD], tl.float32)
        AG = tl.zeros([BT, LANES, BD], tl.float32)
        dA_tile = tl.zeros([BN, BD], tl.float32)
        for part in tl.static_range(BT // PART - 1, -1, -1):
            B_part = for_all_channels(B_again, part, PART, BD)
            C_part = for_all_channels(C_again, part, PART, BD)
            for i in tl.static_range(part * PART + PART - 1, part * PART - 1, -1):
                step = at_step(sizes, i)
                if z is not None and not Y_FIRST:
                    y = put(y, i, sum_states(at_step(hs, i) * at_step(C_part, i - part * PART), LANES))
                G = at_step(dys, i) * at_step(C_part, i - part * PART) + x
                x = decay(step * rate, EXACT) * G
                if i > 0:
                    through = x * at_step(hs, i - 1)
                else:
                    through = x * h0
                dA_tile += through * step
                AG = put(AG, i, sum_states(through * A_tile, LANES))
                GB = put(GB, i, sum_states(G * at_step(B_part, i - part * PART), LANES))
                Gs = put(Gs, i, G)
        dA_sum += dA_tile
        GB, AG = over_lanes(GB), over_lanes(AG)
        if z is not None:
            if not Y_FIRST:
                before_gate = over_lanes(y)
            if D is not None:
                before_gate += skip[None, :] * v
            slope *= before_gate
            tl.store(lines(dz, t, tau, d, dz_line, TIME_CONTIGUOUS), rounded(slope, dz.dtype.element_ty), mask=td_ok)

        dx = size * GB
        if D is not None:
            dx += skip[None, :] * dy
            dD_sum += tl.sum(dy * v, axis=0)
        tl.store(lines(du, t, tau, d, du_line, TIME_CONTIGUOUS), rounded(dx, du.dtype.element_ty), mask=td_ok)
        dsize = v * GB + AG
        if SOFTPLUS:
            dsize *= sigmoid(raw)
        tl.store(
            lines(ddelta, t, tau, d, ddelta_line, TIME_CONTIGUOUS), rounded(dsize, ddelta.dtype.element_ty), mask=td_ok
        )
        dbias_sum += tl.sum(tl.where(td_ok, dsize, 0.0), axis=0)
        if B_t is not None:
            add_or_store((dB + t) + tn, sum_last(computed_once(inputs * Gs)), tn_ok, ATOMIC_BLOCKS)
        else:
            dB_sum += tl.sum(inputs * Gs, axis=0)

    dA_sum *= LN2  # the step sizes were in units of log2(e)
    part = (row * pieces + piece) * part_row
    add_or_store(dA + part * state + nd, dA_sum, nd_ok, ATOMIC_ROWS)
    if B_t is None:
        add_or_store(dB + part * state + nd, dB_sum, nd_ok, ATOMIC_ROWS)
    if C_t is None:
        add_or_store(dC + part * state + nd, dC_sum, nd_ok, ATOMIC_ROWS)
    if D is not None:
        add_or_store(dD + part + d, dD_sum, d_ok, ATOMIC_ROWS)
    if bias is not None:
        add_or_store(dbias + part + d, dbias_sum, d_ok, ATOMIC_ROWS)
    if dinitial_state is not None:
        if piece == 0:
            tl.store(dinitial_state + row * dim * state + nd, x, mask=nd_ok)
