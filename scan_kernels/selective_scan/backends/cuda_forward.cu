// Selective scan, forward in time and, for the adjoint, backward in time, without ever storing the state.
//
// One kernel, four uses (MODE): 0 the scan itself; 1 only the state that leaves a span that is entered with zero
// (span_end) and the span's sum of Δ log2(e) (span_time), so that `combine` can find every span's entering state when
// a row's time is split over blocks; 2 the same for the adjoint recurrence g <- exp(ΔA)(g + C dy), running backwards;
// 3 only the states that enter every CHECKPOINT-th step (states), for a backward whose tiles have so many, from those
// that a forward kept every KEPT steps (kept): it starts anew at each of them and skips the steps that none needs.
//
// A block owns CHANNELS channels over one span of a row and walks it in tiles of TILE steps; each warp, PER_WARP of them:
//   device memory --cp.async--> slots --registers, softplus--> shared tiles dt = Δ log2(e), x = Δu [channel][step]
//   device memory --registers--> B, C --> shared tiles [step][state]       (two buffers, for all warps of the block)
//   main loop: h <- exp(ΔA) h + x B and y = Σ C h, PER states a lane; y is summed over the LANES lanes of a channel by
//   shuffles that leave each lane with its own steps, and takes the place of dt in the tile
//   shared y --> + D u, * silu(z) --> device memory, by the lane that loaded u and z
// The next tile's copies are in flight during the main loop. One block barrier a tile, for B and C.
//
// Relay (RELAY), for rows too few to give every warp channels of its own: WARPS / GROUPS warps share PER_WARP channels
// and take turns in time, a tile of 16 steps each. All of a tile but the recurrence needs no state and runs in parallel:
// copies, softplus, and the decays, which wait in registers with x B of the first AHEAD steps. The state passes from warp
// to warp through shared memory, so that no row is cut and no state-only pass is needed. Each warp needs tiles of B and C
// of its own: `spread` writes both as float32 rows first, which cp.async then copies as they are.
//
// Costs per (state, step) of a lane: 2 FMUL, 1 MUFU, 2 FFMA and half a shared load of 16 bytes (B, C); float32 data
// take 8 more for their decays, an exponential on the FMA pipe (POLYNOMIAL of 32) 10 more and no MUFU. Per step and
// lane: half a shared load of 16 bytes (dt, x), and for the sum over the states (LANES-1)/LANES (1 SHFL, 1 FADD, 2 SEL).
// MODE 3 has no C and no sum: 1 FFMA and half the loads of B, C fewer.
// A relay's tile of LANES 4, PER 4, bf16: about 700 instructions a warp, 76 of them MUFU; from a turn's start to its end
// 158, or fewer, the more steps are ready AHEAD.

constexpr int G = PER > 8 || LANES < 4 ? 4 : LANES > 16 ? 16 : LANES;  // steps whose y are reduced together
constexpr int UNROLL = PER * G <= 32 ? 4 : 1;
static_assert(TILE % 16 == 0, "invalid configuration");
constexpr bool USE_B = MODE != 2, USE_C = MODE == 0 || MODE == 2;
constexpr bool KEEP = (MODE == 0 || MODE == 3) && CHECKPOINT > 0;  // the state that enters every CHECKPOINT-th step
constexpr int KEEP_EVERY = KEEP ? CHECKPOINT : 1;
#if MODE == 3
constexpr int SEGMENT = KEPT;                       // steps from one kept state to the next
constexpr int NEEDED = (KEPT - CHECKPOINT + 15) / 16;  // tiles of a segment's steps before its last CHECKPOINT
static_assert(TILE == 16 && KEPT % 16 == 0 && 16 % CHECKPOINT == 0 && CHECKPOINT < KEPT, "invalid configuration");
#else
constexpr int SEGMENT = TILE, NEEDED = 1;
#endif
constexpr int BC_TILES = (USE_B && !CONST_B) + (USE_C && !CONST_C);
constexpr int TENSORS = 3 + (HAS_Z ? 1 : 0);  // slots: u twice, delta, z
// In a relay, with few elements a tile, each lane finds but once where those of these tensors lie, and notes it.
enum { AT_u, AT_delta, AT_z, AT_out, AT_B, AT_C, PLACES };
constexpr int WARP_FLOATS =
    2 * TILE_FLOATS + TENSORS * RAW_WORDS + (RELAY ? 2 * 32 * PLACES : 0) + (RELAY || MODE == 3 ? 32 * PER : 0);
