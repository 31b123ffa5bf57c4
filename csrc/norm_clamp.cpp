// cac_fast::norm_clamp: batch norm by the batch's statistics, clamped (ReLU6, ReLU), on channels-
// last float32. Memory sets its time, so the statistics take one read, and no mask is kept.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <tuple>
#include <vector>

#include "clones.h"

namespace cac_fast {
namespace {

using at::Tensor;
using Values = std::vector<float>;
using Sums = std::vector<double>;

// Floats of a chunk, which a core's L2 cache holds, and the fewest of a row.
constexpr int64_t kChunk = 65536;
constexpr int64_t kRow = 256;

// Values (pixels, channels), cut into chunks by the sizes alone, so that sums do not depend on the
// number of threads. A chunk is taken in rows of a few pixels, else 16 channels are a short loop.
struct Chunks {
  explicit Chunks(const Tensor& x)
      : channels(x.size(1)),
        total(x.numel()),
        row(channels * ((kRow + channels - 1) / channels)),
        size(row * std::max<int64_t>(1, kChunk / row)),
        count((total + size - 1) / size),
        pixels(static_cast<double>(total) / static_cast<double>(channels)) {}

  // work(chunk, begin, length) for every chunk.
  template <typename Work>
  void each(const Work& work) const {
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) work(i, i * size, std::min(size, total - i * size));
    });
  }

  // A value a channel for each place of a row.
  template <typename Of>
  Values along_row(const Of& of_channel) const {
    Values result(row);
    for (int64_t c = 0; c < channels; ++c) result[c] = static_cast<float>(of_channel(c));
    for (int64_t i = channels; i < row; ++i) result[i] = result[i - channels];
    return result;
  }

  // The sums of a row's places, added to those of their channels.
  void fold(const Values& of_row, double* to) const {
    for (int64_t pixel = 0; pixel < row; pixel += channels) {
      for (int64_t c = 0; c < channels; ++c) to[c] += of_row[pixel + c];
    }
  }

  double pixels_of(int64_t chunk) const {
    return static_cast<double>(std::min(size, total - chunk * size)) / static_cast<double>(channels);
  }

  int64_t channels, total, row, size, count;
  double pixels;
};

CAC_FAST_CLONES
void add(const float* x, int64_t length, int64_t row, float* sum) {
  for (int64_t begin = 0; begin < length; begin += row) {
    const int64_t n = std::min(row, length - begin);
    for (int64_t i = 0; i < n; ++i) sum[i] += x[begin + i];
  }
}

CAC_FAST_CLONES
void add_squares(const float* x, int64_t length, int64_t row, const float* mean, float* sum) {
  for (int64_t begin = 0; begin < length; begin += row) {
    const int64_t n = std::min(row, length - begin);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float d = x[begin + i] - mean[i];
      sum[i] += d * d;
    }
  }
}

// A NaN stays one.
CAC_FAST_CLONES
void apply(
    const float* x, int64_t length, int64_t row, const float* scale, const float* shift, float low,
    float high, float* y) {
  for (int64_t begin = 0; begin < length; begin += row) {
    const int64_t n = std::min(row, length - begin);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      float z = x[begin + i] * scale[i] + shift[i];
      z = z < low ? low : z;
      y[begin + i] = z > high ? high : z;
    }
  }
}

inline float passed(float z, float gradient, float low, float high) {
  return (z <= low) | (z >= high) ? 0.0F : gradient;
}

CAC_FAST_CLONES
void add_gradients(
    const float* g, const float* x, int64_t length, int64_t row, const float* scale,
    const float* shift, const float* mean, float low, float high, float* sum, float* moment) {
  for (int64_t begin = 0; begin < length; begin += row) {
    const int64_t n = std::min(row, length - begin);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float value = x[begin + i];
      const float d = passed(value * scale[i] + shift[i], g[begin + i], low, high);
      sum[i] += d;
      moment[i] += d * (value - mean[i]);
    }
  }
}

