// Checks arguments, picks the unit for this CPU, and gives it working memory.
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace twins_fast {
namespace {

struct Isa {
  const char* name;
  bool available;
  void (*forward)(const TwinBnForward&, const Scratch&, int);
  void (*backward)(const TwinBnBackward&, const Scratch&, int);
  void (*pointwise)(const Pointwise&, int);
  void (*gather)(const Gather&, int);
  void (*product)(const Product&, int);
  void (*product_sum)(const ProductSum&, int);
  void (*activation)(const Activation&, int);
  void (*layer_norm)(const LayerNorm&, int);
  void (*layer_norm_backward)(const LayerNormBackward&, int);
  void (*pool_forward)(const PoolForward&, int);
  void (*pool_backward)(const PoolBackward&, int);
  void (*pixels)(const PixelCall&, int);
  const ConvUnit *conv, *direct;
};

#define TWINS_FAST_PASSES(isa) \
  isa::forward, isa::backward, isa::pointwise, isa::gather, isa::product, isa::product_sum, isa::activation, \
      isa::layer_norm, isa::layer_norm_backward, isa::pool_forward, isa::pool_backward, isa::pixels
#define TWINS_FAST_UNITS(isa) TWINS_FAST_PASSES(isa), &isa::conv, &isa::direct

#ifdef TWINS_FAST_HAS_avx512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

#ifdef TWINS_FAST_HAS_amx
// Linux lets a process use the large registers of the matrix unit once it asked for them.
bool has_amx() {
#if defined(__linux__)
  constexpr int kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const Isa* isas() {
  static const Isa table[] = {
#ifdef TWINS_FAST_HAS_amx
      {"amx", has_amx(), TWINS_FAST_PASSES(avx512_bf16), &amx::conv, &avx512_bf16::direct},
#endif
#ifdef TWINS_FAST_HAS_avx512_bf16
      {"avx512_bf16", has_avx512() && __builtin_cpu_supports("avx512bf16"), TWINS_FAST_UNITS(avx512_bf16)},
#endif
#ifdef TWINS_FAST_HAS_avx512
      {"avx512", has_avx512(), TWINS_FAST_UNITS(avx512)},
#endif
#ifdef TWINS_FAST_HAS_avx2  // no processor has it without F16C, which old compilers cannot ask for
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), TWINS_FAST_UNITS(avx2)},
#endif
      {"baseline", true, TWINS_FAST_UNITS(baseline)},
      {},
  };
  return table;
}

const Isa* find(const std::string& name) {
  for (const Isa* isa = isas(); isa->name; ++isa)
    if (isa->available && (name.empty() || name == isa->name)) return isa;
  return nullptr;
}

int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Fresh memory of this size is faulted in page by page, which takes longer than all arithmetic on it. Asking for
// huge pages makes that 512 times fewer; memory that is already there stays as it is.
void prefer_huge_pages(const Shape& shape, DType dtype, std::initializer_list<void*> results) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const int64_t bytes = shape.rows() * shape.run() * bytes_of(dtype);
  if (bytes < static_cast<int64_t>(2 * kPage)) return;
  for (void* result : results) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(result) + kPage - 1) / kPage * kPage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(result) + bytes) / kPage * kPage;
    if (result && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

// A thread is worth waking for about 10 us of work.
int useful_threads(const Shape& shape, int threads) {
  constexpr int64_t kValuesPerThread = 16384;
  const int64_t most = shape.images * shape.channels * shape.pixels / kValuesPerThread + 1;
  return threads < most ? threads : static_cast<int>(most);
}

template <class Args, class Run>
Status run(const Args& args, int threads, const std::string& isa_name, Run Isa::*unit) {
  const Isa* isa = find(isa_name);
  if (!isa) return Status::kUnknownIsa;
  const Shape& s = args.shape;
  if (s.images < 1 || s.channels < 1 || s.pixels < 1 || s.split < 0 ||
      s.split > s.images || threads < 1)
    return Status::kBadArgument;
  threads = useful_threads(s, threads);
  const int64_t stride = (s.channels + Scratch::kPad - 1) / Scratch::kPad * Scratch::kPad;
  std::unique_ptr<double[]> doubles(new (std::nothrow) double[Scratch::kDoubles * threads * stride]());
  std::unique_ptr<float[]> floats(new (std::nothrow)
                                      float[(Scratch::kShared + Scratch::kFloats * threads) * stride]());
  if (!doubles || !floats) return Status::kOutOfMemory;
  (isa->*unit)(args, Scratch{doubles.get(), floats.get(), stride}, threads);
  return Status::kOk;
}

// Makes of a call whose halves are both adaptive that of one half alone. Returns the rows before it.
template <class Args>
int64_t make_half(Args& args, bool second) {
  Shape& s = args.shape;
  const int64_t skipped = second ? s.split * s.rows_per_image() : 0;
  s.images = s.images_of(second);
  s.split = 0;
  args.both_adaptive = false;
  if (!second) args.stats += 2 * s.channels;
  return skipped;
}

// Makes an image tensor start later.
template <class T>
void skip(T*& image, int64_t bytes) {
  if (image) image = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(image) + bytes);
}

