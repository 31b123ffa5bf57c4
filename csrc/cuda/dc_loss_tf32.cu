#include "device.cuh"
#include "launch.cuh"
#include "shapes.cuh"

namespace cac_fast::cuda {

const Kernels kTf32Kernels{sizes<Tf32Shape>, launch<Tf32Shape>};

}  // namespace cac_fast::cuda
