// Two-wing batch norm on CUDA, one cooperative launch per direction.
//
// The work of the frozen half, which waits for nothing, hides the reduction over the adaptive half:
//   partial sums of my adaptive rows -> arrive at the grid barrier -> my frozen rows -> wait at the barrier
//   -> combine the partial sums of my channels -> my adaptive rows, newest in the cache first.
// Without cooperative launch the same steps run as two launches, cut at the barrier.
//
// Every sum has a fixed order, so that results are the same from run to run on one kind of device. Arithmetic is
// float32, and double for the few values of a channel at the end. The formulas are those of csrc/cpu/twin_bn.cpp.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <initializer_list>

#include "cuda/kernels.h"

namespace twins_fast {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 512;
constexpr int kGroup = 8;                      // neighbouring values that one thread handles: one byte of bits
constexpr int kMaxGroups = 32;                 // groups of a row in one tile
constexpr int kMaxWidth = kMaxGroups * kGroup;  // channels of a tile
constexpr int kBytesInFlight = 64;             // loads of a thread ahead of their use
constexpr int kDepth = 4;                      // groups per thread that make another slab worthwhile
constexpr int kBlocksPerMultiprocessor = 2;    // more would only mean more partial sums to combine
constexpr int kMaxBlocks = 1024;
constexpr int kMaxDevices = 64;

enum Step : unsigned { kReduceStep = 1, kApplyStep = 2, kCooperative = 4 };

struct Pair {
  float first, second;
};

// ---- Memory: groups of kGroup neighbouring values, decoded to float32.

template <class T>
struct alignas(16) Group {
  T values[kGroup];
};

// Lines that are used once should not push out those that are read again after the barrier.
enum class Use { kAgain, kOnce };

// kWhole: all groups are full and aligned to 16 bytes, so that they move as such.
template <bool kWhole, Use kUse, class T>
__device__ __forceinline__ Group<T> load(const T* p, int count) {
  Group<T> group;
  if constexpr (kWhole) {
    constexpr int kQuads = sizeof(Group<T>) / sizeof(uint4);
    union {
      uint4 quads[kQuads];
      Group<T> group;
    } bytes;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const uint4* quad = reinterpret_cast<const uint4*>(p) + i;
      bytes.quads[i] = kUse == Use::kOnce ? __ldcs(quad) : *quad;
    }
    group = bytes.group;
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) group.values[i] = i < count ? p[i] : static_cast<T>(0.f);
  }
  return group;
}

template <bool kWhole, Use kUse, class T>
__device__ __forceinline__ void store(T* p, int count, const float (&v)[kGroup]) {
  if constexpr (kWhole) {
    constexpr int kQuads = sizeof(Group<T>) / sizeof(uint4);
    union {
      uint4 quads[kQuads];
      Group<T> group;
    } bytes;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) bytes.group.values[i] = static_cast<T>(v[i]);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      uint4* quad = reinterpret_cast<uint4*>(p) + i;
      if (kUse == Use::kOnce) __stcs(quad, bytes.quads[i]);
      else *quad = bytes.quads[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (i < count) p[i] = static_cast<T>(v[i]);
  }
}

// Groups of each of kInputs tensors to load ahead.
template <class T, bool kWhole, int kInputs>
constexpr int kAheadOf = kWhole ? kBytesInFlight / static_cast<int>(sizeof(Group<T>)) / kInputs : 1;

// ---- Work: tiles of channels, and slabs of the values of one half in a tile.

// The images of one half.
struct Half {
  int64_t first;  // image
  int64_t units;  // per tile: pixels, each with the groups of a tile; or the groups of a channel's pixels

  __host__ __device__ Half(const Shape& s, int64_t begin, int64_t end)
      : first(begin), units((end - begin) * (s.channels_last ? s.pixels : s.bytes_of_bits())) {}
};

struct Range {
  int begin, end;
};

// Slab `slab` of `slabs`.
__host__ __device__ inline Range share(int64_t units, int slab, int slabs) {
  return {static_cast<int>(units * slab / slabs), static_cast<int>(units * (slab + 1) / slabs)};
}

// How a block sees a shape. In a channels-last tile neighbouring threads hold neighbouring groups of channels
// and each thread keeps its channels; in a contiguous one all threads share the tile's one channel.
template <bool kLast>
struct Tiling {
  static constexpr int kOwn = kLast ? kGroup : 1;  // channels of a thread
  int tiles, groups;                                // groups: of a tile, side by side

