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

// Channels of one tensor that become channels of another: y[pixel, y_first + i * y_step] = x[pixel, i * step].
struct Part {
  const void* x;  // null: zeros
  int64_t stride, step, channels, y_first, y_step;  // stride: from pixel to pixel of x
};

// The parts put together as y, then pass.y = mask(relu(y * scale + shift + other)).
struct Gather {
  const Part* parts;
  int64_t count;
  Pointwise pass;  // its x is y
};

// A gate is one value per image and channel, [images, channels], or per pixel, [images, pixels].
struct Gate {
  int64_t images, pixels, channels;
  bool per_channel;
};

// y = mask(relu(x * gate + other)); y may be x or other.
struct Product {
  Gate shape;
  DType dtype;
  const void *x, *gate, *other;
  const uint8_t* mask;
  bool relu;
  void* y;
  uint8_t* bits;
};

// y = mask(sum(g * x) + other), of the gate's shape.
struct ProductSum {
  Gate shape;
  DType dtype;
  const void *g, *x, *other;
  const uint8_t* mask;
  void* y;
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

// The windows of maxima are given by kernel, stride and padding with nothing; those of weighted sums by tables.
struct Windows {
  int64_t images, channels, height, width, out_height, out_width;
  int64_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x;
  const int32_t *rows, *columns;                  // [2, results]: where each begins and ends, neither ever going back
  const float *row_weights, *column_weights;      // [results]: what a sum is multiplied by

  int64_t pixels() const { return images * height * width; }
  int64_t out_pixels() const { return images * out_height * out_width; }
};

// Maxima, or weighted sums.
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
