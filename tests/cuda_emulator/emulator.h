// Runs CUDA kernels on host memory. A block is an OS thread, so that shared memory can be thread-local; the CUDA
// threads of a block are fibers, which change places only where CUDA synchronises.
//
// Read from the environment at each launch: CUDA_EMULATOR_SMS, CUDA_EMULATOR_BLOCKS_PER_SM, CUDA_EMULATOR_L2 (bytes)
// and CUDA_EMULATOR_COOPERATIVE (0 or 1) describe the device, CUDA_EMULATOR_SEED decides about the order of execution.
// A kernel's mistake is told on stderr, and ends the process.
//
// What moves by hinted instructions (ptx.cuh) and by __ldcg and its like is counted where cuda_emulator_watch was told
// to; launches are counted, too. Plain accesses are not seen.
#pragma once

#include <link.h>
#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#ifndef __x86_64__
#define CUDA_EMULATOR_UCONTEXT
#endif
#ifdef CUDA_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// Hidden: two modules in one process must not share state.
#pragma GCC visibility push(hidden)

namespace cuda_emulator {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStack = 64 << 10;
constexpr uint64_t kCanary = 0x5ca1ab1e0ddba11;

inline int setting(const char* name, int absent) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : absent;
}

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "CUDA emulator: %s\n", what.c_str());
  std::abort();
}

// Priority in the second-level cache.
enum class Eviction { kNormal, kFirst };

// Accesses of each byte of a piece of memory: loads, then stores, each by Eviction.
struct Watch {
  const char* begin;
  size_t size;
  uint8_t* counts;  // [4, size]
};
inline std::vector<Watch> watches;
inline std::atomic<int> ordinary_launches{0}, cooperative_launches{0};

inline void count(const void* p, size_t size, bool store, Eviction eviction) {
  for (const Watch& watch : watches)
    for (size_t i = 0; i < size; ++i) {
      const size_t at = static_cast<const char*>(p) + i - watch.begin;
      const size_t kind = store * 2 + (eviction == Eviction::kFirst);
      if (at < watch.size) __atomic_fetch_add(watch.counts + kind * watch.size + at, 1, __ATOMIC_RELAXED);
    }
}

inline uint64_t volume(dim3 d) { return uint64_t{d.x} * d.y * d.z; }

inline uint3 place(uint64_t rank, dim3 d) {
  return {static_cast<unsigned>(rank % d.x), static_cast<unsigned>(rank / d.x % d.y),
          static_cast<unsigned>(rank / d.x / d.y)};
}

inline std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

#ifdef CUDA_EMULATOR_UCONTEXT
using Context = ucontext_t;

inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }

inline void prepare(Context* context, char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStack;
  makecontext(context, entry, 0);
}
#else
using Context = void*;  // the stack pointer, with the registers that a call preserves above it

// By hand, since swapcontext makes a system call. Opaque to the optimiser (noipa): the kernel's memory changes here.
__attribute__((naked, noipa)) inline void switch_context(Context*, Context*) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
      "mov %rsp, (%rdi); mov (%rsi), %rsp\n"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

inline void prepare(Context* context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 2;
  top[0] = reinterpret_cast<void*>(entry);
  top[1] = nullptr;
  *context = std::fill_n(top - 6, 6, nullptr) - 6;
}
#endif

// The stacks of one block. They go back to a pool, as fresh pages are slow.
class Stacks {
 public:
  Stacks() {
    {
      const std::lock_guard<std::mutex> lock(pool().mutex);
      if (!pool().free.empty()) {
        memory_ = pool().free.back();
        pool().free.pop_back();
        return;
      }
    }
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for stacks");
    madvise(memory, kMaxThreads * kStack, MADV_NOHUGEPAGE);
    memory_ = static_cast<char*>(memory);
  }
  ~Stacks() {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    pool().free.push_back(memory_);
  }
  Stacks(const Stacks&) = delete;

  char* operator[](size_t i) const { return memory_ + i * kStack; }

 private:
  struct Pool {
    std::mutex mutex;
    std::vector<char*> free;
  };
  static Pool& pool() {
    static auto* pool = new Pool;
    return *pool;
  }
  char* memory_;
};

enum class At { kRunning, kBlockBarrier, kGridArrive, kGridWait, kWarpBarrier, kShuffle, kVote, kExited };

