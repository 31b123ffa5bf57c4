// dc_loss_partial_sm90: dc_loss_partial by warpgroups with roles, for sm_90a. Include ../device.cuh
// and device.cuh first.
//
// A producer, of which one thread works, has TMA fill a ring of buffers. Two consumers, 64 anchors
// of the tile each, take turns at the matrix unit: while one has its products, the other one has
// its exponentials.
//
//     consumer 0   | logits 1, sums 0 | weights 1        | logits 2, sums 1 | weights 2 ..
//     consumer 1    ..      weights 0 | logits 1, sums 0 | weights 1        | logits 2, sums 1 ..
//
// Barriers of a buffer: `full` has the producer's arrival and the bytes of a block; `empty` has the
// arrivals of 8 warps, each after its sums over the block. The tile's anchors have two like them.
// Logits, weights and sums stay in registers.
#pragma once

#include <cstdint>

#include "../launch.h"
#include "../rows.cuh"
#include "layout.h"

namespace cac_fast::cuda::sm90 {

constexpr int kWarpgroup = 128, kConsumers = 2, kConsumerRows = 64;

template <class Element_, int kDim_, int kBlock_, int kStages_>
struct Shape {
  using Element = Element_;
  static constexpr int kDim = kDim_, kBlock = kBlock_, kStages = kStages_;
  static constexpr int kTile = kConsumers * kConsumerRows;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kAnchorBytes = kTile * kDim * 2, kBlockBytes = kBlock * kDim * 2;
  static constexpr int kBarriers = kAnchorBytes + kStages * kBlockBytes;
  static constexpr int kSharedBytes = kBarriers + 8 * (2 * kStages + 2);
  static_assert(kBlock * kSlabRow % kGroup == 0 && kBlock % kDepth == 0);
  // What a program can have on sm_90.
  static_assert(kSharedBytes <= 227 * 1024);
};

// Addresses of a program's shared memory.
template <class Shape>
struct Memory {
  uint32_t start;

  __device__ uint32_t anchors() const { return start; }
  __device__ uint32_t block(int stage) const {
    return start + Shape::kAnchorBytes + stage * Shape::kBlockBytes;
  }
  __device__ uint32_t full(int stage) const { return start + Shape::kBarriers + 8 * stage; }
  __device__ uint32_t empty(int stage) const { return full(Shape::kStages + stage); }
  __device__ uint32_t anchors_full() const { return full(2 * Shape::kStages); }
  __device__ uint32_t anchors_empty() const { return full(2 * Shape::kStages + 1); }

  __device__ void init_barriers() const {
    constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      barrier_init(full(stage), 1);
      barrier_init(empty(stage), kConsumerWarps);
    }
    barrier_init(anchors_full(), 1);
    barrier_init(anchors_empty(), kConsumerWarps);
    barriers_ready();
  }
};

// A place in a ring of buffers, and the parity of its round.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <int kRows, int kDim>
__device__ __forceinline__ void copy_rows(
    uint32_t shared, const TensorMap& map, uint32_t barrier, int first_row) {
  barrier_expect(barrier, kRows * kDim * 2);
#pragma unroll
  for (int slab = 0; slab < kDim / kSlabChannels; ++slab) {
    copy_box(shared + slab * (kRows * kSlabRow), map, barrier, slab * kSlabChannels, first_row);
  }
}

// The producer: all blocks of the program's share, in their order, as buffers become empty.
template <class Shape>
__device__ __forceinline__ void produce(
    const Operands& given, const Memory<Shape>& memory, const TensorMap& anchors,
    const TensorMap& negatives) {
  constexpr int kDim = Shape::kDim, kBlock = Shape::kBlock;
  Ring<Shape::kStages> ring;
  Ring<1> tiles;
  for (int tile = given.last_tile[blockIdx.x]; tile >= given.first_tile[blockIdx.x]; --tile) {
    const auto [begin, end] = find_places(given, tile);
    if (begin >= end) continue;
    const Walk walk = find_walk<kBlock>(given, tile);
    barrier_wait(memory.anchors_empty(), tiles.parity ^ 1);
    copy_rows<Shape::kTile, kDim>(
        memory.anchors(), anchors, memory.anchors_full(), tile * Shape::kTile);
    tiles.advance();
    for (int place = begin; place < end; ++place) {
      barrier_wait(memory.empty(ring.stage), ring.parity ^ 1);
      copy_rows<kBlock, kDim>(
          memory.block(ring.stage), negatives, memory.full(ring.stage),
          walk.block(place) * kBlock);
      ring.advance();
    }
  }
}

