#include "../device.cuh"
#include "device.cuh"
#include "launch.cuh"

namespace cac_fast::cuda {

const Kernels kBFloat16Sm90Kernels{
    sm90::sizes<sm90::BFloat16Shape>, sm90::launch<sm90::BFloat16Shape>};

}  // namespace cac_fast::cuda
