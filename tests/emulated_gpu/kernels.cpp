// The kernels of csrc/cuda, compiled for the emulated GPU, in the place of the .cu files.

#include <torch/library.h>

#include "device.cuh"
// First, so that it is the emulation that the kernels get.
#include "launch.cuh"

namespace cac_fast::cuda {
namespace {

struct Runs {
  template <class Shape, bool kOffset>
  static void partial(const Operands& given) {
    std::memset(shared_memory, 0xFF, sizeof shared_memory);
    emulated::gpu.run_program(Shape::kThreads, [&] { dc_loss_partial<Shape, kOffset>(given); });
  }
};

template <template <int> class ShapeOf>
constexpr Kernels kKernels{Emulated<ShapeOf, Runs>::sizes, Emulated<ShapeOf, Runs>::launch};

void set(int64_t programs, int64_t seed) {
  emulated::programs_at_a_time = programs;
  emulated::gpu.random.seed(static_cast<unsigned>(seed));
}

}  // namespace

const Kernels kBFloat16Kernels = kKernels<BFloat16Shape>;
const Kernels kHalfKernels = kKernels<HalfShape>;
const Kernels kTf32Kernels = kKernels<Tf32Shape>;
const Kernels kFloat32Kernels = kKernels<Float32Shape>;

}  // namespace cac_fast::cuda

TORCH_LIBRARY_FRAGMENT(CAC_FAST_LIBRARY, library) {
  library.def("set(int programs, int seed) -> ()", &cac_fast::cuda::set);
}
