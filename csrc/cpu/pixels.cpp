// Images to what the network sees of them, its gradient back, and the sign step of an attack. Compiled once per
// instruction set, as namespace TWINS_FAST_ISA, and without fused multiply-adds: results are PyTorch's to the bit.
#include <algorithm>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "simd.h"

namespace twins_fast {
namespace {

// Values of a block of columns in all channels. Longer blocks make longer streams, and still stay in the caches.
constexpr int64_t kBuffer = 8192;
static_assert(kMostPixelChannels * kLanes <= kBuffer, "");

// Vectors that are worked on at a time.
constexpr int kBlock = 4;

// As PyTorch's: a NaN stays, and so does the zero's sign at a bound.
inline Floats clamped(Floats v, Floats low, Floats high) {
  v = v < low ? low : v;
  return high < v ? high : v;
}

// The steps on one channel.
struct Steps {
  struct Step {
    PixelStep::Kind kind;
    bool at_bounds;
    float value, high;
  };
  Step step[kMostPixelSteps];
  int count, clamps;  // clamps: steps until the last clamp

  Steps(const PixelProgram& program, int64_t channel) : count(program.steps), clamps(0) {
    for (int s = 0; s < count; ++s) {
      const PixelStep& from = program.step[s];
      const bool clamp = from.kind == PixelStep::kClamp;
      step[s] = {from.kind, from.at_bounds, from.values[clamp ? 0 : channel], clamp ? from.values[1] : 0};
      if (clamp) clamps = s + 1;
    }
  }

  template <int kCount>
  static void next(const Step& s, Floats (&v)[kCount]) {
    const Floats value = broadcast(s.value), high = broadcast(s.high);
    switch (s.kind) {
      case PixelStep::kClamp: return for_each<kCount>([&](int k) { v[k] = clamped(v[k], value, high); });
      case PixelStep::kAdd: return for_each<kCount>([&](int k) { v[k] += value; });
      case PixelStep::kSub: return for_each<kCount>([&](int k) { v[k] -= value; });
      case PixelStep::kMul: return for_each<kCount>([&](int k) { v[k] *= value; });
      case PixelStep::kDiv: return for_each<kCount>([&](int k) { v[k] /= value; });
    }
  }

  template <int kCount>
  void forward(Floats (&v)[kCount]) const {
    for (int s = 0; s < count; ++s) next(step[s], v);
  }

  // From the gradient with respect to forward(v) to that with respect to v.
  template <int kCount>
  void backward(const Floats (&x)[kCount], Floats (&gradient)[kCount]) const {
    Ints inside[kMostPixelSteps][kCount];
    if (clamps) {
      Floats v[kCount];
      for_each<kCount>([&](int k) { v[k] = x[k]; });
      for (int s = 0; s < clamps; ++s) {
        const Floats low = broadcast(step[s].value), high = broadcast(step[s].high);
        if (step[s].kind == PixelStep::kClamp && step[s].at_bounds)
          for_each<kCount>([&](int k) { inside[s][k] = (v[k] >= low) & (v[k] <= high); });
        else if (step[s].kind == PixelStep::kClamp)
          for_each<kCount>([&](int k) { inside[s][k] = (v[k] > low) & (v[k] < high); });
        if (s + 1 < clamps) next(step[s], v);
      }
    }
    for (int s = count - 1; s >= 0; --s) {
      const Floats value = broadcast(step[s].value);
      switch (step[s].kind) {
        case PixelStep::kClamp:
          for_each<kCount>([&](int k) { gradient[k] = (Floats)((Ints)gradient[k] & inside[s][k]); });
          break;
        case PixelStep::kMul: for_each<kCount>([&](int k) { gradient[k] *= value; }); break;
        case PixelStep::kDiv: for_each<kCount>([&](int k) { gradient[k] /= value; }); break;
        default: break;
      }
    }
  }
};

// Channels of a pixel together, and in planes `stride` apart. kChannels: how many, or 0 if `channels` says so; the
// compiler turns loops over three into shuffles.
template <int kChannels>
void interleave(float* __restrict mixed, const float* __restrict planes, int64_t stride, int64_t channels,
                int64_t width) {
  if (kChannels) channels = kChannels;
  for (int64_t x = 0; x < width; ++x)
    for (int64_t c = 0; c < channels; ++c) mixed[x * channels + c] = planes[c * stride + x];
}

template <int kChannels>
void separate(float* __restrict planes, const float* __restrict mixed, int64_t stride, int64_t channels,
              int64_t width) {
  if (kChannels) channels = kChannels;
  for (int64_t x = 0; x < width; ++x)
    for (int64_t c = 0; c < channels; ++c) planes[c * stride + x] = mixed[x * channels + c];
}

template <class T, PixelPass kPass, int kChannels>
struct PixelKernel {
  const PixelCall& a;
  const PixelProgram& p = a.program;
  const int64_t channels = kChannels ? kChannels : p.channels;
  const bool repeats = p.row_start;
  const int64_t most = kBuffer / channels / kLanes * kLanes;  // columns of a block
  const int64_t blocks = (p.width + most - 1) / most;
  const int64_t step = ((p.width + blocks - 1) / blocks + kLanes - 1) / kLanes * kLanes;

