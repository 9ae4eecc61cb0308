// Products of matrices, a tile of registers at a time.
//
// A product is made of steps of 4 bytes along the summed dimension: a float, or a pair of bfloat16 where the
// instruction set has their dot product. Its left side is made of tiles of kTile rows, which hold kLine steps of each
// row in turn, so that one stream of memory feeds the multiplication. Its right side, the packed weight, is made of
// panels of kPanel columns, which hold all columns of each step in turn.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "conv.h"
#include "cpu/parallel.h"
#include "cpu/transpose.h"
#include "simd.h"

namespace twins_fast {
namespace {  // as in simd.h

// As many accumulators as there are registers, less those of one row of the right side and one value of the left.
#if defined(__AVX512F__)
constexpr int kTile = 14;
#elif defined(__AVX2__)
constexpr int kTile = 6;
#else
constexpr int kTile = 2;
#endif
constexpr int kPanel = 2 * kLanes;
constexpr int kLine = 16;  // steps: a cache line

// What the left side of a product may take of the second-level cache.
constexpr int64_t kBlockBytes = int64_t{256} << 10;

// Weights beyond this leave the third-level cache, or soon will.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kLineChannels = 2 * kLine;  // of pairs

// Whether a matrix unit computes a convolution: it sums whole lines of channels, all taps of one after the other. Few
// channels would leave most of a line empty.
bool by_matrix_unit(const ConvPlan& plan) {
#if defined(__AMX_BF16__)
  return plan.dtype == DType::kBFloat16 && !plan.winograd && plan.in_channels >= kLanes &&
         std::max(plan.in_step_y, plan.in_step_x) <= 8;
#else
  return false;
#endif
}

int64_t lines_of(const ConvPlan& plan) { return ceil_div(plan.in_channels, kLineChannels); }

// The values that are summed for a result, and which of them an input is.
int64_t depth_of(const ConvPlan& plan, const ConvPhase& phase) {
  return phase.taps * (by_matrix_unit(plan) ? lines_of(plan) * kLineChannels : plan.in_channels);
}

int64_t order_of(const ConvPlan& plan, const ConvPhase& phase, int64_t tap, int64_t channel) {
  if (!by_matrix_unit(plan)) return tap * plan.in_channels + channel;
  return (channel / kLineChannels * phase.taps + tap) * kLineChannels + channel % kLineChannels;
}

float* aligned(void* p) { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64); }

// How values take part in a product.
struct Singles {
  using Element = float;
  static constexpr int kDepth = 1;  // values in a step

  static Floats add(Floats sum, const float* a, Floats b) { return sum + *a * b; }
  static Floats add(Floats sum, Floats a, Floats b) { return sum + a * b; }
  // The steps of n values.
  template <class T>
  static Floats steps_at(const T* p, int n) {
    return load(p, n);
  }
  // One step for all lanes.
  static Floats step_at(const float* p) { return broadcast(*p); }
  template <class T>
  static Floats step_at(const T* p) {
    return as_floats(T{}, Halves{} + p->bits);
  }
  static Floats step(Floats v, Floats) { return v; }
  // `rows` steps of `columns` packed columns, as columns and steps.
  static void exchange(const float* from, int64_t stride, int rows, int64_t columns, float* to, int64_t to_stride) {
    transpose(from, stride, rows, columns, to, to_stride);
  }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Element = BFloat16;
  static constexpr int kDepth = 2;

  static Floats add(Floats sum, const float* a, Floats b) {
    return add(sum, step_at(a), b);
  }
  static Floats add(Floats sum, Floats a, Floats b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static Floats steps_at(const BFloat16* p, int n) {
    const __m256i pairs = n == kLanes ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                      : _mm256_maskz_loadu_epi16(first_lanes(n), p);
    return (Floats)_mm512_castsi256_si512(pairs);
  }
  static Floats step_at(const void* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return (Floats)_mm512_set1_epi32(pair);
  }
  static Floats step(Floats first, Floats second) {
    const Words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, order = lane | (lane + kLanes) << 16;
    return (Floats)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
  }
  static void exchange(const float* from, int64_t stride, int rows, int64_t columns, float* to, int64_t to_stride) {
    transpose_pairs(from, stride, rows, columns, to, to_stride);
  }
};
template <class T>
using ComputeOf = std::conditional_t<std::is_same_v<T, BFloat16>, Pairs, Singles>;
#else
template <class T>
using ComputeOf = Singles;
#endif

// Fetches memory that is read soon, in equal parts, while something else is computed.
class Ahead {
 public:
  // `pieces` pieces of the same size, `stride` bytes apart.
  Ahead(const void* begin, const void* end, int64_t parts, int64_t pieces = 1, int64_t stride = 0)
      : at_(static_cast<const char*>(begin)), end_(static_cast<const char*>(end)), pieces_(pieces),
        gap_(stride - (end_ - at_)), size_(end_ - at_),
        step_(pieces * size_ / (64 * std::max<int64_t>(parts, 1)) + 1) {}

