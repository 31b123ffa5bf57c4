#include "device.cuh"
#include "launch.cuh"
#include "shapes.cuh"

namespace cac_fast::cuda {

const Kernels kHalfKernels{sizes<HalfShape>, launch<HalfShape>};

}  // namespace cac_fast::cuda