TwinBnForward half_of(TwinBnForward args, bool second) {
  const int64_t rows = make_half(args, second), bytes = rows * args.shape.run() * bytes_of(args.dtype);
  skip(args.x, bytes), skip(args.residual, bytes), skip(args.y, bytes);
  skip(args.bits, rows * args.shape.bytes_of_bits());
  if (!second) {
    args.running_mean = args.frozen_mean, args.running_var = args.frozen_var;
    args.weight = args.frozen_weight, args.bias = args.frozen_bias;
  }
  if (args.shape.images == 0) std::fill_n(args.stats, 2 * args.shape.channels, 0.f);
  return args;
}

TwinBnBackward half_of(TwinBnBackward args, bool second) {
  const int64_t rows = make_half(args, second), bytes = rows * args.shape.run() * bytes_of(args.dtype);
  skip(args.dy, bytes), skip(args.x, bytes), skip(args.dx, bytes), skip(args.dresidual, bytes);
  skip(args.bits, rows * args.shape.bytes_of_bits());
  if (!second) args.weight = args.frozen_weight, args.dweight = args.dfrozen_weight, args.dbias = args.dfrozen_bias;
  args.dfrozen_weight = args.dfrozen_bias = nullptr;
  for (float* vector : {args.dweight, args.dbias})
    if (vector && args.shape.images == 0) std::fill_n(vector, args.shape.channels, 0.f);
  return args;
}

// Two adaptive halves have nothing in common, and each is one piece of memory in either layout.
template <class Args, class Run>
Status run_halves(const Args& args, int threads, const std::string& isa_name, Run Isa::*unit) {
  if (!args.both_adaptive) return run(args, threads, isa_name, unit);
  if (args.phase != Phase::kAll) return Status::kBadArgument;
  for (const bool second : {false, true}) {
    const Args half = half_of(args, second);
    if (half.shape.images == 0) continue;
    if (const Status status = run(half, threads, isa_name, unit); status != Status::kOk) return status;
  }
  return Status::kOk;
}

// A pass over channels-last values, none of which may be there.
template <class Args>
Status run_pass(const Args& args, int64_t channels, int64_t pixels, bool valid, int threads,
                const std::string& isa_name, void (*Isa::*unit)(const Args&, int)) {
  const Isa* isa = find(isa_name);
  if (!isa) return Status::kUnknownIsa;
  if (channels < 1 || pixels < 0 || threads < 1 || !valid) return Status::kBadArgument;
  if (pixels) (isa->*unit)(args, useful_threads({1, channels, pixels, 0, true}, threads));
  return Status::kOk;
}

// Every window of maxima lies at least partly in the image, and its places fit a byte; one of sums may be empty.
bool valid(const Windows& w, bool max) {
  const auto regular = [](int64_t size, int64_t count, int64_t kernel, int64_t stride, int64_t pad) {
    return size > 0 && count > 0 && kernel > 0 && stride > 0 && pad >= 0 && pad < kernel &&
           (count - 1) * stride - pad < size;
  };
  const auto listed = [](int64_t size, int64_t count, const int32_t* begin, const float* weights) {
    bool right = size > 0 && count > 0 && begin && weights;
    for (int64_t i = 0; right && i < count; ++i)
      right = 0 <= begin[i] && begin[i] <= begin[count + i] && begin[count + i] <= size &&
              (!i || (begin[i - 1] <= begin[i] && begin[count + i - 1] <= begin[count + i]));
    return right;
  };
  if (!max)
    return listed(w.height, w.out_height, w.rows, w.row_weights) &&
           listed(w.width, w.out_width, w.columns, w.column_weights);
  return !w.rows && !w.columns && regular(w.height, w.out_height, w.kernel_y, w.stride_y, w.pad_y) &&
         regular(w.width, w.out_width, w.kernel_x, w.stride_x, w.pad_x) && w.kernel_y * w.kernel_x <= 255;
}

