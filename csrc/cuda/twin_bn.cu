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

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/merge.cuh"
#include "cuda/tiling.cuh"

namespace twins_fast {
namespace {

namespace cg = cooperative_groups;

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
