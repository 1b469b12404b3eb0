// Gradients of the selective scan: the state is recomputed from the states that enter every tile, never stored.
//
// LANES lanes share a channel, each with PER of its states; PER_WARP channels make a group, and a block owns GROUPS groups
// over one span of a row. Its warps take the span's tiles of TILE steps in turn, last first, and walk all groups of a
// tile, each an item behind the warp before it: the adjoint of a group passes from warp to warp through shared memory
// (Turn), so that time runs in parallel as well as channels. For an item, a group of channels over a tile, a lane
//   copies    u, delta, dout, z and the kept states of the item three ahead, by cp.async, into a ring (where channels are
//             contiguous, the four of a whole BATCH of items at a time: as many channels as make a sector of memory)
//   finishes  the item before: du, ddelta, dz of the steps it owns, to device memory
//   stages    the next item: dt = Δ log2(e), x = Δu, dy = dout silu(z) and what `finish` needs, for the steps it owns
//   sweeps    forward through the tile from the kept state, keeping h and exp(ΔA) of its states in registers; then back:
//                 G = C dy + g;  dB += G x;  dC += dy h;  g = exp(ΔA) G;  dA += Δ g h'           (h' entering state)
//             dB and dC of all TILE steps stay in registers over the tile's groups. Σ G B, Σ A g h', Σ C h over the
//             states are summed by shuffles that leave each lane with its own steps. (On the tensor cores they take a
//             quarter of the instructions, but a GPU that uses them lowers its clock: an H100 from 1980 to 1800 MHz.)
// and after the tile's last group the warp sums its dB and dC over its channels, which then reach device memory.
// Copies, finish and stage are independent of the sweep around them and fill the gaps of its chains; between the waits
// for copies and for the turn, an item has no branch but, where channels are contiguous, that for a batch.
//
// The states that enter tiles (CHECKPOINT is TILE) are those that the forward kept or, where it kept fewer, those that
// the scan's MODE 3 wrote from them just before. What that takes is bounded: a launch is for a window of rows and time,
// `length` of their row_length steps, and the adjoint goes from one to the one before it as dinitial_state, last_state.
//
// Where channels are too few to fill the GPU, time is split over blocks, too; the adjoints that enter the spans come from
// the scan's MODE 2, over parts `finer` times as many, and `combine`.
// PARTIALS 1: every block writes its own sums, which the host adds in a fixed order (bitwise repeatable); 0: blocks add
// theirs atomically.
//
// Costs per (state, step) of a lane: 13 FMUL/FFMA (12 without z, or where y is kept), 1 MUFU, 10 shared loads of 16 bytes
// for PER x 4 of them; per step and channel, of its LANES, 3 x 4 (LANES - 1) / LANES instructions for the sums over states
// (2 x without z). In all, of bf16 and 16 states, about 815 instructions an item of 32 (state, step), 125 of them
// addresses, selects and waits, and 400 a tile. Float32 data take 8 more for their decays. Registers: 4 PER TILE for dB,
// dC, h and decays, and about 110, which is why PER x TILE is at most 32. Shared memory is busy with an item for about 180
// cycles, 43 of them for shuffles.

constexpr int T = TILE;
constexpr bool SUM_Y = HAS_Z && !KEEP_Y;                    // y = C h + D u is computed anew
constexpr int RING = 4;                                     // items in flight, and the one at hand
// where registers allow: from 10.0 on, ptxas needs more of them, here and below
constexpr bool LOAD_AHEAD = DTYPE != 0 && !CONST_B && !CONST_C && !(PER > 2 && __CUDA_ARCH__ >= 1000);
constexpr bool ROOMY = LOAD_AHEAD && LANES <= 16;           // where they allow more
DEVICE int lane_now() { return ROOMY ? (int)threadIdx.x & 31 : lane_here(); }  // of use once a tile
// With fewer groups than warps, a warp waits for its turn, and finishes the item before, between its sweeps, so that turns
// are shorter. Where nobody would wait, that is 0.4 % slower.
constexpr bool LATE = GROUPS < WARPS && LANES <= 16;
static_assert(LANES >= 4 && PER * T <= 32 && T >= 4 && T <= 16 && CHECKPOINT == T && GROUPS >= 1 + DIM_LAYOUT,
              "invalid configuration");

constexpr int STEPS = LANES < T ? T / LANES : 1;            // that a lane owns of its channel's, from own_step on
DEVICE constexpr int own_step(int lane) { return slice_of(lane) * STEPS < T ? slice_of(lane) * STEPS : 0; }

// Add (or, for partial sums, store) four neighbours of which `count` exist.
DEVICE void deposit(float* to, float4 v, int count) {
  if (count <= 0) return;
#if PARTIALS
  if (count >= 4 && ((size_t)to & 15) == 0) { *(float4*)to = v; return; }
  to[0] = v.x;
  if (count > 1) to[1] = v.y;
  if (count > 2) to[2] = v.z;
  if (count > 3) to[3] = v.w;
#else
#if __CUDA_ARCH__ >= 900
  if (count >= 4 && ((size_t)to & 15) == 0) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
    return;
  }
#endif
  atomicAdd(to, v.x);
  if (count > 1) atomicAdd(to + 1, v.y);
  if (count > 2) atomicAdd(to + 2, v.z);
  if (count > 3) atomicAdd(to + 3, v.w);
#endif
}
DEVICE void deposit(float* to, float v) {
#if PARTIALS
  *to = v;
#else
  atomicAdd(to, v);
#endif
}

// ---- an item's inputs: T steps of PER_WARP channels of each tensor, as they lie in memory ---------------------------
// Lines are contiguous in memory and copied in pieces. Where a line may start in the middle of a word (SHIFTED), the
// words that hold it are copied, and what it is shifted by is found again from its address.
//
// Where channels are contiguous, an item's are less than memory moves at a time (a sector of 32 bytes), so BATCH items
// share lines: the batch after the next is copied at once, and a batch's results leave together. Where a channel has a warp
// of its own, half a sector is enough: its states are so many that fetching a sector twice does not tell, and shared memory
// is short.

constexpr int PARTS = HAS_Z ? 4 : 3;                        // u, delta, dout, z
constexpr int BATCH = !DIM_LAYOUT ? 1 : PER_WARP * ITEM > 16 ? 2 : (LANES < 32 ? 32 : 16) / (PER_WARP * ITEM);
constexpr int BATCHES = DIM_LAYOUT ? 3 : 0;                 // at hand, and two ahead
constexpr int COPIED = DIM_LAYOUT ? 1 : PARTS;              // parts that are copied at a time
constexpr int LINES = DIM_LAYOUT ? T : PER_WARP;
constexpr int LINE = DIM_LAYOUT ? BATCH * PER_WARP : T;     // elements
constexpr bool BY_PIECES = ALIGNED && LINE * ITEM >= 4;
constexpr bool SHIFTED = !BY_PIECES && ITEM == 2;
constexpr int COPY = !BY_PIECES || LINE * ITEM < 8 ? 4 : LINE * ITEM < 16 ? 8 : 16;  // bytes of a piece
constexpr int PIECES = SHIFTED ? LINE / 2 + 1 : LINE * ITEM / COPY;
constexpr int LINE_BYTES = PIECES * COPY;
// Where lanes read a line each, 16 bytes more after every other lane's, so that they meet no bank twice.
DEVICE constexpr int line_at(int line, int bytes) { return line * bytes + (DIM_LAYOUT ? line / (2 * STEPS) * 16 : 0); }
constexpr int PART_BYTES = (line_at(LINES, LINE_BYTES) + 15) / 16 * 16;
constexpr int COPIES = COPIED * LINES * PIECES, ROUNDS = (COPIES + 31) / 32;
// rounds whose addresses are kept, not computed anew
constexpr int MOST_KEPT = DTYPE != 1 && __CUDA_ARCH__ >= 1000 ? 1 : 2;
constexpr int KEPT_ROUNDS = !DIM_LAYOUT && ROUNDS <= MOST_KEPT && PART_BYTES == LINES * LINE_BYTES ? ROUNDS : 0;
constexpr int KEPT_COPY = STATE % 4 == 0 && PER_WARP * STATE >= 128 ? 16 : STATE % 2 == 0 ? 8 : 4;
constexpr int KEPT_PIECES = STATE * 4 / KEPT_COPY, KEPT_STEPS = (PER_WARP * KEPT_PIECES + 31) / 32;
constexpr int KEPT_UNROLLED = KEPT_STEPS > 2 ? 1 : 2;       // an odd number of more than 64 states of a single channel
constexpr int KEPT_BYTES = PER_WARP * STATES * 4;
constexpr int KEPT_AT = DIM_LAYOUT ? 0 : PARTS * PART_BYTES, SLOT_BYTES = KEPT_AT + KEPT_BYTES;
// Results of a batch, du, ddelta and dz, as they will lie in memory: lines of pieces of 16 bytes.
constexpr int OUT_BYTES = LINE * ITEM, OUT_PART = (line_at(LINES, OUT_BYTES) + 15) / 16 * 16;
constexpr int OUT_PIECES = (OUT_BYTES + 15) / 16, OUT_ROUNDS = (LINES * OUT_PIECES + 31) / 32;

