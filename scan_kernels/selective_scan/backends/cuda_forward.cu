// Selective scan, forward in time and, for the adjoint, backward in time, without ever storing the state.
//
// One kernel, three uses (MODE): 0 the scan itself; 1 only the state that leaves a span that is entered with zero
// (span_end) and the span's sum of Δ log2(e) (span_time), so that `combine` can find every span's entering state when
// a row's time is split over blocks; 2 the same for the adjoint recurrence g <- exp(ΔA)(g + C dy), running backwards.
//
// A block owns CHANNELS channels over one span of a row and walks it in tiles of TILE steps:
//   device memory --registers--> softplus --> shared tiles dt = Δ log2(e), x = Δu [channel][step]  (each thread its own)
//   device memory --registers--> B, C --> shared tiles [state][step]                          (two buffers, for all)
//   main loop: h <- exp(ΔA) h + x B and y = Σ C h, PER states a lane; y is summed over the LANES lanes of a channel by
//   shuffles that leave each lane with its own steps, and takes the place of dt in the tile
//   shared y --> + D u, * silu(z) --> device memory, by the thread that loaded u and z
// The next tile's loads are in flight during the main loop. One block barrier a tile (two in the dim layout).
//
// Costs per (state, step) of a lane: 2 FMUL, 1 MUFU, 2 FFMA and half a shared load of 16 bytes (B, C); float32 data
// take 8 more for their decays. Per step and lane: half a shared load of 16 bytes (dt, x), and for the sum over the
// states (LANES-1)/LANES * (1 SHFL, 1 FADD, 2 SEL). In all 7.1 instructions a (state, step) at LANES = 4, PER = 4.

