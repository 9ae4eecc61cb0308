// The grid group with its split barrier, and the thread block.
#pragma once

#include "cuda_runtime.h"

#pragma GCC visibility push(hidden)

namespace cooperative_groups {

class grid_group {
 public:
  using arrival_token = unsigned;

  bool is_valid() const { return cuda_emulator::here->grid.cooperative; }

  arrival_token barrier_arrive(int line = __builtin_LINE()) const {
    if (!is_valid()) cuda_emulator::fail("a grid barrier needs a cooperative launch");
    return static_cast<unsigned>(cuda_emulator::here->stop(cuda_emulator::At::kGridArrive, line));
  }
  void barrier_wait(arrival_token&& token, int line = __builtin_LINE()) const {
    if (!is_valid()) cuda_emulator::fail("a grid barrier needs a cooperative launch");
    cuda_emulator::here->running->value = token;
    cuda_emulator::here->stop(cuda_emulator::At::kGridWait, line);
  }
  void sync(int line = __builtin_LINE()) const { barrier_wait(barrier_arrive(line), line); }

  static unsigned long long block_rank() { return cuda_emulator::here->rank; }
  static unsigned long long num_blocks() { return cuda_emulator::volume(gridDim); }
  static unsigned long long num_threads() { return num_blocks() * cuda_emulator::volume(blockDim); }
  static unsigned long long size() { return num_threads(); }
  static unsigned long long thread_rank() {
    return block_rank() * cuda_emulator::volume(blockDim) + cuda_emulator::here->thread_rank();
  }
};

class thread_block {
 public:
  static void sync(int line = __builtin_LINE()) { __syncthreads(line); }
  static unsigned thread_rank() { return cuda_emulator::here->thread_rank(); }
  static unsigned num_threads() { return static_cast<unsigned>(cuda_emulator::volume(blockDim)); }
  static unsigned size() { return num_threads(); }
};

inline grid_group this_grid() { return {}; }
inline thread_block this_thread_block() { return {}; }

}  // namespace cooperative_groups

#pragma GCC visibility pop
