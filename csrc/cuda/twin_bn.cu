// Two-wing batch norm on CUDA: partial sums of slices -> one combination per channel -> apply.
//
// Every sum has a fixed order, so results are the same from run to run. All arithmetic is float32, in double
// where slices are combined.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernels.h"

namespace twins_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kGroup = 8;           // neighbouring values that one thread applies: one byte of bits
constexpr int64_t kMaxSlices = 512;
constexpr int64_t kSliceDepth = 32;  // values per thread that make a new slice worthwhile
constexpr int kMoments = 3;          // count, mean, squared deviations
constexpr int kSums = 4;             // (g, g * xc) of the frozen, then of the adaptive half
constexpr int kCoefficients = 6;

template <class T>
__device__ float decode(T v) {
  return static_cast<float>(v);
}
template <class T>
__device__ T encode(float v) {
  return static_cast<T>(v);
}

template <class T>
struct alignas(16) Group {
  T values[kGroup];
};

// kWhole: all groups are full and aligned, so that they move as one.
template <bool kWhole, class T>
__device__ void load(const T* p, int count, float (&v)[kGroup]) {
  Group<T> group;
  if (kWhole) group = *reinterpret_cast<const Group<T>*>(p);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) v[i] = kWhole ? decode(group.values[i]) : i < count ? decode(p[i]) : 0.f;
}

template <bool kWhole, class T>
__device__ void store(T* p, int count, const float (&v)[kGroup]) {
  Group<T> group;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (kWhole) group.values[i] = encode<T>(v[i]);
    else if (i < count) p[i] = encode<T>(v[i]);
  }
  if (kWhole) *reinterpret_cast<Group<T>*>(p) = group;
}

// Where the j-th value of channel c lies, among images [first, ...).
struct Place {
  int64_t row, column;

  __device__ Place(const Shape& s, int64_t first, int64_t c, int64_t j)
      : row(s.channels_last ? first * s.pixels + j : (first + j / s.pixels) * s.channels + c),
        column(s.channels_last ? c : j % s.pixels) {}
};

struct Moments {
  double count, mean, m2;

  __device__ void merge(const Moments& other) {  // Chan, Golub and LeVeque, 1979
    if (other.count == 0) return;
    const double n = count + other.count, delta = other.mean - mean;
    mean += delta * (other.count / n);
    m2 += other.m2 + delta * delta * (count * other.count / n);
    count = n;
  }
};

struct Sums {
  double v[kSums];

  __device__ void merge(const Sums& other) {
    for (int k = 0; k < kSums; ++k) v[k] += other.v[k];
  }
};

// Merges the values of the threads with the same threadIdx.x into the one with threadIdx.y == 0.
template <class V>
__device__ V merge_columns(V value) {
  __shared__ V shared[kThreads];
  const int me = threadIdx.y * blockDim.x + threadIdx.x;
  shared[me] = value;
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) shared[me].merge(shared[me + half * blockDim.x]);
  }
  return shared[threadIdx.x];
}

__device__ float value_or(const float* vector, int64_t c, float absent) { return vector ? vector[c] : absent; }

// [slices, channels, kMoments] of the adaptive half. Blocks are (channels, values), see reduction_block().
template <class T>
__global__ void measure(TwinBnForward a, float* partials) {
  const Shape& s = a.shape;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t n = s.adaptive_count(), slice = (n + gridDim.y - 1) / gridDim.y;
  const int64_t begin = blockIdx.y * slice, end = min(begin + slice, n);
  Moments total{0, 0, 0};
  if (c < s.channels && begin + threadIdx.y < end) {
    // One-pass sums about the first value: it is one of the set, so that they stay comparable to the variance.
    float pivot = 0, sum1 = 0, sum2 = 0;
    int64_t count = 0;
    for (int64_t j = begin + threadIdx.y; j < end; j += blockDim.y, ++count) {
      const Place at(s, s.split, c, j);
      const float v = decode(static_cast<const T*>(a.x)[at.row * s.run() + at.column]);
      if (count == 0) pivot = v;
      sum1 += v - pivot;
      sum2 += (v - pivot) * (v - pivot);
    }
    const double m2 = sum2 - static_cast<double>(sum1) * sum1 / count;
    total = {static_cast<double>(count), pivot + static_cast<double>(sum1) / count, m2 < 0 ? 0 : m2};
  }
  total = merge_columns(total);
  if (threadIdx.y == 0 && c < s.channels) {
    float* out = partials + (blockIdx.y * s.channels + c) * kMoments;
    out[0] = total.count, out[1] = total.mean, out[2] = total.m2;
  }
}