template <class Shape, bool kOffset>
class Consumer {
  using Element = typename Shape::Element;
  static constexpr int kDim = Shape::kDim, kBlock = Shape::kBlock;

 public:
  __device__ Consumer(const Operands& given, const Memory<Shape>& memory)
      : given_(given),
        memory_(memory),
        number_(threadIdx.x / kWarpgroup - 1),
        lane_(threadIdx.x % kWarp),
        first_row_(threadIdx.x % kWarpgroup / kWarp * 16 + number_ * kConsumerRows + lane_ / 4) {}

  __device__ __forceinline__ void run() {
    if (number_ == 1) pass_turn();
    for (int tile = given_.last_tile[blockIdx.x]; tile >= given_.first_tile[blockIdx.x]; --tile) {
      add_tile(tile);
    }
    if (number_ == 0) await_turn();  // takes the last one passed
  }

 private:
  // Sums over the blocks of this program's share that a tile meets, into the slot of this piece.
  __device__ __forceinline__ void add_tile(int tile) {
    const auto [begin, end] = find_places(given_, tile);
    if (begin >= end) return;
    const Walk walk = find_walk<kBlock>(given_, tile);

    float sums[kDim / 8][4] = {};
    float logits[kBlock / 8][4];
    uint32_t weights[kBlock / 16][4];
    float total[2] = {}, offset[2] = {given_.lowest, given_.lowest}, shrink[2];
    barrier_wait(memory_.anchors_full(), tiles_.parity);
    barrier_wait(memory_.full(ring_.stage), ring_.parity);
    await_turn();
    products_fence();
    issue_logits(logits, ring_.stage);
    pass_turn();
    products_wait<0>();
    hold_in_place(logits);
    weigh(logits, walk, tile, begin, total, offset, shrink);
    pack_weights(weights, logits);
    for (int place = begin + 1; place < end; ++place) {
      const int held = ring_.stage;
      ring_.advance();
      barrier_wait(memory_.full(ring_.stage), ring_.parity);
      await_turn();
      hold_in_place(sums);
      hold_in_place(weights);
      products_fence();
      issue_logits(logits, ring_.stage);
      issue_sums(sums, weights, held);
      pass_turn();
      products_wait<1>();
      hold_in_place(logits);
      weigh(logits, walk, tile, place, total, offset, shrink);
      // It is over already. But without something that it must not cross, the compiler moves most
      // of the weights behind the wait for the sums, where nothing is left to overlap with.
      barrier_wait(memory_.full(ring_.stage), ring_.parity);
      products_wait<0>();
      hold_in_place(sums);
      release(memory_.empty(held));
      shrink_sums(sums, shrink);
      pack_weights(weights, logits);
    }
    release(memory_.anchors_empty());
    tiles_.advance();
    hold_in_place(sums);
    hold_in_place(weights);
    products_fence();
    issue_sums(sums, weights, ring_.stage);
    products_wait<0>();
    hold_in_place(sums);
    release(memory_.empty(ring_.stage));
    ring_.advance();
    store(tile, sums, total, offset);
  }

  // Numbered barrier 0 is __syncthreads.
  __device__ __forceinline__ void await_turn() const { numbered_wait(1 + number_); }
  __device__ __forceinline__ void pass_turn() const { numbered_arrive(2 - number_); }

  __device__ __forceinline__ void release(uint32_t barrier) const {
    if (lane_ == 0) barrier_arrive(barrier);
  }

