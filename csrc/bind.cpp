// Python bindings: pointers in, error text out ("" on success).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
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

// codes: of each step its kind, plus 8 if a clamp passes gradients at its bounds; values: [8, 4], a row for each step.
PixelCall pixel_args(int64_t images, int64_t channels, int64_t height, int64_t width, int64_t out_height,
                     int64_t out_width, Pointer row_start, Pointer column_start, const std::vector<int>& codes,
                     Pointer values, const std::string& dtype, Pointer x, Pointer gradient, Pointer clean, Pointer nan,
                     Pointer result, Pointer out, double alpha, double eps) {
  if (codes.size() > kMostPixelSteps) throw py::value_error("at most " + std::to_string(kMostPixelSteps) + " steps");
  PixelProgram program{channels, height, width, out_height, out_width, as<int32_t>(row_start),
                       as<int32_t>(column_start), static_cast<int>(codes.size()), {}};
  for (size_t i = 0; i < codes.size(); ++i) {
    if (codes[i] < 0 || codes[i] % 8 > PixelStep::kDiv) throw py::value_error("no such step");
    program.step[i] = {static_cast<PixelStep::Kind>(codes[i] % 8), as<float>(values) + 4 * i, codes[i] >= 8};
  }
  const PixelPass pass = clean ? PixelPass::kStep : gradient ? PixelPass::kGradient : PixelPass::kPrepare;
  return {program,          pass,
          images,           dtype_of(dtype),
          as<void>(gradient), as<float>(x),
          as<float>(clean), static_cast<float>(alpha),
          static_cast<float>(eps), as<int64_t>(nan),
          as<float>(result), as<void>(out)};
}
#endif

TwinBnForward forward_args(int64_t images, int64_t channels, int64_t pixels, int64_t split, bool channels_last,
                           const std::string& dtype, Pointer x, Pointer residual, Pointer frozen_mean,
                           Pointer frozen_var, Pointer frozen_weight, Pointer frozen_bias, Pointer running_mean,
                           Pointer running_var, Pointer weight, Pointer bias, Pointer y, Pointer bits, Pointer stats,
                           double momentum, double eps, bool relu, bool both_adaptive, int phase) {
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
          both_adaptive,
          static_cast<Phase>(phase)};
}

