// Two-wing batch norm on CUDA, one cooperative launch per direction.
//
// The work of the frozen half, which waits for nothing, hides the reduction over the adaptive half:
//   partial sums of my adaptive rows -> arrive at the grid barrier -> the first half of my frozen rows -> wait
//   -> merge the partial sums of a few channels -> arrive -> the other half of my frozen rows -> wait
//   -> my adaptive rows, newest in the cache first.
// Without cooperative launch the same steps run as three launches, cut at the barriers.
//
// Where both halves are adaptive nothing is frozen, and each step but those of the frozen half is taken for both: first
// the second half, and at the end the first one, which is newer in the cache.
//
// The adaptive half is read twice. Of what is read first, the last part of every slab, as much as the second-level
// cache can hold, is loaded as usual and all else to be evicted first; so are results stored until that part has been
// read again.
//
// Every sum has a fixed order, so that results are the same from run to run on one kind of device. Arithmetic is
// float32, and double for the few values of a channel at the end. The formulas are those of csrc/cpu/twin_bn.cpp.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/merge.cuh"
#include "cuda/tiling.cuh"

namespace twins_fast {
namespace {

namespace cg = cooperative_groups;

// One barrier after the other, of all blocks of a cooperative launch; nothing in an ordinary one.
struct Barrier {
  const bool real;
  cg::grid_group::arrival_token token{};

  __device__ void arrive() {
    if (real) token = cg::this_grid().barrier_arrive();
  }
  __device__ void wait() {
    if (real) cg::this_grid().barrier_wait(static_cast<decltype(token)&&>(token));
  }
};

// visit(tile, slab, last) of this block's items; last: there is no other.
template <bool kLast, class Visit>
__device__ __forceinline__ void each_item(const Shape& shape, const Plan& plan, Visit&& visit) {
  const int slabs = plan.partials.slabs, items = Tiling<kLast>(shape).tiles * slabs, step = gridDim.x;
#pragma unroll 1
  for (int item = blockIdx.x; item < items; item += step) visit(item / slabs, item % slabs, item + step >= items);
}

// visit(job) of this block's share of the channels, kMergeWidth to a job.
template <class Visit>
__device__ __forceinline__ void each_merge(const Shape& shape, Visit&& visit) {
  const int jobs = static_cast<int>((shape.channels + kMergeWidth - 1) / kMergeWidth), step = gridDim.x;
#pragma unroll 1
  for (int job = blockIdx.x; job < jobs; job += step) visit(job);
}

// visit(second) of the adaptive halves. backwards: the second half last.
template <bool kBoth, class Visit>
__device__ __forceinline__ void each_adaptive_half(bool backwards, Visit&& visit) {
  if constexpr (kBoth) {
#pragma unroll 1
    for (int i = 0; i < 2; ++i) visit((i == 1) == backwards);
  } else {
    visit(true);
  }
}

// One of the two parts in which a slab of the frozen half is visited.
__device__ __forceinline__ Range part_of(Range slab, int part) {
  const int middle = slab.begin + slab.size() / 2;
  return part == 0 ? Range{slab.begin, middle} : Range{middle, slab.end};
}

template <class T, bool kLast, bool kWhole>
struct Forward {
  static constexpr int kOwn = Tiling<kLast>::kOwn;
  const TwinBnForward& a;
  const Plan& plan;
  Memory& memory;
  const Eviction normal = evict_normal(), first = evict_first();

  __device__ Half half(bool second) const { return {a.shape, second, plan.partials.slabs}; }
  __device__ float* stats(bool second) const { return a.stats + (second ? 0 : 2 * a.shape.channels); }
  static __device__ int partials(bool second) { return second ? 0 : Moments::kVectors; }

