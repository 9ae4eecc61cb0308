// Convolutions on a matrix unit (AMX), which reads the inputs of a tap where they lie.
//
// A tile register takes rows at equal distances. Images are copied with zeros around them, so that the inputs of one
// tap for pixels side by side are such rows, wherever the tap: [planes, rows, columns, images of a lot, channels].
// A lot interleaves as many images as fill the registers if rows of pixels are short; an input step of more than 1
// takes a plane for each remainder. A 1x1 convolution reads the images themselves.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/epilogue.h"
#include "cpu/product.h"

namespace twins_fast {
namespace {  // as in simd.h

#if defined(__AMX_BF16__)

// The matrix unit as this file uses it, for the thread that has one of these; oneDNN may have its own use for it.
class TileRegisters {
 public:
  static constexpr int kRows = 16;

  TileRegisters() {
    _tile_storeconfig(&found_);
    Configuration own = {1};
    for (int i = 0; i < 8; ++i) own.row_bytes[i] = 64, own.rows[i] = kRows;
    _tile_loadconfig(&own);
  }
  ~TileRegisters() { _tile_loadconfig(&found_); }
  TileRegisters(const TileRegisters&) = delete;

 private:
  struct Configuration {
    uint8_t palette, first_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  alignas(64) Configuration found_;
};

// The inputs along one axis, as planes of every step-th: a tap reads one of them at a constant distance.
struct Axis {
  int64_t step, points, size;     // inputs from output to output, outputs, and inputs of a plane
  int64_t before = 0, after = 0;  // the first and past the last: what taps read
  uint32_t used = 0;              // planes

  Axis(int64_t step, int64_t points, int64_t inputs) : step(step), points(points), size(ceil_div(inputs, step)) {}

  int64_t plane_of(int64_t d) const { return (d % step + step) % step; }
  int64_t distance(int64_t d) const { return (d - plane_of(d)) / step; }

  void add(int64_t d) {
    before = std::max(before, -distance(d));
    after = std::max(after, distance(d));
    used |= 1u << plane_of(d);
  }
  // From an image to the next: what one has after its last pixel, the next one has before its first.
  int64_t pitch() const { return std::max(size + before, points + after); }
  int64_t planes() const { return __builtin_popcount(used); }
  int64_t number(int64_t d) const { return __builtin_popcount(used & ((1u << plane_of(d)) - 1)); }
};

struct MatrixUnit {
  using T = BFloat16;
  static constexpr int kRows = TileRegisters::kRows;
  static constexpr int64_t kMostLot = 16, kFewRows = 2 * kRows;
  // Of the second-level cache, which has 2 MB or more where there is a matrix unit.
  static constexpr int64_t kCopyBytes = int64_t{512} << 10, kWeightBytes = int64_t{512} << 10;

  const ConvPlan& plan;
  const int64_t lines = lines_of(plan);

  // A phase for some number of images.
  struct Layout {
    const ConvPhase& phase;
    Axis y, x;
    int64_t lot, row_bytes;  // images, and from pixel to pixel
    bool in_place;

    int64_t width() const { return x.pitch() * lot; }  // in positions
    int64_t front() const { return x.before * lot; }
    // Rows of pixels count through all lots; `place` counts the zeros between these as well.
    int64_t place(int64_t row) const { return row / y.points * y.pitch() + row % y.points; }
    int64_t plane_bytes(int64_t rows) const {
      const int64_t most = y.before + y.after + rows + (rows / y.points + 1) * (y.pitch() - y.points);
      return (front() + most * width() + x.after * lot + kRows) * row_bytes;
    }
    int64_t planes() const { return y.planes() * x.planes(); }
    int64_t rows_of_block() const {
      const int64_t bytes = std::max<int64_t>(planes(), 1) * width() * row_bytes;
      return std::max<int64_t>(1, kCopyBytes / bytes * y.points / y.pitch());
    }
    int64_t tiles_of_block() const {
      const int64_t rows = rows_of_block();
      return ceil_div((rows + (rows / y.points + 1) * (y.pitch() - y.points)) * width(), kRows) + 1;
    }
    int64_t copy_floats() const {
      return in_place ? 0 : ceil_div(planes() * plane_bytes(rows_of_block()), 4 * kLine) * kLine;
    }
    int64_t floats() const {
      return copy_floats() + ceil_div(tiles_of_block() * (2 + kRows) + 2 * phase.taps, kLine) * kLine;
    }
  };

