"""The merge of the slabs' partial results in csrc/cuda/merge.cuh, alone, on the emulated device."""

import ctypes
import shlex
import subprocess
import sys

import pytest
import torch

from tests.cuda_emulator.build import CUDA_FLAGS, CXX, HERE, LINK_FLAGS

pytestmark = pytest.mark.skipif(CXX is None or not sys.platform.startswith("linux"), reason="needs g++ on Linux")

KERNELS = r"""
#include "cuda/merge.cuh"

using namespace twins_fast;

template <class Kind>
__global__ void merge(Partials partials, float* totals) {
  __shared__ Memory memory;
  const Kind total = merge_slabs<Kind>(memory, partials, 0, blockIdx.x);
  const int64_t c = merged_channel(partials, blockIdx.x);
  for (int k = 0; k < Kind::kVectors && c >= 0; ++k) totals[k * partials.channels + c] = total.v[k];
}

extern "C" int run_merge(bool moments, float* values, int slabs, int channels, float* totals) {
  Partials partials{values, slabs, channels};
  void* arguments[] = {&partials, &totals};
  const dim3 blocks((channels + kMergeWidth - 1) / kMergeWidth);
  return moments ? cudaLaunchKernel(merge<Moments>, blocks, dim3(kThreads), arguments)
                 : cudaLaunchKernel(merge<Sums>, blocks, dim3(kThreads), arguments);
}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    (folder / "merge.cu").write_text(KERNELS)
    source = HERE.parents[1] / "csrc"
    subprocess.run(
        [CXX, *shlex.split(CUDA_FLAGS), f"-I{source}", f"-I{source}/include", "-c", "merge.cu"], cwd=folder, check=True
    )
    subprocess.run([CXX, "merge.o", *shlex.split(LINK_FLAGS), "-o", "merge.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "merge.so"))

    def run(partials):
        vectors, slabs, channels = partials.shape
        totals = torch.full((vectors, channels), torch.nan)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (partials, totals)]
        assert library.run_merge(vectors == 3, pointers[0], slabs, channels, pointers[1]) == 0
        return totals

    return run


# Fewer slabs than lanes, as many, more, more than are loaded at once; channels that leave a part of a block idle.
@pytest.mark.parametrize("slabs", [1, 5, 64, 65, 513, 1024])
@pytest.mark.parametrize("channels", [1, 4, 11])
def test_merge_against_float64(slabs, channels, run):
    torch.manual_seed(slabs)
    sums = torch.randn(2, slabs, channels)
    size = sums.abs().sum(1).double()
    assert ((run(sums).double() - sums.double().sum(1)).abs() <= 1e-6 * size).all()

    count = torch.randint(0, 50, (slabs, 1)).expand(slabs, channels).clone()
    count[0] = 7
    count[-3:-1] = 0  # some slabs have no rows: what they hold does not count
    mean, deviations = 100 + torch.randn(slabs, channels), count * torch.rand(slabs, channels)
    moments = torch.stack([count.float(), mean, deviations])
    got = run(moments).double()
    n, mean, deviations = moments.double().unbind()
    total = n.sum(0)
    expected_mean = (n * mean).sum(0) / total
    expected = (deviations + n * (mean - expected_mean).square()).sum(0)
    assert got[0].equal(total)
    torch.testing.assert_close(got[1], expected_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(got[2], expected, rtol=1e-5, atol=0)


def test_a_constant_channel_has_no_deviations(run):
    slabs = 200
    moments = torch.stack(
        [torch.randint(0, 1000, (slabs, 3)).float(), torch.full((slabs, 3), 12345.678), torch.zeros(slabs, 3)]
    )
    _, mean, deviations = run(moments)
    assert mean.equal(moments[1, 0]) and not deviations.any()
