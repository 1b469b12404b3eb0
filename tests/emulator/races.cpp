// Finds accesses to shared memory that no barrier orders, by vector clocks: gcc's -fsanitize=thread calls the hooks at
// the bottom at every access; the emulated barriers call races_release and races_acquire.

#include <cstdio>
#include <map>
#include <set>
#include <vector>

typedef std::vector<unsigned> Clock;
extern "C" int races_thread();

struct Cell {  // two bytes
  int writer = -1;
  unsigned written = 0;
  void* where = nullptr;
  std::map<int, std::pair<unsigned, void*>> readers;  // since it was written: when and where
};
static char* memory;
static int threads;
static std::vector<Clock> clocks;
static std::vector<Cell> cells;
static std::set<std::pair<void*, void*>> seen;
static long count;

extern "C" void races_begin(void* at, long bytes, int n) {
  memory = (char*)at, threads = n, cells.assign(bytes / 2, Cell()), clocks.assign(n, Clock(n, 0));
  for (int i = 0; i < n; i++) clocks[i][i] = 1;
}
static void report(const char* what, void* before, void* now, int other, int thread, long byte) {
  count++;
  if (seen.insert({before, now}).second)
    fprintf(stderr, "race: %s, threads %d and %d, byte %ld of shared memory\n", what, other, thread, byte);
}
extern "C" void races_access(void* at, long bytes, int write, void* where, int thread) {
  const long first = (char*)at - memory;
  if (first < 0 || first >= 2 * (long)cells.size()) return;
  const Clock& known = clocks[thread];
  for (long c = first / 2; c < (first + bytes + 1) / 2; c++) {
    Cell& cell = cells[c];
    if (cell.writer >= 0 && cell.writer != thread && cell.written > known[cell.writer])
      report(write ? "write after write" : "read after write", cell.where, where, cell.writer, thread, 2 * c);
    if (!write) {
      cell.readers[thread] = {known[thread], where};
      continue;
    }
    for (const auto& [reader, when] : cell.readers)
      if (reader != thread && when.first > known[reader]) {
        report("write after read", when.second, where, reader, thread, 2 * c);
        break;
      }
    cell.readers.clear(), cell.writer = thread, cell.written = known[thread], cell.where = where;
  }
}
static void join(Clock& to, const Clock& from) {
  to.resize(threads);
  for (size_t i = 0; i < from.size(); i++)
    if (from[i] > to[i]) to[i] = from[i];
}
extern "C" void races_release(Clock* to, int thread) { join(*to, clocks[thread]), clocks[thread][thread]++; }
extern "C" void races_acquire(Clock* from, int thread) { join(clocks[thread], *from); }
extern "C" long races_found() { return count; }

#define HOOK(name, bytes, write) \
  extern "C" void __tsan_##name(void* at) { races_access(at, bytes, write, __builtin_return_address(0), races_thread()); }
#define HOOKS(bytes) HOOK(read##bytes, bytes, 0) HOOK(write##bytes, bytes, 1)
#define UNALIGNED(bytes) HOOK(unaligned_read##bytes, bytes, 0) HOOK(unaligned_write##bytes, bytes, 1)
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
UNALIGNED(2) UNALIGNED(4) UNALIGNED(8) UNALIGNED(16)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* at, long n) { races_access(at, n, 0, __builtin_return_address(0), races_thread()); }
void __tsan_write_range(void* at, long n) { races_access(at, n, 1, __builtin_return_address(0), races_thread()); }
}
