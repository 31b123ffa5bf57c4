// From a Shape to launches of its kernels, for the .cu files. Include ../device.cuh and device.cuh
// first.
#pragma once

#include <c10/util/BFloat16.h>
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../launch.cuh"
#include "layout.h"
#include "partial.cuh"
#include "shapes.cuh"

namespace cac_fast::cuda::sm90 {

// The driver's function, asked for by name so that nothing links to the driver.
inline decltype(&cuTensorMapEncodeTiled) find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  check(cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
  if (found == nullptr || result != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("the driver has no cuTensorMapEncodeTiled: install a newer one");
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

template <class Element>
TensorMap encode(const Boxes& boxes) {
  static const auto encode_tiled = find_encode();
  constexpr auto kType = std::is_same_v<Element, c10::BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[2] = {boxes.channels, boxes.count}, pitch[1] = {boxes.pitch};
  const cuuint32_t box[2] = {boxes.box_channels, boxes.box_rows}, steps[2] = {1, 1};
  TensorMap map;
  const CUresult result = encode_tiled(
      &map, kType, 2, const_cast<void*>(boxes.features), sizes, pitch, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(
        "cuTensorMapEncodeTiled failed with error " + std::to_string(static_cast<int>(result)));
  }
  return map;
}

struct Path {
  template <class Shape>
  static Sizes sizes() {
    return find_sizes<Shape>(dc_loss_partial_sm90<Shape, false>, dc_loss_partial_sm90<Shape, true>);
  }

  template <class Shape, bool kOffset>
  static void launch(const Operands& given, int64_t programs) {
    using Element = typename Shape::Element;
    launch_kernels<Shape, kOffset>(
        dc_loss_partial_sm90<Shape, kOffset>, given, programs,
        encode<Element>(anchor_boxes<Shape>(given)), encode<Element>(negative_boxes<Shape>(given)));
  }
};

}  // namespace cac_fast::cuda::sm90
