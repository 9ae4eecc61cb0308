// Work in equal parts for a team of threads.
#pragma once

#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace twins_fast {
namespace {  // as in simd.h

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

inline Range share(int64_t begin, int64_t end, int thread, int team) {
  const int64_t n = end - begin;
  return {begin + n * thread / team, begin + n * (thread + 1) / team};
}

template <class F>
void in_parallel(int threads, F&& f) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  f(omp_get_thread_num(), omp_get_num_threads());
#else
  f(0, 1);
#endif
}

}  // namespace
}  // namespace twins_fast