// One block per channel: statistics, running statistics, and coefficients (mean, scale, bias) of both wings.
__global__ void combine_forward(TwinBnForward a, const float* partials, int slices, float* coefficients) {
  const Shape& s = a.shape;
  const int64_t c = blockIdx.x;
  Moments total{0, 0, 0};
  for (int i = threadIdx.y; i < slices; i += blockDim.y) {
    const float* p = partials + (i * s.channels + c) * kMoments;
    total.merge({p[0], p[1], p[2]});
  }
  total = merge_columns(total);
  if (threadIdx.y > 0) return;
  float* k = coefficients + c * kCoefficients;
  if (s.split > 0) {
    k[0] = a.frozen_mean[c];
    k[1] = value_or(a.frozen_weight, c, 1) / sqrt(a.frozen_var[c] + a.eps);
    k[2] = value_or(a.frozen_bias, c, 0);
  }
  const double n = static_cast<double>(s.adaptive_count());
  if (n == 0) return;
  const double rstd = 1 / sqrt(total.m2 / n + a.eps);
  k[3] = a.stats[c] = total.mean;
  k[4] = value_or(a.weight, c, 1) * rstd;
  k[5] = value_or(a.bias, c, 0);
  a.stats[s.channels + c] = rstd;
  if (a.running_mean) a.running_mean[c] = (1 - a.momentum) * a.running_mean[c] + a.momentum * total.mean;
  if (a.running_var) a.running_var[c] = (1 - a.momentum) * a.running_var[c] + a.momentum * (total.m2 / (n - 1));
}

// The group of values that this thread applies.
struct Mine {
  int64_t row, column, offset, byte;
  int count;
  bool adaptive;

  __device__ Mine(const Shape& s) {
    byte = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    row = byte / s.bytes_of_bits();
    column = byte % s.bytes_of_bits() * kGroup;
    offset = row * s.run() + column;
    count = row < s.rows() ? static_cast<int>(min(s.run() - column, int64_t{kGroup})) : 0;
    adaptive = row >= s.split * s.rows_per_image();
  }
  __device__ int64_t channel(const Shape& s, int i) const { return s.channels_last ? column + i : row % s.channels; }
};

template <class T, bool kWhole>
__global__ void apply_forward(TwinBnForward a, const float* coefficients) {
  const Shape& s = a.shape;
  const Mine mine(s);
  if (mine.count == 0) return;
  float v[kGroup], residual[kGroup] = {};
  load<kWhole>(static_cast<const T*>(a.x) + mine.offset, mine.count, v);
  if (a.residual) load<kWhole>(static_cast<const T*>(a.residual) + mine.offset, mine.count, residual);
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i >= mine.count) break;
    const float* k = coefficients + mine.channel(s, i) * kCoefficients + (mine.adaptive ? 3 : 0);
    v[i] = (v[i] - k[0]) * k[1] + k[2] + residual[i];
    const bool passes = !(v[i] <= 0);  // a NaN passes, as in torch.relu
    bits |= passes << i;
    if (a.relu && !passes) v[i] = 0;
  }
  if (a.bits) a.bits[mine.byte] = bits;
  store<kWhole>(static_cast<T*>(a.y) + mine.offset, mine.count, v);
}

