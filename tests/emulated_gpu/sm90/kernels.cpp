// The kernels of csrc/cuda/sm90, compiled for the emulated GPU, in the place of the .cu files.

#include "../device.cuh"
#include "device.cuh"
// First, so that it is the emulation that the kernels get.
#include "../launch.cuh"
#include "sm90/shapes.cuh"

namespace cac_fast::cuda {
namespace {

struct Runs {
  template <class Shape, bool kOffset>
  static void partial(const Operands& given) {
    const auto anchors = sm90::anchor_boxes<Shape>(given);
    const auto negatives = sm90::negative_boxes<Shape>(given);
    emulated::require_valid(anchors);
    emulated::require_valid(negatives);
    sm90::run_program(Shape::kThreads, [&] {
      sm90::dc_loss_partial_sm90<Shape, kOffset>(given, anchors, negatives);
    });
  }
};

template <template <int> class ShapeOf>
constexpr Kernels kKernels{Emulated<ShapeOf, Runs>::sizes, Emulated<ShapeOf, Runs>::launch};

}  // namespace

const Kernels kBFloat16Sm90Kernels = kKernels<sm90::BFloat16Shape>;
const Kernels kHalfSm90Kernels = kKernels<sm90::HalfShape>;

}  // namespace cac_fast::cuda