  __device__ void measure(int tile, int slab, bool second) const {
    const Worker<kLast, kWhole> worker(a.shape, tile);
    const Half adaptive = half(second);
    const Range range = adaptive.slab(slab);
    // One-pass sums about my first value, or the mean of my first group: they stay comparable to the variance.
    float pivot[kOwn] = {}, sum[kOwn] = {}, squares[kOwn] = {};
    int count = 0;
    Flight<T, kWhole, 1> flight(memory.ring);
    const T* values = static_cast<const T*>(a.x);
    worker.template walk<false>(
        flight, adaptive, range,
        [&](int slot, auto at, int left) {
          const Eviction eviction = left <= plan.kept ? normal : first;
          flight.fetch(slot, 0, values + at.offset, at.count(), eviction);
        },
        [&](int slot, auto at, int) {
          float x[kGroup];
          flight.take(slot, 0, values + at.offset, x);
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            if (!kLast && !kWhole && i >= at.count()) break;
            const float d = x[i] - pivot[kLast ? i : 0];
            sum[kLast ? i : 0] += d;
            squares[kLast ? i : 0] += d * d;
          }
          count += kLast ? 1 : at.count();
        },
        [&](int slot, auto at) {
          float x[kGroup];
          flight.take(slot, 0, values + at.offset, x);
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            if constexpr (kLast) pivot[i] = x[i];
            else if (kWhole || i < at.count()) pivot[0] += x[i];
          }
          if constexpr (!kLast) pivot[0] /= at.count();
        });
    Moments moments[kOwn];
    const float inverse = count > 0 ? 1.f / count : 0.f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float deviations = squares[i] - sum[i] * sum[i] * inverse;
      moments[i] = {{static_cast<float>(count), pivot[i] + sum[i] * inverse, deviations < 0 ? 0 : deviations}};
    }
    write_partials(memory, worker, moments, plan.partials, partials(second), slab, false);
  }

  // Statistics of the job's channels.
  __device__ void merge(int job, bool second) const {
    const int64_t c = merged_channel(plan.partials, job), channels = a.shape.channels;
    const double n = static_cast<double>(a.shape.images_of(second) * a.shape.pixels);
    Moments total{};
    if (n > 0) total = merge_slabs<Moments>(memory, plan.partials, partials(second), job);
    if (c < 0) return;
    const float mean = total.v[1], deviations = total.v[2];
    const bool finishes = a.phase == Phase::kAll && n > 0;
    float *stats = this->stats(second), *running_mean = second ? a.running_mean : a.frozen_mean,
          *running_var = second ? a.running_var : a.frozen_var;
    stats[c] = mean;
    stats[channels + c] = finishes ? static_cast<float>(1 / sqrt(deviations / n + a.eps)) : deviations;
    if (!finishes) return;
    if (running_mean) update(running_mean[c], mean);
    if (running_var) update(running_var[c], deviations / (n - 1));
  }

  __device__ void update(float& running, double value) const {
    running = static_cast<float>((1 - a.momentum) * running + a.momentum * value);
  }

  __device__ void frozen(int tile, int slab, int part) const {
    const Worker<kLast, kWhole> worker(a.shape, tile);
    float mean[kOwn], scale[kOwn], bias[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t c = worker.channel(i);
      mean[i] = a.frozen_mean[c];
      scale[i] = value_or(a.frozen_weight, c, 1) * reciprocal_root(a.frozen_var[c], a.eps);
      bias[i] = value_or(a.frozen_bias, c, 0);
    }
    const Half frozen = half(false);
    normalise<false>(worker, frozen, part_of(frozen.slab(slab), part), mean, scale, bias, 0);
  }

  __device__ void adaptive(int tile, int slab, bool last, bool second) const {
    const Worker<kLast, kWhole> worker(a.shape, tile);
    const float *stats = this->stats(second), *weight = second ? a.weight : a.frozen_weight,
                *shift = second ? a.bias : a.frozen_bias;
    float mean[kOwn], scale[kOwn], bias[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {  // statistics may be new: not through the first-level cache
      const int64_t c = worker.channel(i);
      mean[i] = __ldcg(stats + c);
      scale[i] = value_or(weight, c, 1) * __ldcg(stats + a.shape.channels + c);
      bias[i] = value_or(shift, c, 0);
    }
    const Half adaptive = half(second);
    const Range range = adaptive.slab(slab);
    normalise<true>(worker, adaptive, range, mean, scale, bias, last ? range.size() - plan.kept : 0);
  }

  // plain: units left of the walk when results begin to be stored as usual.
  template <bool kBackwards>
  __device__ void normalise(const Worker<kLast, kWhole>& worker, const Half& half, Range range,
                            const float (&mean)[kOwn], const float (&scale)[kOwn], const float (&bias)[kOwn],
                            int plain) const {
    if (a.residual) normalise<kBackwards, true>(worker, half, range, mean, scale, bias, plain);
    else normalise<kBackwards, false>(worker, half, range, mean, scale, bias, plain);
  }

  // y = relu((x - mean) * scale + bias + residual); x - mean first, since it is exact where they are close.
  template <bool kBackwards, bool kResidual>
  __device__ void normalise(const Worker<kLast, kWhole>& worker, const Half& half, Range range,
                            const float (&mean)[kOwn], const float (&scale)[kOwn], const float (&bias)[kOwn],
                            int plain) const {
    Flight<T, kWhole, kResidual ? 2 : 1> flight(memory.ring);
    const T *x = static_cast<const T*>(a.x), *others = static_cast<const T*>(a.residual);
    worker.template walk<kBackwards>(
        flight, half, range,
        [&](int slot, auto at, int) {
          flight.fetch(slot, 0, x + at.offset, at.count(), first);
          if (kResidual) flight.fetch(slot, 1, others + at.offset, at.count(), first);
        },
        [&](int slot, auto at, int left) {
          const Eviction eviction = left > plain ? first : normal;
          float v[kGroup], residual[kGroup];
          unsigned bits = 0;
          flight.take(slot, 0, x + at.offset, v);
          if (kResidual) flight.take(slot, 1, others + at.offset, residual);
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            const int own = kLast ? i : 0;
            v[i] = (v[i] - mean[own]) * scale[own] + bias[own];
            if (kResidual) v[i] += residual[i];
            const bool passes = !(v[i] <= 0);  // a NaN passes, as in torch.relu
            if ((kWhole || i < at.count()) && passes) bits |= 1u << i;
            if (a.relu && !passes) v[i] = 0;
          }
          if (a.bits) store_hinted(a.bits + at.byte(), static_cast<uint8_t>(bits), eviction);
          store<kWhole>(static_cast<T*>(a.y) + at.offset, at.count(), v, eviction);
        });
  }
};