// steps whose x B a relay has ready when a warp's turn comes, and keeps ready
constexpr int AHEAD = PER > 4 ? 2 : THREADS * MIN_BLOCKS <= 256 ? 16 : THREADS * MIN_BLOCKS <= 384 ? 8 : 2;
constexpr bool SHORT = RELAY || PER > 8;  // of registers: what is needed rarely is found anew each time
constexpr int TURNS = RELAY ? WARPS / GROUPS : 1;  // warps that share channels and take turns
static_assert(!RELAY || (MODE == 0 && TILE == 16 && PER <= 4 && TURNS >= 2 && WARPS % GROUPS == 0),
              "invalid configuration");

// Tiles of B, C: [step][state, as state_at has it] in float32, for all warps of a block; in a relay, for one warp.
constexpr int STATE_QUADS = (STATES + 3) / 4;
constexpr int PITCH = 4 * STATE_QUADS + 4;  // floats between steps: eight of them, written at once, meet no bank twice
constexpr int BC_FLOATS = TILE * PITCH;
constexpr int BC_COPIES = RELAY ? WARPS : 2;

// What a thread moves of B or C, tile by tile: items of four states of a step.
template <int AXIS, int VECTOR_OK>
struct Projection {
  static constexpr int ITEMS = STATE_QUADS * TILE;
  static constexpr int COUNT = (ITEMS + THREADS - 1) / THREADS;
  static constexpr bool VECTOR = AXIS == 1 && VECTOR_OK;
  u32 raw[COUNT][VECTOR ? ITEM : 4];

  static DEVICE void place(int k, int& n, int& t) {
    const int i = (int)threadIdx.x + (SHORT ? here() : 0) + k * THREADS;
    if (AXIS == 0) t = i % TILE, n = i / TILE * 4;
    else n = i % STATE_QUADS * 4, t = i / STATE_QUADS;
  }
  // row: B or C at the row's first step; t0: the tile's first; count: steps of the tile that exist
  DEVICE void load(const scalar* row, i64 state_stride, i64 step_stride, int t0, int count) {
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      int n, t;
      place(k, n, t);
      const bool mine = n < STATE && t < count;
      const scalar* q = row + n * state_stride + (t0 + t) * step_stride;
      if constexpr (VECTOR) {
        if (mine && n + 4 <= STATE) {
          if constexpr (ITEM == 4) {
            const uint4 v = __ldg((const uint4*)q);
            raw[k][0] = v.x, raw[k][1] = v.y, raw[k][2] = v.z, raw[k][3] = v.w;
          } else {
            const uint2 v = __ldg((const uint2*)q);
            raw[k][0] = v.x, raw[k][1] = v.y;
          }
        } else {
#pragma unroll
          for (int i = 0; i < ITEM; i++) raw[k][i] = 0u;
#pragma unroll
          for (int j = 0; j < 4; j++)
            if (mine && n + j < STATE) raw[k][j * ITEM / 4] |= bits(__ldg(q + j)) << (ITEM == 2 ? 16 * (j & 1) : 0);
        }
      } else {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          raw[k][j] = mine && (STATE % 4 == 0 || n + j < STATE) ? bits(__ldg(q)) : 0u;
          q += state_stride;
        }
      }
    }
  }
  DEVICE void store(float* tile, float scale) const {
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      int n, t;
      place(k, n, t);
      if (ITEMS % THREADS != 0 && (AXIS == 0 ? n >= STATES : t >= TILE)) continue;
      float v[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if constexpr (VECTOR && ITEM == 2) v[j] = j & 1 ? high(raw[k][j / 2]) : low(raw[k][j / 2]);
        else v[j] = low(raw[k][j]);
        v[j] *= scale;
      }
      *(float4*)(tile + t * PITCH + state_at(n)) = make_float4(v[0], v[1], v[2], v[3]);
    }
  }
};
// A lane's states of one step of such a tile.
DEVICE void states_of(float (&v)[PER], const float* tile, int step, int slice) {
  get<4 * LANES>(v, tile + step * PITCH + apart_at(slice, PER));
}

// The same where they may be constant in time.
template <int CONSTANT>
DEVICE void projected(float (&v)[PER], const float* tile, int step, int slice, const float (&constant)[PER]) {
  if constexpr (CONSTANT) {
#pragma unroll
    for (int k = 0; k < PER; k++) v[k] = constant[k];
  } else {
    states_of(v, tile, step, slice);
  }
}