// A lane's own steps of its channel of one tensor; shift_of(i): of the line of the i-th, in elements.
template <class Shift>
DEVICE void read_own(float (&v)[STEPS], const char* at, Shift shift_of) {
  if constexpr (DIM_LAYOUT || SHIFTED) {
#pragma unroll
    for (int i = 0; i < STEPS; i++)
      v[i] = to_float(*(const scalar*)(at + i * (DIM_LAYOUT ? LINE_BYTES : ITEM) + (SHIFTED ? shift_of(i) * ITEM : 0)));
  } else if constexpr (ITEM == 4) {
    get(v, (const float*)at);
  } else if constexpr (STEPS == 4) {
    const uint2 q = *(const uint2*)at;
    v[0] = low(q.x), v[1] = high(q.x), v[2] = low(q.y), v[3] = high(q.y);
  } else if constexpr (STEPS == 2) {
    const u32 q = *(const u32*)at;
    v[0] = low(q), v[1] = high(q);
  } else {
    v[0] = to_float(*(const scalar*)at);
  }
}
// A lane's own steps to length-contiguous device memory, `count` of them: all or none where they are aligned.
DEVICE void write_own(char* at, const float (&v)[STEPS], int count) {
  u32 words[STEPS * ITEM / 4 + 1];
#pragma unroll
  for (int i = 0; i < STEPS; i += 4 / ITEM) words[i * ITEM / 4] = pack(v[i], v[ITEM == 2 && STEPS > 1 ? i + 1 : i]);
  if constexpr (ALIGNED && STEPS > 1) {
    if (count <= 0) return;
    if constexpr (STEPS * ITEM == 16) *(uint4*)at = make_uint4(words[0], words[1], words[2], words[3]);
    else if constexpr (STEPS * ITEM == 8) *(uint2*)at = make_uint2(words[0], words[1]);
    else *(u32*)at = words[0];
  } else {
#pragma unroll
    for (int i = 0; i < STEPS; i++)
      if (i < count) {
        const u32 w = words[i * ITEM / 4];
        ((scalar*)at)[i] = unbits(ITEM == 4 ? w : i & 1 ? w >> 16 : w & 0xffffu);
      }
  }
}

// ---- a tile of B, C: in float32; state s*PER + k in line k*LANES + s ------------------------------------------------

constexpr int PITCH = T == 4 ? 4 : T + 4;  // floats between lines: eight of them, read at once, meet no bank twice
// floats from a k to the next: more than two of them, written at once, meet no bank twice, either
constexpr int BETWEEN = LANES * PITCH + (PER > 2 ? T : 0);
constexpr int BC_FLOATS = PER * BETWEEN;
DEVICE int line_of(int n) { return n % PER * BETWEEN + n / PER * PITCH; }

// What a lane moves of B or C: items of four steps of a state or, if B_AXIS or C_AXIS says so, four states of a step.
template <int AXIS, int VECTOR>
struct Projection {
  static constexpr int ITEMS = STATES * T / 4;
  static constexpr int COUNT = (ITEMS + 31) / 32;
  static constexpr int RAW = ITEM * COUNT * 32;  // words that are copied

  static DEVICE bool place(int lane, int k, int& n, int& t) {
    const int i = lane + k * 32;
    if (AXIS == 0) t = i % QUADS * 4, n = i / QUADS;
    else n = i % (STATES / 4) * 4, t = i / (STATES / 4);
    return ITEMS % 32 == 0 || i < ITEMS;
  }
  // row: B or C at the span's first step; t0: the tile's first; count: steps of the tile that exist
  static DEVICE void fetch(u32* raw, const scalar* row, i64 state_stride, i64 step_stride, int t0, int count) {
    if constexpr (VECTOR) {
      const int lane = lane_now();
#pragma unroll
      for (int k = 0; k < COUNT; k++) {
        int n, t;
        if (!place(lane, k, n, t)) continue;
        const int left = AXIS == 0 ? (n < STATE ? count - t : 0) : t < count ? STATE - n : 0;
        copy_async<4 * ITEM>(raw + (k * 32 + lane) * ITEM, row + n * state_stride + (t0 + t) * step_stride,
                             (left < 0 ? 0 : left > 4 ? 4 : left) * ITEM);
      }
    }
  }
  static DEVICE void store(float* tile, const u32* raw, const scalar* row, i64 state_stride, i64 step_stride, int t0, int count,
                           float scale) {
    const int lane = lane_now();
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      int n, t;
      if (!place(lane, k, n, t)) continue;
      float v[4];
      if constexpr (VECTOR) {
        const u32* const mine = raw + (k * 32 + lane) * ITEM;
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] = ITEM == 2 && j & 1 ? high(mine[j * ITEM / 4]) : low(mine[j * ITEM / 4]);
      } else {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int state = n + (AXIS == 0 ? 0 : j), step = t + (AXIS == 0 ? j : 0);
          v[j] = state < STATE && step < count ? to_float(__ldg(row + state * state_stride + (t0 + step) * step_stride)) : 0.f;
        }
      }
#pragma unroll
      for (int j = 0; j < 4; j++) v[j] *= scale;
      if constexpr (AXIS == 0) {
        *(float4*)(tile + line_of(n) + t) = make_float4(v[0], v[1], v[2], v[3]);
      } else {
#pragma unroll
        for (int j = 0; j < 4; j++) tile[line_of(n + j) + t] = v[j];
      }
    }
  }
};
typedef Projection<B_AXIS, B_ALIGNED> Projection_B;
typedef Projection<C_AXIS, C_ALIGNED> Projection_C;

// ---- sums over states -----------------------------------------------------------------------------------------------

// Where two halves of some steps meet, a lane keeps one and hands the other on to the lane across a bit of its number, the
// lower half if the bit is set. What it then has of the half that it keeps:
DEVICE float joined(float lower, float upper, int lane, int bit) {
  const float hand = lane & bit ? lower : upper, own = lane & bit ? upper : lower;
  return own + __shfl_xor_sync(0xffffffffu, hand, bit);
}
// Sums of a channel's T steps over its lanes, spread over them: slice s is left with its own steps.
struct Spread {
  static constexpr int LEFT = STEPS < 4 ? STEPS : 4;  // steps of a quad that are left of it
  float of[QUADS][LEFT];                              // of quad q, then of all quads from q on that have been joined

  static DEVICE constexpr int bit_of(int steps) { return steps / STEPS * SLICE_BIT; }  // between slices so many steps apart

