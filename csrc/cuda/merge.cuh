// Sums over the lanes of a block, and over the slabs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/memory.cuh"
#include "cuda/tiling.cuh"

namespace twins_fast {
namespace {

constexpr int kMergeWidth = 4;  // channels whose slabs a block merges at once, with the lanes that leaves
constexpr int kMergeLanes = kThreads / kMergeWidth;
constexpr int kMergeAtOnce = 8;  // slabs of a lane whose loads do not wait for each other

// What disjoint sets are summed up to; all zeros is that of no set.
struct Sums {
  static constexpr int kVectors = 2;
  float v[kVectors];

  static __device__ Sums merge(const Sums& a, const Sums& b) { return {{a.v[0] + b.v[0], a.v[1] + b.v[1]}}; }
};

// Count, mean and sum of squared deviations (Chan, Golub and LeVeque, 1979).
struct Moments {
  static constexpr int kVectors = 3;
  float v[kVectors];

  static __device__ Moments merge(const Moments& a, const Moments& b) {
    if (b.v[0] == 0) return a;
    if (a.v[0] == 0) return b;
    const float count = a.v[0] + b.v[0], share = __fdividef(b.v[0], count), delta = b.v[1] - a.v[1];
    return {{count, a.v[1] + delta * share, a.v[2] + b.v[2] + delta * delta * (a.v[0] * share)}};
  }
};

// What a block needs at one time: groups on their way, or sums to merge.
union Memory {
  Ring ring;
  float merging[kGroup][Moments::kVectors][kThreads];
};

// Merges values[i] of all threads whose index is the same modulo `stride` into that of the first of them.
template <class Kind, int kCount>
__device__ void merge_lanes(Memory& memory, int stride, int lanes, Kind (&values)[kCount]) {
  const int me = threadIdx.x, lane = me / stride;
  const auto keep = [&] {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int k = 0; k < Kind::kVectors; ++k) memory.merging[i][k][me] = values[i].v[k];
  };
  __syncthreads();  // the memory may still be read
  keep();
  int half = 1;
  while (2 * half < lanes) half *= 2;
  for (; half > 0; half /= 2) {
    __syncthreads();
    const int other = me + half * stride;
    if (lane >= half || lane + half >= lanes) continue;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      Kind its;
#pragma unroll
      for (int k = 0; k < Kind::kVectors; ++k) its.v[k] = memory.merging[i][k][other];
      values[i] = Kind::merge(values[i], its);
    }
    keep();
  }
  __syncthreads();
}

// Partial results: vectors [slabs, channels], several for each kind of sums.
struct Partials {
  float* values;
  int slabs;
  int64_t channels;

  __device__ float* at(int vector, int slab) const { return values + (vector * int64_t{slabs} + slab) * channels; }

  // Through the second-level cache, since other multiprocessors do not share the first.
  template <class Kind>
  __device__ Kind load(int first, int slab, int64_t c) const {
    Kind kind;
#pragma unroll
    for (int k = 0; k < Kind::kVectors; ++k) kind.v[k] = __ldcg(at(first + k, slab) + c);
    return kind;
  }
  template <class Kind>
  __device__ void store(int first, int slab, int64_t c, const Kind& kind) const {
#pragma unroll
    for (int k = 0; k < Kind::kVectors; ++k) __stcg(at(first + k, slab) + c, kind.v[k]);
  }
};

// Merges the lanes of a block and writes the result as slab `slab`; `more`: with what this block wrote there before.
template <class Kind, bool kLast, bool kWhole, int kCount>
__device__ void write_partials(Memory& memory, const Worker<kLast, kWhole>& worker, Kind (&values)[kCount],
                               const Partials& partials, int first, int slab, bool more) {
  merge_lanes(memory, worker.tiling.groups, worker.lanes, values);
  if (worker.lane > 0 || !worker.active) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (kLast && worker.column * kGroup + i >= worker.shape.channels) break;
    const int64_t c = worker.channel(i);
    if (more) values[i] = Kind::merge(partials.load<Kind>(first, slab, c), values[i]);
    partials.store(first, slab, c, values[i]);
  }
}

// The channel that a thread has the total of after merge_slabs, or -1.
__device__ inline int64_t merged_channel(const Partials& partials, int job) {
  const int64_t c = int64_t{job} * kMergeWidth + threadIdx.x;
  return threadIdx.x < kMergeWidth && c < partials.channels ? c : -1;
}

// Merges all slabs of channels [job * kMergeWidth, (job + 1) * kMergeWidth).
template <class Kind>
__device__ Kind merge_slabs(Memory& memory, const Partials& partials, int first, int job) {
  const int64_t c = int64_t{job} * kMergeWidth + threadIdx.x % kMergeWidth;
  Kind total[1] = {};
#pragma unroll 1
  for (int slab = threadIdx.x / kMergeWidth; slab < partials.slabs; slab += kMergeAtOnce * kMergeLanes) {
    Kind loaded[kMergeAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kMergeAtOnce; ++i)
      if (slab + i * kMergeLanes < partials.slabs && c < partials.channels)
        loaded[i] = partials.load<Kind>(first, slab + i * kMergeLanes, c);
#pragma unroll
    for (int i = 0; i < kMergeAtOnce; ++i) total[0] = Kind::merge(total[0], loaded[i]);
  }
  merge_lanes(memory, kMergeWidth, kMergeLanes, total);
  return total[0];
}

__device__ inline float value_or(const float* vector, int64_t c, float absent) { return vector ? vector[c] : absent; }

__device__ inline float reciprocal_root(float var, double eps) { return 1.f / sqrtf(var + static_cast<float>(eps)); }

}  // namespace
}  // namespace twins_fast
