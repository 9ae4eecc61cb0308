// How blocks divide a shape: tiles of channels, and slabs of the values of one half in a tile.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/memory.cuh"
#include "twin_bn.h"

namespace twins_fast {
namespace {

constexpr int kThreads = 512;
constexpr int kMaxGroups = 32;                 // groups of a row in one tile
constexpr int kMaxWidth = kMaxGroups * kGroup;  // channels of a tile

// The images of one half.
struct Half {
  int64_t first;  // image
  int64_t units;  // per tile: pixels, each with the groups of a tile; or the groups of a channel's pixels

  __host__ __device__ Half(const Shape& s, int64_t begin, int64_t end)
      : first(begin), units((end - begin) * (s.channels_last ? s.pixels : s.bytes_of_bits())) {}
};

struct Range {
  int begin, end;
};

// Slab `slab` of `slabs`.
__host__ __device__ inline Range share(int64_t units, int slab, int slabs) {
  return {static_cast<int>(units * slab / slabs), static_cast<int>(units * (slab + 1) / slabs)};
}

// How a block sees a shape. In a channels-last tile neighbouring threads hold neighbouring groups of channels
// and each thread keeps its channels; in a contiguous one all threads share the tile's one channel.
template <bool kLast>
struct Tiling {
  static constexpr int kOwn = kLast ? kGroup : 1;  // channels of a thread
  int tiles, groups;                                // groups: of a tile, side by side

  __host__ __device__ explicit Tiling(const Shape& s) {
    const int64_t all = s.bytes_of_bits();
    tiles = static_cast<int>(kLast ? (all + kMaxGroups - 1) / kMaxGroups : s.channels);
    groups = static_cast<int>(kLast ? (all + tiles - 1) / tiles : 1);
  }
  __host__ __device__ int lanes() const { return kThreads / groups; }
  __host__ __device__ int width() const { return kLast ? groups * kGroup : 1; }  // channels
};

// One thread in one tile. kWhole: rows are whole groups, so that bits are packed without gaps.
template <bool kLast, bool kWhole>
struct Worker {
  const Shape& shape;
  const Tiling<kLast> tiling;
  const int tile;
  const int lanes = tiling.lanes();
  const int lane = static_cast<int>(threadIdx.x) / tiling.groups;
  const int column = tile * tiling.groups + static_cast<int>(threadIdx.x) % tiling.groups;  // group in a row
  const bool active = lane < lanes && (!kLast || column < shape.bytes_of_bits());

  __device__ Worker(const Shape& shape, int tile) : shape(shape), tiling(shape), tile(tile) {}

  // Channel of my i-th accumulator; values past the last channel are never used.
  __device__ int64_t channel(int i) const {
    const int64_t c = kLast ? int64_t{column} * kGroup + i : tile;
    return c < shape.channels ? c : shape.channels - 1;
  }

  struct Place {
    int64_t offset, gapped_byte;
    int gapped_count;

    __device__ int64_t byte() const { return kWhole ? offset / kGroup : gapped_byte; }
    __device__ int count() const { return kWhole ? kGroup : gapped_count; }
  };

  __device__ Place place(const Half& half, int unit) const {
    if (kLast) {
      const int64_t row = half.first * shape.pixels + unit;
      const int64_t left = shape.channels - int64_t{column} * kGroup;
      return {row * shape.channels + column * kGroup, row * shape.bytes_of_bits() + column,
              static_cast<int>(left < kGroup ? left : kGroup)};
    }
    const unsigned groups = static_cast<unsigned>(shape.bytes_of_bits());
    const unsigned image = unit / groups, group = unit % groups;
    const int64_t row = (half.first + image) * shape.channels + tile, column = int64_t{group} * kGroup;
    const int64_t left = shape.pixels - column;
    return {row * shape.pixels + column, row * groups + group, static_cast<int>(left < kGroup ? left : kGroup)};
  }

  // Values per channel in units [0, unit).
  __device__ int64_t values_before(int64_t unit) const {
    if (kLast) return unit;
    const int64_t groups = shape.bytes_of_bits(), rest = unit % groups * kGroup;
    return unit / groups * shape.pixels + (rest < shape.pixels ? rest : shape.pixels);
  }

  // Calls use(place, load(place)) over my units of `range`, kAhead loads ahead of their use.
  template <int kAhead, bool kBackwards, class Load, class UseIt>
  __device__ void walk(const Half& half, Range range, Load&& load, UseIt&& use) const {
    if (!active) return;
    using Loaded = decltype(load(Place{}));
#pragma unroll 1
    for (int unit = range.begin + lane; unit < range.end; unit += kAhead * lanes) {
      Place places[kAhead];
      Loaded loaded[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int u = unit + i * lanes;
        if (u >= range.end) continue;
        places[i] = place(half, kBackwards ? range.end - 1 - (u - range.begin) : u);
        loaded[i] = load(places[i]);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (unit + i * lanes < range.end) use(places[i], loaded[i]);
    }
  }
};

}  // namespace
}  // namespace twins_fast
