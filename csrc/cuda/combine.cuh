// dc_loss_combine: a tile's sums added in the order of the blocks, then loss and gradient; one
// warp an anchor. Include device.cuh first.
#pragma once

#include <cmath>
#include <cstdint>

#include "launch.h"
#include "rows.cuh"

namespace cac_fast::cuda {

constexpr int kCombinedRows = 8;

__device__ __forceinline__ float add_over_warp(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xFFFFFFFF, x, distance);
  }
  return x;
}

template <class Element, int kDim, int kTile, bool kOffset>
__global__ void __launch_bounds__(kCombinedRows* kWarp)
    dc_loss_combine(const __grid_constant__ Operands given) {
  constexpr int kChannels = kDim / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t place =
      static_cast<int64_t>(blockIdx.x) * kCombinedRows + threadIdx.x / kWarp;
  if (place >= given.count) return;
  const int64_t row = given.order[place];
  auto* const gradient = static_cast<Element*>(given.gradient) + row * given.dim;

  const int64_t tile = place / kTile;
  const int64_t end = given.ends[tile], start = tile > 0 ? given.ends[tile - 1] : 0;
  float weighted[kChannels] = {};
  float total = 0, offset = given.lowest;
  if (place < *given.num_active && end > start) {
    const int64_t share = *given.share;
    for (int64_t program = start / share; program <= (end - 1) / share; ++program) {
      const int64_t slot = (program + tile) * kTile + place % kTile;
      float shrink = 1, part_shrink = 1;
      if constexpr (kOffset) {
        const float part_offset = given.offset[slot];
        const float raised = fmaxf(offset, part_offset);
        shrink = exp2_fast(offset - raised);
        part_shrink = exp2_fast(part_offset - raised);
        offset = raised;
      }
      total = fmaf(given.total[slot], part_shrink, total * shrink);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        weighted[i] = fmaf(
            given.weighted[slot * kDim + i * kWarp + lane], part_shrink, weighted[i] * shrink);
      }
    }
  }
  if (total == 0) {  // not active, or nothing admitted
    for (int64_t channel = lane; channel < given.dim; channel += kWarp) gradient[channel] = 0;
    if (lane == 0) given.loss[row] = 0;
    return;
  }

  const auto* const anchor = static_cast<const Element*>(given.anchors) + place * kDim;
  const auto* const positive =
      static_cast<const Element*>(given.positives) + row * given.positives_stride;
  float positives[kChannels];
  float product = 0;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const int64_t channel = i * kWarp + lane;
    positives[i] = channel < given.dim
                       ? static_cast<float>(positive[channel * given.positives_stride_d])
                       : 0.0F;
    product = fmaf(static_cast<float>(anchor[channel]), positives[i], product);
  }
  constexpr float kLog2 = 0.693147180559945309F;
  const float x =
      (log2f(total) + (kOffset ? offset : 0) - add_over_warp(product) * given.scale) * kLog2;
  const float e = expf(-fabsf(x));
  if (lane == 0) given.loss[row] = fmaxf(x, 0) + log1pf(e);
  const float pull = (x >= 0 ? 1 : e) / (1 + e) * given.inverse_temperature;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const int64_t channel = i * kWarp + lane;
    if (channel < given.dim) {
      gradient[channel] = static_cast<Element>(pull * (weighted[i] / total - positives[i]));
    }
  }
}

}  // namespace cac_fast::cuda
