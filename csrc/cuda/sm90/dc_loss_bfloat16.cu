#include "../device.cuh"
#include "device.cuh"
#include "launch.cuh"

const cac_fast::cuda::Kernels cac_fast::cuda::kBFloat16Sm90Kernels{
    sizes<sm90::BFloat16Shape, sm90::Path>, launch<sm90::BFloat16Shape, sm90::Path>};
