// From a Shape to its kernels on the emulated GPU. Include device.cuh first.
#pragma once

#include <cstdint>
#include <cstring>

#include "combine.cuh"
#include "launch.h"
#include "shapes.cuh"

namespace cac_fast::cuda {

template <class Shape, bool kOffset>
void launch_combine(const Operands& given) {
  for (int64_t first = 0; first < given.count; first += kCombinedRows) {
    blockIdx.x = static_cast<unsigned>(first / kCombinedRows);
    emulated::gpu.run_program(kCombinedRows * kWarp, [&] {
      dc_loss_combine<typename Shape::Element, Shape::kDim, Shape::kTile, kOffset>(given);
    });
  }
}

// A class with `partial<Shape, kOffset>(given)`, which runs the blockIdx.x-th program.
template <template <int> class ShapeOf, class Runs>
struct Emulated {
  static Sizes sizes(int64_t padded) {
    return with_shape<ShapeOf>(padded, [](auto shape) {
      using Shape = decltype(shape);
      return Sizes{Shape::kTile, Shape::kBlock, emulated::programs_at_a_time};
    });
  }

  static void launch(const Operands& given, int64_t padded, int64_t programs, bool offset) {
    with_shape<ShapeOf>(padded, [&](auto shape) {
      using Shape = decltype(shape);
      offset ? launch_both<Shape, true>(given, programs)
             : launch_both<Shape, false>(given, programs);
    });
  }

  template <class Shape, bool kOffset>
  static void launch_both(const Operands& given, int64_t programs) {
    emulated::gpu.shared_bytes = Shape::kSharedBytes;
    for (int64_t program = 0; program < programs; ++program) {
      blockIdx.x = static_cast<unsigned>(program);
      Runs::template partial<Shape, kOffset>(given);
    }
    launch_combine<Shape, kOffset>(given);
  }
};

}  // namespace cac_fast::cuda
