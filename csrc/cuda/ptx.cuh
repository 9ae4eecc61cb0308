// Instructions that CUDA C++ has no function for. tests/cuda_emulator has a file in place of this one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace twins_fast {
namespace {

// When the second-level cache lets go of what an access touches: as it thinks best, or before all else. Where threads
// of a warp differ, all get that of one of them.
using Eviction = uint64_t;

__device__ __forceinline__ Eviction evict_normal() {
  Eviction policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ Eviction evict_first() {
  Eviction policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

template <class T>
__device__ __forceinline__ void store_hinted(T* p, T v, Eviction policy) {
  if constexpr (sizeof(T) == 16) {
    const uint4 q = reinterpret_cast<uint4&>(v);
    asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(p), "r"(q.x), "r"(q.y), "r"(q.z),
                 "r"(q.w), "l"(policy)
                 : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.global.L2::cache_hint.f32 [%0], %1, %2;" ::"l"(p), "f"(reinterpret_cast<float&>(v)), "l"(policy)
                 : "memory");
  } else if constexpr (sizeof(T) == 2) {
    asm volatile("st.global.L2::cache_hint.u16 [%0], %1, %2;" ::"l"(p), "h"(reinterpret_cast<unsigned short&>(v)),
                 "l"(policy)
                 : "memory");
  } else {
    static_assert(sizeof(T) == 1);
    asm volatile("st.global.L2::cache_hint.u8 [%0], %1, %2;" ::"l"(p), "h"(static_cast<unsigned short>(v)), "l"(policy)
                 : "memory");
  }
}

// Not to be computed again at each use.
__device__ __forceinline__ void keep_in_register(int64_t& v) { asm volatile("" : "+l"(v)); }

// An address in shared memory, kept rather than computed again at each use.
using Shared = unsigned;

__device__ __forceinline__ Shared shared_address(const void* p) {
  Shared address;
  asm volatile("mov.u32 %0, %1;" : "=r"(address) : "r"(static_cast<unsigned>(__cvta_generic_to_shared(p))));
  return address;
}

__device__ __forceinline__ uint4 load_piece(Shared p) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(p)
               : "memory");
  return v;
}

__device__ __forceinline__ unsigned load_word(Shared p) {
  unsigned v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(p) : "memory");
  return v;
}

// 16 bytes, in shared memory once the commit after it has been waited for.
__device__ __forceinline__ void copy_piece(Shared to, const void* global, Eviction policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "l"(policy)
               : "memory");
}

// 4 bytes, of which the first `bytes` are copied and the others 0.
__device__ __forceinline__ void copy_word(Shared to, const void* global, int bytes, Eviction policy) {
  asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], 4, %2, %3;" ::"r"(to), "l"(global), "r"(bytes),
               "l"(policy)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all of this thread's commits but the newest kNewest.
template <int kNewest>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

}  // namespace
}  // namespace twins_fast