  DEVICE void join(int q, int other, int lane, int bit) {
#pragma unroll
    for (int i = 0; i < LEFT; i++) of[q][i] = joined(of[q][i], of[other % QUADS][i], lane, bit);
  }
  DEVICE void add(int q, const float (&v)[4], int lane) {  // quad q, after q + 1
    if (LEFT == 4) {
#pragma unroll
      for (int i = 0; i < LEFT; i++) of[q][i] = v[i];
    } else {
      const float first = joined(v[0], v[2], lane, bit_of(2)), second = joined(v[1], v[3], lane, bit_of(2));
      if (LEFT == 2) of[q][0] = first, of[q][LEFT - 1] = second;
      else of[q][0] = joined(first, second, lane, bit_of(1));
    }
    if (T >= 8 && q % 2 == 0) join(q, q + 1, lane, bit_of(4));
    if (T >= 16 && q == 0) join(0, 2, lane, bit_of(8));
    if (q == 0)
#pragma unroll
      for (int slices = T; slices < LANES; slices <<= 1) of[0][0] += __shfl_xor_sync(0xffffffffu, of[0][0], slices * SLICE_BIT);
  }
  DEVICE float own(int i) const { return of[0][i]; }
};
// Sums of T steps over a warp's channels, spread over them: a channel is left with SHARE steps from own_share on, or
// shares one with ALIKE - 1 others.
constexpr int SHARE = T > PER_WARP ? T / PER_WARP : 1, ALIKE = PER_WARP > T ? PER_WARP / T : 1;
DEVICE int own_share(int channel) { return channel / ALIKE * SHARE; }
template <int N = T, int CHANNEL = PER_WARP / 2>
DEVICE void sum_channels(float (&v)[T], int lane) {
  if constexpr (CHANNEL > 0) {
    constexpr int bit = CHANNEL == 1 ? 1 : CHANNEL * LANES;  // between channels so many apart
    if constexpr (N > 1) {
#pragma unroll
      for (int i = 0; i < N / 2; i++) v[i] = joined(v[i], v[N / 2 + i], lane, bit);
    } else {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], bit);
    }
    sum_channels<(N > 1 ? N / 2 : 1), CHANNEL / 2>(v, lane);
  }
}

// ---- shared memory --------------------------------------------------------------------------------------------------

enum { ROW_DT, ROW_X, ROW_DY, ROW_U, ROW_SLOPE, ROW_GATE };  // Δ log2(e); Δu; dout silu(z); u; dΔ/draw; dout silu'(z)
constexpr int ROWS = 5 + HAS_Z;
struct alignas(16) Group {               // what a block keeps of a group of channels
  float carried[32 * 2 * PER];           // of lanes, as apart_at has them: g between tiles, sum of dA
  float A[32 * PER];
  float2 last_sums[32];                  // of dD, ddelta_bias of the last group's
  float2 near[PER_WARP];                 // delta_bias of the next group's channel, D of the last one's
  // constant B, C and the sums of dB, dC; what is not needed has one element, here and below
  alignas(16) float fixed_B[CONST_B ? 2 : 1][CONST_B ? 32 : 1][CONST_B ? PER : 1];
  alignas(16) float fixed_C[CONST_C ? 2 : 1][CONST_C ? 32 : 1][CONST_C ? PER : 1];
};
struct alignas(16) Warp {
  float elements[2][ROWS][PER_WARP][T];  // of the item at hand, and of the one before or after
  unsigned char ring[RING][SLOT_BYTES];
  // inputs and results of batches; where the lane's first piece of each part lies of the batch to be copied next, and of du
  // of the batch that leaves next
  alignas(16) unsigned char batches[DIM_LAYOUT ? BATCHES : 1][DIM_LAYOUT ? PARTS * PART_BYTES : 16];
  alignas(16) unsigned char results[DIM_LAYOUT ? 2 + HAS_Z : 1][DIM_LAYOUT ? OUT_PART : 16];
  alignas(16) i64 at[DIM_LAYOUT && BY_PIECES ? PARTS + 1 : 2][DIM_LAYOUT && BY_PIECES ? 32 : 1];
  // where, of the span's first tile, the lane's steps of du begin and its share of dB and dC goes
  i64 out[32];                           // in bytes, from du
  i64 sums[32];                          // in elements, from dB and dC alike
  alignas(16) float B[CONST_B ? 1 : BC_FLOATS];
  alignas(16) float C[CONST_C ? 1 : BC_FLOATS];
  alignas(16) u32 raw_B[CONST_B ? 1 : Projection_B::RAW];
  alignas(16) u32 raw_C[CONST_C ? 1 : Projection_C::RAW];
  alignas(16) u32 y[KEEP_Y ? 32 : 1][(STEPS * ITEM + 3) / 4];  // of the lane's steps of the item at hand
};
#ifndef TURN_ARRIVALS
#define TURN_ARRIVALS (DIM_LAYOUT && !LATE ? 32 : 1)   // where channels are contiguous, one is slower but with few groups
#endif
typedef Turn<TURN_ARRIVALS> BackwardTurn;
struct Shared {
  Task task;
  const void *row_B, *row_C;              // of the span's first step
  i64 step_bytes[DIM_LAYOUT ? 6 : 2];     // from step to step of each part, and of du
  int last_t0[WARPS];                     // for the end, so that no register holds it meanwhile
  BackwardTurn turns[WARPS][GROUPS];     // when a warp may have a group
  Group groups[GROUPS];
  Warp warps[WARPS];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "shared_bytes of cuda_configs.py mirrors this");

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_backward(const Params p) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *(Shared*)memory;
  int lane = (int)threadIdx.x & 31;
  keep(lane);
  const int tid = (int)threadIdx.x, warp = __shfl_sync(0xffffffffu, tid >> 5, 0), s = slice_of(lane), channel = channel_of_lane(lane);
  const bool owns = s * STEPS < T;
  const int step = own_step(lane);
  Warp& mine = shared.warps[warp];
  // An address within `mine` that, where registers allow, is not computed anew at each use.
  auto pinned = [&](const void* at) {
    int offset = (int)((const unsigned char*)at - memory);
    if (ROOMY) keep(offset);
    return memory + offset;
  };
  if (STATES != STATE)  // what is never copied there
    for (int i = lane; i < RING * SLOT_BYTES / 4; i += 32) ((u32*)mine.ring)[i] = 0u;
  Task& task = shared.task;
  if (tid == 0) {
    task.slot = blockIdx.x / p.blocks;
    task.block = (int)(blockIdx.x - task.slot * p.blocks);
    task.there = locate(p, task.slot, task.w);
    task.ch = channels(p, task.block);
    const i64 row = PACKED ? 0 : task.w.row;
    if constexpr (DIM_LAYOUT) {
      shared.step_bytes[0] = p.u_step * ITEM, shared.step_bytes[1] = p.delta_step * ITEM;
      shared.step_bytes[2] = p.dout_step * ITEM, shared.step_bytes[PARTS] = p.grad_step * ITEM;
      if (HAS_Z) shared.step_bytes[3] = p.z_step * ITEM;
    }
    const i64 begin = task.w.first + task.w.begin;
    shared.row_B = (const scalar*)p.B + row * p.B_batch + task.ch.group * p.B_group + begin * p.B_step;
    shared.row_C = (const scalar*)p.C + row * p.C_batch + task.ch.group * p.C_group + begin * p.C_step;
  }
  if (WARPS > 1)
    for (int i = lane; i < GROUPS; i += 32) shared.turns[warp][i].begin();
  __syncthreads();
  if (!task.there) return;
  const Span& w = task.w;
  const Channels& ch = task.ch;
  const int steps = w.end - w.begin, tiles = (steps + T - 1) / T, count = ch.count;
  // of channels that exist, and a second where a batch must follow another
  const int groups = DIM_LAYOUT && count <= PER_WARP ? 2 : (count + PER_WARP - 1) / PER_WARP;
  auto batch = [&]() { return PACKED ? 0 : w.row; };
  auto row_B = [&]() { return (const scalar*)shared.row_B; };
  auto row_C = [&]() { return (const scalar*)shared.row_C; };
  auto exists = [&](int c) { return c * PER_WARP + channel < count; };

  // the span of the pass before, `finer` of which make one here, that ends where this one does
  const i64 finer = p.span / p.finer, rows_first = PACKED ? w.first / finer + w.row : w.row * ((p.length + finer - 1) / finer);
  const i64 entered = rows_first + w.end / finer - 1;

  // what belongs to this lane's channels and states: constants, the adjoint that enters from the right, sums over time