TwinBnBackward backward_args(int64_t images, int64_t channels, int64_t pixels, int64_t split, bool channels_last,
                             const std::string& dtype, Pointer dy, Pointer x, Pointer bits, Pointer frozen_mean,
                             Pointer frozen_var, Pointer frozen_weight, Pointer weight, Pointer stats, Pointer dx,
                             Pointer dresidual, Pointer dfrozen_weight, Pointer dfrozen_bias, Pointer dweight,
                             Pointer dbias, Pointer sums, double eps, bool both_adaptive, int phase) {
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
          both_adaptive,
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

Pointwise pointwise_args(int64_t pixels, int64_t channels, const std::string& dtype, Pointer x, Pointer gate,
                         Pointer scale, Pointer shift, Pointer other, Pointer mask, bool relu, Pointer y,
                         Pointer bits) {
  return {pixels,           channels,         dtype_of(dtype), as<void>(x),       as<void>(gate), as<float>(scale),
          as<float>(shift), as<void>(other), as<uint8_t>(mask), relu, as<void>(y),    as<uint8_t>(bits)};
}

// parts: int64 [count, 6], rows as in Part.
Gather gather_args(int64_t pixels, int64_t channels, const std::string& dtype, Pointer parts, int64_t count,
                   Pointer scale, Pointer shift, Pointer other, Pointer mask, bool relu, Pointer y, Pointer bits) {
  static_assert(sizeof(Part) == 6 * sizeof(int64_t));
  return {as<Part>(parts), count,
          pointwise_args(pixels, channels, dtype, y, 0, scale, shift, other, mask, relu, y, bits)};
}

Product product_args(int64_t images, int64_t pixels, int64_t channels, bool per_channel, const std::string& dtype,
                     Pointer x, Pointer gate, Pointer other, Pointer mask, bool relu, Pointer y, Pointer bits) {
  return {{images, pixels, channels, per_channel}, dtype_of(dtype), as<void>(x), as<void>(gate), as<void>(other),
          as<uint8_t>(mask), relu, as<void>(y), as<uint8_t>(bits)};
}

ProductSum product_sum_args(int64_t images, int64_t pixels, int64_t channels, bool per_channel,
                            const std::string& dtype, Pointer g, Pointer x, Pointer other, Pointer mask, Pointer y) {
  return {{images, pixels, channels, per_channel}, dtype_of(dtype), as<void>(g), as<void>(x), as<void>(other),
          as<uint8_t>(mask), as<void>(y)};
}

Activation activation_args(int64_t values, const std::string& dtype, int kind, double a, double b, Pointer x, Pointer y,
                           Pointer slope) {
  return {values,      dtype_of(dtype), static_cast<ActivationKind>(kind), static_cast<float>(a), static_cast<float>(b),
          as<void>(x), as<void>(y),     as<void>(slope)};
}

LayerNorm layer_norm_args(int64_t pixels, int64_t channels, const std::string& dtype, double eps, Pointer x,
                          Pointer weight, Pointer bias, Pointer y, Pointer moments) {
  return {pixels,          channels,        dtype_of(dtype), static_cast<float>(eps), as<void>(x),
          as<float>(weight), as<float>(bias), as<void>(y),     as<float>(moments)};
}

LayerNormBackward layer_norm_backward_args(int64_t pixels, int64_t channels, const std::string& dtype, Pointer g,
                                           Pointer x, Pointer weight, Pointer moments, Pointer other, Pointer mask,
                                           Pointer dx) {
  return {pixels,          channels,           dtype_of(dtype), as<void>(g),       as<void>(x),
          as<float>(weight), as<float>(moments), as<void>(other), as<uint8_t>(mask), as<void>(dx)};
}

Windows regular_windows(int64_t images, int64_t channels, int64_t height, int64_t width, int64_t out_height,
                        int64_t out_width, int64_t kernel_y, int64_t kernel_x, int64_t stride_y, int64_t stride_x,
                        int64_t pad_y, int64_t pad_x) {
  return {images,   channels, height, width, out_height, out_width, kernel_y, kernel_x,
          stride_y, stride_x, pad_y,  pad_x, nullptr,    nullptr,   nullptr,  nullptr};
}

Windows listed_windows(int64_t images, int64_t channels, int64_t height, int64_t width, int64_t out_height,
                       int64_t out_width, Pointer rows, Pointer columns, Pointer row_weights, Pointer column_weights) {
  return {images, channels, height, width, out_height, out_width, 0, 0, 0, 0, 0, 0,
          as<int32_t>(rows), as<int32_t>(columns), as<float>(row_weights), as<float>(column_weights)};
}

PoolForward max_pool_args(int64_t images, int64_t channels, int64_t height, int64_t width, int64_t out_height,
                          int64_t out_width, int64_t kernel_y, int64_t kernel_x, int64_t stride_y, int64_t stride_x,
                          int64_t pad_y, int64_t pad_x, const std::string& dtype, Pointer x, Pointer y,
                          Pointer argmax) {
  return {regular_windows(images, channels, height, width, out_height, out_width, kernel_y, kernel_x, stride_y,
                          stride_x, pad_y, pad_x),
          dtype_of(dtype), true, as<void>(x), as<void>(y), as<uint8_t>(argmax)};
}

PoolBackward max_pool_backward_args(int64_t images, int64_t channels, int64_t height, int64_t width,
                                    int64_t out_height, int64_t out_width, int64_t kernel_y, int64_t kernel_x,
                                    int64_t stride_y, int64_t stride_x, int64_t pad_y, int64_t pad_x,
                                    const std::string& dtype, Pointer g, Pointer argmax, Pointer other, Pointer mask,
                                    Pointer dx) {
  return {regular_windows(images, channels, height, width, out_height, out_width, kernel_y, kernel_x, stride_y,
                          stride_x, pad_y, pad_x),
          dtype_of(dtype), true, as<void>(g), as<uint8_t>(argmax), as<void>(other), as<uint8_t>(mask), as<void>(dx)};
}

PoolForward sum_pool_args(int64_t images, int64_t channels, int64_t height, int64_t width, int64_t out_height,
                          int64_t out_width, Pointer rows, Pointer columns, Pointer row_weights,
                          Pointer column_weights, const std::string& dtype, Pointer x, Pointer y) {
  return {listed_windows(images, channels, height, width, out_height, out_width, rows, columns, row_weights,
                         column_weights),
          dtype_of(dtype), false, as<void>(x), as<void>(y), nullptr};
}

PoolBackward sum_pool_backward_args(int64_t images, int64_t channels, int64_t height, int64_t width,
                                    int64_t out_height, int64_t out_width, Pointer rows, Pointer columns,
                                    Pointer row_weights, Pointer column_weights, const std::string& dtype, Pointer g,
                                    Pointer other, Pointer mask, Pointer dx) {
  return {listed_windows(images, channels, height, width, out_height, out_width, rows, columns, row_weights,
                         column_weights),
          dtype_of(dtype), false, as<void>(g), nullptr, as<void>(other), as<uint8_t>(mask), as<void>(dx)};
}

using PyStep = std::tuple<std::string, std::vector<float>, int>;  // kind, values, derivative of a clamp at its bounds

PixelStep::Kind kind_of(const std::string& name) {
  const char* const names[] = {"clamp", "add", "sub", "mul", "div"};  // as in PixelStep::Kind
  for (int kind = 0; kind < 5; ++kind)
    if (name == names[kind]) return static_cast<PixelStep::Kind>(kind);
  throw py::value_error("no step " + name);
}

std::unique_ptr<InputProgram> make_input(const std::vector<PyStep>& steps, int64_t channels,
                                         std::array<int64_t, 2> in_size, const std::vector<int32_t>& rows,
                                         const std::vector<int32_t>& columns) {
  std::vector<InputProgram::Step> converted;
  for (const auto& [name, values, at_bounds] : steps) converted.push_back({kind_of(name), values, at_bounds});
  return std::make_unique<InputProgram>(std::move(converted), channels, in_size[0], in_size[1], rows, columns);
}

std::string run_input(const InputProgram& input, PixelPass pass, int64_t images, const std::string& dtype,
                      Pointer gradient, Pointer x, Pointer clean, double alpha, double eps, Pointer not_finite,
                      Pointer result, Pointer out, int threads, const std::string& isa) {
  const PixelCall call{input.program(), pass, images, dtype_of(dtype), as<void>(gradient), as<float>(x),
                       as<float>(clean), static_cast<float>(alpha), static_cast<float>(eps), as<int64_t>(not_finite),
                       as<float>(result), as<void>(out)};
  py::gil_scoped_release release;
  return text(pixels_cpu(call, threads, isa));
}

using Pair = std::pair<int64_t, int64_t>;
using PyTap = std::tuple<int64_t, int64_t, std::vector<Pair>>;
using PyPhase = std::tuple<int64_t, int64_t, std::vector<PyTap>>;

std::unique_ptr<Conv> make_conv(const std::string& algorithm, const std::string& dtype, Pair in_size,
                                int64_t in_channels, Pair out_size, int64_t out_channels, Pair in_step, Pair out_step,
                                const std::vector<PyPhase>& phases, const std::string& isa, bool adjoint,
                                int64_t groups) {
  const int winograd = algorithm == "winograd" ? 2 : algorithm == "winograd4" ? 4 : 0;
  const bool direct = algorithm == "direct";
  if (!winograd && !direct && algorithm != "gemm") throw py::value_error("no algorithm " + algorithm);
  if (groups < 1 || in_channels % groups || out_channels % groups)
    throw py::value_error("groups do not divide the channels");
  const ConvPlan plan{winograd,
                      adjoint,
                      dtype_of(dtype),
                      direct,
                      groups,
                      in_size.first,
                      in_size.second,
                      in_channels / groups,
                      out_size.first,
                      out_size.second,
                      out_channels / groups,
                      in_step.first,
                      in_step.second,
                      out_step.first,
                      out_step.second,
                      0,
                      nullptr,
                      nullptr,
                      nullptr};
  std::vector<Conv::Phase> copied;
  for (const auto& [oy, ox, taps] : phases) {
    copied.push_back({oy, ox, {}});
    for (const auto& [dy, dx, sources] : taps) {
      copied.back().taps.push_back({dy, dx, {}});
      for (const auto& [ky, kx] : sources) copied.back().taps.back().sources.push_back({ky, kx});
    }
  }
  return std::make_unique<Conv>(plan, std::move(copied), isa);
}

std::string pack_conv(const Conv& conv, Pointer weight, std::tuple<int64_t, int64_t, int64_t, int64_t> kernel,
                      Pointer scale, bool transposed, Pointer packed, int threads, const Conv* gradient,
                      Pointer gradient_packed) {
  const auto [outputs, inputs, height, width] = kernel;
  const ConvPack args{as<float>(weight), outputs, inputs, height, width, as<float>(scale), transposed,
                      as<void>(packed)};
  py::gil_scoped_release release;
  return text(conv.pack(args, threads, gradient, as<void>(gradient_packed)));
}

std::string run_conv(const Conv& conv, int64_t images, Pointer x, Pointer packed, Pointer bias, Pointer other,
                     Pointer mask, Pointer y, Pointer bits, bool relu, Pointer workspace, int threads) {
  const ConvRun args{images,           as<void>(x), as<void>(packed),  as<float>(bias), as<void>(other),
                     as<uint8_t>(mask), as<void>(y), as<uint8_t>(bits), relu,            as<void>(workspace)};
  py::gil_scoped_release release;
  return text(conv.run(args, threads));
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
  m.def("pointwise_cpu", bound(pointwise_args, pointwise_cpu));
  m.def("activation_cpu", bound(activation_args, activation_cpu));
  m.def("layer_norm_cpu", bound(layer_norm_args, layer_norm_cpu));
  m.def("layer_norm_backward_cpu", bound(layer_norm_backward_args, layer_norm_backward_cpu));
  m.def("gather_cpu", bound(gather_args, gather_cpu));
  m.def("product_cpu", bound(product_args, product_cpu));
  m.def("product_sum_cpu", bound(product_sum_args, product_sum_cpu));
  m.def("max_pool_cpu", bound(max_pool_args, pool_forward_cpu));
  m.def("max_pool_backward_cpu", bound(max_pool_backward_args, pool_backward_cpu));
  m.def("sum_pool_cpu", bound(sum_pool_args, pool_forward_cpu));
  m.def("sum_pool_backward_cpu", bound(sum_pool_backward_args, pool_backward_cpu));
  // images, dtype, then tensors and numbers, threads, isa
  m.attr("most_pixel_channels") = kMostPixelChannels;
  py::class_<InputProgram>(m, "InputProgram", py::module_local())
      .def(py::init(&make_input), py::arg("steps"), py::arg("channels"), py::arg("in_size"), py::arg("rows"),
           py::arg("cols"))
      .def("prepare",
           [](const InputProgram& p, int64_t images, const std::string& dtype, Pointer x, Pointer out, int threads,
              const std::string& isa) {
             return run_input(p, PixelPass::kPrepare, images, dtype, 0, x, 0, 0, 0, 0, 0, out, threads, isa);
           },
           py::arg("images"), py::arg("dtype"), py::arg("x"), py::arg("out"), py::arg("threads"), py::arg("isa") = "")
      .def("step",
           [](const InputProgram& p, int64_t images, const std::string& dtype, Pointer gradient, Pointer x,
              Pointer clean, double alpha, double eps, Pointer not_finite, Pointer x_out, Pointer out, int threads,
              const std::string& isa) {
             return run_input(p, PixelPass::kStep, images, dtype, gradient, x, clean, alpha, eps, not_finite, x_out, out,
                              threads, isa);
           },
           py::arg("images"), py::arg("dtype"), py::arg("gradient"), py::arg("x"), py::arg("clean"), py::arg("alpha"),
           py::arg("eps"), py::arg("not_finite"), py::arg("x_out"), py::arg("out"), py::arg("threads"),
           py::arg("isa") = "")
      .def("gradient",
           [](const InputProgram& p, int64_t images, const std::string& dtype, Pointer gradient, Pointer x, Pointer d,
              int threads, const std::string& isa) {
             return run_input(p, PixelPass::kGradient, images, dtype, gradient, x, 0, 0, 0, 0, d, 0, threads, isa);
           },
           py::arg("images"), py::arg("dtype"), py::arg("gradient"), py::arg("x"), py::arg("d"), py::arg("threads"),
           py::arg("isa") = "");
  py::class_<Conv>(m, "Conv", py::module_local())
      .def(py::init(&make_conv), py::arg("algorithm"), py::arg("dtype"), py::arg("in_size"), py::arg("in_channels"),
           py::arg("out_size"), py::arg("out_channels"), py::arg("in_step"), py::arg("out_step"), py::arg("phases"),
           py::arg("isa") = "", py::arg("adjoint") = false, py::arg("groups") = 1)
      .def_property_readonly("packed_bytes", &Conv::packed_bytes)
      .def("workspace_bytes", &Conv::workspace_bytes, py::arg("threads"))
      .def("pack", pack_conv, py::arg("weight"), py::arg("kernel"), py::arg("scale"), py::arg("transposed"),
           py::arg("packed"), py::arg("threads"), py::arg("gradient") = nullptr, py::arg("gradient_packed") = 0)
      .def("run", run_conv, py::arg("images"), py::arg("x"), py::arg("packed"), py::arg("bias"), py::arg("other"),
           py::arg("mask"), py::arg("y"), py::arg("bits"), py::arg("relu"), py::arg("workspace"), py::arg("threads"));
#ifdef TWINS_FAST_CUDA
  m.attr("has_cuda") = true;
  m.def("twin_bn_workspace_cuda", twin_bn_workspace_cuda);
  m.def("twin_bn_forward_cuda", bound(forward_args, twin_bn_forward_cuda));
  m.def("twin_bn_backward_cuda", bound(backward_args, twin_bn_backward_cuda));
  m.def("pixels_cuda", bound(pixel_args, pixels_cuda));
#else
  m.attr("has_cuda") = false;
#endif
}
