// The part of CUDA's language and runtime that csrc/cuda uses, for a plain C++ compiler.
#pragma once

#include <math.h>

#include <cmath>
#include <tuple>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local

#define threadIdx (::cuda_emulator::here->running->thread)
#define blockIdx (::cuda_emulator::here->index)
#define blockDim (::cuda_emulator::here->grid.threads)
#define gridDim (::cuda_emulator::here->grid.blocks)
constexpr int warpSize = 32;

// Vector types: aligned to their size.
#define CUDA_EMULATOR_VECTOR(name, type)                                                              \
  struct alignas(2 * sizeof(type)) name##2 {                                                          \
    type x, y;                                                                                        \
  };                                                                                                  \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }
#define CUDA_EMULATOR_VECTORS(name, type)                                                             \
  CUDA_EMULATOR_VECTOR(name, type)                                                                    \
  struct alignas(4 * sizeof(type)) name##4 {                                                          \
    type x, y, z, w;                                                                                  \
  };                                                                                                  \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_EMULATOR_VECTORS(uchar, unsigned char)
CUDA_EMULATOR_VECTORS(short, short)
CUDA_EMULATOR_VECTORS(ushort, unsigned short)
CUDA_EMULATOR_VECTORS(int, int)
CUDA_EMULATOR_VECTORS(uint, unsigned)
CUDA_EMULATOR_VECTORS(float, float)
CUDA_EMULATOR_VECTOR(double, double)
CUDA_EMULATOR_VECTOR(longlong, long long)
CUDA_EMULATOR_VECTOR(ulonglong, unsigned long long)
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

#pragma GCC visibility push(hidden)

// The same overloads as in CUDA, so that what is ambiguous there is so here.
#define CUDA_EMULATOR_MIN_MAX(result, a, b)                                                           \
  inline result min(a x, b y) { return static_cast<result>(x) < static_cast<result>(y) ? x : y; }     \
  inline result max(a x, b y) { return static_cast<result>(x) > static_cast<result>(y) ? x : y; }
#define CUDA_EMULATOR_MIN_MAX_INTEGER(type)                                                           \
  CUDA_EMULATOR_MIN_MAX(type, type, type)                                                             \
  CUDA_EMULATOR_MIN_MAX(unsigned type, unsigned type, unsigned type)                                  \
  CUDA_EMULATOR_MIN_MAX(unsigned type, type, unsigned type)                                           \
  CUDA_EMULATOR_MIN_MAX(unsigned type, unsigned type, type)
CUDA_EMULATOR_MIN_MAX_INTEGER(int)
CUDA_EMULATOR_MIN_MAX_INTEGER(long)
CUDA_EMULATOR_MIN_MAX_INTEGER(long long)
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
inline double min(float a, double b) { return std::fmin(a, b); }
inline double max(float a, double b) { return std::fmax(a, b); }
inline double min(double a, float b) { return std::fmin(a, b); }
inline double max(double a, float b) { return std::fmax(a, b); }

inline float rsqrt(float v) { return static_cast<float>(1 / std::sqrt(static_cast<double>(v))); }
inline double rsqrt(double v) { return 1 / std::sqrt(v); }
inline float rsqrtf(float v) { return rsqrt(v); }
inline float __frsqrt_rn(float v) { return rsqrt(v); }
inline float __fsqrt_rn(float v) { return std::sqrt(v); }
inline float __frcp_rn(float v) { return 1 / v; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }

namespace cuda_emulator {

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) >= sizeof(From) || sizeof(From) == 8);
  To to{};
  std::memcpy(&to, &from, std::min(sizeof to, sizeof from));
  return to;
}

// What one instruction moves. The 16-bit floats add themselves.
template <class T>
struct Movable : std::bool_constant<std::is_arithmetic_v<T> && !std::is_same_v<T, bool>> {};
#define CUDA_EMULATOR_MOVABLE(type) \
  template <>                       \
  struct Movable<type> : std::true_type {};
CUDA_EMULATOR_MOVABLE(uchar2)
CUDA_EMULATOR_MOVABLE(uchar4)
CUDA_EMULATOR_MOVABLE(short2)
CUDA_EMULATOR_MOVABLE(short4)
CUDA_EMULATOR_MOVABLE(ushort2)
CUDA_EMULATOR_MOVABLE(ushort4)
CUDA_EMULATOR_MOVABLE(int2)
CUDA_EMULATOR_MOVABLE(int4)
CUDA_EMULATOR_MOVABLE(uint2)
CUDA_EMULATOR_MOVABLE(uint4)
CUDA_EMULATOR_MOVABLE(float2)
CUDA_EMULATOR_MOVABLE(float4)
CUDA_EMULATOR_MOVABLE(double2)
CUDA_EMULATOR_MOVABLE(longlong2)
CUDA_EMULATOR_MOVABLE(ulonglong2)

