// Shared device helpers of the selective-scan kernels: types, math, where a block's row lies, and how tiles of
// u, delta, z (channels x time) and of B, C (states x time) come from device memory.
//
// Every file that includes this is specialised by defines (backends/cuda.py writes them):
//   DTYPE 0 float32, 1 bfloat16, 2 float16     STATE   states of a channel (N)
//   LANES  lanes that share a channel (S)      WARPS   warps of a block
//   TILE   steps of a tile (T)                 GROUPS  channel groups that a warp walks one after the other (1 forward)
//   DIM_LAYOUT 1: u, delta, z, out are dim-contiguous, 0: length-contiguous
//   ALIGNED 1: every vector of u, delta, z, out may be moved as one access
//   B_AXIS, C_AXIS 0: B, C length-contiguous, 1: state-contiguous; B_ALIGNED, C_ALIGNED as ALIGNED
//   CONST_B, CONST_C, HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS, PACKED: the problem's flags
// and by the struct Params, which cuda.py generates from the list of fields that it fills.
//
// A lane holds PER = ceil(N / S) states n = s*PER .. s*PER + PER-1 of its channel, s = lane % S. States beyond N and
// channels beyond dim are computed on zeros and never stored; steps beyond the end have Δ = 0, which leaves h alone.

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
#define DEVICE __device__ __forceinline__

constexpr int PER = (STATE + LANES - 1) / LANES;  // states of a lane
constexpr int STATES = PER * LANES;               // N, padded
constexpr int THREADS = WARPS * 32;
constexpr int PER_WARP = 32 / LANES;                      // channels a warp holds at a time
constexpr int CHANNELS = WARPS * PER_WARP * GROUPS;       // channels of a block
constexpr int OWN = CHANNELS * TILE < THREADS ? 1 : CHANNELS * TILE / THREADS;  // elements a thread loads and stores
constexpr int ITEM = DTYPE == 0 ? 4 : 2;                  // bytes of an element
constexpr int OWN_C = DIM_LAYOUT && ITEM == 2 && OWN >= 2 && CHANNELS >= 2 ? 2 : 1;  // channels among them
constexpr int OWN_T = OWN / OWN_C;                        // steps among them
constexpr int WORDS = (OWN * ITEM + 3) / 4;               // registers that hold them
constexpr int PITCH = TILE + 4;                           // floats between rows of a B or C tile: no bank conflicts
constexpr bool ALL_OWN = CHANNELS * TILE >= THREADS;      // else the last threads own nothing
static_assert(OWN_T <= TILE && (OWN_T < 4 ? OWN_T != 3 : OWN_T % 4 == 0) && 32 % LANES == 0 && TILE % 4 == 0, "invalid configuration");

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
DEVICE float sigmoid(float x) { return rcp(1.f + ex2(-LOG2E * x)); }

