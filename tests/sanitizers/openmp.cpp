// The calls that g++ makes of #pragma omp, with threads and barriers that the thread sanitizer knows. Those of libgomp
// it does not, and would see a race wherever one orders two accesses.
#include <pthread.h>

#include <thread>
#include <vector>

#pragma GCC visibility push(hidden)  // for the module that this is linked into, and not for PyTorch

namespace {

struct Team {
  pthread_barrier_t barrier;
  int threads;
};
thread_local Team* team = nullptr;
thread_local int number = 0;

}  // namespace

extern "C" {

void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  Team own{{}, static_cast<int>(threads)};
  pthread_barrier_init(&own.barrier, nullptr, threads);
  std::vector<std::thread> members;
  for (unsigned i = 0; i < threads; ++i)
    members.emplace_back([=, &own] {
      team = &own;
      number = static_cast<int>(i);
      work(data);
    });
  for (std::thread& member : members) member.join();
  pthread_barrier_destroy(&own.barrier);
}

void GOMP_barrier() { pthread_barrier_wait(&team->barrier); }

int omp_get_thread_num() { return number; }

int omp_get_num_threads() { return team->threads; }
}
