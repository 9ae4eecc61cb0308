// Weights in the order in which the products read them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/product.h"
#include "cpu/winograd.h"

namespace twins_fast {
namespace {  // as in simd.h

// A matrix [rows, columns] whose rows are `stride` apart, as columns of one vector each; absent rows are zero.
void transpose(const float* from, int64_t stride, int rows, int64_t columns, float* to) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for_vectors(0, columns, [=](int64_t first, int count) {
    __m512 v[16], w[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = i < rows ? (__m512)load(from + i * stride + first, count) : _mm512_setzero_ps();
    // Four perfect shuffles of the rows.
    const auto shuffle = [=](const __m512(&in)[16], __m512(&out)[16]) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        out[2 * i] = _mm512_permutex2var_ps(in[i], low, in[i + 8]);
        out[2 * i + 1] = _mm512_permutex2var_ps(in[i], high, in[i + 8]);
      }
    };
    shuffle(v, w);
    shuffle(w, v);
    shuffle(v, w);
    shuffle(w, v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (i < count) store(to + (first + i) * kLanes, (Floats)v[i]);
  });
#else
  for (int64_t j = 0; j < columns; ++j)
    for (int i = 0; i < kLanes; ++i) to[j * kLanes + i] = i < rows ? from[i * stride + j] : 0;
#endif
}

constexpr int64_t kPackedColumns = 512;  // vectors of weights at a time

template <class T>
struct Pack {
  using Compute = ComputeOf<T>;
  const ConvPlan& plan;
  const ConvPack& args;
  const int64_t slices = args.slices();
  const int64_t channels_at_once = std::max<int64_t>(2, kPackedColumns / slices / 2 * 2);

  void run(float* scratch, int threads) const {
    const int64_t vectors = ceil_div(plan.out_channels, kLanes);
    const int64_t parts = ceil_div(plan.in_channels, channels_at_once);
    scratch = aligned(scratch);
    in_parallel(threads, [=](int thread, int team) {
      float* columns = scratch + thread * slices * channels_at_once * kLanes;
      const Range items = share(0, vectors * parts, thread, team);
      for (int64_t i = items.begin; i < items.end; ++i) {
        const int64_t begin = i % parts * channels_at_once;
        pack(i / parts, {begin, std::min(begin + channels_at_once, plan.in_channels)}, columns);
      }
      publish();
    });
  }

  void pack(int64_t vector, Range channels, float* columns) const {
    const int64_t n = vector * kLanes;
    const int count = static_cast<int>(std::min<int64_t>(plan.out_channels - n, kLanes));
    if (!args.transposed) {
      transpose(args.weight + (n * args.inputs + channels.begin) * slices, args.inputs * slices, count,
                channels.size() * slices, columns);
    } else {
      for (int64_t c = channels.begin; c < channels.end; ++c, columns += slices * kLanes) {
        const float* from = args.weight + (c * args.inputs + n) * slices;
        if (slices == 1) store(columns, load(from, count));
        else transpose(from, slices, count, slices, columns);
      }
      columns -= channels.size() * slices * kLanes;
    }
    if (plan.winograd == 2) pack_winograd<2>(vector, channels, columns);
    else if (plan.winograd == 4) pack_winograd<4>(vector, channels, columns);
    else pack_gemm(vector, channels, columns);
  }

  Floats scale(int64_t vector, int64_t channel) const {
    if (!args.scale) return broadcast(1);
    if (args.transposed) return broadcast(args.scale[channel]);
    return load(args.scale + vector * kLanes,
                static_cast<int>(std::min<int64_t>(plan.out_channels - vector * kLanes, kLanes)));
  }

  Floats weight(const ConvTap& tap, const float* columns, Floats scale) const {
    Floats sum = {};
    for (int64_t i = tap.first_source; i < tap.first_source + tap.sources; ++i)
      sum += load(columns + (plan.sources[i].ky * args.kernel_w + plan.sources[i].kx) * kLanes);
    return sum * scale;
  }

  // Where a vector's part of its panel begins, and how far apart its steps are.
  static std::pair<int64_t, int64_t> place(const Right& matrix, int64_t vector, int64_t products) {
    return {products * matrix.offset(vector / 2) + vector % 2 * kLanes, matrix.vectors_of(vector / 2) * kLanes};
  }

  void pack_gemm(int64_t vector, Range channels, const float* columns) const {
    float* packed = static_cast<float*>(args.packed);
    for (int64_t i = 0; i < plan.phase_count; ++i) {
      const ConvPhase& phase = plan.phases[i];
      const Right matrix(phase.taps * plan.in_channels, plan.out_channels, Compute::kDepth);
      const auto [offset, stride] = place(matrix, vector, 1);
      float* to = packed + offset;
      packed += matrix.floats();
      for (int64_t t = 0; t < phase.taps; ++t) {
        const ConvTap& tap = plan.taps[phase.first_tap + t];
        for (int64_t c = channels.begin; c < channels.end; c += Compute::kDepth) {
          const auto value = [&](int64_t c) {
            return weight(tap, columns + (c - channels.begin) * slices * kLanes, scale(vector, c));
          };
          const int64_t k = t * plan.in_channels + c;
          if (plan.in_channels % Compute::kDepth == 0) {
            stream(to + k / Compute::kDepth * stride, Compute::step(value(c), value(c + Compute::kDepth - 1)));
            continue;
          }
          // Pairs that span two taps, which may be other threads': each writes its half.
          for (int64_t half = k; half < k + 2 && c + half - k < channels.end; ++half)
            put_half(to + half / 2 * stride, half % 2, value(c + half - k));
        }
      }
      if (phase.taps * plan.in_channels % Compute::kDepth && channels.end == plan.in_channels)
        put_half(to + (matrix.steps - 1) * stride, 1, Floats{});
    }
  }

  static void put_half(float* step, int64_t half, Floats v) {
    uint16_t values[kLanes];
    store(reinterpret_cast<BFloat16*>(values), v);
    for (int i = 0; i < kLanes; ++i)
      std::memcpy(reinterpret_cast<char*>(step + i) + 2 * half, values + i, sizeof *values);
  }

  template <int kSize>
  void pack_winograd(int64_t vector, Range channels, const float* columns) const {
    constexpr int kReach = kSize + 2, kProducts = kReach * kReach;
    const Right matrix(plan.in_channels, plan.out_channels, Compute::kDepth);
    const auto [offset, stride] = place(matrix, vector, kProducts);
    float* to = static_cast<float*>(args.packed) + offset;
    for (int64_t c = channels.begin; c < channels.end; c += Compute::kDepth) {
      Floats products[Compute::kDepth][kReach][kReach] = {};
      for (int64_t d = 0; d < Compute::kDepth && c + d < channels.end; ++d)
        transform<kSize>(columns + (c + d - channels.begin) * slices * kLanes, scale(vector, c + d), products[d]);
      for (int p = 0; p < kProducts; ++p)
        stream(to + (p * matrix.steps + c / Compute::kDepth) * stride,
               Compute::step(products[0][p / kReach][p % kReach],
                             products[Compute::kDepth - 1][p / kReach][p % kReach]));
    }
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