CAC_FAST_CLONES
void apply_backward(
    const float* g, const float* x, int64_t length, int64_t row, const float* scale,
    const float* shift, const float* mean, const float* slope, const float* offset, float low,
    float high, float* to) {
  for (int64_t begin = 0; begin < length; begin += row) {
    const int64_t n = std::min(row, length - begin);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float value = x[begin + i];
      const float d = passed(value * scale[i] + shift[i], g[begin + i], low, high);
      to[begin + i] = d * scale[i] - (value - mean[i]) * slope[i] - offset[i];
    }
  }
}

// The mean and 1 / sqrt(variance + eps) of each channel of a batch, as kept for backward.
struct Statistics {
  explicit Statistics(const Tensor& kept)
      : mean(kept.const_data_ptr<double>()), inverse(mean + kept.size(1)) {}

  const double *mean, *inverse;
};

// How a batch is normalized, along a row: x * scale + shift.
struct Affine {
  Affine(const Chunks& chunks, const Statistics& of, const Tensor& weight, const Tensor& bias) {
    const float* const weights = weight.const_data_ptr<float>();
    const float* const biases = bias.const_data_ptr<float>();
    const auto slope = [&](int64_t c) { return weights[c] * of.inverse[c]; };
    scale = chunks.along_row(slope);
    shift = chunks.along_row([&](int64_t c) { return biases[c] - of.mean[c] * slope(c); });
  }

  Values scale, shift;
};

// Of each chunk the mean and the squares about it, which is as exact as two reads of the whole
// batch. Moves the running statistics; returns what `Statistics` takes, (2, channels).
Tensor take_statistics(
    const Chunks& chunks, const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
    double momentum, double eps) {
  const int64_t channels = chunks.channels;
  const float* const values = x.const_data_ptr<float>();
  Sums means(chunks.count * channels), squares(chunks.count * channels);
  chunks.each([&](int64_t chunk, int64_t begin, int64_t length) {
    double* const mean = &means[chunk * channels];
    Values of_row(chunks.row);
    add(values + begin, length, chunks.row, of_row.data());
    chunks.fold(of_row, mean);
    for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<double>(length / channels);
    const Values along = chunks.along_row([&](int64_t c) { return mean[c]; });
    std::fill(of_row.begin(), of_row.end(), 0.0F);
    add_squares(values + begin, length, chunks.row, along.data(), of_row.data());
    chunks.fold(of_row, &squares[chunk * channels]);
  });

  const Tensor kept = at::zeros({2, channels}, at::kDouble);
  double *const mean = kept.mutable_data_ptr<double>(), *const inverse = mean + channels;
  const auto combine = [&](const auto& add_chunk) {
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const double share = chunks.pixels_of(chunk) / chunks.pixels;
      for (int64_t c = 0; c < channels; ++c) add_chunk(c, chunk * channels + c, share);
    }
  };
  combine([&](int64_t c, int64_t at, double share) { mean[c] += share * means[at]; });
  double* const variance = inverse;  // until it is known
  const double one = 1 / chunks.pixels;
  combine([&](int64_t c, int64_t at, double share) {
    const double d = means[at] - mean[c];
    variance[c] += squares[at] * one + share * d * d;
  });
  float* const moved_mean = running_mean.mutable_data_ptr<float>();
  float* const moved_var = running_var.mutable_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    const double unbiased = variance[c] * chunks.pixels / (chunks.pixels - 1);
    moved_mean[c] += static_cast<float>(momentum * (mean[c] - moved_mean[c]));
    moved_var[c] += static_cast<float>(momentum * (unbiased - moved_var[c]));
    inverse[c] = 1 / std::sqrt(variance[c] + eps);
  }
  return kept;
}

void check_sizes(const Tensor& x, std::initializer_list<Tensor> of_channels) {
  TORCH_CHECK(
      x.dim() == 4 && x.numel() > x.size(1) && x.is_contiguous(at::MemoryFormat::ChannelsLast),
      "norm_clamp: expected several pixels in channels-last");
  for (const Tensor& one : of_channels) {
    TORCH_CHECK(one.numel() == x.size(1), "norm_clamp: expected ", x.size(1), " channels");
  }
}