// [slices, channels, kSums]; blockIdx.z is the wing. The formulas are those of csrc/cpu/twin_bn.cpp.
template <class T>
__global__ void sum(TwinBnBackward a, float* partials) {
  const Shape& s = a.shape;
  const bool adaptive = blockIdx.z == 1;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t n = adaptive ? s.adaptive_count() : s.split * s.pixels, slice = (n + gridDim.y - 1) / gridDim.y;
  const int64_t begin = blockIdx.y * slice, end = min(begin + slice, n);
  float sum_g = 0, sum_gx = 0;
  if (c < s.channels && begin < end) {
    const float mean = adaptive ? a.stats[c] : a.frozen_mean[c];
    for (int64_t j = begin + threadIdx.y; j < end; j += blockDim.y) {
      const Place at(s, adaptive ? s.split : 0, c, j);
      const int64_t offset = at.row * s.run() + at.column;
      const bool passes = !a.bits || a.bits[at.row * s.bytes_of_bits() + at.column / 8] >> at.column % 8 & 1;
      const float g = passes ? decode(static_cast<const T*>(a.dy)[offset]) : 0.f;
      sum_g += g;
      sum_gx += g * (decode(static_cast<const T*>(a.x)[offset]) - mean);
    }
  }
  const Sums total = merge_columns(Sums{{sum_g, sum_gx, 0, 0}});
  if (threadIdx.y == 0 && c < s.channels) {
    float* out = partials + (blockIdx.y * s.channels + c) * kSums + 2 * blockIdx.z;
    out[0] = total.v[0], out[1] = total.v[1];
  }
}

// One block per channel: gradients of the vectors, and coefficients (frozen scale; mean, scale, offset, slope).
__global__ void combine_backward(TwinBnBackward a, const float* partials, int slices, float* coefficients) {
  const Shape& s = a.shape;
  const int64_t c = blockIdx.x;
  Sums total{};
  for (int i = threadIdx.y; i < slices; i += blockDim.y) {
    const float* p = partials + (i * s.channels + c) * kSums;
    total.merge({{p[0], p[1], p[2], p[3]}});
  }
  total = merge_columns(total);
  if (threadIdx.y > 0) return;
  const double frozen_rstd = s.split > 0 ? 1 / sqrt(a.frozen_var[c] + a.eps) : 0;
  const double rstd = a.stats[s.channels + c], n = static_cast<double>(s.adaptive_count());
  if (a.dfrozen_bias) a.dfrozen_bias[c] = total.v[0];
  if (a.dfrozen_weight) a.dfrozen_weight[c] = total.v[1] * frozen_rstd;
  if (a.dbias) a.dbias[c] = total.v[2];
  if (a.dweight) a.dweight[c] = total.v[3] * rstd;
  float* k = coefficients + c * kCoefficients;
  k[0] = value_or(a.frozen_weight, c, 1) * frozen_rstd;
  k[1] = a.stats[c];
  k[2] = value_or(a.weight, c, 1) * rstd;
  k[3] = n > 0 ? total.v[2] / n : 0;
  k[4] = n > 0 ? total.v[3] * rstd * rstd / n : 0;
}

template <class T, bool kWhole>
__global__ void apply_backward(TwinBnBackward a, const float* coefficients) {
  const Shape& s = a.shape;
  const Mine mine(s);
  if (mine.count == 0) return;
  float g[kGroup], dx[kGroup] = {};
  load<kWhole>(static_cast<const T*>(a.dy) + mine.offset, mine.count, g);
  const unsigned bits = a.bits ? a.bits[mine.byte] : 0xff;
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (!(bits >> i & 1)) g[i] = 0;
  if (a.dresidual) store<kWhole>(static_cast<T*>(a.dresidual) + mine.offset, mine.count, g);
  if (!a.dx) return;
  if (mine.adaptive) load<kWhole>(static_cast<const T*>(a.x) + mine.offset, mine.count, dx);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i >= mine.count) break;
    const float* k = coefficients + mine.channel(s, i) * kCoefficients;
    dx[i] = mine.adaptive ? (g[i] - k[3] - (dx[i] - k[1]) * k[4]) * k[2] : g[i] * k[0];
  }
  store<kWhole>(static_cast<T*>(a.dx) + mine.offset, mine.count, dx);
}

