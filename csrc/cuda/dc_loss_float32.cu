#include "device.cuh"
#include "launch.cuh"
#include "shapes.cuh"

namespace cac_fast::cuda {

const Kernels kFloat32Kernels{sizes<Float32Shape>, launch<Float32Shape>};

}  // namespace cac_fast::cuda
