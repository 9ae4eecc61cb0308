// Fixed-width vectors on the compiler's vector extensions: float arithmetic, half-precision storage, sign bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

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

struct Float16 {
  uint16_t bits;
};

inline Floats broadcast(float value) { return value - Floats{}; }  // keeps -0, as a sum would not

#if defined(__AVX512F__)  // the compiler's own conversion takes several steps
inline Words extend(Halves h) { return (Words)_mm512_cvtepu16_epi32((__m256i)h); }
#elif defined(__AVX2__)
inline Words extend(Halves h) { return (Words)_mm256_cvtepu16_epi32((__m128i)h); }
#else
inline Words extend(Halves h) { return __builtin_convertvector(h, Words); }
#endif

inline Floats as_floats(BFloat16, Halves h) { return (Floats)(extend(h) << 16); }

inline Halves narrow(BFloat16, Floats v) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
  const Words w = (Words)v;
  const Words even = (w + 0x7fff + ((w >> 16) & 1)) >> 16;  // round to nearest even
  const Words nan = (w >> 16) | 0x40;                       // rounding could turn a NaN into infinity
  const Words rounded = v == v ? even : nan;
#if defined(__AVX2__) && !defined(__AVX512F__)  // the compiler's own conversion is slow here
  const __m256i packed = _mm256_packus_epi32((__m256i)rounded, (__m256i)rounded);
  return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
#else
  return __builtin_convertvector(rounded, Halves);
#endif
#endif
}

#if defined(__AVX512F__)
inline Floats as_floats(Float16, Halves h) { return (Floats)_mm512_cvtph_ps((__m256i)h); }
inline Halves narrow(Float16, Floats v) { return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
inline Floats as_floats(Float16, Halves h) { return (Floats)_mm256_cvtph_ps((__m128i)h); }
inline Halves narrow(Float16, Floats v) { return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
inline Floats as_floats(Float16, Halves h) {
  const Words w = __builtin_convertvector(h, Words);
  const Words magnitude = (w & 0x7fff) << 13;
  // Moving the exponent's bias by a product also makes subnormal numbers right.
  const Words finite = (Words)((Floats)magnitude * 0x1p112f);
  return (Floats)((magnitude >= 0x7c00 << 13 ? magnitude | 0x7f800000 : finite) | (w & 0x8000) << 16);
}
inline Halves narrow(Float16, Floats v) {
  const Words w = (Words)v, magnitude = w & 0x7fffffff;
  const Words normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 the sum with 0.5 rounds at the unit of subnormal numbers.
  const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000;
  Words half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? Words{} + 0x7c00 : half;             // rounds to 65536 or more
  half = magnitude > 0x7f800000 ? (magnitude >> 13 & 0x3ff) | 0x7e00 : half;  // NaN
  return __builtin_convertvector(half | (w >> 16 & 0x8000), Halves);
}
#endif

inline Floats decode(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline Floats decode(const T* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return as_floats(T{}, h);
}

inline void encode(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

template <class T>
inline void encode(T* p, Floats v) {
  const Halves h = narrow(T{}, v);
  std::memcpy(p, &h, sizeof h);
}

// Past the caches, where the instruction set can; p is aligned to the vector that is written.
#if defined(__AVX512F__)
inline void encode_past(float* p, Floats v) { _mm512_stream_ps(p, (__m512)v); }
template <class T>
inline void encode_past(T* p, Floats v) {
  _mm256_stream_si256((__m256i*)p, (__m256i)narrow(T{}, v));
}
inline void fence_past() { _mm_sfence(); }
#elif defined(__AVX2__)
inline void encode_past(float* p, Floats v) { _mm256_stream_ps(p, (__m256)v); }
template <class T>
inline void encode_past(T* p, Floats v) {
  encode(p, v);
}
inline void fence_past() { _mm_sfence(); }
#else
template <class T>
inline void encode_past(T* p, Floats v) {
  encode(p, v);
}
inline void fence_past() {}
#endif

#if defined(__AVX512F__)
using Lanes = __mmask16;
inline Lanes first_lanes(int count) { return (1u << count) - 1; }

inline Floats decode_some(const float* p, int count) { return (Floats)_mm512_maskz_loadu_ps(first_lanes(count), p); }
inline void encode_some(float* p, Floats v, int count) { _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)v); }

template <class T>
inline Floats decode_some(const T* p, int count) {
  return as_floats(T{}, (Halves)_mm256_maskz_loadu_epi16(first_lanes(count), p));
}

template <class T>
inline void encode_some(T* p, Floats v, int count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), (__m256i)narrow(T{}, v));
}
#else
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

template <class T>
inline Floats decode_some(const T* p, int count) {
  T padded[kLanes] = {};
  copy_few(padded, p, count);
  return decode(padded);
}

template <class T>
inline void encode_some(T* p, Floats v, int count) {
  T padded[kLanes];
  encode(padded, v);
  copy_few(p, padded, count);
}
#endif

// Loads and stores of the first `count` lanes; absent lanes read as zero.
template <class T>
inline Floats load(const T* p, int count = kLanes) {
  return count == kLanes ? decode(p) : decode_some(p, count);
}

template <class T>
inline void store(T* p, Floats v, int count = kLanes) {
  return count == kLanes ? encode(p, v) : encode_some(p, v, count);
}

// Lane i of the result is lane `lanes[i]` of v.
inline Floats permute(Floats v, Ints lanes) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)lanes, (__m512)v);
#elif defined(__AVX2__)
  return (Floats)_mm256_permutevar8x32_ps((__m256)v, (__m256i)lanes);
#else
  Floats result;
  for (int i = 0; i < kLanes; ++i) result[i] = v[lanes[i]];
  return result;