#pragma unroll 1
  for (int c = warp; c < groups; c += WARPS) {
    const bool there = exists(c);
    const int d = there ? ch.first + c * PER_WARP + channel : 0;
    float g[2 * PER], A[PER], fixed[2][PER];
#pragma unroll
    for (int k = 0; k < PER; k++) {
      const int n = s * PER + k;
      const bool real = there && n < STATE;
      const i64 at = (i64)d * STATE + n;
      A[k] = real ? p.A[at] : 0.f;
      g[k] = g[PER + k] = 0.f;
      if (real && w.end < w.length) g[k] = __ldcg(p.span_end + entered * p.dim * STATE + at);
      else if (real && p.last_state) g[k] = p.last_state[(i64)w.row * p.dim * STATE + at];
      fixed[0][k] = CONST_B && real ? ((const float*)p.B)[at] * B_SCALE : 0.f;
      fixed[1][k] = CONST_C && real ? ((const float*)p.C)[at] : 0.f;
    }
    const float none[PER] = {};
    set<128>(shared.groups[c].carried + apart_at(lane, 2 * PER), g);
    set<128>(shared.groups[c].A + apart_at(lane, PER), A);
    if (s == 0) {
      shared.groups[c == 0 ? groups - 1 : c - 1].near[channel].x = HAS_BIAS && there ? p.delta_bias[d] : 0.f;
      shared.groups[c == groups - 1 ? 0 : c + 1].near[channel].y = HAS_D && there ? p.D[d] : 0.f;
    }
    if constexpr (CONST_B) set(shared.groups[c].fixed_B[0][lane], fixed[0]), set(shared.groups[c].fixed_B[1][lane], none);
    if constexpr (CONST_C) set(shared.groups[c].fixed_C[0][lane], fixed[1]), set(shared.groups[c].fixed_C[1][lane], none);
    shared.groups[c].last_sums[lane] = make_float2(0.f, 0.f);
  }

  const i64 bc_first = PARTIALS ? task.block % (p.blocks / p.groups) * p.bc_partial : 0;
  const i64 bc_row = ((i64)batch() * p.groups + ch.group) * STATE + s * PER;
  mine.sums[lane] = bc_first + bc_row * p.row_length + w.first + w.begin + own_share(channel);

  __syncthreads();

  // ---- moving inputs
  auto address = [&](int part, int first_channel, int line, int t0) {  // of a line
    const void* const base = part == 0 ? p.u : part == 1 ? p.delta : part == 2 ? p.dout : p.z;
    const i64 batch_stride = part == 0 ? p.u_batch : part == 1 ? p.delta_batch : part == 2 ? p.dout_batch : p.z_batch;
    const i64 dim_stride = part == 0 ? p.u_dim : part == 1 ? p.delta_dim : part == 2 ? p.dout_dim : p.z_dim;
    const i64 step_stride = part == 0 ? p.u_step : part == 1 ? p.delta_step : part == 2 ? p.dout_step : p.z_step;
    return (const char*)((const scalar*)base + batch() * batch_stride +
                         (ch.first + first_channel + (DIM_LAYOUT ? 0 : line)) * dim_stride +
                         (w.first + w.begin + t0 + (DIM_LAYOUT ? line : 0)) * step_stride);
  };
  auto shift_of = [&](const char* line) { return SHIFTED ? (int)((size_t)line >> 1 & 1) : 0; };
  auto bytes_of = [](int line, int piece, int left, int live) {  // of a piece, where `left` steps and `live` channels exist
    const int bytes = (DIM_LAYOUT ? live : left) * ITEM - piece * COPY;
    return bytes < 0 || line >= (DIM_LAYOUT ? left : live) ? 0 : bytes > COPY ? COPY : bytes;
  };
  auto fetch_parts = [&](unsigned char* to, int t0, int c, int first_part) {  // COPIED of them
    const int left = steps - t0, live = count - c * PER_WARP;
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
      const int i = lane + r * 32 + (COPIES > 32 ? here() : 0);
      const int part = first_part + i / (LINES * PIECES), line = i / PIECES % LINES, piece = i % PIECES;
      if (COPIES % 32 != 0 && i >= COPIES) continue;
      const char* from = address(part, c * PER_WARP, line, t0);
      const int shift = shift_of(from);
      if (SHIFTED) from = (const char*)((size_t)from & ~(size_t)3);
      const int bytes = bytes_of(line, piece, left + (DIM_LAYOUT ? 0 : shift), live + (DIM_LAYOUT ? shift : 0));
      copy_async<COPY>(to + part * PART_BYTES + line_at(line, LINE_BYTES) + piece * COPY, from + piece * COPY, bytes);
    }
  };
  auto fetch_item = [&](unsigned char* to, int tile, int c) {
    const int live = count - c * PER_WARP;
    fetch_parts(to, tile * T, c, 0);
    const float* const from = p.states + ((w.states + w.begin / T + tile) * p.dim + ch.first + c * PER_WARP) * STATE;
#pragma unroll(KEPT_UNROLLED)
    for (int r = 0; r < KEPT_STEPS; r++) {
      const int i = lane + r * 32, line = i / KEPT_PIECES, piece = i % KEPT_PIECES;
      if (PER_WARP * KEPT_PIECES % 32 != 0 && i >= PER_WARP * KEPT_PIECES) continue;
      copy_async<KEPT_COPY>(to + KEPT_AT + (line * STATES + state_at(piece * (KEPT_COPY / 4))) * 4,
                            from + line * STATE + piece * (KEPT_COPY / 4), line < live ? KEPT_COPY : 0);
    }
  };
  auto fetch_bc = [&](int t0) {
    if constexpr (!CONST_B) Projection_B::fetch(mine.raw_B, row_B(), p.B_state, p.B_step, t0, steps - t0);
    if constexpr (!CONST_C) Projection_C::fetch(mine.raw_C, row_C(), p.C_state, p.C_step, t0, steps - t0);
  };
  auto store_bc = [&](int t0) {
    if constexpr (!CONST_B) Projection_B::store(mine.B, mine.raw_B, row_B(), p.B_state, p.B_step, t0, steps - t0, B_SCALE);
    if constexpr (!CONST_C) Projection_C::store(mine.C, mine.raw_C, row_C(), p.C_state, p.C_step, t0, steps - t0, 1.f);
  };
  // four steps of B or C of this lane's state k
  auto four = [&](float (&v)[4], const float* tile, int k, int t4) { get(v, tile + k * BETWEEN + s * PITCH + t4); };

  // ---- an item's elements
  struct Elements {
    float u[STEPS], dt[STEPS], factor[STEPS], slope[STEPS], dy[STEPS], gate[STEPS];
  };
  auto stage_begin = [&](Elements& e, const unsigned char* raw, float bias, int t0, int c) {
    auto read_part = [&](float (&v)[STEPS], int part) {
      read_own(v, (const char*)raw + part * PART_BYTES, [&](int i) {
        return shift_of(address(part, c / BATCH * BATCH * PER_WARP, DIM_LAYOUT ? step + i : channel, t0));
      });
    };
    read_part(e.u, 0), read_part(e.dt, 1), read_part(e.dy, 2);
    if (HAS_Z) read_part(e.gate, 3);
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      e.dt[i] += bias, e.slope[i] = SOFTPLUS ? exp_neg_abs(e.dt[i]) : 0.f;
      if (HAS_Z) e.factor[i] = ex2(-LOG2E * e.gate[i]);
    }
  };
  auto stage_end = [&](Elements& e) {
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      if (HAS_Z) {
        const float z = e.gate[i], sg = rcp(1.f + e.factor[i]), silu = z * sg;
        e.gate[i] = e.dy[i] * fmaf(silu, 1.f - sg, sg);
        e.dy[i] *= silu;
      }
      const StepSize size = step_size(e.dt[i], e.slope[i]);
      e.slope[i] = step_slope(e.dt[i], e.slope[i], DTYPE == 0 ? 1.f : LOG2E);
      e.dt[i] = size.dt, e.factor[i] = size.factor;
    }
  };
  auto stage_tail = [&](Elements& e, int left) {  // what does not exist leaves h and g alone
#pragma unroll
    for (int i = 0; i < STEPS; i++)  // rows end with whole vectors
      if (left <= (ALIGNED && !DIM_LAYOUT ? 0 : i)) e.dt[i] = e.factor[i] = e.slope[i] = 0.f;
  };
  auto put = [&](float* to, const Elements& e) {  // a lane's own elements
    if (!owns) return;
    float x[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; i++) x[i] = e.u[i] * (DTYPE == 0 ? e.factor[i] : e.dt[i]);
    set(to + ROW_DT * PER_WARP * T, e.dt), set(to + ROW_X * PER_WARP * T, x), set(to + ROW_DY * PER_WARP * T, e.dy);
    set(to + ROW_U * PER_WARP * T, e.u), set(to + ROW_SLOPE * PER_WARP * T, e.slope);
    if (HAS_Z) set(to + ROW_GATE * PER_WARP * T, e.gate);
  };

  // ---- the end of an item
  struct Sums {  // over states: Σ G B, Σ A g h', Σ C h
    Spread gb, ga, y;
  } sums = {};
  // where this lane's steps of that item lie in du, and how many there are; likewise in ddelta and dz
  char* out_at = nullptr;
  mine.out[lane] = (batch() * p.grad_batch + (ch.first + channel) * p.grad_dim + (w.first + w.begin + step) * p.grad_step) * ITEM;
  auto first_out = [&](int t0) { return (char*)p.du + (mine.out[lane_now()] + (u32)t0 * p.grad_step * ITEM); };  // of the first group
  i64 to_ddelta = (char*)p.ddelta - (char*)p.du, to_dz = (char*)p.dz - (char*)p.du, out_over = PER_WARP * p.grad_dim * ITEM;
  int out_count = 0;
  if (ROOMY) keep(out_over), keep(to_ddelta), keep(to_dz);
  const int own_groups = owns ? (count - channel + PER_WARP - 1) / PER_WARP : 0;  // whose channel exists
  // what the forward kept of y of the lane's steps at `at` in du, whose layout it has; read when the item is finished
  auto fetch_y = [&](const char* at, int count) {
    const char* const from = at + ((const char*)p.y - (const char*)p.du);
    u32* const to = mine.y[lane];
    if constexpr (ALIGNED && !DIM_LAYOUT && STEPS * ITEM >= 4) {
      copy_async<STEPS * ITEM>(to, from, count > 0 ? STEPS * ITEM : 0);
    } else {
#pragma unroll
      for (int i = 0; i < STEPS; i++) {
        const u32 v = i < count ? bits(((const scalar*)from)[i * p.grad_step]) : 0u;
        if (ITEM == 2 && i % 2 == 1) to[i / 2] |= v << 16; else to[i * ITEM / 4] = v;
      }
    }
  };
  int put_at = line_at(step, OUT_BYTES) + channel * ITEM;  // of batches: the lane's steps of the item that is finished next
  auto put_result = [&](int which, const float (&v)[STEPS]) {
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      const u32 w = pack(v[i], v[i]);
      *(scalar*)(mine.results[which] + put_at + i * OUT_BYTES) = unbits(ITEM == 4 ? w : w & 0xffffu);
    }
  };
  // Batches, in the order in which a warp comes to them.
  struct Batch {
    int t0, c;  // the first of its tile's steps and of its groups
  };
  const int last_t0 = (tiles - 1 - warp) * T;
  auto before = [&](Batch b) { return b.c > 0 ? Batch{b.t0, b.c - BATCH} : Batch{b.t0 + WARPS * T, (groups - 1 + here()) / BATCH * BATCH}; };
  auto after = [&](Batch b) { return b.c + BATCH < groups ? Batch{b.t0, b.c + BATCH} : Batch{b.t0 - WARPS * T, 0}; };
  // After a tile's last batch, from where the next would lie in the same lines to the first of another tile.
  auto turn_back = [&](int first, int end, Batch b) {
    if (b.c + BATCH < groups) return;
#pragma unroll 1
    for (int part = first; part < end; part++)
      mine.at[part][lane] -= (b.c + BATCH) * (PER_WARP * ITEM) + WARPS * T * shared.step_bytes[part];
  };
  auto flush = [&](Batch b) {  // its results, to device memory
    const int left = steps - b.t0, live = count - b.c * PER_WARP;
    if (left <= 0) return;  // before the first
    char* du = nullptr;
    if constexpr (BY_PIECES) {
      du = (char*)mine.at[PARTS][lane];
      __builtin_assume(__isGlobal(du));  // which an address from shared memory does not show
    }
#pragma unroll
    for (int r = 0; r < OUT_ROUNDS; r++) {
      const int i = lane + r * 32, line = i / OUT_PIECES, first = i % OUT_PIECES * (16 / ITEM), at = line_at(line, OUT_BYTES) + first * ITEM;
      if (line >= (left < LINES ? left : LINES) || live <= first) continue;
      char* const to = BY_PIECES ? du + (r > 0 ? r * (32 / OUT_PIECES) * shared.step_bytes[PARTS] : 0)
                                 : (char*)p.du + (batch() * p.grad_batch + (ch.first + b.c * PER_WARP + first) * p.grad_dim +
                                                  (w.first + w.begin + b.t0 + line) * p.grad_step) * ITEM;
      uint4 v[2 + HAS_Z];
#pragma unroll
      for (int k = 0; k < 2 + HAS_Z; k++) v[k] = *(const uint4*)(mine.results[k] + at);
#pragma unroll
      for (int k = 0; k < 2 + HAS_Z; k++) {
        char* const there = to + (k == 0 ? 0 : k == 1 ? to_ddelta : to_dz);
        if (BY_PIECES) {
          *(uint4*)there = v[k];
        } else {
          const u32 words[4] = {v[k].x, v[k].y, v[k].z, v[k].w};
#pragma unroll
          for (int e = 0; e < 16 / ITEM; e++)
            if (first + e < live) ((scalar*)there)[e] = unbits(ITEM == 4 ? words[e] : e & 1 ? words[e / 2] >> 16 : words[e / 2] & 0xffffu);
        }
      }
    }
    if constexpr (BY_PIECES) mine.at[PARTS][lane] = (i64)(du + LINE * ITEM), turn_back(PARTS, PARTS + 1, b);
  };
  auto finish = [&](const float* from, float skip, float2& so_far) {  // from: a lane's own elements
    float dt[STEPS], dy[STEPS], u[STEPS], slope[STEPS], gate[STEPS];
    float gb[STEPS], ga[STEPS], y[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; i++) gb[i] = sums.gb.own(i), ga[i] = sums.ga.own(i), y[i] = sums.y.own(i);
    get(dt, from + ROW_DT * PER_WARP * T), get(dy, from + ROW_DY * PER_WARP * T), get(u, from + ROW_U * PER_WARP * T);
    get(slope, from + ROW_SLOPE * PER_WARP * T);
    if (HAS_Z) get(gate, from + ROW_GATE * PER_WARP * T);
    float2 total = so_far;
    if (KEEP_Y)
#pragma unroll
      for (int i = 0; i < STEPS; i++) {
        const u32 v = mine.y[lane][i * ITEM / 4];
        y[i] = ITEM == 2 && i % 2 == 1 ? high(v) : low(v);
      }
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      if (SUM_Y && HAS_D) y[i] = fmaf(skip, u[i], y[i]);
      if (HAS_Z) y[i] *= gate[i];                                              // now dz
      ga[i] = fmaf(u[i], gb[i], ga[i] * (DTYPE == 0 ? 1.f : LN2)) * slope[i];  // now ddelta
      gb[i] *= dt[i] * (DTYPE == 0 ? LN2 : 1.f);                               // now du
      if (HAS_D) gb[i] = fmaf(skip, dy[i], gb[i]), total.x = fmaf(dy[i], u[i], total.x);
      if (HAS_BIAS) total.y += ga[i];  // slope is 0 where nothing exists
    }
    so_far = total;
    if constexpr (DIM_LAYOUT) {
      if (!owns) return;
      put_result(0, gb), put_result(1, ga);
      if (HAS_Z) put_result(2, y);
    } else {
      write_own(out_at, gb, out_count);
      write_own(out_at + to_ddelta, ga, out_count);
      if (HAS_Z) write_own(out_at + to_dz, y, out_count);
    }
  };

  // ---- the walk
  int ahead_tile = tiles - 1 - warp, ahead_c = 0;  // the item to be copied next
  // Where the lane's pieces of the item to be copied next lie, of inputs and of kept states; what leads over to the next
  // group's and back to the next tile's first; and which of them exist: of tiles and groups, those below a limit.
  const char* ahead_from[KEPT_ROUNDS ? KEPT_ROUNDS : 1];
  const i64 ahead_slot = w.states + w.begin / CHECKPOINT + ahead_tile;
  const char* ahead_kept = (const char*)(p.states + (ahead_slot * p.dim + ch.first) * STATE) + lane * KEPT_COPY;
  i64 over[KEPT_ROUNDS ? KEPT_ROUNDS : 1], back[KEPT_ROUNDS ? KEPT_ROUNDS : 1];
  int tiles_below[KEPT_ROUNDS ? KEPT_ROUNDS : 1], groups_below[KEPT_ROUNDS ? KEPT_ROUNDS : 1], kept_below[KEPT_STEPS];
  i64 kept_back = -(WARPS * p.dim + (groups - 1) * PER_WARP) * STATE * 4;
  if (ROOMY) keep(kept_back);
  auto groups_with = [&](int c) { return (count - c + PER_WARP - 1) / PER_WARP; };  // channel c of theirs
