// The table of kernels: sizes by products and padded channels. Include device.cuh first.
//
// With two row tiles a warp reads each negative once for 32 anchors, which the bandwidth of shared
// memory asks for; at 256 channels the sums of 16 anchors fill the registers. What is left of the
// registers beside the sums bounds the block: tests/test_cuda_build.py holds all kernels to no
// spills. Blocks, stages and programs a multiprocessor follow from registers and shared memory;
// none was timed.
#pragma once

#include <stdexcept>

#include "partial.cuh"
#include "products.cuh"

namespace cac_fast::cuda {

template <class Element, int kDim>
struct MatrixShape;
template <int kDim>
struct Float32Shape;

// clang-format off
//                                                      rows block      warps stages resident
template <class T> struct MatrixShape<T, 64> :  Shape<MatrixUnit<T, 64, 2, 64>,   4, 3, 2> {};
template <class T> struct MatrixShape<T, 128> : Shape<MatrixUnit<T, 128, 2, 48>,  4, 4, 2> {};
template <class T> struct MatrixShape<T, 256> : Shape<MatrixUnit<T, 256, 1, 32>,  8, 2, 1> {};

template <> struct MatrixShape<float, 64> :  Shape<MatrixUnit<float, 64, 2, 32>,  4, 2, 2> {};
template <> struct MatrixShape<float, 128> : Shape<MatrixUnit<float, 128, 2, 32>, 4, 2, 1> {};
template <> struct MatrixShape<float, 256> : Shape<MatrixUnit<float, 256, 1, 16>, 4, 2, 1> {};

template <> struct Float32Shape<64> :  Shape<MultiplyAdds<64, 2, 32>,  4, 2, 2> {};
template <> struct Float32Shape<128> : Shape<MultiplyAdds<128, 2, 32>, 4, 2, 1> {};
template <> struct Float32Shape<256> : Shape<MultiplyAdds<256, 1, 16>, 4, 2, 1> {};
// clang-format on

template <int kDim>
using BFloat16Shape = MatrixShape<c10::BFloat16, kDim>;
template <int kDim>
using HalfShape = MatrixShape<c10::Half, kDim>;
template <int kDim>
using Tf32Shape = MatrixShape<float, kDim>;

// action(Shape{}) for the Shape of these padded channels.
template <template <int> class ShapeOf, class Action>
auto with_shape(int64_t padded, Action action) {
  switch (padded) {
    case 64: return action(ShapeOf<64>{});
    case 128: return action(ShapeOf<128>{});
    case 256: return action(ShapeOf<256>{});
    default: throw std::runtime_error("no kernel for so many channels");
  }
}

}  // namespace cac_fast::cuda
