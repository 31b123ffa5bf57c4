#include "device.cuh"
#include "launch.cuh"

const cac_fast::cuda::Kernels cac_fast::cuda::kFloat32Kernels{
    sizes<Float32Shape, Path>, launch<Float32Shape, Path>};
