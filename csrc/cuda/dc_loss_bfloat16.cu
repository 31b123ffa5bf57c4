#include "device.cuh"
#include "launch.cuh"

const cac_fast::cuda::Kernels cac_fast::cuda::kBFloat16Kernels{
    sizes<BFloat16Shape, Path>, launch<BFloat16Shape, Path>};
