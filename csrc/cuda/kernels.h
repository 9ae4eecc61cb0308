// CUDA kernels: the entry points. They launch on `stream` of the current device and do not wait.
#pragma once

#include "pixels.h"
#include "twin_bn.h"

namespace twins_fast {

// Return a cudaError_t, 0 on success. workspace: twin_bn_workspace_cuda() floats of device memory. cooperative: one
// launch that needs the whole device at once, where the device can; false where others use a part of it. Less than
// 2^31 values per channel (channels last) or groups of 8 (contiguous).
int twin_bn_forward_cuda(const TwinBnForward& args, uintptr_t workspace, bool cooperative, uintptr_t stream);
int twin_bn_backward_cuda(const TwinBnBackward& args, uintptr_t workspace, bool cooperative, uintptr_t stream);

// Floats that suffice for either direction.
int64_t twin_bn_workspace_cuda(int64_t channels, bool channels_last);

// Return a cudaError_t, too. All pointers of the call are to device memory; at most kMostPixelChannelsCuda channels.
int pixels_cuda(const PixelCall& args, uintptr_t stream);

constexpr int64_t kMostPixelChannelsCuda = 4;

const char* cuda_error_text(int error);

}  // namespace twins_fast