  __host__ __device__ explicit Tiling(const Shape& s) {
    const int64_t all = s.bytes_of_bits();
    tiles = static_cast<int>(kLast ? (all + kMaxGroups - 1) / kMaxGroups : s.channels);
    groups = static_cast<int>(kLast ? (all + tiles - 1) / tiles : 1);
  }
  __host__ __device__ int lanes() const { return kThreads / groups; }
  __host__ __device__ int width() const { return kLast ? groups * kGroup : 1; }  // channels
};

// One thread in one tile. kWhole: rows are whole groups, so that bits are packed without gaps.
template <bool kLast, bool kWhole>
struct Worker {
  const Shape& shape;
  const Tiling<kLast> tiling;
  const int tile;
  const int lanes = tiling.lanes();
  const int lane = static_cast<int>(threadIdx.x) / tiling.groups;
  const int column = tile * tiling.groups + static_cast<int>(threadIdx.x) % tiling.groups;  // group in a row
  const bool active = lane < lanes && (!kLast || column < shape.bytes_of_bits());

  __device__ Worker(const Shape& shape, int tile) : shape(shape), tiling(shape), tile(tile) {}

  // Channel of my i-th accumulator; values past the last channel are never used.
  __device__ int64_t channel(int i) const {
    const int64_t c = kLast ? int64_t{column} * kGroup + i : tile;
    return c < shape.channels ? c : shape.channels - 1;
  }

  struct Place {
    int64_t offset, gapped_byte;
    int gapped_count;

    __device__ int64_t byte() const { return kWhole ? offset / kGroup : gapped_byte; }
    __device__ int count() const { return kWhole ? kGroup : gapped_count; }
  };

  __device__ Place place(const Half& half, int unit) const {
    if (kLast) {
      const int64_t row = half.first * shape.pixels + unit;
      const int64_t left = shape.channels - int64_t{column} * kGroup;
      return {row * shape.channels + column * kGroup, row * shape.bytes_of_bits() + column,
              static_cast<int>(left < kGroup ? left : kGroup)};
    }
    const unsigned groups = static_cast<unsigned>(shape.bytes_of_bits());
    const unsigned image = unit / groups, group = unit % groups;
    const int64_t row = (half.first + image) * shape.channels + tile, column = int64_t{group} * kGroup;
    const int64_t left = shape.pixels - column;
    return {row * shape.pixels + column, row * groups + group, static_cast<int>(left < kGroup ? left : kGroup)};
  }

  // Values per channel in units [0, unit).
  __device__ int64_t values_before(int64_t unit) const {
    if (kLast) return unit;
    const int64_t groups = shape.bytes_of_bits(), rest = unit % groups * kGroup;
    return unit / groups * shape.pixels + (rest < shape.pixels ? rest : shape.pixels);
  }

  // Calls use(place, load(place)) over my units of `range`, kAhead loads ahead of their use.
  template <int kAhead, bool kBackwards, class Load, class UseIt>
  __device__ void walk(const Half& half, Range range, Load&& load, UseIt&& use) const {
    if (!active) return;
    using Loaded = decltype(load(Place{}));
#pragma unroll 1
    for (int unit = range.begin + lane; unit < range.end; unit += kAhead * lanes) {
      Place places[kAhead];
      Loaded loaded[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int u = unit + i * lanes;
        if (u >= range.end) continue;
        places[i] = place(half, kBackwards ? range.end - 1 - (u - range.begin) : u);
        loaded[i] = load(places[i]);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (unit + i * lanes < range.end) use(places[i], loaded[i]);
    }
  }
};

// ---- Sums over the lanes of a block, and over the slabs.

struct Memory {
  Pair pairs[kGroup][kThreads];
  float counts[kThreads];
  float coefficients[4][kMaxWidth];
};

// Merging disjoint sets: plain sums, or (mean, sum of squared deviations) of `count` values
// (Chan, Golub and LeVeque, 1979).
struct Sums {
  static __device__ Pair merge(float, Pair a, float, Pair b) { return {a.first + b.first, a.second + b.second}; }
};

struct Moments {
  static __device__ Pair merge(float count_a, Pair a, float count_b, Pair b) {
    if (count_b == 0) return a;
    if (count_a == 0) return b;
    const float share = count_b / (count_a + count_b), delta = b.first - a.first;
    return {a.first + delta * share, a.second + b.second + delta * delta * (count_a * share)};
  }
};

// Merges values[i] of all threads whose index is the same modulo `stride` into that of the first of them.
template <class Kind, int kCount>
__device__ void merge_lanes(Memory& memory, int stride, int lanes, float count, Pair (&values)[kCount]) {
  const int me = threadIdx.x, lane = me / stride;
  __syncthreads();  // the memory may still be read
  memory.counts[me] = count;
#pragma unroll
  for (int i = 0; i < kCount; ++i) memory.pairs[i][me] = values[i];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    const int other = me + half * stride;
    if (lane >= half || lane + half >= lanes) continue;
    const float mine = memory.counts[me], its = memory.counts[other];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = Kind::merge(mine, memory.pairs[i][me], its, memory.pairs[i][other]);
      memory.pairs[i][me] = values[i];
    }
    memory.counts[me] = mine + its;
  }
}

