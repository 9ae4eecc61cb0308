// Convolutions in groups on the CPU, depthwise ones above all: straight from the image, a vector of channels of a few
// neighbouring pixels at a time. Compiled once per instruction set, as namespace TWINS_FAST_ISA.
//
// Every value is the sum of the same products in the same order wherever it is in a tile, and whatever thread
// computes it.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>

#include "cpu/conv_unit.h"
#include "cpu/epilogue.h"
#include "cpu/product.h"

namespace twins_fast {
namespace {

// Which channels the lanes of a vector are, and what they read of a pixel.
struct Vector {
  int64_t c, input;  // the first output and input channel
  int count;
};

// Of depthwise convolutions: the inputs of the lanes are their own channels.
template <class T>
struct OwnChannels {
  using Compute = Singles;
  static constexpr int kMostTaps = 7;  // in a run
  const int64_t channels;

  explicit OwnChannels(const ConvPlan& plan) : channels(plan.out_pixel()) {}
  static constexpr int64_t steps() { return 1; }
  int64_t vectors() const { return ceil_div(channels, kLanes); }
  Vector vector(int64_t i) const {
    return {i * kLanes, i * kLanes, static_cast<int>(std::min<int64_t>(channels - i * kLanes, kLanes))};
  }
  Floats operator()(const T* p, int n, int64_t) const { return load(p, n); }
};

// Of several groups in a vector: each lane's are the steps of its own group, one after the other.
template <class T>
struct GroupChannels {
  using Compute = ComputeOf<T>;
  static constexpr int kMostTaps = 3;
  const int64_t width;
  const OwnChannels<T> own;
  Ints first = {};  // step of each lane

  explicit GroupChannels(const ConvPlan& plan) : width(plan.in_channels), own(plan) {
    for (int l = 0; l < kLanes; ++l) first[l] = static_cast<int>(l / width * steps());
  }
  int64_t steps() const { return width / Compute::kDepth; }
  int64_t vectors() const { return own.vectors(); }
  Vector vector(int64_t i) const { return own.vector(i); }
  Floats operator()(const T* p, int n, int64_t step) const {
    return permute(Compute::steps_at(p, n), first + static_cast<int>(step));
  }
};

// Of one group in one or more vectors: all lanes have the same.
template <class T>
struct SharedChannels {
  using Compute = ComputeOf<T>;
  static constexpr int kMostTaps = 3;
  const ConvPlan& plan;
  const int64_t of_group = ceil_div(plan.out_channels, kLanes);

  explicit SharedChannels(const ConvPlan& plan) : plan(plan) {}
  int64_t steps() const { return plan.in_channels / Compute::kDepth; }
  int64_t vectors() const { return plan.groups * of_group; }
  Vector vector(int64_t i) const {
    const int64_t group = i / of_group, c = i % of_group * kLanes;
    return {group * plan.out_channels + c, group * plan.in_channels,
            static_cast<int>(std::min<int64_t>(plan.out_channels - c, kLanes))};
  }
  Floats operator()(const T* p, int, int64_t step) const { return Compute::step_at(p + step * Compute::kDepth); }
};

template <class T, class Inputs>
struct Direct {
  using Compute = typename Inputs::Compute;

#if defined(__AVX2__)
  static constexpr int kPixels = 8;  // of a tile
#else
  static constexpr int kPixels = 2;
#endif
  static constexpr int64_t kVectors = 128 / kLanes;  // at a time: their weights and inputs stay in a cache
  static constexpr int kMostColumns = 2 * (kPixels - 1) + OwnChannels<T>::kMostTaps;

  const ConvPlan& plan;
  const Inputs inputs{plan};
  const int64_t taps = plan.phases[plan.phase_count - 1].first_tap + plan.phases[plan.phase_count - 1].taps;
  const int64_t floats_of_vector = taps * inputs.steps() * kLanes;

  // Taps side by side, and the inputs that they and the pixels of a tile read.
  struct Run {
    int64_t tap;
    const T* columns[kMostColumns];
  };

  int64_t packed_floats() const { return inputs.vectors() * floats_of_vector; }
  int64_t floats_per_thread() const { return kLine * ceil_div(taps * sizeof(Run) + plan.in_pixel() * sizeof(T), 64); }

