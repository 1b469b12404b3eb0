// Runs ENTRY, a kernel of the translation unit before, over a grid.

extern "C" UNCHECKED int races_thread() { return current; }

static const Params* parameters;
static void enter() {
  ENTRY(*parameters);
  fibers[current].done = true;
  step_aside();
}
static void run_block(int threads) {
  std::vector<int> live;
  for (int i = 0; i < threads; i++) {
    Fiber& f = fibers[i];
    f.done = false, f.groups.clear(), f.open.clear(), f.stack.resize(1 << 19);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
    makecontext(&f.context, enter, 0);
    live.push_back(i);
  }
  for (long idle = 0; !live.empty(); idle++) {
    if (idle > 20000) fail("deadlock");  // the kernels here take hundreds of rounds
    const int warp = live[chance() % live.size()] / 32, turns = 1 + chance() % 40;  // some warps run far ahead
    std::vector<int> lanes;
    std::copy_if(live.begin(), live.end(), std::back_inserter(lanes), [&](int i) { return i / 32 == warp; });
    std::shuffle(lanes.begin(), lanes.end(), chance);
    for (int turn = 0; turn < turns; turn++)
      for (int i : lanes)
        if (!fibers[i].done) current = i, swapcontext(&scheduler, &fibers[i].context);
    const auto left = std::remove_if(live.begin(), live.end(), [](int i) { return fibers[i].done; });
    if (left != live.end()) idle = 0, live.erase(left, live.end());
  }
  for (const auto& [at, b] : in_memory)
    if (b.count) fail("a thread arrived at a barrier where nobody waits");
  for (const Fiber& f : fibers)
    for (const auto& group : f.groups)
      if (!group.empty()) fail("a kernel ended before its copies");
}
extern "C" void emulate(const Params* p, int blocks, int threads, int shared_bytes, unsigned seed) {
  races_begin(nullptr, 0, threads);  // the last launch's memory may be given out again
  chance.seed(seed), parameters = p, thread_count = threads, blockDim.x = threads, current = 0;
  std::vector<float4> memory(shared_bytes / 16 + 2);
  emulated_shared = (float*)memory.data();
  fibers = std::vector<Fiber>(threads);
  for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
    races_begin(nullptr, 0, threads);
    std::fill(memory.begin(), memory.end(), float4{NAN, NAN, NAN, NAN});
    races_begin(memory.data(), shared_bytes, threads);
    std::fill(named, named + 16, Barrier());
    for (auto* each : {of_warp, meeting}) std::fill(each, each + 32, Barrier());
    in_memory.clear();
    run_block(threads);
  }
}
