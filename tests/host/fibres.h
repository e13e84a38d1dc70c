// Run a grid of CUDA threads on one thread of the host.
//
// Blocks run one after another. The threads of a block are fibres. A fibre runs until it reaches a
// collective (a barrier or an exchange within a warp); then another fibre that can continue runs.
// The environment variable CUDA_HOST_ORDER sets the order: 0 ascending, 1 descending, any other
// number is the seed of a shuffle. A warp runs as far as it can before the next one, so without a
// barrier it reads values that other warps have not written yet. If a result depends on the order,
// the kernel has a race. At the start of a block every byte of shared memory is 0xFF: floats are
// NaN.
//
// If some threads do not reach a collective, or threads wait at different lines, an exception names
// the block, the threads and the lines.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// Shared variables are in their own section, whose bounds the linker defines.
#define __shared__ static __attribute__((section("cuda_shared")))
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_cuda_shared[],
    __stop_cuda_shared[];

namespace cuda_host {

using Where = std::source_location;

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
// Seven cache lines above a power of two: otherwise all stacks would use the same few cache sets.
constexpr size_t kStack = (64 << 10) + 7 * 64;
// Functions that switch between fibres must not be inlined into each other.
#define CUDA_HOST_SWITCH __attribute__((noinline))

// The threads of one collective: a block or a warp.
struct Group {
  unsigned size = 0, arrived = 0, generation = 0;
  Where where;
  alignas(16) unsigned char values[2][kWarp][16];  // that its lanes exchange
};

struct Fibre {
  enum State { kReady, kWaiting, kDone };
  State state = kDone;
  bool started = false;  // a fibre is kept for later blocks, as starting one is a system call
  uint3 index;           // its threadIdx
  void* context[5];
  const Group* group = nullptr;  // it waits until the generation of this group has changed
  unsigned generation = 0;
  Where where;

  bool can_continue() const {
    return state == kReady || (state == kWaiting && group->generation != generation);
  }
};

struct Machine {
  std::mutex mutex;
  std::array<Fibre, kMaxThreads> fibres;
  std::array<Group, kMaxThreads / kWarp> warps;
  Group block;
  unsigned threads = 0, done = 0;
  unsigned warp = 0, turn = 0;        // lane lanes[turn] of this warp is running
  std::array<unsigned, kWarp> lanes;  // in the order of their turns
  Fibre* current = nullptr;           // null in the scheduler
  void* scheduler[5];
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  std::string error;
  unsigned char* stacks = nullptr;
};
inline Machine machine;

inline unsigned thread() { return static_cast<unsigned>(machine.current - machine.fibres.data()); }
inline unsigned lane() { return thread() % kWarp; }

// The first lane from machine.turn on that can continue, or null.
inline Fibre* next_lane() {
  for (; machine.turn < kWarp; ++machine.turn) {
    Fibre& f = machine.fibres[machine.warp * kWarp + machine.lanes[machine.turn]];
    if (f.can_continue()) return &f;
  }
  return nullptr;
}

inline void make_current(Fibre* fibre) {
  machine.current = fibre;
  threadIdx = fibre->index;
  fibre->state = Fibre::kReady;
}

// Fibres switch by the compiler's own setjmp and longjmp: three words and no system call.
CUDA_HOST_SWITCH inline void jump(void** to) { __builtin_longjmp(to, 1); }

// Run another lane of the warp, or the scheduler if none can continue, until this fibre can.
CUDA_HOST_SWITCH inline void wait() {
  if (__builtin_setjmp(machine.current->context)) return;
  ++machine.turn;
  Fibre* next = next_lane();
  if (!next || !next->started) jump(machine.scheduler);
  make_current(next);
  jump(next->context);
}

inline std::string report(const char* what) {
  std::ostringstream text;
  text << "cuda_host: block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z
       << "): " << what;
  for (unsigned i = 0; i < machine.threads; ++i) {
    const Fibre &f = machine.fibres[i], &before = machine.fibres[i == 0 ? 0 : i - 1];
    if (i > 0 && f.state == before.state && f.where.line() == before.where.line()) continue;
    text << "; from thread " << i << " on: ";
    if (f.state == Fibre::kWaiting) {
      text << "waiting at " << f.where.file_name() << ":" << f.where.line();
    } else {
      text << (f.state == Fibre::kDone ? "have returned" : "run");
    }
  }
  return text.str();
}

// An exception cannot leave a fibre, so the scheduler throws it.
inline void fail(const char* what) {
  machine.error = report(what);
  if (machine.current) jump(machine.scheduler);
}

// With -fsanitize=alignment the compiler calls this before an access that is not aligned.
extern "C" __attribute__((used)) inline void __ubsan_handle_type_mismatch_v1(void*, void*) {
  fail("an access that is not aligned");
}

// Return when every thread of the group has arrived.
inline void meet(Group& group, Where where) {
  Fibre& self = *machine.current;
  self.where = where;
  if (group.arrived == 0) group.where = where;
  if (group.where.line() != where.line() || group.where.file_name() != where.file_name()) {
    self.state = Fibre::kWaiting;
    fail("threads meet at different collectives");
  }
  if (++group.arrived == group.size) {
    group.arrived = 0;
    ++group.generation;
    return;
  }
  self.state = Fibre::kWaiting;
  self.group = &group;
  self.generation = group.generation;
  wait();
}

template <class T>
struct Exchanged {
  const unsigned char (*values)[16];

