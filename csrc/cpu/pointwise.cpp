// Passes over channels-last images on the CPU. Compiled once per instruction set, as namespace TWINS_FAST_ISA.
//
// Every result is computed by one thread in an order that does not depend on the number of threads.
#include <algorithm>
#include <cmath>

#include "cpu/activations.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "simd.h"

namespace twins_fast {
namespace {

// Results larger than this would only push out of the caches what is still needed there.
constexpr int64_t kCachedBytes = int64_t{8} << 20;

// Pixels of few channels are taken together, in runs of at least kRun values that fill whole blocks.
constexpr int64_t kRun = 512;
constexpr int64_t kLongestRun = 2048;

// Vectors that are worked on at a time.
constexpr int kBlock = 4;

int64_t bytes_of_bits(int64_t channels) { return (channels + 7) / 8; }

template <class T>
struct PointwiseKernel {
  const Pointwise& a;

  void operator()(int threads) const {
    constexpr int64_t kVector = kLanes * sizeof(T);
    const bool past = a.pixels * a.channels * static_cast<int64_t>(sizeof(T)) > kCachedBytes &&
                      a.channels % kLanes == 0 && reinterpret_cast<uintptr_t>(a.y) % kVector == 0 && a.y != a.x &&
                      a.y != a.gate && a.y != a.other;
    in_parallel(threads, [&](int thread, int team) {
      const Range pixels = share(0, a.pixels, thread, team);
      past ? runs<true>(pixels) : runs<false>(pixels);
    });
  }

  template <bool kPast>
  void runs(Range pixels) const {
    const bool has_bits = a.mask || a.bits;
    int64_t together = 1;
    if (a.channels < kRun && (a.channels % 8 == 0 || !has_bits))
      while (together * a.channels % (kBlock * kLanes) || together * a.channels < kRun) ++together;
    if (together > 1 && together * a.channels <= kLongestRun) {
      const int64_t rows = pixels.size() / together;
      float scale[kLongestRun], shift[kLongestRun];
      for (int64_t i = 0; i < together * a.channels && rows; ++i) {
        scale[i] = a.scale ? a.scale[i % a.channels] : 1;
        shift[i] = a.shift ? a.shift[i % a.channels] : 0;
      }
      rows_of<kPast>(pixels.begin, rows, together, a.scale ? scale : nullptr, a.shift ? shift : nullptr);
      pixels.begin += rows * together;
    }
    rows_of<kPast>(pixels.begin, pixels.size(), 1, a.scale, a.shift);
    if (kPast) fence_past();
  }

  // Rows of `together` pixels, from the pixel `first` on.
  template <bool kPast>
  void rows_of(int64_t first, int64_t rows, int64_t together, const float* scale, const float* shift) const {
    const int64_t run = together * a.channels;
    const bool relu = a.relu;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t pixel = first + r * together, start = pixel * a.channels, byte = pixel * bytes_of_bits(a.channels);
      const T* x = static_cast<const T*>(a.x) + start;
      const T* gate = a.gate ? static_cast<const T*>(a.gate) + start : nullptr;
      const T* other = a.other ? static_cast<const T*>(a.other) + start : nullptr;
      const uint8_t* mask = a.mask ? a.mask + byte : nullptr;
      uint8_t* bits = a.bits ? a.bits + byte : nullptr;
      T* y = static_cast<T*>(a.y) + start;
      for_blocks<kBlock>(run, [=](int64_t i, auto vectors, int n) {
        Floats v[vectors];
        const auto each = [&](auto&& f) { for_each<vectors>([&](int k) { f(v[k], i + k * kLanes); }); };
        each([=](Floats& u, int64_t j) { u = load(x + j, n); });
        if (gate) each([=](Floats& u, int64_t j) { u *= load(gate + j, n); });
        if (scale) each([=](Floats& u, int64_t j) { u *= load(scale + j, n); });
        if (shift) each([=](Floats& u, int64_t j) { u += load(shift + j, n); });
        if (other) each([=](Floats& u, int64_t j) { u += load(other + j, n); });
        if (relu)
          each([=](Floats& u, int64_t j) {
            const Mask passes = not_below_or_zero(u);  // a NaN passes, as in torch.relu
            u = keep(passes, u);
            if (bits) store_bits(bits + j / 8, passes, n);
          });
        if (mask) each([=](Floats& u, int64_t j) { u = keep(load_bits(mask + j / 8, n), u); });
        each([=](Floats& u, int64_t j) {
          if (kPast) encode_past(y + j, u);
          else store(y + j, u, n);
        });
      });
    }
  }
};

// Bytes of a result that are put together before the pass over them, so that this finds them in the cache.
constexpr int64_t kGathered = int64_t{1} << 16;

template <class T>
struct GatherKernel {
  const Gather& a;

