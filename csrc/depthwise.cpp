// cac_fast::depthwise_backward: both gradients of a depthwise convolution in one pass over the
// output's, channels-last float32, with any stride and dilation.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "clones.h"

namespace cac_fast {
namespace {

using at::Tensor;

// Channels of a task, a multiple of what a vector holds: more tasks than there are images.
constexpr int64_t kChannels = 128;

struct Shape {
  int64_t channels, height, width, rows, columns, kernel_rows, kernel_columns;
  int64_t stride, row_padding, column_padding, dilation;

  int64_t taps() const { return kernel_rows * kernel_columns; }
};

// The gradients that the outputs of one row give to `n` channels: added to `of_x`, an image's, and
// to `of_weight` (taps, n). g, x, of_x: from the first of the channels. weight: (taps, n).
CAC_FAST_CLONES
void add_row(
    const Shape& s, int64_t row, int64_t n, const float* g, const float* x, const float* weight,
    float* of_x, float* of_weight) {
  for (int64_t column = 0; column < s.columns; ++column) {
    const float* const from = g + (row * s.columns + column) * s.channels;
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      const int64_t y = row * s.stride - s.row_padding + tap / s.kernel_columns * s.dilation;
      const int64_t z = column * s.stride - s.column_padding + tap % s.kernel_columns * s.dilation;
      if (y < 0 || y >= s.height || z < 0 || z >= s.width) continue;
      const int64_t place = (y * s.width + z) * s.channels;
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        of_x[place + c] += from[c] * weight[tap * n + c];
        of_weight[tap * n + c] += from[c] * x[place + c];
      }
    }
  }
}

std::tuple<Tensor, Tensor> depthwise_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& weight, int64_t stride,
    at::IntArrayRef padding, int64_t dilation) {
  const Shape s{x.size(1),      x.size(2),      x.size(3),  gradient.size(2),
                gradient.size(3), weight.size(2), weight.size(3), stride,
                padding[0],     padding[1],     dilation};
  const int64_t batch = x.size(0), taps = s.taps(), image = s.height * s.width * s.channels;
  const int64_t blocks = (s.channels + kChannels - 1) / kChannels;
  const Tensor of_x = at::empty_like(x), of_weight = at::empty_like(weight);
  std::vector<float> parts(batch * taps * s.channels);  // of_weight of each image, tap by tap
  const float* const weights = weight.const_data_ptr<float>();  // (channels, taps)
  at::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks, first = task % blocks * kChannels;
      const int64_t n = std::min(kChannels, s.channels - first);
      std::vector<float> of_taps(taps * n), of_row(taps * n);
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t c = 0; c < n; ++c) of_taps[tap * n + c] = weights[(first + c) * taps + tap];
      }
      float* const to = of_x.mutable_data_ptr<float>() + b * image + first;
      for (int64_t at = 0; at < image; at += s.channels) std::fill_n(to + at, n, 0.0F);
      const float* const from = x.const_data_ptr<float>() + b * image + first;
      const float* const g =
          gradient.const_data_ptr<float>() + b * s.rows * s.columns * s.channels + first;
      float* const part = &parts[(b * s.channels + first) * taps];
      for (int64_t row = 0; row < s.rows; ++row) {
        std::fill(of_row.begin(), of_row.end(), 0.0F);
        add_row(s, row, n, g, from, of_taps.data(), to, of_row.data());
        for (int64_t i = 0; i < taps * n; ++i) part[i] += of_row[i];
      }
    }
  });
  float* const to = of_weight.mutable_data_ptr<float>();
  for (int64_t channel = 0; channel < s.channels; ++channel) {
    const int64_t first = channel / kChannels * kChannels;
    const int64_t n = std::min(kChannels, s.channels - first);
    for (int64_t tap = 0; tap < taps; ++tap) {
      float sum = 0;
      for (int64_t b = 0; b < batch; ++b) {
        sum += parts[(b * s.channels + first) * taps + tap * n + channel - first];
      }
      to[channel * taps + tap] = sum;
    }
  }
  return {of_x, of_weight};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cac_fast, library) {
  library.def(
      "depthwise_backward(Tensor gradient, Tensor x, Tensor weight, int stride, int[2] padding, "
      "int dilation) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(cac_fast, CPU, library) { library.impl("depthwise_backward", &depthwise_backward); }

}  // namespace cac_fast
