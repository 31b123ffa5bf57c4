// The two matrix products of a warp, in three kinds: 16 bits and TF32 on the matrix unit, and
// float32 by fused multiply-adds. Include device.cuh first.
//
// A warp owns kRows x 16 anchors ("row tiles"). All kinds keep logits as the matrix unit does:
// logits[r][n][2h + e] of lane 4g + t belongs to anchor 16r + 8h + g and negative 8n + 2t + e.
// That is at once the operand a of the second product, so that weights never leave the registers.
// Sums are sums[r][i][j] with the anchor and the channel that half(i, j) and channel(i, j, t) say.
#pragma once

#include "layout.h"

namespace cac_fast::cuda {

template <class Element_, int kDim_, int kRows_, int kBlock_>
struct MatrixUnit {
  using Element = Element_;
  static constexpr int kDim = kDim_, kRows = kRows_, kBlock = kBlock_;
  static constexpr int kPitch = kDim * static_cast<int>(sizeof(Element));
  static constexpr bool kTf32 = sizeof(Element) == 4;

  static __device__ __forceinline__ int half(int, int j) { return j >> 1; }
  static __device__ __forceinline__ int channel(int i, int j, int t) {
    return 8 * i + 2 * t + (j & 1);
  }

  // logits += anchors (rows of the warp) times negatives, both in shared memory.
  static __device__ __forceinline__ void multiply(
      float (&logits)[kRows][kBlock / 8][4], const char* anchors, const char* negatives, int lane) {
    const int of_a = not_hoisted(rows_first(lane, kPitch));
    const int of_b = not_hoisted(chunks_first(lane, kPitch));
    // One step is 32 bytes of a row: 16 channels of 16 bits, or 8 of TF32.
#pragma unroll
    for (int chunk = 0; chunk < kPitch / kChunk; chunk += 2) {
      uint32_t a[kRows][4];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        load_matrices(a[r], anchors + moved(of_a, 16 * r, chunk, kPitch));
        round(a[r]);
      }
#pragma unroll
      for (int n = 0; n < kBlock / 8; n += 2) {
        uint32_t b[4];
        load_matrices(b, negatives + moved(of_b, 8 * n, chunk, kPitch));
        round(b);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          multiply_add<Element>(logits[r][n], a[r], b[0], b[1]);
          multiply_add<Element>(logits[r][n + 1], a[r], b[2], b[3]);
        }
      }
    }
  }

  // sums += weights times negatives.
  static __device__ __forceinline__ void accumulate(
      float (&sums)[kRows][kDim / 8][4], const float (&weights)[kRows][kBlock / 8][4],
      const char* negatives, int lane) {
    if constexpr (kTf32) {
      accumulate_tf32(sums, weights, negatives, lane);
    } else {
      accumulate_16_bits(sums, weights, negatives, lane);
    }
  }

 private:
  static __device__ __forceinline__ void round(uint32_t (&values)[4]) {
    if constexpr (kTf32) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = round_to_tf32(as_float(values[i]));
    }
  }

  static __device__ __forceinline__ void accumulate_16_bits(
      float (&sums)[kRows][kDim / 8][4], const float (&weights)[kRows][kBlock / 8][4],
      const char* negatives, int lane) {
    const int of_b = not_hoisted(rows_first(lane, kPitch));
#pragma unroll
    for (int n = 0; n < kBlock / 8; n += 2) {
      uint32_t a[kRows][4];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float(&pair)[4] = weights[r][n + (i >> 1)];
          a[r][i] = pack<Element>(pair[2 * (i & 1)], pair[2 * (i & 1) + 1]);
        }
      }
