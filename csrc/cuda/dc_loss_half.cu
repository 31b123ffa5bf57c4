#include "device.cuh"
#include "launch.cuh"

const cac_fast::cuda::Kernels cac_fast::cuda::kHalfKernels{
    sizes<HalfShape, Path>, launch<HalfShape, Path>};
