// Shared device helpers of the selective-scan kernels: types, math, where a block's row lies, and how tiles of
// u, delta, z (channels x time) and of B, C (time x states) come from device memory.
//
// Every file that includes this is specialised by defines (backends/cuda.py writes them):
//   DTYPE 0 float32, 1 bfloat16, 2 float16     STATE   states of a channel (N)
//   LANES  lanes that share a channel (S)      WARPS   warps of a block
//   TILE   steps of a tile (T)                 GROUPS  relay only: groups of channels of a block
//   CHECKPOINT  the state that enters every CHECKPOINT-th step of a row is kept; 0: none
//   RELAY  1: warps share channels and take turns in time: WARPS / GROUPS warps each of GROUPS groups of channels or, in
//     the backward, all warps all groups; 0: every warp has its own
//   POLYNOMIAL  of 32 exponentials, how many the FMA pipe computes (16-bit data only)
//   DIM_LAYOUT 1: u, delta, z, out are dim-contiguous, 0: length-contiguous
//   ALIGNED 1: every vector of u, delta, z, out may be moved as one access, and rows consist of whole ones
//   B_AXIS, C_AXIS 0: B, C length-contiguous, 1: state-contiguous; B_ALIGNED, C_ALIGNED as ALIGNED
//   KEEP_Y 1: y = C h + D u is kept for the backward, too
//   CONST_B, CONST_C, HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS, PACKED: the problem's flags
// and by the struct Params, which cuda.py generates from the list of fields that it fills.
//
// A warp holds PER_WARP = 32 / S channels at a time. A lane holds PER = ceil(N / S) states n = s*PER .. s*PER + PER-1 of a
// channel, with s = slice_of(lane) and the channel channel_of_lane(lane). States beyond N and channels beyond dim are
// computed on zeros and never stored; steps beyond the end have Δ = 0, which leaves h alone.

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
#define DEVICE __device__ __forceinline__

constexpr int PER = (STATE + LANES - 1) / LANES;  // states of a lane
constexpr int STATES = PER * LANES;  // N, padded
constexpr int THREADS = WARPS * 32;
constexpr int PER_WARP = 32 / LANES;  // channels a warp holds at a time
constexpr int CHANNELS = (RELAY ? 1 : WARPS) * PER_WARP * GROUPS;  // channels of a block
constexpr int ITEM = DTYPE == 0 ? 4 : 2;  // bytes of an element
// elements of a warp's tile that a lane loads and stores: OWN_C channels x OWN_T steps, a vector's where memory has them
// in a row
constexpr int OWN = PER_WARP * TILE < 32 ? 1 : PER_WARP * TILE / 32;
DEVICE constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int OWN_C = DIM_LAYOUT ? least(16 / ITEM, least(PER_WARP, OWN)) : PER_WARP == 32 && OWN * ITEM > 16 ? 2 : 1;
constexpr int OWN_T = OWN / OWN_C;
constexpr int NEXT_C = DIM_LAYOUT ? 1 : PER_WARP / OWN_C;  // from one of its channels to the next
constexpr int WORDS = (OWN * ITEM + 3) / 4;  // registers that hold them
constexpr int RUN = (DIM_LAYOUT ? OWN_C : OWN_T) * ITEM;  // bytes of them that lie in a row
constexpr int PIECE = RUN < 8 ? 1 : RUN < 16 ? 2 : 4;  // words moved at once
constexpr bool VECTORS = ALIGNED && RUN >= 4;  // whether they can be
// Along time, a lane's pieces lie between those of the other lanes of its channel, so that what lanes move at once is
// whole sectors of memory.
constexpr int EACH = DIM_LAYOUT ? OWN_T : least(OWN_T, PIECE * 4 / ITEM);  // steps of a piece
constexpr int ALONG = TILE / OWN_T;  // lanes along time
constexpr bool ALL_OWN = PER_WARP * TILE >= 32;  // else the last lanes own nothing
static_assert(OWN_T <= TILE && (OWN_T < 4 ? OWN_T != 3 : OWN_T % 4 == 0) && 32 % LANES == 0 && TILE % 4 == 0,
              "invalid configuration");

