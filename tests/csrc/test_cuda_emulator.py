"""The emulator of CUDA that the other tests run csrc/cuda on."""

import ctypes
import shlex
import subprocess
import sys

import pytest
import torch

from tests.cuda_emulator.build import CUDA_FLAGS, CXX, LINK_FLAGS
from twins_fast.ops.native import dtype_name

pytestmark = pytest.mark.skipif(CXX is None or not sys.platform.startswith("linux"), reason="needs g++ on Linux")

KERNELS = r"""
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/ptx.cuh"

namespace cg = cooperative_groups;

template <class T>
__global__ void __launch_bounds__(512) tree(const T* in, T* out, bool barriers) {
  __shared__ T shared[512];
  const int me = threadIdx.x;
  shared[me] = in[blockIdx.x * blockDim.x + me];
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (barriers) __syncthreads();
    if (me < half) shared[me] += shared[me + half];
  }
  if (me == 0) out[blockIdx.x] = shared[0];
}

__global__ void shuffles(const float* in, float* xor_sums, double* down_sums, unsigned* ballots) {
  float v = in[threadIdx.x];
  ballots[threadIdx.x] = __ballot_sync(~0u, v > 0);
  double d = v;
  for (int i = 16; i > 0; i /= 2) {
    v += __shfl_xor_sync(~0u, v, i);
    d += __shfl_down_sync(~0u, d, i);
  }
  xor_sums[threadIdx.x] = v;
  down_sums[threadIdx.x] = d;
}

// Every block needs the sums of all, twice, so that the barrier is used again.
__global__ void totals(const float* in, float* sums, float* out) {
  __shared__ float shared[16];
  const cg::grid_group grid = cg::this_grid();
  const unsigned lane = threadIdx.x % 32, blocks = gridDim.x;
  float v = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (int round = 0; round < 2; ++round) {
    for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(~0u, v, i);
    if (lane == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x == 0) {
      float sum = 0;
      for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += shared[i];
      __stcg(sums + round * blocks + blockIdx.x, sum);
    }
    auto token = grid.barrier_arrive();
    const float mine = blockIdx.x;  // work that does not need the others
    grid.barrier_wait(std::move(token));
    v = 0;
    for (unsigned i = 0; i < blocks; ++i) v += __ldcg(sums + round * blocks + i);
    v -= mine;
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = v;
}

__global__ void one_block_leaves() {
  if (blockIdx.x > 0) cg::this_grid().sync();
}

__global__ void shared_garbage(float* out) {
  __shared__ float shared[32];
  out[threadIdx.x] = shared[threadIdx.x];
  __syncthreads();
  shared[threadIdx.x] = 1;
}

__global__ void past_shared(float* out) {
  __shared__ float shared[32];
  shared[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void copy_words(const uint4* in, uint4* out, bool hinted) {
  if (hinted) __stcs(out, __ldg(in));
  else *out = *in;
}

// Copies two words one after the other, and looks at both after waiting for `waits` of two commits.
__global__ void copies(const unsigned* in, unsigned* out, int waits) {
  __shared__ unsigned words[2];
  const auto at = twins_fast::shared_address(words);
  for (int i = 0; i < 2; ++i) {
    words[i] = 0;
    twins_fast::copy_word(at + 4 * i, in + i, 4 - 2 * i, twins_fast::evict_first());
    twins_fast::commit_copies();
  }
  if (waits == 1) twins_fast::wait_for_copies<1>();
  if (waits == 2) twins_fast::wait_for_copies<0>();
  twins_fast::store_hinted(out, words[0], twins_fast::evict_normal());
  twins_fast::store_hinted(out + 1, words[1], twins_fast::evict_first());
  if (waits < 2 && out[2]) twins_fast::wait_for_copies<0>();
}

__global__ void divergent(int kind) {
  if (threadIdx.x < 5) {
    if (kind == 0) __syncwarp();
    if (kind == 1) __syncthreads();
    return;
  }
  __syncthreads();
}

template <class T>
__global__ void round_trip(const float* in, T* narrow, float* wide, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x) {
    narrow[i] = static_cast<T>(in[i]);
    wide[i] = static_cast<float>(narrow[i]);
  }
}

template <class... A>
cudaError_t run(bool together, void (*kernel)(A...), int blocks, int threads, A... arguments) {
  void* list[] = {&arguments..., nullptr};
  return together ? cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(threads), list, 0, 0)
                  : cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), list, 0, 0);
}

extern "C" {
int run_tree(int blocks, int threads, const float* in, float* out, bool barriers) {
  return run(false, tree<float>, blocks, threads, in, out, barriers);
}
int run_shuffles(int threads, const float* in, float* a, double* b, unsigned* c) {
  return run(false, shuffles, 1, threads, in, a, b, c);
}
int run_totals(bool together, int blocks, int threads, const float* in, float* sums, float* out) {
  return run(together, totals, blocks, threads, in, sums, out);
}
int run_one_block_leaves() { return run(true, one_block_leaves, 3, 32); }
int run_shared_garbage(float* out) { return run(false, shared_garbage, 2, 32, out); }
int run_past_shared(float* out) { return run(false, past_shared, 1, 32, out); }
int run_copy_words(const char* in, char* out, bool hinted) {
  return run(false, copy_words, 1, 1, reinterpret_cast<const uint4*>(in), reinterpret_cast<uint4*>(out), hinted);
}
int run_copies(const unsigned* in, unsigned* out, int waits) { return run(false, copies, 1, 1, in, out, waits); }
int run_divergent(int kind) { return run(false, divergent, 2, 64, kind); }
int run_bfloat16(const float* in, __nv_bfloat16* narrow, float* wide, int n) {
  return run(false, round_trip<__nv_bfloat16>, 8, 256, in, narrow, wide, n);
}
int run_float16(const float* in, __half* narrow, float* wide, int n) {
  return run(false, round_trip<__half>, 8, 256, in, narrow, wide, n);
}
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
int last_error() { return cudaGetLastError(); }
}
"""
INVALID_CONFIGURATION, TOO_LARGE, NOT_SUPPORTED = 9, 720, 801


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_emulator")
    (folder / "kernels.cu").write_text(KERNELS)
    flags = [*shlex.split(CUDA_FLAGS), "-Wall", "-Wextra", "-Werror"]
    subprocess.run([CXX, *flags, "-c", "kernels.cu", "-o", "kernels.o"], cwd=folder, check=True)
    subprocess.run([CXX, "kernels.o", *shlex.split(LINK_FLAGS), "-o", "kernels.so"], cwd=folder, check=True)
    return folder / "kernels.so"


