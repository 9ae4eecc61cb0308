// CPU two-wing batch norm: the entry point and the units behind it, one per instruction set.
#pragma once

#include <string>

#include "twin_bn.h"

namespace twins_fast {

// isa: a name from cpu_isas(), or "" for the best that this CPU has.
Status twin_bn_forward_cpu(const TwinBnForward& args, int threads, const std::string& isa);
Status twin_bn_backward_cpu(const TwinBnBackward& args, int threads, const std::string& isa);

// The i-th instruction set that was built and that this CPU has, best first; null past the end.
const char* cpu_isa(int i);

// Zeroed working memory. Lengths are padded so that a whole vector can be read at any channel.
struct Scratch {
  static constexpr int64_t kPad = 16;
  static constexpr int kDoubles = 4;  // vectors of partial sums, per thread
  static constexpr int kFloats = 3;   // accumulators, per thread
  static constexpr int kShared = 6;   // per-channel coefficients

  double* doubles;
  float* floats;
  int64_t stride;  // padded channels

  double* partial(int thread, int i) const { return doubles + (thread * kDoubles + i) * stride; }
  float* shared(int i) const { return floats + i * stride; }
  float* accumulator(int thread, int i) const { return floats + (kShared + thread * kFloats + i) * stride; }
};

#define TWINS_FAST_DECLARE(isa)                                    \
  namespace isa {                                                  \
  void forward(const TwinBnForward&, const Scratch&, int threads); \
  void backward(const TwinBnBackward&, const Scratch&, int threads); \
  }
TWINS_FAST_DECLARE(baseline)
TWINS_FAST_DECLARE(avx2)
TWINS_FAST_DECLARE(avx512)
TWINS_FAST_DECLARE(avx512_bf16)
#undef TWINS_FAST_DECLARE

}  // namespace twins_fast