// (channels, values): neighbouring threads read neighbouring memory.
dim3 reduction_block(const Shape& s) { return s.channels_last ? dim3(kWarp, kThreads / kWarp) : dim3(1, kThreads); }

dim3 reduction_grid(const Shape& s, int64_t count) {
  const dim3 block = reduction_block(s);
  const int64_t depth = block.y * kSliceDepth;
  const int64_t wanted = (count + depth - 1) / depth;
  const int64_t slices = wanted < 1 ? 1 : wanted < kMaxSlices ? wanted : kMaxSlices;
  return dim3((s.channels + block.x - 1) / block.x, slices);
}

unsigned apply_blocks(const Shape& s) { return (s.rows() * s.bytes_of_bits() + kThreads - 1) / kThreads; }

bool whole_groups(const Shape& s, std::initializer_list<const void*> images) {
  bool whole = s.run() % kGroup == 0;
  for (const void* p : images) whole = whole && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return whole;
}

bool valid(const Shape& s) {
  return s.images > 0 && s.channels > 0 && s.pixels > 0 && s.split >= 0 && s.split <= s.images;
}

template <class T>
cudaError_t forward(const TwinBnForward& a, float* workspace, cudaStream_t stream) {
  const Shape& s = a.shape;
  float* partials = workspace + s.channels * kCoefficients;
  const dim3 grid = reduction_grid(s, s.adaptive_count());
  const int slices = s.adaptive_count() > 0 ? grid.y : 0;
  if (slices > 0) {
    measure<T><<<grid, reduction_block(s), 0, stream>>>(a, partials);
    if (cudaError_t error = cudaGetLastError()) return error;
  }
  combine_forward<<<s.channels, dim3(1, kThreads), 0, stream>>>(a, partials, slices, workspace);
  if (cudaError_t error = cudaGetLastError()) return error;
  if (whole_groups(s, {a.x, a.residual, a.y}))
    apply_forward<T, true><<<apply_blocks(s), kThreads, 0, stream>>>(a, workspace);
  else
    apply_forward<T, false><<<apply_blocks(s), kThreads, 0, stream>>>(a, workspace);
  return cudaGetLastError();
}

template <class T>
cudaError_t backward(const TwinBnBackward& a, float* workspace, cudaStream_t stream) {
  const Shape& s = a.shape;
  float* partials = workspace + s.channels * kCoefficients;
  const int64_t frozen_count = s.split * s.pixels;
  dim3 grid = reduction_grid(s, s.adaptive_count() > frozen_count ? s.adaptive_count() : frozen_count);
  grid.z = 2;
  sum<T><<<grid, reduction_block(s), 0, stream>>>(a, partials);
  if (cudaError_t error = cudaGetLastError()) return error;
  combine_backward<<<s.channels, dim3(1, kThreads), 0, stream>>>(a, partials, grid.y, workspace);
  if (cudaError_t error = cudaGetLastError()) return error;
  if (!a.dx && !a.dresidual) return cudaSuccess;
  if (whole_groups(s, {a.dy, a.x, a.dx, a.dresidual}))
    apply_backward<T, true><<<apply_blocks(s), kThreads, 0, stream>>>(a, workspace);
  else
    apply_backward<T, false><<<apply_blocks(s), kThreads, 0, stream>>>(a, workspace);
  return cudaGetLastError();
}

}  // namespace

int64_t twin_bn_workspace_cuda(int64_t channels) { return channels * (kCoefficients + kMaxSlices * kSums); }

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
