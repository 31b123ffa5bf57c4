// From a Shape to launches of its kernels, for the .cu files. Include device.cuh first.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>

#include "combine.cuh"
#include "launch.h"
#include "partial.cuh"
#include "shapes.cuh"

namespace cac_fast::cuda {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

template <class Shape, bool kOffset>
void allow_shared_memory() {
  check(cudaFuncSetAttribute(
      dc_loss_partial<Shape, kOffset>, cudaFuncAttributeMaxDynamicSharedMemorySize,
      Shape::kSharedBytes));
}

// Found out and set once for each device, as CUDA takes longer to answer than to launch a kernel.
template <class Shape>
Sizes find_sizes() {
  static std::mutex mutex;
  static std::map<int, Sizes> known;
  int device = 0;
  check(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  if (const auto found = known.find(device); found != known.end()) return found->second;
  allow_shared_memory<Shape, false>();
  allow_shared_memory<Shape, true>();
  int resident = 0, multiprocessors = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &resident, dc_loss_partial<Shape, false>, Shape::kThreads, Shape::kSharedBytes));
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const Sizes sizes{
      Shape::kTile, Shape::Unit::kBlock, static_cast<int64_t>(resident) * multiprocessors};
  known.emplace(device, sizes);
  return sizes;
}

template <class Shape, bool kOffset>
void launch_kernels(const Operands& given, int64_t programs) {
  using Unit = typename Shape::Unit;
  const auto stream = static_cast<cudaStream_t>(current_stream());
  find_sizes<Shape>();  // allows the shared memory, where nobody has asked for the sizes yet
  dc_loss_partial<Shape, kOffset>
      <<<static_cast<unsigned>(programs), Shape::kThreads, Shape::kSharedBytes, stream>>>(given);
  check(cudaGetLastError());
  const auto groups = static_cast<unsigned>((given.count + kCombinedRows - 1) / kCombinedRows);
  dc_loss_combine<typename Unit::Element, Unit::kDim, Shape::kTile, kOffset>
      <<<groups, kCombinedRows * kWarp, 0, stream>>>(given);
  check(cudaGetLastError());
}

template <template <int> class ShapeOf>
Sizes sizes(int64_t padded) {
  return with_shape<ShapeOf>(padded, [](auto shape) { return find_sizes<decltype(shape)>(); });
}

template <template <int> class ShapeOf>
void launch(const Operands& given, int64_t padded, int64_t programs, bool offset) {
  with_shape<ShapeOf>(padded, [&](auto shape) {
    using Shape = decltype(shape);
    offset ? launch_kernels<Shape, true>(given, programs)
           : launch_kernels<Shape, false>(given, programs);
  });
}

}  // namespace cac_fast::cuda