template <class T>
T load(const T* p, Eviction eviction = Eviction::kNormal) {
  static_assert(Movable<T>::value, "CUDA has no such load");
  check_aligned(p, sizeof(T));
  count(p, sizeof(T), false, eviction);
  return *p;
}
template <class T>
void store(T* p, T value, Eviction eviction = Eviction::kNormal) {
  static_assert(Movable<T>::value, "CUDA has no such store");
  check_aligned(p, sizeof(T));
  count(p, sizeof(T), true, eviction);
  *p = value;
}
template <class T>
using Same = std::common_type_t<T>;  // not deduced: converts, as CUDA's overloads do

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
  static_assert(Movable<T>::value && sizeof(T) <= 8, "CUDA has no such shuffle");
  return same_bits<T>(here->warp_operation(At::kShuffle, mask, same_bits<uint64_t>(value), source));
}

inline unsigned segment(int width) {
  if (width < 1 || width > 32 || (width & (width - 1))) fail("a shuffle's width must be a power of two up to 32");
  return here->lane() & ~static_cast<unsigned>(width - 1);
}

template <class T>
T add(T* p, T value) {
  T old, sum;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do sum = old + value;
  while (!__atomic_compare_exchange(p, &old, &sum, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace cuda_emulator

inline unsigned __float_as_uint(float v) { return cuda_emulator::same_bits<unsigned>(v); }
inline int __float_as_int(float v) { return cuda_emulator::same_bits<int>(v); }
inline float __uint_as_float(unsigned v) { return cuda_emulator::same_bits<float>(v); }
inline float __int_as_float(int v) { return cuda_emulator::same_bits<float>(v); }

#define CUDA_EMULATOR_LOAD(name, ...)                           \
  template <class T>                                            \
  T name(const T* p) {                                          \
    return cuda_emulator::load(p, ##__VA_ARGS__);               \
  }
#define CUDA_EMULATOR_STORE(name, ...)                          \
  template <class T>                                            \
  void name(T* p, cuda_emulator::Same<T> value) {               \
    cuda_emulator::store(p, value, ##__VA_ARGS__);              \
  }
CUDA_EMULATOR_LOAD(__ldg)
CUDA_EMULATOR_LOAD(__ldcg)
CUDA_EMULATOR_LOAD(__ldca)
CUDA_EMULATOR_LOAD(__ldcs, cuda_emulator::Eviction::kFirst)
CUDA_EMULATOR_LOAD(__ldlu)
CUDA_EMULATOR_LOAD(__ldcv)
CUDA_EMULATOR_STORE(__stwb)
CUDA_EMULATOR_STORE(__stcg)
CUDA_EMULATOR_STORE(__stcs, cuda_emulator::Eviction::kFirst)
CUDA_EMULATOR_STORE(__stwt)

inline int atomicAdd(int* p, int value) { return cuda_emulator::add(p, value); }
inline unsigned atomicAdd(unsigned* p, unsigned value) { return cuda_emulator::add(p, value); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) { return cuda_emulator::add(p, v); }
inline float atomicAdd(float* p, float value) { return cuda_emulator::add(p, value); }
inline double atomicAdd(double* p, double value) { return cuda_emulator::add(p, value); }

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __threadfence(); }
inline void __syncthreads(int line = __builtin_LINE()) {
  cuda_emulator::here->stop(cuda_emulator::At::kBlockBarrier, line);
}

inline void __syncwarp(unsigned mask = 0xffffffff) {
  cuda_emulator::here->warp_operation(cuda_emulator::At::kWarpBarrier, mask, 0);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(
      cuda_emulator::here->warp_operation(cuda_emulator::At::kVote, mask, predicate != 0));
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return cuda_emulator::shuffle(mask, value, cuda_emulator::segment(width) + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const unsigned lane = cuda_emulator::here->lane(), source = lane ^ bits;
  return cuda_emulator::shuffle(mask, value, source < cuda_emulator::segment(width) + width ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = cuda_emulator::here->lane(), source = lane + delta;
  return cuda_emulator::shuffle(mask, value, source < cuda_emulator::segment(width) + width ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = cuda_emulator::here->lane();
  return cuda_emulator::shuffle(mask, value, lane < cuda_emulator::segment(width) + delta ? lane : lane - delta);
}

// Host.

#define CUDA_EMULATOR_ERRORS(error)                                                   \
  error(cudaSuccess, 0, "no error")                                                   \
  error(cudaErrorInvalidValue, 1, "invalid argument")                                 \
  error(cudaErrorMemoryAllocation, 2, "out of memory")                                \
  error(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")           \
  error(cudaErrorInvalidDeviceFunction, 98, "invalid device function")                \
  error(cudaErrorNoDevice, 100, "no CUDA-capable device is detected")                 \
  error(cudaErrorInvalidDevice, 101, "invalid device ordinal")                        \
  error(cudaErrorLaunchOutOfResources, 701, "too many resources requested for launch") \
  error(cudaErrorMisalignedAddress, 716, "misaligned address")                        \
  error(cudaErrorCooperativeLaunchTooLarge, 720, "too many blocks in cooperative launch") \
  error(cudaErrorNotSupported, 801, "operation not supported")                        \
  error(cudaErrorUnknown, 999, "unknown error")

#define CUDA_EMULATOR_ENUMERATOR(name, value, text) name = value,
enum cudaError { CUDA_EMULATOR_ERRORS(CUDA_EMULATOR_ENUMERATOR) };
using cudaError_t = cudaError;

inline const char* cudaGetErrorString(cudaError_t error) {
#define CUDA_EMULATOR_TEXT(name, value, text) \
  case name: return text;
  switch (error) { CUDA_EMULATOR_ERRORS(CUDA_EMULATOR_TEXT) }
  return "unrecognized error code";
}

using cudaStream_t = struct CUstream_st*;
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrCooperativeLaunch = 95
};

namespace cuda_emulator {

inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t record(cudaError_t error) {
  if (error) last_error = error;
  return error;
}

inline int cache_bytes() { return setting("CUDA_EMULATOR_L2", 1 << 20); }
inline int processors() { return setting("CUDA_EMULATOR_SMS", 3); }
// With CUDA_EMULATOR_UNEVEN every second kernel, in the order of their first use, has room for one block only.
template <class Kernel>
int blocks_per_processor(Kernel* kernel) {
  static std::mutex guard;
  static std::vector<const void*> known;
  const std::lock_guard<std::mutex> lock(guard);
  const void* me = reinterpret_cast<const void*>(kernel);
  const auto at = std::find(known.begin(), known.end(), me) - known.begin();
  if (at == static_cast<std::ptrdiff_t>(known.size())) known.push_back(me);
  return setting("CUDA_EMULATOR_UNEVEN", 0) && at % 2 ? 1 : setting("CUDA_EMULATOR_BLOCKS_PER_SM", 2);
}
inline bool can_cooperate() { return setting("CUDA_EMULATOR_COOPERATIVE", 1) != 0; }

inline bool valid(dim3 blocks, dim3 threads) {
  const bool some = volume(blocks) > 0 && volume(threads) > 0 && volume(threads) <= kMaxThreads;
  return some && blocks.x < 1u << 31 && blocks.y < 1u << 16 && blocks.z < 1u << 16 && threads.z <= 64;
}

template <class... A, size_t... I>
void launch(void (*kernel)(A...), dim3 blocks, dim3 threads, void** args, bool cooperative, std::index_sequence<I...>) {
  (void)args;  // unused without arguments
  const std::tuple<A...> copy(*static_cast<A*>(args[I])...);
  launch(blocks, threads, cooperative, [&] { std::apply(kernel, copy); });
}

}  // namespace cuda_emulator

inline cudaError_t cudaPeekAtLastError() { return cuda_emulator::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_emulator::last_error, cudaSuccess); }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t = nullptr) {
  std::memset(p, value, size);
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cuda_emulator::record(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = cuda_emulator::kMaxThreads; return cudaSuccess;
    case cudaDevAttrWarpSize: *value = cuda_emulator::kWarp; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = cuda_emulator::processors(); return cudaSuccess;
    case cudaDevAttrL2CacheSize: *value = cuda_emulator::cache_bytes(); return cudaSuccess;
    case cudaDevAttrCooperativeLaunch: *value = cuda_emulator::can_cooperate(); return cudaSuccess;
  }
  return cuda_emulator::record(cudaErrorInvalidValue);
}

template <class T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T kernel, int block_size, size_t) {
  if (block_size < 1) return cuda_emulator::record(cudaErrorInvalidValue);
  *blocks = block_size > static_cast<int>(cuda_emulator::kMaxThreads) ? 0 : cuda_emulator::blocks_per_processor(kernel);
  return cudaSuccess;
}

// Both return when the kernel has ended.
template <class... A>
cudaError_t cudaLaunchKernel(void (*kernel)(A...), dim3 blocks, dim3 threads, void** args, size_t = 0,
                             cudaStream_t = nullptr) {
  if (!cuda_emulator::valid(blocks, threads)) return cuda_emulator::record(cudaErrorInvalidConfiguration);
  cuda_emulator::launch(kernel, blocks, threads, args, false, std::index_sequence_for<A...>());
  return cudaSuccess;
}

template <class... A>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(A...), dim3 blocks, dim3 threads, void** args, size_t = 0,
                                        cudaStream_t = nullptr) {
  if (!cuda_emulator::can_cooperate()) return cuda_emulator::record(cudaErrorNotSupported);
  if (!cuda_emulator::valid(blocks, threads)) return cuda_emulator::record(cudaErrorInvalidConfiguration);
  const int64_t most = int64_t{cuda_emulator::processors()} * cuda_emulator::blocks_per_processor(kernel);
  if (static_cast<int64_t>(cuda_emulator::volume(blocks)) > most)
    return cuda_emulator::record(cudaErrorCooperativeLaunchTooLarge);
  cuda_emulator::launch(kernel, blocks, threads, args, true, std::index_sequence_for<A...>());
  return cudaSuccess;
}

#pragma GCC visibility pop