// Partial results: `parts` pairs of vectors [slabs, channels].
struct Partials {
  float* values;
  int slabs;
  int64_t channels;

  __device__ float* at(int part, int second, int slab) const {
    return values + ((part * 2 + second) * int64_t{slabs} + slab) * channels;
  }
};

// Merges the lanes of a block and writes the result as slab `slab`.
template <class Kind, bool kLast, bool kWhole, int kCount>
__device__ void write_partials(Memory& memory, const Worker<kLast, kWhole>& worker, float count, Pair (&values)[kCount],
                               const Partials& partials, int part, int slab) {
  merge_lanes<Kind>(memory, worker.tiling.groups, worker.lanes, worker.active ? count : 0, values);
  if (worker.lane > 0 || !worker.active) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (kLast && worker.column * kGroup + i >= worker.shape.channels) break;
    const int64_t c = worker.channel(i);
    partials.at(part, 0, slab)[c] = values[i].first;
    partials.at(part, 1, slab)[c] = values[i].second;
  }
}

// Merges the slabs of all channels of the tile; the result is valid in threads [0, width).
template <class Kind, bool kLast, bool kWhole>
__device__ Pair merge_slabs(Memory& memory, const Worker<kLast, kWhole>& worker, const Half& half, const Partials& partials,
                            int part) {
  const int width = worker.tiling.width(), lanes = kThreads / width;
  const int lane = threadIdx.x / width;
  const int64_t c = int64_t{worker.tile} * width + threadIdx.x % width;
  Pair total[1] = {{0, 0}};
  float count = 0;
  if (c < partials.channels && lane < lanes)
    for (int slab = lane; slab < partials.slabs; slab += lanes) {
      const Range range = share(half.units, slab, partials.slabs);
      const float n = static_cast<float>(worker.values_before(range.end) - worker.values_before(range.begin));
      // Past the first-level cache, which other multiprocessors do not share.
      total[0] = Kind::merge(count, total[0], n,
                             {__ldcg(partials.at(part, 0, slab) + c), __ldcg(partials.at(part, 1, slab) + c)});
      count += n;
    }
  merge_lanes<Kind>(memory, width, lanes, count, total);
  return total[0];
}

// The channel that this thread finishes when the slabs of its tile are merged, or -1.
template <bool kLast, bool kWhole>
__device__ int64_t my_channel(const Worker<kLast, kWhole>& worker) {
  const int width = worker.tiling.width();
  const int64_t c = int64_t{worker.tile} * width + threadIdx.x;
  return static_cast<int>(threadIdx.x) < width && c < worker.shape.channels ? c : -1;
}

__device__ float value_or(const float* vector, int64_t c, float absent) { return vector ? vector[c] : absent; }

__device__ float reciprocal_root(float var, double eps) { return 1.f / sqrtf(var + static_cast<float>(eps)); }

// Index in Memory::coefficients of my i-th channel.
template <bool kLast, bool kWhole>
__device__ int place_in_tile(const Worker<kLast, kWhole>& worker, int i) {
  return kLast ? static_cast<int>(threadIdx.x) % worker.tiling.groups * kGroup + i : 0;
}

// ---- Forward.

template <class T, bool kLast, bool kWhole>
struct Forward {
  static constexpr int kOwn = Tiling<kLast>::kOwn;
  const TwinBnForward& a;
  const Partials& partials;
  Memory& memory;