  // Of images that are copied, in lots of one.
  Layout layout(const ConvPhase& phase) const {
    Layout l{phase, {plan.in_step_y, phase.rows, plan.in_h}, {plan.in_step_x, phase.columns, plan.in_w}, 1, 0, false};
    for (int64_t i = phase.first_tap; i < phase.first_tap + phase.taps; ++i) {
      l.y.add(plan.taps[i].dy);
      l.x.add(plan.taps[i].dx);
    }
    // Rows whose distance is a multiple of 512 bytes would share few places of the first-level cache.
    l.row_bytes = 64 * (lines + (lines % 8 == 0));
    return l;
  }

  // In place if that can be, else with the lot that takes the fewest tiles.
  Layout layout(const ConvPhase& phase, int64_t images) const {
    Layout best = layout(phase);
    const auto plain = [](const Axis& axis, int64_t inputs) {
      return axis.step == 1 && axis.after == 0 && axis.pitch() == inputs;
    };
    if (plain(best.y, plan.in_h) && plain(best.x, plan.in_w) && plan.in_channels % kLineChannels == 0 &&
        images * plan.in_h * plan.in_w >= kRows) {
      best.in_place = true;
      best.row_bytes = 2 * plan.in_channels;
      return best;
    }
    int64_t fewest = INT64_MAX;
    for (int64_t lot = 1; lot <= std::min(images, kMostLot); lot *= 2) {
      const Axis &y = best.y, &x = best.x;
      const int64_t together = ceil_div(((y.points - 1) * x.pitch() + x.points) * lot, kRows);
      const int64_t tiles = ceil_div(images, lot) * std::min(y.points * ceil_div(x.points * lot, kRows), together);
      if (tiles < fewest) best.lot = lot, fewest = tiles;
    }
    return best;
  }

  int64_t packed_floats() const { return floats_of_weights(plan); }

  int64_t floats_per_thread() const {
    int64_t most = 0;
    for (int64_t i = 0; i < plan.phase_count; ++i) {
      if (plan.phases[i].rows * plan.phases[i].columns == 0) continue;
      Layout l = layout(plan.phases[i]);
      for (l.lot = 1; l.lot <= kMostLot; l.lot *= 2) most = std::max(most, l.floats());
      most = std::max(most, layout(plan.phases[i], kRows).floats());
    }
    return most;
  }

  void run(const ConvRun& args, int threads) const {
    const Epilogue<T> epilogue(plan, args);
    float* workspace = aligned(args.workspace);
    const int64_t floats = floats_per_thread();
    in_parallel(threads, [&, floats](int thread, int team) {
      const TileRegisters registers;
      const float* packed = static_cast<const float*>(args.packed);
      for (int64_t i = 0; i < plan.phase_count; ++i) {
        const ConvPhase& phase = plan.phases[i];
        const Right matrix = weights_of(plan, phase);
        if (phase.rows * phase.columns)
          Share{*this, args, layout(phase, args.images), matrix, epilogue, packed, workspace + thread * floats}.run(
              thread, team);
        packed += matrix.floats();
      }
    });
  }

  // One thread's part of a phase.
  struct Share {
    const MatrixUnit& kernel;
    const ConvRun& args;
    const Layout layout;
    const Right& matrix;
    const Epilogue<T>& epilogue;
    const float* packed;
    float* workspace;

    const ConvPlan& plan = kernel.plan;
    int64_t* const taps = reinterpret_cast<int64_t*>(workspace + layout.copy_floats());  // from a pixel's inputs, bytes
    int64_t* const starts = taps + layout.phase.taps;                                    // of tiles, positions
    int32_t* const pixels = reinterpret_cast<int32_t*>(starts + layout.tiles_of_block());  // of their rows, or -1

    void run(int thread, int team) const {
      const int64_t lots = ceil_div(args.images, layout.lot), columns = layout.x.points * layout.lot;
      const int64_t all = lots * layout.y.points;
      auto [share, panels] = divide(all * columns, matrix.panels(), thread, team, 0, kFewRows);
      const Range rows{share.begin / columns, share.end / columns};  // a row of pixels is not divided
      const int64_t at_once = layout.rows_of_block();
      for (int64_t begin = rows.begin; begin < rows.end; begin += at_once) {
        const Range block{begin, std::min(begin + at_once, rows.end)};
        const int64_t top = layout.place(block.begin) - layout.y.before;
        const int64_t bottom = layout.place(block.end - 1) + layout.y.after + 1;
        const char* base = reinterpret_cast<const char*>(workspace) + layout.front() * layout.row_bytes;
        const int64_t plane = (layout.front() + (bottom - top) * layout.width()) * layout.row_bytes;
        if (layout.in_place) base = static_cast<const char*>(args.x) + top * layout.width() * layout.row_bytes;
        else copy({top, bottom}, plane);
        for (int64_t t = 0; t < layout.phase.taps; ++t) {
          const ConvTap& tap = plan.taps[layout.phase.first_tap + t];
          const int64_t number = layout.y.number(tap.dy) * layout.x.planes() + layout.x.number(tap.dx);
          taps[t] = number * plane + (layout.y.distance(tap.dy) * layout.width() +
                                      layout.x.distance(tap.dx) * layout.lot) * layout.row_bytes;
        }
        const int64_t tiles = find_tiles(block, top);
        const int64_t far = begin == rows.begin ? panels.end : 0;  // later blocks find the weights in a cache
        const Range next{block.end, std::min(block.end + at_once, rows.end)};
        multiply_block(base, tiles, panels, far, inputs_ahead<T>(plan, args, next, all, panels.size() * tiles));
      }
    }