constexpr int G = LANES < 4 ? 4 : LANES > 16 ? 16 : LANES;  // steps whose y are reduced together
constexpr int UNROLL = PER * G <= 16 ? 2 : 1;  // of the loop over such steps
static_assert(GROUPS == 1 && TILE % 16 == 0, "invalid configuration");
constexpr bool USE_B = MODE != 2, USE_C = MODE != 1;
constexpr int TILE_FLOATS = CHANNELS * TILE, BC_FLOATS = STATES * PITCH;
constexpr int BC_TILES = (USE_B && !CONST_B) + (USE_C && !CONST_C);

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan(const Params p) {
  extern __shared__ __align__(16) float shared[];
  float* const dt_tile = shared;
  float* const x_tile = dt_tile + TILE_FLOATS;
  float* const bc_tile = x_tile + TILE_FLOATS;  // [2][B then C]

  const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, s = lane % LANES;
  const i64 slot = blockIdx.x / p.blocks;
  Span w;
  if (!locate(p, slot, w)) return;
  const Channels ch = channels(p, (int)(blockIdx.x - slot * p.blocks));
  const int channel = warp * PER_WARP + lane / LANES;  // of this lane, in the block
  const int d = ch.first + (channel < ch.count ? channel : 0);
  const bool exists = channel < ch.count;
  const int batch = PACKED ? 0 : w.row;

  // this lane's states
  float A[PER], h[PER], b_const[PER], c_const[PER], time = 0.f;
#pragma unroll
  for (int k = 0; k < PER; k++) {
    int n = s * PER + k;
    bool real = n < STATE && exists;
    i64 at = (i64)d * STATE + n;
    A[k] = real ? p.A[at] : 0.f;
    b_const[k] = CONST_B && USE_B && real ? ((const float*)p.B)[at] : 0.f;
    c_const[k] = CONST_C && USE_C && real ? ((const float*)p.C)[at] : 0.f;
    h[k] = 0.f;
    if (MODE == 0 && real) {
      if (p.splits > 1) h[k] = p.span_end[slot * p.dim * STATE + at];
      else if (p.initial_state) h[k] = p.initial_state[(i64)w.row * p.dim * STATE + at];
    }
  }

  // this thread's elements
  float bias[OWN_C], skip[OWN_C];
#pragma unroll
  for (int c = 0; c < OWN_C; c++) {
    const Own o = own();
    bool there = o.channel + c < ch.count;
    bias[c] = HAS_BIAS && there ? p.delta_bias[own_channel(ch, o) + c] : 0.f;
    skip[c] = HAS_D && MODE == 0 && there ? p.D[own_channel(ch, o) + c] : 0.f;
  }

  // MODE 2 multiplies by dy = dout silu(z) where the scan multiplies by Δu: u then stands for dout. The scan itself
  // needs z only after the main loop, which hides its latency: no need to fetch it a tile ahead.
  Raw next_u, next_delta, next_z;
  Projection<B_AXIS, B_ALIGNED> next_B;
  Projection<C_AXIS, C_ALIGNED> next_C;
  auto fetch = [&](int t0) {
    const Own o = own();
    const Extent n = extent_of(o, ch.count, w.end - t0);
    load(next_u, OWN_AT(u, t0), p.u_step, n);
    load(next_delta, OWN_AT(delta, t0), p.delta_step, n);
    if (HAS_Z && MODE == 2) load(next_z, OWN_AT(z, t0), p.z_step, n);
  };
  auto fetch_bc = [&](int t0) {
    if constexpr (USE_B && !CONST_B) next_B.load(ROW_AT(B, t0), p.B_state, p.B_step, w.end - t0);
    if constexpr (USE_C && !CONST_C) next_C.load(ROW_AT(C, t0), p.C_state, p.C_step, w.end - t0);
  };

  const int tiles = (w.end - w.begin + TILE - 1) / TILE;
  auto tile_start = [&](int i) { return w.begin + (MODE == 2 ? tiles - 1 - i : i) * TILE; };
  int buffer = 0;
  int next_state = w.begin;  // the step whose entering state is kept next
  float* kept = MODE == 0 && p.checkpoint ? p.states + ((w.states + w.begin / p.checkpoint) * p.dim + d) * STATE + s * PER : 0;
  if (tiles > 0) {
    fetch(tile_start(0));
    if (EARLY) fetch_bc(tile_start(0));
  }
#pragma unroll 1
  for (int i = 0; i < tiles; i++, buffer ^= 1) {
    const int t0 = tile_start(i);
    const Own o = own();
    const Extent n = extent_of(o, ch.count, w.end - t0);
    const Raw now_u = next_u;
    Raw now_z = next_z;
    // stage: Δ and Δu (or dy) of this thread's elements; what does not exist was loaded as zero
    if (o.any) {
#pragma unroll
      for (int c = 0; c < OWN_C; c++) {
        float step[OWN_T], x[OWN_T];
#pragma unroll
        for (int t = 0; t < OWN_T; t++) {
          step[t] = t < n.t ? step_size(next_delta.at(c, t) + bias[c]) : 0.f;
          x[t] = now_u.at(c, t);
          if (MODE != 2) {
            x[t] *= step[t];
          } else if (HAS_Z) {
            const float gate = now_z.at(c, t);
            x[t] *= gate * sigmoid(gate);
          }
          step[t] = to_log2(step[t]);
        }
        tile_write(dt_tile, o.channel + c, o.step, step);
        tile_write(x_tile, o.channel + c, o.step, x);
      }
    }
    float* const b_tile = bc_tile + buffer * BC_TILES * BC_FLOATS;
    float* const c_tile = b_tile + (USE_B && !CONST_B ? BC_FLOATS : 0);
    if (!EARLY) fetch_bc(t0);
    if constexpr (USE_B && !CONST_B) next_B.store(b_tile);
    if constexpr (USE_C && !CONST_C) next_C.store(c_tile);
    if (HAS_Z && MODE == 0) load(now_z, OWN_AT(z, t0), p.z_step, n);
    if (i + 1 < tiles) {
      fetch(tile_start(i + 1));
      if (EARLY) fetch_bc(tile_start(i + 1));
    }
    __syncthreads();

#pragma unroll 1
    for (int j = 0; j < TILE; j += 16) {
      const int start = MODE == 2 ? TILE - 16 - j : j;
      if (MODE == 0 && kept && t0 + start == next_state) {
        if (t0 + start < w.end && exists) {
          if constexpr (PER % 4 == 0 && STATE % 4 == 0) {
#pragma unroll
            for (int k = 0; k < PER; k += 4)
              if (s * PER + k < STATE) *(float4*)(kept + k) = make_float4(h[k], h[k + 1], h[k + 2], h[k + 3]);
          } else {
#pragma unroll
            for (int k = 0; k < PER; k++)
              if (s * PER + k < STATE) kept[k] = h[k];
          }
        }
        kept += p.dim * STATE;
        next_state += (int)p.checkpoint;
      }
#pragma unroll UNROLL
      for (int m = 0; m < 16; m += G) {
        const int g0 = start + (MODE == 2 ? 16 - G - m : m);
        float y[G];
#pragma unroll
        for (int q = 0; q < G; q += 4) {
          const int g4 = g0 + (MODE == 2 ? G - 4 - q : q);
          const float4 dt4 = *(const float4*)(dt_tile + tile_at(channel, g4));
          const float4 x4 = *(const float4*)(x_tile + tile_at(channel, g4));
          const float dt[4] = {dt4.x, dt4.y, dt4.z, dt4.w}, x[4] = {x4.x, x4.y, x4.z, x4.w};
          float sum[4] = {0.f, 0.f, 0.f, 0.f};
          if (MODE != 0) time += (dt[0] + dt[1]) + (dt[2] + dt[3]);
#pragma unroll
          for (int k = 0; k < PER; k++) {
            float b[4], c[4];
#pragma unroll
            for (int t = 0; t < 4; t++) b[t] = b_const[k], c[t] = c_const[k];
            if constexpr (USE_B && !CONST_B) {
              const float4 v = *(const float4*)(b_tile + (k * LANES + s) * PITCH + g4);
              b[0] = v.x, b[1] = v.y, b[2] = v.z, b[3] = v.w;
            }
            if constexpr (USE_C && !CONST_C) {
              const float4 v = *(const float4*)(c_tile + (k * LANES + s) * PITCH + g4);
              c[0] = v.x, c[1] = v.y, c[2] = v.z, c[3] = v.w;
            }
            if constexpr (MODE == 2) {
#pragma unroll
              for (int t = 3; t >= 0; t--) h[k] = decay_of(dt[t], A[k]) * fmaf(x[t], c[t], h[k]);
            } else {
#pragma unroll
              for (int t = 0; t < 4; t++) {
                h[k] = fmaf(decay_of(dt[t], A[k]), h[k], x[t] * b[t]);
                if (MODE == 0) sum[t] = fmaf(c[t], h[k], sum[t]);
              }
            }
          }
#pragma unroll
          for (int t = 0; t < 4; t++) y[q + t] = sum[t];
        }
        if constexpr (MODE == 0) {
          reduce_steps(y, lane);
          __syncwarp();
          constexpr int MINE = LANES < G ? G / LANES : 1;
          const int first = g0 + first_step<G>(s);
#pragma unroll
          for (int t = 0; t < MINE; t++) dt_tile[tile_at(channel, first + t)] = y[t];
        }
      }
    }

    // a thread's own channel is its warp's, except in the dim layout and in tiles too small for all threads
    if (DIM_LAYOUT || !ALL_OWN) __syncthreads(); else __syncwarp();
    if (MODE == 0 && o.any) {
      float v[OWN_C][OWN_T];
#pragma unroll
      for (int c = 0; c < OWN_C; c++) {
        tile_read(v[c], dt_tile, o.channel + c, o.step);
#pragma unroll
        for (int t = 0; t < OWN_T; t++) {
          if (HAS_D) v[c][t] = fmaf(skip[c], now_u.at(c, t), v[c][t]);
          if (HAS_Z) {
            const float gate = now_z.at(c, t);
            v[c][t] *= gate * sigmoid(gate);
          }
        }
      }
      Raw r;
      put(r, v);
      store(r, (scalar*)OWN_AT(out, t0), p.out_step, n);
    }
  }

  if (!exists) return;
#pragma unroll
  for (int k = 0; k < PER; k++) {
    int n = s * PER + k;
    if (n >= STATE) break;
    i64 at = (i64)d * STATE + n;
    if (MODE != 0) p.span_end[slot * p.dim * STATE + at] = h[k];
    else if (p.last_state && w.end == w.length) p.last_state[(i64)w.row * p.dim * STATE + at] = h[k];
  }
  if (MODE != 0 && s == 0) p.span_time[slot * p.dim + d] = time;
}

// Spans' leaving states -> their entering states, in place: enter[i+1] = exp(A time[i]) enter[i] + leave[i].
// One thread a (row, channel, state); the adjoint runs from the row's last span to its first.
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
    i64 slot = first + (MODE == 2 ? count - 1 - k : k);
    float leave = p.span_end[slot * per_row + at];
    p.span_end[slot * per_row + at] = h;
    h = h == 0.f ? leave : fmaf(decay_of(p.span_time[slot * p.dim + d], p.A[at]), h, leave);  // 0 stays 0 where A > 0 overflows
  }
}