  __device__ void measure(int tile, int slab) const {
    const Worker<kLast, kWhole> worker(a.shape, tile);
    const Half half(a.shape, a.shape.split, a.shape.images);
    const T* x = static_cast<const T*>(a.x);
    // One-pass sums about my first value, or the mean of my first group: they stay comparable to the variance.
    float pivot[kOwn] = {}, sum[kOwn] = {}, squares[kOwn] = {};
    int count = 0;
    worker.template walk<kAheadOf<T, kWhole, 1>, false>(
        half, share(half.units, slab, partials.slabs),
        [&](auto at) { return load<kWhole, Use::kAgain>(x + at.offset, at.count()); },
        [&](auto at, const Group<T>& group) {
          if (count == 0) start(at.count(), group, pivot);
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            if (!kLast && !kWhole && i >= at.count()) break;
            const float d = static_cast<float>(group.values[i]) - pivot[kLast ? i : 0];
            sum[kLast ? i : 0] += d;
            squares[kLast ? i : 0] += d * d;
          }
          count += kLast ? 1 : at.count();
        });
    Pair moments[kOwn];
    const float inverse = count > 0 ? 1.f / count : 0.f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float deviations = squares[i] - sum[i] * sum[i] * inverse;
      moments[i] = {pivot[i] + sum[i] * inverse, deviations < 0 ? 0 : deviations};
    }
    write_partials<Moments>(memory, worker, static_cast<float>(count), moments, partials, 0, slab);
  }

  __device__ __forceinline__ void start(int count, const Group<T>& group, float (&pivot)[kOwn]) const {
    if constexpr (kLast) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) pivot[i] = static_cast<float>(group.values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) pivot[0] += i < count ? static_cast<float>(group.values[i]) : 0.f;
      pivot[0] /= count;
    }
  }

  // mean, scale and bias of the frozen wing, for my channels.
  __device__ void frozen(int tile, int slab) const {
    const Worker<kLast, kWhole> worker(a.shape, tile);
    float mean[kOwn], scale[kOwn], bias[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t c = worker.channel(i);
      mean[i] = a.frozen_mean[c];
      scale[i] = value_or(a.frozen_weight, c, 1) * reciprocal_root(a.frozen_var[c], a.eps);
      bias[i] = value_or(a.frozen_bias, c, 0);
    }
    normalise<Use::kOnce>(worker, Half(a.shape, 0, a.shape.split), slab, mean, scale, bias);
  }

  // Statistics of the tile's channels; all slabs compute the same, slab 0 writes it down.
  __device__ void combine(int tile, int slab) const {
    const Worker<kLast, kWhole> worker(a.shape, tile);
    const Half half(a.shape, a.shape.split, a.shape.images);
    const int64_t c = my_channel(worker), channels = a.shape.channels;
    const double n = static_cast<double>(a.shape.adaptive_count());
    Pair total = {0, 0};
    if (a.phase != Phase::kApply && n > 0) total = merge_slabs<Moments>(memory, worker, half, partials, 0);
    if (c < 0) return;
    float mean = total.first, second = total.second;
    if (a.phase == Phase::kApply) {
      mean = a.stats[c];
      second = a.stats[channels + c];
    } else if (a.phase == Phase::kAll && n > 0) {
      second = static_cast<float>(1 / sqrt(total.second / n + a.eps));
    }
    memory.coefficients[0][threadIdx.x] = mean;
    memory.coefficients[1][threadIdx.x] = value_or(a.weight, c, 1) * second;
    memory.coefficients[2][threadIdx.x] = value_or(a.bias, c, 0);
    if (slab > 0 || a.phase == Phase::kApply) return;
    a.stats[c] = mean;
    a.stats[channels + c] = second;
    if (a.phase == Phase::kReduce || n == 0) return;
    if (a.running_mean) update(a.running_mean[c], mean);
    if (a.running_var) update(a.running_var[c], total.second / (n - 1));
  }

  __device__ void update(float& running, double value) const {
    running = static_cast<float>((1 - a.momentum) * running + a.momentum * value);
  }

  __device__ void adaptive(int tile, int slab) const {
    const Worker<kLast, kWhole> worker(a.shape, tile);
    float mean[kOwn], scale[kOwn], bias[kOwn];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = place_in_tile(worker, i);
      mean[i] = memory.coefficients[0][at];
      scale[i] = memory.coefficients[1][at];
      bias[i] = memory.coefficients[2][at];
    }
    normalise<Use::kAgain>(worker, Half(a.shape, a.shape.split, a.shape.images), slab, mean, scale, bias);
    __syncthreads();  // before the next tile's coefficients
  }

  struct Inputs {
    Group<T> x, residual;
  };

  // y = relu((x - mean) * scale + bias + residual); x - mean first, since it is exact where they are close.
  template <Use kUse>
  __device__ void normalise(const Worker<kLast, kWhole>& worker, const Half& half, int slab, const float (&mean)[kOwn],
                            const float (&scale)[kOwn], const float (&bias)[kOwn]) const {
    const T* x = static_cast<const T*>(a.x);
    const T* residual = static_cast<const T*>(a.residual);
    worker.template walk<kAheadOf<T, kWhole, 2>, kUse == Use::kAgain>(
        half, share(half.units, slab, partials.slabs),
        [&](auto at) {
          Inputs in;
          in.x = load<kWhole, Use::kOnce>(x + at.offset, at.count());
          if (residual) in.residual = load<kWhole, Use::kOnce>(residual + at.offset, at.count());
          return in;
        },
        [&](auto at, const Inputs& in) {
          float v[kGroup];
          unsigned bits = 0;
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            const int own = kLast ? i : 0;
            v[i] = (static_cast<float>(in.x.values[i]) - mean[own]) * scale[own] + bias[own];
            if (residual) v[i] += static_cast<float>(in.residual.values[i]);
            const bool passes = !(v[i] <= 0);  // a NaN passes, as in torch.relu
            if ((kWhole || i < at.count()) && passes) bits |= 1u << i;
            if (a.relu && !passes) v[i] = 0;
          }
          if (a.bits) a.bits[at.byte()] = static_cast<uint8_t>(bits);
          store<kWhole, kUse>(static_cast<T*>(a.y) + at.offset, at.count(), v);
        });
  }
};