// y, and the statistics for backward.
std::tuple<Tensor, Tensor> norm_clamp(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& running_mean,
    const Tensor& running_var, double momentum, double eps, double low, double high) {
  check_sizes(x, {weight, bias, running_mean, running_var});
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Chunks chunks(x);
  const Tensor kept = take_statistics(chunks, x, running_mean, running_var, momentum, eps);
  const Affine affine(chunks, Statistics(kept), weight, bias);
  const Tensor y = at::empty_like(x);
  const float* const from = x.const_data_ptr<float>();
  float* const to = y.mutable_data_ptr<float>();
  const auto lowest = static_cast<float>(low), highest = static_cast<float>(high);
  chunks.each([&](int64_t, int64_t begin, int64_t length) {
    apply(
        from + begin, length, chunks.row, affine.scale.data(), affine.shift.data(), lowest, highest,
        to + begin);
  });
  return {y, kept};
}

// The gradients of x, weight and bias.
std::tuple<Tensor, Tensor, Tensor> norm_clamp_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& weight, const Tensor& bias,
    const Tensor& kept, double low, double high) {
  const Chunks chunks(x);
  const Statistics of(kept);
  const int64_t channels = chunks.channels;
  const Affine affine(chunks, of, weight, bias);
  const Values mean = chunks.along_row([&](int64_t c) { return of.mean[c]; });
  const float *const values = x.const_data_ptr<float>(), *const g = gradient.const_data_ptr<float>();
  const auto lowest = static_cast<float>(low), highest = static_cast<float>(high);

  Sums sums(chunks.count * channels), moments(chunks.count * channels);
  chunks.each([&](int64_t chunk, int64_t begin, int64_t length) {
    Values sum(chunks.row), moment(chunks.row);
    add_gradients(
        g + begin, values + begin, length, chunks.row, affine.scale.data(), affine.shift.data(),
        mean.data(), lowest, highest, sum.data(), moment.data());
    chunks.fold(sum, &sums[chunk * channels]);
    chunks.fold(moment, &moments[chunk * channels]);
  });
  Sums sum(channels), moment(channels);
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] += sums[chunk * channels + c];
      moment[c] += moments[chunk * channels + c];
    }
  }
  const auto rounding = [&](int64_t c) { return mean[c] - of.mean[c]; };
  for (int64_t c = 0; c < channels; ++c) moment[c] += rounding(c) * sum[c];

  const Tensor of_x = at::empty_like(x), of_weight = at::empty_like(weight);
  const Tensor of_bias = at::empty_like(bias);
  for (int64_t c = 0; c < channels; ++c) {
    of_weight.mutable_data_ptr<float>()[c] = static_cast<float>(moment[c] * of.inverse[c]);
    of_bias.mutable_data_ptr<float>()[c] = static_cast<float>(sum[c]);
  }
  const float* const weights = weight.const_data_ptr<float>();
  const auto scale_of = [&](int64_t c) { return weights[c] * of.inverse[c]; };
  const auto slope_of = [&](int64_t c) {
    return scale_of(c) * of.inverse[c] * of.inverse[c] * moment[c] / chunks.pixels;
  };
  const Values slope = chunks.along_row(slope_of);
  const Values offset = chunks.along_row([&](int64_t c) {
    return scale_of(c) * sum[c] / chunks.pixels + rounding(c) * slope_of(c);
  });
  float* const to = of_x.mutable_data_ptr<float>();
  chunks.each([&](int64_t, int64_t begin, int64_t length) {
    apply_backward(
        g + begin, values + begin, length, chunks.row, affine.scale.data(), affine.shift.data(),
        mean.data(), slope.data(), offset.data(), lowest, highest, to + begin);
  });
  return {of_x, of_weight, of_bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cac_fast, library) {
  library.def(
      "norm_clamp(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean, "
      "Tensor(b!) running_var, float momentum, float eps, float low, float high) -> "
      "(Tensor, Tensor)");
  library.def(
      "norm_clamp_backward(Tensor gradient, Tensor x, Tensor weight, Tensor bias, Tensor kept, "
      "float low, float high) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(cac_fast, CPU, library) {
  library.impl("norm_clamp", &norm_clamp);
  library.impl("norm_clamp_backward", &norm_clamp_backward);
}

}  // namespace cac_fast
