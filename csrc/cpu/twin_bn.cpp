// Two-wing batch norm on the CPU. Compiled once per instruction set, as namespace TWINS_FAST_ISA.
//
// Rows of the memory matrix (see Shape) are divided evenly among the threads. Every sum runs in float32
// over a short chunk and in double over chunks and threads, always in the same order, so that results are
// the same from run to run for a given number of threads.
#include "cpu/kernels.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/parallel.h"
#include "simd.h"

namespace twins_fast {
namespace {

// Chunk lengths: rows of all channels, or pixels of one channel. They bound the error of the float32 sums, which are
// one-pass sums about the mean of the chunk's first rows or pixels.
constexpr int64_t kChunkRows = 128;
constexpr int64_t kChunkPixels = 512;

// Rows whose sums are added up in registers. More than one input would make too many streams for the prefetchers.
constexpr int kBlockRows = 8;

// Results larger than this would only push out of the caches what is still needed there.
constexpr int64_t kCachedBytes = int64_t{8} << 20;

void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

// Calls f(row, count) over all rows, in blocks of `kRows` while they last; count is a constant of the type.
template <int kRows, class F>
inline __attribute__((always_inline)) void in_blocks(Range rows, F&& f) {
  int64_t r = rows.begin;
  for (; r + kRows <= rows.end; r += kRows) f(r, std::integral_constant<int, kRows>{});
  for (; r < rows.end; ++r) f(r, std::integral_constant<int, 1>{});
}

// Calls f(row) from the last chunk of rows to the first: what was read last is still in the caches. Within a chunk
// addresses rise, as the prefetchers expect.
template <class F>
inline __attribute__((always_inline)) void in_chunks_backwards(Range rows, F&& f) {
  for (int64_t end = rows.end; end > rows.begin; end -= kChunkRows)
    for (int64_t r = std::max(end - kChunkRows, rows.begin); r < end; ++r) f(r);
}

// Whether results of this shape go past the caches: they must be large, and made of whole aligned vectors.
template <class T>
bool goes_past(const Shape& shape, const void* first, const void* second) {
  constexpr int64_t kVector = kLanes * sizeof(T);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kVector == 0; };
  return shape.rows() * shape.run() * static_cast<int64_t>(sizeof(T)) > kCachedBytes && shape.run() % kLanes == 0 &&
         aligned(first) && aligned(second);
}

template <bool kPast, class T>
inline void put(T* p, Floats v, int count) {
  if (kPast) encode_past(p, v);
  else store(p, v, count);
}

// Count, mean and sum of squared deviations of two disjoint sets, merged (Chan, Golub and LeVeque, 1979).
struct Moments {
  double count, mean, m2;

  void merge(const Moments& other) {
    if (other.count == 0) return;
    const double n = count + other.count, delta = other.mean - mean;
    mean += delta * (other.count / n);
    m2 += other.m2 + delta * delta * (count * other.count / n);
    count = n;
  }
};

// A vector of per-channel coefficients as seen from one row: all channels in turn, or one everywhere.
// Like all that the inner loops use, it is a local there: stores through T* could change members.
template <bool kChannelsLast>
struct Coefficients {
  const float* values;
  Floats one;

  Coefficients(const float* values, int64_t channel) : values(values), one(broadcast(values[channel])) {}
  Floats at(int64_t i) const { return kChannelsLast ? load(values + i) : one; }
};

float value_or(const float* vector, int64_t c, float absent) { return vector ? vector[c] : absent; }

template <class T, bool kChannelsLast>
struct Forward {
  const TwinBnForward& a;
  const Scratch& s;
  const Shape& shape = a.shape;
  const int64_t run = shape.run();
  const int64_t first_adaptive = shape.split * shape.rows_per_image();

  enum { kFrozenMean, kFrozenScale, kFrozenBias, kMean, kScale, kBias };  // Scratch::shared
  enum { kCount, kPartialMean, kPartialM2 };                             // Scratch::partial

  void operator()(int threads) const {
    in_parallel(threads, [this](int thread, int team) {
      const Range adaptive = share(first_adaptive, shape.rows(), thread, team);
      if (a.phase != Phase::kApply) {
        measure(adaptive, thread);
        barrier();
      }
      combine(share(0, shape.channels, thread, team), team);
      if (a.phase == Phase::kReduce) return;
      barrier();
      const Range frozen = share(0, first_adaptive, thread, team);
      goes_past<T>(shape, a.y, nullptr) ? apply_all<true>(frozen, adaptive) : apply_all<false>(frozen, adaptive);
    });
  }

