// Groups of neighbouring values, on their way and stored.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/ptx.cuh"
#include "cuda/tiling.cuh"

namespace twins_fast {
namespace {

// The values of a word.
template <class T>
__device__ __forceinline__ void unpack(unsigned word, float* v) {
  if constexpr (std::is_same_v<T, float>) {
    v[0] = __uint_as_float(word);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the upper half of a float
    v[0] = __uint_as_float(word << 16);
    v[1] = __uint_as_float(word & 0xffff0000u);
  } else {
    v[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
    v[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
  }
}

template <class T>
struct alignas(16) Group {
  static constexpr int kPieces = kGroup * sizeof(T) / sizeof(uint4);
  union {
    uint4 pieces[kPieces];
    T values[kGroup];
  };
};

// Shared memory for what is on its way to the threads of a block; every thread has a column.
struct Ring {
  static constexpr int kBytes = 128;  // of a thread
  union {
    uint4 pieces[kBytes / sizeof(uint4)][kThreads];
    unsigned words[kBytes / sizeof(unsigned)][kThreads];
  };
  static constexpr int kMostBits = 4;
  unsigned bits[kMostBits][kThreads];
};

// The next kSlots groups of each of kInputs tensors. kWhole: all groups are full and aligned to 16 bytes, so that they
// move as such; else word by word, where one more may be needed for a group of 16-bit values.
template <class T, bool kWhole, int kInputs>
struct Flight {
  static constexpr int kPieces = Group<T>::kPieces, kWords = 4 * kPieces + (sizeof(T) < sizeof(unsigned));
  static constexpr int kRows = kWhole ? kPieces : kWords, kRow = kThreads * (kWhole ? 16 : 4);  // of an input; bytes
  static constexpr int kSlots = Ring::kBytes * kThreads / (kInputs * kRows * kRow);
  static_assert(kInputs < 2 || kSlots <= Ring::kMostBits);
  const Shared column, bits;

  __device__ explicit Flight(Ring& ring)
      : column(kWhole ? shared_address(&ring.pieces[0][threadIdx.x]) : shared_address(&ring.words[0][threadIdx.x])),
        bits(shared_address(&ring.bits[0][threadIdx.x])) {}

  static __device__ __forceinline__ int row(int slot, int input, int i) {
    return ((slot * kInputs + input) * kRows + i) * kRow;
  }

  __device__ __forceinline__ void fetch(int slot, int input, const T* p, int count, Eviction eviction) const {
    if constexpr (kWhole) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        copy_piece(column + row(slot, input, i), reinterpret_cast<const uint4*>(p) + i, eviction);
    } else {
      const int before = kWords == 4 * kPieces ? 0 : reinterpret_cast<uintptr_t>(p) % 4;
      const int bytes = before + count * static_cast<int>(sizeof(T));
      const char* from = reinterpret_cast<const char*>(p) - before;
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        if (4 * i < bytes)
          copy_word(column + row(slot, input, i), from + 4 * i, bytes - 4 * i < 4 ? bytes - 4 * i : 4, eviction);
    }
  }

  // The byte of a group.
  __device__ __forceinline__ void fetch_bits(int slot, const uint8_t* p, Eviction eviction) const {
    const int before = reinterpret_cast<uintptr_t>(p) % 4;
    copy_word(bits + slot * kThreads * 4, p - before, before + 1, eviction);
  }

  __device__ __forceinline__ void commit() const { commit_copies(); }

  // Until the oldest slot is there.
  __device__ __forceinline__ void wait() const { wait_for_copies<kSlots - 1>(); }

  // What was fetched from p; values past its count are not defined.
  __device__ __forceinline__ void take(int slot, int input, const T* p, float (&v)[kGroup]) const {
    unsigned words[4 * kPieces];
    if constexpr (kWhole) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const uint4 piece = load_piece(column + row(slot, input, i));
        words[4 * i] = piece.x;
        words[4 * i + 1] = piece.y;
        words[4 * i + 2] = piece.z;
        words[4 * i + 3] = piece.w;
      }
    } else {
      unsigned all[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i) all[i] = load_word(column + row(slot, input, i));
      const unsigned before = reinterpret_cast<uintptr_t>(p) % 4 * 8;
#pragma unroll
      for (int i = 0; i < 4 * kPieces; ++i)
        words[i] = kWords == 4 * kPieces ? all[i] : __funnelshift_r(all[i], all[i + 1], before);
    }
#pragma unroll
    for (int i = 0; i < 4 * kPieces; ++i) unpack<T>(words[i], v + i * kGroup / (4 * kPieces));
  }

  // Bit 0 is that of the group's first value; those past the eighth are not defined.
  __device__ __forceinline__ unsigned take_bits(int slot, const uint8_t* p) const {
    return load_word(bits + slot * kThreads * 4) >> reinterpret_cast<uintptr_t>(p) % 4 * 8;
  }
};

template <bool kWhole, class T>
__device__ __forceinline__ void store(T* p, int count, const float (&v)[kGroup], Eviction eviction) {
  if constexpr (kWhole) {
    Group<T> group;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) group.values[i] = static_cast<T>(v[i]);
#pragma unroll
    for (int i = 0; i < Group<T>::kPieces; ++i)
      store_hinted(reinterpret_cast<uint4*>(p) + i, group.pieces[i], eviction);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (i < count) store_hinted(p + i, static_cast<T>(v[i]), eviction);
  }
}

}  // namespace
}  // namespace twins_fast
