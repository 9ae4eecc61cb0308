// Python bindings: pointers in, error text out ("" on success).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"
#ifdef TWINS_FAST_CUDA
#include "cuda/kernels.h"
#endif

namespace py = pybind11;
using namespace twins_fast;

namespace {

using Pointer = uintptr_t;

template <class T>
T* as(Pointer p) {
  return reinterpret_cast<T*>(p);
}

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw py::value_error("no kernel for dtype " + name);
}

std::string text(Status status) {
  switch (status) {
    case Status::kOk: return "";
    case Status::kBadArgument: return "argument out of range";
    case Status::kUnknownIsa: return "instruction set not built, or not on this CPU";
    case Status::kOutOfMemory: return "out of memory";
  }
  return "unknown status";
}

#ifdef TWINS_FAST_CUDA
std::string text(int error) { return error ? std::string("CUDA error: ") + cuda_error_text(error) : ""; }
#endif

TwinBnForward forward_args(int64_t images, int64_t channels, int64_t pixels, int64_t split, bool channels_last,
                           const std::string& dtype, Pointer x, Pointer residual, Pointer frozen_mean,
                           Pointer frozen_var, Pointer frozen_weight, Pointer frozen_bias, Pointer running_mean,
                           Pointer running_var, Pointer weight, Pointer bias, Pointer y, Pointer bits, Pointer stats,
                           double momentum, double eps, bool relu, int phase) {
  return {{images, channels, pixels, split, channels_last},
          dtype_of(dtype),
          as<void>(x),
          as<void>(residual),
          as<float>(frozen_mean),
          as<float>(frozen_var),
          as<float>(frozen_weight),
          as<float>(frozen_bias),
          as<float>(running_mean),
          as<float>(running_var),
          as<float>(weight),
          as<float>(bias),
          as<void>(y),
          as<uint8_t>(bits),
          as<float>(stats),
          momentum,
          eps,
          relu,
          static_cast<Phase>(phase)};
}

TwinBnBackward backward_args(int64_t images, int64_t channels, int64_t pixels, int64_t split, bool channels_last,
                             const std::string& dtype, Pointer dy, Pointer x, Pointer bits, Pointer frozen_mean,
                             Pointer frozen_var, Pointer frozen_weight, Pointer weight, Pointer stats, Pointer dx,
                             Pointer dresidual, Pointer dfrozen_weight, Pointer dfrozen_bias, Pointer dweight,
                             Pointer dbias, Pointer sums, double eps, int phase) {
  return {{images, channels, pixels, split, channels_last},
          dtype_of(dtype),
          as<void>(dy),
          as<void>(x),
          as<uint8_t>(bits),
          as<float>(frozen_mean),
          as<float>(frozen_var),
          as<float>(frozen_weight),
          as<float>(weight),
          as<float>(stats),
          as<void>(dx),
          as<void>(dresidual),
          as<float>(dfrozen_weight),
          as<float>(dfrozen_bias),
          as<float>(dweight),
          as<float>(dbias),
          as<float>(sums),
          eps,
          static_cast<Phase>(phase)};
}

// Binds launch(pack(arguments...), extra...), with the GIL released around the launch.
template <class Args, class Result, class... Packed, class... Extra>
auto bound(Args (*pack)(Packed...), Result (*launch)(const Args&, Extra...)) {
  return [=](Packed... packed, Extra... extra) {
    const Args args = pack(packed...);
    py::gil_scoped_release release;
    return text(launch(args, extra...));
  };
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (int i = 0; cpu_isa(i); ++i) names.push_back(cpu_isa(i));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("cpu_isas") = cpu_isas();
  m.def("twin_bn_forward_cpu", bound(forward_args, twin_bn_forward_cpu));
  m.def("twin_bn_backward_cpu", bound(backward_args, twin_bn_backward_cpu));
#ifdef TWINS_FAST_CUDA
  m.attr("has_cuda") = true;
  m.def("twin_bn_workspace_cuda", twin_bn_workspace_cuda);
  m.def("twin_bn_forward_cuda", bound(forward_args, twin_bn_forward_cuda));
  m.def("twin_bn_backward_cuda", bound(backward_args, twin_bn_backward_cuda));
#else
  m.attr("has_cuda") = false;
#endif
}