template <class T, bool kLast, bool kWhole, bool kBoth>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    forward_kernel(TwinBnForward a, Plan plan, unsigned steps) {
  __shared__ Memory memory;
  const Forward<T, kLast, kWhole> forward{a, plan, memory};
  const bool adaptive = kBoth || a.shape.split < a.shape.images;
  const bool frozen = !kBoth && a.phase != Phase::kReduce && a.shape.split > 0;
  Barrier barrier{(steps & kCooperative) != 0};
  if (steps & kReduceStep) {
    if (a.phase != Phase::kApply && adaptive)
      each_adaptive_half<kBoth>(false, [&](bool second) {
        each_item<kLast>(a.shape, plan, [&](int tile, int slab, bool) { forward.measure(tile, slab, second); });
      });
    barrier.arrive();
    if (frozen) each_item<kLast>(a.shape, plan, [&](int tile, int slab, bool) { forward.frozen(tile, slab, 0); });
    barrier.wait();
  }
  if (steps & kMergeStep) {
    if (a.phase != Phase::kApply)
      each_adaptive_half<kBoth>(false,
                         [&](bool second) { each_merge(a.shape, [&](int job) { forward.merge(job, second); }); });
    barrier.arrive();
    if (frozen) each_item<kLast>(a.shape, plan, [&](int tile, int slab, bool) { forward.frozen(tile, slab, 1); });
    barrier.wait();
  }
  if ((steps & kApplyStep) && a.phase != Phase::kReduce && adaptive)
    each_adaptive_half<kBoth>(true, [&](bool second) {
      each_item<kLast>(a.shape, plan, [&](int tile, int slab, bool last) {
        forward.adaptive(tile, slab, last && second, second);
      });
    });
}

template <class T, bool kLast, bool kWhole>
struct Backward {
  static constexpr int kOwn = Tiling<kLast>::kOwn;
  enum { kAdaptiveSums = 0, kFrozenSums = Sums::kVectors };  // vectors of the partial results
  const TwinBnBackward& a;
  const Plan& plan;
  Memory& memory;
  const Eviction normal = evict_normal(), first = evict_first();