// To shared memory, behind the back of its thread.
struct Copy {
  char* to;
  const char* from;
  size_t size, wanted;  // past the wanted bytes come zeros
};

struct Fiber {
  Context context;
  uint3 thread;
  At at;
  int line;         // of the source, at a barrier of the block or grid
  unsigned mask;    // lanes that take part in a warp operation
  unsigned source;  // lane that a shuffle reads
  uint64_t value;   // what this lane brings
  uint64_t result;
  std::vector<std::vector<Copy>> copies;  // on their way: those of each commit, and those not committed
};

// What the blocks of a launch share.
struct Grid {
  dim3 blocks, threads;
  bool cooperative;
  unsigned seed;
  std::function<void()> kernel;

  std::mutex mutex{};
  std::condition_variable changed{};
  uint64_t arrived = 0;              // blocks, in this phase of the barrier
  uint64_t phase = 0;
  uint64_t last_phase = UINT64_MAX;  // that blocks which have ended allow

  void arrive() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (++arrived < volume(blocks)) return;
    arrived = 0;
    ++phase;
    changed.notify_all();
  }
  void end(uint64_t arrivals) {
    const std::lock_guard<std::mutex> lock(mutex);
    last_phase = std::min(last_phase, arrivals);
    changed.notify_all();
  }
  bool wait(uint64_t past) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return phase > past || last_phase <= past; });
    return phase > past;
  }
};

class Block;
inline thread_local Block* here = nullptr;

std::string who_is_here();

inline void check_aligned(const void* p, size_t size) {
  if (reinterpret_cast<uintptr_t>(p) % size == 0) return;
  fail("misaligned access of " + std::to_string(size) + " bytes by " + who_is_here());
}

class Block {
 public:
  explicit Block(Grid& grid) : grid(grid), fibers_(volume(grid.threads)), warps_((fibers_.size() + kWarp - 1) / kWarp) {
    here = this;  // before the search: it makes this thread's copy of the module's variables
    dl_iterate_phdr(find_thread_locals, this);
    std::iota(warps_.begin(), warps_.end(), 0u);
  }

  void run(uint64_t block_rank) {
    rank = block_rank;
    index = place(rank, grid.blocks);
    random_.seed(grid.seed * 2654435761u + static_cast<unsigned>(rank) + 1);
    arrivals_ = waits_ = 0;
    // Shared memory is not initialised: NaN, or -1. All thread-local variables of the module go with it.
    if (thread_locals_) std::memset(thread_locals_, 0xff, thread_locals_size_);
    here = this;
    for (size_t i = 0; i < fibers_.size(); ++i) {
      fibers_[i].thread = place(i, grid.threads);
      fibers_[i].at = At::kRunning;
      fibers_[i].copies.assign(1, {});
      ASAN_UNPOISON_MEMORY_REGION(stacks_[i], kStack);  // the frames of a fiber that has exited without returning
      *reinterpret_cast<uint64_t*>(stacks_[i]) = kCanary;
      prepare(&fibers_[i].context, stacks_[i], start);
    }
    do {
      // A warp runs as far as it gets alone: with either order of any two, a missing barrier shows.
      std::shuffle(warps_.begin(), warps_.end(), random_);
      for (unsigned warp : warps_) {
        do run_lanes(warp);
        while (end_warp_operations(warp));
      }
    } while (end_block_barrier());
    if (grid.cooperative) grid.end(arrivals_);
  }

  // Called by fibers.
  uint64_t stop(At at, int line) {
    running->at = at;
    running->line = line;
    switch_context(&running->context, &scheduler_);
    return running->result;
  }
  uint64_t warp_operation(At at, unsigned mask, uint64_t value, unsigned source = 0) {
    running->mask = mask;
    running->value = value;
    running->source = source;
    if (!(mask >> lane() & 1)) fail(who() + " is not in the mask of its warp operation");
    return stop(at, 0);
  }
  // Until it is waited for, a copy's place holds NaN, or -1.
  void copy(void* to, const void* from, size_t size, size_t wanted, Eviction eviction) {
    check_aligned(to, size);
    check_aligned(from, size);
    if (wanted > size) fail(who() + " copies more bytes than there is room for");
    count(from, wanted, false, eviction);
    std::memset(to, 0xff, size);
    running->copies.back().push_back({static_cast<char*>(to), static_cast<const char*>(from), size, wanted});
  }
  void commit_copies() { running->copies.emplace_back(); }
  void wait_for_copies(size_t newest) {
    auto& copies = running->copies;
    while (copies.size() - 1 > newest) {
      for (const Copy& copy : copies.front()) {
        std::memset(copy.to, 0, copy.size);
        std::memcpy(copy.to, copy.from, copy.wanted);
      }
      copies.erase(copies.begin());
    }
  }
  unsigned thread_rank() const { return static_cast<unsigned>(running - fibers_.data()); }
  unsigned lane() const { return thread_rank() % kWarp; }
  std::string who() const { return "block " + text(index) + ", thread " + text(running->thread); }

