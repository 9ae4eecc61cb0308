// Weights in the order in which the products read them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/product.h"
#include "cpu/transpose.h"
#include "cpu/winograd.h"

namespace twins_fast {
namespace {  // as in simd.h

constexpr int64_t kPackedColumns = 512;  // vectors of weights at a time
constexpr int64_t kPackedChannels = 32;  // of Winograd's at a time: their products fit the second-level cache

int64_t channels_at_once(const ConvPlan& plan, const ConvPack& args) {
  return plan.winograd ? kPackedChannels : std::max<int64_t>(2, kPackedColumns / args.slices() / 2 * 2);
}

// Vectors of working memory: the weights of a panel, and Winograd's products of them.
int64_t vectors_at_once(const ConvPlan& plan, const ConvPack& args) {
  const int64_t reach = plan.winograd ? plan.winograd + 2 : 0;
  return 2 * channels_at_once(plan, args) * (args.slices() + reach * reach);
}

// A panel of the packed weights is made for some input channels at a time, and written in runs as long as these allow.
template <class T>
struct Pack {
  using Compute = ComputeOf<T>;
  const ConvPlan& plan;
  const ConvPack& args;
  const int64_t slices = args.slices();
  const int64_t at_once = channels_at_once(plan, args);

  void run(float* scratch, int threads) const {
    const int64_t panels = ceil_div(plan.out_channels, kPanel);
    const int64_t parts = ceil_div(plan.in_channels, at_once);
    scratch = aligned(scratch);
    in_parallel(threads, [=](int thread, int team) {
      float* columns = scratch + thread * vectors_at_once(plan, args) * kLanes;
      const Range items = share(0, panels * parts, thread, team);
      for (int64_t i = items.begin; i < items.end; ++i) {
        const int64_t begin = i % parts * at_once;
        pack(i / parts, {begin, std::min(begin + at_once, plan.in_channels)}, columns);
      }
      publish();
    });
  }

  // Of a panel's vector: its channels.
  int count(int64_t vector) const {
    return static_cast<int>(std::min<int64_t>(plan.out_channels - vector * kLanes, kLanes));
  }

  void pack(int64_t panel, Range channels, float* columns) const {
    const int vectors = count(2 * panel + 1) > 0 ? 2 : 1;
    for (int v = 0; v < vectors; ++v) {
      const int64_t n = (2 * panel + v) * kLanes;
      float* to = columns + v * kLanes;
      if (!args.transposed) {
        transpose(args.weight + (n * args.inputs + channels.begin) * slices, args.inputs * slices, count(2 * panel + v),
                  channels.size() * slices, to, kPanel);
        continue;
      }
      for (int64_t c = channels.begin; c < channels.end; ++c, to += slices * kPanel) {
        const float* from = args.weight + (c * args.inputs + n) * slices;
        if (slices == 1) store(to, load(from, count(2 * panel + v)));
        else transpose(from, slices, count(2 * panel + v), slices, to, kPanel);
      }
    }
    if (plan.winograd == 2) pack_winograd<2>(panel, vectors, channels, columns);
    else if (plan.winograd == 4) pack_winograd<4>(panel, vectors, channels, columns);
    else pack_gemm(panel, vectors, channels, columns);
  }

  Floats scale(int64_t vector, int64_t channel) const {
    if (!args.scale) return broadcast(1);
    if (args.transposed) return broadcast(args.scale[channel]);
    return load(args.scale + vector * kLanes, count(vector));
  }

  Floats weight(const ConvTap& tap, const float* columns, Floats scale) const {
    Floats sum = {};
    for (int64_t i = tap.first_source; i < tap.first_source + tap.sources; ++i)
      sum += load(columns + (plan.sources[i].ky * args.kernel_w + plan.sources[i].kx) * kPanel);
    return sum * scale;
  }