  void operator()(int threads) const {
    const Pointwise& p = a.pass;
    const int64_t block = std::max<int64_t>(1, kGathered / (p.channels * static_cast<int64_t>(sizeof(T))));
    const bool done = !p.scale && !p.shift && !p.other && !p.mask && !p.relu;
    in_parallel(threads, [&](int thread, int team) {
      const Range pixels = share(0, p.pixels, thread, team);
      for (int64_t begin = pixels.begin; begin < pixels.end; begin += block) {
        const Range some = {begin, std::min(begin + block, pixels.end)};
        for (int64_t i = 0; i < a.count; ++i) put(a.parts[i], some);
        if (!done) PointwiseKernel<T>{p}.template runs<false>(some);
      }
    });
  }

  void put(const Part& part, Range pixels) const {
    const bool dense = part.y_step == 1 && (part.step == 1 || !part.x);
    for (int64_t pixel = pixels.begin; pixel < pixels.end; ++pixel) {
      const T* x = part.x ? static_cast<const T*>(part.x) + pixel * part.stride : nullptr;
      T* y = static_cast<T*>(a.pass.y) + pixel * a.pass.channels + part.y_first;
      if (dense) {
        constexpr int64_t kLine = 64 / sizeof(T);
        for (int64_t i = 0; i < part.channels; i += kLine)
          copy_bytes(y + i, x ? x + i : nullptr, static_cast<int>(std::min(kLine, part.channels - i) * sizeof(T)));
      } else if (x) {
        for (int64_t i = 0; i < part.channels; ++i) y[i * part.y_step] = x[i * part.step];
      } else {
        for (int64_t i = 0; i < part.channels; ++i) y[i * part.y_step] = T{};
      }
    }
  }
};

template <class T>
struct ProductKernel {
  const Product& a;

  void operator()(int threads) const {
    in_parallel(threads, [&](int thread, int team) {
      const Range pixels = share(0, a.shape.images * a.shape.pixels, thread, team);
      for (int64_t pixel = pixels.begin; pixel < pixels.end; ++pixel)
        a.shape.per_channel ? row<true>(pixel) : row<false>(pixel);
    });
  }

  template <bool kPerChannel>
  void row(int64_t pixel) const {
    const int64_t channels = a.shape.channels, start = pixel * channels, byte = pixel * bytes_of_bits(channels);
    const T* x = static_cast<const T*>(a.x) + start;
    const T* gate = static_cast<const T*>(a.gate) + (kPerChannel ? pixel / a.shape.pixels * channels : pixel);
    const T* other = a.other ? static_cast<const T*>(a.other) + start : nullptr;
    const uint8_t* mask = a.mask ? a.mask + byte : nullptr;
    uint8_t* bits = a.bits ? a.bits + byte : nullptr;
    T* y = static_cast<T*>(a.y) + start;
    const bool relu = a.relu;
    const Floats whole = kPerChannel ? Floats{} : broadcast(load(gate, 1)[0]);
    for_blocks<kBlock>(channels, [=](int64_t i, auto vectors, int n) {
      for_each<vectors>([=](int k) {
        const int64_t j = i + k * kLanes;
        Floats v = load(x + j, n) * (kPerChannel ? load(gate + j, n) : whole);
        if (other) v += load(other + j, n);
        if (relu) {
          const Mask passes = not_below_or_zero(v);
          v = keep(passes, v);
          if (bits) store_bits(bits + j / 8, passes, n);
        }
        if (mask) v = keep(load_bits(mask + j / 8, n), v);
        store(y + j, v, n);
      });
    });
  }
};

template <class T>
struct ProductSumKernel {
  static constexpr int64_t kColumns = kBlock * kLanes;
  static constexpr int64_t kRows = 64;  // short sums have small errors

