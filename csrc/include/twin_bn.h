// Arguments of two-wing batch norm, shared by the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TWINS_FAST_ANYWHERE __host__ __device__
#else
#define TWINS_FAST_ANYWHERE
#endif

namespace twins_fast {

enum class DType { kFloat32, kBFloat16, kFloat16 };

enum class Status { kOk, kBadArgument, kUnknownIsa, kOutOfMemory };

// Between a reduction and the apply that follows it, partial results of several processes can be merged.
enum class Phase {
  kAll,
  kReduce,  // forward: only `stats` is written, as mean and sum of squared deviations; backward: only `sums`
  kApply,   // forward: `stats` is given; backward: `sums` holds what the adaptive rows need, see below
};

struct Shape {
  int64_t images;
  int64_t channels;
  int64_t pixels;  // H * W
  int64_t split;   // images [0, split) are frozen (or adaptive, too), [split, images) adaptive
  bool channels_last;

  // Memory is a matrix of contiguous runs: all channels of a pixel, or all pixels of a channel.
  TWINS_FAST_ANYWHERE int64_t rows() const { return images * rows_per_image(); }
  TWINS_FAST_ANYWHERE int64_t rows_per_image() const { return channels_last ? pixels : channels; }
  TWINS_FAST_ANYWHERE int64_t run() const { return channels_last ? channels : pixels; }
  TWINS_FAST_ANYWHERE int64_t bytes_of_bits() const { return (run() + 7) / 8; }  // per row
  TWINS_FAST_ANYWHERE int64_t images_of(bool second) const { return second ? images - split : split; }
  TWINS_FAST_ANYWHERE int64_t adaptive_count() const { return images_of(true) * pixels; }
};

// Null pointers: absent. Vectors are float32 [channels]; x, y, ... have type `dtype` and one layout.
struct TwinBnForward {
  Shape shape;
  DType dtype;
  const void* x;
  const void* residual;
  float *frozen_mean, *frozen_var;  // updated in place if both_adaptive
  const float *frozen_weight, *frozen_bias;
  float *running_mean, *running_var;  // updated in place
  const float *weight, *bias;
  void* y;
  uint8_t* bits;  // [rows, bytes_of_bits]: 1 where the ReLU passes
  float* stats;   // [2, channels]: mean and 1 / std of the adaptive half; zeros without one. [4, channels] if
                  // both_adaptive, those of the first half last
  double momentum, eps;
  bool relu;
  bool both_adaptive;  // kAll only
  Phase phase;
};

struct TwinBnBackward {
  Shape shape;
  DType dtype;
  const void *dy, *x;
  const uint8_t* bits;
  const float *frozen_mean, *frozen_var, *frozen_weight;
  const float* weight;
  const float* stats;
  void *dx, *dresidual;  // these and the following: results, null when not wanted
  float *dfrozen_weight, *dfrozen_bias, *dweight, *dbias;
  // kReduce: [4, channels] result, sums of g and g * (x - mean) over frozen, then adaptive rows.
  // kApply: [2, channels] given, the adaptive sums divided by their count. kAll: null.
  float* sums;
  double eps;
  bool both_adaptive;  // kAll only; frozen_mean and frozen_var are not read then
  Phase phase;
};

}  // namespace twins_fast
