#include "../device.cuh"
#include "device.cuh"
#include "launch.cuh"

const cac_fast::cuda::Kernels cac_fast::cuda::kHalfSm90Kernels{
    sizes<sm90::HalfShape, sm90::Path>, launch<sm90::HalfShape, sm90::Path>};
