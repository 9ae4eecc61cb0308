// Convolutions on the CPU, as matrix products. Compiled once per instruction set, as namespace TWINS_FAST_ISA.
//
// A product is made of steps of 4 bytes along the summed dimension: a float, or a pair of bfloat16 where the
// instruction set has their dot product. Its left side is made of tiles of kTile rows, which hold kLine steps of each
// row in turn, so that one stream of memory feeds the multiplication. Its right side, the packed weight, is made of
// panels of kPanel columns, which hold all columns of each step in turn.
//
// Every value is the sum of the same products in the same order wherever it is in a tile, and whatever thread
// computes it.
#include "cpu/kernels.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "cpu/parallel.h"
#include "simd.h"

namespace twins_fast {
namespace {

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

float* aligned(void* p) { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64); }

// How values take part in a product.
struct Singles {
  using Element = float;
  static constexpr int kDepth = 1;  // values in a step

  static Floats add(Floats sum, const float* a, Floats b) { return sum + *a * b; }
  static Floats step(Floats v, Floats) { return v; }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Element = BFloat16;
  static constexpr int kDepth = 2;

  static Floats add(Floats sum, const float* a, Floats b) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
  }
  static Floats step(Floats first, Floats second) {
    return (Floats)(extend(narrow(BFloat16{}, first)) | extend(narrow(BFloat16{}, second)) << 16);
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
  Ahead(const void* begin, const void* end, int64_t parts)
      : at_(static_cast<const char*>(begin)), end_(static_cast<const char*>(end)),
        step_((end_ - at_) / (64 * std::max<int64_t>(parts, 1)) + 1) {}

  void fetch() {
    for (int64_t i = 0; i < step_ && at_ < end_; ++i, at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char *at_, *end_;
  int64_t step_;
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

// Rows and panels of a product that are one thread's: rows alone are divided while there are many, since each division
// of the panels repeats the preparation of the left side.
std::pair<Range, Range> divide(int64_t rows, int64_t panels, int thread, int team) {
  constexpr int64_t kFewRows = 6;     // fewer take as long
  constexpr int64_t kPreparation = 4;  // as long as this part of the product with a panel
  int64_t best = 1, least = INT64_MAX;
  for (int64_t parts = 1; parts <= std::min<int64_t>(team, panels); ++parts) {
    const int64_t most_rows = std::max(ceil_div(rows, team / parts), kFewRows);
    const int64_t time = most_rows * (kPreparation * ceil_div(panels, parts) + 1);
    if (time < least) best = parts, least = time;
  }
  const int64_t row_parts = team / best, part = thread / best;
  if (part >= row_parts) return {{0, 0}, {0, 0}};
  return {share(0, rows, part, row_parts), share(0, panels, thread % best, best)};
}

// Turns sums into results.
template <class T>
struct Epilogue {
  const float* bias;
  const T* other;
  const uint8_t* mask;
  T* y;
  uint8_t* bits;
  bool relu;
  int64_t channels, bytes_of_bits;

  Epilogue(const ConvPlan& plan, const ConvRun& run)
      : bias(run.bias), other(static_cast<const T*>(run.other)), mask(run.mask), y(static_cast<T*>(run.y)),
        bits(run.bits), relu(run.relu), channels(plan.out_channels), bytes_of_bits(plan.bytes_of_bits()) {}

  // Calls f(count, bias) for the vector at channel c; a whole one's count is a constant of the type.
  template <class F>
  inline __attribute__((always_inline)) void with_vector(int64_t c, F&& f) const {
    const int count = static_cast<int>(std::min<int64_t>(channels - c, kLanes));
    const Floats at_c = bias ? load(bias + c, count) : Floats{};
    if (count == kLanes) f(std::integral_constant<int, kLanes>{}, at_c);
    else f(count, at_c);
  }

  inline __attribute__((always_inline)) void operator()(Floats v, int64_t pixel, int64_t c, int n) const {
    const int64_t at = pixel * channels + c, at_bits = pixel * bytes_of_bits + c / 8;
    if (other) v += load(other + at, n);
    if (relu) {
      const Mask passes = not_below_or_zero(v);  // a NaN passes, as in torch.relu
      v = keep(passes, v);
      if (bits) store_bits(bits + at_bits, passes, n);
    }
    if (mask) v = keep(load_bits(mask + at_bits, n), v);
    store(y + at, v, n);
  }

  // Of the panel that begins at channel c, before its sums are known.
  void prefetch(int64_t pixel, int64_t c) const {
    const int64_t at = pixel * channels + c;
    for (int64_t i = 0; i < kPanel && c + i < channels; i += 64 / sizeof(T)) {
      __builtin_prefetch(y + at + i, 1);
      if (other) __builtin_prefetch(other + at + i);
    }
  }
};

// Of rows `next` of `all`, which are spread evenly over the inputs.
template <class T>
Ahead inputs_ahead(const ConvPlan& plan, const ConvRun& args, Range next, int64_t all, int64_t parts) {
  const char* x = static_cast<const char*>(args.x);
  const int64_t size = args.images * plan.in_h * plan.in_w * plan.in_channels * sizeof(T);
  return {x + size * next.begin / all, x + size * next.end / all, parts};
}

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

  Right right(const ConvPhase& phase) const {
    return {phase.taps * plan.in_channels, plan.out_channels, Compute::kDepth};
  }

  static int64_t tiles_of_block(const Right& right) {
    const int64_t fit = kBlockBytes / (4 * kTile * kLine) / std::max<int64_t>(1, right.lines());
    return std::clamp<int64_t>(fit, 1, kMostTiles);
  }

  int64_t packed_floats() const {
    int64_t total = 0;
    for (int64_t i = 0; i < plan.phase_count; ++i) total += right(plan.phases[i]).floats();
    return total;
  }

  int64_t floats_per_thread() const {
    int64_t most = 0;
    for (int64_t i = 0; i < plan.phase_count; ++i) {
      const Right matrix = right(plan.phases[i]);
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
        const Right matrix = right(phase);
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
template <class T, int kSize>
struct Winograd {
  using Compute = ComputeOf<T>;
  using Element = typename Compute::Element;
  static constexpr int kLineElements = kLine * Compute::kDepth;
  static constexpr int kReach = kSize + 2, kProducts = kReach * kReach;

  const ConvPlan& plan;
  const Right matrix{plan.in_channels, plan.out_channels, Compute::kDepth};
  const int64_t across = ceil_div(plan.out_w, kSize), down = ceil_div(plan.out_h, kSize);
  // Transformed inputs are [groups, lines, products, kTile, kLine], and products [groups, products, kTile, kPanel].
  static constexpr int64_t kLineFloats = kProducts * kTile * kLine, kProductFloats = kProducts * kTile * kPanel;
  const int64_t group_floats = matrix.lines() * kLineFloats;
  const int64_t groups = groups_of_block();
  // A panel of large weights is read once for several groups; else one group's products stay near.
  const bool large_panels = matrix.steps * kProducts * kPanel * 4 > kSize / 2 * kBlockBytes;
  const int64_t groups_at_once = large_panels ? groups : 1;

  int64_t groups_of_block() const {
    // Weights that strain the third-level cache are read seldom, even if the second cannot hold the inputs.
    if (kSize == 4 && packed_floats() * 4 > kStreamedBytes)
      return std::clamp<int64_t>(kStreamedBytes / 4 / (4 * group_floats), 2, 8);
    return std::clamp<int64_t>(2 * kBlockBytes / (4 * group_floats), 2, 16 / kSize);
  }

  int64_t packed_floats() const { return kProducts * matrix.floats(); }

  int64_t floats_per_thread() const { return groups * group_floats + groups_at_once * kProductFloats; }

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
      const auto [tiles, panels] = divide(all, matrix.panels(), thread, team);
      const float* packed = static_cast<const float*>(args.packed);
      float* inputs = workspace + thread * floats_per_thread();
      float* products = inputs + groups * group_floats;
      for (int64_t begin = tiles.begin; begin < tiles.end; begin += groups * kTile) {
        const Range block{begin, std::min(begin + groups * kTile, tiles.end)};
        const int64_t far = begin == tiles.begin ? panels.end : 0;  // later blocks find the weights in a cache
        matrix.ahead(packed, panels.begin, far, kProducts, 1).fetch();
        transform_inputs(static_cast<const T*>(args.x), block, inputs);
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

  void multiply_tiles(const float* inputs, const float* packed, int64_t panel, int64_t far, Range tiles,
                      float* products, const Epilogue<T>& epilogue, Ahead& ahead) const {
    const float* b = packed + kProducts * matrix.offset(panel);
    const int64_t size = matrix.floats_of(panel);
    const int64_t parts = ceil_div(tiles.size(), kTile) * matrix.lines();
    Place at = place(tiles.begin);
    int64_t fetched = 0, row = 0, pixel = pixel_of(at);  // rows of results, and the next one
    for (int p = 0; p < kProducts; ++p, b += size) {
      ahead.fetch();
      Ahead weights = p + 1 == kProducts ? matrix.ahead(packed, panel + 1, far, kProducts, parts)
                                         : Ahead(b + size, b + (panel < far ? 2 : 1) * size, parts);
      for (const int64_t end = ceil_div(tiles.size() * kSize * (p + 1), kProducts); fetched < end; ++fetched) {
        for (int j = 0; j < kSize; ++j) epilogue.prefetch(pixel + j, panel * kPanel);
        pixel += plan.out_w;
        if (++row < kSize) continue;
        row = 0;
        step(at);
        pixel = pixel_of(at);
      }
      for (int64_t t = 0; t < tiles.size(); t += kTile) {
        const int count = static_cast<int>(std::min<int64_t>(tiles.size() - t, kTile));
        matrix.template multiply<Compute>(inputs + t / kTile * group_floats + p * (kTile * kLine), kLineFloats, b,
                                          panel, count, products + t / kTile * kProductFloats + p * (kTile * kPanel),
                                          weights);
      }
    }
  }

  int64_t pixel_of(const Place& at) const {
    return (at.image * plan.out_h + at.ty * kSize) * plan.out_w + at.tx * kSize;
  }

  void transform_inputs(const T* x, Range tiles, float* inputs) const {
    static constexpr T kZeros[kLanes] = {};  // rows outside the image stay there, whatever the pixel
    const int64_t channels = plan.in_channels;
    for (int64_t t = tiles.begin; t < tiles.end;) {
      const Place at = place(t);
      const int64_t count = std::min(across - at.tx, tiles.end - t);
      const T* rows[kReach];
      int64_t steps[kReach];  // from pixel to pixel
      for (int i = 0; i < kReach; ++i) {
        const int64_t y = at.ty * kSize - 1 + i;
        const bool inside = 0 <= y && y < plan.in_h;
        rows[i] = inside ? x + (at.image * plan.in_h + y) * plan.in_w * channels : kZeros;
        steps[i] = inside ? channels : 0;
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
      epilogue.with_vector(c, [&, epilogue, c, width, height, v](auto n, Floats bias) {
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
              if (j < right) epilogue(y[j] + bias, pixel + i * width + j, c, n);
            });
          });
        }
      });
    }
  }
};

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

// Calls f with the kernel of the plan.
template <class F>
auto with_kernel(const ConvPlan& plan, F&& f) {
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

int64_t pack_floats(const ConvPack& args, int threads) {
  return kLine + threads * std::max(kPackedColumns, 2 * args.slices()) * kLanes;
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
const ConvUnit conv = {packed_bytes, workspace_bytes, pack_floats, pack, run};

}  // namespace TWINS_FAST_ISA
}  // namespace twins_fast
