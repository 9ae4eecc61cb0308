// Convolutions as sums over taps, and the arguments of their kernels. Tensors are channels-last.
#pragma once

#include <cstdint>

#include "twin_bn.h"

namespace twins_fast {

// One slice [out_channels, in_channels] of the weight.
struct ConvSource {
  int64_t ky, kx;
};

// Adds x[y + dy, x + dx], zero outside the image, times the sum of some slices of the weight.
struct ConvTap {
  int64_t dy, dx;
  int64_t first_source, sources;
};

// Output pixels (oy + i * out_step_y, ox + j * out_step_x), whose taps are relative to (i * in_step_y, j * in_step_x).
struct ConvPhase {
  int64_t oy, ox;
  int64_t first_tap, taps;  // in rising order of dy, then dx
  int64_t rows, columns;    // of grid points (i, j)
};

struct ConvPlan {
  int winograd;  // 2 or 4: F(2x2, 3x3) or F(4x4, 3x3), of nine taps around each pixel in one phase; 0: not at all
  bool adjoint;  // Winograd's input gradient by what is packed for the convolution that has it, so without own weights
  DType dtype;
  bool direct;   // straight from the image
  int64_t groups;
  int64_t in_h, in_w, in_channels;     // channels of each group
  int64_t out_h, out_w, out_channels;
  int64_t in_step_y, in_step_x, out_step_y, out_step_x;
  int64_t phase_count;
  const ConvPhase* phases;
  const ConvTap* taps;
  const ConvSource* sources;

  // Per pixel.
  int64_t in_pixel() const { return groups * in_channels; }
  int64_t out_pixel() const { return groups * out_channels; }
  int64_t bytes_of_bits() const { return (out_pixel() + 7) / 8; }
};

struct ConvPack {
  const float* weight;  // [outputs, inputs of a group, kernel_h, kernel_w]
  int64_t outputs, inputs, kernel_h, kernel_w;
  const float* scale;  // [outputs] or null
  bool transposed;     // the plan reads the outputs and writes the inputs
  void* packed;
  const ConvPlan* gradient;  // the input gradient, whose weights are packed along, or null
  void* gradient_packed;

  int64_t slices() const { return kernel_h * kernel_w; }
};

// Null pointers: absent. In this order: + bias, + other, ReLU, mask.
struct ConvRun {
  int64_t images;
  const void *x, *packed;
  const float* bias;
  const void* other;    // as y, and may be y
  const uint8_t* mask;  // [pixels, bytes_of_bits]: 0 where the result is zero
  void* y;
  uint8_t* bits;  // 1 where the ReLU passes
  bool relu;
  void* workspace;
};

}  // namespace twins_fast
