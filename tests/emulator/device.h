// What a CUDA kernel needs to run on a CPU, block after block: each thread is a fiber, and the scheduler lets warps, and
// the lanes within them, run in random order from one synchronisation to the next.
//
// Shared memory starts as NaN. A cp.async takes place when its thread waits for it, no sooner. Every access to shared
// memory is reported to races.cpp, with the order that barriers make; shuffles and votes make none, as on a GPU.
// Fails: a barrier that too many reach or that nobody meets, a deadlock, a misaligned access, a copy never waited for.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <ucontext.h>
#include <vector>

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__
#define UNCHECKED __attribute__((no_sanitize("thread")))

// ---- types and arithmetic -------------------------------------------------------------------------------------------

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

[[noreturn]] static void fail(const char* what) {
  fprintf(stderr, "emulated device: %s\n", what);
  abort();
}
template <class To, class From>
static To same_bits(From v) {
  To r;
  memcpy(&r, &v, sizeof r);
  return r;
}
static unsigned __float_as_uint(float v) { return same_bits<unsigned>(v); }
static float __uint_as_float(unsigned v) { return same_bits<float>(v); }
static int __float_as_int(float v) { return same_bits<int>(v); }
static float __int_as_float(int v) { return same_bits<float>(v); }
static float flushed(float v) { return fabsf(v) < 1.17549435e-38f ? copysignf(0.f, v) : v; }
static float emulated_ex2(float v) { return flushed(exp2f(flushed(v))); }
static float emulated_rcp(float v) { return flushed(1.f / flushed(v)); }
static unsigned to_bfloat16(float v) {
  const unsigned u = __float_as_uint(v);
  return v != v ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
static unsigned to_float16(float v) { return same_bits<unsigned short>((_Float16)v); }
static float from_float16(unsigned short v) { return (float)same_bits<_Float16>(v); }

// ---- threads and what orders them -----------------------------------------------------------------------------------

typedef std::vector<unsigned> Clock;
extern "C" {
void races_begin(void* memory, long bytes, int threads);
void races_access(void* at, long bytes, int write, void* where, int thread);
void races_release(Clock*, int thread);
void races_acquire(Clock*, int thread);
}

struct Copy { void* to; const void* from; int width, bytes; };
struct Barrier { int count = 0, turn = 0; Clock gathered, released; };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
  float handed;  // what other lanes read in a shuffle
};
static std::vector<Fiber> fibers;
static int current, thread_count;
static ucontext_t scheduler;
static float* emulated_shared;
static Barrier named[16], of_warp[32], meeting[32];
static std::mt19937 chance;
static struct { int x; } blockIdx, blockDim;
static struct { struct { operator int() const { return current; } } x; } threadIdx;

static void step_aside() {
  const int me = current;
  swapcontext(&fibers[me].context, &scheduler);
}
static int arrive(Barrier& b, int threads, bool orders) {
  const int turn = b.turn;
  if (orders) races_release(&b.gathered, current);
  if (++b.count > threads) fail("more threads at a barrier than it is for");
  if (b.count == threads) b.count = 0, b.turn++, b.released.swap(b.gathered), b.gathered.clear();
  return turn;
}
static void pass(Barrier& b, int turn, bool orders) {
  while (b.turn == turn) step_aside();
  if (orders) races_acquire(&b.released, current);
}
static void synchronise(Barrier& b, int threads, bool orders = true) { pass(b, arrive(b, threads, orders), orders); }
static void __syncthreads() { synchronise(named[0], thread_count); }
static void __syncwarp() { synchronise(of_warp[current / 32], 32); }
static void meet() { synchronise(meeting[current / 32], 32, false); }  // lanes stand together, which orders no memory
static std::map<void*, Barrier> in_memory;  // mbarriers
static void turn_begin(void* at) { in_memory[at] = Barrier(); }
static void turn_pass(void* at, int arrivals) { arrive(in_memory.at(at), arrivals, true); }
static void turn_wait(void* at, int odd) {
  Barrier& b = in_memory.at(at);
  while (b.turn % 2 == odd) step_aside();
  races_acquire(&b.released, current);
}

template <class Read>
static auto exchange(float v, Read read) {
  fibers[current].handed = v;
  meet();
  const auto r = read(current & ~31);
  meet();
  return r;
}
static float __shfl_xor_sync(unsigned, float v, int mask) {
  return exchange(v, [&](int warp) { return fibers[warp + ((current & 31) ^ mask)].handed; });
}
static int __shfl_sync(unsigned, int v, int source) {
  return exchange((float)v, [&](int warp) { return (int)fibers[warp + source].handed; });
}

// ---- memory ---------------------------------------------------------------------------------------------------------

template <class T>
static T __ldg(const T* p) {
  if ((uintptr_t)p % sizeof(T)) fail("misaligned load");
  return *p;
}
template <class T> static T __ldcg(const T* p) { return *p; }
template <class T> static void __stcg(T* p, T v) { *p = v; }
template <class T>
static T atomicAdd(T* p, T v) {
  const T old = *p;
  *p += v;
  return old;
}
static void add_four(float* p, float4 v) { p[0] += v.x, p[1] += v.y, p[2] += v.z, p[3] += v.w; }
static void __threadfence() {}
static void __nanosleep(int) { step_aside(); }
static void copy_begin(void* to, const void* from, int width, int bytes) {
  if (bytes < 0 || bytes > width || (uintptr_t)to % width || (bytes && (uintptr_t)from % width)) fail("bad cp.async");
  races_access(to, width, 1, __builtin_return_address(0), current);
  fibers[current].open.push_back({to, from, width, bytes});
}
static void copies_close() {
  fibers[current].groups.push_back(fibers[current].open);
  fibers[current].open.clear();
}
static void copies_end(int pending) {
  auto& groups = fibers[current].groups;
  for (; (int)groups.size() > pending; groups.erase(groups.begin()))
    for (const Copy& c : groups[0]) {
      races_access(c.to, c.width, 1, __builtin_return_address(0), current);
      memset(c.to, 0, c.width), memcpy(c.to, c.from, c.bytes);
    }
}
