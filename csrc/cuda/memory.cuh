// Groups of neighbouring values, loaded and stored.
#pragma once

#include <cuda_runtime.h>

namespace twins_fast {
namespace {

constexpr int kGroup = 8;                      // neighbouring values that one thread handles: one byte of bits
constexpr int kBytesInFlight = 64;             // loads of a thread ahead of their use

template <class T>
struct alignas(16) Group {
  T values[kGroup];
};

// Lines that are used once should not push out those that are read again after the barrier.
enum class Use { kAgain, kOnce };

// kWhole: all groups are full and aligned to 16 bytes, so that they move as such.
template <bool kWhole, Use kUse, class T>
__device__ __forceinline__ Group<T> load(const T* p, int count) {
  Group<T> group;
  if constexpr (kWhole) {
    constexpr int kQuads = sizeof(Group<T>) / sizeof(uint4);
    union {
      uint4 quads[kQuads];
      Group<T> group;
    } bytes;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const uint4* quad = reinterpret_cast<const uint4*>(p) + i;
      bytes.quads[i] = kUse == Use::kOnce ? __ldcs(quad) : *quad;
    }
    group = bytes.group;
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) group.values[i] = i < count ? p[i] : static_cast<T>(0.f);
  }
  return group;
}

template <bool kWhole, Use kUse, class T>
__device__ __forceinline__ void store(T* p, int count, const float (&v)[kGroup]) {
  if constexpr (kWhole) {
    constexpr int kQuads = sizeof(Group<T>) / sizeof(uint4);
    union {
      uint4 quads[kQuads];
      Group<T> group;
    } bytes;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) bytes.group.values[i] = static_cast<T>(v[i]);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      uint4* quad = reinterpret_cast<uint4*>(p) + i;
      if (kUse == Use::kOnce) __stcs(quad, bytes.quads[i]);
      else *quad = bytes.quads[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (i < count) p[i] = static_cast<T>(v[i]);
  }
}

// Groups of each of kInputs tensors to load ahead.
template <class T, bool kWhole, int kInputs>
constexpr int kAheadOf = kWhole ? kBytesInFlight / static_cast<int>(sizeof(Group<T>)) / kInputs : 1;

}  // namespace
}  // namespace twins_fast