  void measure(Range rows, int thread) const {
    const T* x = static_cast<const T*>(a.x);
    if (kChannelsLast) {
      for (int64_t r = rows.begin; r < rows.end; r += kChunkRows)
        measure_chunk({r, std::min(r + kChunkRows, rows.end)}, r - rows.begin, thread);
      return;
    }
    double* count = s.partial(thread, kCount);
    double* mean = s.partial(thread, kPartialMean);
    double* m2 = s.partial(thread, kPartialM2);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t c = r % shape.channels;
      Moments total{count[c], mean[c], m2[c]};
      for (int64_t i = 0; i < run; i += kChunkPixels)
        total.merge(measure_run(x + r * run + i, std::min(kChunkPixels, run - i)));
      count[c] = total.count, mean[c] = total.mean, m2[c] = total.m2;
    }
  }

  // Rows of all channels; `before` rows have been measured already.
  void measure_chunk(Range rows, int64_t before, int thread) const {
    const T* x = static_cast<const T*>(a.x);
    float* pivot = s.accumulator(thread, 0);
    float* sum1 = s.accumulator(thread, 1);
    float* sum2 = s.accumulator(thread, 2);
    const int64_t first = std::min<int64_t>(rows.size(), kBlockRows);
    for_vectors(0, run, [&](int64_t i, int n) {
      Floats total = {};
      for (int64_t r = rows.begin; r < rows.begin + first; ++r) total += load(x + r * run + i, n);
      store(pivot + i, total / static_cast<float>(first));
      store(sum1 + i, Floats{});
      store(sum2 + i, Floats{});
    });
    in_blocks<kBlockRows>(rows, [=, run = run](int64_t r, auto count) {
      for_vectors(0, run, [=, x = x + r * run](int64_t i, int n) {
        const Floats p = load(pivot + i);
        Floats s1 = load(sum1 + i), s2 = load(sum2 + i);
        for (int k = 0; k < count; ++k) {
          __builtin_prefetch(x + (k + count) * run + i);  // the streams are too short for the hardware to see
          const Floats d = load(x + k * run + i, n) - p;
          s1 += d;
          s2 += d * d;
        }
        store(sum1 + i, s1);
        store(sum2 + i, s2);
      });
    });
    double* count = s.partial(thread, kCount);
    double* mean = s.partial(thread, kPartialMean);
    double* m2 = s.partial(thread, kPartialM2);
    // Moments::merge with a count that is the same for all channels.
    const double n = rows.size(), total = before + n, weight = n / total, product = before * n / total, inverse = 1 / n;
    for (int64_t c = 0; c < run; ++c) {
      const double s1 = sum1[c], deviations = sum2[c] - s1 * s1 * inverse;
      const double delta = pivot[c] + s1 * inverse - mean[c];
      mean[c] += delta * weight;
      m2[c] += (deviations < 0 ? 0 : deviations) + delta * delta * product;
      count[c] = total;
    }
  }

  Moments measure_run(const T* x, int64_t length) const {
    const int most = static_cast<int>(std::min<int64_t>(length, kLanes));
    const float pivot = sum(load(x, most)) / most;
    Floats sum1 = {}, sum2 = {};
    for_vectors(0, length, [&](int64_t i, int n) {
      const Floats d = first(load(x + i, n) - pivot, n);
      sum1 += d;
      sum2 += d * d;
    });
    const double s1 = sum(sum1), m2 = sum(sum2) - s1 * s1 / length;
    return {static_cast<double>(length), pivot + s1 / length, m2 < 0 ? 0 : m2};
  }

