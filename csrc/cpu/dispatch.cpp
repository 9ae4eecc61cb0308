// Picks the unit for this CPU, and gives it working memory.
#include <initializer_list>
#include <memory>
#include <new>
#include <string>

#include "cpu/kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace twins_fast {
namespace {

struct Isa {
  const char* name;
  bool available;
  void (*forward)(const TwinBnForward&, const Scratch&, int);
  void (*backward)(const TwinBnBackward&, const Scratch&, int);
};

#ifdef TWINS_FAST_HAS_avx512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

const Isa* isas() {
  static const Isa table[] = {
#ifdef TWINS_FAST_HAS_avx512_bf16
      {"avx512_bf16", has_avx512() && __builtin_cpu_supports("avx512bf16"), avx512_bf16::forward,
       avx512_bf16::backward},
#endif
#ifdef TWINS_FAST_HAS_avx512
      {"avx512", has_avx512(), avx512::forward, avx512::backward},
#endif
#ifdef TWINS_FAST_HAS_avx2  // no processor has it without F16C, which old compilers cannot ask for
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::forward, avx2::backward},
#endif
      {"baseline", true, baseline::forward, baseline::backward},
      {nullptr, false, nullptr, nullptr},
  };
  return table;
}

const Isa* find(const std::string& name) {
  for (const Isa* isa = isas(); isa->name; ++isa)
    if (isa->available && (name.empty() || name == isa->name)) return isa;
  return nullptr;
}

// Fresh memory of this size is faulted in page by page, which takes longer than all arithmetic on it. Asking for
// huge pages makes that 512 times fewer; memory that is already there stays as it is.
void prefer_huge_pages(const Shape& shape, DType dtype, std::initializer_list<void*> results) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const int64_t bytes = shape.rows() * shape.run() * (dtype == DType::kFloat32 ? 4 : 2);
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

}  // namespace

Status twin_bn_forward_cpu(const TwinBnForward& args, int threads, const std::string& isa) {
  prefer_huge_pages(args.shape, args.dtype, {args.y});
  return run(args, threads, isa, &Isa::forward);
}

Status twin_bn_backward_cpu(const TwinBnBackward& args, int threads, const std::string& isa) {
  prefer_huge_pages(args.shape, args.dtype, {args.dx, args.dresidual});
  return run(args, threads, isa, &Isa::backward);
}

const char* cpu_isa(int i) {
  for (const Isa* isa = isas(); isa->name; ++isa)
    if (isa->available && i-- == 0) return isa->name;
  return nullptr;
}

}  // namespace twins_fast
