// The table of kernels for sm_90a. Include ../device.cuh and device.cuh first.
//
// Blocks are what registers allow beside the sums: tests/test_cuda_sm90_build.py holds all kernels
// to no spills. Buffers are what shared memory holds, but for 64 channels, where 8 are plenty.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "../launch.h"
#include "layout.h"
#include "partial.cuh"

namespace cac_fast::cuda::sm90 {

template <class Element, int kDim>
struct ShapeFor;

// clang-format off
//                                                    block stages
template <class T> struct ShapeFor<T, 64> :  Shape<T, 64, 128, 8> {};
template <class T> struct ShapeFor<T, 128> : Shape<T, 128, 128, 6> {};
template <class T> struct ShapeFor<T, 256> : Shape<T, 256, 64, 5> {};
// clang-format on

template <int kDim>
using BFloat16Shape = ShapeFor<c10::BFloat16, kDim>;
template <int kDim>
using HalfShape = ShapeFor<c10::Half, kDim>;

template <class Shape>
Boxes anchor_boxes(const Operands& given) {
  return boxes_of(given.anchors, given.tiles * Shape::kTile, Shape::kDim, Shape::kTile);
}

template <class Shape>
Boxes negative_boxes(const Operands& given) {
  return boxes_of(given.negatives, given.blocks * Shape::kBlock, Shape::kDim, Shape::kBlock);
}

}  // namespace cac_fast::cuda::sm90
