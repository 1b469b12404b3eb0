// Gradients of the selective scan: the state is recomputed from the states the forward kept, never stored.
//
// A block owns CHANNELS channels over one span of a row and walks it backwards in tiles of TILE steps. For each tile:
//   elementwise   each thread, for its own elements: finishes the tile just swept (du, ddelta, dz from the sums that
//                 the sweep left in the shared tiles) and stages the next one: Δ log2(e), Δu and dy = dout silu(z) into
//                 the shared tiles dt, x, dy. Inputs come through cp.async, two tiles deep, in slots of the thread's own.
//   sweep         each warp walks its GROUPS channel groups. A lane holds PER states of one channel: forward through
//                 the tile from the state that enters it, keeping h and exp(ΔA) of all steps in registers; then backward:
//                     G = C dy + g;  dB += G Δu;  dC += dy h;  g = exp(ΔA) G;  dA += Δ g h'        (h' entering state)
//                 and Σ G B, Σ A g h', Σ C h over the states, which shuffles spread over the lanes of a channel and
//                 which take the places of dt, x, dy in the tiles.
//   flush         dB and dC of the tile, so far summed in registers over a warp's channel groups, are summed over its
//                 lanes by shuffles, over the warps in shared memory, and only then reach device memory.
// Where states are kept less often than every TILE steps (SUBTILES > 1), the states that enter the tiles of a kept
// span are recomputed first, into shared memory.
//
// Time is split over blocks in one of two ways. CHAIN 0: the adjoint that enters each span comes from the scan's
// MODE 2 and `combine`. CHAIN 1: persistent blocks take (span, row, block) tickets, last span first, and each waits
// for the adjoint that the following span's block leaves: no extra pass, but only rows x blocks run at a time.
// PARTIALS 1: every block writes its own dB, dC, dA, dD, ddelta_bias, which the host sums in a fixed order
// (bitwise repeatable); 0: they are added atomically.
//
// Costs per (state, step) of a lane: 12 FMUL/FFMA, 1 MUFU, 1.25 shared loads of 16 bytes, and for the three sums over
// the states 3 (LANES-1)/(PER LANES) * (1 SHFL, 1 FADD, 2 SEL); in all 21.4 instructions at LANES = 8, PER = 2. Float32
// data take 8 more for their decays. Registers: 4 PER TILE for h, decays, dB and dC, and about 100.

constexpr int G = TILE < 8 ? TILE : LANES < 8 ? 4 : 8;  // steps whose sums over the states are reduced together
static_assert(TILE % G == 0, "invalid configuration");
constexpr int TILE_FLOATS = CHANNELS * TILE, BC_FLOATS = STATES * PITCH, STATE_FLOATS = CHANNELS * STATES;
constexpr int ENTER_TILES = SUBTILES == 1 ? 2 : SUBTILES;
constexpr int VALUES = PER * TILE;  // of dB (and of dC) that a lane accumulates
constexpr int TENSORS = HAS_Z ? 4 : 3;
constexpr int RAW_WORDS = TENSORS * WORDS * THREADS;
constexpr bool ASYNC = ALIGNED && OWN * ITEM >= 4 && (!DIM_LAYOUT || ITEM == 4 || OWN_C == 2);
constexpr int PIECE = DIM_LAYOUT ? 1 : WORDS % 4 == 0 ? 4 : WORDS % 2 == 0 ? 2 : 1;  // words moved at once

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// Copy `bytes` of WIDTH bytes, zeros for the rest.
template <int WIDTH>
DEVICE void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(WIDTH), "r"(bytes) : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

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