// Sum each v[i] over the lanes of a channel (lane bits from SLICE_BIT up) and spread the sums: at each bit a lane keeps
// half of its values and hands on the other half, while there are halves; what is left is summed in full. Of G steps,
// slice s is left with the G / LANES steps from first_step(s) on, at least one.
template <int G>
DEVICE void reduce_steps(float (&v)[G], int lane) {
  int count = G;
#pragma unroll
  for (int m = SLICE_BIT * LANES / 2; m >= SLICE_BIT; m >>= 1) {
    if (count > 1) {
      const bool upper = lane & m;
      count >>= 1;
#pragma unroll
      for (int i = 0; i < G / 2; i++)
        if (i < count) {
          const float send = upper ? v[i] : v[i + count], keep = upper ? v[i + count] : v[i];
          v[i] = keep + __shfl_xor_sync(0xffffffffu, send, m);
        }
    } else {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], m);
    }
  }
}
template <int G>
DEVICE int first_step(int s) { return LANES >= G ? s / (LANES / (LANES >= G ? G : 1)) : s * (G / LANES); }

// Sums over the states of G steps from g0 on: each lane's own take the place of dt.
DEVICE void deliver(float (&y)[G], float* dt_tile, int channel, int s, int lane, int g0) {
  reduce_steps(y, lane);
  __syncwarp();
  constexpr int MINE = LANES < G ? G / LANES : 1;
  float own[MINE];
#pragma unroll
  for (int i = 0; i < MINE; i++) own[i] = y[i];
  if (LANES <= G || s % (LANES / G) == 0) set(dt_tile + tile_at(channel, g0 + first_step<G>(s)), own);  // of lanes alike, one
}

// exp(ΔA) of (step, state) `index` of a lane: POLYNOMIAL of 32, spread evenly, on the FMA pipe
DEVICE float decay_at(int index, float dt, float A) {
#if POLYNOMIAL > 0
  if (index * POLYNOMIAL % 32 < POLYNOMIAL) return ex2_polynomial(dt, A);
#endif
  return decay_of(dt, A);
}