#endif
}

// Which lanes: a mask register, or all bits of a lane.
#if defined(__AVX512F__)
using Mask = __mmask16;
inline Mask first_of(int count) { return first_lanes(count); }
inline Mask not_below_or_zero(Floats v) { return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NLE_UQ); }
inline Floats keep(Mask mask, Floats v) { return (Floats)_mm512_maskz_mov_ps(mask, (__m512)v); }
inline Mask above_or_nan(Floats v, Floats than) {
  const __m512 a = (__m512)v;
  return _mm512_cmp_ps_mask(a, (__m512)than, _CMP_GT_OQ) | _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
}
inline Floats select(Mask mask, Floats yes, Floats no) {
  return (Floats)_mm512_mask_mov_ps((__m512)no, mask, (__m512)yes);
}
inline Ints select(Mask mask, Ints yes, Ints no) {
  return (Ints)_mm512_mask_mov_epi32((__m512i)no, mask, (__m512i)yes);
}
inline unsigned packed(Mask mask) { return mask; }
inline Mask unpacked(unsigned bits) { return bits; }
#else
using Mask = Ints;
inline Ints lane_bits() {
  Ints v = {};
  for (int i = 0; i < kLanes; ++i) v[i] = 1 << i;
  return v;
}
inline Mask unpacked(unsigned bits) { return ((Ints{} + static_cast<int>(bits)) & lane_bits()) != 0; }
inline Mask first_of(int count) { return unpacked((1u << count) - 1); }
inline Mask not_below_or_zero(Floats v) { return ~(v <= 0.0f); }
inline Floats keep(Mask mask, Floats v) { return (Floats)((Ints)v & mask); }
inline Mask above_or_nan(Floats v, Floats than) { return (v > than) | (v != v); }
inline Floats select(Mask mask, Floats yes, Floats no) { return mask ? yes : no; }
inline Ints select(Mask mask, Ints yes, Ints no) { return mask ? yes : no; }
inline unsigned packed(Mask mask) {
#if defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask);
#else
  const Ints lanes = mask & lane_bits();
  unsigned bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= lanes[i];
  return bits;
#endif
}
#endif

// A mask of the first `count` lanes as packed bits, lane 0 lowest.
inline void store_bits(uint8_t* p, Mask mask, int count = kLanes) {
  const unsigned bits = packed(mask) & ((1u << count) - 1);
  p[0] = bits;
  if (kLanes > 8 && count > 8) p[1] = bits >> 8;
}

inline Mask load_bits(const uint8_t* p, int count = kLanes) {
  unsigned bits = p[0];
  if (kLanes > 8 && count > 8) bits |= p[1] << 8;
  return unpacked(bits);
}

using Bytes = uint8_t __attribute__((vector_size(kLanes)));

// Small integers as bytes.
inline void store_bytes(uint8_t* p, Ints v, int count) {
  const Bytes bytes = __builtin_convertvector(v, Bytes);
  std::memcpy(p, &bytes, count);
}

inline Mask equal_bytes(const uint8_t* p, int value, int count) {
#if defined(__AVX512F__)
  const __m128i wanted = _mm_set1_epi8(static_cast<char>(value));
  return _mm_mask_cmpeq_epi8_mask(first_lanes(count), _mm_maskz_loadu_epi8(first_lanes(count), p), wanted);
#else
  Bytes bytes = {};
  std::memcpy(&bytes, p, count);
  return __builtin_convertvector(bytes, Ints) == value;
#endif
}

// The first `count` lanes of v, the others zero.
inline Floats first(Floats v, int count) { return count == kLanes ? v : keep(first_of(count), v); }

inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// The same in a few steps.
inline float sum_in_halves(Floats v) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
    Floats upper = {};
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) upper[i] = v[i + half];
    v += upper;
  }
  return v[0];
}

// To whole cache lines that are not read soon: past the caches. Other threads see it after publish().
inline void stream(float* p, Floats v) {
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(p) % 64 == 0) return _mm512_stream_ps(p, (__m512)v);
#endif
  store(p, v);
}

inline void publish() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// At most 64 bytes; zeros where `from` is null.
inline void copy_bytes(void* to, const void* from, int count) {
#if defined(__AVX512BW__)
  const __mmask64 mask = count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
  _mm512_mask_storeu_epi8(to, mask, from ? _mm512_maskz_loadu_epi8(mask, from) : _mm512_setzero_si512());
#else
  if (from) std::memcpy(to, from, count);
  else std::memset(to, 0, count);
#endif
}

// Calls f(start, count) for [begin, end) in steps of one vector; only the last count may be short.
template <class F>
inline __attribute__((always_inline)) void for_vectors(int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(i, kLanes);
  if (i < end) f(i, static_cast<int>(end - i));
}

// Calls f(start, vectors, count) for [0, end): kBlock whole vectors at a time while they last, then single ones.
// `vectors` is a constant of the type.
template <int kBlock, class F>
inline __attribute__((always_inline)) void for_blocks(int64_t end, F&& f) {
  int64_t i = 0;
  for (; i + kBlock * kLanes <= end; i += kBlock * kLanes) f(i, std::integral_constant<int, kBlock>{}, kLanes);
  for_vectors(i, end, [&](int64_t j, int n) { f(j, std::integral_constant<int, 1>{}, n); });
}

// Calls f(k) for each k below kCount, without a loop: arrays indexed by k then stay in registers.
template <int kCount, class F>
inline __attribute__((always_inline)) void for_each(F&& f) {
  if constexpr (kCount > 0) {
    for_each<kCount - 1>(f);
    f(kCount - 1);
  }
}

}  // namespace
