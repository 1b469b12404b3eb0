"""A vector of 16 floats for Numba, a few of them that advance together, and the tile moves that need one.

Numba leaves vectorising to LLVM, which does not keep a recurrence in registers across a loop nest it did not write.
Here the vector is a type of its own (LLVM's <16 x float>), so what is written is what runs: one 512-bit register, two
of 256 bits or four of 128, whatever the host has. No fast-math flag is set, so NaN and Inf travel as IEEE says; the
only fused operations are the ones written ``fma``. Addresses are plain integers, in bytes.

A tile in scratch memory is a row of 16 floats (64 bytes) for every step; lanes are channels, or states.
"""

from __future__ import annotations

import operator
import zlib
from pathlib import Path

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model

LANES = 16
ROW = 4 * LANES  # bytes of one scratch row
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2  # kinds of elements in tensors
inlined = njit(error_model="numpy", forceinline=True)

F32, I32, I16, HALF = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.HalfType()
V_F32, V_I32, V_I16, V_HALF = (ir.VectorType(t, LANES) for t in (F32, I32, I16, HALF))


FEATURES = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES  # type: ignore[attr-defined]
AVX512 = "+avx512dq" in FEATURES.split(",")
# Vectors that advance together: independent chains hide the latency of an FMA, but all must stay in registers.
TOGETHER = 4 if AVX512 else 2
V_FEW = ir.ArrayType(V_F32, TOGETHER)


def text_hash(folder: Path) -> str:
    """Short hash of all that the kernels in this folder are made of."""
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("cpu_*.py")))
    return f"{zlib.crc32(text):08x}"


SOURCES = text_hash(Path(__file__).parent)


def variant(*suffixes):
    """Compile a function that a factory makes several of, under a name of its own.

    Numba tells functions of one name and type apart by a counter that starts anew in every process. Object code that
    two processes have cached may then hold two different functions under one symbol, of which the linker picks one.
    """

    def compiled(function):
        function.__qualname__ = "_".join([function.__qualname__, *map(str, suffixes)])
        return njit(function, error_model="numpy")

    return compiled


def entry(function):
    """Compile a function that starts threads, once for all processes.

    Numba's disk cache finds it by its name and the date of its own file; with a name that changes whenever any of the
    kernels' text does, what was made from another text is never found.
    """
    function.__qualname__ = f"{function.__qualname__}_{SOURCES}"
    return njit(function, parallel=True, cache=True, error_model="numpy")


class Registers(types.Type):
    """What LLVM keeps in registers as a value of its own."""

    def __init__(self, name, representation):
        super().__init__(name)
        self.representation = representation


@register_model(Registers)
class _RegistersModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.representation)


vector = Registers("vector16f", V_F32)  # 16 floats, one for each lane
few = Registers("few16f", V_FEW)  # TOGETHER vectors


def _operation(function, *arguments, returns=vector):
    """Let Numba code call ``function``, or else the decorated emitter itself: ``emit(builder, *values)`` writes IR."""

    def register(emit):
        callee = function or emit

        class _Typing(ConcreteTemplate):
            key = callee
            cases = [signature(returns, *arguments)]  # noqa: RUF012

        infer_global(callee, types.Function(_Typing))

        @lower_builtin(callee, *arguments)
        def _lower(context, builder, sig, values):
            result = emit(builder, *values)
            return context.get_dummy_value() if returns is types.none else result

        return emit

    return register


def _few(b, values):
    made = ir.Constant(V_FEW, ir.Undefined)
    for k, x in enumerate(values):
        made = b.insert_value(made, x, k)
    return made


def _each(emit):
    """``emit`` for each of a few vectors; an argument that is a single one serves all."""

    def lifted(b, *values):
        parts = [
            [b.extract_value(x, k) for k in range(TOGETHER)] if x.type == V_FEW else [x] * TOGETHER for x in values
        ]
        return _few(b, [emit(b, *one) for one in zip(*parts, strict=True)])

    return lifted


_operation(operator.add, vector, vector)(lambda b, x, y: b.fadd(x, y))
_operation(operator.add, few, few, returns=few)(_each(lambda b, x, y: b.fadd(x, y)))
_operation(operator.mul, few, few, returns=few)(_each(lambda b, x, y: b.fmul(x, y)))
_operation(operator.mul, vector, few, returns=few)(_each(lambda b, x, y: b.fmul(x, y)))
_operation(operator.sub, vector, vector)(lambda b, x, y: b.fsub(x, y))
_operation(operator.mul, vector, vector)(lambda b, x, y: b.fmul(x, y))
_operation(operator.truediv, vector, vector)(lambda b, x, y: b.fdiv(x, y))