bool inside(const Part& part, int64_t channels) {
  return part.channels > 0 && part.y_first >= 0 && part.y_step > 0 && part.stride > 0 && part.step > 0 &&
         part.y_first + (part.channels - 1) * part.y_step < channels;
}

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

void check_winograd(const ConvPlan& plan) {
  bool ordinary = plan.phase_count == 1 && plan.phases[0].taps == 9 && plan.in_step_y == 1 && plan.in_step_x == 1 &&
                  plan.out_step_y == 1 && plan.out_step_x == 1 && plan.in_h == plan.out_h && plan.in_w == plan.out_w;
  for (int64_t i = 0; ordinary && i < 9; ++i)
    ordinary = plan.taps[i].dy == i / 3 - 1 && plan.taps[i].dx == i % 3 - 1;
  require(ordinary, "winograd needs a 3x3 convolution of stride, padding and dilation 1");
}

void check_direct(const ConvPlan& plan) {
  const int64_t inputs = plan.in_channels, outputs = plan.out_channels;
  require((inputs == outputs && (inputs == 1 || inputs == 2 || inputs == 4)) || (inputs % 8 == 0 && outputs % 8 == 0),
          "direct convolutions have groups of 1, 2, 4 or multiples of 8 channels");
}

// Where the copies of each source begin.
std::vector<int32_t> starts(const std::vector<int32_t>& sources, int64_t size) {
  require(0 < size && size <= INT32_MAX && !sources.empty() && sources.size() <= INT32_MAX, "sizes must be positive");
  std::vector<int32_t> start(size + 1, static_cast<int32_t>(sources.size()));
  int64_t next = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    require(0 <= sources[i] && sources[i] < size && (!i || sources[i - 1] <= sources[i]),
            "an index table must rise, within the size of the image");
    for (; next <= sources[i]; ++next) start[next] = static_cast<int32_t>(i);
  }
  return start;
}

bool is_identity(const std::vector<int32_t>& sources, int64_t size) {
  if (static_cast<int64_t>(sources.size()) != size) return false;
  for (int64_t i = 0; i < size; ++i)
    if (sources[i] != i) return false;
  return true;
}

}  // namespace

Conv::Conv(const ConvPlan& geometry, std::vector<Phase> phases, const std::string& isa) : plan_(geometry) {
  constexpr int64_t kMost = int64_t{1} << 20;  // products of several stay far from overflow
  for (int64_t size : {plan_.in_h, plan_.in_w, plan_.in_channels, plan_.out_h, plan_.out_w, plan_.out_channels,
                       plan_.in_step_y, plan_.in_step_x, plan_.out_step_y, plan_.out_step_x})
    require(0 < size && size <= kMost, "sizes, channels and steps must be in [1, 2**20]");
  const Isa* unit = find(isa);
  require(unit, "instruction set not built, or not on this CPU");
  unit_ = plan_.direct ? unit->direct : unit->conv;
  std::vector<bool> covered(plan_.out_h * plan_.out_w);
  int64_t pixels = 0;
  const auto points = [](int64_t first, int64_t end, int64_t step) {
    return first < end ? (end - first + step - 1) / step : 0;
  };
  for (Phase& phase : phases) {
    require(0 <= phase.oy && 0 <= phase.ox, "a phase must start inside the output");
    const int64_t rows = points(phase.oy, plan_.out_h, plan_.out_step_y);
    const int64_t columns = points(phase.ox, plan_.out_w, plan_.out_step_x);
    for (int64_t i = 0; i < rows * columns; ++i) {
      const int64_t y = phase.oy + i / columns * plan_.out_step_y, x = phase.ox + i % columns * plan_.out_step_x;
      require(!covered[y * plan_.out_w + x], "two phases write the same output pixel");
      covered[y * plan_.out_w + x] = true;
    }
    pixels += rows * columns;
    phases_.push_back({phase.oy, phase.ox, static_cast<int64_t>(taps_.size()),
                       static_cast<int64_t>(phase.taps.size()), rows, columns});
    // Taps side by side read memory side by side.
    std::stable_sort(phase.taps.begin(), phase.taps.end(), [](const Tap& a, const Tap& b) {
      return std::make_pair(a.dy, a.dx) < std::make_pair(b.dy, b.dx);
    });
    for (const Tap& tap : phase.taps) {
      for (int64_t d : {tap.dy, tap.dx}) require(-kMost <= d && d <= kMost, "a tap is too far away");
      taps_.push_back({tap.dy, tap.dx, static_cast<int64_t>(sources_.size()),
                       static_cast<int64_t>(tap.sources.size())});
      for (const ConvSource& source : tap.sources) {
        require(0 <= source.ky && 0 <= source.kx, "weight slices count from 0");
        sources_.push_back(source);
      }
    }
  }
  require(pixels == plan_.out_h * plan_.out_w, "no phase writes some output pixel");
  plan_.phase_count = static_cast<int64_t>(phases_.size());
  plan_.phases = phases_.data();
  plan_.taps = taps_.data();
  plan_.sources = sources_.data();
  require(0 < plan_.groups && plan_.in_pixel() <= kMost && plan_.out_pixel() <= kMost, "too many groups");
  require(plan_.groups == 1 || plan_.direct, "only direct convolutions have groups");
  if (plan_.direct) check_direct(plan_);
  if (plan_.winograd) check_winograd(plan_);
  else require(!plan_.adjoint, "only winograd has an adjoint");
}