  T operator()(unsigned from) const {
    T value;
    std::memcpy(&value, values[from % kWarp], sizeof(T));
    return value;
  }
};

// Each lane stores a value, and then reads those of all lanes. Two buffers alternate: a lane may be
// at the next exchange, but no further, while others still read this one. So one meeting is enough.
template <class T>
Exchanged<T> exchange(unsigned mask, T value, Where where) {
  static_assert(sizeof(T) <= 16);
  if (mask != ~0u) fail("only whole warps exchange values here");
  Group& warp = machine.warps[thread() / kWarp];
  auto* values = warp.values[warp.generation % 2];
  std::memcpy(values[lane()], &value, sizeof(T));
  meet(warp, where);
  return {values};
}

CUDA_HOST_SWITCH inline void run_threads() {
  for (;;) {
    machine.body(machine.arguments);
    machine.current->state = Fibre::kDone;
    ++machine.done;
    wait();
  }
}

CUDA_HOST_SWITCH inline void start(unsigned char* stack) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, run_threads, 0);
  setcontext(&context);
}

CUDA_HOST_SWITCH inline void resume(Fibre* fibre) {
  make_current(fibre);
  if (__builtin_setjmp(machine.scheduler)) return;
  if (fibre->started) jump(fibre->context);
  fibre->started = true;
  start(machine.stacks + thread() * kStack);
}

inline void check_error() {
  machine.current = nullptr;
  if (machine.error.empty()) return;
  for (Fibre& fibre : machine.fibres) fibre.started = false;  // they have not left the kernel
  throw std::runtime_error(std::exchange(machine.error, {}));
}

// The order of warps, and of the lanes within each warp.
class Order {
 public:
  explicit Order(unsigned warps) : warps_(warps) {
    const char* text = std::getenv("CUDA_HOST_ORDER");
    seed_ = text ? static_cast<unsigned>(std::atoi(text)) : 0;
    random_.seed(seed_);
    std::iota(warps_.begin(), warps_.end(), 0);
    std::iota(machine.lanes.begin(), machine.lanes.end(), 0);
    if (seed_ != 1) return;
    std::reverse(warps_.begin(), warps_.end());
    std::reverse(machine.lanes.begin(), machine.lanes.end());
  }

  const std::vector<unsigned>& next() {
    if (seed_ > 1) {
      std::shuffle(warps_.begin(), warps_.end(), random_);
      std::shuffle(machine.lanes.begin(), machine.lanes.end(), random_);
    }
    return warps_;
  }

 private:
  std::vector<unsigned> warps_;
  unsigned seed_;
  std::mt19937 random_;
};

inline void begin_block() {
  machine.done = 0;
  machine.block = {};
  machine.block.size = machine.threads;
  for (unsigned w = 0; w < machine.threads / kWarp; ++w) {
    machine.warps[w].size = kWarp;
    machine.warps[w].arrived = 0;
  }
  for (unsigned i = 0; i < machine.threads; ++i) machine.fibres[i].state = Fibre::kReady;
  std::fill(__start_cuda_shared, __stop_cuda_shared, 0xFF);
}

// Run the warp as far as it can; return whether any lane ran.
inline bool run_warp(unsigned warp) {
  machine.warp = warp;
  bool any = false;
  for (bool moved = true; moved; any |= moved) {
    moved = false;
    machine.turn = 0;
    while (Fibre* fibre = next_lane()) {
      resume(fibre);
      check_error();
      moved = true;
    }
  }
  return any;
}

inline void run(dim3 grid, dim3 threads, void (*body)(const void*), const void* arguments) {
  const std::lock_guard lock(machine.mutex);
  if (!machine.stacks) {
    void* stacks = mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) throw std::runtime_error("cuda_host: no memory for stacks");
    machine.stacks = static_cast<unsigned char*>(stacks);
  }
  machine.body = body;
  machine.arguments = arguments;
  machine.threads = threads.x * threads.y * threads.z;
  blockDim = threads;
  gridDim = grid;
  for (unsigned i = 0; i < machine.threads; ++i) {
    machine.fibres[i].index = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
  }
  Order order(machine.threads / kWarp);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t b = 0; b < blocks; ++b) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    begin_block();
    while (machine.done < machine.threads) {
      bool progress = false;
      for (const unsigned warp : order.next()) progress |= run_warp(warp);
      if (!progress) fail("a collective that not all threads reach");
      check_error();
    }
  }
}

}  // namespace cuda_host
