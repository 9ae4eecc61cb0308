// Fixed-width vectors on the compiler's vector extensions: float arithmetic, bfloat16 storage, sign bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Internal linkage: each unit that includes this is compiled for another instruction set, and the
// linker must not merge their functions.
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t bits;
};

inline Floats broadcast(float value) { return Floats{} + value; }

inline Floats decode(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Floats decode(const BFloat16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Floats)(__builtin_convertvector(h, Words) << 16);
}

inline void encode(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline void encode(BFloat16* p, Floats v) {
  const Words w = (Words)v;
  const Words even = (w + 0x7fff + ((w >> 16) & 1)) >> 16;  // round to nearest even
  const Words nan = (w >> 16) | 0x40;                       // rounding could turn a NaN into infinity
  const Words rounded = v == v ? even : nan;
#if defined(__AVX2__) && !defined(__AVX512F__)  // the compiler's own conversion is slow here
  const __m256i packed = _mm256_packus_epi32((__m256i)rounded, (__m256i)rounded);
  const __m128i h = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
#else
  const Halves h = __builtin_convertvector(rounded, Halves);
#endif
  std::memcpy(p, &h, sizeof h);
}

// memcpy of fewer than kLanes values, in powers of two that the compiler turns into single moves.
template <class T>
inline void copy_few(T* to, const T* from, int count) {
#pragma GCC unroll 4
  for (int size = kLanes / 2; size > 0; size /= 2)
    if (count & size) {
      std::memcpy(to, from, size * sizeof(T));
      to += size;
      from += size;
    }
}

// Loads and stores of the first `count` lanes; absent lanes read as zero.
template <class T>
inline Floats load(const T* p, int count = kLanes) {
  if (count == kLanes) return decode(p);
  T padded[kLanes] = {};
  copy_few(padded, p, count);
  return decode(padded);
}

template <class T>
inline void store(T* p, Floats v, int count = kLanes) {
  if (count == kLanes) return encode(p, v);
  T padded[kLanes];
  encode(padded, v);
  copy_few(p, padded, count);
}

inline Ints lane_bits() {
  Ints v = {};
  for (int i = 0; i < kLanes; ++i) v[i] = 1 << i;
  return v;
}

// The first `count` lanes of a comparison as packed bits, lane 0 lowest.
inline void store_bits(uint8_t* p, Ints mask, int count = kLanes) {
#if defined(__AVX512F__)
  const unsigned bits = _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  const unsigned bits = _mm256_movemask_ps((__m256)mask);
#else
  const Ints lanes = mask & lane_bits();
  unsigned bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= lanes[i];
#endif
  p[0] = bits;
  if (kLanes > 8 && count > 8) p[1] = bits >> 8;
}

inline Ints load_bits(const uint8_t* p, int count = kLanes) {
  int bits = p[0];
  if (kLanes > 8 && count > 8) bits |= p[1] << 8;
  return ((Ints{} + bits) & lane_bits()) != 0;
}

inline Floats zero_unless(Ints mask, Floats v) { return (Floats)((Ints)v & mask); }

// The first `count` lanes of v, the others zero.
inline Floats first(Floats v, int count) {
  return count == kLanes ? v : zero_unless(((Ints{} + ((1 << count) - 1)) & lane_bits()) != 0, v);
}

inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// Calls f(start, count) for [begin, end) in steps of one vector; only the last count may be short.
template <class F>
inline __attribute__((always_inline)) void for_vectors(int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(i, kLanes);
  if (i < end) f(i, static_cast<int>(end - i));
}

}  // namespace