// A relay's turns, as Turn has them, but at the block's barriers, of which it has 16: a warp waits at that of its number
// until the warp before has arrived. Faster by 1 to 7 %; racecheck does not follow it.
#ifndef TURN_ARRIVALS
struct Turns {
  DEVICE void begin(int) {}
  DEVICE void pass(int warp) { asm volatile("bar.arrive %0, 64;" ::"r"(warp) : "memory"); }
  DEVICE void wait(int warp, int) { asm volatile("bar.sync %0, 64;" ::"r"(warp) : "memory"); }
};
#else
struct Turns {
  Turn<TURN_ARRIVALS> of[WARPS];
  DEVICE void begin(int warp) { of[warp].begin(); }
  DEVICE void pass(int warp) { of[warp].pass(); }
  DEVICE void wait(int warp, int count) { of[warp].wait(count & 1); }
};
#endif

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan(const Params p) {
  extern __shared__ __align__(16) float shared[];
  const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, s = slice_of(lane), channel = channel_of_lane(lane);
  float* const bc_tile = shared + (RELAY ? warp * BC_TILES * BC_FLOATS : 0);  // [2, or warp][B then C]
  float* const dt_tile = shared + BC_COPIES * BC_TILES * BC_FLOATS + warp * WARP_FLOATS;
  float* const x_tile = dt_tile + TILE_FLOATS;
  u32* const raw_u = (u32*)(x_tile + TILE_FLOATS);  // [2]
  u32* const raw_delta = raw_u + 2 * RAW_WORDS;
  u32* const raw_z = raw_delta + RAW_WORDS;
  const int group = RELAY ? warp / TURNS : warp, turn = RELAY ? warp % TURNS : 0;
  float* const relayed = shared + BC_COPIES * BC_TILES * BC_FLOATS + WARPS * WARP_FLOATS;

  __shared__ Task task;
  // The state that enters a relay's tile lies in shared memory, lane by lane. It belongs to the warp whose turn it is:
  // each lane reads its part and overwrites it with what leaves the tile, so a group needs one place.
  __shared__ Turns turns;
  // where the row's first step lies in u, delta, z, out, of the warp's first channel, and in B and C
  __shared__ i64 origins[RELAY ? 1 : WARPS][AT_out + 1], rows[2];
  if (threadIdx.x == 0) {
    task.slot = blockIdx.x / p.blocks, task.block = (int)(blockIdx.x - task.slot * p.blocks);
    task.there = locate(p, task.slot, task.w);
    task.ch = channels(p, task.block);
    const i64 row = PACKED ? 0 : task.w.row, g = task.ch.group;
    rows[0] = (i64)((const scalar*)p.B + row * p.B_batch + g * p.B_group + task.w.first * p.B_step);
    rows[1] = (i64)((const scalar*)p.C + row * p.C_batch + g * p.C_group + task.w.first * p.C_step);
  }
  if (RELAY && lane == 0) turns.begin(warp);
  __syncthreads();
  if (!task.there || (MODE == 1 && task.w.end == task.w.length) || (MODE == 2 && task.w.split < p.finer)) return;  // unneeded
  const Span& w = task.w;
  const i64& slot = task.slot;
  const int begin = w.begin, end = w.end, batch = PACKED ? 0 : w.row;
  const i64 row_first = w.first;
  const int count = task.ch.count - group * PER_WARP;  // this warp's channels that exist, and the first
  const int first = count > 0 ? task.ch.first + group * PER_WARP : 0;
  const bool exists = channel < count;
  const int d = exists ? first + channel : 0;

  // this lane's states
  float A[PER], h[PER], b_const[PER], c_const[PER], time = 0.f;
#pragma unroll
  for (int k = 0; k < PER; k++) {
    const int n = s * PER + k;
    const bool real = n < STATE && exists;
    const i64 at = (i64)d * STATE + n;
    A[k] = real ? p.A[at] : 0.f;
    b_const[k] = CONST_B && USE_B && real ? ((const float*)p.B)[at] * B_SCALE : 0.f;
    c_const[k] = CONST_C && USE_C && real ? ((const float*)p.C)[at] : 0.f;
    h[k] = 0.f;
    if (MODE == 0 && real) {
      if (p.splits > 1) h[k] = p.span_end[slot * p.dim * STATE + at];
      else if (p.initial_state) h[k] = p.initial_state[(i64)w.row * p.dim * STATE + at];
    }
  }

  // this lane's elements
  const Own o = own();
  auto channels_left = [&]() { return SHORT ? again(task.ch.count) - group * PER_WARP : count; };
  auto steps_left = [&](int t0) { return (SHORT ? again(task.w.end) : end) - t0; };
  auto extent = [&](int t0) { return extent_of(o, channels_left(), steps_left(t0)); };
  auto own_channel = [&]() { return first + (o.channel < count ? o.channel : 0); };
  i64* const places = (i64*)(dt_tile + WARP_FLOATS) - 32 * PLACES + lane;
  float* const rates = dt_tile + WARP_FLOATS - 64 * PLACES - 32 * PER + lane * PER;  // A, where registers are short
  float* const kept_here = dt_tile + WARP_FLOATS - 32 * PER + lane * PER;            // MODE 3
  auto noted = [&](int which) { return (scalar*)places[32 * which]; };
  auto place = [&](int which, i64 dim_stride, i64 step_stride, int t0) {
    const i64 stride = DIM_LAYOUT ? step_stride : 1;
    if (RELAY) return noted(which) + t0 * stride;
    const int c = o.channel < channels_left() ? o.channel : 0;
    return (scalar*)origins[warp][which] + (c + here()) * dim_stride + (o.step + t0) * stride;
  };
#define PLACE(T, t0) place(AT_##T, p.T##_dim, p.T##_step, t0)
  if constexpr (!RELAY) {
    auto note = [&](int which, const void* base, i64 batch_stride, i64 dim_stride, i64 step_stride) {
      const i64 at = batch * batch_stride + first * dim_stride + row_first * step_stride;
      if (lane == 0) origins[warp][which] = (i64)((const scalar*)base + at);
    };
    note(AT_u, p.u, p.u_batch, p.u_dim, p.u_step), note(AT_delta, p.delta, p.delta_batch, p.delta_dim, p.delta_step);
    if (HAS_Z) note(AT_z, p.z, p.z_batch, p.z_dim, p.z_step);
    if (MODE == 0) note(AT_out, p.out, p.out_batch, p.out_dim, p.out_step);
  } else {
    auto note = [&](int which, const void* base, i64 batch_stride, i64 dim_stride, i64 step_stride) {
      const i64 at = batch * batch_stride + own_channel() * dim_stride + (row_first + o.step) * step_stride;
      places[32 * which] = (i64)((const scalar*)base + at);
    };
    auto note_rows = [&](int which, const float* spread) {  // the lane's first piece of the row's first step
      const i64 row = ((i64)batch * p.groups + task.ch.group) * p.length + row_first;
      places[32 * which] = (i64)(spread + row * STATE_QUADS * 4 + lane * 4);
    };
    note(AT_u, p.u, p.u_batch, p.u_dim, p.u_step), note(AT_delta, p.delta, p.delta_batch, p.delta_dim, p.delta_step);
    if (HAS_Z) note(AT_z, p.z, p.z_batch, p.z_dim, p.z_step);
    note(AT_out, p.out, p.out_batch, p.out_dim, p.out_step);
    if (!CONST_B) note_rows(AT_B, p.spread_B);
    if (!CONST_C) note_rows(AT_C, p.spread_C);
  }
  if (lane < PER_WARP) {
    if (HAS_BIAS) dt_tile[beside(lane)] = lane < count ? p.delta_bias[first + lane] : 0.f;
    if (HAS_D) x_tile[beside(lane)] = lane < count ? p.D[first + lane] : 0.f;
  }
  __syncwarp();
  // MODE 2 multiplies by dy = dout silu(z) where the scan multiplies by Δu: u then stands for dout. The scan itself
  // needs z only after the main loop.
  auto fetch_tile = [&](int buffer, int t0) {
    const Extent n = extent(t0);
    fetch(raw_u + buffer * RAW_WORDS, PLACE(u, t0), p.u_dim, p.u_step, n);
    fetch(raw_delta, PLACE(delta, t0), p.delta_dim, p.delta_step, n);
    if (HAS_Z && MODE == 2) fetch(raw_z, PLACE(z, t0), p.z_dim, p.z_step, n);
#if MODE == 3
    if ((t0 - begin) % SEGMENT == 0) {  // the kept state, of which a lane reads what it copied
      const i64 row = PACKED ? row_first / SEGMENT + w.row : w.row * ((p.row_length + SEGMENT - 1) / SEGMENT);
      const float* const from = p.kept + ((row + t0 / SEGMENT) * p.dim + d) * STATE + s * PER;
      constexpr int WIDTH = PER % 4 == 0 && STATE % 4 == 0 ? 4 : 1;
#pragma unroll
      for (int k = 0; k < PER; k += WIDTH)
        copy_async<4 * WIDTH>(kept_here + k, from + k, exists && s * PER + k < STATE ? 4 * WIDTH : 0);
    }
#endif
  };

  int tiles = (end - begin + TILE - 1) / TILE;
  if (MODE == 3) {
    const int left = ((end - begin) % SEGMENT + TILE - 1) / TILE;  // of the last segment, if it is not whole
    tiles = (end - begin) / SEGMENT * NEEDED + (left < NEEDED ? left : NEEDED);
  }
  auto tile_start = [&](int i) {
    if (MODE == 3) return begin + i / NEEDED * SEGMENT + i % NEEDED * TILE;
    return begin + (MODE == 2 ? tiles - 1 - i : i) * TILE;
  };
  int buffer = 0, i = turn;
  Projection<B_AXIS, B_ALIGNED> next_B;
  Projection<C_AXIS, C_ALIGNED> next_C;
  auto load_projections = [&](int t0) {
    if constexpr (USE_B && !CONST_B) next_B.load((const scalar*)rows[0], p.B_state, p.B_step, t0, steps_left(t0));
    if constexpr (USE_C && !CONST_C) next_C.load((const scalar*)rows[1], p.C_state, p.C_step, t0, steps_left(t0));
  };
  auto fetch_spread = [&](int t0) {  // of a relay
    auto fetch_rows = [&](float* tile, int which) {
      const float* const from = (const float*)noted(which) + (i64)t0 * (STATE_QUADS * 4);
#pragma unroll
      for (int k = 0; k < (TILE * STATE_QUADS + 31) / 32; k++) {
        const int piece = lane + 32 * k, t = piece / STATE_QUADS;
        if (TILE * STATE_QUADS % 32 != 0 && t >= TILE) continue;
        copy_async<16>(tile + t * PITCH + piece % STATE_QUADS * 4, from + 128 * k, t < end - t0 ? 16 : 0);
      }
    };
    if constexpr (!CONST_B) fetch_rows(bc_tile, AT_B);
    if constexpr (!CONST_C) fetch_rows(bc_tile + (CONST_B ? 0 : BC_FLOATS), AT_C);
  };
  auto keep_states = [&](int t, const float (&v)[PER]) {  // which enter step t
    if (KEEP && (t - begin) % KEEP_EVERY == 0 && t < end && channel < channels_left()) {
      const int at = SHORT ? again(task.ch.first) + group * PER_WARP + channel : d;
      float* const kept = p.states + ((w.states + t / KEEP_EVERY) * p.dim + at) * STATE + s * PER;
      if constexpr (PER % 4 == 0 && STATE % 4 == 0) {
#pragma unroll
        for (int k = 0; k < PER; k += 4)
          if (s * PER + k < STATE) *(float4*)(kept + k) = make_float4(v[k], v[k + 1], v[k + 2], v[k + 3]);
      } else {
#pragma unroll
        for (int k = 0; k < PER; k++)
          if (s * PER + k < STATE) kept[k] = v[k];
      }
    }
  };
  if (RELAY) set(rates, A);
  if (RELAY && turn == 0) set(relayed + (group * 32 + lane) * PER, h);
  if (i < tiles) fetch_tile(0, tile_start(i));
  copies_commit();
  if (RELAY) {
    if (i < tiles) fetch_spread(tile_start(i));
    copies_commit();
  }
#pragma unroll 1
  for (; i < tiles; i += TURNS, buffer ^= 1) {
    const int t0 = tile_start(i);
    float* const b_tile = bc_tile + (RELAY ? 0 : buffer) * BC_TILES * BC_FLOATS;
    float* const c_tile = b_tile + (USE_B && !CONST_B ? BC_FLOATS : 0);

    // ---- stage: Δ and Δu (or dy) of this lane's elements; what does not exist was loaded as zero
    if (!RELAY) load_projections(t0);
    copies_wait<RELAY ? 1 : 0>();  // in a relay, B and C may still be on their way
    const Extent n = extent(t0);
    if (MODE == 3 && (t0 - begin) % SEGMENT == 0) {
      get(h, kept_here);
      keep_states(t0, h);
    }
    {
      if (o.any) {
        Raw ru, rd, rz;
        read(ru, raw_u + buffer * RAW_WORDS), read(rd, raw_delta);
        if (HAS_Z && MODE == 2) read(rz, raw_z);
        float bias[OWN_C];
        if constexpr (HAS_BIAS) constants(bias, dt_tile, o.channel);
#pragma unroll
        for (int c = 0; c < OWN_C; c++) {
          float step[OWN_T], x[OWN_T];
#pragma unroll
          for (int t = 0; t < OWN_T; t++) {
            const StepSize size = step_size(HAS_BIAS ? rd.at(c, t) + bias[c] : rd.at(c, t));
            step[t] = size.dt;
            x[t] = ru.at(c, t);
            if (MODE != 2) {
              x[t] *= size.factor;
            } else if (HAS_Z) {
              const float gate = rz.at(c, t);
              x[t] *= gate * sigmoid(gate);
            }
          }
          set_own(dt_tile + tile_at(o.channel + c * NEXT_C, o.step), step);
          set_own(x_tile + tile_at(o.channel + c * NEXT_C, o.step), x);
        }
        if (n.t <= later(OWN_T - 1)) {
#pragma unroll 1
          for (int t = 0; t < OWN_T; t++)  // a loop is a branch, which only a row's last tile takes
#pragma unroll
            for (int c = 0; c < OWN_C; c++) {
              const int at = tile_at(o.channel + c * NEXT_C, o.step + later(t));
              if (later(t) >= n.t) dt_tile[at] = x_tile[at] = 0.f;
            }
        }
      }
      if constexpr (USE_B && !CONST_B && !RELAY) next_B.store(b_tile, B_SCALE);
      if constexpr (USE_C && !CONST_C && !RELAY) next_C.store(c_tile, 1.f);
      if (HAS_Z && MODE == 0) fetch(raw_z, PLACE(z, t0), p.z_dim, p.z_step, n);
      copies_commit();
      if (i + TURNS < tiles) fetch_tile(buffer ^ 1, tile_start(i + TURNS));
      copies_commit();
    }
    if (BC_TILES > 0 && !RELAY) __syncthreads(); else __syncwarp();

    // ---- main loop
    if constexpr (RELAY) {
      float a[16][PER], x[4], b[PER];
      get(A, rates);
#pragma unroll
      for (int t4 = 0; t4 < 16; t4 += 4) {
        float dt[4];
        four_steps(dt, dt_tile, channel, t4);
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
          for (int k = 0; k < PER; k++) a[t4 + t][k] = decay_at(t * PER + k, dt[t], A[k]);
      }
      copies_wait<2>();
      __syncwarp();

      // this warp's turn; what it takes is in registers before it comes, B and x two steps ahead
      int at = (group * 32 + lane) * PER, next = turn + 1 < TURNS ? warp + 1 : warp + 1 - TURNS;
      keep(at), keep(next);
      float ahead[AHEAD][PER];
      auto look_ahead = [&](int t) {
        if (t % 4 == 0) four_steps(x, x_tile, channel, t);
        projected<CONST_B>(b, b_tile, t, s, b_const);
#pragma unroll
        for (int k = 0; k < PER; k++) ahead[t % AHEAD][k] = x[t % 4] * b[k];
      };
#pragma unroll
      for (int t = 0; t < AHEAD; t++) look_ahead(t);
      // nobody comes before the first. In a loop, or the assembler would move the decays' exponentials behind the wait
#pragma unroll 1
      for (int waited = 0; waited < (i > 0) + here(); waited++) turns.wait(warp, i / TURNS - (turn == 0));
      get(h, relayed + at);
      float entering[PER];
#pragma unroll
      for (int k = 0; k < PER; k++) entering[k] = h[k];
#pragma unroll
      for (int t = 0; t < 16; t++) {
#pragma unroll
        for (int k = 0; k < PER; k++) a[t][k] = h[k] = fmaf(a[t][k], h[k], ahead[t % AHEAD][k]);
        if (t + AHEAD < 16) look_ahead(t + AHEAD);
      }
      if (i + 1 < tiles) {
        set(relayed + at, h);
        turns.pass(next);
      }

      // what nobody waits for
      keep_states(t0, entering);
#pragma unroll
      for (int m = 0; m < 16; m += G) {
        float y[G];
#pragma unroll
        for (int t = 0; t < G; t++) {
          float c[PER];
          projected<CONST_C>(c, c_tile, m + t, s, c_const);
          y[t] = 0.f;
#pragma unroll
          for (int k = 0; k < PER; k++) y[t] = fmaf(c[k], a[m + t][k], y[t]);
        }
        deliver(y, dt_tile, channel, s, lane, m);
      }
      if (i + TURNS < tiles) fetch_spread(t0 + TURNS * TILE);
      copies_commit();
    }
#pragma unroll 1
    for (int j = 0; j < TILE && !RELAY; j += 16) {
      const int start = MODE == 2 ? TILE - 16 - j : j;
      if (MODE == 0) keep_states(t0 + start, h);
#pragma unroll(UNROLL)
      for (int m = 0; m < 16; m += G) {
        const int g0 = start + (MODE == 2 ? 16 - G - m : m);
        float y[G];
#pragma unroll
        for (int q = 0; q < G; q += 4) {
          const int g4 = g0 + (MODE == 2 ? G - 4 - q : q);
          if (MODE == 3 && CHECKPOINT < 16 && (t0 - begin + g4) % SEGMENT >= SEGMENT - CHECKPOINT) break;
          float dt[4], x[4];
          four_steps(dt, dt_tile, channel, g4);
          four_steps(x, x_tile, channel, g4);
          if (MODE == 1 || MODE == 2) time += (dt[0] + dt[1]) + (dt[2] + dt[3]);
#pragma unroll
          for (int j4 = 0; j4 < 4; j4++) {
            const int t = MODE == 2 ? 3 - j4 : j4;
            float b[PER], c[PER], sum = 0.f;
            if constexpr (USE_B && !CONST_B) states_of(b, b_tile, g4 + t, s);
            if constexpr (USE_C && !CONST_C) states_of(c, c_tile, g4 + t, s);
#pragma unroll
            for (int k = 0; k < PER; k++) {
              const float decay = decay_at(t * PER + k, dt[t], A[k]);
              if (USE_B && CONST_B) b[k] = b_const[k];
              if (USE_C && CONST_C) c[k] = c_const[k];
              if constexpr (MODE == 2) {
                h[k] = decay * fmaf(x[t], c[k], h[k]);
              } else {
                h[k] = fmaf(decay, h[k], x[t] * b[k]);
                if (MODE == 0) sum = fmaf(c[k], h[k], sum);
              }
            }
            y[q + t] = sum;
          }
          if (MODE == 3 && (g4 + 4) % CHECKPOINT == 0) keep_states(t0 + g4 + 4, h);
        }
        if constexpr (MODE == 0) {
          deliver(y, dt_tile, channel, s, lane, g0);
        }
      }
    }

    // ---- finish: this lane's elements of out
    __syncwarp();
    if constexpr (MODE == 0) {
      const Extent there = SHORT ? extent(t0) : n;
      if (HAS_Z) copies_wait<RELAY ? 2 : 1>();
      if (o.any) {
        Raw ru, rz, r;
        if (HAS_D) read(ru, raw_u + buffer * RAW_WORDS);
        float v[OWN_C][OWN_T], skip[OWN_C];
        if constexpr (HAS_D) constants(skip, x_tile, o.channel);
#pragma unroll
        for (int c = 0; c < OWN_C; c++) {
          get_own(v[c], dt_tile + tile_at(o.channel + c * NEXT_C, o.step));
#pragma unroll
          for (int t = 0; t < OWN_T; t++)
            if (HAS_D) v[c][t] = fmaf(skip[c], ru.at(c, t), v[c][t]);
        }
        if constexpr (KEEP_Y) {
          put(r, v);
          store(r, (scalar*)((char*)PLACE(out, t0) + ((char*)p.y - (char*)p.out)), p.out_dim, p.out_step, there);
        }
        if constexpr (HAS_Z) {
          read(rz, raw_z);
#pragma unroll
          for (int c = 0; c < OWN_C; c++)
#pragma unroll
            for (int t = 0; t < OWN_T; t++) {
              const float gate = rz.at(c, t);
              v[c][t] *= gate * sigmoid(gate);
            }
        }
        put(r, v);
        scalar* const out = PLACE(out, t0);
        __builtin_assume(__isGlobal(out));  // which an address from shared memory does not show
        store(r, out, p.out_dim, p.out_step, there);
      }
    }
  }

  if (MODE == 3) return;
  if (channel >= channels_left()) return;
  if (RELAY && turn != (tiles > 0 ? (tiles - 1) % TURNS : 0)) return;  // the warp of the row's last tile has its last state
#pragma unroll
  for (int k = 0; k < PER; k++) {
    const int n = s * PER + k;
    if (n >= STATE) break;
    const i64 at = (i64)(SHORT ? again(task.ch.first) + group * PER_WARP + channel : d) * STATE + n;
    if (MODE != 0) p.span_end[slot * p.dim * STATE + at] = h[k];
    else if (p.last_state && end == w.length) p.last_state[(i64)w.row * p.dim * STATE + at] = h[k];
  }
  if (MODE != 0 && s == 0) p.span_time[slot * p.dim + d] = time;
}

