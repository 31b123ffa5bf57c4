// cac_fast::dc_loss_rows_cuda: from tensors and a plan to the kernels.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cmath>
#include <string>
#include <tuple>

#include "launch.h"

// A test builds this file a second time, with kernels of its own.
#ifndef CAC_FAST_LIBRARY
#define CAC_FAST_LIBRARY cac_fast
#endif

namespace cac_fast::cuda {
namespace {

using at::Tensor;

// Kernels for features of a dtype, and the numbers that their weights stay within. Without an
// offset e^{logit}, and sums of it over any number of negatives, must stay normal numbers: of
// float32, and of the dtype the weights are rounded to for the second product. With one, the
// largest weight of a row is 2^headroom: float16 ends at 2^16 and 2^-24.
struct Kind {
  const Kernels& kernels;
  double largest_logit;
  float headroom;
};

Kind find_kind(at::ScalarType dtype, bool tf32) {
  switch (dtype) {
    case at::kBFloat16: return {kBFloat16Kernels, 64.0, 0.0F};
    case at::kHalf: return {kHalfKernels, 10.5, 15.0F};
    case at::kFloat: return {tf32 ? kTf32Kernels : kFloat32Kernels, 64.0, 0.0F};
    default: TORCH_CHECK_VALUE(false, "cuda takes float32, bfloat16 or float16 anchors");
  }
}

std::tuple<int64_t, int64_t, int64_t> sizes(const Tensor& anchors, int64_t padded, bool tf32) {
  const c10::DeviceGuard guard(anchors.device());
  const Sizes sizes = find_kind(anchors.scalar_type(), tf32).kernels.sizes(padded);
  return {sizes.tile, sizes.block, sizes.programs};
}

template <class T>
const T* data(const Tensor& tensor, const Tensor& anchors) {
  TORCH_CHECK_VALUE(tensor.device() == anchors.device(), "all tensors must be on one device");
  TORCH_CHECK_VALUE(tensor.is_contiguous(), "the plan must be contiguous");
  return tensor.const_data_ptr<T>();
}

// `anchors` and `negatives` in the order of the plan, padded to whole tiles, blocks and `padded`
// channels with zeros; `positives` as they are. Arguments in the order of tiles.LabelOrder and
// tiles.Plan.
std::tuple<Tensor, Tensor> dc_loss_rows(
    const Tensor& anchors, const Tensor& positives, const Tensor& negatives, const Tensor& order,
    const Tensor& excluded_from, const Tensor& excluded_to, const Tensor& active,
    const Tensor& admissible, const Tensor& borders, const Tensor& ends, const Tensor& share,
    const Tensor& first_tile, const Tensor& last_tile, double temperature, bool tf32) {
  const c10::DeviceGuard guard(anchors.device());
  const Kind kind = find_kind(anchors.scalar_type(), tf32);
  const int64_t padded = anchors.size(1), tiles = ends.size(0), programs = first_tile.size(0);
  const int64_t slots = anchors.size(0) / tiles * (tiles + programs);
  for (const Tensor& features : {anchors, negatives}) {
    const auto address = reinterpret_cast<uintptr_t>(features.const_data_ptr());
    TORCH_CHECK_VALUE(
        features.is_contiguous() && address % 16 == 0,
        "ordered features must be contiguous and aligned to 16 bytes");
  }

  const auto floats = anchors.options().dtype(at::kFloat);
  const Tensor weighted = at::empty({slots, padded}, floats);
  const Tensor total = at::empty({slots}, floats), offset = at::empty({slots}, floats);
  const Tensor loss = at::empty({positives.size(0)}, floats);
  const Tensor gradient = at::empty(positives.sizes(), anchors.options());

  constexpr double kLog2E = 1.4426950408889634;
  const double scale = kLog2E / temperature;
  Operands given{};
  given.anchors = anchors.const_data_ptr();
  given.negatives = negatives.const_data_ptr();
  given.positives = positives.const_data_ptr();
  given.positives_stride = positives.stride(0);
  given.positives_stride_d = positives.stride(1);
  given.order = data<int64_t>(order, anchors);
  given.excluded_from = data<int32_t>(excluded_from, anchors);
  given.excluded_to = data<int32_t>(excluded_to, anchors);
  given.active = data<int32_t>(active, anchors);
  given.admissible = data<int32_t>(admissible, anchors);
  given.borders = data<int32_t>(borders, anchors);
  given.ends = data<int64_t>(ends, anchors);
  given.share = data<int64_t>(share, anchors);
  given.first_tile = data<int32_t>(first_tile, anchors);
  given.last_tile = data<int32_t>(last_tile, anchors);
  given.weighted = weighted.mutable_data_ptr<float>();
  given.total = total.mutable_data_ptr<float>();
  given.offset = offset.mutable_data_ptr<float>();
  given.loss = loss.mutable_data_ptr<float>();
  given.gradient = gradient.mutable_data_ptr();
  given.count = positives.size(0);
  given.tiles = tiles;
  given.dim = positives.size(1);
  given.scale = static_cast<float>(scale);
  // The difference of two offsets must be finite.
  given.lowest = static_cast<float>(-4 * scale);
  given.headroom = kind.headroom;
  given.inverse_temperature = static_cast<float>(1 / temperature);
  kind.kernels.launch(given, padded, programs, 1 / temperature > kind.largest_logit);
  return {loss, gradient};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(CAC_FAST_LIBRARY, library) {
  library.def(
      "dc_loss_sizes_cuda(Tensor anchors, int padded, bool tf32) -> (int, int, int)", &sizes);
  library.def(
      "dc_loss_rows_cuda(Tensor anchors, Tensor positives, Tensor negatives, Tensor order, "
      "Tensor excluded_from, Tensor excluded_to, Tensor active, Tensor admissible, Tensor borders, "
      "Tensor ends, Tensor share, Tensor first_tile, Tensor last_tile, float temperature, "
      "bool tf32) -> (Tensor, Tensor)",
      &dc_loss_rows);
}

}  // namespace cac_fast::cuda
