// CPU kernels: the entry points and the units behind them, one per instruction set.
#pragma once

#include <string>
#include <vector>

#include "pixels.h"
#include "pointwise.h"
#include "conv.h"
#include "twin_bn.h"

namespace twins_fast {

// isa: a name from cpu_isas(), or "" for the best that this CPU has.
Status twin_bn_forward_cpu(const TwinBnForward& args, int threads, const std::string& isa);
Status twin_bn_backward_cpu(const TwinBnBackward& args, int threads, const std::string& isa);
Status pointwise_cpu(const Pointwise& args, int threads, const std::string& isa);
Status gather_cpu(const Gather& args, int threads, const std::string& isa);
Status product_cpu(const Product& args, int threads, const std::string& isa);
Status product_sum_cpu(const ProductSum& args, int threads, const std::string& isa);
Status activation_cpu(const Activation& args, int threads, const std::string& isa);
Status layer_norm_cpu(const LayerNorm& args, int threads, const std::string& isa);
Status layer_norm_backward_cpu(const LayerNormBackward& args, int threads, const std::string& isa);
Status pool_forward_cpu(const PoolForward& args, int threads, const std::string& isa);
Status pool_backward_cpu(const PoolBackward& args, int threads, const std::string& isa);
Status pixels_cpu(const PixelCall& args, int threads, const std::string& isa);

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

// The convolution kernels of one instruction set, which also decides how weights are laid out.
struct ConvUnit {
  int64_t (*packed_bytes)(const ConvPlan&);
  int64_t (*workspace_bytes)(const ConvPlan&, int threads);
  bool (*packs_along)(const ConvPlan&, const ConvPlan& gradient);  // whether pack() may do both
  int64_t (*pack_floats)(const ConvPlan&, const ConvPack&, int threads);  // working memory
  void (*pack)(const ConvPlan&, const ConvPack&, float* scratch, int threads);
  void (*run)(const ConvPlan&, const ConvRun&, int threads);
};

// A convolution of fixed geometry for any number of images.
class Conv {
 public:
  struct Tap {
    int64_t dy, dx;
    std::vector<ConvSource> sources;
  };
  struct Phase {
    int64_t oy, ox;
    std::vector<Tap> taps;
  };

  // The plan without its phases; throws std::invalid_argument.
  Conv(const ConvPlan& geometry, std::vector<Phase> phases, const std::string& isa);
  Conv(const Conv&) = delete;  // plan_ points into this

  int64_t packed_bytes() const { return unit_->packed_bytes(plan_); }
  int64_t workspace_bytes(int threads) const { return unit_->workspace_bytes(plan_, threads); }
  // gradient, if there is one: the input gradient, whose weights are packed, too.
  Status pack(ConvPack args, int threads, const Conv* gradient, void* gradient_packed) const;
  Status run(const ConvRun& args, int threads) const;

 private:
  ConvPlan plan_;
  const ConvUnit* unit_;
  std::vector<ConvPhase> phases_;
  std::vector<ConvTap> taps_;
  std::vector<ConvSource> sources_;
};

// The steps on an image of fixed size, with the memory that a PixelProgram points to.
class InputProgram {
 public:
  struct Step {
    PixelStep::Kind kind;
    std::vector<float> values;  // one per channel; of a clamp its bounds
    int at_bounds;              // of a clamp: its derivative there, 0 or 1
  };

  // rows, columns: which one of the image each output row or column shows; throws std::invalid_argument.
  InputProgram(std::vector<Step> steps, int64_t channels, int64_t height, int64_t width,
               const std::vector<int32_t>& rows, const std::vector<int32_t>& columns);
  InputProgram(const InputProgram&) = delete;  // program_ points into this

  const PixelProgram& program() const { return program_; }

 private:
  PixelProgram program_;
  std::vector<int32_t> row_start_, column_start_;
  std::vector<Step> steps_;
};

#define TWINS_FAST_DECLARE(isa)                                      \
  namespace isa {                                                    \
  void forward(const TwinBnForward&, const Scratch&, int threads);   \
  void backward(const TwinBnBackward&, const Scratch&, int threads); \
  void pointwise(const Pointwise&, int threads);                     \
  void gather(const Gather&, int threads);                           \
  void product(const Product&, int threads);                         \
  void product_sum(const ProductSum&, int threads);                  \
  void activation(const Activation&, int threads);                   \
  void layer_norm(const LayerNorm&, int threads);                    \
  void layer_norm_backward(const LayerNormBackward&, int threads);   \
  void pool_forward(const PoolForward&, int threads);                \
  void pool_backward(const PoolBackward&, int threads);              \
  void pixels(const PixelCall&, int threads);                        \
  extern const ConvUnit conv, direct;                                \
  }
TWINS_FAST_DECLARE(baseline)
TWINS_FAST_DECLARE(avx2)
TWINS_FAST_DECLARE(avx512)
TWINS_FAST_DECLARE(avx512_bf16)
#undef TWINS_FAST_DECLARE
namespace amx {  // the rest as in avx512_bf16
extern const ConvUnit conv;
}

}  // namespace twins_fast
