// From a Shape to launches of its kernels, for the .cu files. Include device.cuh first.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>
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

// Found out and set once for each device, as CUDA takes longer to answer than to launch a kernel.
// `plain`, `with_offset`: the two kernels of a Shape.
template <class Shape, class Kernel>
Sizes find_sizes(Kernel* plain, Kernel* with_offset) {
  static std::mutex mutex;
  static std::map<int, Sizes> known;
  int device = 0;
  check(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  if (const auto found = known.find(device); found != known.end()) return found->second;
  for (Kernel* const kernel : {plain, with_offset}) {
    check(cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes));
  }
  int resident = 0, multiprocessors = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &resident, plain, Shape::kThreads, Shape::kSharedBytes));
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const Sizes sizes{
      Shape::kTile, Shape::kBlock, static_cast<int64_t>(resident) * multiprocessors};
  known.emplace(device, sizes);
  return sizes;
}

// `partial`: of a Shape, with its arguments behind the operands.
template <class Shape, bool kOffset, class... Parameters, class... More>
void launch_kernels(
    void (*partial)(Operands, Parameters...), const Operands& given, int64_t programs,
    const More&... more) {
  const auto stream = static_cast<cudaStream_t>(current_stream());
  partial<<<static_cast<unsigned>(programs), Shape::kThreads, Shape::kSharedBytes, stream>>>(
      given, more...);
  check(cudaGetLastError());
  const auto groups = static_cast<unsigned>((given.count + kCombinedRows - 1) / kCombinedRows);
  dc_loss_combine<typename Shape::Element, Shape::kDim, Shape::kTile, kOffset>
      <<<groups, kCombinedRows * kWarp, 0, stream>>>(given);
  check(cudaGetLastError());
}

struct Path {
  template <class Shape>
  static Sizes sizes() {
    return find_sizes<Shape>(dc_loss_partial<Shape, false>, dc_loss_partial<Shape, true>);
  }

  template <class Shape, bool kOffset>
  static void launch(const Operands& given, int64_t programs) {
    launch_kernels<Shape, kOffset>(dc_loss_partial<Shape, kOffset>, given, programs);
  }
};

// Of the Shape of these channels, as a Path launches it.
template <template <int> class ShapeOf, class Path>
Sizes sizes(int64_t padded) {
  return with_shape<ShapeOf>(
      padded, [](auto shape) { return Path::template sizes<decltype(shape)>(); });
}

template <template <int> class ShapeOf, class Path>
void launch(const Operands& given, int64_t padded, int64_t programs, bool offset) {
  with_shape<ShapeOf>(padded, [&](auto shape) {
    using Shape = decltype(shape);
    Path::template sizes<Shape>();  // allows the shared memory, where nobody has asked for it yet
    offset ? Path::template launch<Shape, true>(given, programs)
           : Path::template launch<Shape, false>(given, programs);
  });
}

}  // namespace cac_fast::cuda