  const ProductSum& a;

  void operator()(int threads) const {
    const Gate& s = a.shape;
    const int64_t blocks = (s.channels + kColumns - 1) / kColumns;
    in_parallel(threads, [&](int thread, int team) {
      const Range parts = share(0, s.per_channel ? s.images * blocks : s.images * s.pixels, thread, team);
      for (int64_t i = parts.begin; i < parts.end; ++i) {
        if (!s.per_channel) {
          pixel(i);
          continue;
        }
        const int64_t image = i / blocks, first = i % blocks * kColumns;
        if (first + kColumns <= s.channels) channels<kBlock>(image, first, kLanes);
        else for_vectors(first, s.channels, [&](int64_t c, int n) { channels<1>(image, c, n); });
      }
    });
  }

  template <int kVectors>
  void channels(int64_t image, int64_t first, int n) const {
    const Gate& s = a.shape;
    const int64_t start = image * s.pixels * s.channels + first;
    const T *g = static_cast<const T*>(a.g) + start, *x = static_cast<const T*>(a.x) + start;
    Floats total[kVectors] = {};
    for (int64_t row = 0; row < s.pixels; row += kRows) {
      Floats some[kVectors] = {};
      for (int64_t r = row; r < std::min(row + kRows, s.pixels); ++r)
        for_each<kVectors>([&](int k) {
          const int64_t at = r * s.channels + k * kLanes;
          some[k] += load(g + at, n) * load(x + at, n);
        });
      for_each<kVectors>([&](int k) { total[k] += some[k]; });
    }
    for_each<kVectors>([&](int k) {
      const int64_t c = first + k * kLanes;
      finish(total[k], image * s.channels + c, image * bytes_of_bits(s.channels) + c / 8, n);
    });
  }

  void pixel(int64_t pixel) const {
    const int64_t start = pixel * a.shape.channels;
    const T *g = static_cast<const T*>(a.g) + start, *x = static_cast<const T*>(a.x) + start;
    Floats total = {};
    for_vectors(0, a.shape.channels, [&](int64_t i, int n) { total += load(g + i, n) * load(x + i, n); });
    finish(broadcast(sum(total)), pixel, pixel, 1);
  }

  void finish(Floats v, int64_t at, int64_t byte, int n) const {
    if (a.other) v += load(static_cast<const T*>(a.other) + at, n);
    if (a.mask) v = keep(load_bits(a.mask + byte, n), v);
    store(static_cast<T*>(a.y) + at, v, n);
  }
};

template <class T>
struct ActivationKernel {
  const Activation& a;

  void operator()(int threads) const {
    switch (a.kind) {
#define TWINS_FAST_CASE(name) case ActivationKind::k##name: return each<name>(threads)
      TWINS_FAST_CASE(Silu);
      TWINS_FAST_CASE(Sigmoid);
      TWINS_FAST_CASE(Tanh);
      TWINS_FAST_CASE(Gelu);
      TWINS_FAST_CASE(GeluTanh);
      TWINS_FAST_CASE(Hardswish);
      TWINS_FAST_CASE(Hardsigmoid);
      TWINS_FAST_CASE(LeakyRelu);
      TWINS_FAST_CASE(Elu);
      TWINS_FAST_CASE(Mish);
      TWINS_FAST_CASE(ClampOpen);
      TWINS_FAST_CASE(ClampClosed);
#undef TWINS_FAST_CASE
    }
  }