template <class T, bool kLast, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(TwinBnForward a, Partials partials, unsigned steps) {
  __shared__ Memory memory;
  const Forward<T, kLast, kWhole> forward{a, partials, memory};
  const int slabs = partials.slabs, items = Tiling<kLast>(a.shape).tiles * slabs;
  const int first = blockIdx.x, step = gridDim.x;
  cg::grid_group::arrival_token token{};
  if (steps & kReduceStep) {
    if (a.phase != Phase::kApply && a.shape.split < a.shape.images)
      for (int item = first; item < items; item += step) forward.measure(item / slabs, item % slabs);
    if (steps & kCooperative) token = cg::this_grid().barrier_arrive();
    if (a.phase != Phase::kReduce && a.shape.split > 0)
      for (int item = first; item < items; item += step) forward.frozen(item / slabs, item % slabs);
    if (steps & kCooperative) cg::this_grid().barrier_wait(static_cast<decltype(token)&&>(token));
  }
  if (steps & kApplyStep)
    for (int item = first; item < items; item += step) {
      forward.combine(item / slabs, item % slabs);
      if (a.phase != Phase::kReduce && a.shape.split < a.shape.images) forward.adaptive(item / slabs, item % slabs);
    }
}

// ---- Backward.

template <class T, bool kLast, bool kWhole>
struct Backward {
  static constexpr int kOwn = Tiling<kLast>::kOwn;
  enum { kFrozenPart, kAdaptivePart };
  const TwinBnBackward& a;
  const Partials& partials;
  Memory& memory;

  __device__ bool reduces() const { return a.phase != Phase::kApply; }
  __device__ bool frozen_sums() const {
    return reduces() && a.shape.split > 0 && (a.phase == Phase::kReduce || a.dfrozen_weight || a.dfrozen_bias);
  }
  __device__ bool adaptive_sums() const {
    return reduces() && a.shape.split < a.shape.images && (a.phase == Phase::kReduce || a.dx || a.dweight || a.dbias);
  }
  __device__ bool images() const { return a.dx || a.dresidual; }

  struct Inputs {
    Group<T> dy, x;
    unsigned bits;
  };

  template <Use kUse>
  __device__ __forceinline__ Inputs read(int64_t offset, int64_t byte, int count, bool with_x) const {
    Inputs in;
    in.dy = load<kWhole, kUse>(static_cast<const T*>(a.dy) + offset, count);
    if (with_x) in.x = load<kWhole, kUse>(static_cast<const T*>(a.x) + offset, count);
    in.bits = a.bits ? a.bits[byte] : 0xffu;
    return in;
  }

  // g = dy where the ReLU passed.
  static __device__ __forceinline__ float g(const Inputs& in, int i) {
    return in.bits >> i & 1 ? static_cast<float>(in.dy.values[i]) : 0.f;
  }