// B and C as a relay's warps copy them: float32, [row of B, C][step][state, padded to whole vectors]; B scaled.
extern "C" __global__ void __launch_bounds__(256) spread(const Params p) {
  const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, per_row = p.length * STATE_QUADS, row = i / per_row;
  if (row >= p.spread_rows) return;
  const i64 quad = (i - row * per_row) / p.length, t = i - row * per_row - quad * p.length, batch = row / p.groups;
  auto move = [&](float* to, const void* M, i64 batch_stride, i64 group_stride, i64 state_stride, i64 step_stride, float scale) {
    const scalar* const from = (const scalar*)M + batch * batch_stride + (row - batch * p.groups) * group_stride + t * step_stride;
    float v[4];
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = 4 * quad + j < STATE ? to_float(from[(4 * quad + j) * state_stride]) * scale : 0.f;
    *(float4*)(to + (row * p.length + t) * (4 * STATE_QUADS) + 4 * quad) = make_float4(v[0], v[1], v[2], v[3]);
  };
  if constexpr (!CONST_B) move(p.spread_B, p.B, p.B_batch, p.B_group, p.B_state, p.B_step, B_SCALE);
  if constexpr (!CONST_C) move(p.spread_C, p.C, p.C_batch, p.C_group, p.C_state, p.C_step, 1.f);
}