  template <class Function>
  void each(int threads) const {
    const T* x = static_cast<const T*>(a.x);
    T *y = static_cast<T*>(a.y), *slope = static_cast<T*>(a.slope);
    const Floats first = broadcast(a.a), second = broadcast(a.b);
    in_parallel(threads, [&](int thread, int team) {
      const Range blocks = share(0, (a.values + kLanes - 1) / kLanes, thread, team);
      const int64_t begin = blocks.begin * kLanes, end = std::min(a.values, blocks.end * kLanes);
      for_vectors(begin, end, [&](int64_t i, int n) {
        const ValueAndSlope v = Function::at(load(x + i, n), first, second);
        store(y + i, v.value, n);
        store(slope + i, v.slope, n);
      });
    });
  }
};

// Sums over a pixel's channels, in kBlock parts.
template <class F>
float sum_of(int64_t channels, F&& f) {
  Floats parts[kBlock] = {};
  for_blocks<kBlock>(channels, [&](int64_t i, auto vectors, int n) {
    for_each<vectors>([&](int k) { parts[k] += first(f(i + k * kLanes, n), n); });
  });
  return sum_in_halves((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

template <class T>
struct LayerNormKernel {
  const LayerNorm& a;

  void operator()(int threads) const {
    const float part = 1.0f / static_cast<float>(a.channels);
    const float *weight = a.weight, *bias = a.bias;
    in_parallel(threads, [&](int thread, int team) {
      const Range pixels = share(0, a.pixels, thread, team);
      for (int64_t pixel = pixels.begin; pixel < pixels.end; ++pixel) {
        const T* x = static_cast<const T*>(a.x) + pixel * a.channels;
        T* y = static_cast<T*>(a.y) + pixel * a.channels;
        const float mean = part * sum_of(a.channels, [=](int64_t i, int n) { return load(x + i, n); });
        const float variance = part * sum_of(a.channels, [=](int64_t i, int n) {
          const Floats d = load(x + i, n) - mean;
          return d * d;
        });
        const float deviation = 1.0f / std::sqrt(variance + a.eps);
        a.moments[2 * pixel] = mean;
        a.moments[2 * pixel + 1] = deviation;
        for_vectors(0, a.channels, [=](int64_t i, int n) {
          Floats v = (load(x + i, n) - mean) * deviation;
          if (weight) v *= load(weight + i, n);
          if (bias) v += load(bias + i, n);
          store(y + i, v, n);
        });
      }
    });
  }
};

template <class T>
struct LayerNormBackwardKernel {
  const LayerNormBackward& a;

  void operator()(int threads) const {
    const float part = 1.0f / static_cast<float>(a.channels);
    const float* weight = a.weight;
    in_parallel(threads, [&](int thread, int team) {
      const Range pixels = share(0, a.pixels, thread, team);
      for (int64_t pixel = pixels.begin; pixel < pixels.end; ++pixel) {
        const int64_t start = pixel * a.channels;
        const T *g = static_cast<const T*>(a.g) + start, *x = static_cast<const T*>(a.x) + start;
        const T* other = a.other ? static_cast<const T*>(a.other) + start : nullptr;
        const uint8_t* mask = a.mask ? a.mask + pixel * bytes_of_bits(a.channels) : nullptr;
        T* dx = static_cast<T*>(a.dx) + start;
        const float mean = a.moments[2 * pixel], deviation = a.moments[2 * pixel + 1];
        const auto gradient = [=](int64_t i, int n) {
          const Floats v = load(g + i, n);
          return weight ? v * load(weight + i, n) : v;
        };
        const auto normal = [=](int64_t i, int n) { return (load(x + i, n) - mean) * deviation; };
        const float shift = part * sum_of(a.channels, gradient);
        const float slope =
            part * sum_of(a.channels, [=](int64_t i, int n) { return gradient(i, n) * normal(i, n); });
        for_vectors(0, a.channels, [=](int64_t i, int n) {
          Floats v = (gradient(i, n) - shift - normal(i, n) * slope) * deviation;
          if (other) v += load(other + i, n);
          if (mask) v = keep(load_bits(mask + i / 8, n), v);
          store(dx + i, v, n);
        });
      }
    });
  }
};

// The windows of the rows or columns of a result.
struct Axis {
  int64_t size, count, kernel, stride, pad;
  const int32_t* listed;

  int64_t begin(int64_t o) const { return listed ? listed[o] : o * stride - pad; }
  int64_t end(int64_t o) const { return listed ? listed[count + o] : o * stride - pad + kernel; }
  Range window(int64_t o) const { return {std::max<int64_t>(begin(o), 0), std::min(end(o), size)}; }
};

Axis rows_of(const Windows& w) { return {w.height, w.out_height, w.kernel_y, w.stride_y, w.pad_y, w.rows}; }
Axis columns_of(const Windows& w) { return {w.width, w.out_width, w.kernel_x, w.stride_x, w.pad_x, w.columns}; }

// The windows that hold a row or column of the image, for one after the other.
struct WindowsOf {
  Axis axis;
  Range range = {0, 0};

  void move_to(int64_t i) {
    while (range.begin < axis.count && axis.end(range.begin) <= i) ++range.begin;
    while (range.end < axis.count && axis.begin(range.end) <= i) ++range.end;
    range.end = std::max(range.begin, range.end);
  }
};

template <class T, bool kMax>
struct PoolForwardKernel {
  const PoolForward& a;

  void operator()(int threads) const {
    const Windows& w = a.windows;
    const Axis axis_y = rows_of(w), axis_x = columns_of(w);
    in_parallel(threads, [&](int thread, int team) {
      const Range rows = share(0, w.images * w.out_height, thread, team);
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const int64_t out_y = r % w.out_height, top = r / w.out_height * w.height;
        const Range y = axis_y.window(out_y);
        for (int64_t out_x = 0; out_x < w.out_width; ++out_x) {
          const Range x = axis_x.window(out_x);
          const int64_t corner = ((top + y.begin) * w.width + x.begin) * w.channels;
          const int64_t cut_y = y.begin - axis_y.begin(out_y), cut_x = x.begin - axis_x.begin(out_x);
          pixel(corner, (r * w.out_width + out_x) * w.channels, static_cast<int>(y.size()),
                static_cast<int>(x.size()), static_cast<int>(cut_y * w.kernel_x + cut_x),
                kMax ? 1 : w.row_weights[out_y] * w.column_weights[out_x]);
        }
      }
    });
  }

  // The part of a window that lies in the image; `first` is the place of its corner in the whole window.
  void pixel(int64_t corner, int64_t at, int rows, int columns, int first, float weight) const {
    const int64_t channels = a.windows.channels, down = a.windows.width * channels;
    const int kernel_x = static_cast<int>(a.windows.kernel_x);
    const T* x = static_cast<const T*>(a.x) + corner;
    T* result = static_cast<T*>(a.y) + at;
    uint8_t* argmax = a.argmax ? a.argmax + at : nullptr;
    for_blocks<kBlock>(channels, [=](int64_t i, auto vectors, int n) {
      Floats total[vectors] = {};
      if constexpr (kMax) {
        Ints where[vectors];
        for_each<vectors>([&](int k) { total[k] = broadcast(-__builtin_inff()), where[k] = Ints{} + first; });
        for (int dy = 0; dy < rows; ++dy)
          for (int dx = 0; dx < columns; ++dx) {
            const T* p = x + dy * down + dx * channels + i;
            const Ints here = Ints{} + (first + dy * kernel_x + dx);
            for_each<vectors>([&](int k) {
              const Floats v = load(p + k * kLanes, n);
              const Mask better = above_or_nan(v, total[k]);
              total[k] = select(better, v, total[k]);
              where[k] = select(better, here, where[k]);
            });
          }
        if (argmax) for_each<vectors>([&](int k) { store_bytes(argmax + i + k * kLanes, where[k], n); });
      } else {
        for (int dy = 0; dy < rows; ++dy) {
          Floats row[vectors] = {};  // short sums have small errors
          for (int dx = 0; dx < columns; ++dx) {
            const T* p = x + dy * down + dx * channels + i;
            for_each<vectors>([&](int k) { row[k] += load(p + k * kLanes, n); });
          }
          for_each<vectors>([&](int k) { total[k] += row[k]; });
        }
        for_each<vectors>([&](int k) { total[k] *= weight; });
      }
      for_each<vectors>([&](int k) { store(result + i + k * kLanes, total[k], n); });
    });
  }
};

// Each pixel adds up the gradients of the windows that hold it, so that no two threads write to one place.
template <class T, bool kMax>
struct PoolBackwardKernel {
  const PoolBackward& a;

  void operator()(int threads) const {
    const Windows& w = a.windows;
    const Axis axis_y = rows_of(w), axis_x = columns_of(w);
    in_parallel(threads, [&](int thread, int team) {
      const Range rows = share(0, w.images * w.height, thread, team);
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const int64_t y = r % w.height, top = r / w.height * w.out_height;
        WindowsOf out_y{axis_y}, out_x{axis_x};
        out_y.move_to(y);
        const int64_t place_y = y - (out_y.range.begin * w.stride_y - w.pad_y);
        for (int64_t x = 0; x < w.width; ++x) {
          out_x.move_to(x);
          const int64_t place_x = x - (out_x.range.begin * w.stride_x - w.pad_x);
          pixel(((top + out_y.range.begin) * w.out_width + out_x.range.begin) * w.channels, r * w.width + x,
                out_y.range, out_x.range, static_cast<int>(place_y * w.kernel_x + place_x));
        }
      }
    });
  }

  // `place` is that of the pixel in the first of its windows; in later ones it is further up and left.
  void pixel(int64_t corner, int64_t at, Range rows, Range columns, int place) const {
    const Windows& w = a.windows;
    const int64_t channels = w.channels, down = w.out_width * channels;
    const int up = static_cast<int>(w.stride_y * w.kernel_x), left = static_cast<int>(w.stride_x);
    const T* g = static_cast<const T*>(a.g) + corner;
    const uint8_t* argmax = kMax ? a.argmax + corner : nullptr;
    const T* other = a.other ? static_cast<const T*>(a.other) + at * channels : nullptr;
    const uint8_t* mask = a.mask ? a.mask + at * bytes_of_bits(channels) : nullptr;
    T* result = static_cast<T*>(a.dx) + at * channels;
    for_blocks<kBlock>(channels, [=](int64_t i, auto vectors, int n) {
      Floats total[vectors] = {};
      for (int y = 0; y < rows.size(); ++y)
        for (int x = 0; x < columns.size(); ++x) {
          const int64_t from = y * down + x * channels + i;
          const int here = place - y * up - x * left;
          const float weight = kMax ? 1 : w.row_weights[rows.begin + y] * w.column_weights[columns.begin + x];
          for_each<vectors>([&](int k) {
            const int64_t j = from + k * kLanes;
            const Floats v = load(g + j, n);
            if constexpr (kMax) total[k] += keep(equal_bytes(argmax + j, here, n), v);
            else total[k] += v * weight;
          });
        }
      if (other) for_each<vectors>([&](int k) { total[k] += load(other + i + k * kLanes, n); });
      if (mask) for_each<vectors>([&](int k) { total[k] = keep(load_bits(mask + (i + k * kLanes) / 8, n), total[k]); });
      for_each<vectors>([&](int k) { store(result + i + k * kLanes, total[k], n); });
    });
  }
};

template <class T>
using MaxForward = PoolForwardKernel<T, true>;
template <class T>
using AverageForward = PoolForwardKernel<T, false>;
template <class T>
using MaxBackward = PoolBackwardKernel<T, true>;
template <class T>
using AverageBackward = PoolBackwardKernel<T, false>;

template <class Args>
DType dtype_of(const Args& args) {
  return args.dtype;
}
DType dtype_of(const Gather& args) { return args.pass.dtype; }

template <template <class> class Kernel, class Args>
void launch(const Args& args, int threads) {
  switch (dtype_of(args)) {
    case DType::kFloat32: return Kernel<float>{args}(threads);
    case DType::kBFloat16: return Kernel<BFloat16>{args}(threads);
    case DType::kFloat16: return Kernel<Float16>{args}(threads);
  }
}

}  // namespace

namespace TWINS_FAST_ISA {

void pointwise(const Pointwise& args, int threads) { launch<PointwiseKernel>(args, threads); }

void gather(const Gather& args, int threads) { launch<GatherKernel>(args, threads); }

void product(const Product& args, int threads) { launch<ProductKernel>(args, threads); }

void product_sum(const ProductSum& args, int threads) { launch<ProductSumKernel>(args, threads); }

void activation(const Activation& args, int threads) { launch<ActivationKernel>(args, threads); }

void layer_norm(const LayerNorm& args, int threads) { launch<LayerNormKernel>(args, threads); }

void layer_norm_backward(const LayerNormBackward& args, int threads) {
  launch<LayerNormBackwardKernel>(args, threads);
}

void pool_forward(const PoolForward& args, int threads) {
  args.max ? launch<MaxForward>(args, threads) : launch<AverageForward>(args, threads);
}

void pool_backward(const PoolBackward& args, int threads) {
  args.max ? launch<MaxBackward>(args, threads) : launch<AverageBackward>(args, threads);
}

}  // namespace TWINS_FAST_ISA
}  // namespace twins_fast
