// Convolutions without groups on the CPU, as matrix products. Compiled once per instruction set, as namespace TWINS_FAST_ISA.
//
// Every value is the sum of the same products in the same order wherever it is in a tile, and whatever thread
// computes it.
#include <algorithm>

#include "cpu/conv_unit.h"
#include "cpu/gemm.h"
#include "cpu/matrix_unit.h"
#include "cpu/pack.h"
#include "cpu/winograd.h"

namespace twins_fast {
namespace {

struct Kernels {
  template <class F>
  static auto choose(const ConvPlan& plan, F&& f) {
#if defined(__AMX_BF16__)
    if (by_matrix_unit(plan)) return f(MatrixUnit{plan});
#endif
    return with_type(plan, [&](auto type) {
      using T = decltype(type);
      if (plan.winograd == 2) return f(Winograd<T, 2>{plan});
      if (plan.winograd == 4) return f(Winograd<T, 4>{plan});
      return f(Gemm<T>{plan});
    });
  }
};

int64_t pack_floats(const ConvPlan& plan, const ConvPack& args, int threads) {
  return kLine + threads * vectors_at_once(plan, args) * kLanes;
}

void pack(const ConvPlan& plan, const ConvPack& args, float* scratch, int threads) {
  if (plan.dtype == DType::kBFloat16) Pack<BFloat16>{plan, args}.run(scratch, threads);
  else Pack<float>{plan, args}.run(scratch, threads);
}

}  // namespace

namespace TWINS_FAST_ISA {

extern const ConvUnit conv;
using Unit = Entries<Kernels>;
const ConvUnit conv = {Unit::packed_bytes, Unit::workspace_bytes, packs_along, pack_floats, pack, Unit::run};

}  // namespace TWINS_FAST_ISA
}  // namespace twins_fast
