// What a convolution does to its sums, and what it reads next.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "conv.h"
#include "cpu/product.h"

namespace twins_fast {
namespace {  // as in simd.h

// Turns sums into results.
template <class T>
struct Epilogue {
  const float* bias;
  const T* other;
  const uint8_t* mask;
  T* y;
  uint8_t* bits;
  bool relu;
  int64_t channels, bytes_of_bits;

  Epilogue(const ConvPlan& plan, const ConvRun& run)
      : bias(run.bias), other(static_cast<const T*>(run.other)), mask(run.mask), y(static_cast<T*>(run.y)),
        bits(run.bits), relu(run.relu), channels(plan.out_pixel()), bytes_of_bits(plan.bytes_of_bits()) {
    if (!plan.adjoint) return;
    const int64_t last = run.images * plan.out_h * plan.out_w - 1;  // pixels count backwards from there
    y += last * channels;
    if (other) other += last * channels;
    if (mask) mask += last * bytes_of_bits;
    if (bits) bits += last * bytes_of_bits;
  }

  // Calls f(count, bias) for the vector at channel c; a whole one's count is a constant of the type.
  template <class F>
  inline __attribute__((always_inline)) void with_vector(int64_t c, F&& f) const {
    with_vector(c, static_cast<int>(std::min<int64_t>(channels - c, kLanes)), f);
  }

  template <class F>
  inline __attribute__((always_inline)) void with_vector(int64_t c, int count, F&& f) const {
    const Floats at_c = bias ? load(bias + c, count) : Floats{};
    if (count == kLanes) f(std::integral_constant<int, kLanes>{}, at_c);
    else f(count, at_c);
  }

  inline __attribute__((always_inline)) void operator()(Floats v, int64_t pixel, int64_t c, int n) const {
    const int64_t at = pixel * channels + c, at_bits = pixel * bytes_of_bits + c / 8;
    if (other) v += load(other + at, n);
    if (relu) {
      const Mask passes = not_below_or_zero(v);  // a NaN passes, as in torch.relu
      v = keep(passes, v);
      if (bits) store_bits(bits + at_bits, passes, n);
    }
    if (mask) v = keep(load_bits(mask + at_bits, n), v);
    store(y + at, v, n);
  }

  // Of the panel that begins at channel c, before its sums are known.
  void prefetch(int64_t pixel, int64_t c) const {
    const int64_t at = pixel * channels + c;
    for (int64_t i = 0; i < kPanel && c + i < channels; i += 64 / sizeof(T)) {
      __builtin_prefetch(y + at + i, 1);
      if (other) __builtin_prefetch(other + at + i);
    }
  }
};

// Of rows `next` of `all`, which are spread evenly over the inputs.
template <class T>
Ahead inputs_ahead(const ConvPlan& plan, const ConvRun& args, Range next, int64_t all, int64_t parts) {
  const char* x = static_cast<const char*>(args.x);
  const int64_t size = args.images * plan.in_h * plan.in_w * plan.in_channels * sizeof(T);
  if (plan.adjoint) next = {all - next.end, all - next.begin};
  return {x + size * next.begin / all, x + size * next.end / all, parts};
}

}  // namespace
}  // namespace twins_fast
