// What one resource of a GPU delivers at most: a kernel each, which ceilings.py launches, times and counts for.
//
// multiply_add, ex2, shuffle, shared: chains of one instruction; eight independent ones a thread, and threads enough to hide its
// latency. Bodies are unrolled until the loop's own instructions are about one in a hundred.
// copy: 64 bytes a thread from one buffer to another. l2: every block reads the whole of a buffer that L2 holds.
// nothing: an empty kernel.

typedef long long i64;

constexpr int THREADS = 256;
constexpr int CHAINS = 8;
constexpr int UNROLL = 32;
constexpr int LOADS = 4;  // of 16 bytes, in flight in a thread

#define KERNEL(name) extern "C" __global__ void __launch_bounds__(THREADS) name(const Params p)

__device__ __forceinline__ void seed(float (&v)[CHAINS]) {
#pragma unroll
  for (int c = 0; c < CHAINS; c++) v[c] = 1e-3f * float(threadIdx.x + 37 * c);
}

// Uses the values without writing them: no sum of them is this.
__device__ __forceinline__ void use(const float (&v)[CHAINS], float* sink) {
  float sum = 0.f;
#pragma unroll
  for (int c = 0; c < CHAINS; c++) sum += v[c];
  if (sum == -1.2345e30f) *sink = sum;
}

// Every chain goes through `step`, which is told the value and the instruction's place in the loop.
template <class Step>
__device__ __forceinline__ void chains(const Params& p, Step step) {
  float v[CHAINS];
  seed(v);
  for (int i = 0; i < int(p.times); i++)
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
#pragma unroll
      for (int c = 0; c < CHAINS; c++) v[c] = step(v[c], u + c);
  use(v, p.sink);
}

KERNEL(multiply_add) {
  const float b = 1e-3f * float(blockIdx.x);
  chains(p, [=](float v, int) { return fmaf(v, 0.999f, b); });
}

KERNEL(ex2) {
  chains(p, [](float v, int) {
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(-v));
    return v;
  });
}

KERNEL(shuffle) {
  chains(p, [](float v, int at) { return __shfl_xor_sync(~0u, v, 1 + at % 31); });
}

// 16 bytes a lane, the lanes of a warp side by side: no bank is asked for twice in a cycle.
KERNEL(shared) {
  __shared__ float4 room[2 * THREADS];
  room[threadIdx.x] = room[THREADS + threadIdx.x] = make_float4(1.f, 2.f, 3.f, 4.f);
  __syncthreads();
  float v[CHAINS];
  seed(v);
  const unsigned at = unsigned(__cvta_generic_to_shared(room + threadIdx.x));
  for (int i = 0; i < int(p.times); i++)
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      float4 x;
      asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                   : "r"(at + 16 * (u % 2 ? THREADS : 0)));
      const int c = u % 2 * 4;
      v[c] += x.x, v[c + 1] += x.y, v[c + 2] += x.z, v[c + 3] += x.w;
    }
  use(v, p.sink);
}

KERNEL(copy) {
  const i64 at = i64(blockIdx.x) * (LOADS * THREADS) + threadIdx.x;
  uint4 x[LOADS];
#pragma unroll
  for (int k = 0; k < LOADS; k++) x[k] = __ldcs(p.from + at + k * THREADS);
#pragma unroll
  for (int k = 0; k < LOADS; k++) __stcs(p.to + at + k * THREADS, x[k]);
}

// .cg keeps what is read out of L1. Blocks begin at different places, so that they ask for different lines at a time.
KERNEL(l2) {
  unsigned sum = 0;
  for (int i = 0; i < int(p.times); i++) {
    const unsigned shift = (blockIdx.x + i) * 7919u * (LOADS * THREADS);
    for (unsigned at = threadIdx.x; at < unsigned(p.count); at += LOADS * THREADS)
#pragma unroll
      for (int k = 0; k < LOADS; k++) {
        const uint4 x = __ldcg(p.from + ((at + k * THREADS + shift) & unsigned(p.count - 1)));
        sum ^= x.x ^ x.y ^ x.z ^ x.w;
      }
  }
  if (sum == 0x12345678u) *p.sink = float(sum);
}

KERNEL(nothing) {}
