// Convolutions as one product for each phase of output pixels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/epilogue.h"
#include "cpu/product.h"

namespace twins_fast {
namespace {  // as in simd.h

// The left side holds all inputs of an output pixel.
template <class T>
struct Gemm {
  using Compute = ComputeOf<T>;
  using Element = typename Compute::Element;
  static constexpr int kLineElements = kLine * Compute::kDepth;

  static constexpr int64_t kMostTiles = 16;

  const ConvPlan& plan;

  struct Spot {
    const T* image;
    int64_t y, x;   // of the input, without the tap's offset
    int64_t pixel;  // of the output
  };

  static int64_t tiles_of_block(const Right& right) {
    const int64_t fit = kBlockBytes / (4 * kTile * kLine) / std::max<int64_t>(1, right.lines());
    return std::clamp<int64_t>(fit, 1, kMostTiles);
  }

  int64_t packed_floats() const { return floats_of_weights(plan); }

  int64_t floats_per_thread() const {
    int64_t most = 0;
    for (int64_t i = 0; i < plan.phase_count; ++i) {
      const Right matrix = weights_of(plan, plan.phases[i]);
      most = std::max(most, tiles_of_block(matrix) * matrix.lines() * kTile * kLine);
    }
    return most;
  }

  void run(const ConvRun& args, int threads) const {
    const Epilogue<T> epilogue(plan, args);
    float* workspace = aligned(args.workspace);
    const int64_t floats = floats_per_thread();
    in_parallel(threads, [&, floats](int thread, int team) {
      const float* packed = static_cast<const float*>(args.packed);
      for (int64_t i = 0; i < plan.phase_count; ++i) {
        const ConvPhase& phase = plan.phases[i];
        const Right matrix = weights_of(plan, phase);
        const auto [rows, panels] = divide(args.images * phase.rows * phase.columns, matrix.panels(), thread, team);
        run_phase(args, phase, matrix, rows, panels, packed, workspace + thread * floats, epilogue);
        packed += matrix.floats();
      }
    });
  }

  void run_phase(const ConvRun& args, const ConvPhase& phase, const Right& matrix, Range rows, Range panels,
                 const float* packed, float* block, const Epilogue<T>& epilogue) const {
    const int64_t tiles = tiles_of_block(matrix), floats_of_tile = matrix.lines() * kTile * kLine;
    int64_t pixels[kMostTiles * kTile];
    alignas(64) float results[kTile * kPanel];
    const int64_t all = args.images * phase.rows * phase.columns;
    for (int64_t begin = rows.begin; begin < rows.end; begin += tiles * kTile) {
      const int64_t end = std::min(begin + tiles * kTile, rows.end), used = ceil_div(end - begin, kTile);
      const int64_t far = begin == rows.begin ? panels.end : 0;  // later blocks find the weights in a cache
      Ahead weights = matrix.ahead(packed, panels.begin, far, 1, used);
      for (int64_t r = begin; r < end; r += kTile) {
        weights.fetch();
        gather(args, phase, r, static_cast<int>(std::min<int64_t>(end - r, kTile)),
               block + (r - begin) / kTile * floats_of_tile, pixels + r - begin);
      }
      const Range next{end, std::min(end + tiles * kTile, rows.end)};
      Ahead inputs = inputs_ahead<T>(plan, args, next, all, panels.size() * used);
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        weights = matrix.ahead(packed, panel + 1, far, 1, used * matrix.lines());
        for (int64_t r = begin; r < end; r += kTile) {
          const int count = static_cast<int>(std::min<int64_t>(end - r, kTile));
          const float* tile = block + (r - begin) / kTile * floats_of_tile;
          inputs.fetch();
          for (int k = 0; k < count; ++k) epilogue.prefetch(pixels[r - begin + k], panel * kPanel);
          matrix.template multiply<Compute>(tile, kTile * kLine, packed + matrix.offset(panel), panel, count, results,
                                            weights);
          for (int v = 0; v < matrix.vectors_of(panel); ++v) {
            const int64_t c = panel * kPanel + v * kLanes;
            epilogue.with_vector(c, [&, epilogue](auto n, Floats bias) {
              for (int k = 0; k < count; ++k)
                epilogue(load(results + k * kPanel + v * kLanes) + bias, pixels[r - begin + k], c, n);
            });
          }
        }
      }
    }
  }