  void combine(Range channels, int team) const {
    const double n = static_cast<double>(shape.adaptive_count());
    float* stats[] = {a.stats, a.stats + shape.channels};
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      if (shape.split > 0 && a.phase != Phase::kReduce) {
        const double rstd = 1 / std::sqrt(a.frozen_var[c] + a.eps);
        s.shared(kFrozenMean)[c] = a.frozen_mean[c];
        s.shared(kFrozenScale)[c] = static_cast<float>(value_or(a.frozen_weight, c, 1) * rstd);
        s.shared(kFrozenBias)[c] = value_or(a.frozen_bias, c, 0);
      }
      if (a.phase != Phase::kApply) {
        Moments total{0, 0, 0};
        for (int t = 0; t < team; ++t)
          total.merge({s.partial(t, kCount)[c], s.partial(t, kPartialMean)[c], s.partial(t, kPartialM2)[c]});
        stats[0][c] = static_cast<float>(total.mean);
        if (a.phase == Phase::kReduce || n == 0) {
          stats[1][c] = static_cast<float>(total.m2);
          continue;
        }
        stats[1][c] = static_cast<float>(1 / std::sqrt(total.m2 / n + a.eps));
        if (a.running_mean) update(a.running_mean[c], total.mean);
        if (a.running_var) update(a.running_var[c], total.m2 / (n - 1));
      }
      s.shared(kMean)[c] = stats[0][c];
      s.shared(kScale)[c] = value_or(a.weight, c, 1) * stats[1][c];
      s.shared(kBias)[c] = value_or(a.bias, c, 0);
    }
  }

  void update(float& running, double value) const {
    running = static_cast<float>((1 - a.momentum) * running + a.momentum * value);
  }

  template <bool kPast>
  void apply_all(Range frozen, Range adaptive) const {
    in_chunks_backwards(adaptive, [=](int64_t r) { apply<kPast>(r, kMean); });
    for (int64_t r = frozen.begin; r < frozen.end; ++r) apply<kPast>(r, kFrozenMean);
    if (kPast) fence_past();
  }

  // y = relu((x - mean) * scale + bias + residual); x - mean first, since it is exact where they are close.
  template <bool kPast>
  void apply(int64_t r, int wing) const {
    const int64_t c = kChannelsLast ? 0 : r % shape.channels;
    const T* x = static_cast<const T*>(a.x) + r * run;
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + r * run : nullptr;
    T* y = static_cast<T*>(a.y) + r * run;
    uint8_t* bits = a.bits ? a.bits + r * shape.bytes_of_bits() : nullptr;
    const bool relu = a.relu;
    const Coefficients<kChannelsLast> mean(s.shared(wing), c), scale(s.shared(wing + 1), c), bias(s.shared(wing + 2), c);
    for_vectors(0, run, [=](int64_t i, int n) {
      Floats v = (load(x + i, n) - mean.at(i)) * scale.at(i) + bias.at(i);
      if (residual) v += load(residual + i, n);
      if (relu) {
        const Mask passes = not_below_or_zero(v);  // a NaN passes, as in torch.relu
        v = keep(passes, v);
        if (bits) store_bits(bits + i / 8, passes, n);
      }
      put<kPast>(y + i, v, n);
    });
  }
};

// With g = dy where the ReLU passed, xc = x - mean and M values per channel, the adaptive half has
//   dbias = sum g,  dweight = rstd * sum(g * xc),
//   dx = weight * rstd * (g - dbias / M - xc * rstd * dweight / M),
// and the frozen half, whose statistics are constants, dx = weight * rstd * g.
template <class T, bool kChannelsLast>
struct Backward {
  const TwinBnBackward& a;
  const Scratch& s;
  const Shape& shape = a.shape;
  const int64_t run = shape.run();
  const int64_t first_adaptive = shape.split * shape.rows_per_image();
  const bool reduce_only = a.phase == Phase::kReduce;
  const bool sums = a.phase != Phase::kApply;
  const bool frozen_sums = sums && shape.split > 0 && (reduce_only || a.dfrozen_weight || a.dfrozen_bias);
  const bool adaptive_sums = sums && shape.split < shape.images && (reduce_only || a.dx || a.dweight || a.dbias);

  enum { kFrozenMean, kFrozenScale, kMean, kScale, kOffset, kSlope };  // Scratch::shared
  enum { kFrozenG, kFrozenGx, kG, kGx };                              // Scratch::partial

