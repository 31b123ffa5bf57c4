// Where things are in shared memory, and how wgmma and TMA are told. Plain C++, too.
//
// Rows of kDim channels lie in slabs of 64 channels, 128 bytes a row. Within a slab, chunks of 16
// bytes are exchanged by the row's number (the 128-byte swizzle, as in ../layout.h). So a slab is
// a pile of groups of 8 rows, 1,024 bytes each, and starts at a multiple of that.
#pragma once

#include <cstdint>

#include "../layout.h"

namespace cac_fast::cuda::sm90 {

constexpr int kSlabChannels = 64;
constexpr int kSlabRow = 128;
constexpr int kGroup = 8 * kSlabRow;
// What one wgmma multiplies over.
constexpr int kDepth = 16;

// The descriptor of a matrix of 16 bits with the 128-byte swizzle. `leading` and `stride`: bytes.
CAC_FAST_BOTH constexpr uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         1ULL << 62;
}

// Rows of a slab, multiplied over their channels (K-major): groups of rows follow each other.
// `leading` means nothing here; 16 is what CUTLASS writes.
CAC_FAST_BOTH constexpr uint64_t over_channels(uint32_t slab) {
  return descriptor(slab, 16, kGroup);
}

// Slabs of `rows` rows, multiplied over their rows (MN-major): the next 64 channels are a slab
// away, the next 8 rows a group.
CAC_FAST_BOTH constexpr uint64_t over_rows(uint32_t slabs, int rows) {
  return descriptor(slabs, static_cast<uint32_t>(rows) * kSlabRow, kGroup);
}

// A descriptor moved on by `bytes`.
CAC_FAST_BOTH constexpr uint64_t moved(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

// From the start of `rows` rows to their channels from step * kDepth on.
CAC_FAST_BOTH constexpr int channels_step(int step, int rows) {
  constexpr int kSteps = kSlabChannels / kDepth;
  return step / kSteps * (rows * kSlabRow) + step % kSteps * (kDepth * 2);
}

// To their rows from step * kDepth on.
CAC_FAST_BOTH constexpr int rows_step(int step) { return step * (kDepth * kSlabRow); }

// A matrix of features in global memory, and the box of it that one copy brings: `rows` rows of a
// slab.
struct Boxes {
  const void* features;
  uint64_t channels, count;
  uint64_t pitch;  // bytes from row to row
  uint32_t box_channels, box_rows;
};

inline Boxes boxes_of(const void* features, int64_t count, int padded, int rows) {
  return {
      features,
      static_cast<uint64_t>(padded),
      static_cast<uint64_t>(count),
      static_cast<uint64_t>(padded) * 2,
      kSlabChannels,
      static_cast<uint32_t>(rows)};
}

}  // namespace cac_fast::cuda::sm90
