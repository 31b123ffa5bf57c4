// What every dc_loss_partial does with the plan, and a lane with the logits of 16 anchors. Include
// device.cuh first.
//
// Logits lie as the matrix unit leaves them: logits[n][2h + e] of lane 4g + t belongs to anchor
// 8h + g of the 16 and to negative 8n + 2t + e of the block.
#pragma once

#include <cmath>
#include <cstdint>

#include "launch.h"
#include "layout.h"

namespace cac_fast::cuda {

constexpr int kWarp = 32;

// Places [begin, end) in a tile's list of blocks.
struct Places {
  int begin, end;
};

// This program's share of what a tile meets; it may be empty.
__device__ __forceinline__ Places find_places(const Operands& given, int tile) {
  const int64_t share = *given.share;
  const int64_t tile_start = tile > 0 ? given.ends[tile - 1] : 0;
  const int64_t tile_met = given.ends[tile] - tile_start;
  const int64_t start = blockIdx.x * share - tile_start, stop = start + share;
  return {
      static_cast<int>(start > 0 ? start : 0), static_cast<int>(stop < tile_met ? stop : tile_met)};
}

template <int kBlock>
__device__ __forceinline__ Walk find_walk(const Operands& given, int tile) {
  const int32_t* borders = given.borders + 4 * static_cast<int64_t>(tile);
  const int high = borders[3], whole = *given.num_admissible / kBlock;
  return {borders[0], borders[1], borders[2], high, high > whole ? high : whole};
}

// -inf for negatives that an anchor excludes and for those behind the admissible ones. `place`: of
// the lane's first anchor in the order of the plan.
template <int kBlock>
__device__ __forceinline__ void mask(
    float (&logits)[kBlock / 8][4], const Operands& given, int64_t place, int first_column, int t) {
  const int num_active = *given.num_active, num_admissible = *given.num_admissible;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t anchor = place + 8 * h;
    const int from = anchor < num_active ? given.excluded_from[anchor] : 0;
    const int to = anchor < num_active ? given.excluded_to[anchor] : 0;
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = first_column + 8 * n + 2 * t + e;
        const bool admitted = (column < from || column >= to) && column < num_admissible;
        if (!admitted) logits[n][2 * h + e] = -INFINITY;
      }
    }
  }
}

// Raises the offsets where a logit asks for it, and says by how much all sums so far must shrink.
template <int kBlock>
__device__ __forceinline__ void raise_offset(
    const float (&logits)[kBlock / 8][4], const Operands& given, float (&total)[2],
    float (&offset)[2], float (&shrink)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float largest = -INFINITY;
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n) {
      largest = fmaxf(largest, fmaxf(logits[n][2 * h], logits[n][2 * h + 1]));
    }
    // All four lanes of an anchor keep the same offset.
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFF, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFF, largest, 2));
    const float raised = fmaxf(offset[h], largest * given.scale - given.headroom);
    shrink[h] = exp2_fast(offset[h] - raised);
    offset[h] = raised;
    total[h] *= shrink[h];
  }
}

// Logits to weights, added to the lane's totals.
template <bool kOffset, int kBlock>
__device__ __forceinline__ void take_weights(
    float (&logits)[kBlock / 8][4], float scale, const float (&offset)[2], float (&total)[2]) {
#pragma unroll
  for (int n = 0; n < kBlock / 8; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float& weight = logits[n][j];
      weight = exp2_fast(kOffset ? fmaf(weight, scale, -offset[j >> 1]) : weight * scale);
      total[j >> 1] += weight;
    }
  }
}

// The totals of four lanes, added, and their offsets. `row`: of the lane's first anchor among all
// slots.
template <bool kOffset>
__device__ __forceinline__ void store_totals(
    const Operands& given, int64_t row, const float (&total)[2], const float (&offset)[2], int t) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = total[h];
    sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
    sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
    if (t == 0) {
      given.total[row + 8 * h] = sum;
      if (kOffset) given.offset[row + 8 * h] = offset[h];
    }
  }
}

}  // namespace cac_fast::cuda
