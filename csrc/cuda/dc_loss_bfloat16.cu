#include "device.cuh"
#include "launch.cuh"
#include "shapes.cuh"

namespace cac_fast::cuda {

const Kernels kBFloat16Kernels{sizes<BFloat16Shape>, launch<BFloat16Shape>};

}  // namespace cac_fast::cuda
