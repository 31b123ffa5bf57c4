// cac_fast::dc_loss_rows_cuda: from tensors and a plan to the kernels.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <tuple>

#include "launch.h"

// A test builds this file a second time, with kernels of its own.
#ifndef CAC_FAST_LIBRARY
#define CAC_FAST_LIBRARY cac_fast
#define CAC_FAST_DEVICE CUDA
#endif

namespace cac_fast::cuda {
namespace {

using at::Tensor;

const Kernels& find_kernels(at::ScalarType dtype, bool tf32, bool sm_90a) {
  if (sm_90a) {
    TORCH_CHECK_VALUE(
        dtype == at::kBFloat16 || dtype == at::kHalf,
        "cuda:sm_90a takes bfloat16 or float16 anchors");
    return dtype == at::kHalf ? kHalfSm90Kernels : kBFloat16Sm90Kernels;
  }
  switch (dtype) {
    case at::kBFloat16: return kBFloat16Kernels;
    case at::kHalf: return kHalfKernels;
    case at::kFloat: return tf32 ? kTf32Kernels : kFloat32Kernels;
    default: TORCH_CHECK_VALUE(false, "cuda takes float32, bfloat16 or float16 anchors");
  }
}

std::tuple<int64_t, int64_t, int64_t> sizes(
    const Tensor& anchors, int64_t padded, bool tf32, bool sm_90a) {
  const c10::DeviceGuard guard(anchors.device());
  const Sizes sizes = find_kernels(anchors.scalar_type(), tf32, sm_90a).sizes(padded);
  return {sizes.tile, sizes.block, sizes.programs};
}

// The elements of a part of the plan, if it has as many as the kernels will read.
template <class T>
const T* data(const Tensor& part, const Tensor& anchors, int64_t count) {
  TORCH_CHECK_VALUE(part.device() == anchors.device(), "all tensors must be on one device");
  TORCH_CHECK_VALUE(
      part.is_contiguous() && part.numel() == count, "a part of the plan must be contiguous, of ",
      count, " elements, not of ", part.numel());
  return part.const_data_ptr<T>();
}

void check_features(const Tensor& features, const Tensor& anchors, const char* name) {
  TORCH_CHECK_VALUE(features.device() == anchors.device(), "all tensors must be on one device");
  TORCH_CHECK_VALUE(
      features.dim() == 2 && features.scalar_type() == anchors.scalar_type(), name,
      " must be a matrix of the anchors' dtype");
}

// Features in the order of the plan: whole groups of `rows`, with `padded` channels.
void check_ordered(const Tensor& features, int64_t rows, int64_t padded, const char* name) {
  TORCH_CHECK_VALUE(
      features.size(0) % rows == 0 && features.size(1) == padded, "ordered ", name,
      " must be padded to whole groups of ", rows, " rows and to ", padded, " channels");
  const auto address = reinterpret_cast<uintptr_t>(features.const_data_ptr());
  TORCH_CHECK_VALUE(
      features.is_contiguous() && address % 16 == 0, "ordered ", name,
      " must be contiguous and aligned to 16 bytes");
}

// `anchors` and `negatives` in the order of the plan, padded to whole tiles, blocks and `padded`
// channels with zeros; `positives` as they are. Arguments in the order of tiles.LabelOrder,
// tiles.Plan and tiles.Numbers.
std::tuple<Tensor, Tensor> dc_loss_rows(
    const Tensor& anchors, const Tensor& positives, const Tensor& negatives, const Tensor& order,
    const Tensor& excluded_from, const Tensor& excluded_to, const Tensor& num_active,
    const Tensor& num_admissible, const Tensor& borders, const Tensor& ends, const Tensor& share,
    const Tensor& first_tile, const Tensor& last_tile, double scale, double inverse_temperature,
    bool offset_needed, double lowest, int64_t headroom, bool tf32, bool sm_90a) {
  check_features(anchors, anchors, "anchors");
  check_features(positives, anchors, "positives");
  check_features(negatives, anchors, "negatives");
  const c10::DeviceGuard guard(anchors.device());
  const Kernels& kernels = find_kernels(anchors.scalar_type(), tf32, sm_90a);
  const int64_t count = positives.size(0), padded = anchors.size(1);
  const int64_t tiles = ends.numel(), programs = first_tile.numel();
  const Sizes sizes = kernels.sizes(padded);
  check_ordered(anchors, sizes.tile, padded, "anchors");
  check_ordered(negatives, sizes.block, padded, "negatives");
  TORCH_CHECK_VALUE(tiles > 0 && programs > 0, "the plan must have tiles and programs");
  TORCH_CHECK_VALUE(
      anchors.size(0) == tiles * sizes.tile && count <= anchors.size(0) &&
          positives.size(1) <= padded,
      "anchors, positives and the plan are not of the same size");
  const int64_t slots = sizes.tile * (tiles + programs);

  const auto floats = anchors.options().dtype(at::kFloat);
  const Tensor sums = at::empty({slots * (padded + 2)}, floats);
  const Tensor loss = at::empty({count}, floats);
  const Tensor gradient = at::empty(positives.sizes(), anchors.options());

  Operands given{};
  given.anchors = anchors.const_data_ptr();
  given.negatives = negatives.const_data_ptr();
  given.positives = positives.const_data_ptr();
  given.positives_stride = positives.stride(0);
  given.positives_stride_d = positives.stride(1);
  given.order = data<int64_t>(order, anchors, count);
  given.excluded_from = data<int32_t>(excluded_from, anchors, count);
  given.excluded_to = data<int32_t>(excluded_to, anchors, count);
  given.num_active = data<int32_t>(num_active, anchors, 1);
  given.num_admissible = data<int32_t>(num_admissible, anchors, 1);
  given.borders = data<int32_t>(borders, anchors, 4 * tiles);
  given.ends = data<int64_t>(ends, anchors, tiles);
  given.share = data<int64_t>(share, anchors, 1);
  given.first_tile = data<int32_t>(first_tile, anchors, programs);
  given.last_tile = data<int32_t>(last_tile, anchors, programs);
  given.weighted = sums.mutable_data_ptr<float>();
  given.total = given.weighted + slots * padded;
  given.offset = given.total + slots;
  given.loss = loss.mutable_data_ptr<float>();
  given.gradient = gradient.mutable_data_ptr();
  given.count = count;
  given.tiles = tiles;
  given.blocks = negatives.size(0) / sizes.block;
  given.dim = positives.size(1);
  given.scale = static_cast<float>(scale);
  given.lowest = static_cast<float>(lowest);
  given.headroom = static_cast<float>(headroom);
  given.inverse_temperature = static_cast<float>(inverse_temperature);
  kernels.launch(given, padded, programs, offset_needed);
  return {loss, gradient};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(CAC_FAST_LIBRARY, library) {
  library.def(
      "dc_loss_sizes_cuda(Tensor anchors, int padded, bool tf32, bool sm_90a) -> (int, int, int)");
  library.def(
      "dc_loss_rows_cuda(Tensor anchors, Tensor positives, Tensor negatives, Tensor order, "
      "Tensor excluded_from, Tensor excluded_to, Tensor active, Tensor admissible, Tensor borders, "
      "Tensor ends, Tensor share, Tensor first_tile, Tensor last_tile, float scale, "
      "float inverse_temperature, bool offset_needed, float lowest, int headroom, bool tf32, "
      "bool sm_90a) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(CAC_FAST_LIBRARY, CAC_FAST_DEVICE, library) {
  library.impl("dc_loss_sizes_cuda", &sizes);
  library.impl("dc_loss_rows_cuda", &dc_loss_rows);
}

}  // namespace cac_fast::cuda