  void fetch() {
    for (int64_t i = 0; i < step_ && (at_ < end_ || next()); ++i, at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char *at_, *end_;
  int64_t pieces_, gap_, size_, step_;

  bool next() {
    if (pieces_ <= 1) return false;
    --pieces_;
    at_ = end_ + gap_;
    end_ = at_ + size_;
    return size_ > 0;
  }
};

// One tile, whose lines are `stride` apart, times one panel of kVectors vectors: results [rows, kPanel].
template <class Compute, int kVectors, int kRows>
void multiply(const float* a, int64_t stride, const float* b, int64_t steps, float* result, Ahead& ahead) {
  Floats sums[kRows][kVectors] = {};
  for (int64_t left = steps; left > 0; left -= kLine, a += stride) {
    const float* end = a + std::min<int64_t>(left, kLine);
    ahead.fetch();
    for (const float* p = a; p < end; ++p, b += kVectors * kLanes) {
      Floats columns[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) columns[v] = load(b + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Compute::add(sums[r][v], p + r * kLine, columns[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(result + r * kPanel + v * kLanes, sums[r][v]);
}

template <class Compute, int kVectors, int... i>
void multiply_rows(std::integer_sequence<int, i...>, int rows, const float* a, int64_t stride, const float* b,
                   int64_t steps, float* result, Ahead& ahead) {
  static constexpr decltype(&multiply<Compute, kVectors, 1>) kFunctions[] = {multiply<Compute, kVectors, i + 1>...};
  kFunctions[rows - 1](a, stride, b, steps, result, ahead);
}

// The packed weight of one product.
struct Right {
  int64_t steps, vectors;

  Right(int64_t depth, int64_t channels, int per_step)
      : steps(ceil_div(depth, per_step)), vectors(ceil_div(channels, kLanes)) {}
  int64_t floats() const { return steps * vectors * kLanes; }
  int64_t panels() const { return ceil_div(vectors, 2); }
  int64_t lines() const { return ceil_div(steps, kLine); }
  int vectors_of(int64_t panel) const { return static_cast<int>(std::min<int64_t>(vectors - 2 * panel, 2)); }
  int64_t offset(int64_t panel) const { return panel * kPanel * steps; }

  int64_t floats_of(int64_t panel) const { return steps * vectors_of(panel) * kLanes; }

  // Of a panel before `end`: the first of `products` that follow each other.
  Ahead ahead(const float* packed, int64_t panel, int64_t end, int64_t products, int64_t parts) const {
    const float* from = packed + products * offset(panel);
    return {from, panel < end ? from + floats_of(panel) : from, parts};
  }

  template <class Compute>
  void multiply(const float* a, int64_t stride, const float* b, int64_t panel, int rows, float* result,
                Ahead& ahead) const {
    constexpr std::make_integer_sequence<int, kTile> counts;
    if (vectors_of(panel) == 2) multiply_rows<Compute, 2>(counts, rows, a, stride, b, steps, result, ahead);
    else multiply_rows<Compute, 1>(counts, rows, a, stride, b, steps, result, ahead);
  }
};

// The packed weights of a phase, and of all.
Right weights_of(const ConvPlan& plan, const ConvPhase& phase) {
  const int depth = plan.dtype == DType::kBFloat16 ? ComputeOf<BFloat16>::kDepth : Singles::kDepth;
  return {depth_of(plan, phase), plan.out_channels, depth};
}

int64_t floats_of_weights(const ConvPlan& plan) {
  int64_t total = 0;
  for (int64_t i = 0; i < plan.phase_count; ++i) total += weights_of(plan, plan.phases[i]).floats();
  return total;
}

// Rows and panels of a product that are one thread's: rows alone are divided while there are many, since each division
// of the panels repeats the preparation of the left side. That of a panel takes as long as some rows, if not prepared.
// Fewer than `few` rows take as long as these.
std::pair<Range, Range> divide(int64_t rows, int64_t panels, int thread, int team, int64_t rows_per_panel = 0,
                               int64_t few = 6) {
  constexpr int64_t kPreparation = 4;  // as long as this part of the product with a panel
  int64_t best = 1, least = INT64_MAX;
  for (int64_t parts = 1; parts <= std::min<int64_t>(team, panels); ++parts) {
    const int64_t most_rows = std::max(ceil_div(rows, team / parts), few);
    const int64_t own = kPreparation * ceil_div(panels, parts);
    const int64_t time = most_rows * (own + 1) + rows_per_panel * own;
    if (time < least) best = parts, least = time;
  }
  const int64_t row_parts = team / best, part = thread / best;
  if (part >= row_parts) return {{0, 0}, {0, 0}};
  return {share(0, rows, part, row_parts), share(0, panels, thread % best, best)};
}

}  // namespace
}  // namespace twins_fast
