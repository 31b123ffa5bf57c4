// What the host hands to the kernels. Plain C++: included by nvcc and by the host's compiler.
#pragma once

#include <cstdint>

namespace cac_fast::cuda {

// One call of the operator; see LabelOrder and Plan in cac_fast/tiles.py for what is not said here.
struct Operands {
  const void* anchors;    // (tiles * tile, padded) in the order of the plan, zeros where padded
  const void* negatives;  // (blocks * block, padded), likewise
  const void* positives;  // (A, D), any strides
  int64_t positives_stride;
  int64_t positives_stride_d;
  const int64_t* order;  // (A,): the row of the anchor at each place
  const int32_t* excluded_from;
  const int32_t* excluded_to;
  const int32_t* num_active;
  const int32_t* num_admissible;
  const int32_t* borders;
  const int64_t* ends;
  const int64_t* share;
  const int32_t* first_tile;
  const int32_t* last_tile;

  // The sums of program p over its blocks of tile t stand in slot p + t.
  float* weighted;  // (slots * tile, padded)
  float* total;     // (slots * tile,)
  float* offset;    // (slots * tile,)

  float* loss;     // (A,)
  void* gradient;  // (A, D) contiguous

  int64_t count;  // A
  int64_t tiles;
  int64_t blocks;
  int64_t dim;  // D
  float scale;  // this and what follows: see Numbers in cac_fast/tiles.py
  float lowest;
  float headroom;
  float inverse_temperature;
};

// What the plan is made for: anchors of a tile, negatives of a block, and how many programs the
// current device runs at a time.
struct Sizes {
  int64_t tile, block, programs;
};

// The two kernels for one kind of products. `padded` is 64, 128 or 256; they work on the current
// device and stream, and throw std::runtime_error with CUDA's own message.
struct Kernels {
  Sizes (*sizes)(int64_t padded);
  void (*launch)(const Operands& given, int64_t padded, int64_t programs, bool offset);
};

// The current stream of the current device, a cudaStream_t.
void* current_stream();

extern const Kernels kBFloat16Kernels, kHalfKernels, kTf32Kernels, kFloat32Kernels;
// For sm_90a alone.
extern const Kernels kBFloat16Sm90Kernels, kHalfSm90Kernels;

}  // namespace cac_fast::cuda