  void pack(const ConvPack& args, int threads) const {
    in_parallel(threads, [&](int thread, int team) {
      const Range vectors = share(0, inputs.vectors(), thread, team);
      float* to = static_cast<float*>(args.packed) + vectors.begin * floats_of_vector;
      for (int64_t i = vectors.begin; i < vectors.end; ++i) {
        const Vector vector = inputs.vector(i);
        for (const ConvTap* tap = plan.taps; tap < plan.taps + taps; ++tap)
          for (int64_t step = 0; step < inputs.steps(); ++step, to += kLanes) {
            Floats values[Compute::kDepth] = {};
            for (int d = 0; d < Compute::kDepth; ++d)
              for (int l = 0; l < vector.count; ++l)
                values[d][l] = weight(args, *tap, vector.c + l, step * Compute::kDepth + d);
            store(to, Compute::step(values[0], values[Compute::kDepth - 1]));
          }
      }
    });
  }

  // Between a channel of the result and the k-th one that its group reads.
  float weight(const ConvPack& args, const ConvTap& tap, int64_t channel, int64_t k) const {
    const int64_t place = channel % plan.out_channels, read = channel / plan.out_channels * plan.in_channels + k;
    const int64_t output = args.transposed ? read : channel, input = args.transposed ? place : k;
    const float* from = args.weight + (output * args.inputs + input) * args.slices();
    float sum = 0;
    for (int64_t i = tap.first_source; i < tap.first_source + tap.sources; ++i)
      sum += from[plan.sources[i].ky * args.kernel_w + plan.sources[i].kx];
    return args.scale ? sum * args.scale[output] : sum;
  }

  void run(const ConvRun& args, int threads) const {
    const Epilogue<T> epilogue(plan, args);
    float* workspace = aligned(args.workspace);
    int64_t rows = 0;
    for (int64_t i = 0; i < plan.phase_count; ++i) rows = std::max(rows, plan.phases[i].rows);
    in_parallel(threads, [&](int thread, int team) {
      Run* runs = reinterpret_cast<Run*>(workspace + thread * floats_per_thread());
      T* zeros = reinterpret_cast<T*>(runs + taps);
      std::fill_n(zeros, plan.in_pixel(), T{});
      Range own = share(0, args.images * rows, thread, team);
      while (own.begin < own.end) {
        const int64_t image = own.begin / rows, top = own.begin % rows, bottom = std::min(rows, top + own.size());
        own.begin += bottom - top;
        for (int64_t v = 0; v < inputs.vectors(); v += kVectors)
          for (int64_t row = top; row < bottom; ++row)
            for (int64_t i = 0; i < plan.phase_count; ++i)
              if (row < plan.phases[i].rows)
                with_taps(plan.phases[i], [&](auto taps, auto step) {
                  run_row<taps, step>(args, plan.phases[i], image, row, {v, std::min(v + kVectors, inputs.vectors())},
                                      runs, zeros, epilogue);
                });
      }
    });
  }

  // The most taps to a run that all rows of taps are made of.
  int taps_of_run(const ConvPhase& phase) const {
    int64_t common = 0, length = 0;
    const ConvTap* last = plan.taps + phase.first_tap + phase.taps - 1;
    for (const ConvTap* tap = plan.taps + phase.first_tap; tap <= last; ++tap) {
      ++length;
      if (tap < last && tap[1].dy == tap->dy && tap[1].dx == tap->dx + 1) continue;
      common = std::gcd(common, length);
      length = 0;
    }
    for (int taps = Inputs::kMostTaps; taps > 1; --taps)
      if (common % taps == 0 && taps != 6 && (plan.in_step_x == 1 || (plan.in_step_x == 2 && taps % 2))) return taps;
    return 1;
  }

  // Calls f(taps of a run, columns between the windows of neighbouring pixels), constants of their types.
  template <class F>
  void with_taps(const ConvPhase& phase, F&& f) const {
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, 2> two;
    constexpr std::integral_constant<int, 3> three;
    const int taps = taps_of_run(phase), step = static_cast<int>(plan.in_step_x);
    if constexpr (Inputs::kMostTaps == 7) {
      constexpr std::integral_constant<int, 4> four;
      constexpr std::integral_constant<int, 5> five;
      constexpr std::integral_constant<int, 7> seven;
      if (taps == 7) return step == 1 ? f(seven, one) : f(seven, two);
      if (taps == 5) return step == 1 ? f(five, one) : f(five, two);
      if (taps == 4) return f(four, one);
    }
    if (taps == 3) return step == 1 ? f(three, one) : f(three, two);
    if (taps == 2) return f(two, one);
    f(one, one);  // whatever the step
  }