  __device__ bool reduces() const { return a.phase != Phase::kApply; }
  __device__ bool frozen_sums() const {
    return reduces() && a.shape.split > 0 && (a.phase == Phase::kReduce || a.dfrozen_weight || a.dfrozen_bias);
  }
  __device__ bool adaptive_sums(bool second) const {
    return reduces() && a.shape.images_of(second) > 0 &&
           (a.phase == Phase::kReduce || a.dx || (second ? a.dweight || a.dbias : a.dfrozen_weight || a.dfrozen_bias));
  }
  __device__ bool images() const { return a.dx || a.dresidual; }
  __device__ Half half(bool second) const { return {a.shape, second, plan.partials.slabs}; }
  __device__ const float* stats(bool second) const { return a.stats + (second ? 0 : 2 * a.shape.channels); }

  // dy, x and the bits of the ReLU, by a place's slot.
  struct Inputs {
    Flight<T, kWhole, 2> flight;
    const T *dy, *x;
    const uint8_t* bits;

    template <class Place>
    __device__ __forceinline__ void fetch(int slot, Place at, bool with_x, Eviction eviction) {
      flight.fetch(slot, 0, dy + at.offset, at.count(), eviction);
      if (with_x) flight.fetch(slot, 1, x + at.offset, at.count(), eviction);
      if (bits) flight.fetch_bits(slot, bits + at.byte(), eviction);
    }

    // dy where the ReLU passed.
    template <class Place>
    __device__ __forceinline__ void take_gradient(int slot, Place at, float (&g)[kGroup]) {
      flight.take(slot, 0, dy + at.offset, g);
      const unsigned passed = bits ? flight.take_bits(slot, bits + at.byte()) : ~0u;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) g[i] = passed >> i & 1 ? g[i] : 0.f;
    }

