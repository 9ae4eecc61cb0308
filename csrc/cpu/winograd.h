// 3x3 convolutions by Winograd's transforms.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/epilogue.h"
#include "cpu/product.h"

namespace twins_fast {
namespace {  // as in simd.h

// Winograd's F(k x k, 3x3) along one dimension, for k = 2 or 4: k results are the sums A^T of products of the k + 2
// inputs' B^T with the three weights' G.
template <int kSize>
struct Transform;

template <>
struct Transform<2> {
  // B^T: (1 0 -1 0), (0 1 1 0), (0 -1 1 0), (0 1 0 -1).
  static inline __attribute__((always_inline)) void inputs(const Floats (&d)[4], Floats (&v)[4]) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
  // G: (1 0 0), (1/2 1/2 1/2), (1/2 -1/2 1/2), (0 0 1).
  static void weights(Floats a, Floats b, Floats c, Floats (&v)[4]) {
    const Floats even = (a + c) * 0.5f, odd = b * 0.5f;
    v[0] = a;
    v[1] = even + odd;
    v[2] = even - odd;
    v[3] = c;
  }
  // A^T: (1 1 1 0), (0 1 -1 -1).
  static inline __attribute__((always_inline)) void results(const Floats (&m)[4], Floats (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
};

// Of Cook and Toom, at 0, 3/4, -3/4, 3/2, -3/2 and infinity, which lose few digits. The rows of G add up to about one.
// B^T would with its rows over 4 or 8; being monic they take fewer operations, and powers of two round nothing.
template <>
struct Transform<4> {
  // B^T: the coefficients, lowest first, of the product of x - q over the other points q; of all points, in the last.
  static inline __attribute__((always_inline)) void inputs(const Floats (&d)[6], Floats (&v)[6]) {
    const Floats even1 = d[4] - d[2] * 2.25f, odd1 = d[3] - d[1] * 2.25f;
    const Floats even2 = d[4] - d[2] * 0.5625f, odd2 = d[3] - d[1] * 0.5625f;
    v[0] = (d[4] - d[2] * 2.8125f) + d[0] * 1.265625f;
    v[1] = even1 + odd1 * 0.75f;
    v[2] = even1 - odd1 * 0.75f;
    v[3] = even2 + odd2 * 1.5f;
    v[4] = even2 - odd2 * 1.5f;
    v[5] = (d[5] - d[3] * 2.8125f) + d[1] * 1.265625f;
  }
  // G: (1 q q^2) over the product of q - r over the other points r; (0 0 1) in the last.
  static void weights(Floats a, Floats b, Floats c, Floats (&v)[6]) {
    const Floats even1 = (a + c * 0.5625f) * (-128 / 243.0f), odd1 = b * (-32 / 81.0f);
    const Floats even2 = (a + c * 2.25f) * (32 / 243.0f), odd2 = b * (16 / 81.0f);
    v[0] = a * (64 / 81.0f);
    v[1] = even1 + odd1;
    v[2] = even1 - odd1;
    v[3] = even2 + odd2;
    v[4] = even2 - odd2;
    v[5] = c;
  }
  // A^T: the powers 0 to 3 of the points; of infinity, the last alone. Each ends with a sum, which is rounded, so that
  // what the epilogue adds is not added to a product before its rounding.
  static inline __attribute__((always_inline)) void results(const Floats (&m)[6], Floats (&y)[4]) {
    const Floats even1 = m[1] + m[2], odd1 = m[1] - m[2], even2 = m[3] + m[4], odd2 = m[3] - m[4];
    y[0] = m[0] + even1 + even2;
    y[1] = odd1 * 0.75f + odd2 * 1.5f;
    y[2] = even1 * 0.5625f + even2 * 2.25f;
    y[3] = m[5] + (odd1 + odd2 * 8) * 0.421875f;
  }
};

// Each tile of kSize x kSize results is made of kReach x kReach products over channels, of transformed inputs.
//
// The input gradient is the convolution with the kernel flipped and its channels exchanged. An adjoint plan reads and
// writes the pixels backwards instead of flipping, so that the transformed weights of the convolution itself serve both
// and are stored once; their channels are exchanged before use, for one product of a panel at a time.
template <class T, int kSize>
struct Winograd {
  using Compute = ComputeOf<T>;
  using Element = typename Compute::Element;
  static constexpr int kLineElements = kLine * Compute::kDepth;
  static constexpr int kReach = kSize + 2, kProducts = kReach * kReach;

  const ConvPlan& plan;
  const Right matrix{plan.in_channels, plan.out_channels, Compute::kDepth};
  const Right source{plan.out_channels, plan.in_channels, Compute::kDepth};  // of an adjoint plan, what is packed
  const int64_t along = plan.adjoint ? -1 : 1;                               // the pixels
  const int64_t across = ceil_div(plan.out_w, kSize), down = ceil_div(plan.out_h, kSize);
  // Transformed inputs are [groups, lines, products, kTile, kLine], and products [groups, products, kTile, kPanel].
  static constexpr int64_t kLineFloats = kProducts * kTile * kLine, kProductFloats = kProducts * kTile * kPanel;
  const int64_t group_floats = matrix.lines() * kLineFloats;
  const int64_t groups = groups_of_block();
  // A panel of large weights is read once for several groups, and exchanged once; else one group's products stay near.
  const bool large_panels = matrix.steps * kProducts * kPanel * 4 > kSize / 2 * kBlockBytes;
  const int64_t groups_at_once = large_panels || plan.adjoint ? groups : 1;
  const int64_t exchanged_floats = plan.adjoint ? matrix.steps * kPanel : 0;
  static constexpr int64_t kExchange = 8 / Compute::kDepth;  // as long as this many tiles of a product

  int64_t groups_of_block() const {
    // Weights that strain the third-level cache are read seldom, even if the second cannot hold the inputs.
    if (kSize == 4 && packed_floats() * 4 > kStreamedBytes)
      return std::clamp<int64_t>(kStreamedBytes / 4 / (4 * group_floats), 2, 8);
    // So are those that are exchanged, but for inputs that it should hold.
    if (plan.adjoint) return std::clamp<int64_t>(4 * kBlockBytes / (4 * group_floats), 2, 8);
    return std::clamp<int64_t>(2 * kBlockBytes / (4 * group_floats), 2, 16 / kSize);
  }

  int64_t packed_floats() const { return kProducts * (plan.adjoint ? source : matrix).floats(); }

  int64_t floats_per_thread() const {
    return groups * group_floats + groups_at_once * kProductFloats + exchanged_floats;
  }

  struct Place {
    int64_t tx, ty, image;
  };

  Place place(int64_t tile) const { return {tile % across, tile / across % down, tile / across / down}; }

  void step(Place& at) const {
    if (++at.tx < across) return;
    at.tx = 0;
    if (++at.ty < down) return;
    at.ty = 0;
    ++at.image;
  }

  void run(const ConvRun& args, int threads) const {
    const Epilogue<T> epilogue(plan, args);
    float* workspace = aligned(args.workspace);
    in_parallel(threads, [&](int thread, int team) {
      const int64_t all = args.images * down * across;
      const auto [tiles, panels] = divide(all, matrix.panels(), thread, team, plan.adjoint ? kExchange : 0);
      const float* packed = static_cast<const float*>(args.packed);
      float* inputs = workspace + thread * floats_per_thread();
      float* products = inputs + groups * group_floats;
      for (int64_t begin = tiles.begin; begin < tiles.end; begin += groups * kTile) {
        const Range block{begin, std::min(begin + groups * kTile, tiles.end)};
        const int64_t far = begin == tiles.begin ? panels.end : 0;  // later blocks find the weights in a cache
        product_ahead(packed, panels.begin, 0, panels.begin < far, 1).fetch();
        transform_inputs(args, block, inputs);
        const Range next{block.end, std::min(block.end + groups * kTile, tiles.end)};
        Ahead ahead = inputs_ahead<T>(plan, args, next, all,
                                      panels.size() * kProducts * ceil_div(block.size(), groups_at_once * kTile));
        for (int64_t panel = panels.begin; panel < panels.end; ++panel)
          for (int64_t t = block.begin; t < block.end; t += groups_at_once * kTile) {
            const Range part{t, std::min(t + groups_at_once * kTile, block.end)};
            multiply_tiles(inputs + (t - begin) / kTile * group_floats, packed, panel, far, part, products, epilogue,
                           ahead);
            transform_products(part, panel, products, epilogue);
          }
      }
    });
  }

  // The weights of one product of a panel, if they are `far`.
  Ahead product_ahead(const float* packed, int64_t panel, int p, bool far, int64_t parts) const {
    if (!plan.adjoint) {
      const float* from = packed + kProducts * matrix.offset(panel) + p * matrix.floats_of(panel);
      return {from, far ? from + matrix.floats_of(panel) : from, parts};
    }
    constexpr int64_t kSteps = kPanel / Compute::kDepth;
    const int64_t width = source.vectors_of(0) * kLanes, steps = std::min(kSteps, source.steps - panel * kSteps);
    const float* from = packed + (p * source.steps + panel * kSteps) * width;
    return {from, far ? from + steps * width : from, parts, source.panels(), 4 * kProducts * source.offset(1)};
  }

  // The weights of one product of a panel, of which an adjoint plan's channels are to be exchanged.
  const float* weights(const float* packed, int64_t panel, int p, float* exchanged) const {
    if (!plan.adjoint) return packed + kProducts * matrix.offset(panel) + p * matrix.floats_of(panel);
    const int64_t width = matrix.vectors_of(panel) * kLanes;
    for (int64_t q = 0; q < source.panels(); ++q)
      for (int v = 0; v < matrix.vectors_of(panel); ++v) {
        const int64_t first = (panel * kPanel + v * kLanes) / Compute::kDepth;
        const int64_t stride = source.vectors_of(q) * kLanes;
        Compute::exchange(packed + kProducts * source.offset(q) + p * source.floats_of(q) + first * stride, stride,
                          static_cast<int>(std::min<int64_t>(source.steps - first, kLanes / Compute::kDepth)),
                          std::min<int64_t>(plan.in_channels - q * kPanel, kPanel),
                          exchanged + q * kPanel / Compute::kDepth * width + v * kLanes, width);
      }
    return exchanged;
  }

  void multiply_tiles(const float* inputs, const float* packed, int64_t panel, int64_t far, Range tiles,
                      float* products, const Epilogue<T>& epilogue, Ahead& ahead) const {
    float* exchanged = products + groups_at_once * kProductFloats;
    const int64_t parts = ceil_div(tiles.size(), kTile) * matrix.lines();
    Place at = place(tiles.begin);
    int64_t fetched = 0, row = 0, pixel = pixel_of(at);  // rows of results, and the next one
    for (int p = 0; p < kProducts; ++p) {
      ahead.fetch();
      const bool last = p + 1 == kProducts;
      Ahead next = product_ahead(packed, panel + last, last ? 0 : p + 1, panel + last < far, parts);
      const float* b = weights(packed, panel, p, exchanged);
      for (const int64_t end = ceil_div(tiles.size() * kSize * (p + 1), kProducts); fetched < end; ++fetched) {
        for (int j = 0; j < kSize; ++j) epilogue.prefetch(pixel + along * j, panel * kPanel);
        pixel += along * plan.out_w;
        if (++row < kSize) continue;
        row = 0;
        step(at);
        pixel = pixel_of(at);
      }
      for (int64_t t = 0; t < tiles.size(); t += kTile) {
        const int count = static_cast<int>(std::min<int64_t>(tiles.size() - t, kTile));
        matrix.template multiply<Compute>(inputs + t / kTile * group_floats + p * (kTile * kLine), kLineFloats, b,
                                          panel, count, products + t / kTile * kProductFloats + p * (kTile * kPanel),
                                          next);
      }
    }
  }

  int64_t pixel_of(const Place& at) const {
    return along * ((at.image * plan.out_h + at.ty * kSize) * plan.out_w + at.tx * kSize);
  }

  void transform_inputs(const ConvRun& args, Range tiles, float* inputs) const {
    static constexpr T kZeros[kLanes] = {};  // rows outside the image stay there, whatever the pixel
    const int64_t channels = plan.in_channels, last = args.images * plan.in_h * plan.in_w - 1;
    const T* x = static_cast<const T*>(args.x) + (plan.adjoint ? last * channels : 0);
    for (int64_t t = tiles.begin; t < tiles.end;) {
      const Place at = place(t);
      const int64_t count = std::min(across - at.tx, tiles.end - t);
      const T* rows[kReach];
      int64_t steps[kReach];  // from pixel to pixel
      for (int i = 0; i < kReach; ++i) {
        const int64_t y = at.ty * kSize - 1 + i;
        const bool inside = 0 <= y && y < plan.in_h;
        rows[i] = inside ? x + along * (at.image * plan.in_h + y) * plan.in_w * channels : kZeros;
        steps[i] = inside ? along * channels : 0;
      }
      const int64_t first = t - tiles.begin;
      float* to = inputs + first / kTile * group_floats + first % kTile * kLine;
      for_vectors(0, channels, [&](int64_t c, int n) {
        const T* from[kReach];
        for (int i = 0; i < kReach; ++i) from[i] = rows[i] + (steps[i] ? c : 0);
        transform_row(from, steps, at.tx * kSize, count, n, first % kTile,
                      reinterpret_cast<Element*>(to + c / kLineElements * kLineFloats) + c % kLineElements);
      });
      t += count;
    }
  }

  // One vector of channels of `count` tiles side by side.
  void transform_row(const T* const (&rows)[kReach], const int64_t (&steps)[kReach], int64_t x, int64_t count, int n,
                     int row, Element* to) const {
    const int64_t width = plan.in_w, next_group = (group_floats - kTile * kLine) * Compute::kDepth;
    const auto column = [=](int64_t x, Floats(&v)[kReach]) __attribute__((always_inline)) {
      Floats d[kReach] = {};
      if (0 <= x && x < width)
        for_each<kReach>([&](int i) __attribute__((always_inline)) { d[i] = load(rows[i] + x * steps[i], n); });
      Transform<kSize>::inputs(d, v);
    };
    Floats columns[kReach][kReach];  // the first two are shared with the tile before
    column(x - 1, columns[0]);
    column(x, columns[1]);
    for (int64_t i = 0; i < count; ++i, x += kSize) {
      for_each<kSize>([&](int j) __attribute__((always_inline)) { column(x + j + 1, columns[j + 2]); });
      for_each<kReach>([&](int k) __attribute__((always_inline)) {
        constexpr int kProduct = kTile * kLineElements;
        Floats d[kReach], v[kReach];
        for_each<kReach>([&](int j) __attribute__((always_inline)) { d[j] = columns[j][k]; });
        Transform<kSize>::inputs(d, v);
        for_each<kReach>([&](int j) __attribute__((always_inline)) { store(to + (kReach * k + j) * kProduct, v[j]); });
        columns[0][k] = columns[kSize][k];
        columns[1][k] = columns[kSize + 1][k];
      });
      to += kLineElements;
      if (++row == kTile) {
        row = 0;
        to += next_group;
      }
    }
  }

  void transform_products(Range tiles, int64_t panel, const float* products, const Epilogue<T>& epilogue) const {
    for (int v = 0; v < matrix.vectors_of(panel); ++v) {
      const int64_t c = panel * kPanel + v * kLanes, width = plan.out_w, height = plan.out_h;
      epilogue.with_vector(c, [&, epilogue, c, width, height, v, along = along](auto n, Floats bias) {
        Place at = place(tiles.begin);
        for (int64_t t = 0; t < tiles.size(); ++t, step(at)) {
          const float* from = products + t / kTile * kProductFloats + (t % kTile * 2 + v) * kLanes;
          Floats columns[kSize][kReach];
          for_each<kReach>([&](int j) __attribute__((always_inline)) {
            Floats m[kReach], y[kSize];
            for_each<kReach>([&](int i) __attribute__((always_inline)) {
              m[i] = load(from + (kReach * i + j) * (kTile * kPanel));
            });
            Transform<kSize>::results(m, y);
            for_each<kSize>([&](int i) __attribute__((always_inline)) { columns[i][j] = y[i]; });
          });
          const int64_t pixel = pixel_of(at);
          const int64_t right = width - at.tx * kSize, below = height - at.ty * kSize;
          for_each<kSize>([&](int i) __attribute__((always_inline)) {
            if (i >= below) return;
            Floats y[kSize];
            Transform<kSize>::results(columns[i], y);
            for_each<kSize>([&](int j) __attribute__((always_inline)) {
              if (j < right) epilogue(y[j] + bias, pixel + along * (i * width + j), c, n);
            });
          });
        }
      });
    }
  }
};

}  // namespace
}  // namespace twins_fast