  template <int kTaps, int kStep>
  void run_row(const ConvRun& args, const ConvPhase& phase, int64_t image, int64_t row, Range vectors, Run* runs,
               const T* zeros, const Epilogue<T>& epilogue) const {
    const int64_t left = (image * plan.out_h + phase.oy + row * plan.out_step_y) * plan.out_w + phase.ox;
    const float* packed = static_cast<const float*>(args.packed);
    for (int64_t column = 0; column < phase.columns; column += kPixels) {
      const Run* end = find<kTaps, kStep>(args, phase, image, row, column, runs, zeros);
      const int count = static_cast<int>(std::min<int64_t>(phase.columns - column, kPixels));
      for (int64_t i = vectors.begin; i < vectors.end; ++i) {
        const Vector vector = inputs.vector(i);
        epilogue.with_vector(vector.c, vector.count, [&, epilogue](auto n, Floats bias) {
          Floats sums[kPixels];
          sum<kTaps, kStep>(runs, end, packed + i * floats_of_vector, vector.input, n, sums);
          for (int p = 0; p < count; ++p) epilogue(sums[p] + bias, left + (column + p) * plan.out_step_x, vector.c, n);
        });
      }
    }
  }

  // Fills the runs of a tile that are not above or below the image; columns beside it read zeros.
  template <int kTaps, int kStep>
  const Run* find(const ConvRun& args, const ConvPhase& phase, int64_t image, int64_t row, int64_t column, Run* run,
                  const T* zeros) const {
    const T* x = static_cast<const T*>(args.x) + image * plan.in_h * plan.in_w * plan.in_pixel();
    const int64_t apart = kTaps == 1 ? plan.in_step_x : 1;
    for (int64_t t = phase.first_tap; t < phase.first_tap + phase.taps; t += kTaps) {
      const int64_t y = row * plan.in_step_y + plan.taps[t].dy;
      if (y < 0 || y >= plan.in_h) continue;
      run->tap = t;
      int64_t column_of_image = column * plan.in_step_x + plan.taps[t].dx;
      for (int q = 0; q < (kPixels - 1) * kStep + kTaps; ++q, column_of_image += apart) {
        const bool inside = 0 <= column_of_image && column_of_image < plan.in_w;
        run->columns[q] = inside ? x + (y * plan.in_w + column_of_image) * plan.in_pixel() : zeros;
      }
      ++run;
    }
    return run;
  }

  template <int kTaps, int kStep>
  void sum(const Run* run, const Run* end, const float* weights, int64_t input, int n, Floats (&sums)[kPixels]) const {
    for_each<kPixels>([&](int p) { sums[p] = Floats{}; });
    for (; run < end; ++run)
      for (int64_t step = 0; step < inputs.steps(); ++step) {
        Floats weight[kTaps];
        for_each<kTaps>(
            [&](int k) { weight[k] = load(weights + ((run->tap + k) * inputs.steps() + step) * kLanes); });
        for_each<(kPixels - 1) * kStep + kTaps>([&](int q) {
          const Floats v = inputs(run->columns[q] + input, n, step);
          for_each<kTaps>([&](int k) {
            const int p = (q - k) / kStep;
            if (q >= k && (q - k) % kStep == 0 && p < kPixels) sums[p] = Compute::add(sums[p], v, weight[k]);
          });
        });
      }
  }
};

struct Kernels {
  template <class F>
  static auto choose(const ConvPlan& plan, F&& f) {
    return with_type(plan, [&](auto type) {
      using T = decltype(type);
      if (plan.out_channels == 1) return f(Direct<T, OwnChannels<T>>{plan});
      if (plan.in_channels == plan.out_channels && plan.out_channels < kLanes)
        return f(Direct<T, GroupChannels<T>>{plan});
      return f(Direct<T, SharedChannels<T>>{plan});
    });
  }
};

bool packs_along(const ConvPlan&, const ConvPlan&) { return false; }

int64_t pack_floats(const ConvPlan&, const ConvPack&, int) { return 0; }

void pack(const ConvPlan& plan, const ConvPack& args, float*, int threads) {
  Kernels::choose(plan, [&](const auto& kernel) { kernel.pack(args, threads); });
}

}  // namespace

namespace TWINS_FAST_ISA {

extern const ConvUnit direct;
using Unit = Entries<Kernels>;
const ConvUnit direct = {Unit::packed_bytes, Unit::workspace_bytes, packs_along, pack_floats, pack, Unit::run};

}  // namespace TWINS_FAST_ISA
}  // namespace twins_fast