  Grid& grid;
  uint64_t rank = 0;
  uint3 index{};
  Fiber* running = nullptr;

 private:
  static void start() {
    here->grid.kernel();
    for (const auto& commit : here->running->copies)
      if (!commit.empty()) fail(here->who() + " has exited before its copies to shared memory have arrived");
    here->stop(At::kExited, 0);
  }

  static int find_thread_locals(dl_phdr_info* module, size_t, void* self) {
    auto* block = static_cast<Block*>(self);
    char *begin = static_cast<char*>(module->dlpi_tls_data), *mine = reinterpret_cast<char*>(&here);
    for (int i = 0; begin && i < module->dlpi_phnum; ++i) {
      const auto& part = module->dlpi_phdr[i];
      if (part.p_type != PT_TLS || mine < begin || mine >= begin + part.p_memsz) continue;
      block->thread_locals_ = begin;
      block->thread_locals_size_ = part.p_memsz;
      return 1;
    }
    return 0;
  }

  unsigned lanes(unsigned warp) const {
    return static_cast<unsigned>(std::min<size_t>(kWarp, fibers_.size() - warp * kWarp));
  }

  void run_lanes(unsigned warp) {
    unsigned order[kWarp];
    std::iota(order, order + lanes(warp), warp * kWarp);
    std::shuffle(order, order + lanes(warp), random_);
    for (unsigned k = 0; k < lanes(warp); ++k) {
      running = &fibers_[order[k]];
      if (running->at != At::kRunning) continue;
      switch_context(&scheduler_, &running->context);
      if (*reinterpret_cast<uint64_t*>(stacks_[order[k]]) != kCanary) fail(who() + " needs more than 64 KB of stack");
    }
  }

  // Lets go on those lanes whose whole mask is at the same operation (or has exited). False if there are none.
  bool end_warp_operations(unsigned warp) {
    Fiber* lane = &fibers_[warp * kWarp];
    bool any = false;
    for (unsigned first = 0; first < lanes(warp); ++first) {
      const At at = lane[first].at;
      const unsigned mask = lane[first].mask;
      if (at != At::kWarpBarrier && at != At::kShuffle && at != At::kVote) continue;
      unsigned arrived = 0, missing = 0;
      uint64_t votes = 0;
      for (unsigned i = 0; i < lanes(warp); ++i) {
        if (!(mask >> i & 1) || lane[i].at == At::kExited) continue;
        const bool there = lane[i].at == at && lane[i].mask == mask;
        (there ? arrived : missing) |= 1u << i;
        if (there && lane[i].value) votes |= uint64_t{1} << i;
      }
      if (missing) continue;
      for (unsigned i = 0; i < lanes(warp); ++i) {
        if (!(arrived >> i & 1)) continue;
        const bool present = arrived >> lane[i].source & 1;  // else the result is undefined: NaN
        lane[i].result = at == At::kVote ? votes : present ? lane[lane[i].source].value : ~uint64_t{0};
        lane[i].at = At::kRunning;
      }
      any = true;
    }
    return any;
  }

  // All threads wait or have exited. False if all have exited.
  bool end_block_barrier() {
    const Fiber* first = nullptr;
    for (const Fiber& fiber : fibers_) {
      if (fiber.at == At::kExited) continue;
      if (!first) first = &fiber;
      if (fiber.at != first->at || fiber.line != first->line) fail_divergent();
    }
    if (!first) return false;
    if (first->at == At::kGridArrive || first->at == At::kGridWait) end_grid_barrier(first->at);
    else if (first->at != At::kBlockBarrier) fail_divergent();
    for (Fiber& fiber : fibers_)
      if (fiber.at != At::kExited) fiber.at = At::kRunning;
    return true;
  }

