// The launch of a kernel, on as many blocks as the device holds at once, and what they are told.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>

#include "cuda/memory.cuh"
#include "cuda/merge.cuh"
#include "cuda/tiling.cuh"

namespace twins_fast {
namespace {

constexpr int kDepth = 4;                    // groups per thread that make another slab worthwhile
constexpr int kLeastBlocks = 2;              // on a multiprocessor, which registers are given out for
constexpr int kBlocksPerMultiprocessor = 4;  // more would only mean more partial sums to merge
constexpr int kMaxBlocks = 1024;
constexpr int kMaxDevices = 64;
constexpr double kKeptShare = 0.4;  // of the second-level cache, whose partitions may hold a line twice (an estimate)

enum Step : unsigned { kReduceStep = 1, kMergeStep = 2, kApplyStep = 4, kCooperative = 8 };

// How a launch divides its work.
struct Plan {
  Partials partials;
  float* means;  // backward: [4, channels], what dx needs of the second half and, where it is adaptive, the first
  int kept;      // units of an adaptive slab, its last, that the second-level cache is to hold for the second pass
};

constexpr int kPartialVectors = 2 * Moments::kVectors;  // of both halves

int64_t workspace_floats(int64_t channels, int slabs) { return channels * (kPartialVectors * int64_t{slabs} + 4); }

struct Where {
  float* workspace;
  bool cooperative;  // false: others may hold a part of the device
  cudaStream_t stream;
};

struct Device {
  int multiprocessors = 0, cache_bytes = 0, cooperative = 0, blocks = 0;  // blocks of the kernel
};

// Asks once per device, since asking for some values takes microseconds.
template <class Ask>
cudaError_t known_or(std::atomic<int> (&known)[kMaxDevices], int device, int& value, Ask&& ask) {
  const bool keeps = device < kMaxDevices;
  value = keeps ? known[device].load(std::memory_order_relaxed) : 0;
  if (value > 0) return cudaSuccess;
  if (cudaError_t error = ask(&value)) return error;
  if (keeps) known[device].store(value, std::memory_order_relaxed);
  return cudaSuccess;
}

template <auto kKernel>
cudaError_t current_device(Device& device) {
  static std::atomic<int> cache_bytes[kMaxDevices], blocks[kMaxDevices];
  int index = 0;
  if (cudaError_t error = cudaGetDevice(&index)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index))
    return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&device.cooperative, cudaDevAttrCooperativeLaunch, index))
    return error;
  if (cudaError_t error = known_or(cache_bytes, index, device.cache_bytes, [&](int* bytes) {
        return cudaDeviceGetAttribute(bytes, cudaDevAttrL2CacheSize, index);
      }))
    return error;
  return known_or(blocks, index, device.blocks, [](int* count) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(count, kKernel, kThreads, 0);
  });
}

template <bool kLast>
int most_slabs(const Shape& s) {
  return std::max(kMaxBlocks / Tiling<kLast>(s).tiles, 1);
}

// One cooperative launch, or three ordinary ones where the device has none or others hold a part of it.
// again: bytes of an adaptive value that are read a second time.
template <bool kLast, auto kKernel, class Args>
cudaError_t launch(Args args, double again, const Where& where) {
  const Shape& s = args.shape;
  Device device;
  if (cudaError_t error = current_device<kKernel>(device)) return error;
  if (device.blocks < 1) return cudaErrorInvalidConfiguration;
  const int blocks_held = std::min(device.blocks, kBlocksPerMultiprocessor) * device.multiprocessors;
  const int most_blocks = std::min(blocks_held, kMaxBlocks);
  const Tiling<kLast> tiling(s);
  const int units = std::max(Half(s, false, 1).units, Half(s, true, 1).units);
  const int useful = (units + tiling.lanes() * kDepth - 1) / (tiling.lanes() * kDepth);
  const int slabs = std::max(std::min(most_blocks / tiling.tiles, useful), 1);
  const unsigned blocks = std::min(slabs * tiling.tiles, most_blocks);

  const int64_t adaptive_images = args.both_adaptive ? s.images : s.images_of(true);
  const double bytes = again * static_cast<double>(adaptive_images * s.pixels) * static_cast<double>(s.channels);
  const double share = bytes > 0 ? std::min(kKeptShare * device.cache_bytes / bytes, 1.) : 0;
  Plan plan{{where.workspace, slabs, s.channels},
            where.workspace + kPartialVectors * int64_t{slabs} * s.channels,
            static_cast<int>(share * Half(s, true, slabs).slab_units)};
  unsigned steps = kReduceStep | kMergeStep | kApplyStep;
  void* arguments[] = {&args, &plan, &steps};
  const auto launch_ordinary = [&](unsigned which) {
    steps = which;
    return cudaLaunchKernel(kKernel, dim3(blocks), dim3(kThreads), arguments, 0, where.stream);
  };
  if (args.phase == Phase::kApply) return launch_ordinary(steps);  // nothing to wait for
  if (where.cooperative && device.cooperative) {
    steps |= kCooperative;
    const cudaError_t error =
        cudaLaunchCooperativeKernel(kKernel, dim3(blocks), dim3(kThreads), arguments, 0, where.stream);
    if (error != cudaErrorCooperativeLaunchTooLarge) return error;
    cudaGetLastError();  // it is dealt with
  }
  for (const Step step : {kReduceStep, kMergeStep, kApplyStep})
    if (cudaError_t error = launch_ordinary(step)) return error;
  return cudaSuccess;
}

bool whole_groups(const Shape& s, std::initializer_list<const void*> images) {
  bool whole = s.run() % kGroup == 0;
  for (const void* p : images) whole = whole && reinterpret_cast<uintptr_t>(p) % sizeof(uint4) == 0;
  return whole;
}

bool valid(const Shape& s) {
  // Units are counted in 32 bits, and some rounds of a block past the last.
  constexpr int64_t kMost = (int64_t{1} << 31) - 32 * kThreads;
  return s.images > 0 && s.channels > 0 && s.pixels > 0 && s.split >= 0 && s.split <= s.images &&
         s.channels < kMost / 2 && s.images * (s.channels_last ? s.pixels : s.bytes_of_bits()) < kMost;
}

}  // namespace
}  // namespace twins_fast
