// dc_loss_partial: one program's share of the blocks. Include device.cuh first.
//
// A program walks over the tiles of anchors its share touches, and over its blocks of negatives of
// each. A tile's anchors stay in shared memory, its sums in registers; blocks pass through a ring
// of kStages buffers that the copy engine fills ahead (here 3):
//
//     buffer 0   block 0 ======        block 3 ======        block 6 ...
//     buffer 1          block 1 ======        block 4 ======
//     buffer 2                 block 2 ======        block 5 ======
//     compute    wait  block 0 block 1 block 2 block 3 block 4 ...
//                      ^ one barrier a block: its copies are there for all threads, and all have
//                        done with the block before it, so that its buffer can be filled again
//
// Computing on a block, for 16 x kRows anchors a warp, all in registers:
//
//     logits  = anchors . negatives    first product;  both from shared memory
//     weights = 2^(logits * scale)     -inf where the mask says so; with offsets, minus the offset
//     total  += sum of weights         each lane on its own until the tile ends
//     sums   += weights . negatives    second product; the same negatives, read transposed
#pragma once

#include <cstdint>

#include "launch.h"
#include "layout.h"
#include "rows.cuh"

namespace cac_fast::cuda {

// A kernel's sizes: products of a warp, how many warps, buffers, and programs a multiprocessor.
template <class Unit_, int kWarps_, int kStages_, int kResident_>
struct Shape {
  using Unit = Unit_;
  using Element = typename Unit::Element;
  static constexpr int kDim = Unit::kDim, kBlock = Unit::kBlock;
  static constexpr int kWarps = kWarps_, kStages = kStages_, kResident = kResident_;
  static constexpr int kThreads = kWarp * kWarps;
  static constexpr int kTile = 16 * Unit::kRows * kWarps;
  static constexpr int kSharedBytes = (kTile + kStages * Unit::kBlock) * Unit::kPitch;
  // What a program can have on sm_86, sm_89 and sm_120.
  static_assert(kSharedBytes <= 99 * 1024);
};

template <class Shape>
class Partial {
  using Unit = typename Shape::Unit;
  static constexpr int kRows = Unit::kRows, kBlock = Unit::kBlock, kPitch = Unit::kPitch;
  static constexpr int kStages = Shape::kStages;

 public:
  __device__ Partial(const Operands& given, char* shared)
      : given_(given),
        anchors_(shared),
        blocks_(shared + Shape::kTile * kPitch),
        lane_(threadIdx.x % kWarp),
        first_row_(threadIdx.x / kWarp * (16 * kRows)) {}

  template <bool kOffset>
  __device__ void run() {
    if (blockIdx.x * *given_.share >= given_.ends[given_.tiles - 1]) return;
    // The last tile first: its share begins at the first negatives, as that of every other
    // program does, so that programs read the same negatives at about the same time.
    for (int tile = given_.last_tile[blockIdx.x]; tile >= given_.first_tile[blockIdx.x]; --tile) {
      add_tile<kOffset>(tile);
    }
  }

 private:
  // Sums over the blocks of this program's share that a tile meets, into the slot of this piece.
  template <bool kOffset>
  __device__ __forceinline__ void add_tile(int tile) {
    const auto [begin, end] = find_places(given_, tile);
    // A tile between others that meets nothing: its anchors would still be on their way, waited
    // for by nobody, when the next ones are sent to the same place.
    if (begin >= end) return;

    const Walk walk = find_walk<kBlock>(given_, tile);
    // Others may still be reading the last tile's anchors and blocks.
    __syncthreads();
    copy_rows<Shape::kTile>(
        anchors_, static_cast<const char*>(given_.anchors) +
                      static_cast<int64_t>(tile) * (Shape::kTile * kPitch));
#pragma unroll
    for (int ahead = 0; ahead < kStages - 1; ++ahead) {
      copy_block(walk, begin + ahead, end, ahead);
    }

    float sums[kRows][Unit::kDim / 8][4] = {};
    float total[kRows][2] = {};
    float offset[kRows][2];
#pragma unroll
    for (int r = 0; r < kRows; ++r) offset[r][0] = offset[r][1] = given_.lowest;

    int buffer = 0;
    for (int place = begin; place < end; ++place) {
      copy_async_wait<kStages - 2>();
      __syncthreads();
      const int free = buffer == 0 ? kStages - 1 : buffer - 1;
      copy_block(walk, place + kStages - 1, end, free);

      const char* negatives = blocks_ + buffer * (kBlock * kPitch);
      float logits[kRows][kBlock / 8][4] = {};
      Unit::multiply(logits, anchors_ + first_row_ * kPitch, negatives, lane_);
      if (place >= walk.unmasked()) mask_rows(logits, tile, walk.block(place) * kBlock);
      weigh<kOffset>(logits, sums, total, offset);
      Unit::accumulate(sums, logits, negatives, lane_);
      buffer = buffer + 1 == kStages ? 0 : buffer + 1;
    }
    store<kOffset>(tile, sums, total, offset);
  }

