// __half, rounded to nearest even. Every NaN becomes 0x7fff, as on hardware.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;

  __half() = default;
  __half(float v) : bits(rounded(v)) {}
  __half(double) = delete;  // would round twice
  operator float() const {
    const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ffu;
    if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * static_cast<float>(fraction);
    return __uint_as_float(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
  }

 private:
  static uint16_t rounded(float v) {
    if (v != v) return 0x7fff;
    const unsigned u = __float_as_uint(std::fabs(v)), sign = __float_as_uint(v) >> 16 & 0x8000;
    if (u >= __float_as_uint(65520.f)) return sign | 0x7c00;
    // The last bit of a float in [1/2, 1) is worth the smallest half, so this sum rounds as it should.
    if (u < __float_as_uint(0x1p-14f)) return sign | (__float_as_uint(std::fabs(v) + 0.5f) - __float_as_uint(0.5f));
    return sign | (u + 0xfff + (u >> 13 & 1) - (112u << 23)) >> 13;
  }
};

struct alignas(4) __half2 {
  __half x, y;
};

namespace cuda_emulator {
CUDA_EMULATOR_MOVABLE(__half)
CUDA_EMULATOR_MOVABLE(__half2)
}  // namespace cuda_emulator

using half = __half;
using half2 = __half2;

inline __half __float2half_rn(float v) { return v; }
inline __half __float2half(float v) { return v; }
inline float __half2float(__half v) { return v; }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline __half __ushort_as_half(unsigned short v) { return cuda_emulator::same_bits<__half>(v); }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
