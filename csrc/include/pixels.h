// Arguments of the passes between an image and what the network sees of it.
#pragma once

#include <cstdint>

#include "twin_bn.h"

namespace twins_fast {

constexpr int kMostPixelSteps = 8;
constexpr int64_t kMostPixelChannels = 256;

struct PixelStep {
  enum Kind { kClamp, kAdd, kSub, kMul, kDiv };
  Kind kind;
  const float* values;  // [channels]; of a clamp [2], its bounds
  bool at_bounds;       // of a clamp: whether its derivative is 1 at a bound, or 0
};

// The steps in their order, on every channel; then source row r is repeated as output rows
// [row_start[r], row_start[r + 1]), and likewise columns. Null: nothing is repeated, and height is 1.
struct PixelProgram {
  int64_t channels, height, width, out_height, out_width;
  const int32_t *row_start, *column_start;
  int steps;
  PixelStep step[kMostPixelSteps];
};

enum class PixelPass { kPrepare, kGradient, kStep };

// Images are float32 NCHW; gradient and out are of type `dtype`, channels-last, of the output size. Results may be
// the same memory as what has the same shape and layout.
struct PixelCall {
  PixelProgram program;
  PixelPass pass;
  int64_t images;
  DType dtype;
  const void* gradient;  // with respect to what kPrepare writes
  const float *x, *clean;
  float alpha, eps;
  int64_t* not_finite;  // [images], added to: values whose gradient is NaN; may be null
  float* result;        // the gradient with respect to x, or the new x
  void* out;            // may be null
};

}  // namespace twins_fast