  void operator()(int threads) const {
    in_parallel(threads, [&](int thread, int team) {
      const Range units = share(0, a.images * p.height * blocks, thread, team);
      for (int64_t u = units.begin; u < units.end; ++u) {
        const int64_t row = u / blocks, begin = u % blocks * step;
        const Range columns{std::min(begin, p.width), std::min(begin + step, p.width)};
        block(row / p.height, row % p.height, columns);
      }
    });
  }

  void block(int64_t image, int64_t y, Range columns) const {
    alignas(64) float mixed[kBuffer], planes[kBuffer];
    const int64_t width = columns.size(), stride = (width + kLanes - 1) / kLanes * kLanes;
    if (kPass != PixelPass::kPrepare)
      separate<kChannels>(planes, gradient_of(image, y, columns, mixed), stride, channels, width);
    const T* upcoming = kPass == PixelPass::kPrepare || repeats
                            ? nullptr
                            : static_cast<const T*>(a.gradient) + (image * p.width + columns.end) * channels;
    int64_t nans = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = ((image * channels + c) * p.height + y) * p.width + columns.begin;
      nans += plane(c, at, width, planes + c * stride, upcoming ? upcoming + c * width : nullptr);
    }
    if (nans && a.not_finite) __atomic_fetch_add(a.not_finite + image, nans, __ATOMIC_RELAXED);
    if (!a.out) return;
    if (repeats) {
      interleave<kChannels>(mixed, planes, stride, channels, width);
      repeat(mixed, image, y, columns);
    } else {
      T* out = static_cast<T*>(a.out) + (image * p.width + columns.begin) * channels;
      float* target = mixed;
      if constexpr (std::is_same_v<T, float>) target = out;
      interleave<kChannels>(target, planes, stride, channels, width);
      if constexpr (!std::is_same_v<T, float>)
        for_vectors(0, width * channels, [&](int64_t i, int n) { store(out + i, load(mixed + i, n), n); });
    }
  }

  // One channel: `values` holds the gradient of the block, and then what `out` gets. Returns how many are NaN.
  // `upcoming`, if not null, is a part of the next block's gradient.
  int64_t plane(int64_t channel, int64_t at, int64_t width, float* values, const T* upcoming) const {
    const Steps steps(p, channel);
    const float *from = a.x + at, *clean = kPass == PixelPass::kStep ? a.clean + at : nullptr;
    float* result = kPass == PixelPass::kPrepare ? nullptr : a.result + at;
    const Floats alpha = broadcast(a.alpha), eps = broadcast(a.eps), zero = {}, one = broadcast(1);
    const bool out = a.out;
    // The streams are too short for the hardware to see: this plane ends here, and the next is elsewhere.
    const int64_t pitch = p.height * p.width;
    const int64_t ahead = channel + 1 < channels ? pitch : width - (channels - 1) * pitch;
    int64_t nans = 0;
    for_blocks<kBlock>(width, [&](int64_t i, auto vectors, int n) {
      Floats x[vectors], d[vectors];
      for_each<vectors>([&](int k) {
        __builtin_prefetch(from + i + k * kLanes + ahead);
        if (kPass == PixelPass::kStep) __builtin_prefetch(clean + i + k * kLanes + ahead);
        if (upcoming) __builtin_prefetch(upcoming + i + k * kLanes);
      });
      for_each<vectors>([&](int k) { x[k] = load(from + i + k * kLanes, n); });
      if (kPass != PixelPass::kPrepare) {
        for_each<vectors>([&](int k) { d[k] = load(values + i + k * kLanes); });
        steps.backward(x, d);
        for_each<vectors>([&](int k) {
          const int64_t j = i + k * kLanes;
          if (kPass == PixelPass::kGradient) return store(result + j, d[k], n);
          const Floats sign = d[k] > 0.0f ? one : (d[k] < 0.0f ? -one : zero), center = load(clean + j, n);
          Floats v = clamped(x[k] + alpha * sign, center - eps, center + eps);
          v = clamped(center == center ? v : center, zero, one);
          x[k] = d[k] == d[k] ? v : x[k];
          store(result + j, x[k], n);
          const unsigned nan = packed(above_or_nan(d[k], d[k])) & ((1u << n) - 1);
          if (nan) nans += __builtin_popcount(nan);
        });
      }
      if (!out) return;
      steps.forward(x);
      for_each<vectors>([&](int k) { store(values + i + k * kLanes, x[k]); });
    });
    return nans;
  }

