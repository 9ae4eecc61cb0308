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

// Where in an image the window of an output row or column lies.
Range window(int64_t o, int64_t stride, int64_t pad, int64_t kernel, int64_t size) {
  const int64_t begin = o * stride - pad;
  return {std::max<int64_t>(begin, 0), std::min(begin + kernel, size)};
}

// The windows that hold a row or column of the image, for one after the other.
struct WindowsOf {
  int64_t stride, pad, kernel, count;
  Range range = {0, 0};

  void move_to(int64_t i) {
    while (range.begin < count && range.begin * stride - pad + kernel <= i) ++range.begin;
    while (range.end < count && range.end * stride - pad <= i) ++range.end;
  }
};

template <class T, bool kMax>
struct PoolForwardKernel {
  const PoolForward& a;

  void operator()(int threads) const {
    const Windows& w = a.windows;
    in_parallel(threads, [&](int thread, int team) {
      const Range rows = share(0, w.images * w.out_height, thread, team);
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const int64_t out_y = r % w.out_height, top = r / w.out_height * w.height;
        const Range y = window(out_y, w.stride_y, w.pad_y, w.kernel_y, w.height);
        for (int64_t out_x = 0; out_x < w.out_width; ++out_x) {
          const Range x = window(out_x, w.stride_x, w.pad_x, w.kernel_x, w.width);
          const int64_t corner = ((top + y.begin) * w.width + x.begin) * w.channels;
          const int64_t cut_y = y.begin - (out_y * w.stride_y - w.pad_y);
          const int64_t cut_x = x.begin - (out_x * w.stride_x - w.pad_x);
          pixel(corner, (r * w.out_width + out_x) * w.channels, static_cast<int>(y.size()),
                static_cast<int>(x.size()), static_cast<int>(cut_y * w.kernel_x + cut_x));
        }
      }
    });
  }

  // The part of a window that lies in the image; `first` is the place of its corner in the whole window.
  void pixel(int64_t corner, int64_t at, int rows, int columns, int first) const {
    const int64_t channels = a.windows.channels, down = a.windows.width * channels;
    const int kernel_x = static_cast<int>(a.windows.kernel_x);
    const T* x = static_cast<const T*>(a.x) + corner;
    T* result = static_cast<T*>(a.y) + at;
    uint8_t* argmax = a.argmax ? a.argmax + at : nullptr;
    const float part = 1.0f / (static_cast<float>(rows) * static_cast<float>(columns));
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
        for_each<vectors>([&](int k) { total[k] *= part; });
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
    in_parallel(threads, [&](int thread, int team) {
      const Range rows = share(0, w.images * w.height, thread, team);
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const int64_t y = r % w.height, top = r / w.height * w.out_height;
        WindowsOf out_y{w.stride_y, w.pad_y, w.kernel_y, w.out_height};
        WindowsOf out_x{w.stride_x, w.pad_x, w.kernel_x, w.out_width};
        out_y.move_to(y);
        const int64_t place_y = y - (out_y.range.begin * w.stride_y - w.pad_y);
        for (int64_t x = 0; x < w.width; ++x) {
          out_x.move_to(x);
          const int64_t place_x = x - (out_x.range.begin * w.stride_x - w.pad_x);
          pixel(((top + out_y.range.begin) * w.out_width + out_x.range.begin) * w.channels, r * w.width + x,
                static_cast<int>(out_y.range.size()), static_cast<int>(out_x.range.size()),
                static_cast<int>(place_y * w.kernel_x + place_x));
        }
      }
    });
  }

  // `place` is that of the pixel in the first of its windows; in later ones it is further up and left.
  void pixel(int64_t corner, int64_t at, int rows, int columns, int place) const {
    const Windows& w = a.windows;
    const int64_t channels = w.channels, down = w.out_width * channels;
    const int up = static_cast<int>(w.stride_y * w.kernel_x), left = static_cast<int>(w.stride_x);
    const T* g = static_cast<const T*>(a.g) + corner;
    const uint8_t* argmax = kMax ? a.argmax + corner : nullptr;
    const T* other = a.other ? static_cast<const T*>(a.other) + at * channels : nullptr;
    const uint8_t* mask = a.mask ? a.mask + at * bytes_of_bits(channels) : nullptr;
    T* result = static_cast<T*>(a.dx) + at * channels;
    const float part = 1.0f / (static_cast<float>(w.kernel_y) * static_cast<float>(w.kernel_x));
    for_blocks<kBlock>(channels, [=](int64_t i, auto vectors, int n) {
      Floats total[vectors] = {};
      for (int y = 0; y < rows; ++y)
        for (int x = 0; x < columns; ++x) {
          const int64_t from = y * down + x * channels + i;
          const int here = place - y * up - x * left;
          for_each<vectors>([&](int k) {
            const int64_t j = from + k * kLanes;
            const Floats v = load(g + j, n);
            if constexpr (kMax) total[k] += keep(equal_bytes(argmax + j, here, n), v);
            else total[k] += v;
          });
        }
      if (!kMax) for_each<vectors>([&](int k) { total[k] *= part; });
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

template <template <class> class Kernel, class Args>
void launch(const Args& args, int threads) {
  switch (args.dtype) {
    case DType::kFloat32: return Kernel<float>{args}(threads);
    case DType::kBFloat16: return Kernel<BFloat16>{args}(threads);
    case DType::kFloat16: return Kernel<Float16>{args}(threads);
  }
}

}  // namespace

namespace TWINS_FAST_ISA {

void pointwise(const Pointwise& args, int threads) { launch<PointwiseKernel>(args, threads); }

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