  // Sums of g and g * (x - mean) of one half, and the results of the frozen one.
  template <bool kFrozen>
  __device__ void reduce(int tile, int slab) const {
    const Worker<kLast, kWhole> worker(a.shape, tile);
    const Half half(a.shape, kFrozen ? 0 : a.shape.split, kFrozen ? a.shape.split : a.shape.images);
    const bool sums = kFrozen ? frozen_sums() : true;
    float mean[kOwn], scale[kOwn];
    Pair total[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t c = worker.channel(i);
      mean[i] = sums ? (kFrozen ? a.frozen_mean : a.stats)[c] : 0;
      if (kFrozen && a.dx) scale[i] = value_or(a.frozen_weight, c, 1) * reciprocal_root(a.frozen_var[c], a.eps);
      total[i] = {0, 0};
    }
    worker.template walk<kAheadOf<T, kWhole, 2>, false>(
        half, share(half.units, slab, partials.slabs),
        [&](auto at) { return read<kFrozen ? Use::kOnce : Use::kAgain>(at.offset, at.byte(), at.count(), sums); },
        [&](auto at, const Inputs& in) {
          if (sums) {
#pragma unroll
            for (int i = 0; i < kGroup; ++i) {
              const int own = kLast ? i : 0;
              if (!kWhole && i >= at.count()) break;
              total[own].first += g(in, i);
              total[own].second += g(in, i) * (static_cast<float>(in.x.values[i]) - mean[own]);
            }
          }
          if (!kFrozen) return;
          float v[kGroup];
          if (a.dx) {
#pragma unroll
            for (int i = 0; i < kGroup; ++i) v[i] = g(in, i) * scale[kLast ? i : 0];
            store<kWhole, Use::kOnce>(static_cast<T*>(a.dx) + at.offset, at.count(), v);
          }
          if (a.dresidual) {
#pragma unroll
            for (int i = 0; i < kGroup; ++i) v[i] = g(in, i);
            store<kWhole, Use::kOnce>(static_cast<T*>(a.dresidual) + at.offset, at.count(), v);
          }
        });
    if (sums) write_partials<Sums>(memory, worker, 1, total, partials, kFrozen ? kFrozenPart : kAdaptivePart, slab);
  }

  // Vector gradients of the adaptive wing and the coefficients of dx; slab 0 writes what is wanted.
  __device__ void combine(int tile, int slab) const {
    const Worker<kLast, kWhole> worker(a.shape, tile);
    const Half half(a.shape, a.shape.split, a.shape.images);
    const int64_t c = my_channel(worker), channels = a.shape.channels;
    Pair total = {0, 0};
    if (adaptive_sums()) total = merge_slabs<Sums>(memory, worker, half, partials, kAdaptivePart);
    if (c < 0) return;
    const float rstd = a.stats[channels + c], n = static_cast<float>(a.shape.adaptive_count());
    const bool given = a.phase == Phase::kApply;
    const float mean_g = given ? a.sums[c] : total.first / n, mean_gx = given ? a.sums[channels + c] : total.second / n;
    memory.coefficients[0][threadIdx.x] = a.stats[c];
    memory.coefficients[1][threadIdx.x] = value_or(a.weight, c, 1) * rstd;
    memory.coefficients[2][threadIdx.x] = mean_g;
    memory.coefficients[3][threadIdx.x] = mean_gx * rstd * rstd;
    if (slab > 0) return;
    if (a.phase == Phase::kReduce) {
      a.sums[2 * channels + c] = total.first;
      a.sums[3 * channels + c] = total.second;
    }
    if (a.dbias) a.dbias[c] = total.first;
    if (a.dweight) a.dweight[c] = total.second * rstd;
  }

  __device__ void adaptive(int tile, int slab) const {
    const Worker<kLast, kWhole> worker(a.shape, tile);
    const Half half(a.shape, a.shape.split, a.shape.images);
    float mean[kOwn], scale[kOwn], offset[kOwn], slope[kOwn];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = place_in_tile(worker, i);
      mean[i] = memory.coefficients[0][at];
      scale[i] = memory.coefficients[1][at];
      offset[i] = memory.coefficients[2][at];
      slope[i] = memory.coefficients[3][at];
    }
    worker.template walk<kAheadOf<T, kWhole, 2>, true>(
        half, share(half.units, slab, partials.slabs),
        [&](auto at) { return read<Use::kOnce>(at.offset, at.byte(), at.count(), a.dx != nullptr); },
        [&](auto at, const Inputs& in) {
          float v[kGroup];
          if (a.dx) {
#pragma unroll
            for (int i = 0; i < kGroup; ++i) {
              const int own = kLast ? i : 0;
              const float centred = static_cast<float>(in.x.values[i]) - mean[own];
              v[i] = (g(in, i) - offset[own] - centred * slope[own]) * scale[own];
            }
            store<kWhole, Use::kAgain>(static_cast<T*>(a.dx) + at.offset, at.count(), v);
          }
          if (a.dresidual) {
#pragma unroll
            for (int i = 0; i < kGroup; ++i) v[i] = g(in, i);
            store<kWhole, Use::kAgain>(static_cast<T*>(a.dresidual) + at.offset, at.count(), v);
          }
        });
    __syncthreads();  // before the next tile's coefficients
  }

  // Vector gradients of the frozen wing; one block per tile.
  __device__ void finish(int tile) const {
    const Worker<kLast, kWhole> worker(a.shape, tile);
    const Half half(a.shape, 0, a.shape.split);
    const int64_t c = my_channel(worker);
    Pair total = {0, 0};
    if (frozen_sums()) total = merge_slabs<Sums>(memory, worker, half, partials, kFrozenPart);
    if (c < 0) return;
    if (a.phase == Phase::kReduce) {
      a.sums[c] = total.first;
      a.sums[a.shape.channels + c] = total.second;
    }
    if (a.dfrozen_bias) a.dfrozen_bias[c] = total.first;
    if (a.dfrozen_weight)
      a.dfrozen_weight[c] = frozen_sums() ? total.second * reciprocal_root(a.frozen_var[c], a.eps) : 0;
  }
};

