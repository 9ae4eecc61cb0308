// Convolutions without groups on the CPU, as matrix products. Compiled once per instruction set, as namespace TWINS_FAST_ISA.
//
// Every value is the sum of the same products in the same order wherever it is in a tile, and whatever thread
// computes it.
#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/matrix_unit.h"
#include "cpu/pack.h"
#include "cpu/winograd.h"

namespace twins_fast {
namespace {

// Calls f with the kernel of the plan.
template <class F>
auto with_kernel(const ConvPlan& plan, F&& f) {
#if defined(__AMX_BF16__)
  if (by_matrix_unit(plan)) return f(MatrixUnit{plan});
#endif
  const auto with_type = [&](auto type) {
    using T = decltype(type);
    if (plan.winograd == 2) return f(Winograd<T, 2>{plan});
    if (plan.winograd == 4) return f(Winograd<T, 4>{plan});
    return f(Gemm<T>{plan});
  };
  switch (plan.dtype) {
    case DType::kBFloat16: return with_type(BFloat16{});
    case DType::kFloat16: return with_type(Float16{});
    default: return with_type(float{});
  }
}

int64_t packed_bytes(const ConvPlan& plan) {
  return with_kernel(plan, [](const auto& kernel) { return 4 * kernel.packed_floats(); });
}

int64_t workspace_bytes(const ConvPlan& plan, int threads) {
  return with_kernel(plan, [=](const auto& kernel) { return 64 + 4 * threads * kernel.floats_per_thread(); });
}

int64_t pack_floats(const ConvPlan& plan, const ConvPack& args, int threads) {
  return kLine + threads * vectors_at_once(plan, args) * kLanes;
}

void pack(const ConvPlan& plan, const ConvPack& args, float* scratch, int threads) {
  if (plan.dtype == DType::kBFloat16) Pack<BFloat16>{plan, args}.run(scratch, threads);
  else Pack<float>{plan, args}.run(scratch, threads);
}

void run(const ConvPlan& plan, const ConvRun& args, int threads) {
  with_kernel(plan, [&](const auto& kernel) { kernel.run(args, threads); });
}

}  // namespace

namespace TWINS_FAST_ISA {

extern const ConvUnit conv;
const ConvUnit conv = {packed_bytes, workspace_bytes, packs_along, pack_floats, pack, run};

}  // namespace TWINS_FAST_ISA
}  // namespace twins_fast