  // The block at a place, if the tile's list goes so far; one group of copies in any case.
  __device__ __forceinline__ void copy_block(const Walk& walk, int place, int end, int buffer) {
    if (place < end) {
      copy_rows<kBlock>(
          blocks_ + buffer * (kBlock * kPitch),
          static_cast<const char*>(given_.negatives) +
              static_cast<int64_t>(walk.block(place)) * (kBlock * kPitch));
    }
    copy_async_commit();
  }

  // kCount rows. Threads stand side by side on at least 8 rows of up to kPitch bytes, and move on
  // together, so that one offset of a thread and constants tell all that it copies.
  template <int kCount>
  static __device__ __forceinline__ void copy_rows(char* shared, const char* global) {
    constexpr int kChunks = kPitch / kChunk;
    constexpr int kWide = kChunks < Shape::kThreads / 8 ? kChunks : Shape::kThreads / 8;
    constexpr int kHigh = Shape::kThreads / kWide;
    static_assert(kHigh % 8 == 0 && kCount % kHigh == 0 && kChunks % kWide == 0);
    const int row = threadIdx.x / kWide, chunk = threadIdx.x % kWide;
    const int there = chunk_offset(row, chunk, kPitch), here = row * kPitch + chunk * kChunk;
#pragma unroll
    for (int rows = 0; rows < kCount; rows += kHigh) {
#pragma unroll
      for (int chunks = 0; chunks < kChunks; chunks += kWide) {
        copy_async_16(
            shared + moved(there, rows, chunks, kPitch),
            global + here + rows * kPitch + chunks * kChunk);
      }
    }
  }

  __device__ __forceinline__ void mask_rows(
      float (&logits)[kRows][kBlock / 8][4], int tile, int first_column) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t place = static_cast<int64_t>(tile) * Shape::kTile + row(r, 0);
      mask<kBlock>(logits[r], given_, place, first_column, lane_ & 3);
    }
  }

  // Logits to weights, added to the totals; a new largest logit first shrinks the sums so far.
  template <bool kOffset>
  __device__ __forceinline__ void weigh(
      float (&logits)[kRows][kBlock / 8][4], float (&sums)[kRows][Unit::kDim / 8][4],
      float (&total)[kRows][2], float (&offset)[kRows][2]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kOffset) {
        float shrink[2];
        raise_offset<kBlock>(logits[r], given_, total[r], offset[r], shrink);
#pragma unroll
        for (int i = 0; i < Unit::kDim / 8; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[r][i][j] *= shrink[Unit::half(i, j)];
        }
      }
      take_weights<kOffset, kBlock>(logits[r], given_.scale, offset[r], total[r]);
    }
  }

  template <bool kOffset>
  __device__ __forceinline__ void store(
      int tile, const float (&sums)[kRows][Unit::kDim / 8][4], const float (&total)[kRows][2],
      const float (&offset)[kRows][2]) const {
    const int64_t slot = (static_cast<int64_t>(blockIdx.x) + tile) * Shape::kTile;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      store_totals<kOffset>(given_, slot + row(r, 0), total[r], offset[r], lane_ & 3);
#pragma unroll
      for (int i = 0; i < Unit::kDim / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int channel = Unit::channel(i, j, lane_ & 3);
          given_.weighted[(slot + row(r, Unit::half(i, j))) * Unit::kDim + channel] = sums[r][i][j];
        }
      }
    }
  }

  // The place in the tile of an anchor of this lane.
  __device__ __forceinline__ int row(int r, int h) const {
    return first_row_ + 16 * r + 8 * h + (lane_ >> 2);
  }

  const Operands& given_;
  char* const anchors_;
  char* const blocks_;
  const int lane_, first_row_;
};

template <class Shape, bool kOffset>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident)
    dc_loss_partial(const __grid_constant__ Operands given) {
  extern __shared__ __align__(128) char shared_memory[];
  Partial<Shape>(given, shared_memory).template run<kOffset>();
}

}  // namespace cac_fast::cuda