template <class T, bool kLast, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(TwinBnBackward a, Partials partials, unsigned steps) {
  __shared__ Memory memory;
  const Backward<T, kLast, kWhole> backward{a, partials, memory};
  const int slabs = partials.slabs, items = Tiling<kLast>(a.shape).tiles * slabs;
  const int first = blockIdx.x, step = gridDim.x;
  cg::grid_group::arrival_token token{};
  if (steps & kReduceStep) {
    if (backward.adaptive_sums())
      for (int item = first; item < items; item += step) backward.template reduce<false>(item / slabs, item % slabs);
    if (steps & kCooperative) token = cg::this_grid().barrier_arrive();
    if (a.shape.split > 0 && (backward.frozen_sums() || backward.images()))
      for (int item = first; item < items; item += step) backward.template reduce<true>(item / slabs, item % slabs);
    if (steps & kCooperative) {
      cg::this_grid().barrier_wait(static_cast<decltype(token)&&>(token));
      token = cg::this_grid().barrier_arrive();  // the frozen sums are written
    }
  }
  if (steps & kApplyStep) {
    for (int item = first; item < items; item += step) {
      backward.combine(item / slabs, item % slabs);
      if (a.phase != Phase::kReduce && a.shape.split < a.shape.images && backward.images())
        backward.adaptive(item / slabs, item % slabs);
    }
    if (steps & kCooperative) cg::this_grid().barrier_wait(static_cast<decltype(token)&&>(token));
    if (backward.reduces())
      for (int item = first; item < items; item += step)
        if (item % slabs == 0) backward.finish(item / slabs);
  }
}

// ---- Launch.

struct Device {
  int multiprocessors = 0;
  bool cooperative = false;
};

cudaError_t current_device(int& index, Device& device) {
  if (cudaError_t error = cudaGetDevice(&index)) return error;
  int cooperative = 0;
  if (cudaError_t error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index))
    return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, index)) return error;
  device.cooperative = cooperative != 0;
  return cudaSuccess;
}

// Blocks of the kernel that a multiprocessor holds at once; asked once per device, since asking takes microseconds.
template <auto kKernel>
cudaError_t resident_blocks(int device, int& blocks) {
  static std::atomic<int> known[kMaxDevices];
  const bool keeps = device < kMaxDevices;
  blocks = keeps ? known[device].load(std::memory_order_relaxed) : 0;
  if (blocks > 0) return cudaSuccess;
  if (cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, kThreads, 0)) return error;
  if (keeps) known[device].store(blocks, std::memory_order_relaxed);
  return cudaSuccess;
}

template <bool kLast>
int most_slabs(const Shape& s) {
  const int slabs = kMaxBlocks / Tiling<kLast>(s).tiles;
  return slabs > 1 ? slabs : 1;
}

