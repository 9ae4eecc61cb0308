// Images to what the network sees of them, its gradient back, and the sign step of an attack.
//
// A thread has a pixel of the image before it is upsampled, with all its channels. Every operation is rounded, as
// PyTorch rounds it: products that are summed up are therefore __fmul_rn, which is never fused.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/kernels.h"

namespace twins_fast {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 65535;  // along each axis; what is left over is visited in turn

// As PyTorch's: a NaN stays, and so does the zero's sign at a bound.
__device__ __forceinline__ float clamped(float v, float low, float high) {
  v = v < low ? low : v;
  return high < v ? high : v;
}

__device__ __forceinline__ float forward(const PixelProgram& p, int count, int channel, float v) {
  for (int s = 0; s < count; ++s) {
    const PixelStep& step = p.step[s];
    switch (step.kind) {
      case PixelStep::kClamp: v = clamped(v, step.values[0], step.values[1]); break;
      case PixelStep::kAdd: v = v + step.values[channel]; break;
      case PixelStep::kSub: v = v - step.values[channel]; break;
      case PixelStep::kMul: v = __fmul_rn(v, step.values[channel]); break;
      case PixelStep::kDiv: v = v / step.values[channel]; break;
    }
  }
  return v;
}

// The gradient with respect to x, from that with respect to what forward() makes of it.
__device__ __forceinline__ float backward(const PixelProgram& p, int channel, float x, float gradient) {
  for (int s = p.steps - 1; s >= 0; --s) {
    const PixelStep& step = p.step[s];
    if (step.kind == PixelStep::kMul) gradient = __fmul_rn(gradient, step.values[channel]);
    if (step.kind == PixelStep::kDiv) gradient = gradient / step.values[channel];
    if (step.kind != PixelStep::kClamp) continue;
    const float v = forward(p, s, channel, x), low = step.values[0], high = step.values[1];
    if (!(step.at_bounds ? v >= low && v <= high : v > low && v < high)) gradient = 0;
  }
  return gradient;
}

struct Area {  // of the upsampled image, or the pixel itself
  int top, bottom, left, right;
};

// Blocks: those of an image, and images. Sizes of an image fit 32 bits.
template <class T, PixelPass kPass>
__global__ void __launch_bounds__(kThreads, 4) pixels_kernel(const __grid_constant__ PixelCall a) {
  const PixelProgram& p = a.program;
  const int channels = static_cast<int>(p.channels), width = static_cast<int>(p.width);
  const int64_t plane = p.height * p.width, pitch = p.out_width * channels;
  for (int64_t image = blockIdx.y; image < a.images; image += gridDim.y) {
    const T* gradient = static_cast<const T*>(a.gradient) + image * p.out_height * pitch;
    T* out = static_cast<T*>(a.out) + image * p.out_height * pitch;
    unsigned long long nans = 0;
    for (int64_t pixel = int64_t{blockIdx.x} * kThreads + threadIdx.x; pixel < plane; pixel += gridDim.x * kThreads) {
      const int y = static_cast<int>(pixel) / width, x = static_cast<int>(pixel) - y * width;
      Area area{y, y + 1, x, x + 1};
      if (p.row_start) area = {p.row_start[y], p.row_start[y + 1], p.column_start[x], p.column_start[x + 1]};
      for (int c = 0; c < channels; ++c) {
        const int64_t at = (image * channels + c) * plane + pixel;
        float v = a.x[at];
        if constexpr (kPass != PixelPass::kPrepare) {
          float d = 0;
          for (int column = area.left; column < area.right; ++column) {
            float sum = 0;
            for (int row = area.top; row < area.bottom; ++row)
              sum += static_cast<float>(gradient[row * pitch + column * channels + c]);
            d += sum;
          }
          d = backward(p, c, v, d);
          if constexpr (kPass == PixelPass::kGradient) {
            a.result[at] = d;
          } else {
            const float clean = a.clean[at], sign = d > 0 ? 1.f : d < 0 ? -1.f : 0.f;
            const float moved = clamped(v + __fmul_rn(a.alpha, sign), clean - a.eps, clean + a.eps);
            nans += d != d;
            if (d == d) v = clamped(clean == clean ? moved : clean, 0, 1);
            a.result[at] = v;
          }
        }
        if (!a.out) continue;
        const T narrow = static_cast<T>(forward(p, p.steps, c, v));
        for (int row = area.top; row < area.bottom; ++row)
          for (int column = area.left; column < area.right; ++column)
            out[row * pitch + column * channels + c] = narrow;
      }
    }
    if (nans && a.not_finite) atomicAdd(reinterpret_cast<unsigned long long*>(a.not_finite) + image, nans);
  }
}

template <class T, PixelPass kPass>
cudaError_t launch(PixelCall a, cudaStream_t stream) {
  const int64_t blocks = (a.program.height * a.program.width + kThreads - 1) / kThreads;
  const dim3 grid(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks),
                  static_cast<unsigned>(a.images < kMostBlocks ? a.images : kMostBlocks));
  void* arguments[] = {&a};
  const cudaError_t error = cudaLaunchKernel(pixels_kernel<T, kPass>, grid, dim3(kThreads), arguments, 0, stream);
  return error ? error : cudaGetLastError();
}

template <class T>
cudaError_t launch_pass(const PixelCall& a, cudaStream_t stream) {
  switch (a.pass) {
    case PixelPass::kPrepare: return launch<T, PixelPass::kPrepare>(a, stream);
    case PixelPass::kGradient: return launch<T, PixelPass::kGradient>(a, stream);
    case PixelPass::kStep: return launch<T, PixelPass::kStep>(a, stream);
  }
  return cudaErrorInvalidValue;
}

bool valid(const PixelCall& a) {
  const PixelProgram& p = a.program;
  const bool same = p.height == p.out_height && p.width == p.out_width;
  const bool sizes = a.images >= 0 && p.height > 0 && p.width > 0 && p.out_height > 0 && p.out_width > 0;
  constexpr int64_t kMost = int64_t{1} << 28;
  const bool small = p.height < kMost / p.width && p.out_height < kMost / p.out_width;
  const bool program = p.steps >= 0 && p.steps <= kMostPixelSteps && !p.row_start == !p.column_start &&
                       (p.row_start || same);
  const bool given = a.pass == PixelPass::kPrepare ? a.out != nullptr : a.gradient && a.result;
  return sizes && small && program && p.channels > 0 && p.channels <= kMostPixelChannelsCuda &&
         (!a.images || (a.x && given && (a.clean || a.pass != PixelPass::kStep)));
}

}  // namespace

int pixels_cuda(const PixelCall& args, uintptr_t stream) {
  if (!valid(args)) return cudaErrorInvalidValue;
  if (!args.images) return cudaSuccess;
  auto handle = reinterpret_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::kFloat32: return launch_pass<float>(args, handle);
    case DType::kBFloat16: return launch_pass<__nv_bfloat16>(args, handle);
    case DType::kFloat16: return launch_pass<__half>(args, handle);
  }
  return cudaErrorInvalidValue;
}

}  // namespace twins_fast