@pytest.fixture
def cuda(library):
    return ctypes.CDLL(str(library))


def pointers(*tensors):
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


def output_of_crash(library, code):
    """What a process says that runs ``code`` on the library and is aborted for it."""
    prelude = f"import ctypes; cuda = ctypes.CDLL({str(library)!r}); memory = ctypes.create_string_buffer(4096);"
    prelude += "at = lambda offset: ctypes.c_void_p((ctypes.addressof(memory) + 15) // 16 * 16 + offset);"
    run = subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=60)
    assert run.returncode != 0
    return run.stderr


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_tree_reduction(cuda, monkeypatch, seed):
    monkeypatch.setenv("CUDA_EMULATOR_SEED", seed)
    values, sums, wrong = torch.arange(5 * 256.0).view(5, 256), torch.zeros(5), torch.zeros(5)
    assert cuda.run_tree(5, 256, *pointers(values, sums), True) == 0
    assert sums.equal(values.sum(1))
    # Some thread reads what another has not written yet.
    assert cuda.run_tree(5, 256, *pointers(values, wrong), False) == 0
    assert not wrong.equal(sums)


def test_warp_operations(cuda):
    values = torch.randn(64)
    xor_sums, down_sums, ballots = torch.zeros(64), torch.zeros(64, dtype=torch.double), torch.zeros(64).int()
    assert cuda.run_shuffles(64, *pointers(values, xor_sums, down_sums, ballots)) == 0
    expected = values.double().view(2, 32).sum(1)
    torch.testing.assert_close(xor_sums.double().view(2, 32), expected[:, None].expand(2, 32), atol=1e-5, rtol=0)
    torch.testing.assert_close(down_sums[::32], expected)
    bits = (values.view(2, 32) > 0).long() << torch.arange(32)
    assert (ballots.view(2, 32).long() & 0xFFFFFFFF).equal(bits.sum(1, keepdim=True).expand(2, 32))


@pytest.mark.parametrize("seed", ["0", "1"])
def test_grid_barrier(cuda, monkeypatch, seed):
    monkeypatch.setenv("CUDA_EMULATOR_SEED", seed)
    values, sums, out = torch.arange(6 * 512.0).view(6, 512) % 7, torch.zeros(2, 6), torch.zeros(6)
    assert cuda.run_totals(True, 6, 512, *pointers(values, sums, out)) == 0
    blocks = torch.arange(6)
    first = values.sum() - blocks
    assert sums[0].equal(values.sum(1)) and sums[1].equal(first * 512)
    assert out.equal(first.sum() * 512 - blocks)


def test_limits_of_a_launch(cuda, monkeypatch):
    cuda.error_text.restype = ctypes.c_char_p
    tensors = torch.zeros(7 * 32), torch.zeros(14), torch.zeros(7)
    memory = pointers(*tensors)
    assert cuda.run_totals(True, 7, 32, *memory) == TOO_LARGE == cuda.last_error()
    assert cuda.error_text(TOO_LARGE) == b"too many blocks in cooperative launch"
    assert cuda.last_error() == 0
    monkeypatch.setenv("CUDA_EMULATOR_SMS", "7")
    monkeypatch.setenv("CUDA_EMULATOR_BLOCKS_PER_SM", "1")
    assert cuda.run_totals(True, 7, 32, *memory) == 0
    assert cuda.run_totals(True, 1, 1056, *memory) == INVALID_CONFIGURATION
    assert cuda.run_tree(0, 32, *memory[:2], True) == INVALID_CONFIGURATION
    monkeypatch.setenv("CUDA_EMULATOR_COOPERATIVE", "0")
    assert cuda.run_totals(True, 1, 32, *memory) == NOT_SUPPORTED


