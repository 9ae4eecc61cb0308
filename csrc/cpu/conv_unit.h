// What the units of convolutions have in common.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "simd.h"

namespace twins_fast {
namespace {  // as in simd.h

// Calls f with a value of the plan's type.
template <class F>
auto with_type(const ConvPlan& plan, F&& f) {
  switch (plan.dtype) {
    case DType::kBFloat16: return f(BFloat16{});
    case DType::kFloat16: return f(Float16{});
    default: return f(float{});
  }
}

// Entry points of a unit; Kernels::choose(plan, f) calls f with the kernel of the plan.
template <class Kernels>
struct Entries {
  static int64_t packed_bytes(const ConvPlan& plan) {
    return Kernels::choose(plan, [](const auto& kernel) { return 4 * kernel.packed_floats(); });
  }
  static int64_t workspace_bytes(const ConvPlan& plan, int threads) {
    return Kernels::choose(plan, [=](const auto& kernel) { return 64 + 4 * threads * kernel.floats_per_thread(); });
  }
  static void run(const ConvPlan& plan, const ConvRun& args, int threads) {
    Kernels::choose(plan, [&](const auto& kernel) { kernel.run(args, threads); });
  }
};

}  // namespace
}  // namespace twins_fast