// Δ log2(e), so that exp(Δ A) = 2^(Δ log2(e) A). In two parts: one float32 constant is off by 1.3e-8, the same way at
// every step, which would add up over a long growing or slowly decaying row; so would a rounded A log2(e).
DEVICE float to_log2(float dt) { return fmaf(dt, 1.4375f, dt * 0.0051950408889634f); }
// exp(Δ A) of dt = Δ log2(e). The special-function unit is off by up to 1.2e-7 of its result, which adds up over the
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
// log(1 + e) for 0 <= e <= 1 as 2 artanh(e / (2 + e)): accurate relative to the result, however small e is
DEVICE float log1p_unit(float e) {
  float s = e * rcp(2.f + e), q = s * s;
#if DTYPE == 0
  float p = fmaf(q, 1.f / 15, 1.f / 13);
  p = fmaf(q, p, 1.f / 11);
#else
  float p = 1.f / 11;
#endif
  p = fmaf(q, p, 1.f / 9), p = fmaf(q, p, 1.f / 7), p = fmaf(q, p, 1.f / 5), p = fmaf(q, p, 1.f / 3);
  return 2.f * fmaf(s * q, p, s);
}
// Δ from its raw value, and dΔ/draw
DEVICE float step_size(float raw) {
#if SOFTPLUS
  return (raw < 0.f ? 0.f : raw) + log1p_unit(exp_neg_abs(raw));
#else
  return raw;
#endif
}
DEVICE float step_size(float raw, float& slope) {
#if SOFTPLUS
  float e = exp_neg_abs(raw), r = rcp(1.f + e);
  slope = raw < 0.f ? e * r : r;
  return (raw < 0.f ? 0.f : raw) + log1p_unit(e);
#else
  slope = 1.f;
  return raw;
#endif
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
  w.states = p.checkpoint ? w.first / p.checkpoint + low_ : 0;
#else
  w.row = (int)(slot / p.splits);
  w.split = (int)(slot - (i64)w.row * p.splits);
  w.first = 0;
  w.length = (int)p.length;
  w.states = p.checkpoint ? (i64)w.row * ((p.length + p.checkpoint - 1) / p.checkpoint) : 0;
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

// ---- tiles of u, delta, z: each thread owns OWN_C channels x OWN_T steps --------------------------------------------

struct Own {
  int channel, step;  // of the first, within block and tile
  bool any;
};
DEVICE Own own() {
  const int thread = (int)threadIdx.x + here();
  Own o;
#if DIM_LAYOUT
  constexpr int ACROSS = CHANNELS / OWN_C;
  o.channel = (thread % ACROSS) * OWN_C;
  o.step = (thread / ACROSS) * OWN_T;
#else
  constexpr int ALONG = TILE / OWN_T;
  o.channel = thread / ALONG;
  o.step = (thread % ALONG) * OWN_T;
#endif
  o.any = ALL_OWN || (o.channel < CHANNELS && o.step < TILE);
  return o;
}
struct Raw {  // a thread's elements as they lie in memory: along time, or pairs of channels
  u32 w[WORDS];
  DEVICE float at(int c, int t) const {
#if DTYPE == 0
    return low(w[t]);
#else
    int i = OWN_C == 2 ? t : t >> 1;
    return (OWN_C == 2 ? c : t & 1) ? high(w[i]) : low(w[i]);
#endif
  }
};
DEVICE int own_channel(Channels ch, Own o) { return ch.first + (o.channel < ch.count ? o.channel : 0); }
// How many of the thread's channels and steps exist.
struct Extent {
  int c, t;
};
DEVICE Extent extent_of(Own o, int channel_count, int steps_left) {
  Extent n;
  n.c = !o.any ? 0 : channel_count - o.channel < OWN_C ? channel_count - o.channel : OWN_C;
  n.t = steps_left - o.step < OWN_T ? steps_left - o.step : OWN_T;
  return n;
}
#if DTYPE == 0
DEVICE u32 bits(scalar v) { return __float_as_uint(v); }
DEVICE scalar unbits(u32 w) { return __uint_as_float(w); }
#else
DEVICE u32 bits(scalar v) { return v; }
DEVICE scalar unbits(u32 w) { return (scalar)w; }
#endif

DEVICE u32 word_of(const scalar* p, i64 step_stride, int i, Extent n) {
  // word i of the thread's elements, piece by piece, zeros where there is nothing
#if DTYPE == 0
  return i < n.t && n.c > 0 ? bits(p[i * step_stride]) : 0u;
#else
  if (OWN_C == 2) {
    if (i >= n.t) return 0u;
    const scalar* q = p + i * step_stride;
    return (n.c > 0 ? bits(q[0]) : 0u) | (n.c > 1 ? bits(q[1]) << 16 : 0u);
  }
  int t = 2 * i;
  u32 a = t < n.t && n.c > 0 ? bits(p[t * step_stride]) : 0u;
  u32 b = OWN_T > 1 && t + 1 < n.t && n.c > 0 ? bits(p[(t + 1) * step_stride]) << 16 : 0u;
  return a | b;
#endif
}
DEVICE void load(Raw& r, const scalar* p, i64 step_stride, Extent n) {
  if (ALIGNED && !DIM_LAYOUT && OWN * ITEM >= 4 && n.c > 0 && n.t >= OWN_T) {
    if constexpr (WORDS % 4 == 0) {
#pragma unroll
      for (int i = 0; i < WORDS; i += 4) {
        uint4 v = __ldg((const uint4*)p + i / 4);
        r.w[i] = v.x, r.w[i + 1] = v.y, r.w[i + 2] = v.z, r.w[i + 3] = v.w;
      }
    } else if constexpr (WORDS % 2 == 0) {
#pragma unroll
      for (int i = 0; i < WORDS; i += 2) {
        uint2 v = __ldg((const uint2*)p + i / 2);
        r.w[i] = v.x, r.w[i + 1] = v.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < WORDS; i++) r.w[i] = __ldg((const u32*)p + i);
    }
  } else if (ALIGNED && DIM_LAYOUT && OWN_C == 2 && n.c == 2) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) r.w[i] = i < n.t ? __ldg((const u32*)(p + i * step_stride)) : 0u;
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i++) r.w[i] = word_of(p, step_stride, i, n);
  }
}
DEVICE void store(const Raw& r, scalar* p, i64 step_stride, Extent n) {
  if (ALIGNED && !DIM_LAYOUT && OWN * ITEM >= 4 && n.c > 0 && n.t >= OWN_T) {
    if constexpr (WORDS % 4 == 0) {
#pragma unroll
      for (int i = 0; i < WORDS; i += 4) *((uint4*)p + i / 4) = make_uint4(r.w[i], r.w[i + 1], r.w[i + 2], r.w[i + 3]);
    } else if constexpr (WORDS % 2 == 0) {
#pragma unroll
      for (int i = 0; i < WORDS; i += 2) *((uint2*)p + i / 2) = make_uint2(r.w[i], r.w[i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < WORDS; i++) *((u32*)p + i) = r.w[i];
    }
  } else if (ALIGNED && DIM_LAYOUT && OWN_C == 2 && n.c == 2) {
#pragma unroll
    for (int i = 0; i < WORDS; i++)
      if (i < n.t) *(u32*)(p + i * step_stride) = r.w[i];
  } else {
#pragma unroll
    for (int c = 0; c < OWN_C; c++)
#pragma unroll
      for (int t = 0; t < OWN_T; t++)
        if (c < n.c && t < n.t) {
          int i = DTYPE == 0 || OWN_C == 2 ? t : t >> 1;
          bool upper = DTYPE != 0 && (OWN_C == 2 ? c : t & 1);
          p[t * step_stride + c] = unbits(upper ? r.w[i] >> 16 : DTYPE == 0 ? r.w[i] : r.w[i] & 0xffffu);
        }
  }
}
// The inverse of Raw::at for a pair of neighbours: (t, t + 1) of a channel, or (0, 1) of two channels at t.
DEVICE void put(Raw& r, const float (&v)[OWN_C][OWN_T]) {
#pragma unroll
  for (int i = 0; i < WORDS; i++) {
    if (DTYPE == 0) r.w[i] = __float_as_uint(v[0][i < OWN_T ? i : 0]);
    else if (OWN_C == 2) r.w[i] = pack(v[0][i < OWN_T ? i : 0], v[OWN_C - 1][i < OWN_T ? i : 0]);
    else r.w[i] = pack(v[0][2 * i < OWN_T ? 2 * i : 0], 2 * i + 1 < OWN_T ? v[0][2 * i + 1 < OWN_T ? 2 * i + 1 : 0] : 0.f);
  }
}

// A tile of float32 values [channel][step] in shared memory. Four steps lie together; which four is permuted by the
// channel so that neither the thread's own accesses nor a warp's (one channel per group of lanes) collide in a bank.
constexpr int QUADS = TILE / 4;
DEVICE int swizzle(int channel) { return TILE == 16 ? (channel >> 1) + (channel >> 4) : channel + (channel >> 3); }
DEVICE int tile_at(int channel, int step) {
  constexpr int MASK = (QUADS < 8 ? QUADS : 8) - 1;
  int quad = step >> 2;
  return channel * TILE + (((quad ^ swizzle(channel)) & MASK) | (quad & ~MASK)) * 4 + (step & 3);
}
// A thread's own steps of one channel, to and from such a tile; step is a multiple of OWN_T.
DEVICE void tile_write(float* tile, int channel, int step, const float (&v)[OWN_T]) {
  if constexpr (OWN_T % 4 == 0) {
#pragma unroll
    for (int t = 0; t < OWN_T; t += 4)
      *(float4*)(tile + tile_at(channel, step + t)) = make_float4(v[t], v[t + 1], v[t + 2], v[t + 3]);
  } else if constexpr (OWN_T == 2) {
    *(float2*)(tile + tile_at(channel, step)) = make_float2(v[0], v[1]);
  } else {
    tile[tile_at(channel, step)] = v[0];
  }
}
DEVICE void tile_read(float (&v)[OWN_T], const float* tile, int channel, int step) {
  if constexpr (OWN_T % 4 == 0) {
#pragma unroll
    for (int t = 0; t < OWN_T; t += 4) {
      const float4 q = *(const float4*)(tile + tile_at(channel, step + t));
      v[t] = q.x, v[t + 1] = q.y, v[t + 2] = q.z, v[t + 3] = q.w;
    }
  } else if constexpr (OWN_T == 2) {
    const float2 q = *(const float2*)(tile + tile_at(channel, step));
    v[0] = q.x, v[1] = q.y;
  } else {
    v[0] = tile[tile_at(channel, step)];
  }
}

// Where a thread's elements of a tile, or a row's B or C of a tile, start: computed at each use, see here().
#define OWN_AT(T, t0) \
  ((const scalar*)p.T + (batch + here()) * p.T##_batch + own_channel(ch, o) * p.T##_dim + (w.first + o.step + (t0)) * p.T##_step)
#define ROW_AT(T, t0) \
  ((const scalar*)p.T + (batch + here()) * p.T##_batch + ch.group * p.T##_group + (w.first + (t0)) * p.T##_step)

// ---- tiles of B, C: [state][step] in float32, states permuted so that a warp's lanes read without conflicts ---------

DEVICE int state_row(int n) { return (n % PER) * LANES + n / PER; }

template <int AXIS, int VECTOR_OK>
struct Projection {
  static constexpr int V = AXIS == 0 || STATES % 4 == 0 ? 4 : 1;  // elements of an item
  static constexpr int ITEMS = STATES * TILE / V;
  static constexpr int COUNT = (ITEMS + THREADS - 1) / THREADS;
  static constexpr int W = V * ITEM >= 4 ? V * ITEM / 4 : 1;
  u32 raw[COUNT][W];

  static DEVICE bool place(int k, int& n, int& t) {
    int i = (int)threadIdx.x + k * THREADS;
    if (AXIS == 0) n = i / (TILE / 4), t = i % (TILE / 4) * 4;
    else n = i % (STATES / V) * V, t = i / (STATES / V);
    return ITEMS % THREADS == 0 || i < ITEMS;
  }
  // p: the row's B or C at the tile's first step; count: steps of the tile that exist
  DEVICE void load(const scalar* p, i64 state_stride, i64 step_stride, int count) {
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      int n, t;
      bool mine = place(k, n, t);
      const scalar* q = p + n * state_stride + t * step_stride;
      bool whole = mine && (AXIS == 0 ? n < STATE && t + V <= count : n + V <= STATE && t < count);
      if (VECTOR_OK && V == 4 && whole) {
        if constexpr (W == 4) {
          uint4 v = __ldg((const uint4*)q);
          raw[k][0] = v.x, raw[k][1] = v.y, raw[k][2] = v.z, raw[k][3] = v.w;
        } else if constexpr (W == 2) {
          uint2 v = __ldg((const uint2*)q);
          raw[k][0] = v.x, raw[k][1] = v.y;
        }
      } else {
#pragma unroll
        for (int i = 0; i < W; i++) raw[k][i] = 0u;
#pragma unroll
        for (int j = 0; j < V; j++) {
          bool there = mine && (AXIS == 0 ? n < STATE && t + j < count : n + j < STATE && t < count);
          u32 b = there ? bits(q[j * (AXIS == 0 ? step_stride : state_stride)]) : 0u;
          if (ITEM == 4) raw[k][j < W ? j : 0] = b;
          else raw[k][j / 2 < W ? j / 2 : 0] |= j & 1 ? b << 16 : b;
        }
      }
    }
  }
  DEVICE void store(float* tile) const {
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      int n, t;
      if (!place(k, n, t)) continue;
      float v[V];
#pragma unroll
      for (int j = 0; j < V; j++) {
        u32 w = raw[k][ITEM == 4 ? (j < W ? j : 0) : (j / 2 < W ? j / 2 : 0)];
        v[j] = ITEM == 2 && (j & 1) ? high(w) : low(w);
      }
      if constexpr (AXIS == 0) {
        *(float4*)(tile + state_row(n) * PITCH + t) = make_float4(v[0], v[1], v[2], v[3]);
      } else {
#pragma unroll
        for (int j = 0; j < V; j++) tile[state_row(n + j) * PITCH + t] = v[j];
      }
    }
  }
};

// B and C wait in registers during a main loop only where that takes few of them; else they are fetched after it.
constexpr bool EARLY = STATES * TILE * ITEM <= 8 * THREADS;

// Sum each v[i] over lanes that differ in the bits HIGH .. LOW, and spread the sums: at each bit a lane keeps half of
// its values and hands on the other half, while there are halves; what is left is summed in full.
template <int HIGH, int LOW, int COUNT>
DEVICE void spread_sum(float (&v)[COUNT], int lane) {
  int count = COUNT;
#pragma unroll
  for (int m = HIGH; m >= LOW; m >>= 1) {
    if (count > 1) {
      bool upper = lane & m;
      count >>= 1;
#pragma unroll
      for (int i = 0; i < COUNT / 2; i++)
        if (i < count) {
          float send = upper ? v[i] : v[i + count], keep = upper ? v[i + count] : v[i];
          v[i] = keep + __shfl_xor_sync(0xffffffffu, send, m);
        }
    } else {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], m);
    }
  }
}
// Over the lanes of a channel, for G steps: lane s is left with the G / LANES steps from first_step(s) on, at least one.
template <int G>
DEVICE void reduce_steps(float (&v)[G], int lane) { spread_sum<LANES / 2, 1>(v, lane); }
template <int G>
DEVICE int first_step(int s) { return LANES >= G ? s / (LANES / (LANES >= G ? G : 1)) : s * (G / LANES); }
