// The kernels of csrc/cuda, compiled for the emulated GPU, in the place of the .cu files.

#include <torch/library.h>

#include "device.cuh"
// First, so that it is the emulation that the kernels get.
#include "combine.cuh"
#include "shapes.cuh"

namespace cac_fast::cuda {
namespace {

int64_t programs_at_a_time = 3;

template <class Shape, bool kOffset>
void launch_kernels(const Operands& given, int64_t programs) {
  using Unit = typename Shape::Unit;
  emulated::gpu.shared_bytes = Shape::kSharedBytes;
  for (int64_t program = 0; program < programs; ++program) {
    blockIdx.x = static_cast<unsigned>(program);
    std::memset(shared_memory, 0xFF, sizeof shared_memory);
    emulated::gpu.run_program(
        Shape::kThreads, [&] { dc_loss_partial<Shape, kOffset>(given); });
  }
  for (int64_t first = 0; first < given.count; first += kCombinedRows) {
    blockIdx.x = static_cast<unsigned>(first / kCombinedRows);
    emulated::gpu.run_program(kCombinedRows * kWarp, [&] {
      dc_loss_combine<typename Unit::Element, Unit::kDim, Shape::kTile, kOffset>(given);
    });
  }
}

template <template <int> class ShapeOf>
Sizes sizes(int64_t padded) {
  return with_shape<ShapeOf>(padded, [](auto shape) {
    using Shape = decltype(shape);
    return Sizes{Shape::kTile, Shape::Unit::kBlock, programs_at_a_time};
  });
}

template <template <int> class ShapeOf>
void launch(const Operands& given, int64_t padded, int64_t programs, bool offset) {
  with_shape<ShapeOf>(padded, [&](auto shape) {
    using Shape = decltype(shape);
    offset ? launch_kernels<Shape, true>(given, programs)
           : launch_kernels<Shape, false>(given, programs);
  });
}

void set(int64_t programs, int64_t seed) {
  programs_at_a_time = programs;
  emulated::gpu.random.seed(static_cast<unsigned>(seed));
}

}  // namespace

const Kernels kBFloat16Kernels{sizes<BFloat16Shape>, launch<BFloat16Shape>};
const Kernels kHalfKernels{sizes<HalfShape>, launch<HalfShape>};
const Kernels kTf32Kernels{sizes<Tf32Shape>, launch<Tf32Shape>};
const Kernels kFloat32Kernels{sizes<Float32Shape>, launch<Float32Shape>};

}  // namespace cac_fast::cuda

TORCH_LIBRARY_FRAGMENT(CAC_FAST_LIBRARY, library) {
  library.def("set(int programs, int seed) -> ()", &cac_fast::cuda::set);
}
