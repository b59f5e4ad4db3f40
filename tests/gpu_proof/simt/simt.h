// Runs CUDA kernels on a CPU, one fiber a thread: blocks and clusters, static and dynamic shared memory, shuffles, votes,
// block and cluster barriers, shared memory of other blocks of a cluster. The blocks of a cluster live together; clusters run
// one after another on one OS thread.
//
// A warp runs until all its lanes wait or are done before the next one starts, in each of four orders of warps (with the
// blocks of a cluster) and lanes: what a missing barrier lets through in one order shows in another. Shared memory starts as
// NaN and becomes NaN again when its block ends. It stops with an error at a barrier or warp operation that not all who must
// have reached, or have reached at different lines. Exited threads count as arrived.
//
// Not modelled: atomics, mma, asynchronous copies, L1 caches, races between threads that no barrier order can tell apart.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SIMT_LEAVE(save, to, size) __sanitizer_start_switch_fiber(save, to, size)
#define SIMT_ARRIVE(saved, from, size) __sanitizer_finish_switch_fiber(saved, from, size)
#else
#define SIMT_LEAVE(save, to, size) ((void)0)
#define SIMT_ARRIVE(saved, from, size) ((void)0)
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace simt {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 128 << 10;

// ---- contexts

#if defined(__x86_64__)
struct Context { void* top = nullptr; };
extern "C" void simt_switch(Context* from, const Context* to);
asm(R"(
.text
.weak simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
inline void make_context(Context& c, char* stack, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + size) - 1;  // entry() starts as if it had been called from address 0
  *top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  c.top = top - 6;
  memset(c.top, 0, 6 * sizeof(void*));
}
#else
struct Context { ucontext_t c; };
inline void simt_switch(Context* from, const Context* to) { swapcontext(&from->c, &to->c); }
inline void make_context(Context& c, char* stack, size_t size, void (*entry)()) {
  getcontext(&c.c);
  c.c.uc_stack.ss_sp = stack;
  c.c.uc_stack.ss_size = size;
  makecontext(&c.c, entry, 0);
}
#endif

// ---- what is running

enum State { RUN, AT_WARP, AT_BLOCK, AT_CLUSTER, DONE };

struct Block;
struct Fiber {
  Context context;
  char* stack;
  void* fake_stack;  // the address sanitizer's
  State state;
  Block* block;
  dim3 thread;
  unsigned lane, mask;
  int line;        // of the barrier or warp operation it waits at
  uint64_t value;  // what it offers its warp there
};

struct Memory {  // of one __shared__ variable of one block; exactly as long, so that the sanitizer sees what lies beyond
  char* base = nullptr;
  size_t size = 0;
  Memory() = default;
  Memory(const Memory&) = delete;
  ~Memory() { free(base); }
};

struct Block {
  dim3 index;
  unsigned rank = 0;  // in its cluster
  std::vector<Fiber> fibers;
  std::map<std::pair<int, size_t>, Memory> shared;  // by variable (0 is the dynamic one) and, for templates, its size
  bool ended = false;
};

struct Machine {
  std::vector<Block> cluster;
  Fiber* current = nullptr;
  Context scheduler;
  void* fake_stack = nullptr;  // the scheduler's; and where its stack lies, both for the address sanitizer
  const void* stack = nullptr;
  size_t stack_size = 0;
  std::function<void()> kernel;
  size_t dynamic_bytes = 0;
  std::string error;
  int order = 0;  // bit 0: warps and blocks backwards, bit 1: lanes backwards
  std::vector<std::unique_ptr<char[]>> stacks;
  // what the "device" has
  int shared_limit = 232448, clusters = 1, device = 0, devices = 2, launched_on = -1, asked = 0;
  void* launched_in = nullptr;
  std::map<std::pair<const void*, int>, int> dynamic_limit;
};
inline Machine machine;
#define SIMT_NOW (*::simt::machine.current)

// ---- switching

inline void to_scheduler(State state) {
  Fiber* me = machine.current;
  me->state = state;
  SIMT_LEAVE(state == DONE ? nullptr : &me->fake_stack, machine.stack, machine.stack_size);
  simt_switch(&me->context, &machine.scheduler);
  SIMT_ARRIVE(me->fake_stack, nullptr, nullptr);
}

inline void fiber_entry() {
  SIMT_ARRIVE(nullptr, &machine.stack, &machine.stack_size);
  machine.kernel();
  to_scheduler(DONE);
}

inline void resume(Fiber& f) {
  machine.current = &f;
  threadIdx = f.thread, blockIdx = f.block->index;
  SIMT_LEAVE(&machine.fake_stack, f.stack, STACK);
  simt_switch(&machine.scheduler, &f.context);
  SIMT_ARRIVE(machine.fake_stack, nullptr, nullptr);
}

inline void fail(const std::string& what) {
  if (machine.error.empty()) machine.error = what;
}

inline void wait(State state, int line) {
  machine.current->line = line;
  to_scheduler(state);
}

// ---- shared memory

inline char* memory(Block& block, int variable, size_t size) {
  Memory& m = block.shared[{variable, size}];
  if (!m.base) {
    if (posix_memalign(reinterpret_cast<void**>(&m.base), 16, size ? size : 1)) abort();
    m.size = size;
    memset(m.base, 0xFF, size);  // NaN
  }
  return m.base;
}
template <class T>
T& static_shared(int variable) { return *reinterpret_cast<T*>(memory(*SIMT_NOW.block, variable, sizeof(T))); }
template <class T>
T* dynamic_shared() { return reinterpret_cast<T*>(memory(*SIMT_NOW.block, 0, machine.dynamic_bytes)); }

// The same variable of the cluster's block `rank`.
template <class T>
T* shared_of(T* mine, unsigned rank) {
  const char* p = reinterpret_cast<const char*>(mine);
  for (auto& [key, m] : SIMT_NOW.block->shared)
    if (p >= m.base && p < m.base + m.size) {
      if (rank >= machine.cluster.size()) break;
      Block& other = machine.cluster[rank];
      if (other.ended) fail("shared memory of block " + std::to_string(rank) + " of a cluster is read after that block has ended");
      return reinterpret_cast<T*>(memory(other, key.first, m.size) + (p - m.base));
    }
  fail("map_shared_rank of an address that is not in shared memory, or of a block that is not in the cluster");
  to_scheduler(DONE);
  return nullptr;
}

// ---- the scheduler

inline std::string where(const Block& b) { return " (block " + std::to_string(b.index.x) + ")"; }

// All of a warp's lanes that wait at one warp operation go on, if they are those of its mask.
inline bool release_warp(Block& b, size_t lo, size_t hi) {
  unsigned at = 0, want = 0;
  int line = 0;
  for (size_t i = lo; i < hi; i++) {
    const Fiber& f = b.fibers[i];
    if (f.state != AT_WARP) continue;
    at |= 1u << f.lane;
    want |= f.mask;
    if (line && line != f.line)
      return fail("lanes of a warp wait at warp operations of lines " + std::to_string(line) + " and " + std::to_string(f.line) + where(b)), false;
    line = f.line;
  }
  if (!at) return false;
  const unsigned exist = hi - lo == WARP ? ~0u : (1u << (hi - lo)) - 1;
  if ((want & exist) != at) return fail("the warp operation of line " + std::to_string(line) + " is not reached by all lanes of its mask" + where(b)), false;
  for (size_t i = lo; i < hi; i++)
    if (b.fibers[i].state == AT_WARP) b.fibers[i].state = RUN;
  return true;
}

inline void run_warp(Block& b, size_t lo, size_t hi) {
  for (bool again = true; again && machine.error.empty();) {
    for (size_t k = lo; k < hi; k++) {
      Fiber& f = b.fibers[machine.order & 2 ? lo + hi - 1 - k : k];
      if (f.state == RUN) resume(f);
    }
    again = release_warp(b, lo, hi);
  }
}

// Lets those go on who wait at a barrier that all of `blocks` have reached; exited threads count as arrived.
inline bool release(State barrier, const std::vector<Block*>& blocks) {
  int line = 0;
  for (const Block* b : blocks)
    for (const Fiber& f : b->fibers) {
      if (f.state == DONE) continue;
      if (f.state != barrier) return false;
      if (line && line != f.line)
        return fail("a barrier is reached at lines " + std::to_string(line) + " and " + std::to_string(f.line) + where(*b)), false;
      line = f.line;
    }
  for (Block* b : blocks)
    for (Fiber& f : b->fibers)
      if (f.state == barrier) f.state = RUN;
  return line != 0;
}

inline void run_cluster() {
  auto& blocks = machine.cluster;
  std::vector<Block*> all;
  for (Block& b : blocks) all.push_back(&b);
  for (;;) {
    bool progress = false, finished = true;
    for (size_t k = 0; k < blocks.size(); k++) {
      Block& b = blocks[machine.order & 1 ? blocks.size() - 1 - k : k];
      const size_t n = b.fibers.size(), warps = (n + WARP - 1) / WARP;
      for (bool again = true; again && machine.error.empty();) {
        for (size_t w = 0; w < warps; w++) {
          const size_t lo = (machine.order & 1 ? warps - 1 - w : w) * WARP;
          run_warp(b, lo, lo + WARP < n ? lo + WARP : n);
        }
        again = release(AT_BLOCK, {&b});
        progress |= again;
      }
      bool done = true;
      for (const Fiber& f : b.fibers) done &= f.state == DONE;
      if (done && !b.ended) {
        b.ended = progress = true;
        for (auto& [key, m] : b.shared) memset(m.base, 0xFF, m.size);
      }
      finished &= done;
    }
    if (!machine.error.empty() || finished) return;
    progress |= release(AT_CLUSTER, all);
    if (!progress && machine.error.empty()) fail("a barrier is not reached by all threads that are still running");
  }
}

inline void launch(dim3 grid, dim3 threads, unsigned cluster, size_t dynamic_bytes, std::function<void()> kernel) {
  const size_t n = size_t(threads.x) * threads.y * threads.z;
  machine.kernel = std::move(kernel);
  gridDim = grid, blockDim = threads, machine.dynamic_bytes = dynamic_bytes;
  machine.error.clear();
  while (machine.stacks.size() < n * cluster) machine.stacks.emplace_back(new char[STACK]);
  for (unsigned first = 0; first < grid.x && machine.error.empty(); first += cluster) {
    machine.cluster.clear();
    machine.cluster.resize(cluster);
    for (unsigned r = 0; r < cluster; r++) {
      Block& b = machine.cluster[r];
      b.index = dim3(first + r, 0, 0), b.rank = r;
      b.fibers.resize(n);
      for (size_t i = 0; i < n; i++) {
        Fiber& f = b.fibers[i];
        f.stack = machine.stacks[r * n + i].get(), f.state = RUN, f.block = &b, f.lane = i % WARP, f.mask = 0, f.line = 0, f.fake_stack = nullptr;
        f.thread = dim3(i % threads.x, i / threads.x % threads.y, i / (size_t(threads.x) * threads.y));
        make_context(f.context, f.stack, STACK, fiber_entry);
      }
    }
    run_cluster();
  }
}

// ---- warp operations: offer a value, wait for the others, read, wait again

template <class T>
T exchange(unsigned mask, T v, unsigned from, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  Fiber& me = SIMT_NOW;
  me.mask = mask, me.value = 0;
  memcpy(&me.value, &v, sizeof(T));
  wait(AT_WARP, line);
  Fiber* warp = &me - me.lane;
  T got = v;
  if (from < WARP && (mask >> from & 1)) memcpy(&got, &warp[from].value, sizeof(T));
  wait(AT_WARP, line);
  return got;
}

inline unsigned ballot(unsigned mask, bool p, int line) {
  Fiber& me = SIMT_NOW;
  me.mask = mask, me.value = p;
  wait(AT_WARP, line);
  Fiber* warp = &me - me.lane;
  const size_t n = me.block->fibers.size() - (warp - me.block->fibers.data());
  unsigned votes = 0;
  for (unsigned i = 0; i < WARP && i < n; i++)
    if (mask >> i & 1) votes |= unsigned(warp[i].value) << i;
  wait(AT_WARP, line);
  return votes;
}

}  // namespace simt
