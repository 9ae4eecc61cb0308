// Tells the address sanitizer what intrinsics read and write, of which it sees nothing. Masks are of the first lanes.
#pragma once

#ifdef __x86_64__
#include <immintrin.h>

extern "C" void __asan_loadN(void*, long), __asan_storeN(void*, long);  // as the compiler itself declares them

namespace {

inline void reads(const void* p, unsigned long mask, int size) {
  __asan_loadN(const_cast<void*>(p), __builtin_popcountl(mask) * size);
}
inline void writes(void* p, unsigned long mask, int size) { __asan_storeN(p, __builtin_popcountl(mask) * size); }
inline void reads_tile(const void* p, long stride) {
  for (int row = 0; row < 16; ++row) __asan_loadN(static_cast<char*>(const_cast<void*>(p)) + row * stride, 64);
}
inline void writes_tile(void* p, long stride) {
  for (int row = 0; row < 16; ++row) __asan_storeN(static_cast<char*>(p) + row * stride, 64);
}

}  // namespace

#define _mm_maskz_loadu_epi8(mask, p) (reads(p, mask, 1), _mm_maskz_loadu_epi8(mask, p))
#define _mm256_maskz_loadu_epi16(mask, p) (reads(p, mask, 2), _mm256_maskz_loadu_epi16(mask, p))
#define _mm512_maskz_loadu_epi8(mask, p) (reads(p, mask, 1), _mm512_maskz_loadu_epi8(mask, p))
#define _mm512_maskz_loadu_epi16(mask, p) (reads(p, mask, 2), _mm512_maskz_loadu_epi16(mask, p))
#define _mm512_maskz_loadu_ps(mask, p) (reads(p, mask, 4), _mm512_maskz_loadu_ps(mask, p))
#define _mm256_mask_storeu_epi16(p, mask, v) (writes(p, mask, 2), _mm256_mask_storeu_epi16(p, mask, v))
#define _mm512_mask_storeu_epi8(p, mask, v) (writes(p, mask, 1), _mm512_mask_storeu_epi8(p, mask, v))
#define _mm512_mask_storeu_ps(p, mask, v) (writes(p, mask, 4), _mm512_mask_storeu_ps(p, mask, v))
#define _mm256_stream_ps(p, v) (writes(p, 1, 32), _mm256_stream_ps(p, v))
#define _mm256_stream_si256(p, v) (writes(p, 1, 32), _mm256_stream_si256(p, v))
#define _mm512_stream_ps(p, v) (writes(p, 1, 64), _mm512_stream_ps(p, v))
#undef _tile_loadd
#undef _tile_stored
#define _tile_loadd(tile, p, stride) (reads_tile(p, stride), [&] { _tile_loadd_internal(tile, p, stride); }())
#define _tile_stored(tile, p, stride) (writes_tile(p, stride), [&] { _tile_stored_internal(tile, p, stride); }())
#endif