    // Copies rows of all lots from `top` on, in which those without pixels are zero.
    void copy(Range rows, int64_t plane_bytes) const {
      const Axis &ys = layout.y, &xs = layout.x;
      char* plane = reinterpret_cast<char*>(workspace);
      const int64_t gap = (xs.pitch() - xs.size) * layout.lot * layout.row_bytes;
      for (int64_t py = 0; py < ys.step; ++py)
        for (int64_t px = 0; px < xs.step; ++px) {
          if (!(ys.used >> py & xs.used >> px & 1)) continue;
          char* to = plane;
          plane += plane_bytes;
          clear(to, layout.front() * layout.row_bytes);
          to += layout.front() * layout.row_bytes;
          for (int64_t row = rows.begin; row < rows.end; ++row) {
            const int64_t first = floor_div(row, ys.pitch()) * layout.lot, i = row - first / layout.lot * ys.pitch();
            const int64_t y = i * ys.step + py;
            if (first < 0 || first >= args.images || y >= plan.in_h) {
              clear(to, layout.width() * layout.row_bytes);
              to += layout.width() * layout.row_bytes;
              continue;
            }
            for (int64_t x = px; x < xs.size * xs.step; x += xs.step)
              for (int64_t image = first; image < first + layout.lot; ++image, to += layout.row_bytes) {
                const bool inside = x < plan.in_w && image < args.images;
                if (inside) copy_pixel(((image * plan.in_h + y) * plan.in_w + x) * plan.in_channels, to);
                else clear(to, layout.row_bytes);
              }
            clear(to, gap);
            to += gap;
          }
        }
    }

    static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

    static void clear(char* to, int64_t bytes) {
      for (int64_t i = 0; i < bytes; i += 64) _mm512_store_si512(to + i, _mm512_setzero_si512());
    }

    void copy_pixel(int64_t at, char* to) const {
      const T* from = static_cast<const T*>(args.x) + at;
      int64_t left = plan.in_channels;
      for (; left >= kLineChannels; left -= kLineChannels, from += kLineChannels, to += 64)
        _mm512_store_si512(to, _mm512_loadu_si512(from));
      if (left) _mm512_store_si512(to, _mm512_maskz_loadu_epi16((1u << left) - 1, from));
    }

    // As few tiles as have all pixels: each begins at one.
    int64_t find_tiles(Range rows, int64_t top) const {
      int64_t tiles = 0, end = INT64_MIN;
      const int64_t last = args.images * plan.in_h * plan.in_w - top * layout.width() - kRows;  // to read in place
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const int64_t first = row / layout.y.points * layout.lot, i = row % layout.y.points;
        const int64_t count = std::min(layout.lot, args.images - first);
        int64_t pixel = (first * plan.out_h + layout.phase.oy + i * plan.out_step_y) * plan.out_w + layout.phase.ox;
        int64_t at = (layout.place(row) - top) * layout.width();
        for (int64_t x = 0; x < layout.x.points; ++x, at += layout.lot, pixel += plan.out_step_x)
          for (int64_t n = 0; n < count; ++n) {
            if (at + n >= end) {
              starts[tiles] = layout.in_place ? std::min(at + n, last) : at + n;
              end = starts[tiles] + kRows;
              std::fill_n(pixels + kRows * tiles++, kRows, -1);
            }
            pixels[kRows * tiles + at + n - end] = static_cast<int32_t>(pixel + n * plan.out_h * plan.out_w);
          }
      }
      return tiles;
    }

