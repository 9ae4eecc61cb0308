// Two-wing batch norm on the CPU. Compiled once per instruction set, as namespace TWINS_FAST_ISA.
//
// Rows of the memory matrix (see Shape) are divided evenly among the threads. Every sum runs in float32
// over a short chunk and in double over chunks and threads, always in the same order, so that results are
// the same from run to run for a given number of threads.
#include "cpu/kernels.h"

#include <cmath>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "simd.h"

namespace twins_fast {
namespace {

// Chunk lengths: rows of all channels, or pixels of one channel. They bound the error of the float32
// sums: one-pass variance about a member of the chunk loses at most a factor of the chunk's length.
constexpr int64_t kChunkRows = 128;
constexpr int64_t kChunkPixels = 512;

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

Range share(int64_t begin, int64_t end, int thread, int team) {
  const int64_t n = end - begin;
  return {begin + n * thread / team, begin + n * (thread + 1) / team};
}

template <class F>
void in_parallel(int threads, F&& f) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  f(omp_get_thread_num(), omp_get_num_threads());
#else
  f(0, 1);
#endif
}

void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
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

// Moments of n values from their sums about a pivot, which is one of them.
Moments about_pivot(int64_t n, float pivot, double sum1, double sum2) {
  const double m2 = sum2 - sum1 * sum1 / n;
  return {static_cast<double>(n), pivot + sum1 / n, m2 < 0 ? 0 : m2};
}

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
      measure(adaptive, thread);
      barrier();
      combine(share(0, shape.channels, thread, team), team);
      barrier();
      for (int64_t r = adaptive.end; r-- > adaptive.begin;) apply(r, kMean);  // newest in cache first
      const Range frozen = share(0, first_adaptive, thread, team);
      for (int64_t r = frozen.begin; r < frozen.end; ++r) apply(r, kFrozenMean);
    });
  }

  void measure(Range rows, int thread) const {
    double* count = s.partial(thread, kCount);
    double* mean = s.partial(thread, kPartialMean);
    double* m2 = s.partial(thread, kPartialM2);
    const T* x = static_cast<const T*>(a.x);
    if (kChannelsLast) {
      for (int64_t r = rows.begin; r < rows.end; r += kChunkRows)
        measure_chunk({r, r + kChunkRows < rows.end ? r + kChunkRows : rows.end}, thread);
      return;
    }
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t c = r % shape.channels;
      Moments total{count[c], mean[c], m2[c]};
      for (int64_t i = 0; i < run; i += kChunkPixels)
        total.merge(measure_run(x + r * run + i, i + kChunkPixels < run ? kChunkPixels : run - i));
      count[c] = total.count, mean[c] = total.mean, m2[c] = total.m2;
    }
  }

  void measure_chunk(Range rows, int thread) const {
    const T* x = static_cast<const T*>(a.x);
    float* pivot = s.accumulator(thread, 0);
    float* sum1 = s.accumulator(thread, 1);
    float* sum2 = s.accumulator(thread, 2);
    for_vectors(0, run, [&](int64_t i, int n) {
      store(pivot + i, load(x + rows.begin * run + i, n));
      store(sum1 + i, Floats{});
      store(sum2 + i, Floats{});
    });
    for (int64_t r = rows.begin + 1; r < rows.end; ++r)
      for_vectors(0, run, [=, x = x + r * run](int64_t i, int n) {
        const Floats d = load(x + i, n) - load(pivot + i);
        store(sum1 + i, load(sum1 + i) + d);
        store(sum2 + i, load(sum2 + i) + d * d);
      });
    double* count = s.partial(thread, kCount);
    double* mean = s.partial(thread, kPartialMean);
    double* m2 = s.partial(thread, kPartialM2);
    for (int64_t c = 0; c < run; ++c) {
      Moments total{count[c], mean[c], m2[c]};
      total.merge(about_pivot(rows.size(), pivot[c], sum1[c], sum2[c]));
      count[c] = total.count, mean[c] = total.mean, m2[c] = total.m2;
    }
  }

  Moments measure_run(const T* x, int64_t length) const {
    const float pivot = load(x, 1)[0];
    Floats sum1 = {}, sum2 = {};
    for_vectors(0, length, [&](int64_t i, int n) {
      const Floats d = first(load(x + i, n) - pivot, n);
      sum1 += d;
      sum2 += d * d;
    });
    return about_pivot(length, pivot, sum(sum1), sum(sum2));
  }

  void combine(Range channels, int team) const {
    const double n = static_cast<double>(shape.adaptive_count());
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      if (shape.split > 0) {
        const double rstd = 1 / std::sqrt(a.frozen_var[c] + a.eps);
        s.shared(kFrozenMean)[c] = a.frozen_mean[c];
        s.shared(kFrozenScale)[c] = static_cast<float>(value_or(a.frozen_weight, c, 1) * rstd);
        s.shared(kFrozenBias)[c] = value_or(a.frozen_bias, c, 0);
      }
      if (n == 0) continue;
      Moments total{0, 0, 0};
      for (int t = 0; t < team; ++t)
        total.merge({s.partial(t, kCount)[c], s.partial(t, kPartialMean)[c], s.partial(t, kPartialM2)[c]});
      const double rstd = 1 / std::sqrt(total.m2 / n + a.eps);
      s.shared(kMean)[c] = a.stats[c] = static_cast<float>(total.mean);
      s.shared(kScale)[c] = static_cast<float>(value_or(a.weight, c, 1) * rstd);
      s.shared(kBias)[c] = value_or(a.bias, c, 0);
      a.stats[shape.channels + c] = static_cast<float>(rstd);
      if (a.running_mean) update(a.running_mean[c], total.mean);
      if (a.running_var) update(a.running_var[c], total.m2 / (n - 1));
    }
  }

  void update(float& running, double value) const {
    running = static_cast<float>((1 - a.momentum) * running + a.momentum * value);
  }

  // y = relu((x - mean) * scale + bias + residual); x - mean first, since it is exact where they are close.
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
        const Ints passes = ~(v <= 0.0f);  // a NaN passes, as in torch.relu
        v = zero_unless(passes, v);
        if (bits) store_bits(bits + i / 8, passes, n);
      }
      store(y + i, v, n);
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
  const bool frozen_sums = shape.split > 0 && (a.dfrozen_weight || a.dfrozen_bias);
  const bool adaptive_sums = shape.split < shape.images && (a.dx || a.dweight || a.dbias);

  enum { kFrozenMean, kFrozenScale, kMean, kScale, kOffset, kSlope };  // Scratch::shared
  enum { kFrozenG, kFrozenGx, kG, kGx };                              // Scratch::partial

  void operator()(int threads) const {
    in_parallel(threads, [this](int thread, int team) {
      const Range channels = share(0, shape.channels, thread, team);
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        if (shape.split > 0) {
          s.shared(kFrozenMean)[c] = a.frozen_mean[c];
          s.shared(kFrozenScale)[c] = static_cast<float>(value_or(a.frozen_weight, c, 1) * frozen_rstd(c));
        }
        s.shared(kMean)[c] = a.stats[c];
      }
      barrier();
      const Range frozen = share(0, first_adaptive, thread, team);
      const Range adaptive = share(first_adaptive, shape.rows(), thread, team);
      // One read of the frozen half does both its sums and its results.
      in_chunks(frozen, thread, kFrozenG, frozen_sums, [&](int64_t r, Range i) { frozen_row(r, i, thread); });
      if (adaptive_sums)
        in_chunks(adaptive, thread, kG, true, [&](int64_t r, Range i) { sum_row(r, i, thread, kMean); });
      barrier();
      combine(channels, team);
      barrier();
      if (a.dx || a.dresidual)
        for (int64_t r = adaptive.end; r-- > adaptive.begin;) adaptive_row(r);  // newest in cache first
    });
  }

  double frozen_rstd(int64_t c) const { return 1 / std::sqrt(a.frozen_var[c] + a.eps); }

  // Calls f(row, columns) over all rows; before the float32 sums get long, adds them to the partial sums.
  template <class F>
  void in_chunks(Range rows, int thread, int partial, bool sums, F&& f) const {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t step = kChannelsLast ? run : kChunkPixels;
      for (int64_t i = 0; i < run; i += step) {
        f(r, Range{i, i + step < run ? i + step : run});
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
      return bits ? zero_unless(load_bits(bits + i / 8, n), v) : v;
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

  void sum_row(int64_t r, Range columns, int thread, int wing_mean) const {
    const Row in = row(r);
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
    });
    if (!kChannelsLast) {
      sum_g[in.channel] = sum(total_g);
      sum_gx[in.channel] = sum(total_gx);
    }
  }

  void frozen_row(int64_t r, Range columns, int thread) const {
    if (frozen_sums) sum_row(r, columns, thread, kFrozenMean);
    if (!a.dx && !a.dresidual) return;
    const Row in = row(r);
    const Coefficients<kChannelsLast> scale(s.shared(kFrozenScale), in.channel);
    for_vectors(columns.begin, columns.end, [=](int64_t i, int n) {
      const Floats g = in.g(i, n);
      if (in.dx) store(in.dx + i, g * scale.at(i), n);
      if (in.dresidual) store(in.dresidual + i, g, n);
    });
  }

  void combine(Range channels, int team) const {
    const double n = static_cast<double>(shape.adaptive_count());
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      double total[4] = {};
      for (int t = 0; t < team; ++t)
        for (int k = 0; k < 4; ++k) total[k] += s.partial(t, k)[c];
      if (a.dfrozen_weight)
        a.dfrozen_weight[c] = shape.split > 0 ? static_cast<float>(total[kFrozenGx] * frozen_rstd(c)) : 0;
      if (a.dfrozen_bias) a.dfrozen_bias[c] = static_cast<float>(total[kFrozenG]);
      const double rstd = a.stats[shape.channels + c];
      if (a.dweight) a.dweight[c] = static_cast<float>(total[kGx] * rstd);
      if (a.dbias) a.dbias[c] = static_cast<float>(total[kG]);
      s.shared(kScale)[c] = static_cast<float>(value_or(a.weight, c, 1) * rstd);
      s.shared(kOffset)[c] = static_cast<float>(total[kG] / n);
      s.shared(kSlope)[c] = static_cast<float>(total[kGx] * rstd * rstd / n);
    }
  }

  void adaptive_row(int64_t r) const {
    const Row in = row(r);
    const Coefficients<kChannelsLast> mean(s.shared(kMean), in.channel), scale(s.shared(kScale), in.channel),
        offset(s.shared(kOffset), in.channel), slope(s.shared(kSlope), in.channel);
    for_vectors(0, run, [=](int64_t i, int n) {
      const Floats g = in.g(i, n);
      if (in.dx) {
        const Floats v = g - offset.at(i) - (load(in.x + i, n) - mean.at(i)) * slope.at(i);
        store(in.dx + i, v * scale.at(i), n);
      }
      if (in.dresidual) store(in.dresidual + i, g, n);
    });
  }
};

template <template <class, bool> class Kernel, class Args>
void launch(const Args& args, const Scratch& scratch, int threads) {
  const bool last = args.shape.channels_last;
  if (args.dtype == DType::kFloat32)
    last ? Kernel<float, true>{args, scratch}(threads) : Kernel<float, false>{args, scratch}(threads);
  else
    last ? Kernel<BFloat16, true>{args, scratch}(threads) : Kernel<BFloat16, false>{args, scratch}(threads);
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