    template <class Place>
    __device__ __forceinline__ void take_x(int slot, Place at, float (&v)[kGroup]) {
      flight.take(slot, 1, x + at.offset, v);
    }
  };

  __device__ Inputs inputs_of() const {
    return {Flight<T, kWhole, 2>(memory.ring), static_cast<const T*>(a.dy), static_cast<const T*>(a.x), a.bits};
  }

  // Sums of g and g * (x - mean) of a range of one half, and the results of the frozen one.
  template <bool kFrozen>
  __device__ void reduce(int tile, int slab, int part, bool second) const {
    const Worker<kLast, kWhole> worker(a.shape, tile);
    const Half half = this->half(second);
    const Range range = kFrozen ? part_of(half.slab(slab), part) : half.slab(slab);
    const bool sums = kFrozen ? frozen_sums() : true;
    float mean[kOwn], scale[kOwn];
    Sums total[kOwn] = {};
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t c = worker.channel(i);
      mean[i] = sums ? (kFrozen ? a.frozen_mean : stats(second))[c] : 0;
      if (kFrozen && a.dx) scale[i] = value_or(a.frozen_weight, c, 1) * reciprocal_root(a.frozen_var[c], a.eps);
    }
    Inputs inputs = inputs_of();
    worker.template walk<false>(
        inputs.flight, half, range,
        [&](int slot, auto at, int left) {
          inputs.fetch(slot, at, sums, !kFrozen && left <= plan.kept ? normal : first);
        },
        [&](int slot, auto at, int) {
          float g[kGroup];
          inputs.take_gradient(slot, at, g);
          if (sums) {
            float x[kGroup];
            inputs.take_x(slot, at, x);
#pragma unroll
            for (int i = 0; i < kGroup; ++i) {
              const int own = kLast ? i : 0;
              if (!kWhole && i >= at.count()) break;
              total[own].v[0] += g[i];
              total[own].v[1] += g[i] * (x[i] - mean[own]);
            }
          }
          if (!kFrozen) return;
          if (a.dresidual) store<kWhole>(static_cast<T*>(a.dresidual) + at.offset, at.count(), g, first);
          if (a.dx) {
#pragma unroll
            for (int i = 0; i < kGroup; ++i) g[i] *= scale[kLast ? i : 0];
            store<kWhole>(static_cast<T*>(a.dx) + at.offset, at.count(), g, first);
          }
        });
    if (sums)
      write_partials(memory, worker, total, plan.partials, second ? kAdaptiveSums : kFrozenSums, slab, part > 0);
  }

  // Vector gradients of an adaptive wing, and what dx needs.
  __device__ void merge(int job, bool second) const {
    const int64_t c = merged_channel(plan.partials, job), channels = a.shape.channels;
    Sums total{};
    if (adaptive_sums(second))
      total = merge_slabs<Sums>(memory, plan.partials, second ? kAdaptiveSums : kFrozenSums, job);
    if (c < 0) return;
    const float n = static_cast<float>(a.shape.images_of(second) * a.shape.pixels);
    if (a.phase == Phase::kReduce) {
      a.sums[2 * channels + c] = total.v[0];
      a.sums[3 * channels + c] = total.v[1];
      return;
    }
    float *means = means_of(second), *dweight = second ? a.dweight : a.dfrozen_weight,
          *dbias = second ? a.dbias : a.dfrozen_bias;
    means[c] = total.v[0] / n;
    means[channels + c] = total.v[1] / n;
    if (dbias) dbias[c] = total.v[0];
    if (dweight) dweight[c] = total.v[1] * stats(second)[channels + c];
  }

  __device__ float* means_of(bool second) const { return plan.means + (second ? 0 : 2 * a.shape.channels); }

  __device__ void adaptive(int tile, int slab, bool last, bool second) const {
    const Worker<kLast, kWhole> worker(a.shape, tile);
    const float *means = reduces() ? means_of(second) : a.sums, *stats = this->stats(second),
                *weight = second ? a.weight : a.frozen_weight;
    float mean[kOwn], scale[kOwn], offset[kOwn], slope[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t c = worker.channel(i);
      if (!a.dx) break;
      const float rstd = stats[a.shape.channels + c];
      mean[i] = stats[c];
      scale[i] = value_or(weight, c, 1) * rstd;
      offset[i] = __ldcg(means + c);
      slope[i] = __ldcg(means + a.shape.channels + c) * rstd * rstd;
    }
    const Half half = this->half(second);
    const Range range = half.slab(slab);
    const int plain = last ? range.size() - plan.kept : 0;
    Inputs inputs = inputs_of();
    worker.template walk<true>(
        inputs.flight, half, range,
        [&](int slot, auto at, int) { inputs.fetch(slot, at, a.dx != nullptr, first); },
        [&](int slot, auto at, int left) {
          const Eviction eviction = left > plain ? first : normal;
          float g[kGroup];
          inputs.take_gradient(slot, at, g);
          if (a.dresidual) store<kWhole>(static_cast<T*>(a.dresidual) + at.offset, at.count(), g, eviction);
          if (!a.dx) return;
          float x[kGroup];
          inputs.take_x(slot, at, x);
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            const int own = kLast ? i : 0;
            g[i] = (g[i] - offset[own] - (x[i] - mean[own]) * slope[own]) * scale[own];
          }
          store<kWhole>(static_cast<T*>(a.dx) + at.offset, at.count(), g, eviction);
        });
  }

  // Vector gradients of the frozen wing.
  __device__ void finish(int job) const {
    const int64_t c = merged_channel(plan.partials, job);
    Sums total{};
    if (frozen_sums()) total = merge_slabs<Sums>(memory, plan.partials, kFrozenSums, job);
    if (c < 0) return;
    if (a.phase == Phase::kReduce) {
      a.sums[c] = total.v[0];
      a.sums[a.shape.channels + c] = total.v[1];
    }
    if (a.dfrozen_bias) a.dfrozen_bias[c] = total.v[0];
    if (a.dfrozen_weight)
      a.dfrozen_weight[c] = frozen_sums() ? total.v[1] * reciprocal_root(a.frozen_var[c], a.eps) : 0;
  }
};

template <class T, bool kLast, bool kWhole, bool kBoth>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    backward_kernel(TwinBnBackward a, Plan plan, unsigned steps) {
  __shared__ Memory memory;
  const Backward<T, kLast, kWhole> backward{a, plan, memory};
  const bool frozen = !kBoth && a.shape.split > 0 && (backward.frozen_sums() || backward.images());
  const auto frozen_part = [&](int part) {
    if (!frozen) return;
    each_item<kLast>(a.shape, plan,
                     [&](int tile, int slab, bool) { backward.template reduce<true>(tile, slab, part, false); });
  };
  Barrier barrier{(steps & kCooperative) != 0};
  if (steps & kReduceStep) {
    each_adaptive_half<kBoth>(false, [&](bool second) {
      if (backward.adaptive_sums(second))
        each_item<kLast>(a.shape, plan,
                         [&](int tile, int slab, bool) { backward.template reduce<false>(tile, slab, 0, second); });
    });
    barrier.arrive();
    frozen_part(0);
    barrier.wait();
  }
  if (steps & kMergeStep) {
    if (backward.reduces())
      each_adaptive_half<kBoth>(false,
                         [&](bool second) { each_merge(a.shape, [&](int job) { backward.merge(job, second); }); });
    barrier.arrive();
    frozen_part(1);
    barrier.wait();
    barrier.arrive();  // the frozen sums are written
  }
  if (steps & kApplyStep) {
    if (a.phase != Phase::kReduce && (kBoth || a.shape.split < a.shape.images) && backward.images())
      each_adaptive_half<kBoth>(true, [&](bool second) {
        each_item<kLast>(a.shape, plan, [&](int tile, int slab, bool last) {
          backward.adaptive(tile, slab, last && second, second);
        });
      });
    barrier.wait();
    if (!kBoth && backward.reduces()) each_merge(a.shape, [&](int job) { backward.finish(job); });
  }
}