// One cooperative launch, or two ordinary ones where the device has none or others hold a part of it.
template <bool kLast, auto kKernel, class Args>
cudaError_t launch(Args args, float* workspace, cudaStream_t stream) {
  const Shape& s = args.shape;
  int index = 0, resident = 0;
  Device device;
  if (cudaError_t error = current_device(index, device)) return error;
  if (cudaError_t error = resident_blocks<kKernel>(index, resident)) return error;
  if (resident < 1) return cudaErrorInvalidConfiguration;
  if (resident > kBlocksPerMultiprocessor) resident = kBlocksPerMultiprocessor;
  const int64_t most_blocks = resident * device.multiprocessors < kMaxBlocks ? resident * device.multiprocessors : kMaxBlocks;

  const Tiling<kLast> tiling(s);
  const Half frozen(s, 0, s.split), adaptive(s, s.split, s.images);
  const int64_t units = frozen.units > adaptive.units ? frozen.units : adaptive.units;
  const int64_t useful = (units + tiling.lanes() * kDepth - 1) / (tiling.lanes() * kDepth);
  int64_t slabs = most_blocks / tiling.tiles;
  slabs = slabs < useful ? slabs : useful;
  if (slabs < 1) slabs = 1;
  const int64_t items = slabs * tiling.tiles;
  const unsigned blocks = static_cast<unsigned>(items < most_blocks ? items : most_blocks);

  Partials partials{workspace, static_cast<int>(slabs), s.channels};
  unsigned steps = kReduceStep | kApplyStep;
  void* arguments[] = {&args, &partials, &steps};
  if (args.phase == Phase::kApply)  // nothing to wait for
    return cudaLaunchKernel(kKernel, dim3(blocks), dim3(kThreads), arguments, 0, stream);
  if (device.cooperative) {
    steps |= kCooperative;
    const cudaError_t error =
        cudaLaunchCooperativeKernel(kKernel, dim3(blocks), dim3(kThreads), arguments, 0, stream);
    if (error != cudaErrorCooperativeLaunchTooLarge) return error;
    cudaGetLastError();  // it is dealt with
  }
  steps = kReduceStep;
  if (cudaError_t error = cudaLaunchKernel(kKernel, dim3(blocks), dim3(kThreads), arguments, 0, stream)) return error;
  steps = kApplyStep;
  return cudaLaunchKernel(kKernel, dim3(blocks), dim3(kThreads), arguments, 0, stream);
}

bool whole_groups(const Shape& s, std::initializer_list<const void*> images) {
  bool whole = s.run() % kGroup == 0;
  for (const void* p : images) whole = whole && reinterpret_cast<uintptr_t>(p) % sizeof(uint4) == 0;
  return whole;
}

bool valid(const Shape& s) {
  constexpr int64_t kMost = int64_t{1} << 31;  // units are counted in 32 bits
  return s.images > 0 && s.channels > 0 && s.pixels > 0 && s.split >= 0 && s.split <= s.images &&
         s.channels < kMost / 2 &&
         s.images * (s.channels_last ? s.pixels : s.bytes_of_bits()) < kMost - int64_t{kThreads} * kDepth;
}

template <class T>
cudaError_t forward(const TwinBnForward& a, float* workspace, cudaStream_t stream) {
  const bool whole = whole_groups(a.shape, {a.x, a.residual, a.y});
  if (a.shape.channels_last)
    return whole ? launch<true, forward_kernel<T, true, true>>(a, workspace, stream)
                 : launch<true, forward_kernel<T, true, false>>(a, workspace, stream);
  return whole ? launch<false, forward_kernel<T, false, true>>(a, workspace, stream)
               : launch<false, forward_kernel<T, false, false>>(a, workspace, stream);
}

template <class T>
cudaError_t backward(const TwinBnBackward& a, float* workspace, cudaStream_t stream) {
  const bool whole = whole_groups(a.shape, {a.dy, a.x, a.dx, a.dresidual});
  if (a.shape.channels_last)
    return whole ? launch<true, backward_kernel<T, true, true>>(a, workspace, stream)
                 : launch<true, backward_kernel<T, true, false>>(a, workspace, stream);
  return whole ? launch<false, backward_kernel<T, false, true>>(a, workspace, stream)
               : launch<false, backward_kernel<T, false, false>>(a, workspace, stream);
}

}  // namespace

int64_t twin_bn_workspace_cuda(int64_t channels, bool channels_last) {
  const Shape s{1, channels, 1, 0, channels_last};
  return 4 * channels * (channels_last ? most_slabs<true>(s) : most_slabs<false>(s));
}

int twin_bn_forward_cuda(const TwinBnForward& args, uintptr_t workspace, uintptr_t stream) {
  if (!valid(args.shape)) return cudaErrorInvalidValue;
  auto* floats = reinterpret_cast<float*>(workspace);
  auto handle = reinterpret_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::kFloat32: return forward<float>(args, floats, handle);
    case DType::kBFloat16: return forward<__nv_bfloat16>(args, floats, handle);
    case DType::kFloat16: return forward<__half>(args, floats, handle);
  }
  return cudaErrorInvalidValue;
}

int twin_bn_backward_cuda(const TwinBnBackward& args, uintptr_t workspace, uintptr_t stream) {
  if (!valid(args.shape)) return cudaErrorInvalidValue;
  auto* floats = reinterpret_cast<float*>(workspace);
  auto handle = reinterpret_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::kFloat32: return backward<float>(args, floats, handle);
    case DType::kBFloat16: return backward<__nv_bfloat16>(args, floats, handle);
    case DType::kFloat16: return backward<__half>(args, floats, handle);
  }
  return cudaErrorInvalidValue;
}

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace twins_fast
