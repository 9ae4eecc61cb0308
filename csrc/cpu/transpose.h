// Blocks of a matrix with rows and columns exchanged.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace twins_fast {
namespace {  // as in simd.h

// A matrix [rows, columns] whose rows are `stride` apart, as columns of one vector each that are `step` apart; absent
// rows are zero.
inline void transpose(const float* from, int64_t stride, int rows, int64_t columns, float* to, int64_t step = kLanes) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for_vectors(0, columns, [=](int64_t first, int count) {
    __m512 v[16], w[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = i < rows ? (__m512)load(from + i * stride + first, count) : _mm512_setzero_ps();
    // Four perfect shuffles of the rows.
    const auto shuffle = [=](const __m512(&in)[16], __m512(&out)[16]) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        out[2 * i] = _mm512_permutex2var_ps(in[i], low, in[i + 8]);
        out[2 * i + 1] = _mm512_permutex2var_ps(in[i], high, in[i + 8]);
      }
    };
    shuffle(v, w);
    shuffle(w, v);
    shuffle(v, w);
    shuffle(w, v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (i < count) store(to + (first + i) * step, (Floats)v[i]);
  });
#elif defined(__AVX2__)
  for_vectors(0, columns, [=](int64_t first, int count) {
    __m256 v[8], w[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) v[i] = i < rows ? (__m256)load(from + i * stride + first, count) : _mm256_setzero_ps();
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {  // 4x4 in each half of the registers
      const __m256 a = _mm256_unpacklo_ps(v[i], v[i + 1]), b = _mm256_unpackhi_ps(v[i], v[i + 1]);
      const __m256 c = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
      w[i] = _mm256_shuffle_ps(a, c, 0x44);
      w[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
      w[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
      w[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (i < count) store(to + (first + i) * step, (Floats)_mm256_permute2f128_ps(w[i], w[i + 4], 0x20));
      if (i + 4 < count) store(to + (first + i + 4) * step, (Floats)_mm256_permute2f128_ps(w[i], w[i + 4], 0x31));
    }
  });
#else
  for (int64_t j = 0; j < columns; ++j)
    for (int i = 0; i < kLanes; ++i) to[j * step + i] = i < rows ? from[i * stride + j] : 0;
#endif
}

#if defined(__AVX512BF16__)
// The same of a matrix of bfloat16 whose rows come in pairs, as Pairs::step makes them: `rows` such pairs, `columns` of
// which there are whole vectors to read, and pairs of columns in the result.
inline void transpose_pairs(const float* from, int64_t stride, int rows, int64_t columns, float* to, int64_t step) {
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i high = _mm512_add_epi64(low, _mm512_set1_epi64(4));
  const __m512i halves = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  for (int64_t first = 0; first < columns; first += kLanes) {
    __m512i v[8], w[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) v[i] = i < rows ? _mm512_loadu_si512(from + i * stride + first) : _mm512_setzero_si512();
    // Three perfect shuffles of the rows, two columns at a time.
    const auto shuffle = [=](const __m512i(&in)[8], __m512i(&out)[8]) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        out[2 * i] = _mm512_permutex2var_epi64(in[i], low, in[i + 4]);
        out[2 * i + 1] = _mm512_permutex2var_epi64(in[i], high, in[i + 4]);
      }
    };
    shuffle(v, w);
    shuffle(w, v);
    shuffle(v, w);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      if (first + 2 * i < columns)
        _mm512_storeu_si512(to + (first / 2 + i) * step, _mm512_shuffle_epi8(w[i], halves));
  }
}
#endif

}  // namespace
}  // namespace twins_fast
