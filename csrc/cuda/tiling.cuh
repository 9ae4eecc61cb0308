// How blocks divide a shape: tiles of channels, and slabs of the values of one half in a tile.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx.cuh"
#include "twin_bn.h"

namespace twins_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kGroup = 8;       // neighbouring values that one thread handles: one byte of bits
constexpr int kMaxGroups = 32;  // groups of a row in one tile

struct Range {
  int begin, end;

  __host__ __device__ int size() const { return end - begin; }
};

// The images of one half, in slabs of equally many units; the last ones have fewer or none.
struct Half {
  int64_t first;  // image
  int units;      // per tile: pixels, each with the groups of a tile; or the groups of a channel's pixels
  int slab_units;

  __host__ __device__ Half(const Shape& s, bool second, int slabs)
      : first(second ? s.split : 0),
        units(static_cast<int>(s.images_of(second) * (s.channels_last ? s.pixels : s.bytes_of_bits()))),
        slab_units((units + slabs - 1) / slabs) {}

  __host__ __device__ Range slab(int index) const {
    const int begin = index * slab_units, end = begin + slab_units;
    return {begin < units ? begin : units, end < units ? end : units};
  }
};

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
};

struct Nothing {
  template <class... Ignored>
  __device__ void operator()(const Ignored&...) const {}
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

  // Where a group is; of its bits, without kWhole, the byte is counted apart.
  struct Place {
    int64_t offset, gapped_byte;
    int group, gapped_count;

    __device__ int64_t byte() const { return kWhole ? static_cast<uint64_t>(offset) / kGroup : gapped_byte; }
    __device__ int count() const { return kWhole ? kGroup : gapped_count; }
  };

  __device__ int count(int group) const {
    const int64_t left = shape.run() - int64_t{group} * kGroup;
    return static_cast<int>(left < kGroup ? left : kGroup);
  }

  __device__ Place place(const Half& half, int unit) const {
    const int groups = static_cast<int>(shape.bytes_of_bits()), image = kLast ? 0 : unit / groups;
    const int group = kLast ? column : unit - image * groups;
    const int64_t row = half.first * shape.rows_per_image() + (kLast ? unit : image * shape.channels + tile);
    return {row * shape.run() + int64_t{group} * kGroup, row * groups + group, group, count(group)};
  }

  // From the place of a unit to that of the unit `lanes` units on, or back (sign -1), without a division.
  struct Stride {
    int64_t offset, byte, row_offset, row_byte;  // row_: in addition, where this leaves the row
    int group, groups;

    __device__ Stride(const Worker& worker, int sign) {
      const Shape& s = worker.shape;
      const int of_row = static_cast<int>(s.bytes_of_bits());
      const int rows = sign * (kLast ? worker.lanes : worker.lanes / of_row);
      const int64_t row = kLast ? 1 : s.channels;  // from one of the tile to the next
      group = kLast ? 0 : sign * worker.lanes - rows * of_row;
      groups = sign * of_row;
      offset = rows * row * s.run() + int64_t{group} * kGroup;
      byte = rows * row * of_row + group;
      row_offset = sign * row * s.run() - int64_t{groups} * kGroup;
      row_byte = (row - 1) * groups;
      keep_in_register(offset);
      keep_in_register(byte);
    }
  };

  __device__ void move(Place& at, const Stride& by) const {
    at.offset += by.offset;
    at.gapped_byte += by.byte;
    if (kLast) return;
    at.group += by.group;
    if (by.groups < 0 ? at.group < 0 : at.group >= by.groups) {
      at.group -= by.groups;
      at.offset += by.row_offset;
      at.gapped_byte += by.row_byte;
    }
    at.gapped_count = count(at.group);
  }

  // Calls fetch(slot, place, left) and, while the next ones are on their way, use(slot, place, left) for my units of
  // `range`, the last first if kBackwards; before all that, begin(slot, place) for the first. left: units of the range
  // from this one on, in the order of the walk.
  template <bool kBackwards, class Flight, class Fetch, class UseIt, class Begin = Nothing>
  __device__ void walk(const Flight& flight, const Half& half, Range range, Fetch&& fetch, UseIt&& use,
                       Begin&& begin = {}) const {
    if (!active) return;
    const Stride stride(*this, kBackwards ? -1 : 1);
    Place now = place(half, kBackwards ? range.end - 1 - lane : range.begin + lane), ahead = now;
    const auto start = [&](int slot, int left) {
      if (left > 0) fetch(slot, ahead, left);
      flight.commit();
      move(ahead, stride);
    };
    int left = range.size() - lane;
#pragma unroll 1
    for (int slot = 0; slot < Flight::kSlots; ++slot) start(slot, left - slot * lanes);
    if (left > 0) {
      flight.wait();
      begin(0, now);
    }
#pragma unroll 1
    for (int slot = 0; left > 0; left -= lanes) {
      flight.wait();
      use(slot, now, left);
      move(now, stride);
      start(slot, left - Flight::kSlots * lanes);
      slot = slot + 1 < Flight::kSlots ? slot + 1 : 0;
    }
  }
};

}  // namespace
}  // namespace twins_fast
