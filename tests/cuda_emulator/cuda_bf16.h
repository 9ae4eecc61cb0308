// __nv_bfloat16, rounded to nearest even. Every NaN becomes 0x7fff, as on hardware.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  __nv_bfloat16(float v) {
    const unsigned u = __float_as_uint(v);
    bits = v != v ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  __nv_bfloat16(double) = delete;  // would round twice
  operator float() const { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

namespace cuda_emulator {
CUDA_EMULATOR_MOVABLE(__nv_bfloat16)
CUDA_EMULATOR_MOVABLE(__nv_bfloat162)
}  // namespace cuda_emulator

using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline __nv_bfloat16 __float2bfloat16_rn(float v) { return v; }
inline __nv_bfloat16 __float2bfloat16(float v) { return v; }
inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { return cuda_emulator::same_bits<__nv_bfloat16>(v); }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline float __low2float(__nv_bfloat162 v) { return v.x; }
inline float __high2float(__nv_bfloat162 v) { return v.y; }