    // A panel of large weights is read once for all tiles; else two tiles take all panels, whose results are near.
    void multiply_block(const char* base, int64_t tiles, Range panels, int64_t far, Ahead inputs) const {
      alignas(64) float sums[2][2 * kRows * kPanel];
      Finish finish{epilogue};
      const bool large = 4 * panels.size() * matrix.offset(1) > kWeightBytes;
      const int64_t group = large ? tiles : 2, steps = kernel.lines * layout.phase.taps;
      const int at_once = static_cast<int>(std::max<int64_t>(4, ceil_div(2 * kRows, std::max<int64_t>(steps, 1))));
      for (int64_t first = 0; first < tiles; first += group)
        for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
          Ahead weights = matrix.ahead(packed, panel + 1, first ? 0 : far, 1, ceil_div(group, 2) * steps);
          const int vectors = matrix.vectors_of(panel);
          for (int64_t tile = first; tile < std::min(first + group, tiles); tile += 2) {
            const bool two = tile + 1 < tiles;
            const int count = (two ? 2 : 1) * kRows;
            const int32_t* rows = pixels + kRows * tile;
            inputs.fetch();
            for (int r = 0; r < count; ++r)
              if (rows[r] >= 0) epilogue.prefetch(rows[r], panel * kPanel);
            float* own = sums[finish.sums == sums[0]];
            multiply(base + starts[tile] * layout.row_bytes, two ? base + starts[tile + 1] * layout.row_bytes : nullptr,
                     packed + matrix.offset(panel), vectors, own, [&]() __attribute__((always_inline)) {
                       weights.fetch();
                       finish.some(at_once);
                     });
            finish.all();
            finish.begin(own, rows, count, panel * kPanel, vectors);
          }
        }
      finish.all();
    }

    template <class F>
    void multiply(const char* a, const char* b, const float* right, int vectors, float* sums,
                  const F& meanwhile) const {
      if (vectors == 2 && b) multiply<2, 2>(a, b, right, sums, meanwhile);
      else if (vectors == 2) multiply<1, 2>(a, b, right, sums, meanwhile);
      else if (b) multiply<2, 1>(a, b, right, sums, meanwhile);
      else multiply<1, 1>(a, b, right, sums, meanwhile);
    }

    // One or two tiles of rows times a panel of one or two vectors: sums [rows, kPanel].
    template <int kTiles, int kVectors, class F>
    void multiply(const char* a, const char* b, const float* right, float* sums, const F& meanwhile) const {
      const int64_t stride = layout.row_bytes, count = layout.phase.taps, lines = kernel.lines;
      asm volatile("" ::: "memory");  // the compiler does not know that tiles are read from memory
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t line = 0; line < lines; ++line, a += 64, b += 64)
        for (int64_t t = 0; t < count; ++t, right += kLine * kVectors * kLanes) {
          _tile_loadd(6, right, 64 * kVectors);
          if constexpr (kVectors == 2) _tile_loadd(7, right + kLanes, 64 * kVectors);
          _tile_loadd(4, a + taps[t], stride);
          _tile_dpbf16ps(0, 4, 6);
          if constexpr (kVectors == 2) _tile_dpbf16ps(1, 4, 7);
          if constexpr (kTiles == 2) {
            _tile_loadd(5, b + taps[t], stride);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (kVectors == 2) _tile_dpbf16ps(3, 5, 7);
          }
          meanwhile();
        }
      _tile_stored(0, sums, 4 * kPanel);
      if constexpr (kVectors == 2) _tile_stored(1, sums + kLanes, 4 * kPanel);
      if constexpr (kTiles == 2) {
        _tile_stored(2, sums + kRows * kPanel, 4 * kPanel);
        if constexpr (kVectors == 2) _tile_stored(3, sums + kRows * kPanel + kLanes, 4 * kPanel);
      }
    }
  };

  // Turns the sums of some tiles into results, a few rows at a time while the next ones are computed.
  struct Finish {
    const Epilogue<T> epilogue;
    const float* sums = nullptr;
    const int32_t* pixels = nullptr;
    int row = 0, rows = 0, vectors = 0;
    int64_t channel = 0;

    void begin(const float* new_sums, const int32_t* new_pixels, int count, int64_t c, int v) {
      sums = new_sums, pixels = new_pixels, row = 0, rows = count, channel = c, vectors = v;
    }

    void some(int count) {
      if (row >= rows) return;
      const int end = std::min(row + count, rows);
      for (int v = 0; v < vectors; ++v) {
        const int64_t c = channel + v * kLanes;
        const float* from = sums + v * kLanes;
        epilogue.with_vector(c, [from, c, end, row = row, pixels = pixels, epilogue = epilogue](auto n, Floats bias) {
          for (int r = row; r < end; ++r)
            if (pixels[r] >= 0) epilogue(load(from + r * kPanel) + bias, pixels[r], c, n);
        });
      }
      row = end;
    }

    void all() { some(rows); }
  };
};

#endif

}  // namespace
}  // namespace twins_fast