  // As on hardware: thread 0 acts for its block, and only its token counts.
  void end_grid_barrier(At at) {
    const std::string me = "block " + text(index) + " of " + std::to_string(volume(grid.blocks));
    if (fibers_[0].at == At::kExited) fail(me + ": thread 0 has exited before a grid barrier");
    for (Fiber& fiber : fibers_) fiber.result = 0;
    if (at == At::kGridArrive) {
      if (arrivals_ > waits_) fail(me + " arrives twice at a grid barrier without a wait");
      fibers_[0].result = static_cast<unsigned>(arrivals_++);
      grid.arrive();
      return;
    }
    if (arrivals_ == waits_) fail(me + " waits at a grid barrier without having arrived");
    if (fibers_[0].value != static_cast<unsigned>(waits_)) fail(me + " waits at a grid barrier with a wrong token");
    if (!grid.wait(waits_++)) fail(me + " waits at a grid barrier to which another block, now ended, never came");
  }

  [[noreturn]] void fail_divergent() const {
    static const char* const names[] = {"running",      "at __syncthreads", "at the arrival of a grid barrier",
                                        "in the wait of a grid barrier", "at __syncwarp",
                                        "at a shuffle", "at a vote",        "exited"};
    std::string what = "deadlock in block " + text(index) + " of " + std::to_string(fibers_.size()) + " threads:";
    std::vector<bool> told(fibers_.size());
    for (size_t i = 0; i < fibers_.size(); ++i) {
      size_t count = 0;
      for (size_t j = i; !told[i] && j < fibers_.size(); ++j) {
        if (fibers_[j].at != fibers_[i].at || fibers_[j].line != fibers_[i].line) continue;
        count += 1;
        if (j > i) told[j] = true;
      }
      if (told[i]) continue;
      what += (i ? ", " : " ") + std::to_string(count) + " " + names[static_cast<int>(fibers_[i].at)];
      if (fibers_[i].line) what += " (line " + std::to_string(fibers_[i].line) + ")";
      what += " from thread " + text(fibers_[i].thread) + " on";
    }
    fail(what);
  }

  Stacks stacks_;
  std::vector<Fiber> fibers_;
  std::vector<unsigned> warps_;
  Context scheduler_{};
  std::minstd_rand random_;
  uint64_t arrivals_ = 0, waits_ = 0;  // at the grid barrier
  void* thread_locals_ = nullptr;
  size_t thread_locals_size_ = 0;
};

inline std::string who_is_here() { return here ? here->who() : "the host"; }

inline void launch(dim3 blocks, dim3 threads, bool cooperative, std::function<void()> kernel) {
  ++(cooperative ? cooperative_launches : ordinary_launches);
  const auto seed = static_cast<unsigned>(setting("CUDA_EMULATOR_SEED", 0));
  Grid grid{blocks, threads, cooperative, seed, std::move(kernel)};
  std::vector<uint64_t> order(volume(blocks));
  std::iota(order.begin(), order.end(), uint64_t{0});
  std::shuffle(order.begin(), order.end(), std::minstd_rand(seed + 1));
  std::vector<std::thread> workers;
  if (cooperative)
    for (uint64_t rank : order) workers.emplace_back([&grid, rank] { Block(grid).run(rank); });
  else
    workers.emplace_back([&] {
      Block block(grid);
      for (uint64_t rank : order) block.run(rank);
    });
  for (std::thread& worker : workers) worker.join();
}

}  // namespace cuda_emulator

#pragma GCC visibility pop

// For tests, by ctypes. Watches [begin, begin + size) from now on; without it nothing.
extern "C" __attribute__((visibility("default"), weak)) void cuda_emulator_watch(const char* begin, size_t size,
                                                                                 uint8_t* counts) {
  if (begin) cuda_emulator::watches.push_back({begin, size, counts});
  else cuda_emulator::watches.clear();
}
extern "C" __attribute__((visibility("default"), weak)) int cuda_emulator_launches(bool cooperative) {
  return cooperative ? cuda_emulator::cooperative_launches : cuda_emulator::ordinary_launches;
}
