// Sums over the lanes of a block, and over the slabs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/memory.cuh"
#include "cuda/tiling.cuh"

namespace twins_fast {
namespace {

struct Pair {
  float first, second;
};

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

}  // namespace
}  // namespace twins_fast