#pragma unroll
  for (int r = 0; r < KEPT_ROUNDS; r++) {
    const int i = lane + r * 32 < COPIES ? lane + r * 32 : 0;
    const int part = i / (LINES * PIECES), line = i / PIECES % LINES, piece = i % PIECES, within_line = piece * COPY / ITEM;
    const char* const from = address(part, 0, line, ahead_tile * T);
    ahead_from[r] = from + piece * COPY;
    over[r] = address(part, PER_WARP, line, ahead_tile * T) - from;
    back[r] = address(part, 0, line, (ahead_tile - WARPS) * T) - from - (groups - 1) * over[r];
    tiles_below[r] = lane + r * 32 < COPIES ? (steps - (DIM_LAYOUT ? line : within_line) + T - 1) / T : 0;
    groups_below[r] = groups_with(DIM_LAYOUT ? within_line : line);
    if (ROOMY) keep(over[r]), keep(back[r]), keep(tiles_below[r]), keep(groups_below[r]);
  }
#pragma unroll
  for (int r = 0; r < KEPT_STEPS; r++) {
    const int i = lane + r * 32;
    kept_below[r] = groups_with(i / KEPT_PIECES);
    if (ROOMY) keep(kept_below[r]);
  }
  // where in the first slot of the ring this lane's pieces go, and its steps and states lie
  unsigned char* const copy_to = pinned(mine.ring[0] + lane * COPY);
  unsigned char* const keep_to = pinned(mine.ring[0] + KEPT_AT + lane * KEPT_COPY);
  const unsigned char* const own_raw = pinned(DIM_LAYOUT ? mine.batches[0] + line_at(step, LINE_BYTES) + channel * ITEM
                                                         : mine.ring[0] + channel * LINE_BYTES + step * ITEM);
  const unsigned char* const own_kept = pinned(mine.ring[0] + KEPT_AT + (channel * STATES + apart_at(s, PER)) * 4);
  constexpr int BATCH_BYTES = DIM_LAYOUT ? PARTS * PART_BYTES : 0;
  int batch_at = 0;  // where that of the item at hand begins
  auto batch_after = [&](int at) { return at == (BATCHES - 1) * BATCH_BYTES ? 0 : at + BATCH_BYTES; };
  auto fetch_batch = [&](int at, Batch b) {
    if (b.t0 < 0) return;
    unsigned char* const to = mine.batches[0] + at;
    if constexpr (BY_PIECES) {
      const int left = steps - b.t0, live = (count - b.c * PER_WARP) * ITEM;
      i64 from[PARTS];
#pragma unroll
      for (int part = 0; part < PARTS; part++) from[part] = mine.at[part][lane];
#pragma unroll
      for (int r = 0; r < ROUNDS; r++) {
        const int i = lane + r * 32, line = i / PIECES, piece = i % PIECES;
        if (COPIES % 32 != 0 && i >= COPIES) continue;
#pragma unroll
        for (int part = 0; part < PARTS; part++)
          copy_async_or_zero<COPY>(line < left && piece * COPY < live, to + part * PART_BYTES + line_at(line, LINE_BYTES) + piece * COPY,
                                   (const char*)from[part] + (r > 0 ? r * (32 / PIECES) * shared.step_bytes[part] : 0));
      }
#pragma unroll
      for (int part = 0; part < PARTS; part++) mine.at[part][lane] = from[part] + LINE * ITEM;
      turn_back(0, PARTS, b);
    } else {
#pragma unroll 1
      for (int part = 0; part < PARTS; part++) fetch_parts(to, b.t0, b.c, part);
    }
  };
  if constexpr (DIM_LAYOUT && BY_PIECES) {
#pragma unroll
    for (int part = 0; part < PARTS; part++)
      mine.at[part][lane] = (i64)(address(part, 0, lane / PIECES % LINES, last_t0) + lane % PIECES * COPY);
    mine.at[PARTS][lane] = (i64)p.du + (batch() * p.grad_batch + ch.first + (w.first + w.begin + last_t0 + lane / OUT_PIECES) *
                                        p.grad_step) * ITEM + lane % OUT_PIECES * 16;
  }
  // Once the first item of a batch has finished the last of the one before, that one leaves and the one after the next is
  // copied: with the second item of each batch or, of one item, with what follows it, the next tile's first.
  int pass_c = 1;  // group of the item at hand, when that is next
  Batch leaving = before({last_t0, 0}), copied = after(after({last_t0, 0}));
  auto pass_batches = [&](int t0, int c) {
    if (!ROOMY) {  // no registers held them meanwhile
      const Batch first = {c > 0 ? t0 : t0 + WARPS * T, c > 0 ? c - 1 : groups - 1};
      leaving = before(first), copied = after(after(first));
    }
    flush(leaving), leaving = after(leaving);
    fetch_batch(batch_after(c > 0 ? batch_after(batch_at) : batch_at), copied), copied = after(copied);
    pass_c = (c > 0 ? c : groups) + BATCH;
    pass_c = pass_c > groups ? 1 : pass_c == groups ? 0 : pass_c;
    __syncwarp();  // what has left may be overwritten
  };
  auto fetch_next = [&](int slot) {  // slot: where it begins in the ring
    if constexpr (KEPT_ROUNDS == 0 && !DIM_LAYOUT) {
      if (ahead_tile >= 0) fetch_item(mine.ring[0] + slot, ahead_tile, ahead_c);
    } else {
#pragma unroll
      for (int r = 0; r < KEPT_ROUNDS; r++)
        if (COPIES % 32 == 0 || lane + r * 32 < COPIES)
          copy_async_or_zero<COPY>((unsigned)ahead_tile < (unsigned)tiles_below[r] && ahead_c < groups_below[r],
                                   copy_to + slot + r * 32 * COPY, ahead_from[r]);
#pragma unroll(KEPT_UNROLLED)
      for (int r = 0; r < KEPT_STEPS; r++) {
        const int i = lane + r * 32, line = i / KEPT_PIECES;
        unsigned char* const place = mine.ring[0] + slot + KEPT_AT + (line * STATES + state_at(i % KEPT_PIECES * (KEPT_COPY / 4))) * 4;
        if (PER_WARP * KEPT_PIECES % 32 == 0 || i < PER_WARP * KEPT_PIECES)
          copy_async_or_zero<KEPT_COPY>((unsigned)ahead_tile < (unsigned)tiles && ahead_c < kept_below[KEPT_STEPS > 2 ? 0 : r],
                                        STATES == STATE && PER <= 4 ? keep_to + slot + r * 32 * KEPT_COPY : place,
                                        ahead_kept + r * 32 * KEPT_COPY);
      }
    }
    copies_commit();
    const bool wrap = ++ahead_c == groups;
#pragma unroll
    for (int r = 0; r < KEPT_ROUNDS; r++) ahead_from[r] += wrap ? back[r] : over[r];
    ahead_kept += wrap ? kept_back : PER_WARP * STATE * 4;
    ahead_c = wrap ? 0 : ahead_c, ahead_tile -= wrap ? WARPS : 0;
  };
  // the item at hand: its slot of the ring and the one before, its elements and those of the item before or after
  constexpr int HALF = ROWS * PER_WARP * T;
  int slot = 0, last_slot = (RING - 1) * SLOT_BYTES;
  int half = 0;
  float* const own_elements = (float*)pinned(&mine.elements[0][0][channel][step]);
  const float* const own_rows = (const float*)pinned(&mine.elements[0][0][channel][0]);

  if (lane == 0) shared.last_t0[warp] = last_t0;
  if (last_t0 >= 0) {
    fetch_bc(last_t0);
    if constexpr (DIM_LAYOUT) {
#pragma unroll 1
      for (int i = 0; i < BATCHES - 1; i++) fetch_batch(i * BATCH_BYTES, i == 0 ? Batch{last_t0, 0} : after(Batch{last_t0, 0}));
    }
#pragma unroll 1
    for (int i = 0; i < RING - 1; i++) fetch_next(i * SLOT_BYTES);
    copies_wait<RING - 2>();
    __syncwarp();
    Elements e;
    stage_begin(e, own_raw, shared.groups[groups - 1].near[channel].x, last_t0, 0), stage_end(e);
    stage_tail(e, steps - last_t0 - step);
    put(own_elements, e);
    for (int i = lane; i < HALF; i += 32) (&mine.elements[1][0][0][0])[i] = 0.f;  // finished first, to be overwritten
  }
  int round = warp > 0 ? 0 : 1;  // parity of the turns that this warp has had of each group; nobody comes before its first