  __device__ __forceinline__ void issue_logits(float (&logits)[kBlock / 8][4], int stage) const {
    const uint64_t anchors = over_channels(memory_.anchors() + number_ * kConsumerRows * kSlabRow);
    const uint64_t negatives = over_channels(memory_.block(stage));
#pragma unroll
    for (int step = 0; step < kDim / kDepth; ++step) {
      multiply<Element>(
          logits, moved(anchors, channels_step(step, Shape::kTile)),
          moved(negatives, channels_step(step, kBlock)), step > 0);
    }
    products_commit();
  }

  __device__ __forceinline__ void issue_sums(
      float (&sums)[kDim / 8][4], const uint32_t (&weights)[kBlock / 16][4], int stage) const {
    const uint64_t negatives = over_rows(memory_.block(stage), kBlock);
#pragma unroll
    for (int step = 0; step < kBlock / kDepth; ++step) {
      multiply_add<Element>(sums, weights[step], moved(negatives, rows_step(step)));
    }
    products_commit();
  }

  // Logits to weights, added to the totals. With offsets, sums must shrink when they are there.
  __device__ __forceinline__ void weigh(
      float (&logits)[kBlock / 8][4], const Walk& walk, int tile, int place, float (&total)[2],
      float (&offset)[2], float (&shrink)[2]) const {
    if (place >= walk.unmasked()) {
      const int64_t anchor = static_cast<int64_t>(tile) * Shape::kTile + first_row_;
      mask<kBlock>(logits, given_, anchor, walk.block(place) * kBlock, lane_ & 3);
    }
    if constexpr (kOffset) raise_offset<kBlock>(logits, given_, total, offset, shrink);
    take_weights<kOffset, kBlock>(logits, given_.scale, offset, total);
  }

  __device__ __forceinline__ void shrink_sums(
      float (&sums)[kDim / 8][4], const float (&shrink)[2]) const {
    if constexpr (kOffset) {
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] *= shrink[j >> 1];
      }
    }
  }

  // Logits, as they lie, are the left operand of the second product.
  static __device__ __forceinline__ void pack_weights(
      uint32_t (&weights)[kBlock / 16][4], const float (&logits)[kBlock / 8][4]) {
#pragma unroll
    for (int step = 0; step < kBlock / 16; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&pair)[4] = logits[2 * step + (i >> 1)];
        weights[step][i] = pack<Element>(pair[2 * (i & 1)], pair[2 * (i & 1) + 1]);
      }
    }
  }

  __device__ __forceinline__ void store(
      int tile, const float (&sums)[kDim / 8][4], const float (&total)[2],
      const float (&offset)[2]) const {
    const int64_t row = (static_cast<int64_t>(blockIdx.x) + tile) * Shape::kTile + first_row_;
    store_totals<kOffset>(given_, row, total, offset, lane_ & 3);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float* const weighted = given_.weighted + (row + 8 * h) * kDim + 2 * (lane_ & 3);
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        *reinterpret_cast<float2*>(weighted + 8 * i) = float2{sums[i][2 * h], sums[i][2 * h + 1]};
      }
    }
  }

  const Operands& given_;
  const Memory<Shape> memory_;
  const int number_, lane_, first_row_;
  Ring<Shape::kStages> ring_;
  Ring<1> tiles_;
};

template <class Shape, bool kOffset>
__global__ void __launch_bounds__(Shape::kThreads, 1) dc_loss_partial_sm90(
    const __grid_constant__ Operands given, const __grid_constant__ TensorMap anchors,
    const __grid_constant__ TensorMap negatives) {
#ifdef CAC_FAST_SM90A
  extern __shared__ __align__(1024) char shared_memory[];
  const Memory<Shape> memory{shared_address(shared_memory)};
  if (blockIdx.x * *given.share >= given.ends[given.tiles - 1]) return;
  if (threadIdx.x == 0) memory.init_barriers();
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_up_registers<24>();
    if (threadIdx.x == 0) produce<Shape>(given, memory, anchors, negatives);
  } else {
    take_registers<240>();
    Consumer<Shape, kOffset>(given, memory).run();
  }
#endif
}

}  // namespace cac_fast::cuda::sm90