template <class T, bool kBoth>
cudaError_t forward(const TwinBnForward& a, const Where& where) {
  const double again = sizeof(T);  // bytes of a value that are read a second time
  const bool whole = whole_groups(a.shape, {a.x, a.residual, a.y});
  if (a.shape.channels_last)
    return whole ? launch<true, forward_kernel<T, true, true, kBoth>>(a, again, where)
                 : launch<true, forward_kernel<T, true, false, kBoth>>(a, again, where);
  return whole ? launch<false, forward_kernel<T, false, true, kBoth>>(a, again, where)
               : launch<false, forward_kernel<T, false, false, kBoth>>(a, again, where);
}

template <class T, bool kBoth>
cudaError_t backward(const TwinBnBackward& a, const Where& where) {
  const double again = 2 * sizeof(T) + (a.bits ? 1. / 8 : 0);
  const bool whole = whole_groups(a.shape, {a.dy, a.x, a.dx, a.dresidual});
  if (a.shape.channels_last)
    return whole ? launch<true, backward_kernel<T, true, true, kBoth>>(a, again, where)
                 : launch<true, backward_kernel<T, true, false, kBoth>>(a, again, where);
  return whole ? launch<false, backward_kernel<T, false, true, kBoth>>(a, again, where)
               : launch<false, backward_kernel<T, false, false, kBoth>>(a, again, where);
}

// Kernels of their own, so that registers for the other half are spent where it is adaptive, too.
template <class T>
cudaError_t forward_of(const TwinBnForward& a, const Where& where) {
  return a.both_adaptive ? forward<T, true>(a, where) : forward<T, false>(a, where);
}

template <class T>
cudaError_t backward_of(const TwinBnBackward& a, const Where& where) {
  return a.both_adaptive ? backward<T, true>(a, where) : backward<T, false>(a, where);
}

}  // namespace

int64_t twin_bn_workspace_cuda(int64_t channels, bool channels_last) {
  const Shape s{1, channels, 1, 0, channels_last};
  return workspace_floats(channels, channels_last ? most_slabs<true>(s) : most_slabs<false>(s));
}

int twin_bn_forward_cuda(const TwinBnForward& args, uintptr_t workspace, bool cooperative, uintptr_t stream) {
  if (!valid(args.shape)) return cudaErrorInvalidValue;
  const Where where{reinterpret_cast<float*>(workspace), cooperative, reinterpret_cast<cudaStream_t>(stream)};
  switch (args.dtype) {
    case DType::kFloat32: return forward_of<float>(args, where);
    case DType::kBFloat16: return forward_of<__nv_bfloat16>(args, where);
    case DType::kFloat16: return forward_of<__half>(args, where);
  }
  return cudaErrorInvalidValue;
}

int twin_bn_backward_cuda(const TwinBnBackward& args, uintptr_t workspace, bool cooperative, uintptr_t stream) {
  if (!valid(args.shape)) return cudaErrorInvalidValue;
  const Where where{reinterpret_cast<float*>(workspace), cooperative, reinterpret_cast<cudaStream_t>(stream)};
  switch (args.dtype) {
    case DType::kFloat32: return backward_of<float>(args, where);
    case DType::kBFloat16: return backward_of<__nv_bfloat16>(args, where);
    case DType::kFloat16: return backward_of<__half>(args, where);
  }
  return cudaErrorInvalidValue;
}

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace twins_fast