#pragma unroll 1
  for (int t0 = last_t0; t0 >= 0; t0 -= WARPS * T, round ^= 1) {
    copies_wait<0>();
    store_bc(t0);
    __syncwarp();
    if (t0 >= WARPS * T) fetch_bc(t0 - WARPS * T);
    int left = steps - t0 - own_step(lane_now());
    if (ROOMY) keep(left);

    float sum_B[PER][T], sum_C[PER][T];  // dB and dC
#pragma unroll
    for (int k = 0; k < PER; k++)
#pragma unroll
      for (int t = 0; t < T; t++) sum_B[k][t] = sum_C[k][t] = 0.f;

    char* out_next = first_out(t0);

    Group* group = shared.groups + (GROUPS == 1 ? here() : 0);  // or all of a single group is kept in registers
    BackwardTurn *own_turn = shared.turns[warp], *next_turn = shared.turns[warp + 1 < WARPS ? warp + 1 : 0];
    // a group's, of which these are the first's where no registers are left for pointers that run along
    auto turn_of = [](BackwardTurn* turn, int c) { return PER > 2 ? turn + c : turn; };
#pragma unroll 1
    for (int c = 0; c < groups; c++, group++, own_turn += PER <= 2, next_turn += PER <= 2) {
      copies_wait<KEEP_Y ? 0 : RING - 3>();
      if (DIM_LAYOUT && BATCH == 2 && groups % 2 != 0) copies_wait<0>();  // batches follow each other so soon
      __syncwarp();
      if (DIM_LAYOUT && !LATE && c == pass_c) pass_batches(t0, c);
      fetch_next(last_slot);
      const float* const rows = own_rows + half;
      float* const others = own_elements + (HALF - half);
      const float* const kept = (const float*)(own_kept + slot);
      last_slot = slot;
      slot = slot == (RING - 1) * SLOT_BYTES ? 0 : slot + SLOT_BYTES;
      float A[PER], h[PER], b_fixed[PER], c_fixed[PER];
      get<128>(A, group->A + apart_at(lane, PER)), get<4 * LANES>(h, kept);
      const float2 near = group->near[channel];
      if constexpr (CONST_B) get(b_fixed, group->fixed_B[0][lane]);
      if constexpr (CONST_C) get(c_fixed, group->fixed_C[0][lane]);

      // ---- forward, a quad of steps at a time, each with a part of the other work: the special-function unit, which
      // takes eight times as long as the others, is then busy throughout
      float decay[PER][T], before[PER][T], dt[2][4], x[2][4], b[2][PER][4];  // of two quads
      auto load_quad = [&](int q) {
        get(dt[q % 2], rows + ROW_DT * PER_WARP * T + q * 4), get(x[q % 2], rows + ROW_X * PER_WARP * T + q * 4);
#pragma unroll
        for (int k = 0; k < PER; k++) {
          if constexpr (CONST_B) b[q % 2][k][0] = b[q % 2][k][1] = b[q % 2][k][2] = b[q % 2][k][3] = b_fixed[k];
          else four(b[q % 2][k], mine.B, k, q * 4);
        }
      };
      Elements next;
      if (LOAD_AHEAD) load_quad(0);
      auto take_turn = [&]() {
        if (WARPS > 1) turn_of(own_turn, c)->wait(round);
      };
      auto finish_last = [&]() { finish(others, near.y, group->last_sums[lane]); };
      auto next_out = [&]() {
        out_at = out_next, out_next += out_over;
        out_count = c < own_groups ? left : 0;
        if (KEEP_Y) fetch_y(out_at, out_count), copies_commit();
      };
      if (DIM_LAYOUT && LATE && c == pass_c) pass_batches(t0, c), copies_commit();  // behind loads that need none of it
      if (!LATE) take_turn();  // likewise
#pragma unroll
      for (int q = 0; q < QUADS; q++) {
        if (!LOAD_AHEAD) load_quad(q);
        else if (q + 1 < QUADS) load_quad(q + 1);
        if (!LATE && q == 0) finish_last();
        if (q == QUADS / 2) {
          if (!LATE) next_out();
          const int next_c = c + 1 == groups ? 0 : c + 1;
          if (DIM_LAYOUT && next_c % BATCH == 0) batch_at = batch_after(batch_at);
          stage_begin(next, own_raw + (DIM_LAYOUT ? batch_at + next_c % BATCH * (PER_WARP * ITEM) : slot), near.x,
                      c + 1 == groups ? t0 - WARPS * T : t0, next_c);
        }
        if (q == QUADS * 3 / 4) {
          stage_end(next);
          stage_tail(next, c + 1 == groups ? STEPS : left);  // a further tile has all its steps
        }
#pragma unroll
        for (int k = 0; k < PER; k++)
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const int t = q * 4 + j;
            before[k][t] = h[k];
            decay[k][t] = decay_of(dt[q % 2][j], A[k]);
            h[k] = fmaf(decay[k][t], h[k], x[q % 2][j] * b[q % 2][k][j]);
          }
        if (!ROOMY && q + 1 < QUADS) __syncwarp();  // what is loaded for the next quad stays behind it: fewer registers
      }
      if (LATE) take_turn(), finish_last(), next_out();
      if (LANES > T) __syncwarp();  // a lane without steps of its own has read what is now overwritten
      put(others, next);
      __syncwarp();
      if (DIM_LAYOUT)
        // from here on, of the item at hand, which the next one finishes
        put_at = line_at(step, OUT_BYTES) + (c % BATCH * PER_WARP + channel) * ITEM;

      // ---- backward
      float carried[2 * PER], g[PER], dA[PER], dB_fixed[PER], dC_fixed[PER];
      get<128>(carried, group->carried + apart_at(lane, 2 * PER));
#pragma unroll
      for (int k = 0; k < PER; k++) g[k] = carried[k], dA[k] = dB_fixed[k] = dC_fixed[k] = 0.f;
#pragma unroll
      for (int t4 = T - 4; t4 >= 0; t4 -= 4) {
        const int q = t4 / 4;
        float dy[4], cc[PER][4], gb[4], ga[4], y[4];
        if (q < QUADS - 1) load_quad(q);  // the last is still there
        get(dy, rows + ROW_DY * PER_WARP * T + t4);
#pragma unroll
        for (int k = 0; k < PER; k++) {
          if constexpr (CONST_C) cc[k][0] = cc[k][1] = cc[k][2] = cc[k][3] = c_fixed[k];
          else four(cc[k], mine.C, k, t4);
        }
#pragma unroll
        for (int j = 3; j >= 0; j--) {
          const int t = t4 + j;
#pragma unroll
          for (int k = 0; k < PER; k++) {
            if (SUM_Y) y[j] = k == 0 ? cc[0][j] * h[0] : fmaf(cc[k][j], h[k], y[j]);
            if constexpr (CONST_C) dC_fixed[k] = fmaf(dy[j], h[k], dC_fixed[k]);
            else sum_C[k][t] = fmaf(dy[j], h[k], sum_C[k][t]);
            h[k] = before[k][t];
            const float adjoint = fmaf(cc[k][j], dy[j], g[k]);
            gb[j] = k == 0 ? adjoint * b[q % 2][0][j] : fmaf(adjoint, b[q % 2][k][j], gb[j]);
            if constexpr (CONST_B) dB_fixed[k] = fmaf(adjoint, x[q % 2][j], dB_fixed[k]);
            else sum_B[k][t] = fmaf(adjoint, x[q % 2][j], sum_B[k][t]);
            g[k] = decay[k][t] * adjoint;
            const float through = g[k] * h[k];
            ga[j] = k == 0 ? A[0] * through : fmaf(A[k], through, ga[j]);
            dA[k] = fmaf(dt[q % 2][j], through, dA[k]);
          }
        }
        sums.gb.add(q, gb, lane), sums.ga.add(q, ga, lane);
        if (SUM_Y) sums.y.add(q, y, lane);
        if (!ROOMY && (t4 > 0 || PER > 2)) __syncwarp();
      }
      if (PER > 2) get<128>(carried, group->carried + apart_at(lane, 2 * PER));  // no registers held the sums meanwhile
#pragma unroll
      for (int k = 0; k < PER; k++) carried[k] = g[k], carried[PER + k] += dA[k];  // a tile at a time: long sums lose less
      set<128>(group->carried + apart_at(lane, 2 * PER), carried);
      if constexpr (CONST_B) {
        float* const at = group->fixed_B[1][lane];
#pragma unroll
        for (int k = 0; k < PER; k++) at[k] += dB_fixed[k];
      }
      if constexpr (CONST_C) {
        float* const at = group->fixed_C[1][lane];
#pragma unroll
        for (int k = 0; k < PER; k++) at[k] += dC_fixed[k];
      }
      half = HALF - half;
      if (WARPS > 1) turn_of(next_turn, c)->pass();
    }

    // ---- dB and dC of the tile: summed over the warp's channels, then to device memory
    auto leave = [&](float (&sum)[PER][T], float* to, float scale) {
#pragma unroll
      for (int k = 0; k < PER; k++) {
        sum_channels(sum[k], lane);
        const int count = s * PER + k < STATE && channel % ALIKE == 0 ? steps - t0 - own_share(channel) : 0;
        float* const at = to + k * p.row_length + (u32)t0;
#pragma unroll
        for (int i = 0; i < SHARE; i += 4) {
          float v[4];
#pragma unroll
          for (int j = 0; j < 4; j++) v[j] = i + j < SHARE ? sum[k][i + j < SHARE ? i + j : 0] * scale : 0.f;
          deposit(at + i, make_float4(v[0], v[1], v[2], v[3]), count - i < SHARE - i ? count - i : SHARE - i);
        }
      }
    };
    const i64 at_sums = mine.sums[lane_now()];
    if constexpr (!CONST_B) leave(sum_B, p.dB + at_sums, DTYPE == 0 ? 1.f : LN2);
    if constexpr (!CONST_C) leave(sum_C, p.dC + at_sums, 1.f);
    __syncwarp();  // nobody needs B and C any more
  }

  // ---- the last item, in a turn of the first group's, so that sums have an order
  copies_wait<0>();
  if (WARPS > 1) shared.turns[warp][0].wait(round);
  __syncwarp();
  if (again(shared.last_t0[warp]) >= 0) {
    const Batch last = {again(shared.last_t0[warp]) % (WARPS * T), (groups - 1) / BATCH * BATCH};
    if (DIM_LAYOUT && pass_c == 0) flush(before(last)), __syncwarp();
    const int lane = lane_here(), channel = channel_of_lane(lane);
    finish(&mine.elements[0][0][channel][own_step(lane)] + (HALF - half), shared.groups[0].near[channel].y, shared.groups[0].last_sums[lane]);
    if constexpr (DIM_LAYOUT) {
      __syncwarp();
      flush(last);
    }
  }
  if (WARPS > 1) {
    shared.turns[warp + 1 < WARPS ? warp + 1 : 0][0].pass();
  }
  __syncthreads();

  // ---- what is summed over the whole span
  const i64 part = PARTIALS ? task.slot * p.dim : 0;
