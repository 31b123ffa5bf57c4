#include "../device.cuh"
#include "device.cuh"
#include "launch.cuh"

namespace cac_fast::cuda {

const Kernels kHalfSm90Kernels{
    sm90::sizes<sm90::HalfShape>, sm90::launch<sm90::HalfShape>};

}  // namespace cac_fast::cuda
