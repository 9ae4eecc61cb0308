// In place of csrc/cuda/ptx.cuh: its functions on the emulated device.
#pragma once

#include <cuda_runtime.h>

namespace twins_fast {
namespace {

using Eviction = cuda_emulator::Eviction;

inline Eviction evict_normal() { return Eviction::kNormal; }
inline Eviction evict_first() { return Eviction::kFirst; }

template <class T>
void store_hinted(T* p, T v, Eviction eviction) {
  cuda_emulator::store(p, v, eviction);
}

inline void keep_in_register(int64_t&) {}

using Shared = char*;

template <class T>
Shared shared_address(T* p) {
  return reinterpret_cast<Shared>(p);
}
inline uint4 load_piece(Shared p) { return cuda_emulator::load(reinterpret_cast<uint4*>(p)); }
inline unsigned load_word(Shared p) { return cuda_emulator::load(reinterpret_cast<unsigned*>(p)); }

inline void copy_piece(Shared to, const void* global, Eviction eviction) {
  cuda_emulator::here->copy(to, global, 16, 16, eviction);
}
inline void copy_word(Shared to, const void* global, int bytes, Eviction eviction) {
  cuda_emulator::here->copy(to, global, 4, bytes, eviction);
}
inline void commit_copies() { cuda_emulator::here->commit_copies(); }
template <int kNewest>
void wait_for_copies() {
  cuda_emulator::here->wait_for_copies(kNewest);
}

}  // namespace
}  // namespace twins_fast
