// Arguments of the passes over channels-last images that are not convolutions.
#pragma once

#include <cstdint>

#include "twin_bn.h"

namespace twins_fast {

// Null pointers: absent. Bits are [pixels, (channels + 7) / 8], lowest first; unused bits are 0.

// y = mask(relu(x * gate * scale + shift + other)), of type `dtype`; y may be x, gate or other.
struct Pointwise {
  int64_t pixels, channels;
  DType dtype;
  const void *x, *gate;
  const float *scale, *shift;  // [channels]
  const void* other;
  const uint8_t* mask;  // y is 0 where its bit is 0
  bool relu;
  void* y;
  uint8_t* bits;  // 1 where the ReLU passes
};

// Element-wise functions; a and b are numbers that some of them have.
enum class ActivationKind : int {
  kSilu, kSigmoid, kTanh, kGelu, kGeluTanh, kHardswish, kHardsigmoid, kLeakyRelu, kElu, kMish, kClampOpen, kClampClosed
};
constexpr int kActivations = 12;

// y = f(x) and slope = f'(x), [values] of type `dtype`; y may be x.
struct Activation {
  int64_t values;
  DType dtype;
  ActivationKind kind;
  float a, b;
  const void* x;
  void *y, *slope;
};

// y = (x - mean) * deviation * weight + bias, with the mean and 1 / standard deviation of each pixel's channels.
struct LayerNorm {
  int64_t pixels, channels;
  DType dtype;
  float eps;
  const void* x;
  const float *weight, *bias;  // [channels]
  void* y;
  float* moments;  // [pixels, 2]
};

// dx = mask(gradient of the layer norm + other); dx may be g or other.
struct LayerNormBackward {
  int64_t pixels, channels;
  DType dtype;
  const void *g, *x;
  const float *weight, *moments;
  const void* other;
  const uint8_t* mask;
  void* dx;
};

struct Windows {
  int64_t images, channels, height, width, out_height, out_width;
  int64_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x;  // padding is on both sides, with nothing

  int64_t pixels() const { return images * height * width; }
  int64_t out_pixels() const { return images * out_height * out_width; }
};

// Maxima, or averages.
struct PoolForward {
  Windows windows;
  DType dtype;
  bool max;
  const void* x;
  void* y;
  uint8_t* argmax;  // [out_pixels, channels]: y * kernel_x + x inside the window
};

// dx = mask(gradient of the pooling + other); dx may be other.
struct PoolBackward {
  Windows windows;
  DType dtype;
  bool max;
  const void* g;
  const uint8_t* argmax;
  const void* other;
  const uint8_t* mask;
  void* dx;
};

}  // namespace twins_fast