// Spans' leaving states -> their entering states, in place: enter[i+1] = exp(A time[i]) enter[i] + leave[i].
// One thread a (row, channel, state); the adjoint runs from the row's last span to the one numbered finer - 1: `finer` of
// these spans make one of the backward's, and none enters those before.
extern "C" __global__ void __launch_bounds__(256) combine(const Params p) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, per_row = p.dim * STATE;
  if (i >= p.rows * per_row) return;
  const i64 row = i / per_row, at = i - row * per_row, d = at / STATE;
  i64 first = row * p.splits, count = p.splits;
#if PACKED
  i64 start = offset_at(p, (int)row), length = offset_at(p, (int)row + 1) - start;
  first = start / p.span + row;
  count = length <= 0 ? 1 : (length + p.span - 1) / p.span;
#endif
  const float* entering = MODE == 2 ? p.last_state : p.initial_state;
  float h = entering ? entering[i] : 0.f;
  for (i64 k = 0; k < count; k++) {
    const i64 span = MODE == 2 ? count - 1 - k : k, slot = first + span;
    const bool more = MODE == 2 ? span >= p.finer : k + 1 < count;
    const float leave = more ? p.span_end[slot * per_row + at] : 0.f;
    p.span_end[slot * per_row + at] = h;
    if (!more) return;
    const float decay = decay_of(p.span_time[slot * p.dim + d], p.A[at]);
    h = h == 0.f ? leave : fmaf(decay, h, leave);  // 0 stays 0 where A > 0 overflows
  }
}
