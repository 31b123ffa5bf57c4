#include "device.cuh"
#include "launch.cuh"

const cac_fast::cuda::Kernels cac_fast::cuda::kTf32Kernels{
    sizes<Tf32Shape, Path>, launch<Tf32Shape, Path>};
