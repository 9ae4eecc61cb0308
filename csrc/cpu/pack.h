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
  const int64_t fit = kPackedColumns / args.slices(), least = args.gradient ? kLineChannels : 2;
  return plan.winograd ? kPackedChannels : std::max(least, fit / least * least);
}

// Vectors of working memory: the weights of a panel, Winograd's products of them, and what the gradient reads.
int64_t vectors_at_once(const ConvPlan& plan, const ConvPack& args) {
  const int64_t reach = plan.winograd ? plan.winograd + 2 : 0, kept = args.gradient ? args.slices() : 0;
  return channels_at_once(plan, args) * (2 * (args.slices() + reach * reach) + kept);
}

// Where a slice of the weight is among those packed for a convolution with one slice in each tap.
struct Place {
  const ConvPhase* phase;  // null: nowhere
  int64_t tap, floats;     // the phase begins there
};

Place place_of(const ConvSource& source, const ConvPlan& plan) {
  int64_t floats = 0;
  for (const ConvPhase* phase = plan.phases; phase < plan.phases + plan.phase_count; ++phase) {
    for (int64_t t = 0; t < phase->taps; ++t) {
      const ConvTap& tap = plan.taps[phase->first_tap + t];
      const ConvSource& own = plan.sources[tap.first_source];
      if (tap.sources == 1 && own.ky == source.ky && own.kx == source.kx) return {phase, t, floats};
    }
    floats += weights_of(plan, *phase).floats();
  }
  return {};
}

// Whether a convolution's packed weights are, in whole lines, those of its input gradient in another order.
bool packs_along(const ConvPlan& plan, const ConvPlan& gradient) {
  if (!by_matrix_unit(plan) || !by_matrix_unit(gradient) || plan.phase_count != 1 ||
      plan.in_channels % kLineChannels || plan.out_channels % kLineChannels ||
      gradient.in_channels != plan.out_channels || gradient.out_channels != plan.in_channels)
    return false;
  int64_t taps = 0;
  for (int64_t i = 0; i < gradient.phase_count; ++i) taps += gradient.phases[i].taps;
  const auto found = [&](const ConvTap& tap) {
    return tap.sources == 1 && place_of(plan.sources[tap.first_source], gradient).phase;
  };
  return taps == plan.phases->taps && std::all_of(plan.taps, plan.taps + taps, found);
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
#if defined(__AMX_BF16__)
    if (args.gradient) pack_gradient(panel, channels, columns + kept_at());
#endif
  }

  // In the working memory: the packed weights again, to be read.
  int64_t kept_at() const { return at_once * slices * kPanel; }

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

  void pack_gemm(int64_t panel, int vectors, Range channels, float* columns) const {
    float* kept = args.gradient ? columns + kept_at() : nullptr;
    float* packed = static_cast<float*>(args.packed);
    const bool whole_lines = by_matrix_unit(plan), whole_steps = whole_lines || plan.in_channels % Compute::kDepth == 0;
    for (int64_t i = 0; i < plan.phase_count; ++i) {
      const ConvPhase& phase = plan.phases[i];
      const Right matrix = weights_of(plan, phase);
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
              const Floats step = Compute::step(value(c), value(c + Compute::kDepth - 1));
              stream(to + k / Compute::kDepth * stride + v * kLanes, step);
              if (kept) store(kept, step), kept += kLanes;
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

#if defined(__AMX_BF16__)
  // A line is a square of weights: the inputs of a panel for the outputs of another one.
  void pack_gradient(int64_t panel, Range channels, const float* kept) const {
    alignas(64) float square[kLine * kPanel];
    const ConvPlan& gradient = *args.gradient;
    for (int64_t t = 0; t < plan.phases->taps; ++t) {
      const Place place = place_of(plan.sources[plan.taps[t].first_source], gradient);
      const Right matrix = weights_of(gradient, *place.phase);
      float* packed = static_cast<float*>(args.gradient_packed) + place.floats +
                      order_of(gradient, *place.phase, place.tap, panel * kPanel) / 2 * kPanel;
      for (int64_t c = channels.begin; c < channels.end; c += kPanel, kept += kLine * kPanel) {
        for (int v = 0; v < 2; ++v)
          for (int half = 0; half < 2; ++half)
            transpose_pairs(kept + (half * kLine / 2) * kPanel + v * kLanes, kPanel, kLine / 2, kLanes,
                            square + (v * kLine / 2) * kPanel + half * kLanes, kPanel);
        float* to = packed + matrix.offset(c / kPanel);
        for (int64_t i = 0; i < kLine * kPanel; i += kLanes) stream(to + i, load(square + i));
      }
    }
  }
#endif

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