  void operator()(int threads) const {
    const bool past = goes_past<T>(shape, a.dx, a.dresidual);
    in_parallel(threads, [=](int thread, int team) {
      const Range channels = share(0, shape.channels, thread, team);
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        s.shared(kFrozenMean)[c] = value_or(a.frozen_mean, c, 0);
        s.shared(kFrozenScale)[c] = static_cast<float>(value_or(a.frozen_weight, c, 1) * frozen_rstd(c));
        s.shared(kMean)[c] = a.stats[c];
      }
      barrier();
      const Range frozen = share(0, first_adaptive, thread, team);
      const Range adaptive = share(first_adaptive, shape.rows(), thread, team);
      past ? run_phases<true>(frozen, adaptive, channels, thread, team)
           : run_phases<false>(frozen, adaptive, channels, thread, team);
    });
  }

  template <bool kPast>
  void run_phases(Range frozen, Range adaptive, Range channels, int thread, int team) const {
    const bool images = a.dx || a.dresidual;
    // One read of the frozen half does both its sums and its results.
    if (frozen_sums && images)
      in_chunks(frozen, thread, kFrozenG, true, [=](int64_t r, Range i) { frozen_row<kPast, true, true>(r, i, thread); });
    else if (frozen_sums)
      in_chunks(frozen, thread, kFrozenG, true, [=](int64_t r, Range i) { frozen_row<kPast, true, false>(r, i, thread); });
    else if (images)
      in_chunks(frozen, thread, kFrozenG, false, [=](int64_t r, Range i) { frozen_row<kPast, false, true>(r, i, thread); });
    if (adaptive_sums)
      in_chunks(adaptive, thread, kG, true, [=](int64_t r, Range i) { sum_row(r, i, thread); });
    barrier();
    combine(channels, team);
    if (!images) return;
    barrier();
    in_chunks_backwards(adaptive, [=](int64_t r) { adaptive_row<kPast>(r); });
    if (kPast) fence_past();
  }

  double frozen_rstd(int64_t c) const { return a.frozen_var ? 1 / std::sqrt(a.frozen_var[c] + a.eps) : 0; }

  // Calls f(row, columns) over all rows; before the float32 sums get long, adds them to the partial sums.
  template <class F>
  void in_chunks(Range rows, int thread, int partial, bool sums, F&& f) const {
    const int64_t step = kChannelsLast ? run : kChunkPixels;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      for (int64_t i = 0; i < run; i += step) {
        f(r, Range{i, std::min(i + step, run)});
        if (!kChannelsLast && sums) flush(thread, partial, r % shape.channels, r % shape.channels + 1);
      }
      const bool last_of_chunk = (r + 1 - rows.begin) % kChunkRows == 0 || r + 1 == rows.end;
      if (kChannelsLast && sums && last_of_chunk) flush(thread, partial, 0, run);
    }
  }

  void flush(int thread, int partial, int64_t begin, int64_t end) const {
    for (int k = 0; k < 2; ++k) {
      double* total = s.partial(thread, partial + k);
      float* sums = s.accumulator(thread, k);
      for (int64_t c = begin; c < end; ++c) {
        total[c] += sums[c];
        sums[c] = 0;
      }
    }
  }

  // One row of the inputs and results.
  struct Row {
    int64_t channel;
    const T *dy, *x;
    const uint8_t* bits;
    T *dx, *dresidual;

    Floats g(int64_t i, int n) const {
      const Floats v = load(dy + i, n);
      return bits ? keep(load_bits(bits + i / 8, n), v) : v;
    }
  };

  Row row(int64_t r) const {
    const int64_t start = r * run;
    return {kChannelsLast ? 0 : r % shape.channels,
            static_cast<const T*>(a.dy) + start,
            static_cast<const T*>(a.x) + start,
            a.bits ? a.bits + r * shape.bytes_of_bits() : nullptr,
            a.dx ? static_cast<T*>(a.dx) + start : nullptr,
            a.dresidual ? static_cast<T*>(a.dresidual) + start : nullptr};
  }

  void sum_row(int64_t r, Range columns, int thread) const {
    sum_and(row(r), columns, thread, kMean, [](int64_t, int, Floats) {});
  }

  // Adds up g and g * xc, and hands each g to f(i, n, g).
  template <class F>
  void sum_and(const Row& in, Range columns, int thread, int wing_mean, F&& f) const {
    const Coefficients<kChannelsLast> mean(s.shared(wing_mean), in.channel);
    float* sum_g = s.accumulator(thread, 0);
    float* sum_gx = s.accumulator(thread, 1);
    Floats total_g = {}, total_gx = {};
    for_vectors(columns.begin, columns.end, [=, &total_g, &total_gx](int64_t i, int n) {
      const Floats g = in.g(i, n);
      const Floats gx = g * (load(in.x + i, n) - mean.at(i));
      if (kChannelsLast) {
        store(sum_g + i, load(sum_g + i) + g);
        store(sum_gx + i, load(sum_gx + i) + gx);
      } else {
        total_g += g;
        total_gx += first(gx, n);
      }
      f(i, n, g);
    });
    if (!kChannelsLast) {
      sum_g[in.channel] = sum(total_g);
      sum_gx[in.channel] = sum(total_gx);
    }
  }

  template <bool kPast, bool kSums, bool kImages>
  void frozen_row(int64_t r, Range columns, int thread) const {
    const Row in = row(r);
    const Coefficients<kChannelsLast> scale(s.shared(kFrozenScale), in.channel);
    const auto results = [=](int64_t i, int n, Floats g) {
      if (kImages && in.dx) put<kPast>(in.dx + i, g * scale.at(i), n);
      if (kImages && in.dresidual) put<kPast>(in.dresidual + i, g, n);
    };
    if (kSums) return sum_and(in, columns, thread, kFrozenMean, results);
    for_vectors(columns.begin, columns.end, [=](int64_t i, int n) { results(i, n, in.g(i, n)); });
  }

  void combine(Range channels, int team) const {
    const double n = static_cast<double>(shape.adaptive_count());
    const int64_t stride = shape.channels;
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      double total[4] = {};
      for (int t = 0; t < team && sums; ++t)
        for (int k = 0; k < 4; ++k) total[k] += s.partial(t, k)[c];
      if (reduce_only) {
        for (int k = 0; k < 4; ++k) a.sums[k * stride + c] = static_cast<float>(total[k]);
        continue;
      }
      if (a.dfrozen_weight) a.dfrozen_weight[c] = static_cast<float>(total[kFrozenGx] * frozen_rstd(c));
      if (a.dfrozen_bias) a.dfrozen_bias[c] = static_cast<float>(total[kFrozenG]);
      const double rstd = a.stats[stride + c];
      if (a.dweight) a.dweight[c] = static_cast<float>(total[kGx] * rstd);
      if (a.dbias) a.dbias[c] = static_cast<float>(total[kG]);
      if (n == 0) continue;
      const double mean_g = sums ? total[kG] / n : a.sums[c], mean_gx = sums ? total[kGx] / n : a.sums[stride + c];
      s.shared(kScale)[c] = static_cast<float>(value_or(a.weight, c, 1) * rstd);
      s.shared(kOffset)[c] = static_cast<float>(mean_g);
      s.shared(kSlope)[c] = static_cast<float>(mean_gx * rstd * rstd);
    }
  }

  template <bool kPast>
  void adaptive_row(int64_t r) const {
    const Row in = row(r);
    const Coefficients<kChannelsLast> mean(s.shared(kMean), in.channel), scale(s.shared(kScale), in.channel),
        offset(s.shared(kOffset), in.channel), slope(s.shared(kSlope), in.channel);
    for_vectors(0, run, [=](int64_t i, int n) {
      const Floats g = in.g(i, n);
      if (in.dx) {
        const Floats v = g - offset.at(i) - (load(in.x + i, n) - mean.at(i)) * slope.at(i);
        put<kPast>(in.dx + i, v * scale.at(i), n);
      }
      if (in.dresidual) put<kPast>(in.dresidual + i, g, n);
    });
  }
};

template <template <class, bool> class Kernel, class T, class Args>
void launch_as(const Args& args, const Scratch& scratch, int threads) {
  if (args.shape.channels_last) Kernel<T, true>{args, scratch}(threads);
  else Kernel<T, false>{args, scratch}(threads);
}

template <template <class, bool> class Kernel, class Args>
void launch(const Args& args, const Scratch& scratch, int threads) {
  switch (args.dtype) {
    case DType::kFloat32: return launch_as<Kernel, float>(args, scratch, threads);
    case DType::kBFloat16: return launch_as<Kernel, BFloat16>(args, scratch, threads);
    case DType::kFloat16: return launch_as<Kernel, Float16>(args, scratch, threads);
  }
}

}  // namespace

namespace TWINS_FAST_ISA {

void forward(const TwinBnForward& args, const Scratch& scratch, int threads) {
  launch<Forward>(args, scratch, threads);
}

void backward(const TwinBnBackward& args, const Scratch& scratch, int threads) {
  launch<Backward>(args, scratch, threads);
}

}  // namespace TWINS_FAST_ISA
}  // namespace twins_fast