#pragma unroll 1
  for (int c = warp; c < groups; c += WARPS) {
    const int lane = lane_here(), s = slice_of(lane), channel = channel_of_lane(lane);
    const int d = ch.first + c * PER_WARP + channel;
    float2 total = s * STEPS < T ? shared.groups[c + 1 < groups ? c + 1 : 0].last_sums[lane] : make_float2(0.f, 0.f);
#pragma unroll
    for (int m = 1; m < LANES; m <<= 1) {
      total.x += __shfl_xor_sync(0xffffffffu, total.x, m * SLICE_BIT);
      total.y += __shfl_xor_sync(0xffffffffu, total.y, m * SLICE_BIT);
    }
    if (d >= ch.first + count) continue;
    float carried[2 * PER];
    get<128>(carried, shared.groups[c].carried + apart_at(lane, 2 * PER));
    if (HAS_D && s == 0) deposit(p.dD + part + d, total.x);
    if (HAS_BIAS && s == 0) deposit(p.ddelta_bias + part + d, total.y);
#pragma unroll
    for (int k = 0; k < PER; k++) {
      const int n = s * PER + k;
      if (n >= STATE) break;
      const i64 at = (i64)d * STATE + n;
      deposit(p.dA + part * STATE + at, LN2 * carried[PER + k]);  // dt in the sum was Δ log2(e)
      if constexpr (CONST_B) deposit(p.dB + part * STATE + at, shared.groups[c].fixed_B[1][lane][k] * (DTYPE == 0 ? 1.f : LN2));
      if constexpr (CONST_C) deposit(p.dC + part * STATE + at, shared.groups[c].fixed_C[1][lane][k]);
      if (w.split == 0 && p.dinitial_state) p.dinitial_state[(i64)w.row * p.dim * STATE + at] = carried[k];
    }
  }
}
