// Element-wise functions and their derivatives, in float32.
#pragma once

#include "simd.h"

namespace twins_fast {
namespace {  // as in simd.h

struct ValueAndSlope {
  Floats value, slope;
};

inline Floats where(Ints chosen, Floats yes, Floats no) { return chosen ? yes : no; }

// e^x within two units in the last place, of x cut to [-87, 88]; NaN stays.
inline Floats exponential(Floats x) {
  const Floats cut = where(x < -87.0f, broadcast(-87.0f), where(x > 88.0f, broadcast(88.0f), x));
  const Floats safe = where(cut == cut, cut, Floats{});  // NaN has no integer
  const Floats scaled = safe * 1.44269504f;
  const Ints n = __builtin_convertvector(scaled + where(scaled < 0, broadcast(-0.5f), broadcast(0.5f)), Ints);
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = safe - whole * 0.693359375f + whole * 2.12194440e-4f;  // log 2 in two parts, the first one exact
  Floats p = broadcast(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = p * r + c;
  const Floats power = (Floats)((n + 127) << 23);
  return where(cut == cut, (p * r * r + r + 1.0f) * power, cut);
}

inline Floats logistic(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

struct Sigmoid {
  static ValueAndSlope at(Floats x, Floats, Floats) {
    const Floats s = logistic(x);
    return {s, s * (1.0f - s)};
  }
};

struct Silu {
  static ValueAndSlope at(Floats x, Floats, Floats) {
    const Floats s = logistic(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
  }
};

inline Floats hyperbolic_tangent(Floats x) {
  // Near 0 the difference has lost its digits.
  const Floats s = x * x, small = x * (1.0f + s * (-1.0f / 3.0f + s * (2.0f / 15.0f - s * (17.0f / 315.0f))));
  return where(s < 0.01f, small, 2.0f * logistic(2.0f * x) - 1.0f);
}

struct Tanh {
  static ValueAndSlope at(Floats x, Floats, Floats) {
    const Floats t = hyperbolic_tangent(x);
    return {t, 1.0f - t * t};
  }
};

// The normal distribution's, by Abramowitz and Stegun 7.1.26: within 1e-7.
struct Gelu {
  static ValueAndSlope at(Floats x, Floats, Floats) {
    const Floats z = where(x < 0, -x, x) * 0.70710678f;
    const Floats t = 1.0f / (1.0f + 0.3275911f * z), density = exponential(-z * z);
    Floats p = broadcast(1.061405429f);
    for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = p * t + c;
    const Floats tail = 0.5f * p * t * density;  // beyond |x|
    const Floats below = where(x < 0, tail, 1.0f - tail);
    return {x * below, below + x * density * 0.39894228f};
  }
};

struct GeluTanh {
  static ValueAndSlope at(Floats x, Floats, Floats) {
    const Floats t = hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x));
    const Floats inner = 0.79788456f * (1.0f + 0.134145f * x * x);
    return {0.5f * x * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner};
  }
};

struct Hardsigmoid {
  static ValueAndSlope at(Floats x, Floats, Floats) {
    const Floats line = (x + 3.0f) * (1.0f / 6.0f);
    const Floats value = where(x <= -3.0f, Floats{}, where(x >= 3.0f, broadcast(1), line));
    return {value, where((x > -3.0f) & (x < 3.0f), broadcast(1.0f / 6.0f), Floats{})};
  }
};

struct Hardswish {
  static ValueAndSlope at(Floats x, Floats, Floats) {
    const Floats inside = where(x < 3.0f, x * (1.0f / 3.0f) + 0.5f, broadcast(1));
    return {x * Hardsigmoid::at(x, x, x).value, where(x <= -3.0f, Floats{}, inside)};
  }
};

struct LeakyRelu {
  static ValueAndSlope at(Floats x, Floats a, Floats) {
    const Floats slope = where(x > 0, broadcast(1), a);
    return {x * slope, slope};
  }
};

struct Elu {
  static ValueAndSlope at(Floats x, Floats a, Floats) {
    const Floats e = a * exponential(x);
    // Near 0 the difference of e^x and 1 has lost its digits.
    const Floats small = a * x * (1.0f + x * (0.5f + x * (1.0f / 6.0f)));
    const Floats below = where(x > -0.01f, small, e - a);
    return {where(x > 0, x, below), where(x > 0, broadcast(1), e)};
  }
};

struct Mish {
  static ValueAndSlope at(Floats x, Floats, Floats) {
    const Floats e = exponential(where(x > 30.0f, broadcast(30.0f), x)), n = e * (e + 2.0f), t = n / (n + 2.0f);
    return {x * t, t + x * (1.0f - t * t) * logistic(x)};
  }
};

inline Floats within(Floats x, Floats low, Floats high) { return where(x < low, low, where(x > high, high, x)); }

// The derivative at the bounds is 0; of NaN it is 1.
struct ClampOpen {
  static ValueAndSlope at(Floats x, Floats low, Floats high) {
    return {within(x, low, high), where((x <= low) | (x >= high), Floats{}, broadcast(1))};
  }
};

struct ClampClosed {
  static ValueAndSlope at(Floats x, Floats low, Floats high) {
    return {within(x, low, high), where((x < low) | (x > high), Floats{}, broadcast(1))};
  }
};

}  // namespace
}  // namespace twins_fast