def _constant(value, type_=V_F32):
    return ir.Constant(type_, [ir.Constant(type_.element, value)] * LANES)


def _splat(b, scalar):
    one = b.insert_element(ir.Constant(V_F32, ir.Undefined), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(one, ir.Constant(V_F32, ir.Undefined), ir.Constant(V_I32, [0] * LANES))


def _shuffle(b, x, y, lanes):
    return b.shuffle_vector(x, y, ir.Constant(V_I32, [ir.Constant(I32, i) for i in lanes]))


@_operation(None, types.float32)
def splat(b, x):
    """x in every lane."""
    return _splat(b, x)


@_operation(None, types.int64)
def load(b, address):
    """16 floats of scratch memory, which is aligned to 64 bytes."""
    return b.load(b.inttoptr(address, V_F32.as_pointer()), align=ROW)


@_operation(None, types.int64, vector, returns=types.none)
def store(b, address, x):
    b.store(x, b.inttoptr(address, V_F32.as_pointer()), align=ROW)


def _after(b, address, k, size):
    return b.add(address, ir.Constant(address.type, k * size))


@_operation(None, types.int64, returns=few)
def load_few(b, address):
    """A few rows of scratch memory."""
    return _few(b, [load(b, _after(b, address, k, ROW)) for k in range(TOGETHER)])


@_operation(None, types.int64, returns=few)
def broadcast_few(b, address):
    """A few floats that follow each other, each in every lane of a vector."""
    return _few(b, [_splat(b, read_float(b, _after(b, address, k, 4))) for k in range(TOGETHER)])


@_operation(None, vector, returns=few)
def repeat(b, x):
    """The same vector a few times."""
    return _few(b, [x] * TOGETHER)


@_operation(None, types.int64, few, returns=types.none)
def store_few(b, address, values):
    for k in range(TOGETHER):
        store(b, _after(b, address, k, ROW), b.extract_value(values, k))


@_operation(None, few, few)
def dot(b, x, y):
    """The sum of the products, the first one first."""
    total = None
    for k in range(TOGETHER):
        xk, yk = b.extract_value(x, k), b.extract_value(y, k)
        total = b.fmul(xk, yk) if total is None else _fma(b, xk, yk, total)
    return total


def _intrinsic(b, name, returns, values):
    function_type = ir.FunctionType(returns, [v.type for v in values])
    return b.call(cgutils.get_or_insert_function(b.module, function_type, name), values)


@_operation(None, vector, vector, vector)
def fma(b, x, y, z):
    """x*y + z, rounded once."""
    return _fma(b, x, y, z)


def _fma(b, x, y, z):
    return _intrinsic(b, "llvm.fma.v16f32", V_F32, [x, y, z])


_operation(fma, few, few, few, returns=few)(_each(_fma))
_operation(fma, vector, few, few, returns=few)(_each(_fma))


@_operation(None, vector)
def quiet(b, x):
    """x with every NaN made the plain one: ``decay`` adds to its bits and could carry another out of being a NaN."""
    return b.select(b.fcmp_unordered("uno", x, x), _constant(float("nan")), x)


# Minimax on [-1/2, 1/2] with value and slope at 0 exact, relative error 3e-9: far below rounding, since an error of
# one sign at every step adds up along time.
EXP2 = (
    0.00015324315225041622, 0.0013390958474994285, 0.00961851755962239, 0.05550359590692349, 0.2402264758625316,
    0.6931471805599453, 1.0,
)  # fmt: skip
ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits


def _polynomial(b, x, coefficients):
    p = _constant(coefficients[0])
    for c in coefficients[1:]:
        p = _fma(b, p, x, _constant(c))
    return p


def _at_least(b, x, low):  # keeps NaN
    return b.select(b.fcmp_ordered("<", x, _constant(low)), _constant(low), x)


def _at_most(b, x, high):  # keeps NaN
    return b.select(b.fcmp_ordered(">", x, _constant(high)), _constant(high), x)


def _avx512(b, name, *values):
    """An instruction that LLVM has no portable name for, on all lanes, in the current rounding mode."""
    tail = [values[0], ir.Constant(I16, -1), ir.Constant(I32, 4)]
    return _intrinsic(b, f"llvm.x86.avx512.mask.{name}.ps.512", V_F32, [*values, *tail])


def _power(b, n):
    """2^n for integers -127 .. 128 (as 0 and Inf there)."""
    return b.bitcast(b.shl(b.add(n, _constant(127, V_I32)), _constant(23, V_I32)), V_F32)


@_operation(None, vector, vector)
def decay(b, d, a):
    """2^(d a) as if the product were exact, to 1.2e-7 relative and without a bias.

    0 where d a is below -150 at the latest, Inf from 128 on, NaN for NaN, if d and a are ``quiet``.
    """
    x = b.fmul(d, a)
    if AVX512:
        n = _avx512(b, "rndscale", x, ir.Constant(I32, 8))
        fraction = _fma(b, d, a, b.fneg(n))
        # at most 1 in magnitude, so that 2^n alone decides where x is too large to have a fraction
        fraction = _avx512(b, "range", fraction, _constant(1.0), ir.Constant(I32, 2))
        return _avx512(b, "scalef", _polynomial(b, fraction, EXP2), n)
    rounded = b.fadd(x, _constant(ROUND))
    p = _polynomial(b, _fma(b, d, a, b.fsub(_constant(ROUND), rounded)), EXP2)
    bits = b.add(b.bitcast(p, V_I32), b.shl(b.bitcast(rounded, V_I32), _constant(23, V_I32)))
    power = b.select(b.fcmp_ordered("<", x, _constant(-126.0)), _constant(0.0), b.bitcast(bits, V_F32))
    return b.select(b.fcmp_ordered(">=", x, _constant(128.0)), _constant(float("inf")), power)


_operation(decay, vector, few, returns=few)(_each(decay))


@_operation(None, vector)
def exp(b, x):
    """e^x to 2e-7 relative over the whole range, subnormal results and overflow to Inf included."""
    x = _at_most(b, _at_least(b, x, -104.0), 89.0)
    log2e = _constant(1.4426950408889634)
    rounded = _fma(b, x, log2e, _constant(ROUND))
    n = b.fsub(rounded, _constant(ROUND))
    r = _fma(b, n, _constant(-0.693145751953125), x)  # ln 2 in two parts: the first product is exact
    r = _fma(b, n, _constant(-1.42860677e-06), r)
    p = _polynomial(b, b.fmul(r, log2e), EXP2)
    if AVX512:
        return _avx512(b, "scalef", p, n)
    whole = b.sub(b.bitcast(rounded, V_I32), b.bitcast(_constant(ROUND), V_I32))
    half = b.ashr(whole, _constant(1, V_I32))  # in two steps, since 2^n itself may not be a normal number
    return b.fmul(b.fmul(p, _power(b, half)), _power(b, b.sub(whole, half)))


# 2 atanh(s) / s - 2 by powers of s^2, for s up to 1/3; relative error 5e-9
ATANH = (0.2801198959350586, 0.28001806139945984, 0.4002152681350708, 0.666664183139801)


@_operation(None, vector)
def log1p_unit(b, e):
    """log(1 + e) for 0 <= e <= 1, to rounding relative to the result, however small."""
    s = b.fdiv(e, b.fadd(e, _constant(2.0)))
    q = b.fmul(s, s)
    p = b.fmul(q, _polynomial(b, q, ATANH))
    return _fma(b, s, p, b.fadd(s, s))


@_operation(None, vector)
def positive(b, x):
    """max(x, 0), NaN kept."""
    return _at_least(b, x, 0.0)


@_operation(None, vector)
def minus_abs(b, x):
    return b.bitcast(b.or_(b.bitcast(x, V_I32), _constant(-(2**31), V_I32)), V_F32)


@inlined
def softplus(x):
    """log(1 + e^x), relatively exact on both sides."""
    return positive(x) + log1p_unit(exp(minus_abs(x)))


@inlined
def sigmoid(x):
    one = splat(1.0)
    return one / (one + exp(splat(0.0) - x))


# ---- moving tiles between tensors and scratch -----------------------------------------------------------------------


def _widen(b, raw, kind):
    """16 elements as floats, or one."""
    if kind == FLOAT32:
        return raw
    vector_ = isinstance(raw.type, ir.VectorType)
    if kind == FLOAT16:
        return b.fpext(raw, V_F32 if vector_ else F32)
    to, shift = (V_I32, _constant(16, V_I32)) if vector_ else (I32, ir.Constant(I32, 16))
    return b.bitcast(b.shl(b.zext(raw, to), shift), V_F32 if vector_ else F32)


def _narrow(b, x, kind):
    """Round to nearest even, as torch does; a NaN stays one."""
    vector_ = isinstance(x.type, ir.VectorType)
    if kind == FLOAT32:
        return x
    if kind == FLOAT16:
        return b.fptrunc(x, V_HALF if vector_ else HALF)

    def const(v):
        return _constant(v, V_I32) if vector_ else ir.Constant(I32, v)

    bits = b.bitcast(x, V_I32 if vector_ else I32)
    odd = b.and_(b.lshr(bits, const(16)), const(1))
    rounded = b.lshr(b.add(b.add(bits, const(0x7FFF)), odd), const(16))
    rounded = b.select(b.fcmp_unordered("uno", x, x), const(0x7FC0), rounded)
    return b.trunc(rounded, V_I16 if vector_ else I16)


_ELEMENT = {FLOAT32: (F32, V_F32, 4), BFLOAT16: (I16, V_I16, 2), FLOAT16: (HALF, V_HALF, 2)}


def _interleave(b, x, y, step):
    """Swap the odd runs of ``step`` lanes of x with the even ones of y."""
    return (
        _shuffle(b, x, y, [LANES + j - step if j & step else j for j in range(LANES)]),
        _shuffle(b, x, y, [LANES + j if j & step else j + step for j in range(LANES)]),
    )


def _transpose(b, rows):
    """16 vectors -> 16 vectors: four rounds that swap ever larger halves between rows."""
    for step in (1, 2, 4, 8):
        rows = list(rows)
        for i in range(LANES):
            if not i & step:
                rows[i], rows[i + step] = _interleave(b, rows[i], rows[i + step], step)
    return rows


@_operation(None, types.int64, types.int64)
def totals(b, address, stride):
    """Lane i = the sum over lanes of the scratch row at address + i*stride, in a fixed order."""
    rows = [
        b.load(b.inttoptr(b.add(address, b.mul(stride, ir.Constant(stride.type, i))), V_F32.as_pointer()), align=ROW)
        for i in range(LANES)
    ]
    for step in (1, 2, 4, 8):
        rows = [b.fadd(*_interleave(b, x, y, step)) for x, y in zip(rows[::2], rows[1::2], strict=True)]
    return rows[0]


def _element_operations(kind):
    """The operations on tensors of one kind: (read one, write one, read 16, write 16, read 16x16, write 16x16)."""
    scalar, packed, size = _ELEMENT[kind]

    def at(b, address, type_):
        return b.inttoptr(address, type_.as_pointer())

    def row(b, address, stride, i, rows, spare):
        """Address of row i; beyond the last row, the spare."""
        i = ir.Constant(ir.IntType(64), i)
        return b.select(b.icmp_signed("<", i, rows), b.add(address, b.mul(i, stride)), spare)

    @_operation(None, types.int64, returns=types.float32)
    def read1(b, address):
        return _widen(b, b.load(at(b, address, scalar), align=size), kind)

    @_operation(None, types.int64, types.float32, returns=types.none)
    def write1(b, address, x):
        b.store(_narrow(b, x, kind), at(b, address, scalar), align=size)

    @_operation(None, types.int64)
    def read16(b, address):
        return _widen(b, b.load(at(b, address, packed), align=size), kind)

    @_operation(None, types.int64, vector, returns=types.none)
    def write16(b, address, x):
        b.store(_narrow(b, x, kind), at(b, address, packed), align=size)

    @_operation(None, types.int64, types.int64, types.int64, types.int64, types.int64, returns=types.none)
    def read_square(b, scratch, address, stride, rows, zeros):
        """Scratch row j, lane i = element j of row i; rows from ``rows`` on are read from zeros."""
        lines = [b.load(at(b, row(b, address, stride, i, rows, zeros), packed), align=size) for i in range(LANES)]
        for j, x in enumerate(_transpose(b, [_widen(b, x, kind) for x in lines])):
            b.store(x, at(b, b.add(scratch, ir.Constant(ir.IntType(64), j * ROW)), V_F32), align=ROW)

    @_operation(None, types.int64, types.int64, types.int64, types.int64, types.int64, returns=types.none)
    def write_square(b, scratch, address, stride, rows, spare):
        """The inverse; rows from ``rows`` on are written to spare."""
        lines = [
            b.load(at(b, b.add(scratch, ir.Constant(ir.IntType(64), j * ROW)), V_F32), align=ROW) for j in range(LANES)
        ]
        for i, x in enumerate(_transpose(b, lines)):
            b.store(_narrow(b, x, kind), at(b, row(b, address, stride, i, rows, spare), packed), align=size)

    return read1, write1, read16, write16, read_square, write_square


def _tile_moves(kind):
    size = _ELEMENT[kind][2]
    read1, write1, read16, write16, read_square, write_square = _element_operations(kind)

    @variant(kind)
    def gather(scratch, address, lane_stride, step_stride, lanes, steps, spare):
        if lane_stride == size and lanes == LANES:
            for t in range(steps):
                store(scratch + t * ROW, read16(address + t * step_stride))
            return
        t = 0
        if step_stride == size:
            while t + LANES <= steps:
                read_square(scratch + t * ROW, address + t * size, lane_stride, lanes, spare)
                t += LANES
        while t < steps:
            store(scratch + t * ROW, splat(0.0))
            for lane in range(lanes):
                write_float(scratch + t * ROW + 4 * lane, read1(address + t * step_stride + lane * lane_stride))
            t += 1

    @variant(kind)
    def scatter(scratch, address, lane_stride, step_stride, lanes, steps, spare):
        if lane_stride == size and lanes == LANES:
            for t in range(steps):
                write16(address + t * step_stride, load(scratch + t * ROW))
            return
        t = 0
        if step_stride == size:
            while t + LANES <= steps:
                write_square(scratch + t * ROW, address + t * size, lane_stride, lanes, spare)
                t += LANES
        while t < steps:
            for lane in range(lanes):
                write1(address + t * step_stride + lane * lane_stride, read_float(scratch + t * ROW + 4 * lane))
            t += 1

    return gather, scatter


@_operation(None, types.int64, returns=types.float32)
def read_float(b, address):
    return b.load(b.inttoptr(address, F32.as_pointer()), align=4)


@_operation(None, types.int64, types.float32, returns=types.none)
def write_float(b, address, x):
    b.store(x, b.inttoptr(address, F32.as_pointer()), align=4)


@_operation(None, types.int64, vector, returns=types.none)
def store_unaligned(b, address, x):
    b.store(x, b.inttoptr(address, V_F32.as_pointer()), align=4)


_gather_f32, _scatter_f32 = _tile_moves(FLOAT32)
_gather_bf16, _scatter_bf16 = _tile_moves(BFLOAT16)
_gather_f16, _scatter_f16 = _tile_moves(FLOAT16)


@njit(error_model="numpy")
def gather(kind, scratch, address, lane_stride, step_stride, lanes, steps, spare):
    """Copy a tile of a tensor into scratch as floats; lanes beyond ``lanes`` become 0.

    scratch row t, lane i = element at address + t*step_stride + i*lane_stride (strides in bytes, any). spare: 64 bytes
    of zeros. Fast where either stride is one element.
    """
    if kind == FLOAT32:
        _gather_f32(scratch, address, lane_stride, step_stride, lanes, steps, spare)
    elif kind == BFLOAT16:
        _gather_bf16(scratch, address, lane_stride, step_stride, lanes, steps, spare)
    else:
        _gather_f16(scratch, address, lane_stride, step_stride, lanes, steps, spare)


@njit(error_model="numpy")
def scatter(kind, scratch, address, lane_stride, step_stride, lanes, steps, spare):
    """The inverse of ``gather``; spare: 64 bytes that may be overwritten."""
    if kind == FLOAT32:
        _scatter_f32(scratch, address, lane_stride, step_stride, lanes, steps, spare)
    elif kind == BFLOAT16:
        _scatter_bf16(scratch, address, lane_stride, step_stride, lanes, steps, spare)
    else:
        _scatter_f16(scratch, address, lane_stride, step_stride, lanes, steps, spare)