Status Conv::pack(ConvPack args, int threads, const Conv* gradient, void* gradient_packed) const {
  const int64_t outputs = args.transposed ? plan_.in_pixel() : plan_.out_pixel();
  const int64_t inputs = args.transposed ? plan_.out_channels : plan_.in_channels;
  if (plan_.adjoint || !args.weight || !args.packed || threads < 1 || args.inputs != inputs || args.outputs != outputs)
    return Status::kBadArgument;
  constexpr int64_t kMost = 4096;
  if (args.kernel_h < 1 || args.kernel_w < 1 || args.kernel_h > kMost || args.kernel_w > kMost)
    return Status::kBadArgument;
  for (const ConvSource& source : sources_)
    if (source.ky >= args.kernel_h || source.kx >= args.kernel_w) return Status::kBadArgument;
  if (gradient && args.transposed) return Status::kBadArgument;
  const bool along = gradient && gradient_packed && gradient->unit_ == unit_ &&
                     static_cast<int64_t>(taps_.size()) <= args.slices() &&
                     unit_->packs_along(plan_, gradient->plan_);
  if (along) args.gradient = &gradient->plan_, args.gradient_packed = gradient_packed;
  std::unique_ptr<float[]> scratch(new (std::nothrow) float[unit_->pack_floats(plan_, args, threads)]);
  if (!scratch) return Status::kOutOfMemory;
  unit_->pack(plan_, args, scratch.get(), threads);
  if (!gradient || along) return Status::kOk;
  args.transposed = true, args.packed = gradient_packed;
  return gradient->pack(args, threads, nullptr, nullptr);
}

Status Conv::run(const ConvRun& args, int threads) const {
  if (args.images < 0 || threads < 1) return Status::kBadArgument;
  if (args.images == 0) return Status::kOk;
  if (!args.x || !args.packed || !args.y || !args.workspace) return Status::kBadArgument;
  unit_->run(plan_, args, threads);
  return Status::kOk;
}

InputProgram::InputProgram(std::vector<Step> steps, int64_t channels, int64_t height, int64_t width,
                           const std::vector<int32_t>& rows, const std::vector<int32_t>& columns)
    : row_start_(starts(rows, height)), column_start_(starts(columns, width)), steps_(std::move(steps)) {
  require(0 < channels && channels <= kMostPixelChannels, "no channels, or too many");
  require(steps_.size() <= kMostPixelSteps, "too many steps");
  program_ = {channels, height, width, static_cast<int64_t>(rows.size()), static_cast<int64_t>(columns.size())};
  if (is_identity(rows, height) && is_identity(columns, width)) {
    program_.height = program_.out_height = 1;  // rows follow on each other
    program_.width = program_.out_width = height * width;
  } else {
    program_.row_start = row_start_.data();
    program_.column_start = column_start_.data();
  }
  for (const Step& step : steps_) {
    const bool clamp = step.kind == PixelStep::kClamp;
    require(step.values.size() == static_cast<size_t>(clamp ? 2 : channels),
            "a clamp needs two bounds, any other step one value per channel");
    require(!clamp || step.values[0] <= step.values[1], "a clamp's bounds must be in order");
    require(step.at_bounds == 0 || step.at_bounds == 1, "the derivative at a bound is 0 or 1");
    program_.step[program_.steps++] = {step.kind, step.values.data(), step.at_bounds == 1};
  }
}

Status twin_bn_forward_cpu(const TwinBnForward& args, int threads, const std::string& isa) {
  prefer_huge_pages(args.shape, args.dtype, {args.y});
  return run_halves(args, threads, isa, &Isa::forward);
}