#pragma unroll
      for (int i = 0; i < kDim / 8; i += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, negatives + moved(of_b, 8 * n, i, kPitch));
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          multiply_add<Element>(sums[r][i], a[r], b[0], b[1]);
          multiply_add<Element>(sums[r][i + 1], a[r], b[2], b[3]);
        }
      }
    }
  }

  // The operand's k = t and t + 4 are here negatives 2t and 2t + 1: the order in which products
  // are added is free, and this one needs no exchange between lanes.
  static __device__ __forceinline__ void accumulate_tf32(
      float (&sums)[kRows][kDim / 8][4], const float (&weights)[kRows][kBlock / 8][4],
      const char* negatives, int lane) {
    const int g = lane >> 2, t = lane & 3;
    const int of_b[2] = {
        chunk_offset(2 * t, g >> 2, kPitch) + (g & 3) * 4,
        chunk_offset(2 * t + 1, g >> 2, kPitch) + (g & 3) * 4};
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n) {
      uint32_t a[kRows][4];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[r][i] = round_to_tf32(weights[r][n][2 * (i & 1) + (i >> 1)]);
        }
      }
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        uint32_t b[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          b[e] = round_to_tf32(*reinterpret_cast<const float*>(
              negatives + moved(of_b[e], 8 * n, 2 * i, kPitch)));
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) multiply_add<float>(sums[r][i], a[r], b[0], b[1]);
      }
    }
  }
};

template <int kDim_, int kRows_, int kBlock_>
struct MultiplyAdds {
  using Element = float;
  static constexpr int kDim = kDim_, kRows = kRows_, kBlock = kBlock_;
  static constexpr int kPitch = kDim * static_cast<int>(sizeof(Element));

  // A lane adds up whole chunks of its anchors' sums.
  static __device__ __forceinline__ int half(int i, int) { return i & 1; }
  static __device__ __forceinline__ int channel(int i, int j, int t) {
    return 16 * (i >> 1) + 4 * t + j;
  }

  static __device__ __forceinline__ void multiply(
      float (&logits)[kRows][kBlock / 8][4], const char* anchors, const char* negatives, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll 1
    for (int chunk = 0; chunk < kPitch / kChunk; ++chunk) {
      float4 a[kRows][2];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) a[r][h] = load(anchors, 16 * r + 8 * h + g, chunk);
      }
#pragma unroll
      for (int n = 0; n < kBlock / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float4 b = load(negatives, 8 * n + 2 * t + e, chunk);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              float& sum = logits[r][n][2 * h + e];
              sum = fmaf(a[r][h].x, b.x, sum);
              sum = fmaf(a[r][h].y, b.y, sum);
              sum = fmaf(a[r][h].z, b.z, sum);
              sum = fmaf(a[r][h].w, b.w, sum);
            }
          }
        }
      }
    }
  }

  static __device__ __forceinline__ void accumulate(
      float (&sums)[kRows][kDim / 8][4], const float (&weights)[kRows][kBlock / 8][4],
      const char* negatives, int lane) {
    const int t = lane & 3;
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n) {
#pragma unroll
      for (int column = 0; column < 8; ++column) {
        float weight[kRows][2];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            // The lane of the same anchors that holds this column.
            weight[r][h] = __shfl_sync(
                0xFFFFFFFF, weights[r][n][2 * h + (column & 1)], column >> 1, /*width=*/4);
          }
        }
#pragma unroll
        for (int i = 0; i < kDim / 16; ++i) {
          const float4 b = *reinterpret_cast<const float4*>(
              negatives + quarter_offset(8 * n + column, i, t, kPitch));
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              float(&sum)[4] = sums[r][2 * i + h];
              sum[0] = fmaf(weight[r][h], b.x, sum[0]);
              sum[1] = fmaf(weight[r][h], b.y, sum[1]);
              sum[2] = fmaf(weight[r][h], b.z, sum[2]);
              sum[3] = fmaf(weight[r][h], b.w, sum[3]);
            }
          }
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ float4 load(const char* rows, int row, int chunk) {
    return *reinterpret_cast<const float4*>(rows + chunk_offset(row, chunk, kPitch));
  }
};

}  // namespace cac_fast::cuda