  // The gradient with respect to the block before its columns and rows were repeated.
  const float* gradient_of(int64_t image, int64_t y, Range columns, float* mixed) const {
    const T* g = static_cast<const T*>(a.gradient);
    const int64_t values = columns.size() * channels;
    if (!repeats) {
      g += (image * p.width + columns.begin) * channels;
      if constexpr (std::is_same_v<T, float>) return g;
      for_vectors(0, values, [&](int64_t i, int n) { store(mixed + i, load(g + i, n), n); });
      return mixed;
    }
    std::fill_n(mixed, values, 0.0f);
    alignas(64) float sums[kBuffer];
    const int32_t* start = p.column_start;
    const int64_t last = start[columns.end], pitch = p.out_width * channels;
    const int64_t top = p.row_start[y], bottom = p.row_start[y + 1];
    g += (image * p.out_height + top) * pitch;
    int64_t x = columns.begin;
    for (int64_t begin = start[x]; begin < last; begin += most) {
      const int64_t end = std::min(begin + most, last);
      // Rows first: whole vectors, and there are fewer sums of columns then.
      for_vectors(0, (end - begin) * channels, [=, &sums](int64_t i, int n) {
        Floats total = {};
        for (int64_t r = 0; r < bottom - top; ++r) {
          const T* from = g + r * pitch + begin * channels + i;
          __builtin_prefetch(from + (bottom - top) * pitch);
          total += load(from, n);
        }
        store(sums + i, total, n);
      });
      for (; x < columns.end && start[x] < end; ++x) {
        const int64_t first = std::max<int64_t>(start[x], begin), past = std::min<int64_t>(start[x + 1], end);
        for (int64_t c = 0; c < channels; ++c) {
          float total = mixed[(x - columns.begin) * channels + c];
          for (int64_t o = first; o < past; ++o) total += sums[(o - begin) * channels + c];
          mixed[(x - columns.begin) * channels + c] = total;
        }
        if (start[x + 1] > end) break;  // the rest of this column's copies are in the next part
      }
    }
    return mixed;
  }

  void repeat(const float* mixed, int64_t image, int64_t y, Range columns) const {
    const int64_t top = p.row_start[y], bottom = p.row_start[y + 1], pitch = p.out_width * channels;
    const int32_t* start = p.column_start + columns.begin;
    if (top == bottom) return;
    alignas(64) T narrow[kBuffer];
    for_vectors(0, columns.size() * channels, [&](int64_t i, int n) { store(narrow + i, load(mixed + i, n), n); });
    T* first = static_cast<T*>(a.out) + (image * p.out_height + top) * pitch + start[0] * channels;
    T* to = first;
    for (int64_t x = 0; x < columns.size(); ++x)
      for (int32_t o = start[x]; o < start[x + 1]; ++o)
        for (int64_t c = 0; c < channels; ++c) *to++ = narrow[x * channels + c];
    for (int64_t r = 1; r < bottom - top; ++r) std::memcpy(first + r * pitch, first, (to - first) * sizeof(T));
  }
};

template <class T, PixelPass kPass>
void launch_channels(const PixelCall& args, int threads) {
  args.program.channels == 3 ? PixelKernel<T, kPass, 3>{args}(threads) : PixelKernel<T, kPass, 0>{args}(threads);
}

template <class T>
void launch_pass(const PixelCall& args, int threads) {
  switch (args.pass) {
    case PixelPass::kPrepare: return launch_channels<T, PixelPass::kPrepare>(args, threads);
    case PixelPass::kGradient: return launch_channels<T, PixelPass::kGradient>(args, threads);
    case PixelPass::kStep: return launch_channels<T, PixelPass::kStep>(args, threads);
  }
}

}  // namespace

namespace TWINS_FAST_ISA {

void pixels(const PixelCall& args, int threads) {
  switch (args.dtype) {
    case DType::kFloat32: return launch_pass<float>(args, threads);
    case DType::kBFloat16: return launch_pass<BFloat16>(args, threads);
    case DType::kFloat16: return launch_pass<Float16>(args, threads);
  }
}

}  // namespace TWINS_FAST_ISA
}  // namespace twins_fast