  void pack_gemm(int64_t panel, int vectors, Range channels, const float* columns) const {
    float* packed = static_cast<float*>(args.packed);
    const bool whole_lines = by_matrix_unit(plan), whole_steps = whole_lines || plan.in_channels % Compute::kDepth == 0;
    for (int64_t i = 0; i < plan.phase_count; ++i) {
      const ConvPhase& phase = plan.phases[i];
      const Right matrix(depth_of(plan, phase), plan.out_channels, Compute::kDepth);
      float* to = packed + matrix.offset(panel);
      const int64_t stride = vectors * kLanes;
      packed += matrix.floats();
      for (int64_t t = 0; t < phase.taps; ++t) {
        const ConvTap& tap = plan.taps[phase.first_tap + t];
        for (int64_t c = channels.begin; c < channels.end; c += Compute::kDepth)
          for (int v = 0; v < vectors; ++v) {
            const auto value = [&](int64_t c) {
              if (c >= channels.end) return Floats{};
              return weight(tap, columns + (c - channels.begin) * slices * kPanel + v * kLanes,
                            scale(2 * panel + v, c));
            };
            const int64_t k = order_of(plan, phase, t, c);
            if (whole_steps) {
              stream(to + k / Compute::kDepth * stride + v * kLanes,
                     Compute::step(value(c), value(c + Compute::kDepth - 1)));
              continue;
            }
            // Pairs that span two taps, which may be other threads': each writes its half.
            for (int64_t half = k; half < k + 2 && c + half - k < channels.end; ++half)
              put_half(to + half / 2 * stride + v * kLanes, half % 2, value(c + half - k));
          }
      }
      if (whole_lines && channels.end == plan.in_channels) {
        const int64_t first = ceil_div(channels.end, Compute::kDepth) * Compute::kDepth;
        for (int64_t t = 0; t < phase.taps; ++t)
          for (int64_t c = first; c % kLineChannels; c += Compute::kDepth)
            for (int v = 0; v < vectors; ++v)
              stream(to + order_of(plan, phase, t, c) / Compute::kDepth * stride + v * kLanes, Floats{});
      }
      if (depth_of(plan, phase) % Compute::kDepth && channels.end == plan.in_channels)
        for (int v = 0; v < vectors; ++v) put_half(to + (matrix.steps - 1) * stride + v * kLanes, 1, Floats{});
    }
  }

  static void put_half(float* step, int64_t half, Floats v) {
    uint16_t values[kLanes];
    store(reinterpret_cast<BFloat16*>(values), v);
    for (int i = 0; i < kLanes; ++i)
      std::memcpy(reinterpret_cast<char*>(step + i) + 2 * half, values + i, sizeof *values);
  }

  template <int kSize>
  void pack_winograd(int64_t panel, int vectors, Range channels, float* columns) const {
    constexpr int kReach = kSize + 2, kProducts = kReach * kReach;
    const Right matrix(plan.in_channels, plan.out_channels, Compute::kDepth);
    const int64_t width = vectors * kLanes, run = ceil_div(channels.size(), Compute::kDepth) * width;
    float* const products = columns + at_once * slices * kPanel;
    for (int v = 0; v < vectors; ++v) {
      const float* from = columns + v * kLanes;
      float* to = products + v * kLanes;
      for (int64_t c = channels.begin; c < channels.end; c += Compute::kDepth, to += width) {
        Floats values[Compute::kDepth][kReach][kReach] = {};
        for (int64_t d = 0; d < Compute::kDepth && c + d < channels.end; ++d, from += slices * kPanel)
          transform<kSize>(from, scale(2 * panel + v, c + d), values[d]);
        for (int p = 0; p < kProducts; ++p)
          store(to + p * run, Compute::step(values[0][p / kReach][p % kReach],
                                            values[Compute::kDepth - 1][p / kReach][p % kReach]));
      }
    }
    float* to = static_cast<float*>(args.packed) + kProducts * matrix.offset(panel) +
                channels.begin / Compute::kDepth * width;
    for (int p = 0; p < kProducts; ++p, to += matrix.steps * width)
      for (int64_t i = 0; i < run; i += kLanes) stream(to + i, load(products + p * run + i));
  }

  // G g G^T.
  template <int kSize>
  void transform(const float* columns, Floats scale, Floats (&products)[kSize + 2][kSize + 2]) const {
    Floats half[3][kSize + 2];
    for (int j = 0; j < 3; ++j) {
      const auto tap = [&](int i) { return weight(plan.taps[3 * i + j], columns, scale); };
      Transform<kSize>::weights(tap(0), tap(1), tap(2), half[j]);
    }
    for (int i = 0; i < kSize + 2; ++i) Transform<kSize>::weights(half[0][i], half[1][i], half[2][i], products[i]);
  }
};

}  // namespace
}  // namespace twins_fast