def test_shared_memory_starts_as_garbage(cuda):
    values = torch.zeros(32)
    assert cuda.run_shared_garbage(*pointers(values)) == 0
    assert values.isnan().all()


@pytest.mark.parametrize("hinted", [True, False])
def test_words_are_aligned(cuda, library, hinted):
    words = torch.arange(8, dtype=torch.int32)
    start = -words.data_ptr() // 4 % 4
    source, target = words[start : start + 4], torch.zeros(8, dtype=torch.int32)
    target = target[-target.data_ptr() // 4 % 4 :][:4]
    assert cuda.run_copy_words(*pointers(source, target), hinted) == 0
    assert target.equal(source)
    said = output_of_crash(library, f"cuda.run_copy_words(at(8), at(64), {hinted})")
    assert ("misaligned access of 16 bytes by block (0, 0, 0), thread (0, 0, 0)" if hinted else "misaligned") in said


def test_copies_arrive_when_they_are_waited_for(cuda, library):
    words, seen = torch.tensor([7, 0x50009], dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    for waits, expected in enumerate(([-1, -1], [7, -1], [7, 9])):  # of the second word, two bytes are wanted
        assert cuda.run_copies(*pointers(words, seen), waits) == 0
        assert seen[:2].tolist() == expected
    said = output_of_crash(library, "cuda.run_copies(at(0), at(64), 1)")
    assert "thread (0, 0, 0) has exited before its copies to shared memory have arrived" in said
    said = output_of_crash(library, "cuda.run_copies(at(2), at(64), 2)")
    assert "misaligned access of 4 bytes" in said


def test_accesses_and_launches_are_counted(cuda):
    words, seen = torch.zeros(2, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    loads, stores = torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4, 8, dtype=torch.uint8)
    before = cuda.cuda_emulator_launches(False), cuda.cuda_emulator_launches(True)
    for tensor, counts in (words, loads), (seen, stores):
        cuda.cuda_emulator_watch(*pointers(tensor), ctypes.c_size_t(8), *pointers(counts))
    for _ in range(2):
        assert cuda.run_copies(*pointers(words, seen), 2) == 0
    cuda.cuda_emulator_watch(None, 0, None)
    assert cuda.run_copies(*pointers(words, seen), 2) == 0
    none, twice, half = [0] * 8, [2] * 4, [0] * 4
    assert loads.tolist() == [none, [*twice, 2, 2, 0, 0], none, none]
    assert stores.tolist() == [none, none, [*twice, *half], [*half, *twice]]
    assert (cuda.cuda_emulator_launches(False), cuda.cuda_emulator_launches(True)) == (before[0] + 3, before[1])


def test_an_index_past_shared_memory(library):
    assert "index 32 out of bounds" in output_of_crash(library, "cuda.run_past_shared(at(0))")


def test_barriers_that_not_all_threads_reach(cuda, library):
    said = output_of_crash(library, "cuda.run_divergent(0)")
    assert "5 at __syncwarp from thread (0, 0, 0) on, 59 at __syncthreads" in said
    said = output_of_crash(library, "cuda.run_divergent(1)")
    assert "deadlock in block" in said and "of 64 threads: 5 at __syncthreads (line" in said
    assert cuda.run_divergent(2) == 0  # threads that have exited do not count
    said = output_of_crash(library, "cuda.run_one_block_leaves()")
    assert "of 3 waits at a grid barrier to which another block, now ended, never came" in said
    said = output_of_crash(library, "cuda.run_totals(False, 1, 32, at(0), at(0), at(0))")
    assert "needs a cooperative launch" in said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding(cuda, dtype):
    # Every 16-bit value, the ties between neighbours, and the floats next to both; then random bits.
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float().view(torch.int32)
    half_step = 1 << (15 if dtype == torch.bfloat16 else 12)
    near = [every + step + nudge for step in (0, half_step) for nudge in (-1, 0, 1)]
    small = torch.arange(2**12).float() * 2.0**-26  # ties of subnormal halves
    random = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    values = torch.cat([*near, small.view(torch.int32), (-small).view(torch.int32), random.int()]).view(torch.float32)
    narrow, wide = torch.empty_like(values, dtype=dtype), torch.empty_like(values)
    assert getattr(cuda, f"run_{dtype_name(dtype)}")(*pointers(values, narrow, wide), len(values)) == 0
    nan = values.isnan()
    assert nan.any() and wide[nan].isnan().all()
    expected = values[~nan].to(dtype)
    assert narrow[~nan].view(torch.int16).equal(expected.view(torch.int16))
    assert wide[~nan].view(torch.int32).equal(expected.float().view(torch.int32))
