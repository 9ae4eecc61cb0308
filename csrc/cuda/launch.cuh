// One cooperative launch of a kernel, on as many blocks as the device holds at once.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <initializer_list>

#include "cuda/memory.cuh"
#include "cuda/merge.cuh"
#include "cuda/tiling.cuh"

namespace twins_fast {
namespace {

constexpr int kDepth = 4;                      // groups per thread that make another slab worthwhile
constexpr int kBlocksPerMultiprocessor = 2;    // more would only mean more partial sums to combine
constexpr int kMaxBlocks = 1024;
constexpr int kMaxDevices = 64;

enum Step : unsigned { kReduceStep = 1, kApplyStep = 2, kCooperative = 4 };

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

}  // namespace
}  // namespace twins_fast