  // Fills one tile, and says which pixels its rows are.
  void gather(const ConvRun& args, const ConvPhase& phase, int64_t first, int count, float* tile,
              int64_t* pixels) const {
    Spot spots[kTile];
    int64_t j = first % phase.columns, i = first / phase.columns % phase.rows;
    int64_t image = first / phase.columns / phase.rows;
    for (int r = 0; r < count; ++r) {
      spots[r] = {static_cast<const T*>(args.x) + image * plan.in_h * plan.in_w * plan.in_channels,
                  i * plan.in_step_y, j * plan.in_step_x, 0};
      pixels[r] = (image * plan.out_h + phase.oy + i * plan.out_step_y) * plan.out_w + phase.ox + j * plan.out_step_x;
      if (++j < phase.columns) continue;
      j = 0;
      if (++i < phase.rows) continue;
      i = 0;
      ++image;
    }
    const ConvTap* tap = plan.taps + phase.first_tap;
    const ConvTap* last = tap + phase.taps;
    int64_t k = 0;
    while (tap < last) {
      int64_t width = 1;  // taps side by side, whose inputs are too
      while (tap + width < last && tap[width].dy == tap->dy && tap[width].dx == tap->dx + width) ++width;
      for (int r = 0; r < count; ++r) {
        const int64_t y = spots[r].y + tap->dy, x = spots[r].x + tap->dx;
        const bool inside = 0 <= y && y < plan.in_h;
        const int64_t begin = inside ? std::clamp<int64_t>(-x, 0, width) : width;
        const int64_t end = std::clamp<int64_t>(plan.in_w - x, begin, width);
        const T* from = spots[r].image + (y * plan.in_w + x + begin) * plan.in_channels;
        put(tile + r * kLine, k, nullptr, begin * plan.in_channels);
        put(tile + r * kLine, k + begin * plan.in_channels, from, (end - begin) * plan.in_channels);
        put(tile + r * kLine, k + end * plan.in_channels, nullptr, (width - end) * plan.in_channels);
      }
      k += width * plan.in_channels;
      tap += width;
    }
    if (k % Compute::kDepth)
      for (int r = 0; r < count; ++r) put(tile + r * kLine, k, nullptr, 1);
  }

  // Writes values, or zeros, to a row of a tile from its k-th value on.
  static void put(float* row, int64_t k, const T* from, int64_t count) {
    constexpr int kNextLine = (kTile - 1) * kLineElements;  // from the end of a line
    if (count <= 0) return;
    const int at = static_cast<int>(k % kLineElements);
    Element* to = reinterpret_cast<Element*>(row) + k / kLineElements * (kNextLine + kLineElements) + at;
    if (at) {
      const int n = static_cast<int>(std::min<int64_t>(count, kLineElements - at));
      put_some(to, from, n);
      to += kLineElements - at + kNextLine;
      count -= n;
      if (from) from += n;
    }
    for (; count >= kLineElements; count -= kLineElements, to += kNextLine + kLineElements) {
      put_some(to, from, kLineElements);
      if (from) from += kLineElements;
    }
    if (count) put_some(to, from, static_cast<int>(count));
  }

  static inline __attribute__((always_inline)) void put_some(Element* to, const T* from, int count) {
    if constexpr (std::is_same_v<T, Element>) copy_bytes(to, from, count * sizeof(T));
    else for_vectors(0, count, [=](int64_t i, int n) { store(to + i, from ? load(from + i, n) : Floats{}, n); });
  }
};

}  // namespace
}  // namespace twins_fast