// Sum v over the warp's channels (lane bits from LANES up), spreading the values: lane group q = lane / LANES is left
// with values q * LEFT .. in v[0 .. LEFT-1].
constexpr int LEFT = VALUES >= PER_WARP ? VALUES / PER_WARP : 1;
static_assert(VALUES >= PER_WARP ? VALUES % PER_WARP == 0 : PER_WARP % VALUES == 0, "invalid configuration");
DEVICE void reduce_channels(float (&v)[VALUES], int lane) { spread_sum<16, LANES>(v, lane); }

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_backward(const Params p) {
  extern __shared__ __align__(16) float shared[];
  float* const dt_tile = shared;                           // dt = Δ log2(e), then Σ G B
  float* const x_tile = dt_tile + TILE_FLOATS;             // Δu, then Σ A g h'
  float* const dy_tile = x_tile + TILE_FLOATS;             // dy, then Σ C h
  float* const bc_tile = dy_tile + TILE_FLOATS;            // [2][B, C]
  float* const enter = bc_tile + 4 * BC_FLOATS;            // [ENTER_TILES][channel][state]
  float* const carry = enter + ENTER_TILES * STATE_FLOATS; // g between tiles
  float* const sum_A = carry + STATE_FLOATS;
  float* const rate = sum_A + STATE_FLOATS;
  float* const sum_B = rate + STATE_FLOATS;                             // constant B only
  float* const sum_C = sum_B + (CONST_B ? STATE_FLOATS : 0);           // constant C only
  float* const flush = sum_C + (CONST_C ? STATE_FLOATS : 0);           // [warp][B, C][state][step]
  u32* const raw = (u32*)(flush + WARPS * 2 * STATES * TILE);          // [2][tensor][word][thread]

  const int tid = (int)threadIdx.x, lane = tid & 31, warp = tid >> 5, s = lane % LANES;
#if CHAIN
  __shared__ int ticket;
  for (;;) {
    __syncthreads();
    if (tid == 0) ticket = atomicAdd((int*)p.tickets, 1);
    __syncthreads();
    const i64 pairs = p.rows * p.blocks, item = ticket;
    if (item >= pairs * p.splits) return;
    const i64 order = item / pairs, pair = item - order * pairs;
    const int block = (int)(pair % p.blocks);
    const i64 slot = pair / p.blocks * p.splits + (p.splits - 1 - order);
    int* const ready = (int*)p.tickets + 1 + slot * p.blocks + block;  // set once this slot's adjoint is in span_end
    if (order > 0) {
      if (tid == 0) {
        int seen;
        do {
          asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(ready) : "memory");
          if (!seen) __nanosleep(100);
        } while (!seen);
      }
      __syncthreads();
    }
#else
  {
    const i64 slot = blockIdx.x / p.blocks;
    const int block = (int)(blockIdx.x - slot * p.blocks);
#endif
    Span w;
    if (!locate(p, slot, w)) return;
    const Channels ch = channels(p, block);
    const int batch = PACKED ? 0 : w.row;
    auto per_channel = [&](const float* values, Own o, int c) {
      return o.channel + c < ch.count ? __ldg(values + own_channel(ch, o) + c) : 0.f;
    };
    float sum_D[OWN_C], sum_bias[OWN_C];
#pragma unroll
    for (int c = 0; c < OWN_C; c++) sum_D[c] = sum_bias[c] = 0.f;
    auto extent = [&](Own o, int t0) { return extent_of(o, ch.count, w.end - t0); };

    // per channel and state: A, the adjoint that enters from the right, the sum for dA
    for (int i = tid; i < STATE_FLOATS; i += THREADS) {
      int c = i / STATES, n = i - c * STATES;
      bool real = c < ch.count && n < STATE;
      i64 at = (i64)(ch.first + c) * STATE + n;
      float g = 0.f;
      if (real) {
        if (p.splits > 1 && (!CHAIN || w.end < w.length)) g = __ldcg(p.span_end + slot * p.dim * STATE + at);
        else if (p.last_state) g = p.last_state[(i64)w.row * p.dim * STATE + at];
      }
      rate[i] = real ? p.A[at] : 0.f;
      carry[i] = g;
      sum_A[i] = 0.f;
      if (CONST_B) sum_B[i] = 0.f;
      if (CONST_C) sum_C[i] = 0.f;
    }

    // ---- moving a tile's inputs into this thread's slots, and reading them back
    auto slot_of = [&](int stage, int tensor, int word) {
      return raw + stage * RAW_WORDS + ((tensor * WORDS + word / PIECE * PIECE) * THREADS + tid * PIECE) + word % PIECE;
    };
    auto fetch_one = [&](int stage, int tensor, const scalar* q, i64 step_stride, Extent n) {
#pragma unroll
      for (int i = 0; i < WORDS; i += PIECE) {
        u32* to = slot_of(stage, tensor, i);
        if constexpr (ASYNC) {
          constexpr int WIDTH = PIECE * 4;
          int bytes = DIM_LAYOUT ? (i < n.t ? n.c * ITEM : 0) : n.c > 0 ? n.t * ITEM - i * 4 : 0;
          bytes = bytes < 0 ? 0 : bytes > WIDTH ? WIDTH : bytes;
          copy_async<WIDTH>(to, bytes ? (const void*)(q + (DIM_LAYOUT ? i * step_stride : i * 4 / ITEM)) : (const void*)p.u, bytes);
        } else {
#pragma unroll
          for (int j = 0; j < PIECE; j++) to[j] = word_of(q, step_stride, i + j, n);
        }
      }
    };
    auto fetch = [&](int stage, int tile) {
      int t0 = w.begin + tile * TILE;
      const Own o = own();
      const Extent n = extent(o, t0);
      fetch_one(stage, 0, OWN_AT(u, t0), p.u_step, n);
      fetch_one(stage, 1, OWN_AT(delta, t0), p.delta_step, n);
      fetch_one(stage, 2, OWN_AT(dout, t0), p.dout_step, n);
      if (HAS_Z) fetch_one(stage, TENSORS - 1, OWN_AT(z, t0), p.z_step, n);
    };
    auto read = [&](Raw& r, int stage, int tensor) {
#pragma unroll
      for (int i = 0; i < WORDS; i += PIECE) {
        const u32* from = slot_of(stage, tensor, i);
        if constexpr (PIECE == 4) {
          uint4 v = *(const uint4*)from;
          r.w[i] = v.x, r.w[i + 1] = v.y, r.w[i + 2] = v.z, r.w[i + 3] = v.w;
        } else {
#pragma unroll
          for (int j = 0; j < PIECE; j++) r.w[i + j] = from[j];
        }
      }
    };
    // the kept state that enters a tile, for all channels of the block
    auto fetch_enter = [&](float* to, int t0) {
      const float* from = p.states + ((w.states + t0 / p.checkpoint) * p.dim + ch.first) * STATE;
      constexpr int V = STATE % 4 == 0 && STATE == STATES ? 4 : 1;
#pragma unroll 1
      for (int i = tid * V; i < STATE_FLOATS; i += THREADS * V) {
        int c = i / STATES, n = i - c * STATES;
        bool real = c < ch.count && n < STATE;
        copy_async<V * 4>(to + i, real ? (const void*)(from + c * STATE + n) : (const void*)p.states, real ? V * 4 : 0);
      }
    };
    auto stage_tile = [&](int stage, int tile) {
      const Own o = own();
      if (!o.any) return;
      const Extent n = extent(o, w.begin + tile * TILE);
      Raw ru, rd, ro, rz;
      read(ru, stage, 0), read(rd, stage, 1), read(ro, stage, 2);
      if (HAS_Z) read(rz, stage, TENSORS - 1);
#pragma unroll
      for (int c = 0; c < OWN_C; c++) {
        const float bias = HAS_BIAS ? per_channel(p.delta_bias, o, c) : 0.f;
        float step[OWN_T], x[OWN_T], dy[OWN_T];
#pragma unroll
        for (int t = 0; t < OWN_T; t++) {  // u, dout and z are zero where nothing exists
          step[t] = t < n.t ? step_size(rd.at(c, t) + bias) : 0.f;
          x[t] = step[t] * ru.at(c, t);
          dy[t] = ro.at(c, t);
          if (HAS_Z) {
            const float gate = rz.at(c, t);
            dy[t] *= gate * sigmoid(gate);
          }
          step[t] = to_log2(step[t]);
        }
        tile_write(dt_tile, o.channel + c, o.step, step);
        tile_write(x_tile, o.channel + c, o.step, x);
        tile_write(dy_tile, o.channel + c, o.step, dy);
      }
    };
    auto finish_tile = [&](int stage, int tile) {
      const Own o = own();
      if (!o.any) return;
      const int t0 = w.begin + tile * TILE;
      const Extent n = extent(o, t0);
      Raw ru, rd, ro, rz;
      read(ru, stage, 0), read(rd, stage, 1), read(ro, stage, 2);
      if (HAS_Z) read(rz, stage, TENSORS - 1);
      float du[OWN_C][OWN_T], ddelta[OWN_C][OWN_T], dz[OWN_C][OWN_T];
#pragma unroll
      for (int c = 0; c < OWN_C; c++) {
        const float bias = HAS_BIAS ? per_channel(p.delta_bias, o, c) : 0.f, skip = HAS_D ? per_channel(p.D, o, c) : 0.f;
        float gb[OWN_T], ga[OWN_T], y[OWN_T];
        tile_read(gb, dt_tile, o.channel + c, o.step);
        tile_read(ga, x_tile, o.channel + c, o.step);
        if (HAS_Z) tile_read(y, dy_tile, o.channel + c, o.step);
#pragma unroll
        for (int t = 0; t < OWN_T; t++) {
          float slope, step = step_size(rd.at(c, t) + bias, slope);
          float uu = ru.at(c, t), dy = ro.at(c, t);
          if (HAS_Z) {
            float gate = rz.at(c, t), sg = sigmoid(gate);
            if (HAS_D) y[t] = fmaf(skip, uu, y[t]);
            dz[c][t] = dy * y[t] * (sg * fmaf(gate, 1.f - sg, 1.f));
            dy *= gate * sg;
          }
          du[c][t] = step * gb[t];
          if (HAS_D) du[c][t] = fmaf(skip, dy, du[c][t]);
          ddelta[c][t] = fmaf(uu, gb[t], ga[t]) * slope;
          if (HAS_D) sum_D[c] = fmaf(dy, uu, sum_D[c]);
          if (HAS_BIAS) sum_bias[c] += t < n.t ? ddelta[c][t] : 0.f;
        }
      }
      Raw r;
      const i64 at = (batch + here()) * p.grad_batch + own_channel(ch, o) * p.grad_dim + (w.first + o.step + t0) * p.grad_step;
      put(r, du), store(r, (scalar*)p.du + at, p.grad_step, n);
      put(r, ddelta), store(r, (scalar*)p.ddelta + at, p.grad_step, n);
      if (HAS_Z) put(r, dz), store(r, (scalar*)p.dz + at, p.grad_step, n);
    };

    Projection<B_AXIS, B_ALIGNED> next_B;
    Projection<C_AXIS, C_ALIGNED> next_C;
    auto fetch_bc = [&](int tile) {
      int t0 = w.begin + tile * TILE, count = w.end - t0;
      if constexpr (!CONST_B) next_B.load(ROW_AT(B, t0), p.B_state, p.B_step, count);
      if constexpr (!CONST_C) next_C.load(ROW_AT(C, t0), p.C_state, p.C_step, count);
    };
    auto stage_bc = [&](int buffer, int tile) {
      if (!EARLY) fetch_bc(tile);
      if constexpr (!CONST_B) next_B.store(bc_tile + buffer * 2 * BC_FLOATS);
      if constexpr (!CONST_C) next_C.store(bc_tile + (buffer * 2 + 1) * BC_FLOATS);
    };
    // B or C of one state over four steps
    auto four = [&](float (&v)[4], const float* tile, float constant, bool is_constant, int s, int k, int t) {
      if (is_constant) {
        v[0] = v[1] = v[2] = v[3] = constant;
      } else {
        const float4 q = *(const float4*)(tile + (k * LANES + s) * PITCH + t);
        v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
      }
    };
    auto constant_of = [&](const void* M, bool is_constant, int channel, float (&v)[PER]) {
#pragma unroll
      for (int k = 0; k < PER; k++) {
        int n = s * PER + k;
        v[k] = is_constant && channel < ch.count && n < STATE ? ((const float*)M)[(i64)(ch.first + channel) * STATE + n] : 0.f;
      }
    };

    const int tiles = (w.end - w.begin + TILE - 1) / TILE;
    // the states that enter the tiles of a kept span up to its tile `last`, from the one kept
    auto enter_subtiles = [&](int last, int buffer) {
      const int top = last % SUBTILES, base = last - top;
      fetch_enter(enter, w.begin + base * TILE);
      copies_commit();
      copies_wait<0>();
#pragma unroll 1
      for (int r = 0; r < top; r++) {
        const int t0 = w.begin + (base + r) * TILE;
        const Own o = own();
        const Extent n = extent(o, t0);
        Raw ru, rd;
        load(ru, OWN_AT(u, t0), p.u_step, n);
        load(rd, OWN_AT(delta, t0), p.delta_step, n);
        __syncthreads();
#pragma unroll
        for (int c = 0; c < OWN_C; c++) {
          if (!o.any) continue;
          const float bias = HAS_BIAS ? per_channel(p.delta_bias, o, c) : 0.f;
          float step[OWN_T], x[OWN_T];
#pragma unroll
          for (int t = 0; t < OWN_T; t++) {
            step[t] = step_size(rd.at(c, t) + bias);
            x[t] = step[t] * ru.at(c, t);
            step[t] = to_log2(step[t]);
          }
          tile_write(dt_tile, o.channel + c, o.step, step);
          tile_write(x_tile, o.channel + c, o.step, x);
        }
        if constexpr (!CONST_B) {
          Projection<B_AXIS, B_ALIGNED> now_B;
          now_B.load(ROW_AT(B, t0), p.B_state, p.B_step, TILE);
          now_B.store(bc_tile + buffer * 2 * BC_FLOATS);
        }
        __syncthreads();
#pragma unroll 1
        for (int c = 0; c < GROUPS; c++) {
          const int channel = (c * WARPS + warp) * PER_WARP + lane / LANES, at = channel * STATES + s * PER;
          float b_const[PER], h[PER];
          constant_of(p.B, CONST_B, channel, b_const);
#pragma unroll
          for (int k = 0; k < PER; k++) h[k] = enter[r * STATE_FLOATS + at + k];
#pragma unroll
          for (int t4 = 0; t4 < TILE; t4 += 4) {
            const float4 dq = *(const float4*)(dt_tile + tile_at(channel, t4)), xq = *(const float4*)(x_tile + tile_at(channel, t4));
            const float dt[4] = {dq.x, dq.y, dq.z, dq.w}, x[4] = {xq.x, xq.y, xq.z, xq.w};
#pragma unroll
            for (int k = 0; k < PER; k++) {
              float b[4];
              four(b, bc_tile + buffer * 2 * BC_FLOATS, b_const[k], CONST_B, s, k, t4);
#pragma unroll
              for (int t = 0; t < 4; t++) h[k] = fmaf(decay_of(dt[t], rate[at + k]), h[k], x[t] * b[t]);
            }
          }
#pragma unroll
          for (int k = 0; k < PER; k++) enter[(r + 1) * STATE_FLOATS + at + k] = h[k];
        }
      }
      __syncthreads();
    };

    int buffer = 0, stage = 0;
    if (tiles > 0) {
      fetch(0, tiles - 1);
      if (SUBTILES == 1) fetch_enter(enter + ((tiles - 1) & 1) * STATE_FLOATS, w.begin + (tiles - 1) * TILE);
      copies_commit();
      if (tiles > 1) {
        fetch(1, tiles - 2);
        if (SUBTILES == 1) fetch_enter(enter + (tiles & 1) * STATE_FLOATS, w.begin + (tiles - 2) * TILE);
      }
      copies_commit();
      if (EARLY) fetch_bc(tiles - 1);
      __syncthreads();
      if (SUBTILES > 1) enter_subtiles(tiles - 1, 0);
      copies_wait<1>();
      stage_tile(0, tiles - 1);
      stage_bc(0, tiles - 1);
    }
#pragma unroll 1
    for (int tile = tiles - 1; tile >= 0; tile--, buffer ^= 1, stage ^= 1) {
      const int t0 = w.begin + tile * TILE;
      if (EARLY && tile > 0) fetch_bc(tile - 1);
      __syncthreads();

      // ---- sweep; what follows from the thread's index is computed anew in each tile, see here()
      const int thread = tid + here(), lane = thread & 31, warp = thread >> 5, s = lane % LANES;
      const int groups = (ch.count - warp * PER_WARP + WARPS * PER_WARP - 1) / (WARPS * PER_WARP);  // that exist
      float acc_B[VALUES], acc_C[VALUES];
#pragma unroll
      for (int i = 0; i < VALUES; i++) acc_B[i] = acc_C[i] = 0.f;
      const float* const b_tile = bc_tile + buffer * 2 * BC_FLOATS;
      const float* const c_tile = b_tile + BC_FLOATS;
      const float* const entering = enter + (SUBTILES == 1 ? tile & 1 : tile % SUBTILES) * STATE_FLOATS;
#pragma unroll 1
      for (int c = 0; c < groups; c++) {
        const int channel = (c * WARPS + warp) * PER_WARP + lane / LANES, at = channel * STATES + s * PER;
        float A[PER], h[PER], g[PER], dA[PER], b_const[PER], c_const[PER], dB_const[PER], dC_const[PER];
#pragma unroll
        for (int k = 0; k < PER; k++) A[k] = rate[at + k], h[k] = entering[at + k], g[k] = carry[at + k], dA[k] = 0.f;
        constant_of(p.B, CONST_B, channel, b_const);
        constant_of(p.C, CONST_C, channel, c_const);
#pragma unroll
        for (int k = 0; k < PER; k++) dB_const[k] = CONST_B ? sum_B[at + k] : 0.f, dC_const[k] = CONST_C ? sum_C[at + k] : 0.f;
        float before[PER][TILE], decay[PER][TILE];
#pragma unroll
        for (int t4 = 0; t4 < TILE; t4 += 4) {
          const float4 dq = *(const float4*)(dt_tile + tile_at(channel, t4)), xq = *(const float4*)(x_tile + tile_at(channel, t4));
          const float dt[4] = {dq.x, dq.y, dq.z, dq.w}, x[4] = {xq.x, xq.y, xq.z, xq.w};
#pragma unroll
          for (int k = 0; k < PER; k++) {
            float b[4];
            four(b, b_tile, b_const[k], CONST_B, s, k, t4);
#pragma unroll
            for (int t = 0; t < 4; t++) {
              before[k][t4 + t] = h[k];
              decay[k][t4 + t] = decay_of(dt[t], A[k]);
              h[k] = fmaf(decay[k][t4 + t], h[k], x[t] * b[t]);
            }
          }
        }
#pragma unroll
        for (int g0 = TILE - G; g0 >= 0; g0 -= G) {
          float gb[G], ga[G], y[G];
#pragma unroll
          for (int q = G - 4; q >= 0; q -= 4) {
            const int t4 = g0 + q;
            const float4 dq = *(const float4*)(dt_tile + tile_at(channel, t4)), xq = *(const float4*)(x_tile + tile_at(channel, t4)),
                         yq = *(const float4*)(dy_tile + tile_at(channel, t4));
            const float dt[4] = {dq.x, dq.y, dq.z, dq.w}, x[4] = {xq.x, xq.y, xq.z, xq.w}, dy[4] = {yq.x, yq.y, yq.z, yq.w};
#pragma unroll
            for (int t = 0; t < 4; t++) gb[q + t] = ga[q + t] = y[q + t] = 0.f;
#pragma unroll
            for (int k = 0; k < PER; k++) {
              float b[4], cc[4];
              four(b, b_tile, b_const[k], CONST_B, s, k, t4);
              four(cc, c_tile, c_const[k], CONST_C, s, k, t4);
#pragma unroll
              for (int t = 3; t >= 0; t--) {
                const int i = k * TILE + t4 + t;
                if (CONST_C) dC_const[k] = fmaf(dy[t], h[k], dC_const[k]);
                else acc_C[i] = fmaf(dy[t], h[k], acc_C[i]);
                if (HAS_Z) y[q + t] = fmaf(cc[t], h[k], y[q + t]);
                h[k] = before[k][t4 + t];
                const float adjoint = fmaf(cc[t], dy[t], g[k]);
                gb[q + t] = fmaf(adjoint, b[t], gb[q + t]);
                if (CONST_B) dB_const[k] = fmaf(adjoint, x[t], dB_const[k]);
                else acc_B[i] = fmaf(adjoint, x[t], acc_B[i]);
                g[k] = decay[k][t4 + t] * adjoint;
                const float through = g[k] * h[k];
                ga[q + t] = fmaf(A[k], through, ga[q + t]);
                dA[k] = fmaf(dt[t], through, dA[k]);
              }
            }
          }
          reduce_steps(gb, lane);
          reduce_steps(ga, lane);
          if (HAS_Z) reduce_steps(y, lane);
          __syncwarp();
          constexpr int MINE = LANES < G ? G / LANES : 1;
          const int first = g0 + first_step<G>(s);
#pragma unroll
          for (int t = 0; t < MINE; t++) {
            int to = tile_at(channel, first + t);
            dt_tile[to] = gb[t];
            x_tile[to] = ga[t];
            if (HAS_Z) dy_tile[to] = y[t];
          }
        }
#pragma unroll
        for (int k = 0; k < PER; k++) {
          carry[at + k] = g[k];
          sum_A[at + k] += dA[k];  // a tile at a time: long sums lose less
          if (CONST_B) sum_B[at + k] = dB_const[k];
          if (CONST_C) sum_C[at + k] = dC_const[k];
        }
      }

      // ---- flush dB, dC
      const int q0 = VALUES >= PER_WARP ? lane / LANES * LEFT : lane / LANES / (PER_WARP / (VALUES < PER_WARP ? VALUES : PER_WARP));
      auto flush_one = [&](float (&v)[VALUES], int which) {
        reduce_channels(v, lane);
#pragma unroll
        for (int i = 0; i < LEFT; i++) {
          int value = q0 + i;
          flush[((warp * 2 + which) * STATES + s * PER + value / TILE) * TILE + value % TILE] = v[i];
        }
      };
      if (!CONST_B) flush_one(acc_B, 0);
      if (!CONST_C) flush_one(acc_C, 1);
      __syncthreads();
      for (int i = tid; i < 2 * STATES * QUADS; i += THREADS) {
        const int which = i / (STATES * QUADS), n = i / QUADS % STATES, t = i % QUADS * 4;
        if ((which ? CONST_C : CONST_B) || n >= STATE) continue;
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int k = 0; k < WARPS; k++) {
          const float4 a = *(const float4*)(flush + ((k * 2 + which) * STATES + n) * TILE + t);
          v.x += a.x, v.y += a.y, v.z += a.z, v.w += a.w;
        }
        const i64 within = PARTIALS ? block % (p.blocks / p.groups) * p.bc_partial : 0;
        float* to = (which ? p.dC : p.dB) + within + (((i64)batch * p.groups + ch.group) * STATE + n) * p.length + w.first + t0 + t;
        deposit(to, v, w.end - t0 - t);
      }

      finish_tile(stage, tile);
      if (tile > 0) {
        if (SUBTILES > 1 && tile % SUBTILES == 0) enter_subtiles(tile - 1, buffer ^ 1);
        copies_wait<0>();
        stage_tile(stage ^ 1, tile - 1);
        stage_bc(buffer ^ 1, tile - 1);
        if (tile > 1) {
          fetch(stage, tile - 2);
          if (SUBTILES == 1) fetch_enter(enter + (tile & 1) * STATE_FLOATS, w.begin + (tile - 2) * TILE);
        }
        copies_commit();
      }
    }

    // ---- what is summed over the whole span
    __syncthreads();
    const i64 part = PARTIALS ? slot * p.dim : 0;
    for (int i = tid; i < STATE_FLOATS; i += THREADS) {
      int c = i / STATES, n = i - c * STATES;
      if (c >= ch.count || n >= STATE) continue;
      i64 at = (i64)(ch.first + c) * STATE + n;
      deposit(p.dA + part * STATE + at, LN2 * sum_A[i]);  // dt in the sum was Δ log2(e)
      if (CONST_B) deposit(p.dB + part * STATE + at, sum_B[i]);
      if (CONST_C) deposit(p.dC + part * STATE + at, sum_C[i]);
      if (w.split == 0) {
        if (p.dinitial_state) p.dinitial_state[(i64)w.row * p.dim * STATE + at] = carry[i];
      } else if (CHAIN) {
        __stcg(p.span_end + (slot - 1) * p.dim * STATE + at, carry[i]);
      }
    }
    if (HAS_D || HAS_BIAS) {
      constexpr int SHARERS = TILE / OWN_T;  // threads that share a channel
      const Own o = own();
      float* const sums = dt_tile;
#pragma unroll
      for (int c = 0; c < OWN_C; c++) {
        if (!o.any) continue;
        int at = (o.channel + c) * SHARERS + o.step / OWN_T;
        sums[at] = sum_D[c];
        sums[CHANNELS * SHARERS + at] = sum_bias[c];
      }
      __syncthreads();
      for (int c = tid; c < ch.count; c += THREADS) {
        float a = 0.f, b = 0.f;
#pragma unroll 1
        for (int k = 0; k < SHARERS; k++) a += sums[c * SHARERS + k], b += sums[(CHANNELS + c) * SHARERS + k];
        if (HAS_D) deposit(p.dD + part + ch.first + c, a);
        if (HAS_BIAS) deposit(p.ddelta_bias + part + ch.first + c, b);
      }
    }
#if CHAIN
    copies_wait<0>();
    if (w.split > 0) {
      __threadfence();
      __syncthreads();
      if (tid == 0) asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(ready - p.blocks), "r"(1) : "memory");
    }
#endif
  }
}