Status twin_bn_backward_cpu(const TwinBnBackward& args, int threads, const std::string& isa) {
  prefer_huge_pages(args.shape, args.dtype, {args.dx, args.dresidual});
  return run_halves(args, threads, isa, &Isa::backward);
}

Status pointwise_cpu(const Pointwise& args, int threads, const std::string& isa) {
  const bool given = !args.pixels || (args.x && args.y);
  return run_pass(args, args.channels, args.pixels, given && (args.relu || !args.bits), threads, isa, &Isa::pointwise);
}

Status gather_cpu(const Gather& args, int threads, const std::string& isa) {
  const Pointwise& pass = args.pass;
  const bool given = !pass.pixels || (pass.y && pass.y != pass.other);
  bool right = given && pass.x == pass.y && (pass.relu || !pass.bits);
  int64_t channels = 0;
  for (const Part* part = args.parts; part < args.parts + args.count; ++part) {
    right = right && inside(*part, pass.channels) && (part->x != pass.y || !part->x);
    channels += part->channels;
  }
  return run_pass(args, pass.channels, pass.pixels, right && channels == pass.channels, threads, isa, &Isa::gather);
}

Status product_cpu(const Product& args, int threads, const std::string& isa) {
  const Gate& s = args.shape;
  const bool given = !s.images || (args.x && args.gate && args.y && args.y != args.gate);
  return run_pass(args, s.channels, s.images * s.pixels, given && s.pixels > 0 && (args.relu || !args.bits), threads,
                  isa, &Isa::product);
}

Status product_sum_cpu(const ProductSum& args, int threads, const std::string& isa) {
  const Gate& s = args.shape;
  const bool given = !s.images || (args.x && args.g && args.y && args.y != args.x && args.y != args.g);
  return run_pass(args, s.channels, s.images * s.pixels, given && s.pixels > 0, threads, isa, &Isa::product_sum);
}

Status activation_cpu(const Activation& args, int threads, const std::string& isa) {
  const bool given = !args.values || (args.x && args.y && args.slope && args.y != args.slope && args.x != args.slope);
  const bool known = 0 <= static_cast<int>(args.kind) && static_cast<int>(args.kind) < kActivations;
  return run_pass(args, 1, args.values, given && known, threads, isa, &Isa::activation);
}

Status layer_norm_cpu(const LayerNorm& args, int threads, const std::string& isa) {
  const bool given = !args.pixels || (args.x && args.y && args.moments);
  return run_pass(args, args.channels, args.pixels, given && args.eps >= 0, threads, isa, &Isa::layer_norm);
}

Status layer_norm_backward_cpu(const LayerNormBackward& args, int threads, const std::string& isa) {
  const bool given = !args.pixels || (args.g && args.x && args.moments && args.dx && args.dx != args.x);
  return run_pass(args, args.channels, args.pixels, given, threads, isa, &Isa::layer_norm_backward);
}

// Windows overlap, so that a result cannot take the place of what it is made from.
Status pool_forward_cpu(const PoolForward& args, int threads, const std::string& isa) {
  const Windows& w = args.windows;
  const bool given = !w.images || (args.x && args.y && args.x != args.y);
  return run_pass(args, w.channels, w.pixels(), given && valid(w, args.max), threads, isa, &Isa::pool_forward);
}

Status pool_backward_cpu(const PoolBackward& args, int threads, const std::string& isa) {
  const Windows& w = args.windows;
  const bool given = !w.images || (args.g && args.dx && args.g != args.dx && (args.argmax || !args.max));
  return run_pass(args, w.channels, w.pixels(), given && valid(w, args.max), threads, isa, &Isa::pool_backward);
}

Status pixels_cpu(const PixelCall& args, int threads, const std::string& isa) {
  const PixelProgram& p = args.program;
  const bool prepare = args.pass == PixelPass::kPrepare, step = args.pass == PixelPass::kStep;
  const bool given = args.x && (prepare ? args.out != nullptr : args.gradient && args.result) && (args.clean || !step);
  const bool numbers = args.alpha == args.alpha && args.eps == args.eps;
  const int64_t pixels = args.images * p.out_height * p.out_width;
  return run_pass(args, p.channels, pixels, (given || !args.images) && numbers, threads, isa, &Isa::pixels);
}

const char* cpu_isa(int i) {
  for (const Isa* isa = isas(); isa->name; ++isa)
    if (isa->available && i-- == 0) return isa->name;
  return nullptr;
}

}  // namespace twins_fast