#if DTYPE == 0
typedef float scalar;
DEVICE float to_float(scalar v) { return v; }
DEVICE float low(u32 w) { return __uint_as_float(w); }
DEVICE float high(u32 w) { return __uint_as_float(w); }
DEVICE u32 pack(float a, float) { return __float_as_uint(a); }
#elif DTYPE == 1
typedef u16 scalar;
DEVICE float low(u32 w) { return __uint_as_float(w << 16); }
DEVICE float high(u32 w) { return __uint_as_float(w & 0xffff0000u); }
DEVICE u32 pack(float a, float b) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}
DEVICE float to_float(scalar v) { return low(v); }
#else
typedef u16 scalar;
DEVICE float to_float(scalar v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
  return r;
}
DEVICE float low(u32 w) { return to_float((scalar)w); }
DEVICE float high(u32 w) { return to_float((scalar)(w >> 16)); }
DEVICE u32 pack(float a, float b) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}
#endif

// ---- math: the special-function unit (MUFU) plus what keeps its results accurate ------------------------------------

constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;
DEVICE float ex2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
DEVICE float rcp(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
// Zero, but the compiler does not know: what depends on it is computed where it stands instead of being kept in
// registers across a loop.
DEVICE int here() {
  int zero;
  asm volatile("mov.s32 %0, 0;" : "=r"(zero));
  return zero;
}
// A thread's lane, likewise, where ptxas would see through `here` and keep what follows from it.
DEVICE int lane_here() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
// v as it lies in shared memory, which no register holds from an earlier look.
DEVICE int again(const int& v) { return *(const volatile int*)&v; }
// A register for v, which is not computed anew at each use.
DEVICE void keep(int& v) { asm volatile("" : "+r"(v)); }
DEVICE void keep(i64& v) { asm volatile("" : "+l"(v)); }
DEVICE float sigmoid(float x) { return rcp(1.f + ex2(-LOG2E * x)); }

// 2^x for x = dt*A <= 126 on the FMA pipe: nearest integer by a large addend, a polynomial (minimax, off by 9e-8) for
// the rest. From x = -126.5 down it stays where float32 has no normal number left.
DEVICE float ex2_polynomial(float dt, float A) {
  constexpr float LARGE = 12582912.f;  // 1.5 * 2^23
  const float whole = fmaxf(fmaf(dt, A, LARGE), LARGE - 126.f);
  const float rest = fmaf(dt, A, LARGE - whole);
  const float f = rest < -0.5f ? -0.5f : rest;  // NaN stays
  float p = fmaf(f, 1.326472639e-3f, 9.671512697e-3f);
  p = fmaf(p, f, 5.550733746e-2f), p = fmaf(p, f, 2.402224208e-1f), p = fmaf(p, f, 6.931469776e-1f), p = fmaf(p, f, 1.f);
  return p * __int_as_float((__float_as_int(whole) << 23) + 0x3f800000);
}
// exp(ΔA) of dt = Δ log2(e). The special-function unit is off by up to 1.2e-7 of its result, which adds up over the
// many steps that a slow decay remembers; float32 data therefore take a polynomial where the exponent is small.
DEVICE float decay_of(float dt, float A) {
  const float x = dt * A, fast = ex2(x);
#if DTYPE == 0
  float p = fmaf(x, 1.54035304e-4f, 1.33335581e-3f);
  p = fmaf(x, p, 9.61812911e-3f), p = fmaf(x, p, 5.55041087e-2f), p = fmaf(x, p, 2.40226507e-1f);
  p = fmaf(x, p, LN2), p = fmaf(x, p, 1.f);
  return fabsf(x) < 0.375f ? p : fast;
#else
  return fast;
#endif
}
// e^-|x|, in float32 with the rounding of the product |x| log2(e) put back
DEVICE float exp_neg_abs(float x) {
  float m = fabsf(x), t = -LOG2E * m, e = ex2(t);
#if DTYPE == 0
  float lost = fmaf(-LOG2E, m, -t) - 1.925963033e-8f * m;
  e = m < 100.f ? fmaf(e, lost * LN2, e) : e;
#endif
  return e;
}
// log(1 + e) for 0 <= e <= 1, accurate relative to the result however small e is. For float32 data half of it is
// artanh(r), r = e / (2 + e), and 2 artanh(r) / r a polynomial in r^2 (minimax, off by 4e-9 of it). For 16-bit data,
// times log2(e), log2(1 + e) / e is a polynomial (off by 1.3e-6), which leaves the special-function unit alone.
DEVICE float log_1p(float e, float plus) {  // + plus
#if DTYPE == 0
  const float r = e * rcp(2.f + e), q = r * r;
  float p = fmaf(q, 0.281915468f, 0.279576659f);
  p = fmaf(q, p, 0.400251143f), p = fmaf(q, p, 0.666663101f), p = fmaf(q, p, 2.00000001f);
  return fmaf(r, p, plus);
#else
  float p = fmaf(e, 0.0204012310f, -0.0957977094f);
  p = fmaf(e, p, 0.215284762f), p = fmaf(e, p, -0.339089168f), p = fmaf(e, p, 0.477668422f);
  p = fmaf(e, p, -0.721159480f), p = fmaf(e, p, 1.44269321f);
  return fmaf(e, p, plus);
#endif
}
// What a raw step size becomes: dt = Δ log2(e), so that exp(ΔA) = 2^(dt A), and `factor`, which u is multiplied by:
// Δ for float32 data; for 16-bit data Δ log2(e) too, and B is staged times B_SCALE = ln(2) for it.
// For float32 data log2(e) comes in two parts: one float32 constant is off by 1.3e-8, the same way at every step, which
// would add up over a long growing or slowly decaying row; so would a rounded A log2(e).
constexpr float B_SCALE = DTYPE == 0 ? 1.f : LN2;
struct StepSize {
  float dt, factor;
};
DEVICE StepSize step_size(float raw, float e) {  // e: e^-|raw|
  StepSize s;
#if SOFTPLUS
  s.factor = log_1p(e, fmaxf(raw, 0.f) * (DTYPE == 0 ? 1.f : LOG2E));
  if (DTYPE != 0) s.dt = s.factor;
#else
  s.factor = raw;
  if (DTYPE != 0) s.dt = s.factor = raw * LOG2E;
#endif
  if (DTYPE == 0) s.dt = fmaf(s.factor, 1.4375f, s.factor * 0.0051950408889634f);
  return s;
}
DEVICE StepSize step_size(float raw) { return step_size(raw, SOFTPLUS ? exp_neg_abs(raw) : 0.f); }
// dΔ / d raw, times a constant
DEVICE float step_slope(float raw, float e, float scale) {
#if SOFTPLUS
  const float r = rcp(fmaf(e, 1.f / scale, 1.f / scale));
  return raw < 0.f ? e * r : r;
#else
  return scale;
#endif
}

// A lane's slice and channel. Shared memory serves a warp's vectors of 16 bytes twice as fast where every lane's address is
// that of the lane across bit 0 or where it is that of the lane across bit 1: bit 0 tells channels apart, so that B and C
// are such, and bit 1 slices, so that a channel's steps are.
constexpr int SLICE_BIT = LANES < 32 ? 2 : 1;               // of a lane's number, the first that tells slices apart
DEVICE constexpr int slice_of(int lane) { return LANES == 32 ? lane : lane / SLICE_BIT % LANES; }
DEVICE constexpr int channel_of_lane(int lane) {
  return LANES == 32 ? 0 : lane % SLICE_BIT + lane / (LANES * SLICE_BIT) * SLICE_BIT;
}

// Vectors of four from and to shared memory, that of v[i] on at place(i).
template <int N, class Place>
DEVICE void get_vectors(float (&v)[N], const float* from, Place place) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 q = *(const float4*)(from + place(i));
    v[i] = q.x, v[i + 1] = q.y, v[i + 2] = q.z, v[i + 3] = q.w;
  }
}
template <int N, class Place>
DEVICE void set_vectors(float* to, const float (&v)[N], Place place) {
#pragma unroll
  for (int i = 0; i < N; i += 4) *(float4*)(to + place(i)) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
}
// N neighbours, aligned where 4 or 2 divide N. Where 4 does, vectors of four may lie STRIDE apart, so that lanes next to
// each other have theirs next to each other: they would meet at a bank, if each had all of its vectors in a row.
template <int STRIDE = 4, int N>
DEVICE void get(float (&v)[N], const float* from) {
  if constexpr (N % 4 == 0) {
    get_vectors(v, from, [](int i) { return i / 4 * STRIDE; });
  } else if constexpr (N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const float2 q = *(const float2*)(from + i);
      v[i] = q.x, v[i + 1] = q.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = from[i];
  }
}
template <int STRIDE = 4, int N>
DEVICE void set(float* to, const float (&v)[N]) {
  if constexpr (N % 4 == 0) {
    set_vectors(to, v, [](int i) { return i / 4 * STRIDE; });
  } else if constexpr (N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) *(float2*)(to + i) = make_float2(v[i], v[i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = v[i];
  }
}
// Where the first of a lane's (or slice's) N lies among all lanes' that lie so.
DEVICE constexpr int apart_at(int lane, int n) { return lane * (n % 4 == 0 ? 4 : n); }
// Where a channel's state lies among STATES that slices of PER, LANES of them, get so.
DEVICE constexpr int state_at(int n) {
  return PER % 4 != 0 ? n : (n % PER / 4 * LANES + n / PER) * 4 + n % 4;
}

// ---- work: which row and which span of it a block owns --------------------------------------------------------------

struct Span {
  int row;        // batch entry or packed sequence
  int split;      // which of the row's spans
  int begin, end; // steps of the row, end exclusive
  int length;     // of the row
  i64 first;      // step of the tensors at which the row starts
  i64 states;     // slot of the row's first kept state
};

DEVICE i64 offset_at(const Params& p, int i) {
  i64 o = p.wide_offsets ? ((const i64*)p.cu_seqlens)[i] : (i64)((const int*)p.cu_seqlens)[i];
  return o < 0 ? 0 : o > p.length ? p.length : o;
}
// Slots are laid out like the kept states: row r of an unpacked problem owns slots r*splits .. ; sequence i, which
// starts at step s, owns those from s/span + i on, at least one. Returns false for a slot that nobody owns.
DEVICE bool locate(const Params& p, i64 slot, Span& w) {
#if PACKED
  int low_ = 0, high_ = (int)p.rows - 1;
  while (low_ < high_) {
    int middle = (low_ + high_ + 1) >> 1;
    if (offset_at(p, middle) / p.span + middle <= slot) low_ = middle; else high_ = middle - 1;
  }
  w.row = low_;
  w.first = offset_at(p, low_);
  i64 stop = offset_at(p, low_ + 1);
  w.length = (int)(stop > w.first ? stop - w.first : 0);
  w.split = (int)(slot - (w.first / p.span + low_));
  if (w.split > 0 && (i64)w.split * p.span >= w.length) return false;
  w.states = CHECKPOINT ? w.first / (CHECKPOINT ? CHECKPOINT : 1) + low_ : 0;
#else
  w.row = (int)(slot / p.splits);
  w.split = (int)(slot - (i64)w.row * p.splits);
  w.first = 0;
  w.length = (int)p.length;
  w.states = CHECKPOINT ? (i64)w.row * (int)((p.length + CHECKPOINT - 1) / (CHECKPOINT ? CHECKPOINT : 1)) : 0;
#endif
  w.begin = (int)(w.split * p.span);
  w.end = w.length - w.begin > p.span ? w.begin + (int)p.span : w.length;
  return true;
}

// A block's channels: block index = (row slot, group of B and C, block within the group), the last running fastest.
struct Channels {
  int group, first, count;  // first channel of the block, and how many of its channels exist
};
DEVICE Channels channels(const Params& p, int block) {
  int per_group = (int)(p.dim / p.groups), blocks = (per_group + CHANNELS - 1) / CHANNELS;
  Channels c;
  c.group = block / blocks;
  int within = (block - c.group * blocks) * CHANNELS;
  c.first = c.group * per_group + within;
  c.count = per_group - within < CHANNELS ? per_group - within : CHANNELS;
  return c;
}

// What a block works on. It lies in shared memory, written by the first thread: most of it is needed so rarely that
// registers are better spent on other things.
struct alignas(16) Task {
  Span w;
  Channels ch;
  i64 slot;
  int block;  // of the row's blocks
  bool there;
};

// ---- tiles of u, delta, z: each lane owns OWN_C channels x OWN_T steps of its warp's --------------------------------

struct Own {
  int channel, step;  // of the first, within warp and tile
  bool any;
};
// Of lanes along channels, the p-th lane's: such that those of a quarter of a warp, which store four steps at once, meet
// no bank twice in a tile of float32.
DEVICE constexpr int spread_channel(int p) {
  if (OWN_T == EACH || PER_WARP < 8) return p;
  if (EACH == 4) return (p & ~7) | (((p & 7) * ALONG | (p & 7) * ALONG >> 3) & 7);
  return ALONG == 2 ? (p & ~6) | (p & 2) << 1 | (p & 4) >> 1 : p;
}
DEVICE Own own() {
  const int lane = (int)threadIdx.x & 31;
  Own o;
#if DIM_LAYOUT
  constexpr int ACROSS = PER_WARP / OWN_C;
  o.channel = (lane % ACROSS) * OWN_C;
  o.step = (lane / ACROSS) * OWN_T;
#else
  o.channel = spread_channel(lane / ALONG);
  o.step = (lane % ALONG) * EACH;
#endif
  o.any = ALL_OWN || (o.channel < PER_WARP && o.step < TILE);
  return o;
}
// Steps from a lane's first to its t-th.
DEVICE constexpr int later(int t) { return t / EACH * EACH * ALONG + t % EACH; }
// A lane's element e is its channel channel_of(e)'s of its step step_of(e): such that those of a piece follow each other.
DEVICE constexpr int channel_of(int e) { return DIM_LAYOUT ? e % OWN_C : e / OWN_T; }
DEVICE constexpr int step_of(int e) { return DIM_LAYOUT ? e / OWN_C : e % OWN_T; }
struct Raw {  // a lane's elements
  u32 w[WORDS];
  DEVICE float at(int c, int t) const {
    const int e = DIM_LAYOUT ? t * OWN_C + c : c * OWN_T + t;
    return ITEM == 2 && e & 1 ? high(w[e >> 1]) : low(w[e * ITEM / 4]);
  }
};
// How many channels and steps there are from the lane's first on.
struct Extent {
  int c, t;
};
DEVICE Extent extent_of(Own o, int channel_count, int steps_left) {
  Extent n;
  n.c = o.any ? channel_count - o.channel : 0;
  n.t = steps_left - o.step;
  return n;
}
#if DTYPE == 0
DEVICE u32 bits(scalar v) { return __float_as_uint(v); }
DEVICE scalar unbits(u32 w) { return __uint_as_float(w); }
#else
DEVICE u32 bits(scalar v) { return v; }
DEVICE scalar unbits(u32 w) { return (scalar)w; }
#endif

// Where element e of the lane's lies, from its first on; whether there is one.
DEVICE i64 place_of(i64 dim_stride, i64 step_stride, int e) {
  const int c = channel_of(e), t = later(step_of(e));
  return (DIM_LAYOUT && VECTORS ? c : c * NEXT_C * dim_stride) + (!DIM_LAYOUT && VECTORS ? t : t * step_stride);
}
DEVICE bool has(Extent n, int e) { return later(step_of(e)) < n.t && channel_of(e) * NEXT_C < n.c; }

constexpr int SINGLE = VECTORS ? PIECE * 4 / ITEM : 1;  // elements that are moved as one
DEVICE void store(const Raw& r, scalar* p, i64 dim_stride, i64 step_stride, Extent n) {
#pragma unroll
  for (int e = 0; e < OWN; e += SINGLE) {
    if (!has(n, e)) continue;
    scalar* const to = p + place_of(dim_stride, step_stride, e);
    const u32* const w = r.w + e * ITEM / 4;
    if constexpr (!VECTORS) *to = unbits(ITEM == 4 ? *w : e & 1 ? *w >> 16 : *w & 0xffffu);
    else if constexpr (PIECE == 4) *(uint4*)to = make_uint4(w[0], w[1], w[2], w[3]);
    else if constexpr (PIECE == 2) *(uint2*)to = make_uint2(w[0], w[1]);
    else *(u32*)to = *w;
  }
}
// The inverse of Raw::at.
DEVICE void put(Raw& r, const float (&v)[OWN_C][OWN_T]) {
#pragma unroll
  for (int i = 0; i < WORDS; i++) {
    const int e = i * 4 / ITEM, other = e + 1 < OWN ? e + 1 : e;
    r.w[i] = pack(v[channel_of(e)][step_of(e)], v[channel_of(other)][step_of(other)]);
  }
}

// A lane's raw elements of one tensor wait in slots of its own in shared memory, a warp's next to each other: what a
// lane copies there, only it reads, so that a wait for its own copies is all the synchronisation there is.
constexpr int RAW_WORDS = 32 * WORDS;  // of a warp and one tensor

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// Copy `bytes` of WIDTH bytes, zeros for the rest.
template <int WIDTH>
DEVICE void copy_async(void* to, const void* from, int bytes) {
  if constexpr (WIDTH == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 ::"r"(shared_address(to)), "l"(from), "n"(WIDTH), "r"(bytes) : "memory");
}
// Copy if `mine`, else write zeros and read nothing.
template <int WIDTH>
DEVICE void copy_async_or_zero(bool mine, void* to, const void* from) {
  if constexpr (WIDTH == 16)
    asm volatile("{.reg .pred p; setp.eq.s32 p, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, p;}"
                 ::"r"(shared_address(to)), "l"(from), "r"((int)mine) : "memory");
  else
    asm volatile("{.reg .pred p; setp.eq.s32 p, %2, 0; cp.async.ca.shared.global [%0], [%1], %3, p;}"
                 ::"r"(shared_address(to)), "l"(from), "r"((int)mine), "n"(WIDTH) : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

DEVICE u32* slot_of(u32* raw, int word) {
  return raw + word / PIECE * PIECE * 32 + ((int)threadIdx.x & 31) * PIECE + word % PIECE;
}
DEVICE void fetch(u32* raw, const scalar* q, i64 dim_stride, i64 step_stride, Extent n) {
  if constexpr (VECTORS) {
#pragma unroll
    for (int e = 0; e < OWN; e += SINGLE)
      copy_async_or_zero<PIECE * 4>(has(n, e), slot_of(raw, e * ITEM / 4), q + place_of(dim_stride, step_stride, e));
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      u32 word = 0;
#pragma unroll
      for (int e = i * 4 / ITEM; e < OWN && e * ITEM < 4 * i + 4; e++)
        if (has(n, e)) word |= bits(q[place_of(dim_stride, step_stride, e)]) << (e * ITEM % 4 * 8);
      *slot_of(raw, i) = word;
    }
  }
}
DEVICE void read(Raw& r, u32* raw) {
#pragma unroll
  for (int i = 0; i < WORDS; i += PIECE) {
    const u32* from = slot_of(raw, i);
    if constexpr (PIECE == 4) {
      const uint4 v = *(const uint4*)from;
      r.w[i] = v.x, r.w[i + 1] = v.y, r.w[i + 2] = v.z, r.w[i + 3] = v.w;
    } else if constexpr (PIECE == 2) {
      const uint2 v = *(const uint2*)from;
      r.w[i] = v.x, r.w[i + 1] = v.y;
    } else {
      r.w[i] = from[0];
    }
  }
}

// Turns that warps take at what they share in shared memory: one warp passes a turn, another waits for it, and what the
// first did before is in order before what the second does after. All lanes pass and wait. The n-th wait, from 0 on, is
// for the n-th pass and says whether n is odd; a warp must have waited for a turn before the next is passed to it.
// ARRIVALS: 1, a lane arrives for its warp once all have come; or 32, one after another, each when it comes. Racecheck
// follows the latter only: it does not see what __syncwarp puts in order before another lane's arrival.
template <int ARRIVALS>
struct Turn {
  unsigned long long barrier;
  DEVICE void begin() {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "n"(ARRIVALS) : "memory");
  }
  DEVICE void pass() {
    if (ARRIVALS == 1) __syncwarp();
    if (ARRIVALS == 32 || (threadIdx.x & 31) == 0)
      asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(shared_address(&barrier)) : "memory");
  }
  DEVICE void wait(int odd) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{.reg .pred p; again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @!p bra again;}"
                 ::"r"(shared_address(&barrier)), "r"(odd) : "memory");
#else
    asm volatile("{.reg .pred p; again: mbarrier.test_wait.parity.shared.b64 p, [%0], %1; @!p bra again;}"
                 ::"r"(shared_address(&barrier)), "r"(odd) : "memory");
#endif
  }
};

// A warp's tile of float32 values [channel][step] in shared memory, padded and skewed so that a channel's steps, read by
// all its lanes, and lanes' own elements meet no bank twice.
constexpr int QUADS = TILE / 4;
constexpr int TILE_PITCH = TILE + 4;
constexpr int SKEW = DIM_LAYOUT && PER_WARP > 8 ? 512 / (PER_WARP * ITEM) : 0;  // of every further eight channels
constexpr int TILE_FLOATS = PER_WARP * TILE_PITCH + (PER_WARP / 8 - 1) * SKEW;
DEVICE int tile_at(int channel, int step) { return channel * TILE_PITCH + channel / 8 * SKEW + step; }
DEVICE void four_steps(float (&v)[4], const float* tile, int channel, int step) { get(v, tile + tile_at(channel, step)); }
// What is one for a whole channel lies beside its tile, where the padding is: four channels' at the first of them.
DEVICE int beside(int channel) { return tile_at(channel / 4 * 4, TILE) + channel % 4; }
template <int N>
DEVICE void constants(float (&v)[N], const float* tile, int channel) {
  if constexpr (N % 4 == 0) {
    get_vectors(v, tile, [&](int i) { return beside(channel + i); });
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = tile[beside(channel + i * NEXT_C)];
  }
}
// A channel's steps of a tile that are the lane's own.
DEVICE void get_own(float (&v)[OWN_T], const float* first) {
  if constexpr (OWN_T == EACH) get(v, first);
  else get_vectors(v, first, [](int i) { return later(i); });
}
DEVICE void set_own(float* first, const float (&v)[OWN_T]) {
  if constexpr (OWN_T == EACH) set(first, v);
  else set_vectors(first, v, [](int i) { return later(i); });
}
